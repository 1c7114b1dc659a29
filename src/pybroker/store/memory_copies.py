"""`Copies` in memory: for a replica without a data directory, and for simulators. Owns what outlives a store's closing.

Follows DESIGN.md section 5, rule 9, with the same promises as `DiskCopies`. Stores are handed out over handles: closing one
ends the handle, not the content. A crash is the owner's: put what survives it into `backend`, and call `open` again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from pybroker.errors import StoreError
from pybroker.store.backend import Backend, Change, Entry, Reader
from pybroker.store.chunks import FIRST, STOP
from pybroker.store.layout import Identity
from pybroker.store.memory import MemoryBackend
from pybroker.store.store import Store, write_beginning


class MemoryCopies:
    """`Copies` over backends that `new_backend` makes, empty each.

    backend  holds the current copy, whether it is open or not
    side     holds the side copy, if there is one: lost in a crash
    """

    def __init__(
        self,
        set_name: str,
        name: str,
        new_incarnation: Callable[[], str],
        new_backend: Callable[[], Backend] = MemoryBackend,
    ) -> None:
        self._new_incarnation = new_incarnation
        self._new_backend = new_backend
        self._identity = Identity(set_name, name, new_incarnation())
        self._store: Store | None = None
        self.backend: Backend = new_backend()
        self.side: Backend | None = None

    @property
    def identity(self) -> Identity:
        return self._identity

    def open(self) -> Store:
        return self._open_current()

    def _open_current(self) -> Store:
        self._close_store()
        self._drop_side()
        return self._open(self.backend)

    def _open(self, backend: Backend) -> Store:
        self._store = Store.open(_Handle(backend))
        return self._store

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
        self._store = None

    def _drop_side(self) -> None:
        if self.side is not None:
            self.side.close()
        self.side = None

    def _expect(self, store: Store, side: bool) -> None:
        if store is not self._store or (self.side is not None) is not side:
            raise StoreError(f"that store is not the {'side copy' if side else 'current copy'} that is open")

    def begin_side(self, store: Store, empty: bool = False) -> Store:
        self._expect(store, side=False)
        self._close_store()
        self.side = self._new_backend()
        if empty:
            write_beginning(self.side, store.store_id, store.starts)
        else:
            self.side.write(self.side.new_batch(list(self.backend.iterate(FIRST, STOP))), True)
        return self._open(self.side)

    def swap(self, side: Store) -> Store:
        self._expect(side, side=True)
        self._close_store()
        backend = self.side
        assert backend is not None
        backend.write(backend.new_batch([]), True)  # in a backend that can forget, this keeps what came before
        old, self.backend, self.side = self.backend, backend, None
        old.close()
        return self._open_current()

    def abandon_side(self, side: Store | None = None) -> Store:
        return self._open_current()

    def count_start(self) -> None:
        self._identity = replace(self._identity, starts=self._identity.starts + 1)

    def renew(self) -> None:
        self._identity = replace(self._identity, incarnation=self._new_incarnation())

    def start_anew(self) -> Store:
        self._close_store()
        self._identity = replace(self._identity, incarnation=self._new_incarnation())
        self.backend.close()
        self.backend = self._new_backend()
        return self._open_current()

    def close(self) -> None:
        self._close_store()
        self._drop_side()


class _Handle:
    """A `Backend` that can be closed without that one that it stands for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._closed = False
        self.blocking = backend.blocking

    @property
    def unverified_reads(self) -> int:
        return self._backend.unverified_reads

    def _open(self) -> Backend:
        if self._closed:
            raise StoreError("the store is closed")
        return self._backend

    def new_batch(self, changes: Sequence[Change]) -> object:
        return self._open().new_batch(changes)

    def write(self, batch: object, sync: bool) -> None:
        self._open().write(batch, sync)

    def get(self, key: bytes) -> bytes | None:
        return self._open().get(key)

    def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        return self._open().iterate(start, stop)

    def snapshot(self) -> AbstractContextManager[Reader]:
        return self._open().snapshot()

    def approximate_size(self) -> int:
        return self._open().approximate_size()

    def compact(self, start: bytes, stop: bytes) -> None:
        self._open().compact(start, stop)

    def close(self) -> None:
        self._closed = True
