"""Verify finds each planted kind of damage; salvage copies what is whole and touches nothing of the damaged store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pybroker.errors import CorruptRecord, StoreDamaged, StoreError, StoreLocked
from pybroker.message import Route
from pybroker.operations import (
    PUT_BODY,
    PUT_DELIVERIES,
    PUT_MESSAGE,
    PUT_PEER,
    PUT_PRODUCER,
    PUT_QUEUE,
    PUT_REFERENCE,
    PeerRecord,
    ProducerRecord,
    QueueRecord,
)
from pybroker.store import LevelDBBackend, Store, leveldb
from pybroker.store import format as fmt
from pybroker.store.backend import Change
from pybroker.store.check import verify
from pybroker.store.report import Report
from pybroker.store.salvage import NOTE_REPAIR, SIDE_COPY, salvage
from tests.store.samples import Writer, fields, message, place

BIG = 1 << 30
COUNT = 20
SHARED = message(b"to all", expires=700)
FORWARDED = message(b"on its way")
FORWARDED.route = Route(("here",), priority=4)
PRODUCER = ProducerRecord("ward-3", (1, 9, 20, 20), 1, 5)
PEER = PeerRecord("north", (("t.>", "south", ("north", "south")),))


def build(directory: Path, count: int = COUNT, pad: bytes = b"") -> None:
    """A whole store: a queue with `count` messages, and two subscriptions that share a body."""
    write = Writer(Store.open(LevelDBBackend(directory)))
    sent = [message(b"%d" % number + pad, expires=number % 2 * 500) for number in range(count)]
    size = sum(each.size for each in sent)
    operations: list[tuple[object, ...]] = [(PUT_MESSAGE, 1, place(number), each) for number, each in enumerate(sent)]
    for at in range(0, len(operations), 1_000):
        write(*operations[at : at + 1_000], sync=False)
    write(
        (PUT_DELIVERIES, 1, place(3), 2),
        (PUT_QUEUE, QueueRecord(1, "queue", "q", next_sequence=count, count=count, size=size, head=place(0))),
        (PUT_BODY, 1, SHARED, 2),
    )
    for queue_id in (2, 3):
        write((PUT_REFERENCE, queue_id, place(0), 1, 700, SHARED.size))
        record = QueueRecord(queue_id, "subscription", "t.>", "c", f"s{queue_id}", 1, 1, SHARED.size, place(0))
        write((PUT_QUEUE, record))
    link = QueueRecord(4, "link", "north", "life", "", 7, 1, FORWARDED.size, 6)
    write((PUT_QUEUE, link), (PUT_MESSAGE, 4, 6, FORWARDED), (PUT_PRODUCER, PRODUCER), (PUT_PEER, PEER))
    write.store.close()


def change(directory: Path, edit: Callable[[LevelDBBackend], list[Change]]) -> None:
    backend = LevelDBBackend(directory)
    backend.write(backend.new_batch(edit(backend)), True)
    backend.close()


def flip(key: bytes, bit: int = 77) -> Callable[[LevelDBBackend], list[Change]]:
    def edit(backend: LevelDBBackend) -> list[Change]:
        value = bytearray(backend.get(key) or b"")
        value[bit // 8] ^= 1 << bit % 8
        return [(key, bytes(value))]

    return edit


def number(key: bytes, value: int) -> Callable[[LevelDBBackend], list[Change]]:
    return lambda backend: [(key, fmt.encode_number(key, value))]


def delete(key: bytes) -> Callable[[LevelDBBackend], list[Change]]:
    return lambda backend: [(key, None)]


def kinds(report: Report) -> set[tuple[str, bytes]]:
    return {(problem.kind, problem.key) for problem in report.problems}


def test_a_whole_store_has_no_problems(tmp_path: Path) -> None:
    build(tmp_path / "store")
    seen: list[int] = []
    report = verify(tmp_path, seen.append)
    assert report.problems == ()
    assert report.ok
    assert report == verify(tmp_path / "store")
    assert [(row.name, row.found_count) for row in report.queues] == [
        ("q", COUNT),
        ("t.>", 1),
        ("t.>", 1),
        ("north", 1),
    ]
    assert report.bodies == 1
    assert seen[-1] == report.keys
    assert report.starts == 1
    assert report.position == (0, 7)


M = fmt.message_key(1, place(5))
DAMAGE: dict[str, tuple[Callable[[LevelDBBackend], list[Change]], tuple[str, bytes]]] = {
    "message": (flip(M), ("corrupt", M)),
    "reference": (flip(fmt.message_key(2, place(0))), ("corrupt", fmt.message_key(2, place(0)))),
    "body": (flip(fmt.body_key(1)), ("corrupt", fmt.body_key(1))),
    "missing body": (delete(fmt.body_key(1)), ("missing", fmt.body_key(1))),
    "references": (number(fmt.references_key(1), 5), ("references", fmt.references_key(1))),
    "no references": (delete(fmt.references_key(1)), ("references", fmt.references_key(1))),
    "lost reference": (delete(fmt.message_key(2, place(0))), ("references", fmt.references_key(1))),
    "lost message": (delete(M), ("count", fmt.queue_key(1))),
    "row without message": (delete(M), ("expiry", fmt.expiry_key(500, 1, place(5)))),
    "message without row": (
        delete(fmt.expiry_key(500, 1, place(5))),
        ("expiry", fmt.expiry_key(500, 1, place(5))),
    ),
    "row": (flip(fmt.expiry_key(500, 1, place(5)), 12), ("corrupt", fmt.expiry_key(500, 1, place(5)))),
    "size in row": (
        number(fmt.expiry_key(500, 1, place(5)), 1),
        ("expiry", fmt.expiry_key(500, 1, place(5))),
    ),
    "deliveries": (flip(fmt.deliveries_key(1, place(3)), 12), ("corrupt", fmt.deliveries_key(1, place(3)))),
    "deliveries alone": (
        number(fmt.deliveries_key(1, place(99)), 1),
        ("deliveries", fmt.deliveries_key(1, place(99))),
    ),
    "descriptor": (flip(fmt.queue_key(1)), ("corrupt", fmt.queue_key(1))),
    "no descriptor": (delete(fmt.queue_key(1)), ("missing", fmt.queue_key(1))),
    "size": (
        lambda backend: [
            (fmt.queue_key(1), fmt.encode_queue(fmt.queue_key(1), QueueRecord(1, "queue", "q", "", "", 20, 20, 1)))
        ],
        ("size", fmt.queue_key(1)),
    ),
    "head": (
        lambda backend: [
            (fmt.queue_key(1), fmt.encode_queue(fmt.queue_key(1), QueueRecord(1, "queue", "q", head=place(6))))
        ],
        ("head", M),
    ),
    "sequence": (
        lambda backend: [(fmt.queue_key(1), fmt.encode_queue(fmt.queue_key(1), QueueRecord(1, "queue", "q")))],
        ("sequence", M),
    ),
    "producer": (flip(fmt.producer_key("ward-3")), ("corrupt", fmt.producer_key("ward-3"))),
    "peer": (flip(fmt.peer_key("north")), ("corrupt", fmt.peer_key("north"))),
    "no route": (
        lambda backend: [
            (fmt.message_key(4, 6), fmt.encode_message(fmt.message_key(4, 6), message(b"on its way"))),
        ],
        ("route", fmt.message_key(4, 6)),
    ),
    "link's order": (
        lambda backend: [
            (fmt.message_key(4, place(6)), fmt.encode_message(fmt.message_key(4, place(6)), FORWARDED)),
            (fmt.message_key(4, 6), None),
        ],
        ("route", fmt.message_key(4, place(6))),
    ),
    "fence": (delete(fmt.message_key(1, fmt.FENCE_ORDER)), ("fence", fmt.queue_key(1))),
    "meta": (flip(fmt.META_KEY, 8 * 25), ("corrupt", fmt.META_KEY)),
    "no meta": (delete(fmt.META_KEY), ("missing", fmt.META_KEY)),
    "position": (flip(fmt.POSITION_KEY), ("corrupt", fmt.POSITION_KEY)),
    "ids": (flip(fmt.IDS_KEY), ("corrupt", fmt.IDS_KEY)),
    "no ids": (delete(fmt.IDS_KEY), ("missing", fmt.IDS_KEY)),
    "low ids": (lambda backend: [(fmt.IDS_KEY, fmt.encode_pair(fmt.IDS_KEY, 2, 2))], ("ids", fmt.IDS_KEY)),
    "unknown": (lambda backend: [(b"\x77letter", b"x")], ("unknown-key", b"\x77letter")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_finds(name: str, tmp_path: Path) -> None:
    edit, expected = DAMAGE[name]
    build(tmp_path)
    change(tmp_path, edit)
    report = verify(tmp_path)
    assert expected in kinds(report)
    assert not report.ok


@pytest.mark.parametrize("name", DAMAGE)
def test_what_salvage_makes_is_whole(name: str, tmp_path: Path) -> None:
    build(tmp_path / "old" / "store")
    change(tmp_path / "old" / "store", DAMAGE[name][0])
    before = {path.name: path.read_bytes() for path in (tmp_path / "old" / "store").iterdir()}
    report = salvage(tmp_path / "old", tmp_path / "new")
    assert {path.name: path.read_bytes() for path in (tmp_path / "old" / "store").iterdir()} == before
    assert not (tmp_path / "new" / SIDE_COPY).exists()
    assert verify(tmp_path / "new").problems == ()
    store = Store.open(LevelDBBackend(tmp_path / "new" / "store"))
    lost = name in ("message", "lost message", "row without message")
    page = store.read_page(1, 0, 100, BIG)
    assert len(page.entries) == COUNT - lost
    assert [(row.queue_id, row.count) for row in report.queues] == [(r.queue_id, r.count) for r in store.records]
    assert store.records[0].name == "q"
    assert store.records[0].count == COUNT - lost
    assert store.next_queue_id >= 5
    assert store.producers == ([] if name == "producer" else [PRODUCER])
    assert store.peers == ([] if name == "peer" else [PEER])
    assert store.position == ((0, 1) if name == "position" else (0, 7))
    store.close()


def test_salvage_of_a_whole_store_copies_everything(tmp_path: Path) -> None:
    build(tmp_path / "store")
    old = verify(tmp_path)
    report = salvage(tmp_path, tmp_path / "new")
    assert report.ok
    assert [(row.name, row.count, row.size) for row in report.queues] == [
        (row.name, row.count, row.size) for row in old.queues
    ]
    new = verify(tmp_path / "new")
    assert new.store_id != old.store_id
    assert new.keys == old.keys
    store = Store.open(LevelDBBackend(tmp_path / "new" / "store"))
    entries = store.read_page(1, 0, 100, BIG).entries
    assert [entry.message.body for entry in entries] == [b"%d" % number for number in range(COUNT)]
    assert entries[3].deliveries == 2
    assert fields(store.read_page(3, 0, 100, BIG).entries[0]) == (place(0), fields(SHARED), None, 1, 2)
    (forwarded,) = store.read_page(4, 0, 100, BIG).entries
    assert (forwarded.order, forwarded.message.route) == (6, FORWARDED.route)
    assert (store.producers, store.peers) == ([PRODUCER], [PEER])
    store.close()


def test_salvage_gives_messages_without_descriptor_a_queue(tmp_path: Path) -> None:
    build(tmp_path / "store")
    change(tmp_path / "store", lambda backend: [(fmt.queue_key(queue_id), None) for queue_id in (1, 2)])
    report = salvage(tmp_path, tmp_path / "new")
    store = Store.open(LevelDBBackend(tmp_path / "new" / "store"))
    assert [(record.kind, record.name) for record in store.records][:2] == [("queue", "q"), ("queue", "salvaged.2")]
    assert store.records[0].next_sequence == COUNT
    assert store.records[0].dispatched[5] == COUNT, "all may have been delivered"
    store.close()
    assert ("descriptor", fmt.queue_key(1)) in kinds(report)


def test_salvage_overwrites_nothing(tmp_path: Path) -> None:
    build(tmp_path / "store")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "letter.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty"):
        salvage(tmp_path, tmp_path / "new")
    with pytest.raises(StoreError, match="no store"):
        salvage(tmp_path / "missing", tmp_path / "other")
    with pytest.raises(StoreError, match="no store"):
        verify(tmp_path / "missing")


def test_a_store_in_use_is_left_alone(tmp_path: Path) -> None:
    build(tmp_path / "store")
    backend = LevelDBBackend(tmp_path / "store")
    with pytest.raises(StoreLocked):
        salvage(tmp_path, tmp_path / "new")
    with pytest.raises(StoreLocked):
        verify(tmp_path)
    code = "import sys; from pybroker.store import LevelDBBackend; LevelDBBackend(sys.argv[1])"
    other = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "store")], capture_output=True, text=True, check=False
    )
    assert "StoreLocked" in other.stderr, "asking must not have dropped the lock"
    backend.close()


# ---- damage in LevelDB's own files

MANY = 6_000


@pytest.fixture
def tables(tmp_path: Path) -> list[Path]:
    """A store of some tables, all of it in tables."""
    directory = tmp_path / "old" / "store"
    build(directory, MANY, b"x" * 500)
    backend = LevelDBBackend(directory)
    backend._db.compact_range(start=b"\0", stop=b"\xff\xff")
    backend.close()
    found = sorted(directory.glob("*.ldb"))
    assert len(found) >= 3
    return found


def bodies(directory: Path) -> list[int]:
    """The numbers of the messages that a new store has, in order; each body is checked."""
    store = Store.open(LevelDBBackend(directory / "store"))
    found = []
    order: int | None = 0
    while order is not None:
        page = store.read_page(1, order, 500, BIG)
        assert page.corrupt == []
        for entry in page.entries:
            digits = entry.message.body.rstrip(b"x")
            assert entry.message.body == digits + b"x" * 500
            found.append(int(digits))
        order = page.next_order
    store.close()
    return found


def largest(tables: list[Path]) -> Path:
    return max(tables, key=lambda path: path.stat().st_size)


def test_salvage_of_a_truncated_table(tables: list[Path], tmp_path: Path) -> None:
    victim = largest(tables)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    report = salvage(tmp_path / "old", tmp_path / "new")
    assert not report.ok
    assert any(problem.kind == "unreadable" for problem in report.problems)
    found = bodies(tmp_path / "new")
    assert found == sorted(set(found))
    assert MANY // 3 < len(found) < MANY
    assert verify(tmp_path / "new").ok


def test_salvage_of_a_damaged_manifest(tables: list[Path], tmp_path: Path) -> None:
    manifest = next((tmp_path / "old" / "store").glob("MANIFEST-*"))
    manifest.write_bytes(b"\0" * 30 + manifest.read_bytes()[30:])
    with pytest.raises(StoreDamaged):
        verify(tmp_path / "old")
    report = salvage(tmp_path / "old", tmp_path / "new")
    assert bodies(tmp_path / "new") == list(range(MANY))
    assert any(NOTE_REPAIR in note for note in report.notes)
    assert manifest.exists()


def test_salvage_without_current_and_with_a_missing_table(tables: list[Path], tmp_path: Path) -> None:
    (tmp_path / "old" / "store" / "CURRENT").unlink()
    largest(tables).unlink()
    salvage(tmp_path / "old", tmp_path / "new")
    found = bodies(tmp_path / "new")
    assert found == sorted(set(found))
    assert MANY // 3 < len(found) < MANY
    assert verify(tmp_path / "new").ok


def test_one_bad_bit_costs_one_message(tables: list[Path], tmp_path: Path) -> None:
    """No compression: a bit in a value leaves its block readable, so that only its own checksum fails."""
    data = bytearray(largest(tables).read_bytes())
    data[data.index(b"x" * 400, len(data) // 2) + 200] ^= 0x10
    largest(tables).write_bytes(data)
    backend = LevelDBBackend(tmp_path / "old" / "store")
    page = Store.open(backend).read_page(1, 0, MANY, BIG)
    assert (len(page.entries), len(page.corrupt), page.next_order) == (MANY - 1, 1, None)
    assert backend.unverified_reads > 0
    lost = page.corrupt[0].key
    assert backend.get(lost) is not None
    backend.close()
    assert kinds(verify(tmp_path / "old")) == {("corrupt", lost)}
    salvage(tmp_path / "old", tmp_path / "new")
    assert len(bodies(tmp_path / "new")) == MANY - 1


def test_a_block_that_cannot_be_read_costs_a_block(tables: list[Path], tmp_path: Path) -> None:
    data = bytearray(largest(tables).read_bytes())
    at = data.index(b"x" * 400, len(data) // 2)
    data[at : at + 12_000] = b"\xff" * 12_000
    largest(tables).write_bytes(data)
    backend = LevelDBBackend(tmp_path / "old" / "store")
    store = Store.open(backend)
    page = store.read_page(1, 0, MANY, BIG)
    assert MANY - 60 < len(page.entries) < MANY
    assert all(isinstance(error, CorruptRecord) for error in page.corrupt)
    assert page.corrupt
    orders = [entry.order for entry in page.entries]
    assert orders == sorted(orders)
    read, order = [], 0
    while order is not None:
        part = store.read_page(1, order, 7, BIG)
        read += [entry.order for entry in part.entries]
        order = part.next_order
    assert read == orders, "pages go on behind the damage"
    backend.close()


def test_a_bad_last_block_is_not_taken_for_the_end(tables: list[Path], tmp_path: Path) -> None:
    """plyvel ends an iteration that meets a bad block at the end as if there were nothing more."""
    backend = LevelDBBackend(tmp_path / "old" / "store")
    last = fmt.expiry_key(700, 3, place(0))
    assert [key for key, _ in backend.iterate(last, b"\xff")] == [last]
    backend.close()
    for path in tables:
        data = bytearray(path.read_bytes())
        at = data.find(leveldb.END_VALUE)
        if at >= 0:
            data[max(0, at - 3_000) : at + 200] = b"\xff" * (at + 200 - max(0, at - 3_000))
            path.write_bytes(data)
    with pytest.raises(StoreDamaged):
        LevelDBBackend(tmp_path / "old" / "store")
    salvage(tmp_path / "old", tmp_path / "new")
    assert verify(tmp_path / "new").ok
