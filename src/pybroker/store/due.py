"""The expiry index, read in time order. Owns the floor below which it is known to be empty; writes nothing.

Deleted rows are the trap: LevelDB passes over each of them to find the next live one, whatever the end of the range.
A sweep each second over a queue of short-lived messages would pass over all that were consumed. So a sweep remembers
the first live row that it met, and the next ones read nothing until the time has come to that row.
"""

from __future__ import annotations

import threading

from pybroker.errors import CorruptRecord, StoreDamaged
from pybroker.operations import DueEntry
from pybroker.store.backend import Backend, Reader
from pybroker.store.format import (
    END,
    EXPIRY,
    REFERENCE,
    check_message,
    decode_number,
    decode_reference,
    expiry_key,
    flags_of,
    message_key,
    parse_key,
    references_key,
)

NEVER = 2**64 - 1
_STOP = bytes((EXPIRY + 1,))
assert _STOP[0] <= END


class DueReader:
    """Reads what has expired. `lower` may be called from the writer's thread while `read` runs in another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._floor = 0  # no row of the index expires before this
        self._lowered = NEVER  # the smallest row written since the present read began
        self.corrupt = 0  # rows that the last read passed over: they, or their messages, are bad

    def lower(self, expires: int) -> None:
        """Rows that expire at `expires` or later are in the store now: called when their write has returned."""
        with self._lock:
            self._floor = min(self._floor, expires)
            self._lowered = min(self._lowered, expires)

    def reset(self) -> None:
        """Somebody else wrote: nothing is known."""
        self.lower(0)

    def read(
        self, backend: Backend, now_ms: int, count_max: int, after: tuple[int, int, int] | None = None
    ) -> list[DueEntry]:
        with self._reading:
            with self._lock:
                floor = self._floor
                self._lowered = NEVER
            if floor > now_ms:
                return []
            with backend.snapshot() as reader:
                due, first = self._read(reader, floor, now_ms, count_max, after)
            with self._lock:
                self._floor = min(first, self._lowered)
            return due

    def _read(
        self, reader: Reader, floor: int, now_ms: int, count_max: int, after: tuple[int, int, int] | None
    ) -> tuple[list[DueEntry], int]:
        """The rows that are due, and the time of the first live row."""
        due: list[DueEntry] = []
        first = NEVER
        start = expiry_key(floor, 0, 0)
        if after is not None:
            first = floor  # what stands in front of the row that was named is not looked at
            start = expiry_key(*after) + b"\0"
        self.corrupt = 0
        for key, value in reader.iterate(start, _STOP):
            try:
                _, expires, queue_id, order = parse_key(key)
                first = min(first, expires)
                if expires > now_ms or len(due) >= count_max:
                    break
                size = decode_number(key, value)
                due.append(DueEntry(expires, queue_id, order, size, *_shared_body(reader, queue_id, order)))
            except CorruptRecord:
                self.corrupt += 1
        return due, first


def _shared_body(reader: Reader, queue_id: int, order: int) -> tuple[int, int]:
    """The body that a message refers to and the references to it, or zeros; `CorruptRecord` for what isn't whole."""
    key = message_key(queue_id, order)
    try:
        value = reader.get(key)
        if value is None:
            raise CorruptRecord(key, "the message of a row in the expiry index is missing")
        if not flags_of(value) & REFERENCE:
            check_message(key, value)
            return 0, 0
        body_id = decode_reference(key, value)[0]
        count_key = references_key(body_id)
        count = reader.get(count_key)
    except StoreDamaged as error:
        raise CorruptRecord(key, f"it can't be read: {error}") from error
    if count is None:
        raise CorruptRecord(count_key, "the count of references is missing")
    return body_id, decode_number(count_key, count)
