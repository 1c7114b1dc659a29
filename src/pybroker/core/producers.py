"""Producers: which of their sends are stored, so that a repeated one is stored once (DESIGN.md section 7, P7). A part of `Core`.

A producer numbers what it sends. Its *ranges* of stored sequences are written in the very batch that stores the messages, and are
bounded: at too many gaps the lowest are given up, and *below the floor* nobody knows any more. Memory changes at once, as
everywhere in the core. The producers of links (`links.py`) are kept apart: they can't be asked whether they sent something
before, so neither time nor the number of clients may make them be forgotten.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pybroker.errors import SendInDoubt
from pybroker.message import Message
from pybroker.operations import DELETE_PRODUCER, ProducerRecord

if TYPE_CHECKING:
    from pybroker.core.broker import Core

NEW = 0  # not stored
STORED = 1
IN_DOUBT = 2  # nobody knows

LINK_PREFIX = "link "  # ids of links begin so; those of clients have no space
FORGOTTEN_AFTER = 10  # retentions after which an unused producer is not known any more
SWEEP_MAX = 1_000  # producers that one sweep changes

Once = tuple[str, int, bool]  # a send: its producer, its sequence, and whether the client says that it sent it before


class Producer:
    """One producer. Raises nothing.

    floor      sequences below it that are in no range may be stored or not
    last_used  milliseconds since the Unix epoch
    dirty      its record in the store is out of date
    """

    __slots__ = ("_owner", "_ranges", "dirty", "floor", "last_used", "producer_id")

    def __init__(self, owner: Producers, record: ProducerRecord) -> None:
        self._owner = owner
        self._ranges = array("Q", record.ranges)  # first, last, first, last, ...
        self.producer_id = record.producer_id
        self.floor = record.floor
        self.last_used = record.last_used
        self.dirty = False

    @property
    def highest(self) -> int:
        """All sequences above it are NEW; -1 when nothing was ever stored."""
        ranges = self._ranges
        return max(ranges[-1], self.floor - 1) if ranges else self.floor - 1

    @property
    def ranges(self) -> tuple[int, ...]:
        """What is stored: first, last, first, last, ..., both included, rising, with gaps between them."""
        return tuple(self._ranges)

    def look(self, sequence: int) -> int:
        """NEW, STORED or IN_DOUBT."""
        ranges = self._ranges
        at = bisect_left(ranges, sequence)
        if at < len(ranges) and (at % 2 or ranges[at] == sequence):
            return STORED
        return IN_DOUBT if sequence < self.floor else NEW

    def stored(self, first: int, last: int, durable: bool = True) -> None:
        """These are stored, both included, by what has been emitted in this turn.

        With `durable` False it is known in this life only, unless the record is written for another reason.
        """
        owner = self._owner
        self.last_used = owner.core.now
        ranges = self._ranges
        if ranges and first == ranges[-1] + 1:
            ranges[-1] = last
        else:
            self._insert(first, last)
        if durable and not self.dirty:
            owner.touch(self)

    def _insert(self, first: int, last: int) -> None:
        """Put in a range anywhere, and make one of those that it meets."""
        ranges = self._ranges
        low = bisect_left(ranges, first - 1) // 2  # the first range that ends at or behind `first - 1`
        high = (bisect_right(ranges, last + 1) + 1) // 2  # behind the last one that begins at or before `last + 1`
        if low < high:
            first = min(first, ranges[2 * low])
            last = max(last, ranges[2 * high - 1])
        ranges[2 * low : 2 * high] = array("Q", (first, last))
        over = len(ranges) - 2 * self._owner.ranges_max
        if over > 0:
            del ranges[:over]
            self.floor = max(self.floor, ranges[0])

    def forget(self) -> None:
        """Give up all ranges: what was stored so far is in doubt."""
        self.floor = self.highest + 1
        del self._ranges[:]

    @property
    def forgotten(self) -> bool:
        return not self._ranges

    def record(self) -> ProducerRecord:
        """As it is to be stored with everything emitted so far."""
        return ProducerRecord(self.producer_id, self.ranges, self.floor, self.last_used)


class Producers:
    """All producers of one core: of clients, and of links, `producers_max` each; the one unused for longest goes first."""

    def __init__(self, core: Core, records: Iterable[ProducerRecord] = ()) -> None:
        limits = core.limits
        self.core = core
        self.ranges_max = max(limits.producer_ranges_max, 1)
        self._count_max = max(limits.producers_max, 1)
        self._retention = max(int(limits.producer_retention * 1_000), 1)  # milliseconds
        self._clients: dict[str, Producer] = {}  # the one unused for longest first
        self._links: dict[str, Producer] = {}
        self._latest: Producer | None = None  # the one that was opened last
        self._due = 0  # when a sweep has something to do next, at the earliest
        for record in sorted(records, key=lambda record: (record.last_used, record.producer_id)):
            self._room(record.producer_id)[record.producer_id] = Producer(self, record)

    def __len__(self) -> int:
        return len(self._clients) + len(self._links)

    def all(self) -> list[Producer]:
        """All that are known, those of links last."""
        return [*self._clients.values(), *self._links.values()]

    def _room(self, producer_id: str) -> dict[str, Producer]:
        return self._links if producer_id.startswith(LINK_PREFIX) else self._clients

    def find(self, producer_id: str) -> Producer | None:
        """The producer of that id, None when it is not known (any more)."""
        return self._room(producer_id).get(producer_id)

    def open(self, producer_id: str, floor: int = 0) -> Producer:
        """The producer of that id, made when there is none, with that floor: then its record goes into the next batch.

        Where it may be one that was forgotten, `floor` is to be the sequence that it comes with: then what it sent before is in
        doubt, not new. Hold on to it for no longer than a turn: beyond `limits.producers_max` the one unused for longest goes.
        """
        latest = self._latest
        if latest is not None and latest.producer_id == producer_id:
            latest.last_used = self.core.now
            return latest
        room = self._room(producer_id)
        producer = room.pop(producer_id, None)
        if producer is None:
            while len(room) >= self._count_max:
                self._delete(next(iter(room.values())))
            producer = Producer(self, ProducerRecord(producer_id, floor=floor))
            self.touch(producer)
        producer.last_used = self.core.now
        self._latest = room[producer_id] = producer
        return producer

    def has(self, producer_id: str, sequence: int) -> bool:
        """Whether a send is known to be stored."""
        producer = self.find(producer_id)
        return producer is not None and producer.look(sequence) == STORED

    def is_new(self, producer_id: str, sequence: int, repeated: bool = False) -> bool:
        """Whether a send has to be stored; False for one that is, which is counted in `Core.duplicates`.

        Raises SendInDoubt when nobody knows: then it must be neither stored nor confirmed. `repeated`: the client says that it
        sent it before, so that a producer of which nothing is known is one that was forgotten. Without it a producer of which
        nothing is known is made, and begins with that sequence.
        """
        producer = self.find(producer_id)
        if producer is None:
            if repeated:
                raise SendInDoubt(
                    f"producer {producer_id} is not known here (any more): nobody knows whether {sequence} is stored; look "
                    "for the message where it should have come to, or send it as another producer to have it stored now"
                )
            self.open(producer_id, sequence)
            return True
        found = producer.look(sequence)
        if found == IN_DOUBT:
            raise SendInDoubt(
                f"it is not known any more whether {sequence} of producer {producer_id} is stored: it is below what is "
                f"remembered ({producer.floor}); look for the message where it should have come to"
            )
        self.core.duplicates += found == STORED
        return found == NEW

    def touch(self, producer: Producer) -> None:
        """Note that a producer's record must be written with the open batch."""
        producer.dirty = True
        self.core.dirty.append(producer)

    def _delete(self, producer: Producer) -> None:
        del self._room(producer.producer_id)[producer.producer_id]
        if producer is self._latest:
            self._latest = None
        if producer.dirty:
            self.core.dirty.remove(producer)
            producer.dirty = False
        self.core.operations.append((DELETE_PRODUCER, producer.producer_id))

    # ---- time

    def sweep(self) -> None:
        """Forget what clients sent that have not been here for `limits.producer_retention`; in the end, the clients too."""
        now = self.core.now
        if now < self._due:
            return
        changed: list[Producer] = []
        self._due = now + self._retention
        for producer in self._clients.values():
            due = producer.last_used + self._retention * (FORGOTTEN_AFTER if producer.forgotten else 1)
            if due <= now:
                if len(changed) == SWEEP_MAX:
                    self._due = now
                    break
                changed.append(producer)
            else:
                self._due = min(self._due, due)
                if not producer.forgotten:
                    break  # and so have all behind it
        for producer in changed:
            if producer.forgotten:
                self._delete(producer)
            else:
                producer.forget()
                if not producer.dirty:
                    self.touch(producer)


def send_once(core: Core, message: Message, once: Once) -> bool:
    """`Core.send`, for a message that its producer numbered; False when it is a repeat of one that was sent before.

    Raises what `Core.send` raises, and SendInDoubt; then the sequence is as new as it was.
    """
    if not core.producers.is_new(*once):
        return False
    core.send(message)
    core.producers.open(once[0], once[1]).stored(once[1], once[1], message.durable)
    return True
