"""The history of epochs, and what a store takes over from batches that another replica encoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.errors import CorruptRecord, StoreError
from pybroker.operations import DELETE_QUEUE, PUT_BODY, PUT_MESSAGE, PUT_QUEUE, QueueRecord
from pybroker.store import LevelDBBackend, MemoryBackend, Store
from pybroker.store import format as fmt
from pybroker.store.backend import Backend, Change
from pybroker.store.check import verify
from pybroker.store.salvage import NOTE_POSITION, salvage
from pybroker.store.store import BODY_IDS_RESERVED, fences
from tests.store.forgetful import ForgetfulBackend
from tests.store.samples import message, place

BIG = 1 << 30


@pytest.fixture(params=["leveldb", "memory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    made: Backend = LevelDBBackend(tmp_path / "store") if request.param == "leveldb" else MemoryBackend()
    yield made
    made.close()


def advance(store: Store, epoch: int, count: int, begins: bool = True) -> None:
    """`count` batches of an epoch."""
    for number in range(count):
        lsn = store.position[1] + 1
        changes = [store.history_change(epoch, lsn)] if begins and not number else []
        store.write(store.prepare(changes, (epoch, lsn)), False)


def test_a_store_without_records_is_of_epoch_0(backend: Backend) -> None:
    store = Store.open(backend)
    assert store.history == [(0, 0)]
    assert (store.epoch_at(0), store.epoch_at(1), store.epoch_at(-1)) == (0, None, None)
    advance(store, 0, 3, begins=False)
    assert [store.epoch_at(lsn) for lsn in range(5)] == [0, 0, 0, 0, None]


def test_history_is_kept_up_and_read_again(backend: Backend) -> None:
    store = Store.open(backend)
    advance(store, 0, 2, begins=False)
    advance(store, 3, 2)
    advance(store, 7, 1)
    for each in (store, Store.open(backend)):
        assert each.history == [(0, 0), (3, 3), (7, 5)]
        assert [each.epoch_at(lsn) for lsn in range(7)] == [0, 0, 0, 3, 3, 7, None]
        each.reload()


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), max_size=8))
def test_epochs_against_a_list(steps: list[tuple[int, int]]) -> None:
    store = Store.open(MemoryBackend())
    model = [0]
    epoch = 0
    for raised, count in steps:
        epoch += raised
        advance(store, epoch, count)
        model += [epoch] * count
    for each in (store, Store.open(store.backend)):
        assert [each.epoch_at(lsn) for lsn in range(len(model))] == model
        assert each.epoch_at(len(model)) is None


def test_a_record_is_known_only_when_its_batch_is_written() -> None:
    backend = ForgetfulBackend()
    store = Store.open(backend)
    prepared = store.prepare([store.history_change(4, 1)], (4, 1))
    assert store.history == [(0, 0)]
    backend.fail_write = backend.writes + 1
    with pytest.raises(StoreError):
        store.write(prepared, True)
    assert (store.history, store.position) == ([(0, 0)], (0, 0))
    assert Store.open(backend.crash()).history == [(0, 0)]


def test_a_removed_record_goes() -> None:
    store = Store.open(MemoryBackend())
    advance(store, 2, 1)
    store.apply([(fmt.history_key(2), None)], (3, 2), False)
    assert store.history == [(0, 0)]


def test_reading_the_history_does_not_run_into_deleted_messages() -> None:
    """Its range ends at a key that is always there; the tags say so."""
    assert fmt.HISTORY + 1 == fmt.QUEUE
    assert fmt.QUEUE + 1 == fmt.META


def test_a_follower_takes_over_ids_and_history() -> None:
    leader = Store.open(MemoryBackend())
    follower = Store.open(MemoryBackend())
    batches: list[list[tuple[object, ...]]] = [
        [],
        [(PUT_QUEUE, QueueRecord(7, "queue", "a"))],
        [(PUT_BODY, 3, message(), 1), (DELETE_QUEUE, 7)],
    ]
    for number, operations in enumerate(batches, 1):
        position = 1, number
        changes = leader.encode(operations) if operations else [leader.history_change(1, 1)]
        leader.write(leader.prepare(changes, position), False)
        follower.apply(changes, position, True)
        assert follower.position == position
        assert follower.history == leader.history == [(0, 0), (1, 1)]
        assert (follower.next_queue_id, follower.next_body_id) == (leader.next_queue_id, leader.next_body_id)
    assert (follower.next_queue_id, follower.next_body_id) == (8, 3 + BODY_IDS_RESERVED)
    follower.reload()
    assert (follower.next_queue_id, follower.next_body_id) == (8, 3 + BODY_IDS_RESERVED)
    # What it encodes now raises the bounds in the batch that first passes them.
    changes = follower.encode([(PUT_QUEUE, QueueRecord(follower.next_queue_id, "queue", "b"))])
    assert (fmt.IDS_KEY, fmt.encode_pair(fmt.IDS_KEY, 9, 3 + BODY_IDS_RESERVED)) in changes


def test_ids_of_batches_that_came_to_nothing_are_given_up_at_reload() -> None:
    """A deposed leader encoded them."""
    store = Store.open(MemoryBackend())
    store.encode([(PUT_QUEUE, QueueRecord(5, "queue", "lost")), (PUT_BODY, 1, message(), 1)])
    other = Store.open(MemoryBackend())
    store.apply(other.encode([(PUT_QUEUE, QueueRecord(2, "queue", "kept"))]), (1, 1), True)
    assert store.next_queue_id == 6, "higher is safe"
    store.reload()
    assert (store.next_queue_id, store.next_body_id) == (3, 1)


def test_fences_go_and_come_with_foreign_batches() -> None:
    store = Store.open(MemoryBackend())
    store.apply(store.encode([(PUT_QUEUE, QueueRecord(1, "queue", "a"))]), (1, 1), True)
    other = Store.open(MemoryBackend())
    store.apply(other.encode([(DELETE_QUEUE, 1)]), (1, 2), True)
    assert store.backend.get(fences(1)[0]) is None
    keys = [key for key, _ in store.encode([(PUT_MESSAGE, 1, place(1), message())])]
    assert set(fences(1)) <= set(keys), "a fence that another replica removed is written again"


def test_expiry_rows_of_foreign_batches_are_found() -> None:
    leader = Store.open(MemoryBackend())
    follower = Store.open(MemoryBackend())
    assert follower.read_due(100, 10) == []
    follower.apply(leader.encode([(PUT_MESSAGE, 1, place(1), message(expires=50))]), (1, 1), True)
    assert [entry.expires for entry in follower.read_due(100, 10)] == [50]


@pytest.mark.parametrize("key", [fmt.history_key(2), fmt.IDS_KEY])
def test_a_bad_record_in_a_batch_is_refused_before_it_is_written(key: bytes) -> None:
    store = Store.open(MemoryBackend())
    with pytest.raises(CorruptRecord):
        store.apply([(b"\x20" + b"k" * 16, b"v"), (key, b"rubbish")], (2, 1), True)
    assert store.position == (0, 0)
    assert store.backend.get(b"\x20" + b"k" * 16) is None


# ---- verify and salvage


def build(path: Path) -> None:
    store = Store.open(LevelDBBackend(path))
    advance(store, 0, 2, begins=False)
    advance(store, 3, 2)
    advance(store, 7, 1)
    store.close()


def change(path: Path, *changes: Change) -> None:
    backend = LevelDBBackend(path)
    backend.write(backend.new_batch(list(changes)), True)
    backend.close()


def test_the_bytes_of_a_record_are_held_fast() -> None:
    assert Store.history_change(3, 258) == (
        bytes.fromhex("0f0000000000000003"),
        bytes.fromhex("010000000000000102") + fmt.encode_number(fmt.history_key(3), 258)[-4:],
    )


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (Store.history_change(3, 5), "history"),  # not below the next one's
        (Store.history_change(7, 6), "history"),  # beyond the position
        ((fmt.history_key(7), None), "history"),  # the position's epoch is missing
        (Store.history_change(8, 5), "history"),
        ((fmt.history_key(3), b"\1" + bytes(12)), "corrupt"),
    ],
)
def test_verify_finds_a_wrong_history(tmp_path: Path, damage: Change, kind: str) -> None:
    build(tmp_path / "store")
    assert verify(tmp_path).ok
    change(tmp_path / "store", damage)
    assert kind in {problem.kind for problem in verify(tmp_path).problems}


def test_a_salvaged_store_is_at_a_position_that_no_other_went_through(tmp_path: Path) -> None:
    build(tmp_path / "store")
    salvage(tmp_path, tmp_path / "new")
    assert verify(tmp_path / "new").ok
    other = Store.open(LevelDBBackend(tmp_path / "store"))
    store = Store.open(LevelDBBackend(tmp_path / "new" / "store"))
    assert other.epoch_at(store.position[1]) != store.position[0]
    for lsn in range(other.position[1] + 1):
        assert store.epoch_at(lsn) != other.epoch_at(lsn), "nor takes it any other for one of its own past"
    assert store.epoch_at(0) != 0, "an empty store neither"
    other.close()
    store.close()


def test_a_salvaged_store_without_position_takes_the_epoch_of_its_history(tmp_path: Path) -> None:
    build(tmp_path / "store")
    change(tmp_path / "store", (fmt.POSITION_KEY, b"bad"))
    report = salvage(tmp_path, tmp_path / "new")
    assert NOTE_POSITION in report.notes
    store = Store.open(LevelDBBackend(tmp_path / "new" / "store"))
    assert (store.position, store.history) == ((7, 0), [(7, 0)])
    store.close()
