"""Schedules in the store: their keys and values, and reading them in order of time. FORMAT.md says the same in prose.

A schedule is one record under its number, with the message in it, and one row of the index by time; both change in one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from struct import Struct

from pybroker.errors import CorruptRecord, StoreDamaged
from pybroker.operations import Schedule, SchedulingRecord, order_of
from pybroker.store.backend import Change, Reader
from pybroker.store.format import (
    CHECKSUM_BYTES,
    SCHEDULE,
    SCHEDULE_DUE,
    SCHEDULING_KEY,
    VERSION,
    check,
    decode_message,
    decode_number,
    encode_message,
    encode_number,
    parse_key,
    seal,
)
from pybroker.store.ranges import iterate_whole

_HEAD = Struct(">BQqQQBH")  # version, due, left, period, delay, priority, bytes of cron
_SCHEDULING = Struct(">BQQQQ")  # version, next number, count, size, head
_STOP = bytes((SCHEDULE_DUE + 1,))
_key8 = Struct(">BQ").pack
_key16 = Struct(">BQQ").pack
_unkey16 = Struct(">BQQ").unpack
_KEY_BYTES = 17


def schedule_key(number: int) -> bytes:
    return _key8(SCHEDULE, number)


def due_key(due: int, number: int) -> bytes:
    return _key16(SCHEDULE_DUE, due, number)


def encode_schedule(key: bytes, schedule: Schedule) -> bytes:
    """The message in it has an envelope of its own, as under BODY, for the same key."""
    cron = schedule.cron.encode()
    message = schedule.message
    head = _HEAD.pack(
        VERSION, schedule.due, schedule.left, schedule.period, schedule.delay, message.priority, len(cron)
    )
    return seal(key, b"".join((head, cron, encode_message(key, message))))


def decode_schedule(key: bytes, value: bytes) -> Schedule:
    """Raises `CorruptRecord`."""
    check(key, value)
    end = len(value) - CHECKSUM_BYTES
    if end < _HEAD.size:
        raise CorruptRecord(key, "the schedule is too short")
    _, due, left, period, delay, priority, cron_bytes = _HEAD.unpack_from(value)
    message_at = _HEAD.size + cron_bytes
    if message_at > end or priority > 9 or left < -1:
        raise CorruptRecord(key, "the schedule's numbers are out of range")
    try:
        cron = value[_HEAD.size : message_at].decode()
    except UnicodeDecodeError:
        raise CorruptRecord(key, "the cron expression is not UTF-8") from None
    message = decode_message(key, value[message_at:end], order_of(priority, 0))
    return Schedule(parse_key(key)[1], due, message, left, period, cron, delay)


def encode_scheduling(record: SchedulingRecord) -> bytes:
    payload = _SCHEDULING.pack(VERSION, record.next_number, record.count, record.size, record.head)
    return seal(SCHEDULING_KEY, payload)


def decode_scheduling(value: bytes) -> SchedulingRecord:
    """Raises `CorruptRecord`."""
    check(SCHEDULING_KEY, value)
    if len(value) != _SCHEDULING.size + CHECKSUM_BYTES:
        raise CorruptRecord(SCHEDULING_KEY, "the record has another length")
    return SchedulingRecord(*_SCHEDULING.unpack_from(value)[1:])


def put_schedule(add: Callable[[Change], None], schedule: Schedule, due_before: int) -> None:
    """The changes of PUT_SCHEDULE."""
    number = schedule.number
    key = schedule_key(number)
    add((key, encode_schedule(key, schedule)))
    if due_before:
        add((due_key(due_before, number), None))
    row = due_key(schedule.due, number)
    add((row, encode_number(row, schedule.message.size)))


def delete_schedule(add: Callable[[Change], None], number: int, due: int) -> None:
    """The changes of DELETE_SCHEDULE."""
    add((schedule_key(number), None))
    add((due_key(due, number), None))


@dataclass(frozen=True, slots=True)
class SchedulesRead:
    """Schedules in order of time.

    schedules  whole ones
    next_key   where the next page starts, None when this one came to the end
    corrupt    what was passed over; it stays in the store
    unread     the keys of schedules that were passed over
    places     of places in the index that were passed over: from which key on something may be missing
    """

    schedules: list[Schedule]
    next_key: tuple[int, int] | None
    corrupt: list[CorruptRecord] = field(default_factory=list)
    unread: list[tuple[int, int]] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)


def read_schedules(reader: Reader, start: tuple[int, int], count_max: int, bytes_max: int) -> SchedulesRead:
    """Up to `count_max` schedules and `bytes_max` bytes of their messages, but at least one, from `start` on."""
    found = SchedulesRead([], None)

    def passed_over(first: bytes, behind: bytes, error: StoreDamaged) -> None:
        found.corrupt.append(CorruptRecord(first, f"from here to {behind.hex()}: {error}"))
        found.places.append(_at_or_before(first))

    size = 0
    for row, value in iterate_whole(reader, due_key(*start), _STOP, passed_over):
        try:
            _, due, number = parse_key(row)
        except CorruptRecord as error:
            found.corrupt.append(error)
            found.places.append(_at_or_before(row))
            continue
        if len(found.schedules) >= count_max or (size >= bytes_max and found.schedules):
            return replace(found, next_key=(due, number))
        try:
            decode_number(row, value)
            schedule = find_schedule(reader, number)
            if schedule is None or schedule.due != due:
                raise CorruptRecord(row, "a row of the index of schedules is not that of a schedule")
        except CorruptRecord as error:
            found.corrupt.append(error)
            found.unread.append((due, number))
            continue
        size += schedule.message.size
        found.schedules.append(schedule)
    return found


def _at_or_before(row: bytes) -> tuple[int, int]:
    """The first place in order of time that a row which is not before this key of the index can have."""
    _, due, number = _unkey16(row[:_KEY_BYTES].ljust(_KEY_BYTES, b"\0"))
    return due, number


def find_schedule(reader: Reader, number: int) -> Schedule | None:
    """The schedule of that number, None when there is none. Raises `CorruptRecord` for a bad one."""
    key = schedule_key(number)
    try:
        value = reader.get(key)
    except StoreDamaged as error:
        raise CorruptRecord(key, f"it can't be read: {error}") from error
    return None if value is None else decode_schedule(key, value)
