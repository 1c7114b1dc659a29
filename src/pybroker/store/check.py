"""Verifying a store: every key and every value, each by itself and against the others. Changes nothing of the store.

LevelDB itself writes when it opens a database (it moves its log into a table), and the directory must not be in use.
One pass in key order; memory grows with the number of queues and shared bodies, not of messages.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pybroker.errors import CorruptRecord, StoreDamaged
from pybroker.message import Message
from pybroker.operations import SEQUENCE_MASK, QueueRecord, SchedulingRecord
from pybroker.store import format as fmt
from pybroker.store.backend import Reader
from pybroker.store.leveldb import LevelDBBackend
from pybroker.store.ranges import iterate_whole
from pybroker.store.report import PROGRESS_KEYS, Problems, Progress, QueueSummary, Report, find_store
from pybroker.store.schedules import decode_schedule, decode_scheduling, due_key, schedule_key
from pybroker.store.store import fences


def verify(path: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Check the store in a broker's data directory, or in a LevelDB directory. Blocking, for as long as it takes.

    Raises `StoreLocked`, `StoreDamaged` when LevelDB itself can't open it, `StoreFormatError`, `StoreError`.
    """
    directory = find_store(path)
    backend = LevelDBBackend(directory, create=False)
    try:
        with backend.snapshot() as reader:
            return _Verification(reader).run(directory, progress)
    finally:
        backend.close()


@dataclass(slots=True)
class _Found:
    """What was met in one queue's range."""

    record: QueueRecord | None = None
    count: int = 0
    size: int = 0
    corrupt: int = 0
    fences: int = 0


@dataclass(slots=True)
class _References:
    count: int = 0
    size: int = 0
    expires: int = 0
    left: int | None = None  # what the count record says
    body: bool = False


class _Verification:
    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.problems = Problems()
        self.queues: dict[int, _Found] = {}
        self.bodies: dict[int, _References] = {}
        self.store_id = ""
        self.starts = 0
        self.position = (0, 0)
        self.history: list[tuple[int, int]] = []
        self.ids: tuple[int, int] | None = None
        self.scheduling: SchedulingRecord | None = None
        self.schedules = _Found()
        self.keys = 0
        self.bytes = 0

    def run(self, path: Path, progress: Progress | None) -> Report:
        for key, value in iterate_whole(self.reader, b"\0", bytes((fmt.END,)), self._unreadable):
            self.keys += 1
            self.bytes += len(key) + len(value)
            if progress is not None and self.keys % PROGRESS_KEYS == 0:
                progress(self.keys)
            self._entry(key, value)
        self._conclude()
        if progress is not None:
            progress(self.keys)
        return Report(
            path=path,
            store_id=self.store_id,
            starts=self.starts,
            position=self.position,
            queues=tuple(
                summary(queue_id, found.record, found.count, found.size) for queue_id, found in self._sorted()
            ),
            keys=self.keys,
            bytes=self.bytes,
            bodies=sum(references.body for references in self.bodies.values()),
            schedules=self.schedules.count,
            problems=tuple(self.problems.listed),
            problem_count=self.problems.count,
        )

    def _sorted(self) -> list[tuple[int, _Found]]:
        return sorted(self.queues.items())

    def _unreadable(self, start: bytes, behind: bytes, error: StoreDamaged) -> None:
        self.problems.add(start, "unreadable", f"from here to {behind.hex()}: {error}")

    # ---- one entry

    def _entry(self, key: bytes, value: bytes) -> None:
        try:
            tag, *numbers = fmt.parse_key(key)
        except CorruptRecord as error:
            self.problems.add(key, "unknown-key", error.reason)
            return
        try:
            if tag == fmt.MESSAGE:
                self._message(key, value, *numbers)
            elif tag == fmt.DELIVERIES:
                self._deliveries(key, value, *numbers)
            elif tag == fmt.EXPIRY:
                self._expiry(key, value, *numbers)
            elif tag == fmt.QUEUE:
                self.queues[numbers[0]] = _Found(fmt.decode_queue(key, value))
            elif tag == fmt.BODY:
                self._body(key, value, numbers[0])
            elif tag == fmt.REFERENCES:
                self.bodies.setdefault(numbers[0], _References()).left = fmt.decode_number(key, value)
            elif tag == fmt.HISTORY:
                self.history.append((numbers[0], fmt.decode_number(key, value)))
            elif tag == fmt.PRODUCER:
                fmt.decode_producer(key, value)
            elif tag == fmt.PEER:
                fmt.decode_peer(key, value)
            elif tag == fmt.SCHEDULE:
                self._schedule(key, value, numbers[0])
            elif tag == fmt.SCHEDULE_DUE:
                self._schedule_due(key, value, *numbers)
            elif tag == fmt.SCHEDULING:
                self.scheduling = decode_scheduling(value)
            elif tag == fmt.META:
                self._meta(value)
            elif tag == fmt.POSITION:
                self.position = fmt.decode_pair(key, value)
            else:
                self.ids = fmt.decode_pair(key, value)
        except CorruptRecord as error:
            self.problems.add(error.key, "corrupt", error.reason)
        except StoreDamaged as error:  # at a key that was looked up beside this one
            self.problems.add(key, "unreadable", str(error))

    def _meta(self, value: bytes) -> None:
        found = fmt.decode_format(value)
        if found != fmt.FORMAT:
            raise CorruptRecord(fmt.META_KEY, f"format {found}, not {fmt.FORMAT}")
        store_id, self.starts = fmt.decode_meta(value)
        self.store_id = store_id.hex()

    def _message(self, key: bytes, value: bytes, queue_id: int, order: int) -> None:
        found = self.queues.setdefault(queue_id, _Found())
        if order == fmt.FENCE_ORDER:
            fmt.decode_fence(key, value)
            found.fences += 1
            return
        found.count += 1
        record = found.record
        try:
            if fmt.flags_of(value) & fmt.REFERENCE:
                body_id, expires, size = fmt.decode_reference(key, value)
                self._reference(key, body_id, expires, size)
            else:
                message = fmt.decode_message(key, value, order)
                expires, size = message.expires, message.size
                if record is not None and not belongs(record, order, message):
                    text = "a message on its way to another broker has no route, or is not in order of forwarding"
                    self.problems.add(key, "route", text)
        except CorruptRecord:
            found.corrupt += 1
            raise
        found.size += size
        if record is not None and order < record.head:
            self.problems.add(key, "head", f"the message lies before its queue's head {record.head}")
        if record is not None and order & SEQUENCE_MASK >= record.next_sequence:
            self.problems.add(key, "sequence", f"not below its queue's next sequence {record.next_sequence}")
        if expires:
            row_key = fmt.expiry_key(expires, queue_id, order)
            row = self.reader.get(row_key)
            if row is None:
                self.problems.add(row_key, "expiry", "the message's row in the expiry index is missing")

    def _reference(self, key: bytes, body_id: int, expires: int, size: int) -> None:
        references = self.bodies.setdefault(body_id, _References(size=size, expires=expires))
        references.count += 1
        if (references.size, references.expires) != (size, expires):
            self.problems.add(key, "reference", "size or expiry differ from another reference to the same body")

    def _deliveries(self, key: bytes, value: bytes, queue_id: int, order: int) -> None:
        if order == fmt.FENCE_ORDER:
            fmt.decode_fence(key, value)
            self.queues.setdefault(queue_id, _Found()).fences += 1
            return
        fmt.decode_number(key, value)
        if self.reader.get(fmt.message_key(queue_id, order)) is None:
            self.problems.add(key, "deliveries", "a delivery record without its message")

    def _body(self, key: bytes, value: bytes, body_id: int) -> None:
        references = self.bodies.setdefault(body_id, _References())
        references.body = True
        message = fmt.decode_message(key, value, 0)
        if references.count and (references.size, references.expires) != (message.size, message.expires):
            self.problems.add(key, "reference", "size or expiry differ from those in its references")

    def _expiry(self, key: bytes, value: bytes, expires: int, queue_id: int, order: int) -> None:
        size = fmt.decode_number(key, value)
        message_key = fmt.message_key(queue_id, order)
        stored = self.reader.get(message_key)
        if stored is None:
            self.problems.add(key, "expiry", "a row of the expiry index without its message")
            return
        try:
            if fmt.flags_of(stored) & fmt.REFERENCE:
                _, stored_expires, stored_size = fmt.decode_reference(message_key, stored)
            else:
                message = fmt.decode_message(message_key, stored, order)
                stored_expires, stored_size = message.expires, message.size
        except CorruptRecord:
            return  # said already, at the message
        if (stored_expires, stored_size) != (expires, size):
            self.problems.add(key, "expiry", "expiry or size differ from the message's")

    def _schedule(self, key: bytes, value: bytes, number: int) -> None:
        """The record of all schedules comes before them."""
        self.schedules.count += 1
        try:
            schedule = decode_schedule(key, value)
        except CorruptRecord:
            self.schedules.corrupt += 1
            raise
        self.schedules.size += schedule.message.size
        row = due_key(schedule.due, number)
        if self.reader.get(row) is None:
            self.problems.add(row, "schedule", "the schedule's row in the index by time is missing")
        record = self.scheduling
        if record is not None and (number >= record.next_number or schedule.due < record.head):
            text = f"its number is not below {record.next_number}, or it is due before {record.head}"
            self.problems.add(key, "schedule", text)

    def _schedule_due(self, key: bytes, value: bytes, due: int, number: int) -> None:
        size = fmt.decode_number(key, value)
        stored = self.reader.get(schedule_key(number))
        if stored is None:
            self.problems.add(key, "schedule", "a row of the index of schedules without its schedule")
            return
        try:
            schedule = decode_schedule(schedule_key(number), stored)
        except CorruptRecord:
            return  # said already, at the schedule
        if (schedule.due, schedule.message.size) != (due, size):
            self.problems.add(key, "schedule", "time or size differ from the schedule's")

    # ---- what only the whole shows

    def _conclude(self) -> None:
        add = self.problems.add
        if not self.store_id and not any(problem.key == fmt.META_KEY for problem in self.problems.listed):
            add(fmt.META_KEY, "missing", "the store's META record")
        if self.ids is None:
            if not any(problem.key == fmt.IDS_KEY for problem in self.problems.listed):
                add(fmt.IDS_KEY, "missing", "the store's IDS record")
            self.ids = (fmt.ID_MAX, fmt.ID_MAX)
        self._conclude_history()
        self._conclude_schedules()
        for queue_id, found in self._sorted():
            self._conclude_queue(queue_id, found)
        for body_id, references in sorted(self.bodies.items()):
            self._conclude_body(body_id, references)
        highest = max(self.queues, default=0), max(self.bodies, default=0)
        if highest[0] >= self.ids[0] or highest[1] >= self.ids[1]:
            add(fmt.IDS_KEY, "ids", f"ids up to {highest} are in use, not below the bounds {self.ids}")

    def _conclude_history(self) -> None:
        """Records come in order of epochs. A missing one may be among those that were said to be corrupt."""
        last = -1
        for epoch, lsn in self.history:
            if lsn <= last or lsn > self.position[1]:
                text = f"its first lsn {lsn} is not above {last}, or beyond the position {self.position}"
                self.problems.add(fmt.history_key(epoch), "history", text)
            last = lsn
        if self.history and self.history[-1][0] != self.position[0]:
            text = f"the position {self.position} is not in the last epoch {self.history[-1][0]} of the history"
            self.problems.add(fmt.POSITION_KEY, "history", text)

    def _conclude_schedules(self) -> None:
        found = self.schedules
        record = self.scheduling
        if record is None:
            if found.count and not any(problem.key == fmt.SCHEDULING_KEY for problem in self.problems.listed):
                self.problems.add(fmt.SCHEDULING_KEY, "missing", f"record of {found.count} schedules")
            return
        if record.count != found.count or (record.size != found.size and not found.corrupt):
            text = f"{record.count} schedules of {record.size} bytes are counted, found {found.count} of {found.size}"
            self.problems.add(fmt.SCHEDULING_KEY, "count", text)

    def _conclude_queue(self, queue_id: int, found: _Found) -> None:
        key = fmt.queue_key(queue_id)
        record = found.record
        if record is None:
            self.problems.add(key, "missing", f"descriptor of a queue with {found.count} messages")
            return
        if record.count != found.count:
            self.problems.add(key, "count", f"the descriptor counts {record.count} messages, found {found.count}")
        if record.size != found.size and not found.corrupt:
            self.problems.add(key, "size", f"the descriptor counts {record.size} bytes, found {found.size}")
        if found.fences != len(fences(queue_id)):
            self.problems.add(key, "fence", "a fence of the queue is missing or bad")

    def _conclude_body(self, body_id: int, references: _References) -> None:
        key = fmt.body_key(body_id)
        if not references.body:
            self.problems.add(key, "missing", f"shared body of {references.count} references")
        elif references.left != references.count:
            self.problems.add(
                fmt.references_key(body_id),
                "references",
                f"{references.left} references are counted, found {references.count}",
            )


def belongs(record: QueueRecord, order: int, message: Message) -> bool:
    """Whether a queue of that kind can hold the message in that place: that of a link holds what is being forwarded."""
    return record.kind != "link" or (message.route is not None and order <= SEQUENCE_MASK)


def summary(queue_id: int, record: QueueRecord | None, count: int, size: int) -> QueueSummary:
    """A row of the table of queues; a queue without descriptor has no kind."""
    if record is None:
        return QueueSummary(queue_id, "", "", "", "", 0, 0, count, size)
    return QueueSummary(
        queue_id,
        record.kind,
        record.name,
        record.client_id,
        record.subscription,
        record.count,
        record.size,
        count,
        size,
    )
