"""The checkers themselves: each sees what it is for, and nothing in what is right."""

from __future__ import annotations

import pytest

from tests.sim.checkers import Account, Findings, Positions

HISTORY = [(1, 1), (2, 4)]  # epoch 2 begins with batch 4


def make(durable: bool = True) -> tuple[Findings, Positions, Account]:
    findings = Findings(lambda: None)
    positions = Positions(findings)
    return findings, positions, Account(findings, positions, 2.0, durable)


def test_nothing_is_found_in_what_is_right() -> None:
    findings, positions, account = make()
    positions.elected(1, "a.1", 0.0)
    positions.stored("a", (1, 3), 33)
    positions.stored("b", (1, 3), 33)
    positions.confirmed("a.1", (1, 3), 33, [(1, 1)])
    positions.elected(2, "b.1", 5.0)
    positions.confirmed("b.1", (2, 5), 55, HISTORY)
    positions.confirmed("a.1", (1, 3), 33, [(1, 1)])
    account.attempt("m", "q", b"m|")
    account.confirm("m", "id", True, 1.0)
    account.deliver(("a.1", 1, "q"), "id", b"m|", False, 2.0)
    account.deliver(("b.1", 2, "q"), "id", b"m|", False, 6.0)
    account.try_ack("id")
    account.confirm_ack("id", 2, 6.5)
    account.deliver(("a.1", 1, "q"), "id", b"m|", True, 6.9)  # deposed, and its lease is not over
    account.settle({}, [])
    assert findings.texts == []


@pytest.mark.parametrize(
    ("position", "fingerprint", "history"),
    [
        ((2, 3), 33, [(2, 3)]),  # another batch at a confirmed number
        ((1, 3), 34, [(1, 1)]),  # the same batch with something else in it
        ((2, 4), 44, [(2, 3)]),  # went another way before
    ],
)
def test_two_leaders_do_not_confirm_one_position(position, fingerprint, history) -> None:
    findings, positions, _ = make()
    positions.confirmed("a.1", (1, 3), 33, [(1, 1)])
    positions.confirmed("b.1", position, fingerprint, history)
    assert len(findings.texts) == 1


def test_what_is_confirmed_with_a_later_batch_stays() -> None:
    findings, positions, _ = make()
    positions.confirmed("b.1", (2, 5), 55, HISTORY)
    positions.confirmed("b.1", (2, 7), 77, HISTORY)
    positions.confirmed("a.1", (1, 6), 66, [(1, 1)])
    assert len(findings.texts) == 1


def test_stores_at_one_position_are_the_same_and_an_epoch_has_one_leader() -> None:
    findings, positions, _ = make()
    positions.stored("a", (1, 3), 33)
    positions.stored("b", (1, 3), 34)
    positions.elected(1, "a.1", 0.0)
    positions.elected(1, "b.1", 1.0)
    assert len(findings.texts) == 2


def sent(account: Account, *names: str) -> None:
    for name in names:
        account.attempt(name, "q", f"{name}|".encode())
        account.confirm(name, f"id-{name}", True, 1.0)


def deliver(account: Account, name: str, epoch: int = 1, now: float = 2.0, redelivered: bool = False) -> None:
    account.deliver((f"x.{epoch}", epoch, "q"), f"id-{name}", f"{name}|".encode(), redelivered, now)


def test_a_confirmed_message_is_not_lost() -> None:
    findings, _, account = make()
    sent(account, "kept", "stored", "lost", "acked")
    deliver(account, "lost")
    deliver(account, "acked")
    account.try_ack("id-acked")
    account.settle({"id-kept": 1}, ["stored"])
    assert [text.split(",")[0] for text in findings.texts] == ["'lost'"]
    findings, _, account = make(durable=False)
    sent(account, "lost")
    account.settle({}, [])
    assert findings.texts == []


def test_nothing_is_delivered_that_was_not_sent_so_or_that_was_acknowledged() -> None:
    findings, _, account = make()
    sent(account, "m")
    account.deliver(("a.1", 1, "q"), "id-m", b"m|other", False, 1.0)
    account.deliver(("a.1", 1, "q"), "id-m", b"n|", False, 1.0)
    assert len(findings.texts) == 2
    deliver(account, "m", epoch=2)
    account.confirm_ack("id-m", 2, 3.0)
    deliver(account, "m", epoch=1, now=3.5)
    assert len(findings.texts) == 2
    deliver(account, "m", epoch=3, now=4.0)
    assert len(findings.texts) == 3


def test_a_repeat_is_marked_and_nothing_is_shown_long_after_the_next_election() -> None:
    findings, positions, account = make()
    sent(account, "m")
    deliver(account, "m")
    deliver(account, "m", redelivered=True)
    assert findings.texts == []
    deliver(account, "m")
    assert len(findings.texts) == 1
    positions.elected(1, "x.1", 0.0)
    positions.elected(2, "y.1", 10.0)
    deliver(account, "m", now=11.9, redelivered=True)
    assert len(findings.texts) == 1
    deliver(account, "m", now=12.1, redelivered=True)
    assert len(findings.texts) == 2


@pytest.mark.parametrize(
    ("found", "back", "faults"), [(True, False, 0), (False, True, 0), (True, True, 1), (False, False, 1)]
)
def test_a_transaction_is_whole(found: bool, back: bool, faults: int) -> None:
    findings, _, account = make()
    sent(account, "m")
    deliver(account, "m")
    account.attempt("n", "moved", b"n|")
    account.try_move("id-m", "n")
    if found:
        deliver(account, "n")
    account.settle({"id-m": 1} if back else {}, [])
    assert len(findings.texts) == faults
