"""When messages that are only in memory expire. (Stored and spooled ones have the store's index by time.)

Buckets of one second: adding and removing cost O(1), a sweep costs what has expired.
"""

from __future__ import annotations

from heapq import heappop, heappush

from pybroker.core.entry import Entry

BUCKET_MS = 1_000


class Expiries:
    """Entries by the second in which they expire."""

    def __init__(self) -> None:
        self._buckets: dict[int, dict[Entry, None]] = {}
        self._seconds: list[int] = []  # a heap of the buckets' keys

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))

    def add(self, entry: Entry) -> None:
        second = entry.message.expires // BUCKET_MS
        bucket = self._buckets.get(second)
        if bucket is None:
            bucket = self._buckets[second] = {}
            heappush(self._seconds, second)
        bucket[entry] = None

    def discard(self, entry: Entry) -> None:
        second = entry.message.expires // BUCKET_MS
        bucket = self._buckets.get(second)
        if bucket is not None:
            bucket.pop(entry, None)
            # An empty bucket goes too, or else a million far seconds would stay; its heap entry is met later.
            if not bucket:
                del self._buckets[second]
                if len(self._seconds) > 2 * len(self._buckets) + 64:
                    self._seconds = sorted(self._buckets)

    def due(self, now: int) -> list[Entry]:
        """Take out the entries that have expired at `now` (milliseconds since the Unix epoch)."""
        found: list[Entry] = []
        while self._seconds and self._seconds[0] * BUCKET_MS <= now:
            second = self._seconds[0]
            bucket = self._buckets.get(second)
            if bucket is None:
                heappop(self._seconds)
                continue
            expired = [entry for entry in bucket if entry.message.expires <= now]
            found.extend(expired)
            if len(expired) < len(bucket):  # the running second
                for entry in expired:
                    del bucket[entry]
                break
            heappop(self._seconds)
            del self._buckets[second]
        return found
