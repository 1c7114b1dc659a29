"""The store against a plain dictionary: random operations, reopening, and a crash at every batch boundary."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybroker.errors import StoreError
from pybroker.message import Message, Route
from pybroker.operations import (
    DELETE_BODY,
    DELETE_MESSAGE,
    DELETE_PEER,
    DELETE_PRODUCER,
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
from pybroker.store.backend import Backend
from tests.store.forgetful import ForgetfulBackend
from tests.store.samples import fields, message, place

QUEUES = (1, 2, 3)
BODIES = (1, 2)
BIG = 1 << 30


@dataclass
class Row:
    message: Message
    deliveries: int | None = None
    body_id: int = 0


@dataclass
class Model:
    """What the store must hold. `apply` turns a drawn step into operations that a core could emit."""

    queues: dict[int, dict[int, Row]] = field(default_factory=lambda: {queue_id: {} for queue_id in QUEUES})
    bodies: dict[int, int] = field(default_factory=dict)
    records: dict[int, QueueRecord] = field(default_factory=dict)
    producers: dict[str, ProducerRecord] = field(default_factory=dict)
    peers: dict[str, PeerRecord] = field(default_factory=dict)
    fenced: set[int] = field(default_factory=set)
    position: tuple[int, int] = (0, 0)
    next_queue_id: int = 1
    sequence: int = 0

    def apply(self, step: tuple[int, int, int, int]) -> list[tuple[object, ...]]:
        kind, first, second, third = step
        queue_id = QUEUES[first % len(QUEUES)]
        rows = self.queues[queue_id]
        self.sequence += 1
        if kind <= 3:
            priority = second % 10
            sent = message(b"%d" % third, priority, expires=third % 5 * 100)
            if third % 4 == 3:
                sent.route = Route((f"broker {first}",), deliveries=third, priority=first)
            order = place(self.sequence, priority)
            rows[order] = Row(sent)
            self.fenced.add(queue_id)
            return [(PUT_MESSAGE, queue_id, order, sent)]
        if kind == 4:
            body_id = BODIES[second % len(BODIES)]
            if body_id in self.bodies:
                return []
            sent = message(b"shared %d" % third, 4, expires=third % 3 * 100)
            self.bodies[body_id] = len(QUEUES)
            operations: list[tuple[object, ...]] = [(PUT_BODY, body_id, sent, len(QUEUES))]
            for each in QUEUES:
                order = place(self.sequence)
                self.queues[each][order] = Row(sent, body_id=body_id)
                operations.append((PUT_REFERENCE, each, order, body_id, sent.expires, sent.size))
            return operations
        if kind == 5:
            record = QueueRecord(queue_id, "queue", f"q{queue_id}", next_sequence=third)
            self.records[queue_id] = record
            self.fenced.add(queue_id)
            self.next_queue_id = max(self.next_queue_id, queue_id + 1)
            return [(PUT_QUEUE, record)]
        if kind >= 12:
            return self.apply_record(kind, f"name {first % 3}", second, third)
        if kind == 6:
            self.records.pop(queue_id, None)
            self.fenced.discard(queue_id)
            return [(DELETE_QUEUE, queue_id)]
        if not rows:
            return []
        order = sorted(rows)[second % len(rows)]
        row = rows[order]
        if kind == 7:
            row.deliveries = third
            return [(PUT_DELIVERIES, queue_id, order, row.deliveries)]
        del rows[order]
        operations = [(DELETE_MESSAGE, queue_id, order, row.message.expires, row.deliveries is not None)]
        if row.body_id:
            self.bodies[row.body_id] -= 1
            left = self.bodies[row.body_id]
            operations.append((SET_REFERENCES, row.body_id, left) if left else (DELETE_BODY, row.body_id))
            if not left:
                del self.bodies[row.body_id]
        return operations

    def apply_record(self, kind: int, name: str, second: int, third: int) -> list[tuple[object, ...]]:
        if kind == 12:
            self.producers[name] = ProducerRecord(name, (second, second + third), third, self.sequence)
            return [(PUT_PRODUCER, self.producers[name])]
        if kind == 13:
            self.peers[name] = PeerRecord(
                name, (("t.>", f"broker {second}", (name, f"broker {second}")),) * (third % 3)
            )
            return [(PUT_PEER, self.peers[name])]
        if kind == 14:
            self.producers.pop(name, None)
            return [(DELETE_PRODUCER, name)]
        self.peers.pop(name, None)
        return [(DELETE_PEER, name)]


def compare(store: Store, model: Model) -> None:
    assert store.position == model.position
    assert store.records == sorted(model.records.values(), key=lambda record: record.queue_id)
    assert {record.producer_id: record for record in store.producers} == model.producers
    assert {record.name: record for record in store.peers} == model.peers
    assert store.next_queue_id == model.next_queue_id
    due = []
    for queue_id in QUEUES:
        page = store.read_page(queue_id, 0, 10_000, BIG)
        assert page.corrupt == []
        assert [fields(entry) for entry in page.entries] == [
            (order, fields(row.message), row.deliveries, row.body_id, model.bodies.get(row.body_id, 0))
            for order, row in sorted(model.queues[queue_id].items())
        ]
        due += [
            (row.message.expires, queue_id, order, row.message.size, row.body_id, model.bodies.get(row.body_id, 0))
            for order, row in model.queues[queue_id].items()
            if row.message.expires
        ]
    assert store.read_due(10**6, 10_000) == [DueEntry(*row) for row in sorted(due)]
    rows = [row for queue in model.queues.values() for row in queue.values()]
    counted = sum(row.deliveries is not None for row in rows)
    left = sum(1 for _ in store.backend.iterate(bytes((fmt.MESSAGE,)), bytes((fmt.END,))))
    fences = 2 * len(model.fenced)
    assert left == len(rows) + counted + 2 * len(model.bodies) + len(due) + fences, "nothing is left behind"


steps = st.tuples(st.integers(0, 15), st.integers(0, 9), st.integers(0, 99), st.integers(0, 99))
batches = st.lists(st.tuples(st.lists(steps, max_size=6), st.booleans()), max_size=12)


def write(store: Store, model: Model, batch: list[tuple[int, int, int, int]], sync: bool) -> None:
    operations = [operation for step in batch for operation in model.apply(step)]
    model.position = (1, model.position[1] + 1)
    store.write(store.prepare(store.encode(operations), model.position), sync)


@settings(max_examples=80, deadline=None)
@given(batches)
def test_a_crash_at_every_boundary_leaves_a_whole_state(
    drawn: list[tuple[list[tuple[int, int, int, int]], bool]],
) -> None:
    backend = ForgetfulBackend()
    store = Store.open(backend)
    model = Model()
    history = [copy.deepcopy(model)]
    for batch, sync in drawn:
        write(store, model, batch, sync)
        history.append(copy.deepcopy(model))
        compare(store_as_reopened(store), model)
        synced = len(history) - 1 - len(backend.unsynced)
        for keep in range(len(backend.unsynced) + 1):
            crashed = ForgetfulBackend(backend.synced)
            crashed.unsynced = backend.unsynced
            compare(Store.open(crashed.crash(keep)), history[synced + keep])


def store_as_reopened(store: Store) -> Store:
    store.reload()
    return store


@settings(max_examples=40, deadline=None)
@given(batches, st.integers(1, 12))
def test_a_failed_write_is_there_whole_or_not_at_all(
    drawn: list[tuple[list[tuple[int, int, int, int]], bool]], fail: int
) -> None:
    backend = ForgetfulBackend()
    store = Store.open(backend)
    backend.fail_write = backend.writes + fail
    model = Model()
    before = copy.deepcopy(model)
    for batch, _ in drawn:
        before = copy.deepcopy(model)
        try:
            write(store, model, batch, True)
        except StoreError:
            break
    failed = backend.failed is not None
    compare(Store.open(backend.crash(keep_failed=True)), model)
    if failed:
        compare(Store.open(backend.crash(keep_failed=False)), before)


@pytest.mark.parametrize("kind", ["leveldb", "memory"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=batches)
def test_reopening_shows_the_same(
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[list[tuple[int, int, int, int]], bool]],
) -> None:
    path: Path = tmp_path_factory.mktemp("db")
    memory = MemoryBackend()
    make: Callable[[], Backend] = (lambda: LevelDBBackend(path)) if kind == "leveldb" else (lambda: memory)
    store = Store.open(make())
    model = Model()
    for index, (batch, _) in enumerate(drawn):
        write(store, model, batch, False)
        if index % 4 == 3:
            if kind == "leveldb":
                store.close()
            store = Store.open(make())
            compare(store, model)
    compare(store_as_reopened(store), model)
    store.close()
