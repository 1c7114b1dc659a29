"""The demonstration's book-keeping: what must arrive, what was confirmed, what came, and what follows from it.

Knows no broker and no process: it is told each line that the programs print. A delivery is judged by the SHA-256 of the
body that arrived, against the one computed from the seed here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from hl7_messages import QUEUES, Hl7Message

DEAD_LETTER_QUEUE = "/queue/ActiveMQ.DLQ"
COLUMNS = (
    "sent",
    "sent_again",  # by the producer, unconfirmed when the broker died
    "confirmed",
    "delivered",  # different messages that the consumer was given
    "redelivered",  # deliveries beyond a stored message's first
    "duplicates",  # messages stored once more because they were sent again
    "rejected",  # to be rejected by the consumer
    "dead_lettered",
    "lost",
    "corrupted",
)


class Account:
    """What was sent and what became of it. ``take`` is told everything, ``faults`` says what was broken."""

    def __init__(self, messages: list[Hl7Message]) -> None:
        self.messages = {message.control_id: message for message in messages}
        self.confirmed_now = 0
        self.confirmed: set[str] = set()
        self.producer_done = False
        self.connections = 0
        self.sent_again: Counter[str] = Counter()
        self.deliveries: defaultdict[str, Counter[str]] = defaultdict(Counter)  # control id: message id: how often
        self.dead_letters: defaultdict[str, set[str]] = defaultdict(set)  # control id: message ids
        self.corrupted: Counter[str] = Counter()
        self.unexpected: list[str] = []

    def take(self, line: dict[str, Any]) -> None:
        if "sha256" in line:
            self._delivery(line)
        elif "done" in line:
            self.producer_done = True
            self.confirmed.update(line["done"])
            self.confirmed_now = len(self.confirmed)
            self.sent_again.update(line["sent_again"])
            self.connections = line["connections"]
        else:
            self.confirmed_now = line["confirmed"]

    def _delivery(self, line: dict[str, Any]) -> None:
        queue, control_id, message_id = line["queue"], line["control_id"], line["message_id"]
        dead = line["origin"] is not None or queue == DEAD_LETTER_QUEUE
        origin = line["origin"] if dead else queue
        message = self.messages.get(control_id)
        if message is None:
            # a control id that was never sent: the body was changed, or it is none of ours
            self.corrupted[origin] += 1
            return
        if line["sha256"] != message.sha256:
            self.corrupted[origin] += 1
        if origin != message.queue:
            self.unexpected.append(f"{control_id} was sent to {message.queue} and came from {origin}")
        if dead:
            self.dead_letters[control_id].add(message_id)
            if message.names_patient:
                self.unexpected.append(f"{control_id} was never rejected and became a dead letter")
        else:
            self.deliveries[control_id][message_id] += 1
            if line["accepted"] != message.names_patient:
                self.unexpected.append(f"{control_id} was read wrongly by the consumer")
            if line["redelivered"] is False and self.deliveries[control_id][message_id] > 1:
                self.unexpected.append(f"{control_id} was delivered again without being marked as redelivered")

    def not_delivered(self) -> list[str]:
        return [control_id for control_id in self.messages if control_id not in self.deliveries]

    def not_dead_lettered(self) -> list[str]:
        rejected = (control_id for control_id, message in self.messages.items() if not message.names_patient)
        return [control_id for control_id in rejected if control_id not in self.dead_letters]

    def lost(self) -> list[str]:
        """Confirmed messages that did not arrive where they belong."""
        gone = {*self.not_delivered(), *self.not_dead_lettered()}
        return [control_id for control_id in self.messages if control_id in gone and control_id in self.confirmed]

    def faults(self) -> list[str]:
        """One line for each promise that did not hold."""
        faults = []
        for what, control_ids in (
            ("not confirmed", sorted(self.messages.keys() - self.confirmed)),
            ("confirmed and lost", self.lost()),
            ("rejected and not among the dead letters", self.not_dead_lettered()),
        ):
            if control_ids:
                faults.append(f"{len(control_ids)} messages {what}: {_some(control_ids)}")
        if self.corrupted:
            faults.append(f"{self.corrupted.total()} deliveries corrupted: {dict(self.corrupted)}")
        if self.unexpected:
            faults.append(f"{len(self.unexpected)} unexpected: {_some(self.unexpected)}")
        stored_twice = sum(max(len(ids) - 1, 0) for ids in self.deliveries.values())
        if stored_twice > self.sent_again.total():
            faults.append(f"{stored_twice} duplicates, and only {self.sent_again.total()} messages were sent again")
        return faults

    def rows(self) -> list[tuple[str, dict[str, int]]]:
        """A row for each queue and one for all, with the numbers of COLUMNS."""
        lost = set(self.lost())
        rows = [(queue, self._row(queue, lost)) for queue in QUEUES]
        total = {name: sum(row[name] for _, row in rows) for name in COLUMNS}
        total["corrupted"] += sum(count for queue, count in self.corrupted.items() if queue not in QUEUES)
        return [*rows, ("all", total)]

    def _row(self, queue: str, lost: set[str]) -> dict[str, int]:
        ids = [control_id for control_id, message in self.messages.items() if message.queue == queue]
        stored = [self.deliveries[control_id] for control_id in ids if control_id in self.deliveries]
        numbers = (
            len(ids),
            self.sent_again[queue],
            sum(control_id in self.confirmed for control_id in ids),
            len(stored),
            sum(times - 1 for counts in stored for times in counts.values()),
            sum(len(counts) - 1 for counts in stored),
            sum(not self.messages[control_id].names_patient for control_id in ids),
            sum(control_id in self.dead_letters for control_id in ids),
            sum(control_id in lost for control_id in ids),
            self.corrupted[queue],
        )
        return dict(zip(COLUMNS, numbers, strict=True))


def _some(items: Iterable[str], limit: int = 5) -> str:
    listed = list(items)
    return "; ".join(listed[:limit]) + (" ..." if len(listed) > limit else "")
