"""The demo's book-keeping finds each broken promise that is planted: a demo that can't fail shows nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from demo_account import DEAD_LETTER_QUEUE, Account
from hl7_messages import Hl7Message, make_messages

MESSAGES = list(make_messages(3, 100))
GOOD = MESSAGES[10]
REJECTED = MESSAGES[49]


def delivery(message: Hl7Message, **changes: Any) -> dict[str, Any]:
    line = {
        "control_id": message.control_id,
        "queue": message.queue,
        "message_id": f"id-{message.number}",
        "redelivered": False,
        "sha256": message.sha256,
        "accepted": message.names_patient,
        "origin": None,
    }
    return {**line, **changes}


def dead_letter(message: Hl7Message, **changes: Any) -> dict[str, Any]:
    return delivery(message, **{"queue": DEAD_LETTER_QUEUE, "origin": message.queue, **changes})


def whole_run() -> Iterator[dict[str, Any]]:
    for message in MESSAGES:
        yield delivery(message)
        if not message.names_patient:
            yield from (delivery(message, redelivered=True) for _ in range(5))
            yield dead_letter(message)
    done = [message.control_id for message in MESSAGES]
    yield {"done": done, "sent_again": {GOOD.queue: 1}, "connections": 2, "seconds": 1.0}


def account_of(*more: dict[str, Any], without: Hl7Message | None = None) -> Account:
    account = Account(MESSAGES)
    for line in whole_run():
        if without is not None and line.get("control_id") == without.control_id:
            continue
        account.take(line)
    for line in more:
        account.take(line)
    return account


def test_a_run_in_which_every_promise_held():
    account = account_of()
    assert account.faults() == []
    name, total = account.rows()[-1]
    assert name == "all"
    assert total == {
        "sent": 100,
        "sent_again": 1,
        "confirmed": 100,
        "delivered": 100,
        "redelivered": 10,
        "duplicates": 0,
        "rejected": 2,
        "dead_lettered": 2,
        "lost": 0,
        "corrupted": 0,
    }


def test_a_duplicate_of_a_message_that_was_sent_again_is_counted_and_no_fault():
    account = account_of(delivery(GOOD, message_id="another"))
    assert account.faults() == []
    assert account.rows()[-1][1]["duplicates"] == 1


@pytest.mark.parametrize(
    ("account", "fault"),
    [
        (account_of(without=GOOD), "1 messages confirmed and lost: S3N000010"),
        (account_of(without=REJECTED), "1 messages rejected and not among the dead letters: S3N000049"),
        (account_of(delivery(GOOD, sha256="0" * 64, redelivered=True)), "1 deliveries corrupted"),
        (account_of(delivery(GOOD, control_id=None)), "1 deliveries corrupted"),
        (account_of(delivery(GOOD)), "without being marked as redelivered"),
        (account_of(dead_letter(GOOD)), "was never rejected and became a dead letter"),
        (account_of(dead_letter(REJECTED, origin="/queue/x")), "came from /queue/x"),
        (account_of(delivery(GOOD, queue="/queue/hl7.orders", redelivered=True)), "came from /queue/hl7.orders"),
        (account_of(delivery(GOOD, message_id="2"), delivery(GOOD, message_id="3")), "2 duplicates, and only 1"),
        (Account(MESSAGES), "100 messages not confirmed"),
    ],
)
def test_a_broken_promise_is_told(account: Account, fault: str):
    assert any(fault in line for line in account.faults()), account.faults()
