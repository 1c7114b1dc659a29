"""The store on both backends: opening, identity, ids, pages, shared bodies, the expiry index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.errors import StoreDamaged, StoreError, StoreFormatError
from pybroker.operations import (
    DELETE_BODY,
    DELETE_MESSAGE,
    DELETE_QUEUE,
    PUT_BODY,
    PUT_DELIVERIES,
    PUT_MESSAGE,
    PUT_PEER,
    PUT_PRODUCER,
    PUT_QUEUE,
    PUT_REFERENCE,
    SET_REFERENCES,
    DueEntry,
    PeerRecord,
    ProducerRecord,
    QueueRecord,
)
from pybroker.store import LevelDBBackend, MemoryBackend, Store
from pybroker.store import format as fmt
from pybroker.store.backend import Backend, Reader
from pybroker.store.pages import DELIVERIES_UNKNOWN
from pybroker.store.store import BODY_IDS_RESERVED
from tests.store.forgetful import ForgetfulBackend
from tests.store.samples import Writer, fields, message, place

BIG = 1 << 30


@pytest.fixture(params=["leveldb", "memory"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    made: Backend = LevelDBBackend(tmp_path / "db") if request.param == "leveldb" else MemoryBackend()
    yield made
    made.close()


def test_a_new_store_is_empty_and_has_an_identity(backend: Backend) -> None:
    store = Store.open(backend)
    assert len(bytes.fromhex(store.store_id)) == 8
    assert (store.starts, store.position, store.records) == (1, (0, 0), [])
    assert (store.next_queue_id, store.next_body_id) == (1, 1)
    assert store.read_page(1, 0, 10, BIG).next_order is None


def test_each_open_raises_the_start_counter(backend: Backend) -> None:
    stores = [Store.open(backend) for _ in range(3)]
    assert [store.starts for store in stores] == [1, 2, 3]
    assert len({store.store_id for store in stores}) == 1


def test_the_start_counter_is_synced() -> None:
    backend = ForgetfulBackend()
    for starts in (1, 2, 3):
        assert Store.open(backend).starts == starts
        backend = backend.crash()


def test_position_and_descriptors_are_read_at_open(backend: Backend) -> None:
    write = Writer(Store.open(backend))
    records = [QueueRecord(2, "queue", "b", next_sequence=5), QueueRecord(1, "subscription", "a.>", "c", "s")]
    write(*((PUT_QUEUE, record) for record in records))
    write((PUT_QUEUE, QueueRecord(2, "queue", "b", next_sequence=6)))
    store = Store.open(backend)
    assert store.position == (0, 2)
    assert store.records == [records[1], QueueRecord(2, "queue", "b", next_sequence=6)]


def test_other_formats_and_other_databases_are_refused() -> None:
    backend = MemoryBackend()
    Store.open(backend)
    value = backend.get(fmt.META_KEY)
    assert value is not None
    later = value[: len(fmt.MAGIC) + 1] + (7).to_bytes(4, "big") + b"whatever follows"
    for meta, text in ((later, "has format 7, this version reads format 1"), (b"something", "not a pybroker store")):
        backend.write([(fmt.META_KEY, meta)], True)
        with pytest.raises(StoreFormatError, match=text):
            Store.open(backend)
    backend.write([(fmt.META_KEY, None)], True)
    with pytest.raises(StoreFormatError, match="none that says"):
        Store.open(backend)


FOUNDATIONS = (
    *(fmt.META_KEY, fmt.POSITION_KEY, fmt.IDS_KEY, fmt.queue_key(1)),
    *(fmt.producer_key("p"), fmt.peer_key("north")),
)


@pytest.mark.parametrize("key", FOUNDATIONS)
def test_a_store_whose_foundations_are_bad_does_not_open(key: bytes) -> None:
    backend = ForgetfulBackend()
    write = Writer(Store.open(backend))
    write(
        (PUT_QUEUE, QueueRecord(1, "queue", "a")), (PUT_PRODUCER, ProducerRecord("p")), (PUT_PEER, PeerRecord("north"))
    )
    backend.flip(key, 8 * len(backend.get(key) or b"") - 1)
    with pytest.raises(StoreDamaged, match="salvage"):
        Store.open(backend)


def test_queue_ids_are_never_used_again(backend: Backend) -> None:
    write = Writer(Store.open(backend))
    write((PUT_QUEUE, QueueRecord(9, "queue", "z")), (PUT_QUEUE, QueueRecord(4, "queue", "d")))
    write((DELETE_QUEUE, 9), (DELETE_QUEUE, 4))
    store = Store.open(backend)
    assert store.records == []
    assert store.next_queue_id == 10
    assert set(backend.iterate(b"\x20", b"\xff")) == set(), "fences go with their queue"


def test_body_ids_are_reserved_in_blocks(backend: Backend) -> None:
    store = Store.open(backend)
    changes = store.encode((PUT_BODY, body_id, message(), 1) for body_id in range(1, 1_000))
    assert sum(key == fmt.IDS_KEY for key, _ in changes) == 1
    store.write(store.prepare(changes, (1, 1)), True)
    assert Store.open(backend).next_body_id == BODY_IDS_RESERVED + 1


def test_ids_of_a_batch_that_was_lost_are_free_again() -> None:
    backend = ForgetfulBackend()
    Writer(Store.open(backend))((PUT_QUEUE, QueueRecord(1, "queue", "a")), sync=False)
    assert Store.open(backend.crash(keep=1)).next_queue_id == 2
    assert Store.open(backend.crash(keep=0)).next_queue_id == 1


def test_messages_come_back_in_delivery_order(backend: Backend) -> None:
    write = Writer(Store.open(backend))
    sent = {place(number, number % 10): message(b"%d" % number, number % 10) for number in range(30)}
    write((PUT_QUEUE, QueueRecord(1, "queue", "q")), *((PUT_MESSAGE, 1, order, sent[order]) for order in sent))
    write((PUT_MESSAGE, 2, place(0), message(b"another queue")))
    page = write.store.read_page(1, 0, 100, BIG)
    assert [entry.order for entry in page.entries] == sorted(sent)
    assert [fields(entry.message) for entry in page.entries] == [fields(sent[order]) for order in sorted(sent)]
    assert (page.corrupt, page.next_order) == ([], None)


def test_a_page_makes_progress_and_says_where_it_goes_on(backend: Backend) -> None:
    write = Writer(Store.open(backend))
    write(*((PUT_MESSAGE, 1, place(number), message(b"x" * 1_000)) for number in range(5)))
    read = write.store.read_page
    assert [entry.order for entry in read(1, 0, 10, 10).entries] == [place(0)]
    assert read(1, 0, 10, 2_500).next_order == place(2)
    assert read(1, place(2), 10, 2_500).next_order == place(4)
    assert read(1, place(4), 10, 2_500).next_order is None
    assert read(1, 0, 5, BIG).next_order == place(4) + 1, "nobody looks beyond the last message asked for"
    assert read(1, place(5), 5, BIG) == read(3, 0, 5, BIG)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(0, 300), st.booleans()), max_size=40),
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 700)), min_size=1, max_size=10),
)
def test_any_pages_read_the_same_as_one(sent: list[tuple[int, int, int, bool]], sizes: list[tuple[int, int]]) -> None:
    write = Writer(Store.open(MemoryBackend()))
    for sequence, priority, size, counted in sent:
        write((PUT_MESSAGE, 1, place(sequence, priority), message(b"x" * size, priority)))
        if counted:
            write((PUT_DELIVERIES, 1, place(sequence, priority), size + 1))
    whole = write.store.read_page(1, 0, 10_000, BIG)
    read = []
    order: int | None = 0
    turn = 0
    while order is not None:
        count_max, bytes_max = sizes[turn % len(sizes)]
        page = write.store.read_page(1, order, count_max, bytes_max)
        assert page.entries or page.next_order is None
        assert len(page.entries) <= count_max
        read += page.entries
        order = page.next_order
        turn += 1
    assert [fields(entry) for entry in read] == [fields(entry) for entry in whole.entries]


def test_delivery_counts_are_merged_and_go_with_their_message(backend: Backend) -> None:
    write = Writer(Store.open(backend))
    write(*((PUT_MESSAGE, 1, place(number), message()) for number in range(4)))
    write((PUT_DELIVERIES, 1, place(1), 2), (PUT_DELIVERIES, 1, place(3), 7), (PUT_DELIVERIES, 1, place(1), 3))
    page = write.store.read_page(1, 0, 10, BIG)
    assert [entry.deliveries for entry in page.entries] == [None, 3, None, 7]
    write((DELETE_MESSAGE, 1, place(1), 0, True), (DELETE_MESSAGE, 1, place(3), 0, True))
    assert [entry.order for entry in write.store.read_page(1, 0, 10, BIG).entries] == [place(0), place(2)]
    assert [key for key, _ in backend.iterate(fmt.deliveries_key(0, 0), fmt.body_key(0))] == [
        fmt.deliveries_key(1, fmt.FENCE_ORDER)
    ]


def test_shared_bodies_are_resolved(backend: Backend) -> None:
    write = Writer(Store.open(backend))
    shared = message(b"to all", 7, expires=500)
    write(
        (PUT_BODY, 1, shared, 2),
        (PUT_REFERENCE, 5, place(0, 7), 1, 500, shared.size),
        (PUT_REFERENCE, 6, place(3, 7), 1, 500, shared.size),
    )
    for queue_id, order in ((5, place(0, 7)), (6, place(3, 7))):
        (entry,) = write.store.read_page(queue_id, 0, 10, BIG).entries
        assert fields(entry) == (order, fields(shared), None, 1, 2)
    write((DELETE_MESSAGE, 5, place(0, 7), 500, False), (SET_REFERENCES, 1, 1))
    assert write.store.read_page(6, 0, 10, BIG).entries[0].references == 1
    write((DELETE_MESSAGE, 6, place(3, 7), 500, False), (DELETE_BODY, 1))
    assert list(backend.iterate(b"\x20", b"\xff")) == []


def test_bad_values_are_passed_over_and_reported() -> None:
    backend = ForgetfulBackend()
    write = Writer(Store.open(backend))
    write(*((PUT_MESSAGE, 1, place(number), message(b"%d" % number)) for number in range(5)))
    write((PUT_DELIVERIES, 1, place(4), 9))
    write((PUT_BODY, 1, message(b"a"), 2), (PUT_BODY, 2, message(b"b"), 1), (PUT_BODY, 3, message(b"c"), 1))
    write(*((PUT_REFERENCE, 1, place(10 + body_id), body_id, 0, 5) for body_id in (1, 2, 3, 4)))
    backend.flip(fmt.message_key(1, place(1)), 300)
    backend.set(fmt.message_key(1, place(2)), backend.get(fmt.message_key(1, place(3))))
    backend.flip(fmt.deliveries_key(1, place(4)), 20)
    backend.flip(fmt.body_key(2), 100)
    backend.set(fmt.references_key(3), None)
    page = write.store.read_page(1, 0, 100, BIG)
    assert [entry.order for entry in page.entries] == [place(0), place(3), place(4), place(11)]
    assert page.entries[2].deliveries == DELIVERIES_UNKNOWN
    assert [error.key for error in page.corrupt] == [
        fmt.message_key(1, place(1)),
        fmt.message_key(1, place(2)),
        fmt.deliveries_key(1, place(4)),
        fmt.body_key(2),
        fmt.references_key(3),
        fmt.body_key(4),
    ]
    assert page.next_order is None
    assert backend.get(fmt.message_key(1, place(1))) is not None, "it stays for inspection"


def test_reading_to_the_end_of_a_queue_stays_in_its_range(backend: Backend) -> None:
    """The fences: without them LevelDB would pass over all that was deleted in the queues behind."""
    write = Writer(Store.open(backend))
    write((PUT_QUEUE, QueueRecord(1, "queue", "a")), (PUT_QUEUE, QueueRecord(2, "queue", "b")))
    write((PUT_MESSAGE, 1, place(0), message()))
    after = [key for key, _ in backend.iterate(fmt.message_key(1, place(0) + 1), b"\xff")]
    assert after[0] == fmt.message_key(1, fmt.FENCE_ORDER)
    assert next(key for key, _ in backend.iterate(fmt.queue_key(2) + b"\0", b"\xff")) == fmt.META_KEY
    assert write.store.read_page(1, 0, 10, BIG).next_order is None


# ---- the expiry index


def put(order: int, expires: int, queue_id: int = 1) -> tuple[object, ...]:
    return (PUT_MESSAGE, queue_id, order, message(b"12345", expires=expires))


def test_due_messages_come_in_time_order(backend: Backend) -> None:
    write = Writer(Store.open(backend))
    write(put(1, 300), put(2, 100), put(3, 200), put(4, 0), put(5, 400, queue_id=2))
    due = write.store.read_due
    assert due(99, 10) == []
    assert due(200, 10) == [DueEntry(100, 1, 2, 9), DueEntry(200, 1, 3, 9)]
    assert due(10_000, 2) == due(200, 10)
    write((DELETE_MESSAGE, 1, 2, 100, False), (DELETE_MESSAGE, 1, 3, 200, False))
    assert [entry.expires for entry in due(10_000, 10)] == [300, 400]


def test_a_sweep_goes_on_behind_a_row(backend: Backend) -> None:
    write = Writer(Store.open(backend))
    write(*(put(number, 100 + number // 2) for number in range(6)))
    found = write.store.read_due(1_000, 3)
    found += write.store.read_due(1_000, 3, (found[-1].expires, 1, found[-1].order))
    assert [entry.order for entry in found] == list(range(6))
    assert [entry.order for entry in write.store.read_due(1_000, 9)] == list(range(6)), "they are still there"


def test_due_rows_name_the_shared_body(backend: Backend) -> None:
    write = Writer(Store.open(backend))
    write(put(1, 100), (PUT_BODY, 7, message(b"12345", expires=100), 2), (PUT_REFERENCE, 2, 1, 7, 100, 9))
    assert write.store.read_due(100, 10) == [DueEntry(100, 1, 1, 9), DueEntry(100, 2, 1, 9, 7, 2)]


def test_bad_messages_do_not_expire() -> None:
    """They stay for inspection, and hold nothing up."""
    backend = ForgetfulBackend()
    write = Writer(Store.open(backend))
    write(put(1, 100), put(2, 100), put(3, 100), (PUT_REFERENCE, 1, 4, 9, 100, 9))
    backend.flip(fmt.message_key(1, 1), 300)
    backend.set(fmt.message_key(1, 2), None)
    assert [entry.order for entry in write.store.read_due(1_000, 1)] == [3]
    assert [entry.order for entry in write.store.read_due(1_000, 9)] == [3]
    assert write.store.corrupt_due == 3


class _Interrupted(MemoryBackend):
    """Counts the snapshots, and calls what was hooked after one was taken, before it is read."""

    snapshots = 0
    hook: Callable[[], None] | None = None

    def snapshot(self) -> AbstractContextManager[Reader]:
        self.snapshots += 1
        taken = super().snapshot()
        hook, self.hook = self.hook, None
        if hook is not None:
            hook()
        return taken


def test_a_sweep_reads_nothing_until_the_next_row_is_due() -> None:
    backend = _Interrupted()
    write = Writer(Store.open(backend))
    write(put(1, 1_000))
    assert write.store.read_due(10, 5) == []
    before = backend.snapshots
    assert write.store.read_due(999, 5) == []
    assert backend.snapshots == before
    write(put(2, 50))
    assert [entry.expires for entry in write.store.read_due(999, 5)] == [50], "a new row below the floor is seen"
    assert [entry.expires for entry in write.store.read_due(999, 5)] == [50], "until it is deleted"


def test_a_row_written_while_the_index_is_read_is_not_missed() -> None:
    backend = _Interrupted()
    write = Writer(Store.open(backend))
    write(put(1, 1_000))
    backend.hook = lambda: write(put(2, 50))
    assert write.store.read_due(500, 5) == []
    assert [entry.expires for entry in write.store.read_due(500, 5)] == [50]


def test_bad_rows_of_the_index_hold_nothing_up() -> None:
    backend = ForgetfulBackend()
    write = Writer(Store.open(backend))
    write(put(1, 100), put(2, 200))
    backend.flip(fmt.expiry_key(100, 1, 1), 12)
    assert [entry.order for entry in write.store.read_due(1_000, 1)] == [2]
    assert write.store.corrupt_due == 1


def test_a_follower_that_becomes_leader_reads_again_what_others_wrote() -> None:
    leader, follower = Store.open(MemoryBackend()), Store.open(MemoryBackend())
    changes = leader.encode([(PUT_QUEUE, QueueRecord(3, "queue", "q")), put(1, 100, 3), (PUT_BODY, 1, message(), 1)])
    assert follower.read_due(1_000, 5) == []
    follower.write(follower.prepare(changes, (4, 2)), True)
    follower.reload()
    assert follower.position == (4, 2)
    assert [record.queue_id for record in follower.records] == [3]
    assert (follower.next_queue_id, follower.next_body_id) == (leader.next_queue_id, leader.next_body_id)
    assert [entry.queue_id for entry in follower.read_due(1_000, 5)] == [3]
    assert len(follower.encode([(PUT_QUEUE, QueueRecord(3, "queue", "q"))])) == 1


def test_a_failed_write_moves_no_position() -> None:
    backend = ForgetfulBackend()
    write = Writer(Store.open(backend))
    write(put(1, 0))
    backend.full = True
    with pytest.raises(StoreError, match="No space left"):
        write(put(2, 0))
    assert write.store.position == (0, 1)
    assert Store.open(backend.crash()).position == (0, 1)
    assert Store.open(backend.crash(keep_failed=True)).position == (0, 2)


def test_an_unknown_operation_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="not known"):
        Store.open(MemoryBackend()).encode([(77,)])
