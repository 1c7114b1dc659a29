"""The account of a network finds what it is for: each fault is planted in ledgers that are in order."""

from __future__ import annotations

from typing import Any

from tests.network_real.account import settle


def ledgers() -> list[dict[str, Any]]:
    """One message, sent to one set and taken at another; and a program that wanders, in doubt of its only send."""
    sent = {"to": "/queue/q", "sha": "s", "attempts": 1, "confirmed": 1.0, "message_id": "m"}
    row = {"id": "p-0", "sha": "s", "message_id": "m", "redelivered": "false", "from": "/queue/q", "reason": None}
    row |= {"life": 0.5, "at": 2.0, "address": "b"}
    ack = {"message_id": "m", "from": "/queue/q", "life": 0.5, "address": "b", "confirmed": 3.0}
    doubt = {"to": "/queue/q", "sha": "t", "attempts": 1, "confirmed": None}
    return [
        {"name": "p", "connections": 1, "once": True, "repeated": 1, "sent": {"p-0": sent}},
        {"name": "w", "connections": 2, "once": True, "wanders": True, "repeated": 0, "sent": {"w-0": doubt}},
        {"name": "c", "connections": 1, "deliveries": [row], "acks": [ack]},
    ]


def faults_of(found: list[dict[str, Any]]) -> set[str]:
    return set(settle(found).faults)


def test_nothing_is_wrong():
    account = settle(ledgers())
    assert not account.faults
    assert account.counts["sent once"] == account.counts["repeated by clients"] == 1


def test_a_message_that_was_lost():
    found = ledgers()
    found[2] |= {"deliveries": [], "acks": []}
    assert faults_of(found) == {"lost"}


def test_a_message_that_nobody_sent():
    found = ledgers()
    del found[0]["sent"]["p-0"]
    assert faults_of(found) == {"unexpected"}


def test_a_copy_with_another_id():
    """What the client sent again was taken as a message of its own."""
    found = ledgers()
    found[2]["deliveries"].append(found[2]["deliveries"][0] | {"message_id": "n", "at": 2.5})
    assert faults_of(found) == {"stored twice"}


def test_a_copy_with_the_same_id():
    """What a broker forwarded again was taken as a message of its own."""
    found = ledgers()
    found[2]["deliveries"].append(found[2]["deliveries"][0] | {"address": "a", "at": 2.5})
    assert faults_of(found) == {"repeat not marked"}


def test_a_copy_that_comes_after_the_acknowledgement():
    found = ledgers()
    late = {"redelivered": "true", "address": "a", "life": 4.0, "at": 9.0}
    found[2]["deliveries"].append(found[2]["deliveries"][0] | late)
    assert faults_of(found) == {"delivered after its acknowledgement was confirmed"}


def test_a_doubt_that_there_was_no_reason_for():
    found = ledgers()
    found[1]["wanders"] = False
    assert faults_of(found) == {"in doubt"}
    assert not faults_of(ledgers())


def test_a_transaction_in_doubt():
    found = ledgers()
    found[0]["transactions"] = [{"ids": ["p-0"], "end": "commit", "confirmed": None}]
    assert faults_of(found) == {"in doubt"}
