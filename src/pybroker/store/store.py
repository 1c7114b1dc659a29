"""The store: operations in, batches out, pages back. Owns ids, positions and what is read at open; no plyvel, no trio.

Follows DESIGN.md section 4. The store holds the *state*: a key per live message. Opening reads the history of epochs, the
records of producers and peers, the queue descriptors and three more keys, never a message. What may block says so; it
belongs into a worker thread if `backend.blocking`.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pybroker.errors import CorruptRecord, StoreDamaged, StoreFormatError
from pybroker.message import Message
from pybroker.operations import (
    DELETE_BODY,
    DELETE_MESSAGE,
    DELETE_PEER,
    DELETE_PRODUCER,
    DELETE_QUEUE,
    DELETE_SCHEDULE,
    PUT_BODY,
    PUT_DELIVERIES,
    PUT_MESSAGE,
    PUT_PEER,
    PUT_PRODUCER,
    PUT_QUEUE,
    PUT_REFERENCE,
    PUT_SCHEDULE,
    PUT_SCHEDULING,
    PUT_VALUE,
    SET_REFERENCES,
    DueEntry,
    PeerRecord,
    ProducerRecord,
    QueueRecord,
    Schedule,
    SchedulingRecord,
)
from pybroker.store import format as fmt
from pybroker.store.backend import Backend, Change
from pybroker.store.due import NEVER, DueReader
from pybroker.store.pages import Page, Patched, read_page
from pybroker.store.schedules import (
    SchedulesRead,
    decode_scheduling,
    delete_schedule,
    encode_scheduling,
    find_schedule,
    put_schedule,
    read_schedules,
)

NOTHING_MENDED: Mapping[bytes, bytes] = MappingProxyType({})
BODY_IDS_RESERVED = 1 << 16  # body ids that one write of IDS covers


class Store:
    """One store, open.

    store_id        16 hexadecimal digits, made with the store: its identity, and that of no copy
    starts          how often it has been opened, this time included; on disk before `open` returns
    position        ``(epoch, lsn)`` of the last batch in it
    history         ``(epoch, first lsn)`` of each epoch that the store went through, rising; what comes before the first
                    record is epoch 0. Kept up by `write`
    records         the descriptors of its queues, in order of their ids, as they were at `open` or `reload`
    producers, peers  what is known of producers and of other brokers, in order of their keys, as it was then
    scheduling      what it has of schedules as a whole, as it was then
    next_queue_id   ids from here on were never used, in no life of this store. An id's first use raises the bound in
    next_body_id    the very batch that uses it, so that both are on the disk or neither. (Body ids are reserved in
                    blocks: the bound may be above what was used.) Both are kept up while operations are encoded, and
                    when batches that others encoded are prepared
    suspect         why this copy can't be trusted key by key any more ("" = it can): what is wrong with it may have no key.
                    A replica compares such a copy with its leader's
    unreadable      ... and LevelDB can't even read all of it
    """

    def __init__(self, backend: Backend, store_id: str, starts: int) -> None:
        self.backend = backend
        self.store_id = store_id
        self.starts = starts
        self.position = (0, 0)
        self.history: list[tuple[int, int]] = [(0, 0)]
        self.records: list[QueueRecord] = []
        self.producers: list[ProducerRecord] = []
        self.peers: list[PeerRecord] = []
        self.scheduling = SchedulingRecord()
        self.next_queue_id = 1
        self.next_body_id = 1
        self.suspect = ""
        self.unreadable = False
        self._fenced: set[int] = set()  # queues whose fences are in the store, or in a batch under way
        self._due = DueReader()
        self.reload()

    @property
    def first_unused_id(self) -> int:
        """From here on an id was neither a queue's nor a body's."""
        return max(self.next_queue_id, self.next_body_id)

    @classmethod
    def open(cls, backend: Backend) -> Store:
        """Read, or make, the store in a backend. Blocking: a few reads and one synced write.

        Raises `StoreFormatError` for a format that is not known or a database that is not a store, `StoreDamaged` when
        one of the keys that it stands on is bad: without its descriptor a queue would be lost silently, and without its
        record what a producer repeats would be stored twice.
        """
        value = backend.get(fmt.META_KEY)
        if value is None:
            if next(backend.iterate(b"\0", bytes((fmt.END,))), None) is not None:
                raise StoreFormatError("the database has keys, but none that says it is a pybroker store")
            store_id, starts = os.urandom(8), 1
            changes: list[Change] = [(fmt.IDS_KEY, fmt.encode_pair(fmt.IDS_KEY, 1, 1))]
        else:
            found = fmt.decode_format(value)
            if found != fmt.FORMAT and fmt.is_damaged_meta(value):
                raise _damaged(CorruptRecord(fmt.META_KEY, "the checksum is wrong"))
            if found is None:
                raise StoreFormatError("the database is not a pybroker store: its META value is something else")
            if found != fmt.FORMAT:
                raise StoreFormatError(
                    f"the store has format {found}, this version reads format {fmt.FORMAT}: "
                    "use the version of pybroker that wrote it"
                )
            try:
                store_id, starts = fmt.decode_meta(value)
            except CorruptRecord as error:
                raise _damaged(error) from error
            starts += 1
            changes = []
        changes.append((fmt.META_KEY, fmt.encode_meta(store_id, starts)))
        backend.write(backend.new_batch(changes), True)
        return cls(backend, store_id.hex(), starts)

    def reload(self) -> None:
        """Read again what `open` reads: before a core stands on a store that others' batches were applied to. Blocking."""
        try:
            with self.backend.snapshot() as reader:
                value = reader.get(fmt.POSITION_KEY)
                self.position = (0, 0) if value is None else fmt.decode_pair(fmt.POSITION_KEY, value)
                value = reader.get(fmt.IDS_KEY)
                if value is None:
                    raise CorruptRecord(fmt.IDS_KEY, "the key is missing")
                self.next_queue_id, self.next_body_id = fmt.decode_pair(fmt.IDS_KEY, value)
                value = reader.get(fmt.SCHEDULING_KEY)
                scheduling = SchedulingRecord() if value is None else decode_scheduling(value)
                records = []
                producers = []
                peers = []
                history = []
                for key, value in reader.iterate(bytes((fmt.PRODUCER,)), fmt.META_KEY):
                    tag = key[0]
                    if tag == fmt.QUEUE:
                        records.append(fmt.decode_queue(key, value))
                    elif tag == fmt.PRODUCER:
                        producers.append(fmt.decode_producer(key, value))
                    elif tag == fmt.PEER:
                        peers.append(fmt.decode_peer(key, value))
                    else:
                        history.append((fmt.parse_key(key)[1], fmt.decode_number(key, value)))
        except CorruptRecord as error:
            raise _damaged(error) from error
        self.records = records
        self.producers = producers
        self.peers = peers
        self.scheduling = scheduling
        self.history = _with_beginning(history)
        self._fenced = {record.queue_id for record in records}
        self._due.reset()

    def distrust(self, reason: str, unreadable: bool = False) -> None:
        """Note that this copy is not what it should be, in a way that no single key can mend."""
        self.suspect = self.suspect or reason
        self.unreadable = self.unreadable or unreadable

    def look_for_damage(self) -> None:
        """Distrust the copy if a block's checksum was wrong in what was read.

        Whatever became of the values in it, LevelDB will refuse all writes from when it comes to rewrite that table.
        """
        if self.backend.unverified_reads:
            self.distrust("the checksum of a block in one of its files is wrong", unreadable=True)

    # ---- history

    def epoch_at(self, lsn: int) -> int | None:
        """The epoch of the batch that has that number, or None when the store does not reach so far.

        A position ``(epoch, lsn)`` of another store is one that this store went through if ``epoch_at(lsn) == epoch``.
        """
        history = self.history
        if not 0 <= lsn <= self.position[1]:
            return None
        at = bisect_right(history, lsn, key=_first_lsn)
        return history[at - 1][0] if at else None

    @staticmethod
    def history_change(epoch: int, first_lsn: int) -> Change:
        """The record of a new epoch, for the batch at ``(epoch, first_lsn)`` that begins it."""
        key = fmt.history_key(epoch)
        return key, fmt.encode_number(key, first_lsn)

    # ---- writing

    def encode(self, operations: Iterable[tuple[Any, ...]]) -> list[Change]:
        """What the operations change, key by key. Cheap, for the event loop; in the order of the batches."""
        changes: list[Change] = []
        add = changes.append
        fenced = self._fenced
        message_key = fmt.message_key
        encode_message = fmt.encode_message
        for operation in operations:
            tag = operation[0]
            if tag == PUT_MESSAGE:
                _, queue_id, order, message = operation
                key = message_key(queue_id, order)
                add((key, encode_message(key, message)))
                if queue_id not in fenced:  # in a spool: there queues have no descriptors
                    self._put_fences(add, queue_id)
                if message.expires:
                    self._put_expiry(add, message.expires, queue_id, order, message.size)
            elif tag == DELETE_MESSAGE:
                _, queue_id, order, expires, counted = operation
                add((message_key(queue_id, order), None))
                if expires:
                    add((fmt.expiry_key(expires, queue_id, order), None))
                if counted:
                    add((fmt.deliveries_key(queue_id, order), None))
            elif tag == PUT_QUEUE:
                self._put_queue(add, operation[1])
            elif tag == PUT_PRODUCER:
                key = fmt.producer_key(operation[1].producer_id)
                add((key, fmt.encode_producer(key, operation[1])))
            elif tag == PUT_REFERENCE:
                _, queue_id, order, body_id, expires, size = operation
                key = message_key(queue_id, order)
                add((key, fmt.encode_reference(key, body_id, expires, size)))
                if expires:
                    self._put_expiry(add, expires, queue_id, order, size)
            elif tag == SET_REFERENCES:
                _, body_id, references = operation
                key = fmt.references_key(body_id)
                add((key, fmt.encode_number(key, references)))
            elif tag == PUT_DELIVERIES:
                _, queue_id, order, deliveries = operation
                key = fmt.deliveries_key(queue_id, order)
                add((key, fmt.encode_number(key, deliveries)))
            elif tag == PUT_BODY:
                self._put_body(add, *operation[1:])
            elif tag == DELETE_BODY:
                add((fmt.body_key(operation[1]), None))
                add((fmt.references_key(operation[1]), None))
            elif tag == DELETE_QUEUE:
                self._delete_queue(add, operation[1])
            elif tag == DELETE_PRODUCER:
                add((fmt.producer_key(operation[1]), None))
            elif tag == PUT_PEER:
                key = fmt.peer_key(operation[1].name)
                add((key, fmt.encode_peer(key, operation[1])))
            elif tag == DELETE_PEER:
                add((fmt.peer_key(operation[1]), None))
            elif tag == PUT_SCHEDULE:
                put_schedule(add, operation[1], operation[2])
            elif tag == DELETE_SCHEDULE:
                delete_schedule(add, operation[1], operation[2])
            elif tag == PUT_SCHEDULING:
                add((fmt.SCHEDULING_KEY, encode_scheduling(operation[1])))
            elif tag == PUT_VALUE:
                add((operation[1], operation[2]))
            else:
                raise ValueError(f"operation {tag!r} is not known")
        return changes

    def _put_expiry(self, add: Any, expires: int, queue_id: int, order: int, size: int) -> None:
        key = fmt.expiry_key(expires, queue_id, order)
        add((key, fmt.encode_number(key, size)))

    def _put_queue(self, add: Any, record: QueueRecord) -> None:
        queue_id = record.queue_id
        key = fmt.queue_key(queue_id)
        add((key, fmt.encode_queue(key, record)))
        if queue_id not in self._fenced:
            self._put_fences(add, queue_id)
        if queue_id >= self.next_queue_id:
            self.next_queue_id = queue_id + 1
            self._put_ids(add)

    def _put_fences(self, add: Any, queue_id: int) -> None:
        self._fenced.add(queue_id)
        for fence in fences(queue_id):
            add((fence, fmt.encode_fence(fence)))

    def _delete_queue(self, add: Any, queue_id: int) -> None:
        add((fmt.queue_key(queue_id), None))
        self._fenced.discard(queue_id)
        for fence in fences(queue_id):
            add((fence, None))

    def _put_body(self, add: Any, body_id: int, message: Message, references: int) -> None:
        key = fmt.body_key(body_id)
        add((key, fmt.encode_message(key, message)))
        key = fmt.references_key(body_id)
        add((key, fmt.encode_number(key, references)))
        if body_id >= self.next_body_id:
            self.next_body_id = body_id + BODY_IDS_RESERVED
            self._put_ids(add)

    def _put_ids(self, add: Any) -> None:
        add((fmt.IDS_KEY, fmt.encode_pair(fmt.IDS_KEY, self.next_queue_id, self.next_body_id)))

    def prepare(self, changes: Sequence[Change], position: tuple[int, int]) -> object:
        """A batch that makes the changes and brings the store to `position`. Cheap, for the event loop.

        The changes may come from another replica's store: ids, fences and history are taken from them.
        """
        batch = self.backend.new_batch([*changes, (fmt.POSITION_KEY, fmt.encode_pair(fmt.POSITION_KEY, *position))])
        expires = NEVER
        history: list[tuple[int, int | None]] = []
        for key, value in changes:
            tag = key[0]
            if tag == fmt.EXPIRY:
                if value is not None:
                    expires = min(expires, int.from_bytes(key[1:9], "big"))
            elif tag == fmt.QUEUE:
                if value is None:
                    self._fenced.discard(fmt.parse_key(key)[1])
            elif tag == fmt.IDS:
                if value is not None:
                    queue_ids, body_ids = fmt.decode_pair(key, value)
                    self.next_queue_id = max(self.next_queue_id, queue_ids)
                    self.next_body_id = max(self.next_body_id, body_ids)
            elif tag == fmt.HISTORY:
                history.append((fmt.parse_key(key)[1], None if value is None else fmt.decode_number(key, value)))
        return batch, expires, position, history

    def write(self, prepared: object, sync: bool) -> None:
        """Write what `prepare` made, in the order in which it was made. Blocking.

        Raises `StoreError`: whether the batch is in the store will only be known when it has been opened again.
        """
        assert isinstance(prepared, tuple)
        batch, expires, position, history = prepared
        try:
            self.backend.write(batch, sync)
        except StoreDamaged as error:  # LevelDB can't rewrite a table with a bad block, and will try again each time
            self.distrust(str(error), unreadable=True)
            raise
        if history:
            known = dict(self.history) | dict(history)
            self.history = _with_beginning([(epoch, lsn) for epoch, lsn in known.items() if lsn is not None])
        self.position = position
        if expires != NEVER:
            self._due.lower(expires)

    def apply(self, changes: Sequence[Change], position: tuple[int, int], sync: bool) -> None:
        """`prepare` and `write` in one: a batch that another replica encoded. Blocking.

        Raises what `write` raises, and `CorruptRecord`, before anything is written, for a record of ids or history that is
        bad. `records` stay as they were at `open`: `reload` before a core stands on the store.
        """
        self.write(self.prepare(changes, position), sync)

    def mend(self, key: bytes, found: bytes, value: bytes, known_at: int) -> bool:
        """Put a whole value in the place of the bad one, if that is still there; whether it was. Blocking, synced; a write.

        `found` is the bad value, and `value` what another copy had there at batch number `known_at`, which must not be below the
        position at which the bad one was found. So a batch that this store has beyond `known_at` can't have touched the key:
        the bad value would be gone. The position stays. Raises what `write` raises.
        """
        if not self.still_holds(key, found, known_at):
            return False
        self.backend.write(self.backend.new_batch([(key, value)]), True)
        return True

    def mend_own(self, key: bytes, found: bytes) -> bool:
        """The same for META and POSITION, which are this copy's own, and known in memory. Blocking, synced; a write."""
        if key == fmt.META_KEY:
            value = fmt.encode_meta(bytes.fromhex(self.store_id), self.starts)
        else:
            value = fmt.encode_pair(fmt.POSITION_KEY, *self.position)
        return self.mend(key, found, value, self.position[1])

    def still_holds(self, key: bytes, found: bytes, known_at: int) -> bool:
        """Whether this store is at batch `known_at` or beyond, and has that value. Blocking; to be asked where writes are done."""
        return self.position[1] >= known_at and self.backend.get(key) == found

    # ---- reading

    def read_page(
        self,
        queue_id: int,
        start_order: int,
        count_max: int,
        bytes_max: int,
        mended: Mapping[bytes, bytes] = NOTHING_MENDED,
    ) -> Page:
        """A page of a queue; see `pages.read_page`. `mended` values go before those of the store. Blocking."""
        with self.backend.snapshot() as reader:
            page = read_page(Patched(reader, mended) if mended else reader, queue_id, start_order, count_max, bytes_max)
        if page.unreadable:
            self.distrust(page.unreadable, unreadable=True)
        self.look_for_damage()
        return page

    def read_due(self, now_ms: int, count_max: int, after: tuple[int, int, int] | None = None) -> list[DueEntry]:
        """Up to `count_max` rows of the expiry index with ``expires <= now_ms``, in time order. Blocking.

        With `after` (expires, queue id, order) only rows behind that one.

        A row stays until the message's DELETE_MESSAGE is written. Bad rows, and those of bad messages, are passed over;
        `corrupt_due` counts them.
        """
        try:
            return self._due.read(self.backend, now_ms, count_max, after)
        except StoreDamaged as error:
            self.distrust(str(error), unreadable=True)
            raise

    def read_schedules(self, start: tuple[int, int], count_max: int, bytes_max: int) -> SchedulesRead:
        """Schedules in order of time; see `schedules.read_schedules`. Blocking."""
        with self.backend.snapshot() as reader:
            found = read_schedules(reader, start, count_max, bytes_max)
        self.look_for_damage()
        return found

    def find_schedule(self, number: int) -> Schedule | None:
        """The schedule of that number, None when there is none. Blocking. Raises `CorruptRecord`."""
        with self.backend.snapshot() as reader:
            return find_schedule(reader, number)

    @property
    def corrupt_due(self) -> int:
        """Rows of the expiry index that the last `read_due` passed over: they, or their messages, are bad."""
        return self._due.corrupt

    def close(self) -> None:
        """Close the backend. Blocking."""
        self.backend.close()


def write_beginning(backend: Backend, store_id: str, starts: int) -> None:
    """Make an empty backend a store without content under an identity that is there already. Blocking, synced."""
    changes = [
        (fmt.META_KEY, fmt.encode_meta(bytes.fromhex(store_id), starts)),
        (fmt.IDS_KEY, fmt.encode_pair(fmt.IDS_KEY, 1, 1)),
    ]
    backend.write(backend.new_batch(changes), True)


def fences(queue_id: int) -> tuple[bytes, bytes]:
    """The live keys that end the two ranges of a queue: reading to their end must not run into the next queue's."""
    return fmt.message_key(queue_id, fmt.FENCE_ORDER), fmt.deliveries_key(queue_id, fmt.FENCE_ORDER)


def _first_lsn(record: tuple[int, int]) -> int:
    return record[1]


def _with_beginning(history: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """In order of epochs; what lies before the first record is epoch 0."""
    history = sorted(history)
    return history if history and history[0][1] == 0 else [(0, 0), *history]


def _damaged(error: CorruptRecord) -> StoreDamaged:
    return StoreDamaged(f"the store is damaged: {error}; `pybroker store salvage DIR NEWDIR` copies what is whole")
