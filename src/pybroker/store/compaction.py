"""When a store takes much more room than what it holds: the room of consumed messages is given back. Owns the decision.

LevelDB compacts a level when it has grown, so after a deep queue was consumed its dead messages would stay in the lower levels
until as much has been written again. What is alive is known from the queues' descriptors. Everything here blocks.
"""

from __future__ import annotations

from pybroker.errors import CorruptRecord
from pybroker.store import format as fmt
from pybroker.store.store import Store

INTERVAL = 10.0  # seconds between two looks
DEAD_BYTES_MIN = 64 * 1024 * 1024  # that are worth it
MESSAGE_BYTES = 64  # of keys and heads, beside a message's own size

FIRST = bytes((fmt.MESSAGE,))
STOP = bytes((fmt.END,))


def live_bytes(store: Store) -> int:
    """About how many bytes the stored messages take. Raises `StoreError`."""
    size = 0
    with store.backend.snapshot() as reader:
        for key, value in reader.iterate(bytes((fmt.QUEUE,)), fmt.META_KEY):
            try:
                record = fmt.decode_queue(key, value)
            except CorruptRecord:
                continue
            size += record.size + MESSAGE_BYTES * record.count
    return size


class Compactor:
    """Looks after one store, or one replica's copies of it, one after the other."""

    def __init__(self) -> None:
        self.compactions = 0
        self._left = 0  # dead bytes that the last compaction did not give back

    def look(self, store: Store) -> None:
        """Compact the store if most of what it takes is dead. Raises `StoreError` when it is closed meanwhile."""
        size = store.backend.approximate_size()
        if size <= DEAD_BYTES_MIN:
            return
        live = live_bytes(store)
        if size - live <= max(DEAD_BYTES_MIN, live) + self._left:
            return
        store.backend.compact(FIRST, STOP)
        self.compactions += 1
        self._left = max(0, store.backend.approximate_size() - live)
