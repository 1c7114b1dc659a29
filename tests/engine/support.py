"""A broker on a disk that a test controls, and cancellation at a chosen checkpoint. Owns faults; knows no rule of messaging.

The disk is a `ForgetfulBackend`; each opening of the broker is a new life of it. Batches are committed by the real
`LocalCommitter`, with a checkpoint in front of it (a worker thread's hop) and a gate that a test can shut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import trio
import trio.testing

import pybroker.broker
import pybroker.engine
import pybroker.keeper
from pybroker.broker import Broker, open_broker
from pybroker.client import ReceivedMessage
from pybroker.config import BrokerConfig
from pybroker.core.invariants import check_invariants
from pybroker.engine import Engine
from pybroker.errors import BrokerClosed, StoreError
from pybroker.journal import Batch, LocalCommitter
from pybroker.spool import Spool
from pybroker.stomp_server import StompConnection
from pybroker.store.memory import MemoryBackend
from pybroker.store.store import Store
from tests.store.forgetful import ForgetfulBackend
from tests.support.wire import Peer

QUIET = 0.2  # seconds (of a virtual clock) without a delivery after which a drain is over


class Disk:
    """What survives the broker's lives.

    keep_failed   the batch of a failed write comes back at the next opening
    refuse        so many openings fail
    opened_at     trio's time at each opening, refused ones included
    before, after called around each write with the number of the batch (from 1), over all lives
    gate          commits wait until it is set
    """

    def __init__(self, state: dict[bytes, bytes] | None = None) -> None:
        self.backend = ForgetfulBackend(state)
        self.keep_failed = False
        self.refuse = 0
        self.full = False
        self.opened_at: list[float] = []
        self.commits = 0
        self.before: Callable[[int], None] = lambda number: None
        self.after: Callable[[int], None] = lambda number: None
        self.gate = trio.Event()
        self.gate.set()
        self._opened = False

    async def open(self, config: BrokerConfig) -> Store:
        """In the place of `pybroker.keeper.open_store`."""
        self.opened_at.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if self.refuse:
            self.refuse -= 1
            raise StoreError("the disk is away")
        if self._opened:
            self.backend = self.next_backend()
        self._opened = True
        self.backend.full = self.full
        return Store.open(self.backend)

    def next_backend(self) -> ForgetfulBackend:
        """The next life's backend, made in the class of the present one."""
        crashed = self.backend.crash(keep_failed=self.keep_failed)
        return type(self.backend)(crashed.synced)

    def fill(self, full: bool) -> None:
        self.full = self.backend.full = full

    def shut(self) -> None:
        """Let every commit hang from now on, until `gate.set()`."""
        self.gate = trio.Event()


class DiskCommitter(LocalCommitter):
    """The real one, between the hooks of its disk."""

    def __init__(self, disk: Disk, store: Store, sync: bool) -> None:
        super().__init__(store, sync)
        self._disk = disk

    async def commit(self, batch: Batch) -> None:
        disk = self._disk
        await trio.lowlevel.checkpoint()  # others have their turn while a batch is written
        await disk.gate.wait()
        disk.commits += 1
        number = disk.commits
        disk.before(number)
        await super().commit(batch)
        disk.after(number)


async def close_without_thread(store: Store | Spool) -> None:
    """In the place of `pybroker.keeper.close_store`, without a thread: a virtual clock doesn't wait for threads."""
    store.close()


@asynccontextmanager
async def broker_on(disk: Disk, **overrides: object) -> AsyncIterator[Broker]:
    """`open_broker` on a disk; one such broker at a time."""
    with (
        patch.object(pybroker.keeper, "open_store", disk.open),
        patch.object(pybroker.keeper, "close_store", close_without_thread),
        patch.object(pybroker.broker, "close_store", close_without_thread),
        patch.object(pybroker.broker, "make_spool", lambda config: Spool(lambda: Store.open(MemoryBackend()))),
        patch.object(pybroker.engine, "LocalCommitter", partial(DiskCommitter, disk)),
    ):
        async with open_broker(**overrides) as broker:
            yield broker


def engine_of(broker: Broker) -> Engine:
    engine = broker._engine
    assert engine is not None
    return engine


@asynccontextmanager
async def stomp_peer(broker: Broker) -> AsyncIterator[Peer]:
    """A STOMP peer of a broker, over a stream in memory."""
    async with trio.open_nursery() as nursery:
        ours, theirs = trio.testing.memory_stream_pair()
        connection = StompConnection(broker._server, engine_of(broker), theirs, 1, True)
        nursery.start_soon(connection.run)
        peer = Peer(ours)
        try:
            await peer.open()
            yield peer
        finally:
            nursery.cancel_scope.cancel()


def check(broker: Broker) -> None:
    """The core doesn't contradict itself."""
    check_invariants(engine_of(broker).core)


async def wait_serving(broker: Broker) -> None:
    """Wait until the broker serves (again)."""
    while True:
        try:
            async with broker.connect():
                return
        except BrokerClosed:
            await trio.sleep(0.01)


# ---- places: a queue's name, or (pattern, subscription) of a durable subscription of `OWNER`

OWNER = "owner"
Place = str | tuple[str, str]


class Found:
    """A message met while a place was drained."""

    def __init__(self, message: ReceivedMessage) -> None:
        self.id = message.header("id") or ""
        self.body = message.body
        self.priority = message.priority
        self.redelivered = message.redelivered
        self.headers = dict(message.headers)
        self.message_id = message.message_id

    def __repr__(self) -> str:
        return f"<{self.id}{' redelivered' if self.redelivered else ''}>"


async def drain(broker: Broker, *places: Place) -> dict[Place, list[Found]]:
    """Take and acknowledge all there is, in order of delivery. Wants a virtual clock."""
    found: dict[Place, list[Found]] = defaultdict(list)
    async with broker.connect(OWNER) as client:
        for place in places:
            destination, name = (place, None) if isinstance(place, str) else place
            async with client.subscribe(destination, durable_name=name) as messages:
                while True:
                    with trio.move_on_after(QUIET):
                        batch = await messages.receive_batch(1_000)
                        found[place] += map(Found, batch)
                        await messages.ack(batch)
                        continue
                    break
    return found


def check_empty(broker: Broker) -> None:
    """Nothing is left, in memory or on the disk, and nothing is counted that is not there."""
    check(broker)
    core = engine_of(broker).core
    left = [queue for queue in core.queues.values() if queue.depth]
    assert not left, left
    counted = (core.memory_bytes, core.stored_bytes, core.spooled_bytes, core.spooled, len(core.expiries))
    assert counted == (0, 0, 0, 0, 0), counted
    assert len(core.shared) == 0


# ---- cancellation at the k-th checkpoint


class CancelAt(trio.abc.Instrument):
    """Cancels `scope` at the k-th step (from 1) of the task that `watch` is called in and of all that it starts.

    `blocked`: right after the step, so that what the task waits for is withdrawn; otherwise right before it, so that
    the step itself goes on and the checkpoint that it comes to is cancelled.
    """

    def __init__(self, step: int, blocked: bool) -> None:
        self._step = step
        self._blocked = blocked
        self._task: Any = None
        self.steps = 0
        self.scope = trio.CancelScope()

    def watch(self) -> None:
        self._task = trio.lowlevel.current_task()

    def _ours(self, task: Any) -> bool:
        while task is not None and task is not self._task:
            task = task.parent_nursery and task.parent_nursery.parent_task
        return task is not None and self._task is not None

    def before_task_step(self, task: Any) -> None:
        if self._ours(task):
            self.steps += 1
            if self.steps == self._step and not self._blocked:
                self.scope.cancel()

    def after_task_step(self, task: Any) -> None:
        if self.steps == self._step and self._blocked and self._ours(task):
            self.scope.cancel()


async def cancelled_at(step: int, blocked: bool, function: Callable[[], Any]) -> bool:
    """Run `function` in a task of its own, cancelled at a step; whether it came to that step before it ended."""
    instrument = CancelAt(step, blocked)
    done = False

    async def run() -> None:
        nonlocal done
        instrument.watch()
        with instrument.scope:
            await function()
            done = True

    trio.lowlevel.add_instrument(instrument)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
    finally:
        trio.lowlevel.remove_instrument(instrument)
    return not done
