"""Salvage: copy what is whole of a damaged store into a new one. Never writes into the damaged directory.

Works on a side copy (tables are immutable, so they are hard-linked where that is possible). If LevelDB refuses to
open even that, its own repair runs on it; the report says so, because a repair can bring back deleted messages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from pybroker.destination import QUEUE, parse_destination
from pybroker.errors import CorruptRecord, InvalidDestination, StoreDamaged, StoreError, StoreFormatError, StoreLocked
from pybroker.operations import LEVELS, SEQUENCE_MASK, QueueRecord, SchedulingRecord
from pybroker.store import format as fmt
from pybroker.store.backend import Change, Reader
from pybroker.store.check import belongs, summary
from pybroker.store.directory import DIRECTORY_MODE, is_ours
from pybroker.store.layout import STORE_DIRECTORY
from pybroker.store.leveldb import LevelDBBackend, repair
from pybroker.store.ranges import iterate_whole
from pybroker.store.report import PROGRESS_KEYS, Problems, Progress, Report, find_store
from pybroker.store.schedules import decode_schedule, decode_scheduling, due_key, encode_scheduling
from pybroker.store.store import Store, fences

BATCH_CHANGES_MAX = 1_000
BATCH_BYTES_MAX = 4 * 1024 * 1024
SIDE_COPY = "salvage-copy"

NOTE_IDENTITY = "the new store has an identity of its own: in a replica set it is a learner, not the copy that it was"
NOTE_REPAIR = (
    "LevelDB refused the directory, so its own repair ran on a side copy: messages that were deleted before may be "
    "back, messages of damaged tables may be missing without being listed, and what a producer or another broker repeats "
    "may be stored twice"
)
NOTE_POSITION = "the position of the last batch could not be read"

# POSIX locks belong to a process, and closing any descriptor of the file drops them: so another process has to ask.
_LOCK_PROBE = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(9)
"""


def salvage(path: str | os.PathLike[str], new_path: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Copy what is whole into a new data directory, which must not exist or be empty. Blocking.

    Counts, heads, references and the expiry index are made anew of the messages found; a queue whose descriptor is
    lost gets one. The report lists by key what was not copied. Raises `StoreLocked` when the store is in use,
    `StoreDamaged` when nothing can be read, `StoreError` for the directories.
    """
    source = find_store(path)
    target = Path(new_path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target} is not empty: salvage makes a new data directory and overwrites nothing")
    _refuse_locked(source)
    if not any(entry.suffix in (".ldb", ".sst", ".log") for entry in source.iterdir()):
        raise StoreFormatError(f"there is no store in {source}: no file there holds messages")
    side = target / SIDE_COPY
    notes = [NOTE_IDENTITY]
    try:
        _copy(source, side)
        backend = _open_copy(side, notes)
        try:
            store = Store.open(LevelDBBackend(target / STORE_DIRECTORY))
            try:
                with backend.snapshot() as reader:
                    return _Salvage(reader, store, notes).run(source, target, progress)
            finally:
                store.close()
        finally:
            backend.close()
    finally:
        shutil.rmtree(side, ignore_errors=True)


def _refuse_locked(source: Path) -> None:
    lock = source / "LOCK"
    if lock.exists() and subprocess.run([sys.executable, "-c", _LOCK_PROBE, str(lock)], check=False).returncode == 9:
        raise StoreLocked(f"the store in {source} is in use: stop the broker first")


def _copy(source: Path, side: Path) -> None:
    try:
        side.mkdir(mode=DIRECTORY_MODE, parents=True)
        for entry in sorted(source.iterdir()):
            if not entry.is_file() or not is_ours(entry.name) or entry.name == "LOCK":
                continue
            try:
                if entry.suffix not in (".ldb", ".sst"):
                    raise OSError("only tables never change")
                os.link(entry, side / entry.name)
            except OSError:
                shutil.copy2(entry, side / entry.name)
    except OSError as error:
        raise StoreError(f"the side copy {side} can't be made: {error}") from error


def _open_copy(side: Path, notes: list[str]) -> LevelDBBackend:
    try:
        return LevelDBBackend(side, create=False)
    except StoreFormatError:
        raise
    except StoreError as error:
        notes.append(f"{NOTE_REPAIR} ({error})")
        repair(side)
        return LevelDBBackend(side, create=False, adopt=True)


@dataclass(slots=True)
class _Queue:
    record: QueueRecord | None = None
    count: int = 0
    size: int = 0
    first: int | None = None
    next_sequence: int = 0
    destinations: set[str] = field(default_factory=set)  # two at most are kept: one means that it can name the queue


class _Salvage:
    def __init__(self, reader: Reader, store: Store, notes: list[str]) -> None:
        self.reader = reader
        self.store = store
        self.notes = notes
        self.problems = Problems()
        self.queues: dict[int, _Queue] = {}
        self.references: dict[int, int] = {}  # how many references to each whole body were copied
        self.lost_bodies: dict[int, str] = {}
        self.store_id = ""
        self.starts = 0
        self.position: tuple[int, int] | None = None
        self.epoch = 0  # the last one that the history has
        self.ids = (1, 1)
        self.scheduling = SchedulingRecord()  # of what was copied, with a head that is made in the end
        self.first_due: int | None = None
        self.keys = 0
        self.bytes = 0
        self._changes: list[Change] = []
        self._changes_bytes = 0
        self._messages_written = False

    def run(self, source: Path, target: Path, progress: Progress | None) -> Report:
        for key, value in iterate_whole(self.reader, b"\0", bytes((fmt.END,)), self._unreadable):
            self.keys += 1
            self.bytes += len(key) + len(value)
            if progress is not None and self.keys % PROGRESS_KEYS == 0:
                progress(self.keys)
            try:
                self._entry(key, value)
            except CorruptRecord as error:
                self.problems.add(key, "corrupt", error.reason)
        self._flush()
        records = self._finish()
        if progress is not None:
            progress(self.keys)
        return Report(
            path=source,
            store_id=self.store_id,
            starts=self.starts,
            position=self.position or (0, 0),
            queues=tuple(summary(record.queue_id, record, record.count, record.size) for record in records),
            keys=self.keys,
            bytes=self.bytes,
            bodies=len(self.references),
            problems=tuple(self.problems.listed),
            problem_count=self.problems.count,
            schedules=self.scheduling.count,
            notes=tuple(self.notes),
            new_path=target,
        )

    def _unreadable(self, start: bytes, behind: bytes, error: StoreDamaged) -> None:
        self.problems.add(start, "unreadable", f"from here to {behind.hex()}: {error}")

    def _entry(self, key: bytes, value: bytes) -> None:
        tag, *numbers = fmt.parse_key(key)
        if tag == fmt.MESSAGE:
            if numbers[1] != fmt.FENCE_ORDER:
                self._message(key, value, *numbers)
        elif tag == fmt.DELIVERIES:
            if numbers[1] != fmt.FENCE_ORDER:
                self._deliveries(key, value, *numbers)
        elif tag == fmt.QUEUE:
            self.queues[numbers[0]] = _Queue(fmt.decode_queue(key, value))
        elif tag == fmt.BODY:
            if numbers[0] not in self.references and numbers[0] not in self.lost_bodies:
                self.problems.add(key, "unreferenced", "a shared body that no message refers to")
        elif tag == fmt.META:
            store_id, self.starts = fmt.decode_meta(value)
            self.store_id = store_id.hex()
        elif tag == fmt.POSITION:
            self.position = fmt.decode_pair(key, value)
        elif tag == fmt.HISTORY:
            self.epoch = max(self.epoch, numbers[0])
        elif tag == fmt.PRODUCER:
            fmt.decode_producer(key, value)
            self._put(key, value)
        elif tag == fmt.PEER:
            fmt.decode_peer(key, value)
            self._put(key, value)
        elif tag == fmt.IDS:
            self.ids = fmt.decode_pair(key, value)
        elif tag == fmt.SCHEDULING:
            self._numbers_used(decode_scheduling(value).next_number)
        elif tag == fmt.SCHEDULE:
            self._schedule(key, value, numbers[0])
        # REFERENCES, EXPIRY and SCHEDULE_DUE are made anew.

    def _numbers_used(self, next_number: int) -> None:
        self.scheduling = replace(self.scheduling, next_number=max(self.scheduling.next_number, next_number))

    def _schedule(self, key: bytes, value: bytes, number: int) -> None:
        self._numbers_used(number + 1)
        schedule = decode_schedule(key, value)
        size = schedule.message.size
        self.scheduling = replace(self.scheduling, count=self.scheduling.count + 1, size=self.scheduling.size + size)
        self.first_due = schedule.due if self.first_due is None else min(self.first_due, schedule.due)
        self._put(key, value)
        row = due_key(schedule.due, number)
        self._put(row, fmt.encode_number(row, size))

    def _message(self, key: bytes, value: bytes, queue_id: int, order: int) -> None:
        queue = self.queues.setdefault(queue_id, _Queue())
        if fmt.flags_of(value) & fmt.REFERENCE:
            body_id, expires, size = fmt.decode_reference(key, value)
            self._copy_body(body_id)
            if body_id in self.lost_bodies:
                self.problems.add(key, "lost-body", self.lost_bodies[body_id])
                return
            self.references[body_id] += 1
        else:
            message = fmt.decode_message(key, value, order)
            expires, size = message.expires, message.size
            if len(queue.destinations) < 2:
                queue.destinations.add(message.destination)
            if queue.record is not None and not belongs(queue.record, order, message):
                queue.record = None  # to nobody that could be forwarded: it becomes a queue that can be consumed
        queue.count += 1
        queue.size += size
        queue.first = order if queue.first is None else queue.first
        queue.next_sequence = max(queue.next_sequence, (order & SEQUENCE_MASK) + 1)
        self._put(key, value)
        if expires:
            row = fmt.expiry_key(expires, queue_id, order)
            self._put(row, fmt.encode_number(row, size))

    def _copy_body(self, body_id: int) -> None:
        """Copy a body at the first reference to it, or remember that it is lost."""
        if body_id in self.references or body_id in self.lost_bodies:
            return
        key = fmt.body_key(body_id)
        try:
            value = self.reader.get(key)
            if value is None:
                raise CorruptRecord(key, "the shared body is missing")
            fmt.decode_message(key, value, 0)
        except (CorruptRecord, StoreDamaged) as error:
            self.lost_bodies[body_id] = str(error)
            return
        self.references[body_id] = 0
        self._put(key, value)

    def _deliveries(self, key: bytes, value: bytes, queue_id: int, order: int) -> None:
        if not self._messages_written:  # they come before the first delivery record, in key order
            self._flush()
            self._messages_written = True
        fmt.decode_number(key, value)
        if self.store.backend.get(fmt.message_key(queue_id, order)) is None:
            self.problems.add(key, "deliveries", "a delivery record without its message")
            return
        self._put(key, value)

    # ---- the new store

    def _put(self, key: bytes, value: bytes) -> None:
        self._changes.append((key, value))
        self._changes_bytes += len(key) + len(value)
        if len(self._changes) >= BATCH_CHANGES_MAX or self._changes_bytes >= BATCH_BYTES_MAX:
            self._flush()

    def _flush(self) -> None:
        if self._changes:
            backend = self.store.backend
            backend.write(backend.new_batch(self._changes), False)
            self._changes = []
            self._changes_bytes = 0

    def _finish(self) -> list[QueueRecord]:
        """Write counts, descriptors, ids and the position, synced; what came before is synced with them."""
        for body_id, count in self.references.items():
            key = fmt.references_key(body_id)
            self._put(key, fmt.encode_number(key, count))
        if self.scheduling != SchedulingRecord():
            self._put(fmt.SCHEDULING_KEY, encode_scheduling(replace(self.scheduling, head=self.first_due or 0)))
        records = self._records()
        for record in records:
            key = fmt.queue_key(record.queue_id)
            self._put(key, fmt.encode_queue(key, record))
            for fence in fences(record.queue_id):
                self._put(fence, fmt.encode_fence(fence))
        queue_ids = max(self.ids[0], max(self.queues, default=0) + 1)
        body_ids = max(self.ids[1], max([*self.references, *self.lost_bodies], default=0) + 1)
        self._put(fmt.IDS_KEY, fmt.encode_pair(fmt.IDS_KEY, queue_ids, body_ids))
        self._flush()
        if self.position is None:
            self.notes.append(NOTE_POSITION)
        self._write_position(*(self.position or (0, 0)))
        return records

    def _write_position(self, epoch: int, lsn: int) -> None:
        """One that no other copy went through, because what it stands for is not all here; see FORMAT.md, "History"."""
        epoch = max(epoch, self.epoch)
        if epoch:
            self.store.apply([self.store.history_change(epoch, 0)], (epoch, 0), True)
        else:
            self.store.apply([], (0, max(lsn, 1)), True)

    def _records(self) -> list[QueueRecord]:
        names = {queue.record.name for queue in self.queues.values() if queue.record and queue.record.kind == QUEUE}
        records = []
        for queue_id, queue in sorted(self.queues.items()):
            record = queue.record
            if record is None:
                if not queue.count:
                    continue
                record = self._new_record(queue_id, queue, names)
            next_sequence = max(record.next_sequence, queue.next_sequence)
            head = record.head if queue.first is None else queue.first
            records.append(replace(record, count=queue.count, size=queue.size, head=head, next_sequence=next_sequence))
        return records

    def _new_record(self, queue_id: int, queue: _Queue, names: set[str]) -> QueueRecord:
        """A descriptor for messages that have lost theirs: as their destination has it, if that is plain and free."""
        name = f"salvaged.{queue_id}"
        if len(queue.destinations) == 1:
            try:
                destination = parse_destination(next(iter(queue.destinations)))
            except InvalidDestination:
                pass
            else:
                if destination.kind == QUEUE and destination.name not in names:
                    name = destination.name
        names.add(name)
        self.problems.add(
            fmt.queue_key(queue_id), "descriptor", f"lost: its {queue.count} messages are in /queue/{name} now"
        )
        # Nobody knows what was delivered, so all of it may have been.
        dispatched = (queue.next_sequence,) * LEVELS
        return QueueRecord(queue_id, QUEUE, name, next_sequence=queue.next_sequence, dispatched=dispatched)
