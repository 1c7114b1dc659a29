"""Comparing stores by difference: whatever differs is found and replaced, and little else is moved."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.errors import ProtocolError
from pybroker.operations import (
    DELETE_MESSAGE,
    PUT_BODY,
    PUT_MESSAGE,
    PUT_PEER,
    PUT_PRODUCER,
    PUT_QUEUE,
    PUT_SCHEDULE,
    PUT_SCHEDULING,
    PeerRecord,
    ProducerRecord,
    QueueRecord,
    Schedule,
    SchedulingRecord,
)
from pybroker.store import LevelDBBackend, MemoryBackend, Store
from pybroker.store import format as fmt
from pybroker.store.backend import Backend, Change, Entry, Reader
from pybroker.store.chunks import CHUNK_BYTES, FIRST, STOP, ChunkDigest, Replaced, compare, digests, read, replace
from tests.store.samples import message, place

MANY = 1 << 40


def walk(reader: Reader, bytes_max: int = MANY, count_max: int = MANY, **options: int) -> list[ChunkDigest]:
    found: list[ChunkDigest] = []
    start: bytes | None = FIRST
    while start is not None:
        chunks, start = digests(reader, start, bytes_max, count_max, **options)  # type: ignore[arg-type]
        assert chunks
        found += chunks
    return found


def catch_up(leader: Store, follower: Store, **options: int) -> list[Replaced]:
    """What the two sides do, without the wire between them."""
    done = []
    with leader.backend.snapshot() as snapshot:
        for chunk in walk(snapshot, 500, 3, **options):
            with follower.backend.snapshot() as present:
                ranges = compare(present, [chunk])
            for start, stop in ranges:
                done.append(replace(follower, start, stop, read(snapshot, start, stop)))
    follower.reload()
    return done


def content(store: Store, meta: bool = False) -> list[Entry]:
    return [entry for entry in store.backend.iterate(FIRST, STOP) if meta or entry[0] != fmt.META_KEY]


def put(store: Store, *changes: Change) -> None:
    store.backend.write(store.backend.new_batch(list(changes)), False)


def sealed(key: bytes, value: bytes) -> bytes:
    return fmt.seal(key, b"\1" + value)


small = st.integers(0, 5)
keys = st.one_of(
    st.builds(fmt.message_key, small, small),
    st.builds(fmt.history_key, small),
    st.builds(fmt.body_key, small),
    st.builds(fmt.expiry_key, small, small, small),
)
contents = st.dictionaries(keys, st.binary(max_size=40), max_size=40)
limits = st.fixed_dictionaries({"chunk_bytes": st.integers(1, 300), "chunk_count": st.integers(1, 8)})


def raw(entries: dict[bytes, bytes]) -> Store:
    store = Store.open(MemoryBackend())
    put(store, *[(key, sealed(key, value)) for key, value in entries.items() if key[0] != fmt.HISTORY])
    put(
        store,
        *[
            store.history_change(key[-1], value[0] if value else 0)
            for key, value in entries.items()
            if key[0] == fmt.HISTORY
        ],
    )
    return store


@given(contents, contents, limits)
def test_two_stores_become_equal(left: dict[bytes, bytes], right: dict[bytes, bytes], limit: dict[str, int]) -> None:
    leader, follower = raw(left), raw(right)
    leader.apply([], (3, 9), False)
    meta = follower.backend.get(fmt.META_KEY)
    catch_up(leader, follower, **limit)
    assert content(leader) == content(follower)
    assert follower.backend.get(fmt.META_KEY) == meta
    assert follower.position == (3, 9)
    leader.reload()
    assert follower.history == leader.history
    assert catch_up(leader, follower, **limit) == []


@given(contents, limits, st.data())
def test_any_single_difference_is_found(
    entries: dict[bytes, bytes], limit: dict[str, int], data: st.DataObject
) -> None:
    leader, follower = raw(entries), raw(entries)
    present = content(leader)
    key, value = data.draw(st.sampled_from(present))
    kind = data.draw(st.sampled_from(["missing", "other", "extra"]))
    if kind == "missing":
        put(follower, (key, None))
    elif kind == "other":
        bit = data.draw(st.integers(0, 8 * len(value) - 1))
        flipped = bytearray(value)
        flipped[bit // 8] ^= 1 << bit % 8
        put(follower, (key, bytes(flipped)))
    else:
        key = data.draw(st.sampled_from([FIRST, b"\x0e", b"\x11\0", b"\x12\0", key + b"\0", b"\xfe\xff"]))
        put(follower, (key, b"x"))
    with leader.backend.snapshot() as snapshot, follower.backend.snapshot() as other:
        ranges = compare(other, walk(snapshot, **limit))
        assert len(ranges) == 1
        assert ranges[0][0] <= key < ranges[0][1]


@given(contents, limits, st.integers(1, 500), st.integers(1, 5))
def test_the_ranges_of_a_walk_cover_everything_once(
    entries: dict[bytes, bytes], limit: dict[str, int], bytes_max: int, count_max: int
) -> None:
    store = raw(entries)
    with store.backend.snapshot() as reader:
        whole = walk(reader, **limit)
        assert walk(reader, bytes_max, count_max, **limit) == whole, "pages do not move the boundaries"
        assert (whole[0].start, whole[-1].stop) == (FIRST, STOP)
        for before, after in pairwise(whole):
            assert before.start < before.stop == after.start
        parts = [read(reader, chunk.start, chunk.stop) for chunk in whole]
    assert [entry for part in parts for entry in part] == content(store)
    assert [len(part) for part in parts] == [chunk.count for chunk in whole]
    assert all(len(part) <= limit["chunk_count"] for part in parts)
    for part in parts:
        assert sum(len(key) + len(value) for key, value in part[:-1]) < limit["chunk_bytes"]


def test_a_page_ends_at_its_limits() -> None:
    store = raw({fmt.message_key(1, number): bytes(100) for number in range(200)})
    chunks, following = digests(store.backend, FIRST, MANY, 2)
    assert (len(chunks), following) == (2, chunks[1].stop)
    chunks, following = digests(store.backend, FIRST, 1, MANY)
    assert (len(chunks), following) == (1, chunks[0].stop)


@pytest.mark.parametrize(
    "others",
    [
        [(b"\x20a", b"a"), (b"\x20b", b"bc")],
        [(b"\x20", b"ab"), (b"a\x20b", b"c")],
        [(b"\x20a", b"abc"), (b"\x20b", b"")],
    ],
)
def test_bytes_can_not_be_shifted_from_one_entry_to_the_next(others: list[Entry]) -> None:
    one, other = MemoryBackend(), MemoryBackend()
    one.write([(b"\x20a", b"ab"), (b"\x20b", b"c")], True)
    other.write(others, True)
    assert digests(one, FIRST, MANY, MANY)[0][0].digest != digests(other, FIRST, MANY, MANY)[0][0].digest


@pytest.mark.parametrize("kind", ["leveldb", "memory"])
def test_real_stores_with_everything_in_them(kind: str, tmp_path: Path) -> None:
    def make(name: str) -> Backend:
        return LevelDBBackend(tmp_path / name) if kind == "leveldb" else MemoryBackend()

    chance = random.Random(3)
    leader, follower = Store.open(make("a")), Store.open(make("b"))
    operations: list[tuple[object, ...]] = [(PUT_QUEUE, QueueRecord(1, "queue", "q"))]
    operations += [(PUT_MESSAGE, 1, place(number), message(chance.randbytes(200))) for number in range(2_000)]
    for store in (leader, follower):
        changes = store.encode(operations)
        store.write(store.prepare([*changes, store.history_change(1, 1)], (1, 1)), False)
    kept = [(PUT_PRODUCER, ProducerRecord("p", (1, 2_000))), (PUT_PEER, PeerRecord("north"))]
    kept += [(PUT_SCHEDULE, Schedule(3, 70, message(b"recall")), 0), (PUT_SCHEDULING, SchedulingRecord(4, 1, 10, 70))]
    leader.apply(leader.encode([(DELETE_MESSAGE, 1, place(7), 0, False), *kept]), (1, 2), False)
    divergent = [(PUT_QUEUE, QueueRecord(2, "queue", "divergent")), (PUT_PRODUCER, ProducerRecord("divergent"))]
    follower.apply(follower.encode(divergent), (1, 2), False)
    follower.apply(
        follower.encode([(PUT_BODY, 9, message(b"only here"), 1), store.history_change(2, 3)][:1]), (1, 3), False
    )
    done = catch_up(leader, follower)
    assert sum(each.deletes for each in done) >= 1
    assert sum(each.written for each in done) < 1_000, "only what differs is written"
    assert content(leader) == content(follower)
    assert follower.store_id != leader.store_id
    assert follower.position == (1, 2)
    assert [record.name for record in follower.records] == ["q"]
    assert (follower.producers, follower.peers) == ([ProducerRecord("p", (1, 2_000))], [PeerRecord("north")])
    assert follower.scheduling == SchedulingRecord(4, 1, 10, 70)
    assert [each.number for each in follower.read_schedules((0, 0), 9, 1 << 20).schedules] == [3]
    assert (follower.next_queue_id, follower.next_body_id) == (leader.next_queue_id, leader.next_body_id)
    leader.close()
    follower.close()


def test_scattered_differences_move_little() -> None:
    """The promise for 1,000 of 1,000,000, at a twentieth of the size: under 5 % of the data, digests included."""
    count = 50_000
    chance = random.Random(1)
    leader, follower = Store.open(MemoryBackend()), Store.open(MemoryBackend())
    changes: list[Change] = [(fmt.message_key(1, number), chance.randbytes(330)) for number in range(count)]
    put(leader, *changes)
    put(follower, *changes)
    put(follower, *[(changes[at][0], chance.randbytes(330)) for at in chance.sample(range(count), count // 1_000)])
    total = sum(len(key) + len(value) for key, value in content(leader))
    with leader.backend.snapshot() as snapshot, follower.backend.snapshot() as other:
        chunks = walk(snapshot)
        ranges = compare(other, chunks)
        moved = sum(len(key) + len(value) + 5 for start, stop in ranges for key, value in read(snapshot, start, stop))
    traffic = sum(len(chunk.start) + len(chunk.stop) + len(chunk.digest) + 8 for chunk in chunks)
    assert (moved + traffic) / total < 0.05


def test_a_huge_range_is_compared_in_little_memory() -> None:
    """A follower that has a million keys where the leader has none."""
    chunk = ChunkDigest(FIRST, STOP, b"", 2)

    class Endless:
        def get(self, key: bytes) -> bytes | None:
            raise AssertionError

        def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
            return ((fmt.message_key(1, number), bytes(10_000)) for number in range(100_000))

    tracemalloc.start()
    assert compare(Endless(), [chunk]) == [(FIRST, STOP)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_large_replacements_are_written_in_parts() -> None:
    backend = MemoryBackend()
    store = Store.open(backend)
    put(store, *[(fmt.message_key(1, number), bytes(5_000)) for number in range(3_000)])
    sizes: list[int] = []
    backend.new_batch = lambda changes: sizes.append(len(changes)) or changes  # type: ignore[method-assign,func-returns-value,assignment]
    assert replace(store, FIRST, STOP, []) == Replaced(0, 3_001, 0)
    assert max(sizes) <= 1_000
    assert content(store) == []


def test_a_bad_value_does_not_displace_a_whole_one() -> None:
    store = Store.open(MemoryBackend())
    key, missing = fmt.message_key(1, 1), fmt.message_key(1, 2)
    put(store, (key, sealed(key, b"whole")))
    bad = sealed(key, b"whole")[:-1] + b"?"
    done = replace(store, fmt.message_key(1, 0), fmt.message_key(1, 9), [(key, bad), (missing, b"bad, too")])
    assert done.kept == (key,)
    assert store.backend.get(key) == sealed(key, b"whole")
    assert store.backend.get(missing) == b"bad, too", "counted and never delivered, as it is there"
    put(store, (key, b"rotten"))
    good = [(key, sealed(key, b"whole"))]
    assert replace(store, fmt.message_key(1, 0), fmt.message_key(1, 9), good).puts == 1


@pytest.mark.parametrize(
    "entries",
    [
        [(fmt.META_KEY, b"")],
        [(b"\x0e", b"")],
        [(fmt.message_key(9, 9), b"")],  # behind the range
        [(fmt.queue_key(1), b"")],  # before it
        [(fmt.message_key(1, 2), b""), (fmt.message_key(1, 1), b"")],
        [(fmt.message_key(1, 1), b"")] * 2,
        [(fmt.message_key(1, 1)[:-1], b"")],
        [(b"", b"")],
    ],
)
def test_entries_that_do_not_belong_are_refused_whole(entries: list[Entry]) -> None:
    store = Store.open(MemoryBackend())
    key = fmt.message_key(1, 0)
    put(store, (key, b"x"))
    start = FIRST if entries[0][0] == fmt.META_KEY else key
    before = content(store, meta=True)
    with pytest.raises(ProtocolError):
        replace(store, start, fmt.message_key(5, 0), [(key, b"y"), *entries] if start == key else entries)
    assert content(store, meta=True) == before


@pytest.mark.parametrize(
    "ranges",
    [[(b"\0", b"\x10"), (b"\x12", b"\x20")], [(b"\x20", b"\x20")], [(b"\x20", b"\x10")], [(b"\x20", b"\xff\0")]],
)
def test_ranges_that_do_not_follow_each_other_are_refused(ranges: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(ProtocolError):
        compare(MemoryBackend(), [ChunkDigest(start, stop, b"", 0) for start, stop in ranges])


def test_nothing_to_compare() -> None:
    assert compare(MemoryBackend(), []) == []
    assert CHUNK_BYTES < 16_384
