"""The checker of networks itself: it sees what it is for, and nothing in what is right."""

from __future__ import annotations

import pytest

from tests.sim.checkers import Findings
from tests.sim.net_account import NetAccount

LEASE = 2.0
AT_A, AT_B = ("a1.1", 1, "one"), ("b1.1", 1, "one")


def make(later: dict[tuple[str, int], float] | None = None) -> tuple[list[str], NetAccount]:
    findings = Findings(lambda: None)
    known = later or {}
    return findings.texts, NetAccount(findings, lambda name, epoch: known.get((name, epoch)), LEASE, 3)


def sent(account: NetAccount, name: str = "m", *receivers: str) -> bytes:
    body = f"{name}|".encode()
    account.attempt(name, body, receivers or ("",))
    account.confirm(name, 1.0)
    return body


def test_nothing_is_found_in_what_is_right() -> None:
    found, account = make({("a", 1): 2.5})
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    account.forward("b", ("a",), body, True)
    account.forward("b", ("a",), body, False)
    account.deliver(AT_B, "id", body, True, 3.0)
    account.try_ack(body, "r")
    account.confirm_ack(body, "r", "b", 3.5)
    account.deliver(AT_A, "id", body, True, 4.0)  # deposed, and its lease is not over
    account.settle()
    assert found == []


def test_what_was_confirmed_has_to_come() -> None:
    found, account = make()
    sent(account)
    account.settle()
    assert len(found) == 1
    assert "lost: 'm'" in found[0]


def test_each_durable_subscriber_has_to_get_its_copy() -> None:
    found, account = make()
    account.subscribers = ["u0", "u1"]
    body = sent(account, "m", "u0", "u1")
    account.deliver(("a1.1", 1, "u0"), "id", body, False, 2.0)
    account.deliver(("b1.1", 1, "u1"), "id", body, False, 2.0)
    account.try_ack(body, "u0")
    account.confirm_ack(body, "u0", "a", 3.0)
    assert found == []
    account.settle()
    assert len(found) == 1
    assert "for u1" in found[0]


def test_a_copy_that_was_stored_twice_shows_in_a_delivery_without_a_mark() -> None:
    found, account = make()
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    account.deliver(AT_B, "id", body, False, 2.1)
    assert len(found) == 1


def test_a_dead_letter_begins_anew() -> None:
    found, account = make()
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    account.deliver(("a1.1", 1, "ActiveMQ.DLQ"), "id", body, False, 2.1)
    assert found == []


def test_what_is_acknowledged_is_delivered_nowhere_again() -> None:
    found, account = make()
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    account.try_ack(body, "r")
    account.confirm_ack(body, "r", "a", 2.5)
    account.deliver(AT_B, "id", body, True, 3.0)
    assert len(found) == 1


def test_what_is_acknowledged_at_a_removed_set_may_come_again() -> None:
    found, account = make()
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    account.try_ack(body, "r")
    account.confirm_ack(body, "r", "a", 2.5)
    account.removed.add("a")
    account.deliver(AT_B, "id", body, True, 3.0)
    assert found == []


def test_a_deposed_leader_shows_nothing_after_its_lease() -> None:
    found, account = make({("a", 1): 2.5})
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.5 + LEASE + 0.1)
    assert len(found) == 1


@pytest.mark.parametrize("body", [b"x|", b"m|other"])
def test_what_nobody_sent_is_seen(body: bytes) -> None:
    found, account = make()
    sent(account)
    account.forward("b", ("a",), body, True)
    account.deliver(AT_A, "id", body, False, 2.0)
    assert len(found) == 2


def test_what_was_not_taken_is_never_delivered() -> None:
    found, account = make()
    account.attempt("m", b"m|")
    account.deny("m")
    account.deliver(AT_A, "id", b"m|", False, 2.0)
    assert len(found) == 1


def test_one_message_has_one_id() -> None:
    found, account = make()
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    account.deliver(AT_A, "other", body, True, 2.1)
    assert len(found) == 1


@pytest.mark.parametrize("passed", [("a", "b", "c", "d"), ("b",)])
def test_a_message_that_goes_too_far_or_in_circles_is_seen(passed: tuple[str, ...]) -> None:
    found, account = make()
    body = sent(account)
    account.forward("b", passed, body, True)
    assert len(found) == 1


def test_a_message_that_is_forwarded_without_end_is_seen() -> None:
    found, account = make()
    body = sent(account)
    for _ in range(4):
        account.forward("b", ("a",), body, True)
    assert len(found) == 1


def test_a_transaction_is_whole_or_not_there() -> None:
    found, account = make()
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    account.attempt("moved", b"moved|")
    account.try_move(body, "moved")
    account.settle()
    assert len(found) == 1
    assert "was not sent with it" in found[0]


def test_who_has_sent_in_a_transaction_has_acknowledged() -> None:
    found, account = make()
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    account.attempt("moved", b"moved|")
    account.try_move(body, "moved")
    account.deliver(("a1.1", 1, "moved"), "other", b"moved|", False, 2.5)
    account.deliver(AT_A, "id", body, True, 3.0)
    assert len(found) == 1


def test_nobody_is_told_twice_that_a_message_is_acknowledged() -> None:
    found, account = make()
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    for _ in range(2):
        account.try_ack(body, "r")
        account.confirm_ack(body, "r", "a", 3.0)
    assert len(found) == 1


def test_a_transaction_that_came_too_late_took_nothing() -> None:
    found, account = make()
    body = sent(account)
    account.deliver(AT_A, "id", body, False, 2.0)
    account.try_ack(body, "r")
    account.attempt("moved", b"moved|")
    account.try_move(body, "moved")
    account.settle()
    assert found == []
