"""Schedules in the store: their bytes, reading them in order of time, and what `verify` and `salvage` make of damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.errors import CorruptRecord, StoreDamaged
from pybroker.message import Message
from pybroker.operations import (
    DELETE_SCHEDULE,
    PUT_SCHEDULE,
    PUT_SCHEDULING,
    Schedule,
    SchedulingRecord,
)
from pybroker.store import Store
from pybroker.store import format as fmt
from pybroker.store import schedules as sch
from pybroker.store.backend import Change
from pybroker.store.check import verify
from pybroker.store.leveldb import LevelDBBackend
from pybroker.store.memory import MemoryBackend
from pybroker.store.salvage import salvage
from tests.store.samples import Writer, fields, message, messages, text, u64

BIG = 1 << 30
ONE = Schedule(3, 70, message(b"recall", priority=7), 2, 50, "0 8 * * *", 9)
RECORD = SchedulingRecord(9, 2, 30, 70)

schedules = st.builds(
    Schedule,
    number=u64,
    due=u64,
    message=messages,
    left=st.integers(-1, 2**31),
    period=u64,
    cron=text,
    delay=u64,
)


@given(schedules)
def test_schedules_come_back(schedule: Schedule) -> None:
    key = sch.schedule_key(schedule.number)
    found = sch.decode_schedule(key, sch.encode_schedule(key, schedule))
    assert fields(found.message) == fields(schedule.message)
    for name in ("number", "due", "left", "period", "cron", "delay"):
        assert getattr(found, name) == getattr(schedule, name)


@given(u64, u64, u64, u64)
def test_the_record_of_all_comes_back_and_the_index_is_in_order_of_time(a: int, b: int, c: int, d: int) -> None:
    record = SchedulingRecord(a, b, c, d)
    assert sch.decode_scheduling(sch.encode_scheduling(record)) == record
    assert (sch.due_key(a, b) < sch.due_key(c, d)) == ((a, b) < (c, d))
    assert fmt.parse_key(sch.due_key(a, b)) == (fmt.SCHEDULE_DUE, a, b)
    assert fmt.parse_key(sch.schedule_key(a)) == (fmt.SCHEDULE, a)


@pytest.mark.parametrize("kind", ["schedule", "record"])
def test_each_flipped_bit_and_each_other_length_is_detected(kind: str) -> None:
    key = sch.schedule_key(3)
    value = sch.encode_schedule(key, ONE) if kind == "schedule" else sch.encode_scheduling(RECORD)

    def decode(changed: bytes) -> object:
        return sch.decode_schedule(key, changed) if kind == "schedule" else sch.decode_scheduling(changed)

    decode(value)
    for bit in range(len(value) * 8):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecord):
            decode(bytes(damaged))
    for size in range(len(value)):
        with pytest.raises(CorruptRecord):
            decode(value[:size])
    with pytest.raises(CorruptRecord):
        decode(value + b"\0")


def test_the_bytes_of_the_format() -> None:
    key = sch.schedule_key(3)
    sent = Message("/queue/a", b"hello", b"k:v\n", True, 4, 0, b"m1", 1_700_000_000_000)
    value = sch.encode_schedule(key, Schedule(3, 256, sent, -1, 2, "* * * * *", 1))
    head = "01 0000000000000100 ffffffffffffffff 0000000000000002 0000000000000001 04 0009"
    assert value.startswith(bytes.fromhex(head) + b"* * * * *" + fmt.encode_message(key, sent))
    assert key.hex() == "510000000000000003"
    assert sch.due_key(256, 3).hex() == "5200000000000001000000000000000003"


def test_reading_in_order_of_time_page_by_page() -> None:
    store = Store.open(MemoryBackend())
    write = Writer(store)
    made = [Schedule(number, 1_000 - number * 7 % 13, message(b"%d" % number)) for number in range(1, 20)]
    write(*((PUT_SCHEDULE, each, 0) for each in made), (PUT_SCHEDULING, RECORD))
    moved = Schedule(5, 2_000, made[4].message)
    write((PUT_SCHEDULE, moved, made[4].due), (DELETE_SCHEDULE, 6, made[5].due))
    wanted = sorted(each.key for each in (*made[:4], *made[6:], moved))
    found: list[tuple[int, int]] = []
    start: tuple[int, int] | None = (0, 0)
    while start is not None:
        page = store.read_schedules(start, 4, BIG)
        assert not page.corrupt
        assert len(page.schedules) <= 4
        found += [each.key for each in page.schedules]
        start = page.next_key
    assert found == wanted
    assert len(store.read_schedules((0, 0), 100, 1).schedules) == 1, "at least one"
    assert store.find_schedule(6) is None
    again = Store.open(store.backend)
    assert again.scheduling == RECORD


# ---- damage


def build(directory: Path) -> list[Schedule]:
    write = Writer(Store.open(LevelDBBackend(directory)))
    made = [Schedule(number, 100 * number, message(b"%d" % number)) for number in range(1, 6)]
    record = SchedulingRecord(6, 5, sum(each.message.size for each in made), 100)
    write(*((PUT_SCHEDULE, each, 0) for each in made), (PUT_SCHEDULING, record))
    write.store.close()
    return made


def flipped(key: bytes) -> Callable[[LevelDBBackend], list[Change]]:
    def edit(backend: LevelDBBackend) -> list[Change]:
        value = bytearray(backend.get(key) or b"")
        value[9] ^= 4
        return [(key, bytes(value))]

    return edit


def put(key: bytes, value: bytes | None) -> Callable[[LevelDBBackend], list[Change]]:
    return lambda backend: [(key, value)]


THIRD, ROW = sch.schedule_key(3), sch.due_key(300, 3)
OTHER_ROW = sch.due_key(301, 3)
DAMAGE: dict[str, tuple[Callable[[LevelDBBackend], list[Change]], tuple[str, bytes], int]] = {
    "schedule": (flipped(THIRD), ("corrupt", THIRD), 4),
    "row": (flipped(ROW), ("corrupt", ROW), 5),
    "no schedule": (put(THIRD, None), ("schedule", ROW), 4),
    "no row": (put(ROW, None), ("schedule", ROW), 5),
    "another row": (put(OTHER_ROW, fmt.encode_number(OTHER_ROW, 1)), ("schedule", OTHER_ROW), 5),
    "size": (put(ROW, fmt.encode_number(ROW, 1)), ("schedule", ROW), 5),
    "record": (flipped(fmt.SCHEDULING_KEY), ("corrupt", fmt.SCHEDULING_KEY), 5),
    "no record": (put(fmt.SCHEDULING_KEY, None), ("missing", fmt.SCHEDULING_KEY), 5),
    "count": (
        put(fmt.SCHEDULING_KEY, sch.encode_scheduling(SchedulingRecord(6, 4, 1, 100))),
        ("count", fmt.SCHEDULING_KEY),
        5,
    ),
    "head": (
        put(fmt.SCHEDULING_KEY, sch.encode_scheduling(SchedulingRecord(3, 5, 1, 200))),
        ("schedule", sch.schedule_key(1)),
        5,
    ),
}


def test_a_whole_store_has_no_problems(tmp_path: Path) -> None:
    build(tmp_path / "store")
    report = verify(tmp_path)
    assert report.problems == ()
    assert report.schedules == 5


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_finds_it_and_salvage_mends_it(name: str, tmp_path: Path) -> None:
    made = build(tmp_path / "store")
    edit, expected, left = DAMAGE[name]
    backend = LevelDBBackend(tmp_path / "store")
    backend.write(backend.new_batch(edit(backend)), True)
    backend.close()
    assert expected in {(problem.kind, problem.key) for problem in verify(tmp_path).problems}
    if name == "record":
        with pytest.raises(StoreDamaged):
            Store.open(LevelDBBackend(tmp_path / "store"))
    assert salvage(tmp_path, tmp_path / "new").schedules == left
    assert verify(tmp_path / "new").problems == ()
    store = Store.open(LevelDBBackend(tmp_path / "new" / "store"))
    page = store.read_schedules((store.scheduling.head, 0), 100, BIG)
    wanted = [each for each in made if left == 5 or each.number != 3]
    assert [(each.key, each.message.body) for each in page.schedules] == [(w.key, w.message.body) for w in wanted]
    assert (store.scheduling.count, store.scheduling.next_number) == (left, 6)
    store.close()


def test_a_bad_one_is_passed_over_and_named(tmp_path: Path) -> None:
    store = Store.open(MemoryBackend())
    write = Writer(store)
    write(*((PUT_SCHEDULE, Schedule(number, number, message(b"x")), 0) for number in (1, 2, 3)))
    store.backend.write(store.backend.new_batch([(sch.schedule_key(2), b"bad")]), True)
    page = store.read_schedules((0, 0), 10, BIG)
    assert [each.number for each in page.schedules] == [1, 3]
    assert page.unread == [(2, 2)]
    assert len(page.corrupt) == 1


def test_a_key_that_no_store_has_is_passed_over_and_named() -> None:
    store = Store.open(MemoryBackend())
    write = Writer(store)
    write(*((PUT_SCHEDULE, Schedule(number, number << 40, message(b"x")), 0) for number in (1, 2)))
    strange = sch.due_key(1 << 40, 5)[:7]
    store.backend.write(store.backend.new_batch([(strange, b"junk")]), True)
    page = store.read_schedules((0, 0), 10, BIG)
    assert [each.number for each in page.schedules] == [1, 2]
    assert page.unread == []
    assert page.places == [(1 << 40, 0)]
    assert [record.key for record in page.corrupt] == [strange]
