"""The expiry index, read in time order. Owns the floor below which it is known to be empty; writes nothing.

Deleted rows are the trap: LevelDB passes over each of them to find the next live one, whatever the end of the range.
A sweep each second over a queue of short-lived messages would pass over all that were consumed. So a sweep remembers
the first live row that it met, and the next ones read nothing until the time has come to that row.
"""

from __future__ import annotations

import threading

from pybroker.errors import CorruptRecord
from pybroker.operations import DueEntry
from pybroker.store.backend import Backend
from pybroker.store.format import END, EXPIRY, decode_number, expiry_key, parse_key

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
        self.corrupt = 0  # bad rows that the last read passed over

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
            due: list[DueEntry] = []
            first = NEVER
            corrupt = 0
            start = expiry_key(floor, 0, 0) if after is None else expiry_key(*after) + b"\0"
            if after is not None:
                first = floor  # what stands in front of the row that was named is not looked at
            for key, value in backend.iterate(start, _STOP):
                try:
                    _, expires, queue_id, order = parse_key(key)
                    first = min(first, expires)
                    if expires > now_ms or len(due) >= count_max:
                        break
                    due.append(DueEntry(expires, queue_id, order, decode_number(key, value)))
                except CorruptRecord:
                    corrupt += 1
            self.corrupt = corrupt
            with self._lock:
                self._floor = min(first, self._lowered)
            return due
