"""The backend in memory: what a broker without a data directory keeps its state in. Owns ordered keys, nothing on disk.

Use it from one thread. It never blocks, so it must never be given work whose cost grows with what is stored: most keys
are put and deleted without ever being read in order, so a put only notes the key (`_fresh`), and the notes are sorted
into the ordered chunks when somebody reads a range.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from weakref import WeakSet

from pybroker.errors import StoreError
from pybroker.store.backend import Change, Entry, Reader

CHUNK_KEYS_MAX = 512  # keys of one chunk; above it the chunk is split
FRESH_KEYS_MIN = 1_024  # notes that are kept before dead ones among them are swept out
SLICE_KEYS = 64  # keys that an iterator takes at a time
KEY_OVERHEAD = 120  # bytes of dictionary, lists and object headers per entry, about


class MemoryBackend:
    """A `Backend` in memory.

    Invariant: each key of `_data` is in exactly one chunk or (once or more) in `_fresh`; each key of a chunk is in
    `_data`; `_fresh` may also hold keys that were deleted since.
    """

    blocking = False
    unverified_reads = 0  # it has no files

    def __init__(self) -> None:
        self._data: dict[bytes, bytes] = {}
        self._fresh: list[bytes] = []
        self._chunks: list[list[bytes]] = []
        self._last: list[bytes] = []  # the last key of each chunk
        self._bytes = 0
        self._snapshots: WeakSet[_Snapshot] = WeakSet()
        self._closed = False

    def new_batch(self, changes: Sequence[Change]) -> object:
        return changes

    def write(self, batch: object, sync: bool) -> None:
        if self._closed:
            raise StoreError("the store is closed")
        if self._snapshots:
            for snapshot in list(self._snapshots):
                snapshot.freeze()
        data = self._data
        fresh = self._fresh
        size = self._bytes
        changes: Sequence[Change] = batch  # type: ignore[assignment]
        for key, value in changes:
            if value is not None:
                old = data.get(key)
                if old is None:
                    fresh.append(key)
                    size += len(key) + len(value)
                else:
                    size += len(value) - len(old)
                data[key] = value
            else:
                old = data.pop(key, None)
                if old is not None:
                    size -= len(key) + len(old)
                    if self._last:
                        self._remove(key)
        self._bytes = size
        if len(fresh) > FRESH_KEYS_MIN + 2 * len(data):
            self._fresh = [key for key in dict.fromkeys(fresh) if key in data]

    def get(self, key: bytes) -> bytes | None:
        if self._closed:
            raise StoreError("the store is closed")
        return self._data.get(key)

    def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        return _owning(_Snapshot(self), start, stop)

    def snapshot(self) -> AbstractContextManager[Reader]:
        return _Snapshot(self)

    def approximate_size(self) -> int:
        return self._bytes + KEY_OVERHEAD * len(self._data)

    def compact(self, start: bytes, stop: bytes) -> None:
        """Nothing is kept of what was deleted."""

    def close(self) -> None:
        """Forgets everything."""
        self._closed = True
        for snapshot in list(self._snapshots):
            snapshot.close()
        self._data = {}
        self._fresh = []
        self._chunks = []
        self._last = []
        self._bytes = 0

    # ---- ordered keys

    def _remove(self, key: bytes) -> None:
        """Take a key out of its chunk, if it has been sorted into one."""
        at = bisect_left(self._last, key)
        if at == len(self._last):
            return
        chunk = self._chunks[at]
        place = bisect_left(chunk, key)
        if chunk[place] != key:
            return
        del chunk[place]
        if not chunk:
            del self._chunks[at]
            del self._last[at]
        elif place == len(chunk):
            self._last[at] = chunk[-1]

    def settle(self) -> None:
        """Sort the notes into the chunks."""
        data = self._data
        keys = sorted({key for key in self._fresh if key in data})
        self._fresh = []
        above = bisect_right(keys, self._last[-1]) if self._last else 0
        for key in keys[:above]:
            at = bisect_left(self._last, key)
            chunk = self._chunks[at]
            insort(chunk, key)
            if len(chunk) > CHUNK_KEYS_MAX:
                half = len(chunk) // 2
                self._chunks[at : at + 1] = [chunk[:half], chunk[half:]]
                self._last[at : at + 1] = [chunk[half - 1], chunk[-1]]
        rest = keys[above:]
        if rest and self._chunks and len(self._chunks[-1]) < CHUNK_KEYS_MAX // 2:
            room = CHUNK_KEYS_MAX // 2
            self._chunks[-1].extend(rest[:room])
            self._last[-1] = self._chunks[-1][-1]
            rest = rest[room:]
        for index in range(0, len(rest), CHUNK_KEYS_MAX // 2):
            chunk = rest[index : index + CHUNK_KEYS_MAX // 2]
            self._chunks.append(chunk)
            self._last.append(chunk[-1])

    def keys_from(self, start: bytes) -> list[bytes]:
        """Up to SLICE_KEYS keys in order, the first of them at `start` or after it; empty at the end."""
        if self._fresh:
            self.settle()
        at = bisect_left(self._last, start)
        if at == len(self._last):
            return []
        chunk = self._chunks[at]
        place = bisect_left(chunk, start)
        return chunk[place : place + SLICE_KEYS]

    def copy(self) -> tuple[dict[bytes, bytes], list[bytes]]:
        """All values, and all keys in order: for a snapshot that outlives a write."""
        if self._fresh:
            self.settle()
        return dict(self._data), [key for chunk in self._chunks for key in chunk]

    def watch(self, snapshot: _Snapshot) -> dict[bytes, bytes]:
        """Tell `snapshot` to freeze before the next write; the live values."""
        if self._closed:
            raise StoreError("the store is closed")
        self._snapshots.add(snapshot)
        return self._data

    def unwatch(self, snapshot: _Snapshot) -> None:
        self._snapshots.discard(snapshot)


class _Snapshot:
    """Reads the live data until a write comes while it is open, then from a copy: pages are read between writes."""

    def __init__(self, backend: MemoryBackend) -> None:
        self._backend = backend
        self._data: dict[bytes, bytes] | None = backend.watch(self)
        self._frozen: list[bytes] | None = None

    def freeze(self) -> None:
        if self._frozen is None:
            self._data, self._frozen = self._backend.copy()
            self._backend.unwatch(self)

    def close(self) -> None:
        self._data = None
        self._frozen = None
        self._backend.unwatch(self)

    def get(self, key: bytes) -> bytes | None:
        if self._data is None:
            raise StoreError("the store is closed")
        return self._data.get(key)

    def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        position = start
        while True:
            if self._data is None:
                raise StoreError("the store is closed")
            if self._frozen is None:
                keys = self._backend.keys_from(position)
            else:
                at = bisect_left(self._frozen, position)
                keys = self._frozen[at : at + SLICE_KEYS]
            if not keys:
                return
            for key in keys:
                if key >= stop:
                    return
                if self._data is None:
                    raise StoreError("the store is closed")
                yield key, self._data[key]
            position = keys[-1] + b"\0"

    def __enter__(self) -> _Snapshot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _owning(snapshot: _Snapshot, start: bytes, stop: bytes) -> Iterator[Entry]:
    """The entries of a snapshot that nobody else has; not begun lazily, so that the moment is that of the call."""
    entries = snapshot.iterate(start, stop)

    def run() -> Iterator[Entry]:
        with snapshot:
            yield from entries

    return run()
