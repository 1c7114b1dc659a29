"""A backend for tests that behaves as a disk does at its worst. Owns the faults; the data is a `MemoryBackend`'s.

What was written unsynced, or in a write that failed, may be forgotten at a crash: in LevelDB a *prefix* of the unsynced
batches survives, and the record of a failed write may or may not come back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from pybroker.errors import StoreError
from pybroker.store.backend import Change, Entry, Reader
from pybroker.store.memory import MemoryBackend


class ForgetfulBackend:
    """A `Backend` whose `crash` gives the backend that the next start of the process would find.

    fail_write   number of the write (from 1) that fails, if any; ``fail_errno`` says how
    full         every write fails with ENOSPC from now on
    unsynced     batches written since the last synced write
    failed       the batch of a failed write
    """

    blocking = False
    unverified_reads = 0

    def __init__(self, synced: dict[bytes, bytes] | None = None) -> None:
        self.synced: dict[bytes, bytes] = dict(synced or {})
        self.unsynced: list[Sequence[Change]] = []
        self.failed: Sequence[Change] | None = None
        self.writes = 0
        self.fail_write = 0
        self.fail_errno = errno.EIO
        self.full = False
        self._inner = MemoryBackend()
        self._inner.write(list(self.synced.items()), True)

    def new_batch(self, changes: Sequence[Change]) -> object:
        self._check()
        return changes

    def write(self, batch: object, sync: bool) -> None:
        self._check()
        changes: Sequence[Change] = batch  # type: ignore[assignment]
        self.writes += 1
        if self.full or self.writes == self.fail_write:
            self.failed = changes
            code = errno.ENOSPC if self.full else self.fail_errno
            cause = OSError(code, os.strerror(code))
            raise StoreError(f"the store: {cause}") from cause
        self._inner.write(changes, sync)
        self.unsynced.append(changes)
        if sync:
            for written in self.unsynced:
                _apply(self.synced, written)
            self.unsynced = []

    def crash(self, keep: int = 0, keep_failed: bool = False) -> ForgetfulBackend:
        """The next life: what was synced, the first `keep` unsynced batches, and the failed one if it came back."""
        state = dict(self.synced)
        for changes in self.unsynced[:keep]:
            _apply(state, changes)
        if keep_failed and self.failed is not None and keep >= len(self.unsynced):
            _apply(state, self.failed)
        self._inner.close()
        return ForgetfulBackend(state)

    def flip(self, key: bytes, bit: int) -> None:
        """Flip one bit of a value, behind everybody's back."""
        value = bytearray(self.synced.get(key) or self._inner.get(key) or b"")
        value[bit // 8] ^= 1 << bit % 8
        self.set(key, bytes(value))

    def set(self, key: bytes, value: bytes | None) -> None:
        """Replace or remove a value, behind everybody's back."""
        self._inner.write([(key, value)], True)
        _apply(self.synced, [(key, value)])

    def get(self, key: bytes) -> bytes | None:
        self._check()
        return self._inner.get(key)

    def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        self._check()
        return self._inner.iterate(start, stop)

    def snapshot(self) -> AbstractContextManager[Reader]:
        self._check()
        return self._inner.snapshot()

    def approximate_size(self) -> int:
        return self._inner.approximate_size()

    def compact(self, start: bytes, stop: bytes) -> None:
        self._inner.compact(start, stop)

    def close(self) -> None:
        self._inner.close()

    def _check(self) -> None:
        if self.failed is not None:
            raise StoreError("a write failed before, the store must be opened again")


def _apply(state: dict[bytes, bytes], changes: Sequence[Change]) -> None:
    for key, value in changes:
        if value is None:
            state.pop(key, None)
        else:
            state[key] = value
