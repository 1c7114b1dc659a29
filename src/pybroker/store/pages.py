"""Reading a queue's range in pages. Owns the merge of messages, delivery counts and shared bodies; writes nothing.

Follows DESIGN.md section 4: a bad value is never delivered, it is reported and passed over. A page is read from one
snapshot, so that a body deleted meanwhile is not taken for a missing one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pybroker.errors import CorruptRecord, StoreDamaged
from pybroker.message import Message
from pybroker.operations import StoredEntry
from pybroker.store.backend import Entry, Reader
from pybroker.store.format import (
    FENCE_ORDER,
    REFERENCE,
    body_key,
    decode_message,
    decode_number,
    decode_reference,
    deliveries_key,
    flags_of,
    message_key,
    references_key,
)
from pybroker.store.ranges import iterate_whole

KEY_BYTES = 17  # of a message's key
DELIVERIES_UNKNOWN = 1  # what a message counts as whose delivery record is bad: it is marked as redelivered


@dataclass(frozen=True, slots=True)
class Page:
    """Messages of one queue in delivery order.

    entries     whole messages
    corrupt     what was passed over: it stays in the store for inspection
    unread      orders of messages that were passed over; where LevelDB can't read, the first that may be missing
    bad         ``(order, key)``: the message of that order needs a whole value under that key (of the message itself, of what it
                shares with others, or of its delivery count, which alone does not keep it from `entries`)
    unreadable  why some place can't be read at all, "" where there is none: nobody knows which keys are there
    next_order  where the next page starts; None when the queue's range ended. When a limit ended the page this is the
                place after its last entry, and nobody looked whether there is anything
    """

    entries: list[StoredEntry]
    corrupt: list[CorruptRecord]
    next_order: int | None
    unread: list[int] = field(default_factory=list)
    bad: list[tuple[int, bytes]] = field(default_factory=list)
    unreadable: str = ""


class Patched:
    """A `Reader` in which some values are others than in the one below it: those that were fetched for bad ones."""

    def __init__(self, reader: Reader, values: Mapping[bytes, bytes]) -> None:
        self._reader = reader
        self._values = values

    def get(self, key: bytes) -> bytes | None:
        value = self._values.get(key)
        return self._reader.get(key) if value is None else value

    def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        """Keys that are missing below stay missing."""
        values = self._values
        for key, value in self._reader.iterate(start, stop):
            yield key, values.get(key, value)


def read_page(reader: Reader, queue_id: int, start_order: int, count_max: int, bytes_max: int) -> Page:
    """Up to `count_max` messages and `bytes_max` bytes of them (`Message.size`), but at least one, from `start_order`.

    Never goes beyond the last message asked for: what follows may be a million deleted ones, and passing over these
    costs half a second. So ask for no more than the queue's descriptor counts.
    """
    entries: list[StoredEntry] = []
    corrupt: list[CorruptRecord] = []
    unread: list[int] = []
    bad: list[tuple[int, bytes]] = []
    unreadable: list[str] = []
    size = 0
    counts = _DeliveryCounts(reader, queue_id, start_order, corrupt, bad, unreadable)

    def passed_over(start: bytes, behind: bytes, error: StoreDamaged) -> None:
        corrupt.append(CorruptRecord(start, f"from here to {behind.hex()}: {error}"))
        unread.append(int.from_bytes(start[9:17], "big") + (len(start) > KEY_BYTES))
        unreadable.append(str(error))

    def page(next_order: int | None) -> Page:
        return Page(entries, corrupt, next_order, unread, bad, "; ".join(unreadable[:1]))

    start, stop = message_key(queue_id, start_order), message_key(queue_id, FENCE_ORDER)
    for key, value in iterate_whole(reader, start, stop, passed_over):
        order = int.from_bytes(key[9:], "big")
        try:
            if flags_of(value) & REFERENCE:
                body_id = decode_reference(key, value)[0]
                message, references = _read_body(reader, body_id, order)
            else:
                body_id = references = 0
                message = decode_message(key, value, order)
        except CorruptRecord as error:
            corrupt.append(error)
            unread.append(order)
            bad.append((order, error.key))
            continue
        size += len(message.header_block) + len(message.body)
        if size > bytes_max and entries:
            return page(order)
        entries.append(StoredEntry(order, message, counts.of(order), body_id, references))
        if len(entries) >= count_max:
            return page(order + 1)
    return page(None)


class _DeliveryCounts:
    """The delivery records beside a page, read in step with it."""

    def __init__(
        self,
        reader: Reader,
        queue_id: int,
        start_order: int,
        corrupt: list[CorruptRecord],
        bad: list[tuple[int, bytes]],
        unreadable: list[str],
    ) -> None:
        stop = deliveries_key(queue_id, FENCE_ORDER)
        self._entries = reader.iterate(deliveries_key(queue_id, start_order), stop)
        self._corrupt = corrupt
        self._bad = bad
        self._unreadable = unreadable
        self._order = -1  # of the record that was read last
        self._value: Entry | None = None

    def of(self, order: int) -> int | None:
        """The count of a message, None without a record; to be asked in ascending order."""
        try:
            while self._order < order:
                self._value = next(self._entries, None)
                self._order = FENCE_ORDER if self._value is None else int.from_bytes(self._value[0][9:], "big")
            if self._order != order or self._value is None:
                return None
            return decode_number(*self._value)
        except CorruptRecord as error:
            self._corrupt.append(error)
            self._bad.append((order, error.key))
        except StoreDamaged as error:
            self._corrupt.append(CorruptRecord(b"", f"delivery records can't be read: {error}"))
            self._unreadable.append(str(error))
            self._order = FENCE_ORDER
            self._value = None
        return DELIVERIES_UNKNOWN


def _read_body(reader: Reader, body_id: int, order: int) -> tuple[Message, int]:
    key = body_key(body_id)
    count_key = references_key(body_id)
    try:
        value = reader.get(key)
        count = reader.get(count_key)
    except StoreDamaged as error:
        raise CorruptRecord(key, f"the shared body can't be read: {error}") from error
    if value is None:
        raise CorruptRecord(key, "the shared body is missing")
    message = decode_message(key, value, order)
    if count is None:
        raise CorruptRecord(count_key, "the count of references is missing")
    return message, decode_number(count_key, count)
