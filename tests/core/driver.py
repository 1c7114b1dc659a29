"""The engine and the journal without trio: every step between a turn and its release is a call that a test makes.

Follows `pybroker.engine` and `pybroker.journal` step by step (DESIGN.md section 3). One open batch fills while another is
written; the write itself has four steps (close the batch, spool, store, release), a read has three (store, spool, hand
over), and anything may happen between two steps: turns, or a crash.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

from pybroker.config import CompositeEntry, DeliveryPolicy, Limits, PolicyEntry, RoutingConfig
from pybroker.core.broker import Core
from pybroker.core.browsing import BrowseRequest
from pybroker.core.consumer import Connection, Consumer
from pybroker.core.entry import HELD, SENT, Entry
from pybroker.core.queue import Queue
from pybroker.core.reads import DueRequest, PageRequest, Whole, read_whole
from pybroker.core.schedules import ScheduleLookup, SchedulesRequest
from pybroker.errors import BrokerError
from pybroker.mending import _operation
from pybroker.message import Message
from pybroker.operations import Operation
from pybroker.spool import Spool
from pybroker.store.backend import Change
from pybroker.store.check import _Verification
from pybroker.store.memory import MemoryBackend
from pybroker.store.report import Report
from pybroker.store.store import Store


class Observer(Protocol):
    """What is told of everything that the core does and shows."""

    def accepted(self, queue: Queue, message: Message) -> None:
        """A message is about to enter a queue, with the queue's next sequence."""

    def dispatched(self, queue: Queue, consumer: Consumer, entry: Entry) -> None:
        """An entry is about to be given to a consumer (not shown yet)."""

    def shown(self, consumer: Consumer, entry: Entry) -> None:
        """A client sees a delivery."""

    def confirmed(self, token: Any) -> None:
        """A client sees a confirmation."""

    def closing(self, consumer: Consumer, error: BrokerError) -> None:
        """The broker is about to end a subscription."""

    def sealed(self) -> Any:
        """A batch was closed: the state that it brings the store to."""

    def written(self, snapshot: Any) -> None:
        """The store holds that state now."""


class Ignore:
    """An observer that only collects what clients see."""

    def __init__(self) -> None:
        self.deliveries: list[tuple[Consumer, Entry, int, bytes]] = []
        self.confirmations: list[Any] = []
        self.closed: list[tuple[Consumer, BrokerError]] = []

    def accepted(self, queue: Queue, message: Message) -> None:
        pass

    def dispatched(self, queue: Queue, consumer: Consumer, entry: Entry) -> None:
        pass

    def shown(self, consumer: Consumer, entry: Entry) -> None:
        self.deliveries.append((consumer, entry, entry.deliveries, entry.message.body))

    def confirmed(self, token: Any) -> None:
        self.confirmations.append(token)

    def closing(self, consumer: Consumer, error: BrokerError) -> None:
        self.closed.append((consumer, error))

    def sealed(self) -> Any:
        return None

    def written(self, snapshot: Any) -> None:
        pass


@dataclass
class Batch:
    """Changes, spool operations and effects that belong together; `turns` are those whose changes are in it."""

    changes: list[Change] = field(default_factory=list)
    spool: list[Operation] = field(default_factory=list)
    effects: list[Any] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    unsealed: bool = False
    snapshot: Any = None
    steps: int = 0

    @property
    def work(self) -> bool:
        return bool(self.changes or self.spool or self.unsealed)


@dataclass
class Read:
    """A read under way."""

    request: PageRequest | DueRequest | BrowseRequest | SchedulesRequest | ScheduleLookup
    spooled: bool = False
    stored: Any = None
    transient: Any = None
    mended: list[tuple[int, Operation]] = field(default_factory=list)
    whole: list[Whole] = field(default_factory=lambda: [{}, {}])
    steps: int = 0


class Driver:
    """One broker's store, through as many lives of its core as a test likes."""

    def __init__(
        self,
        limits: Limits,
        delivery: DeliveryPolicy,
        observer: Observer,
        now: int = 1_000_000,
        policies: tuple[PolicyEntry, ...] = (),
        routing: RoutingConfig | None = None,
        composites: tuple[CompositeEntry, ...] = (),
    ) -> None:
        self.limits = limits
        self.delivery = delivery
        self.policies = policies
        self.routing = routing
        self.composites = composites
        self.observer = observer
        self.backend = MemoryBackend()
        self.now = now
        self.turn = 0  # the number of the present one
        self.peers: dict[bytes, bytes] | None = None  # other copies' values; None: a bad value fails the test
        self.open()

    def open(self) -> None:
        """Begin a life: what is not in the backend is forgotten."""
        self.store = Store.open(self.backend)
        self.spool_store: Store | None = None
        self.spool = Spool(self._make_spool)
        self.position = self.store.position
        self.batch = Batch()
        self.writing: Batch | None = None
        self.reads: deque[Read] = deque()
        self.unwritten: set[int] = set()  # turns with changes that the store doesn't hold yet
        self.core = self.make_core()
        self.core.observer = self.observer  # type: ignore[attr-defined]
        self.end_turn()

    def make_core(self) -> Core:
        return Core(
            self.limits,
            self.delivery,
            first_id=self.store.first_unused_id,
            id_prefix=f"id-{self.store.starts:x}-",
            records=self.store.records,
            producers=self.store.producers,
            peers=self.store.peers,
            scheduling=self.store.scheduling,
            now=self.now,
            policies=self.policies,
            routing=self.routing,
            composites=self.composites,
        )

    def _make_spool(self) -> Store:
        self.spool_store = Store.open(MemoryBackend())
        return self.spool_store

    def wait(self, milliseconds: int) -> None:
        """Let time pass, and do what is due then, as the engine's alarm does."""
        self.now += milliseconds
        self.begin_turn().redeliveries.release_due()
        self.end_turn()

    def connect(self, client_id: str = "") -> Connection:
        return self.core.connect(None, client_id)

    # ---- turns

    def begin_turn(self) -> Core:
        self.core.now = self.now
        return self.core

    def end_turn(self) -> None:
        """`Engine.end_turn` and `Journal.add`."""
        core = self.core
        closing, core.closing = core.closing, []
        for overrun, error in closing:
            if overrun in overrun.connection.consumers:
                self.observer.closing(overrun, error)
                core.unsubscribe(overrun)
        if core.operations or core.dirty:
            self.unwritten.add(self.turn)
        instant, core.instant = core.instant, []
        for entry in instant:
            if entry.state == HELD:
                entry.state = SENT
                assert entry.consumer is not None
                self.observer.shown(entry.consumer, entry)
        if core.operations or core.held or core.spool_operations or core.dirty:
            operations, core.operations = core.operations, []
            held, core.held = core.held, []
            spool, core.spool_operations = core.spool_operations, []
            self._add(operations, held, spool, bool(core.dirty))
        self.turn += 1

    def _add(self, operations: list[Operation], effects: list[Any], spool: list[Operation], unsealed: bool) -> None:
        self.batch.changes += self.store.encode(operations)
        self.batch.unsealed = self.batch.unsealed or unsealed
        if operations or unsealed:
            self.batch.turns.append(self.turn)
        self.batch.spool += spool
        if self.batch.work:
            self.batch.effects += effects
        elif self.writing is not None:
            self.writing.effects += effects
        else:
            self._release(effects)

    def _release(self, effects: list[Any]) -> None:
        """`Engine._release`."""
        for effect in effects:
            kind = effect.__class__
            if kind is Entry:
                if effect.state == HELD:
                    effect.state = SENT
                    effect.consumer.holding -= 1
                    self.observer.shown(effect.consumer, effect)
            elif kind is tuple:
                if effect[0] is self.core.links:
                    self.core.links.confirm(effect[1])
                else:
                    self.observer.confirmed(effect[1])
            else:
                self.reads.append(Read(effect))

    # ---- the journal's steps

    def step_commit(self) -> bool:
        """One step of a commit; False when there is nothing to do."""
        writing = self.writing
        if writing is None:
            if not self.batch.work:
                return False
            writing = self.writing = self.batch
            self.batch = Batch()
            writing.changes += self.store.encode(self.core.seal())
            writing.snapshot = self.observer.sealed()
        elif writing.steps == 1:
            if writing.spool:
                self.spool.write(writing.spool)
        elif writing.steps == 2:
            if writing.changes:
                epoch, lsn = self.position
                self.position = (epoch, lsn + 1)
                self.store.write(self.store.prepare(writing.changes, self.position), True)
            self.unwritten.difference_update(writing.turns)
            self.observer.written(writing.snapshot)
        else:
            self.writing = None
            self._release(writing.effects)
            return True
        writing.steps += 1
        return True

    def commit(self) -> None:
        """All steps until nothing waits."""
        while self.step_commit():
            pass

    # ---- the reader's steps

    def step_read(self) -> bool:
        """One step of the read that is first in line; False when there is none."""
        if not self.reads:
            return False
        read = self.reads[0]
        request = read.request
        if read.steps == 0:
            read.spooled = self.core.spooled > 0 and not isinstance(request, SchedulesRequest | ScheduleLookup)
            read.stored = self._read_from(self.store, request)
            if isinstance(request, DueRequest):
                read.whole[0] = read_whole(self.store, read.stored, request)
            if self.peers and isinstance(request, PageRequest):
                self._mend(read)
        elif read.steps == 1:
            read.transient = self._read_from(self.spool, request) if read.spooled else None
            if isinstance(request, DueRequest) and read.transient:
                read.whole[1] = read_whole(self.spool, read.transient, request)
        else:
            self.reads.popleft()
            self._hand_over(read)
            return True
        read.steps += 1
        return True

    def _read_from(self, source: Any, request: Any) -> Any:
        if isinstance(request, BrowseRequest):
            start = request.cursor.position
            return source.read_page(request.queue.queue_id, start, request.count_max, request.size_max)
        if isinstance(request, SchedulesRequest):
            return source.read_schedules(request.start, request.count_max, request.size_max)
        if isinstance(request, ScheduleLookup):
            return source.find_schedule(request.number)
        if isinstance(request, PageRequest):
            return source.read_page(request.queue.queue_id, request.start, request.count_max, request.size_max)
        return source.read_due(request.now, request.count_max, request.after)

    def _mend(self, read: Read) -> None:
        """`Mender.read`."""
        request = read.request
        assert isinstance(request, PageRequest)
        values: dict[bytes, bytes] = {}
        what = (request.queue.queue_id, request.start, request.count_max, request.size_max)
        while bad := [(order, key) for order, key in read.stored.bad if key in self.peers and key not in values]:
            values |= {key: self.peers[key] for _, key in bad}
            read.mended += [(order, _operation(key, values[key])) for order, key in bad]
            read.stored = self.store.read_page(*what, values)

    def _hand_over(self, read: Read) -> None:
        request, stored, transient = read.request, read.stored, read.transient
        core = self.begin_turn()
        if isinstance(request, SchedulesRequest):
            core.schedules.loaded(request, stored.schedules, stored.next_key, stored.unread, stored.places)
        elif isinstance(request, ScheduleLookup):
            core.schedules.looked_up(request, stored)
        elif isinstance(request, DueRequest):
            core.due_loaded(request, stored, transient if transient is not None else [], *read.whole)
        else:
            assert self.peers is not None or not stored.corrupt, stored.corrupt
            bounds = [
                page.next_order for page in (stored, transient) if page is not None and page.next_order is not None
            ]
            entries = transient.entries if transient is not None else []
            bound = min(bounds, default=None)
            if isinstance(request, BrowseRequest):
                core.browse_loaded(request, stored.entries, entries, bound, stored.unread)
                self.end_turn()
                return
            core.page_loaded(request, stored.entries, entries, bound, stored.unread, read.mended)
        self.end_turn()

    def settle(self) -> None:
        """Commit and read until the broker is at rest."""
        for _ in range(10_000):
            if not self.step_commit() and not self.step_read():
                return
        raise AssertionError("the broker doesn't come to rest")

    def crash(self) -> None:
        """The process dies: a new life begins with what was written."""
        self.open()

    def restart(self) -> None:
        """A clean stop and start."""
        core = self.begin_turn()
        for connection in list(core.connections):
            core.disconnect(connection)
        self.end_turn()
        self.settle()
        self.open()

    # ---- looking at the store

    def verify(self) -> Report:
        """What `pybroker store verify` says of the store as it is."""
        with self.backend.snapshot() as reader:
            return _Verification(reader).run(Path("memory"), None)


def observing() -> list[AbstractContextManager[Any]]:
    """Patches that tell a core's observer what its queues do; to be entered for the time of a test."""
    accept, deliver = Queue.accept, Queue._deliver

    def watched_accept(queue: Queue, message: Message, *rest: Any) -> None:
        _observer(queue).accepted(queue, message)
        accept(queue, message, *rest)

    def watched_deliver(queue: Queue, entry: Entry, consumer: Consumer | None = None) -> None:
        chosen = consumer or next(iter(queue.available), None)
        assert chosen is not None
        _observer(queue).dispatched(queue, chosen, entry)
        deliver(queue, entry, consumer)

    patches: list[tuple[str, Callable[..., None]]] = [("accept", watched_accept), ("_deliver", watched_deliver)]
    return [patch.object(Queue, name, function) for name, function in patches]


def _observer(queue: Queue) -> Observer:
    observer: Observer = queue.core.observer  # type: ignore[attr-defined]
    return observer
