"""The account itself: each kind of fault is found in ledgers that have it, and what a failover may do is none."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ensemble.account import LEASE, settle

OLD, NEW = ["127.0.0.1", 1], ["127.0.0.1", 2]  # addresses
QUEUE = "/queue/q"


def delivery(life: float, at: float, address: list[Any], **more: Any) -> dict[str, Any]:
    row = {"id": "p-0", "sha": "s", "message_id": "m", "redelivered": "false", "from": QUEUE, "reason": None}
    return row | {"life": life, "at": at, "address": address} | more


def ack(life: float, confirmed: float | None, address: list[Any]) -> dict[str, Any]:
    return {"message_id": "m", "from": QUEUE, "life": life, "confirmed": confirmed, "address": address}


def faults(deliveries: list[dict[str, Any]], acks: list[dict[str, Any]], **sent: Any) -> set[str]:
    row = {"to": QUEUE, "sha": "s", "attempts": 1, "confirmed": 1.0} | sent
    producer = {"role": "Producer", "name": "p", "connections": 1, "sent": {"p-0": row}}
    consumer = {"role": "Consumer", "name": "c", "connections": 1, "destinations": [QUEUE], "alone": True}
    return set(settle([producer, consumer | {"deliveries": deliveries, "acks": acks}]).faults)


def test_delivered_once():
    assert faults([delivery(1.0, 2.0, OLD)], [ack(1.0, 3.0, OLD)]) == set()


def test_lost():
    assert faults([], []) == {"lost"}
    assert faults([], [], confirmed=None) == set()


def test_changed_or_never_sent():
    assert faults([delivery(1.0, 2.0, OLD, sha="other")], []) == {"corrupted"}
    assert faults([delivery(1.0, 2.0, OLD), delivery(1.0, 2.0, OLD, id="p-1", message_id="n")], []) == {"unexpected"}


def test_repeat_is_marked_whichever_was_read_first():
    first, again = delivery(1.0, 2.0, OLD), delivery(5.0, 6.0, NEW)
    assert faults([first, again], []) == {"repeat not marked"}
    assert faults([first, again | {"redelivered": "true"}], []) == set()
    assert faults([first | {"redelivered": "true"}, again], []) == set()


@pytest.mark.parametrize(
    ("again", "late"),
    [
        (delivery(4.0, 4.5, OLD), True),  # by the broker that confirmed it
        (delivery(4.0, 3.0 + LEASE, NEW), False),  # by a deposed leader that does not know it
        (delivery(4.0, 3.1 + LEASE, NEW), True),  # its lease has ended
        (delivery(2.5, 9.0, NEW), False),  # it may have waited for its reader since before
        (delivery(1.0, 3.5, OLD), True),  # on the connection that had brought the receipt
        (delivery(1.0, 2.5, OLD), False),
    ],
)
def test_delivered_after_its_acknowledgement(again: dict[str, Any], late: bool):
    found = faults([delivery(1.0, 2.0, OLD), again | {"redelivered": "true"}], [ack(1.0, 3.0, OLD)])
    assert found == ({"delivered after its acknowledgement was confirmed"} if late else set())
