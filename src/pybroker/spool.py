"""The spool: non-durable messages that memory has no room for. Owns a second store, unsynced, discarded at each start.

Opened with the first message that is spooled. All methods block; `write` is called from one thread, the reads from another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from pybroker.operations import DELETE_MESSAGE, DELETE_QUEUE, DueEntry, Operation
from pybroker.store.pages import Page
from pybroker.store.store import Store

CHUNK = 1_000  # messages removed at a time when a queue's spooled messages go


class Spool:
    """Keeps operations of the same vocabulary as the store's. `create` makes an empty store; called at most once."""

    def __init__(self, create: Callable[[], Store]) -> None:
        self._create = create
        self._store: Store | None = None
        self._lock = threading.Lock()  # opening only
        self._lsn = 0

    def _opened(self) -> Store:
        with self._lock:
            if self._store is None:
                self._store = self._create()
            return self._store

    def write(self, operations: list[Operation]) -> None:
        """Write without waiting for the disk. `DELETE_QUEUE` removes all messages of the queue."""
        store = self._opened()
        for operation in operations:
            if operation[0] == DELETE_QUEUE:
                self._apply(store, [other for other in operations if other[0] != DELETE_QUEUE])
                for gone in [other[1] for other in operations if other[0] == DELETE_QUEUE]:
                    self._remove_all(store, gone)  # type: ignore[arg-type]
                return
        self._apply(store, operations)

    def _apply(self, store: Store, operations: list[Operation]) -> None:
        self._lsn += 1
        store.write(store.prepare(store.encode(operations), (0, self._lsn)), False)

    def _remove_all(self, store: Store, queue_id: int) -> None:
        start: int | None = 0
        while start is not None:
            page = store.read_page(queue_id, start, CHUNK, 1 << 24)
            self._apply(
                store, [(DELETE_MESSAGE, queue_id, row.order, row.message.expires, True) for row in page.entries]
            )
            start = page.next_order

    def read_page(self, queue_id: int, start_order: int, count_max: int, bytes_max: int) -> Page:
        """As `Store.read_page`."""
        return self._opened().read_page(queue_id, start_order, count_max, bytes_max)

    def read_due(self, now_ms: int, count_max: int, after: tuple[int, int, int] | None) -> list[DueEntry]:
        """As `Store.read_due`."""
        return self._opened().read_due(now_ms, count_max, after)

    def close(self) -> None:
        with self._lock:
            if self._store is not None:
                self._store.close()
