"""Message keys: a send with a key that its destination has seen within the window is confirmed, and not stored again.

A part of `Core`. A key is remembered in the batch that stores its message, as the record of a producer whose id is made of the
destination and the key: so it is there after a restart and a failover as surely as the message is. Beyond
`limits.message_keys_max` the oldest go first.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from pybroker.destination import parse_destination
from pybroker.errors import BrokerError
from pybroker.message import Message, mentions
from pybroker.operations import DELETE_PRODUCER, PUT_PRODUCER, ProducerRecord

if TYPE_CHECKING:
    from pybroker.core.broker import Core

HEADER = "message-key"
MARK = HEADER.encode()
PREFIX = "key "  # ids of their records begin so; those of clients have no space
SWEEP_MAX = 1_000  # keys that one sweep looks at; each send with a new key sweeps
PASSED_OVER_MIN = 64  # keys forgotten before they were due that the heap may hold in any case


def record_of(destination: str, key: str) -> str:
    """The id of the record that remembers a key. Keys that are due at one time are forgotten in the order of their records' ids."""
    return PREFIX + sha256(f"{destination}\n{key}".encode()).hexdigest()[:32]


class MessageKeys:
    """The keys that are remembered. The records have in `last_used` when they are to be forgotten."""

    def __init__(self, core: Core, records: Iterable[ProducerRecord]) -> None:
        self._core = core
        self._until: dict[str, int] = {}  # by record's id, the oldest first: milliseconds since the Unix epoch
        self._transient: set[str] = set()  # of these, those whose message is not stored
        self._due: list[tuple[int, str]] = []  # a heap; those forgotten or renewed meanwhile are passed over
        self._passing = False  # what is sent now was looked at
        for record in sorted(records, key=lambda record: (record.last_used, record.producer_id)):
            self._until[record.producer_id] = record.last_used
            self._due.append((record.last_used, record.producer_id))

    def __len__(self) -> int:
        return len(self._until)

    def take(self, message: Message) -> bool | None:
        """`Core.send` for a message that may have a key; None, and nothing done, when it has none."""
        key = None if self._passing else message.header(HEADER)
        window = self._window(message) if key else 0
        if not window:
            return None
        core = self._core
        record_id = record_of(message.destination, key or "")
        if self._is_repeat(record_id, message):
            core.duplicates += 1
            if not message.message_id:
                message.message_id = core.new_message_id()
            return message.durable  # to be confirmed no sooner than the earlier one is
        stored = self.send_anyway(message)
        if not message.expires or message.expires > core.now:  # else it was not taken: the next one may be
            self._remember(record_id, core.now + window, message.durable)
        return stored

    def repeats(self, message: Message) -> bool:
        """Whether a message that is sent now is a repeat, and needs no room."""
        if not self._until or not mentions(message.header_block, MARK):
            return False
        key = message.header(HEADER)
        return bool(key and self._is_repeat(record_of(message.destination, key), message) and self._window(message))

    def _is_repeat(self, record_id: str, message: Message) -> bool:
        # What is only in memory is no repeat of what is to be stored.
        as_safe = not message.durable or record_id not in self._transient
        return as_safe and self._until.get(record_id, -1) > self._core.now

    def send_anyway(self, message: Message) -> bool:
        """`Core.send` for a message whose key was looked at before, or is to be passed over."""
        passing, self._passing = self._passing, True
        try:
            return self._core.send(message)
        finally:
            self._passing = passing

    def _window(self, message: Message) -> int:
        """Milliseconds for which a key of a message's destination is remembered; of a composite the first one counts."""
        core = self._core
        try:
            target = parse_destination(core.routing.parse(message.destination)[0])
        except BrokerError:  # it is refused when it is sent
            return 0
        return int(core.policies.of(target).message_key_window * 1_000)

    def _remember(self, record_id: str, until: int, durable: bool) -> None:
        core = self._core
        self.sweep()
        self._until.pop(record_id, None)
        while len(self._until) >= self._core.limits.message_keys_max:
            self._forget(next(iter(self._until)))
        self._until[record_id] = until
        heappush(self._due, (until, record_id))
        if len(self._due) > 2 * len(self._until) + PASSED_OVER_MIN:
            self._due = [(due, each) for each, due in self._until.items()]
            heapify(self._due)
        if not durable:
            self._transient.add(record_id)
        else:
            self._transient.discard(record_id)
            core.operations.append((PUT_PRODUCER, ProducerRecord(record_id, (0, 0), last_used=until)))

    def _forget(self, record_id: str) -> None:
        del self._until[record_id]
        self._transient.discard(record_id)
        self._core.operations.append((DELETE_PRODUCER, record_id))

    def sweep(self) -> None:
        """Forget what is past its window."""
        due = self._due
        for _ in range(SWEEP_MAX):
            if not due or due[0][0] > self._core.now:
                return
            until, record_id = heappop(due)
            if self._until.get(record_id) == until:
                self._forget(record_id)
