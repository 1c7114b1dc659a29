"""The seam between the store and what keeps its bytes. Owns the protocol; knows no key, no value and no database.

Follows DESIGN.md section 4: ordered byte keys, batches that are written whole or not at all, consistent snapshots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

Change = tuple[bytes, bytes | None]  # (key, value), or (key, None) to delete the key
Entry = tuple[bytes, bytes]  # (key, value)


class Reader(Protocol):
    """Something that reads keys as they were at one moment."""

    def get(self, key: bytes) -> bytes | None:
        """The value under `key`, or None. Raises `StoreDamaged` when it can't be read."""
        ...

    def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        """The entries with ``start <= key < stop`` in key order, as they were when `iterate` was called.

        Raises `StoreDamaged` at the first place that can't be read; what came before it is whole. The range must end
        below ``b"\\xff"``.
        """
        ...


class Backend(Reader, Protocol):
    """An ordered map of bytes to bytes with atomic batches.

    ``blocking`` says that everything but `new_batch` may block and belongs into a worker thread; a backend that does
    not block must be used from one thread only. After a failed `write` everything is refused with `StoreError` until
    the backend is opened again, because nobody knows what reached the disk. ``unverified_reads`` counts readings that met a place
    whose checksums, the backend's own, are wrong.
    """

    blocking: bool

    @property
    def unverified_reads(self) -> int: ...

    def new_batch(self, changes: Sequence[Change]) -> object:
        """Make a batch of changes, in order; cheap, for the event loop. The caller leaves `changes` alone from now."""
        ...

    def write(self, batch: object, sync: bool) -> None:
        """Write a batch once; with `sync` it is on the disk when this returns. One thread writes at a time.

        Raises `StoreError` (its cause is an `OSError` where the system said one).
        """
        ...

    def snapshot(self) -> AbstractContextManager[Reader]:
        """A reader that sees the present state whatever is written meanwhile."""
        ...

    def approximate_size(self) -> int:
        """Bytes in use on the disk, or in memory."""
        ...

    def compact(self, start: bytes, stop: bytes) -> None:
        """Give back the room of what was deleted in a range of keys, piece by piece; ends early when it is closed."""
        ...

    def close(self) -> None:
        """Close it; calls that are under way in other threads end first, later ones raise `StoreError`. Idempotent."""
        ...
