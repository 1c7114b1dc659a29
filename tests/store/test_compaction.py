"""Room that consumed messages took is given back, and nothing else changes by it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pybroker.message import Message
from pybroker.operations import DELETE_MESSAGE, PUT_MESSAGE, PUT_QUEUE, QueueRecord
from pybroker.store.compaction import Compactor, live_bytes
from pybroker.store.leveldb import LevelDBBackend
from pybroker.store.store import Store

BODY = 8_000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pybroker.store.compaction.DEAD_BYTES_MIN", 1_000_000)
    monkeypatch.setattr("pybroker.store.leveldb.COMPACT_BYTES", 500_000)


def fill(store: Store, orders: range, queue_id: int = 1) -> None:
    """Messages, with the descriptor that counts them."""
    lsn = store.position[1]
    operations: list[tuple[object, ...]] = [
        (PUT_MESSAGE, queue_id, order, Message("/queue/q", os.urandom(BODY), b"", True, 4, 0)) for order in orders
    ]
    record = QueueRecord(queue_id, "queue", f"q{queue_id}", count=len(orders), size=BODY * len(orders))
    store.apply(store.encode([*operations, (PUT_QUEUE, record)]), (1, lsn + 1), True)


def consume(store: Store, orders: range, left: int, queue_id: int = 1) -> None:
    lsn = store.position[1]
    record = QueueRecord(queue_id, "queue", f"q{queue_id}", count=left, size=BODY * left)
    operations: list[tuple[object, ...]] = [(DELETE_MESSAGE, queue_id, order, 0, False) for order in orders]
    store.apply(store.encode([*operations, (PUT_QUEUE, record)]), (1, lsn + 1), True)


def test_a_consumed_queue_gives_its_room_back_and_the_others_stay(tmp_path: Path, small: None) -> None:
    store = Store.open(LevelDBBackend(tmp_path))
    fill(store, range(1, 2_001))
    fill(store, range(1, 101), queue_id=2)
    compactor = Compactor()
    compactor.look(store)
    assert compactor.compactions == 0  # all of it is alive
    full = store.backend.approximate_size()
    consume(store, range(1, 1_991), 10)
    assert live_bytes(store) < 1_000_000
    compactor.look(store)
    assert compactor.compactions == 1
    assert store.backend.approximate_size() < 0.2 * full
    assert [entry.order for entry in store.read_page(1, 0, 100, 10**9).entries] == list(range(1_991, 2_001))
    assert len(store.read_page(2, 0, 200, 10**9).entries) == 100
    store.close()
    again = Store.open(LevelDBBackend(tmp_path))
    assert len(again.read_page(1, 0, 100, 10**9).entries) == 10
    again.close()


def test_a_close_waits_for_one_piece_only_and_a_closed_store_is_left_alone(tmp_path: Path, small: None) -> None:
    store = Store.open(LevelDBBackend(tmp_path))
    fill(store, range(1, 3_001))
    consume(store, range(1, 3_001), 0)
    thread = threading.Thread(target=store.backend.compact, args=(b"\x20", b"\xff"))
    thread.start()
    store.close()
    thread.join(10)
    assert not thread.is_alive()
    store.backend.compact(b"\x20", b"\xff")
    Store.open(LevelDBBackend(tmp_path)).close()


def test_what_was_written_unsynced_is_on_the_disk_before_a_synced_write_is(tmp_path: Path) -> None:
    """LevelDB leaves a full log behind without syncing it: what is in it must be in a table before a later log is synced."""
    store = Store.open(LevelDBBackend(tmp_path))
    for number in range(40):  # several logs of 4 MiB
        changes = store.encode(
            [
                (PUT_MESSAGE, 1, order, Message("/queue/q", bytes(BODY), b"", True, 4, 0))
                for order in range(number * 50, number * 50 + 50)
            ]
        )
        store.apply(changes, (1, number + 1), False)
    logs = [path for path in tmp_path.iterdir() if path.suffix == ".log"]
    assert sum(path.stat().st_size for path in logs) > 100_000
    store.apply([], (1, 40), True)
    logs = [path for path in tmp_path.iterdir() if path.suffix == ".log"]
    assert sum(path.stat().st_size for path in logs) < 10_000  # everything else is in tables, which LevelDB syncs
    store.close()
