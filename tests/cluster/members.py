"""A set of whole replicas for tests, on virtual time: its ZooKeeper, network and disks under the test's control. Owns no rule."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import trio

from pybroker.cluster.memory import MemoryCoordinator, MemoryZooKeeper
from pybroker.cluster.registry import View, parse_view
from pybroker.cluster.replica import FOLLOWER, Replica
from pybroker.cluster.term import Term
from pybroker.config import ReplicaSetConfig
from pybroker.errors import BrokerError, ConfigurationError
from pybroker.store import format as fmt
from pybroker.store.chunks import FIRST, STOP
from pybroker.store.committer import Batch
from pybroker.store.copies import MemoryCopies
from tests.cluster.replicas import Wire, _Way, put, until
from tests.store.forgetful import ForgetfulBackend

CONFIG = ReplicaSetConfig(name="set", zookeeper="none", secret="between us")
VIRTUAL_MAX = 5_000  # seconds that a test may take: on a virtual clock it would not end by itself
DELAY = 0.002  # seconds for a piece of bytes, and for each way to ZooKeeper


class Network:
    """Streams between the replicas: each one's end with the task that serves them, as those of a killed process do."""

    def __init__(self) -> None:
        self.nurseries: dict[str, tuple[trio.Nursery, Any]] = {}
        self.silent: set[str] = set()  # they accept connections and never speak
        self.wires: dict[
            str, list[tuple[Wire, Wire]]
        ] = {}  # of the one who dialled and the one who accepted, by address

    async def dial(self, address: str) -> trio.abc.Stream:
        await trio.sleep(DELAY)
        if address not in self.nurseries:
            raise ConnectionRefusedError(address)
        there, back = (_Way(lambda: DELAY, 1 << 20) for _ in range(2))
        nursery, handler = self.nurseries[address]
        mine, other = Wire(there, back), Wire(back, there)
        self.wires.setdefault(address, []).append((mine, other))
        if address not in self.silent:
            nursery.start_soon(handler, other)
        return mine

    def cut(self, address: str) -> None:
        """What goes to and from an address is swallowed, and nobody is told."""
        self.silent.add(address)
        for wires in self.wires.get(address, ()):
            for wire in wires:
                wire.out.cut = True

    def reset(self, address: str, number: int = 0) -> None:
        """One of an address's connections that are there breaks, and both ends see it."""
        live = [pair for pair in self.wires[address] if not (pair[0].out.broken or pair[1].out.broken)]
        for wire in live[number]:
            wire.out.broken = True
            wire.out.change()

    async def serve(self, address: str, handler: Any, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self.nurseries[address] = (nursery, handler)
                task_status.started(address)
                await trio.sleep_forever()
        finally:
            del self.nurseries[address]


class Member:
    """A replica, its disk and its user: a broker that takes each term and commits what the test asks for."""

    def __init__(self, cluster: Cluster, name: str, config: ReplicaSetConfig) -> None:
        self.cluster = cluster
        self.name = name
        self.config = replace(config, bind=name)
        self.rng = random.Random(name)
        self.copies = MemoryCopies(config.name, name, lambda: f"{self.rng.getrandbits(32):08x}", ForgetfulBackend)
        self.scope: trio.CancelScope | None = None
        self.stopped = trio.Event()
        self.error: BaseException | None = None
        self.term: Term | None = None
        self.led: list[int] = []
        self.gate: trio.Event | None = None  # blocking calls wait for it
        self.opening: list[BrokerError] = []  # what the next tries to open the copies meet
        self.coordinator: MemoryCoordinator
        self.replica: Replica

    def start(self) -> None:
        self.coordinator = self.cluster.zookeeper.connect(self.name)
        self.replica = Replica(
            self.config,
            self.name,
            self.copies,
            self.coordinator,
            self.cluster.network,
            run_blocking=self._run_blocking,
            rng=self.rng,
            clients=lambda: (f"stomp://{self.name}",),
        )
        self.scope = trio.CancelScope()
        self.stopped = trio.Event()
        self.cluster.nursery.start_soon(self._run, self.scope, self.stopped)

    async def _run_blocking(self, call: Callable[[], Any]) -> Any:
        await trio.sleep(0.001)
        if self.gate is not None:
            await self.gate.wait()
        backend = self.copies.backend
        if call == self.copies.open and self.opening:
            raise self.opening.pop()
        if call == self.copies.open and isinstance(backend, ForgetfulBackend) and backend.failed is not None:
            self.copies.backend = backend.crash(0)  # as LevelDB, which must be opened again after a failed write
        return call()

    async def _run(self, scope: trio.CancelScope, stopped: trio.Event) -> None:
        try:
            with scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._use)
                    await self.replica.run()
        except* ConfigurationError as errors:
            self.error = errors.exceptions[0]
        finally:
            self.term = None
            stopped.set()

    async def _use(self) -> None:
        while True:
            term = await self.replica.next_term()
            self.term = term
            self.led.append(term.epoch)
            try:
                async with trio.open_nursery() as nursery:
                    for event in (term.lost, term.handover):
                        nursery.start_soon(self._wait_and_stop, event, nursery.cancel_scope)
            finally:
                self.term = None
                term.release()

    @staticmethod
    async def _wait_and_stop(event: trio.Event, scope: trio.CancelScope) -> None:
        await event.wait()
        scope.cancel()

    async def crash(self, keep: int = 0) -> None:
        """The process is killed: its ZooKeeper session ends in its time.

        Its disk keeps what was synced (the power went, too), and the first `keep` of the batches that were not.
        """
        assert self.scope is not None
        self.cluster.zookeeper.kill(self.coordinator)
        self.scope.cancel()
        await self.stopped.wait()
        backend = self.copies.backend
        assert isinstance(backend, ForgetfulBackend)
        self.copies.backend = backend.crash(keep)

    async def commit(self, number: int) -> None:
        term = self.term
        assert term is not None
        await term.committer.commit(Batch([put(number)], (term.epoch, self.position[1] + 1)))

    @property
    def position(self) -> tuple[int, int]:
        assert self.replica.position is not None
        return self.replica.position

    @property
    def content(self) -> dict[bytes, bytes]:
        return {key: value for key, value in self.copies.backend.iterate(FIRST, STOP) if key != fmt.META_KEY}

    def holds(self, number: int) -> bool:
        return self.copies.backend.get(put(number)[0]) is not None


class Cluster:
    """A ZooKeeper, a network, and the members of a set."""

    def __init__(self, nursery: trio.Nursery, config: ReplicaSetConfig) -> None:
        self.nursery = nursery
        self.config = config
        self.network = Network()
        self.zookeeper = MemoryZooKeeper(session_timeout=10.0, delay=lambda: DELAY)
        self.members: dict[str, Member] = {}

    def add(self, name: str) -> Member:
        self.members[name] = Member(self, name, self.config)
        self.members[name].start()
        return self.members[name]

    @property
    def view(self) -> View:
        return parse_view(self.zookeeper.nodes)

    @property
    def leaders(self) -> list[Member]:
        return [member for member in self.members.values() if member.term is not None and member.term.valid]

    @property
    def followers(self) -> list[Member]:
        return [one for one in self.members.values() if not one.stopped.is_set() and one.replica.role == FOLLOWER]

    async def wait_leader(self, seconds: float = 5.0) -> Member:
        await until(lambda: bool(self.leaders), seconds)
        assert len(self.leaders) == 1
        return self.leaders[0]

    async def settle(self, count: int = 3) -> Member:
        """Until one leads, the others follow, and all are on the roster."""
        leader = await self.wait_leader()
        await until(lambda: len(self.followers) == count - 1 and len(self.view.roster) == count)
        return leader


@asynccontextmanager
async def running(names: str = "abc", **options: Any) -> AsyncIterator[Cluster]:
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + VIRTUAL_MAX
        cluster = Cluster(nursery, replace(CONFIG, **options))
        await nursery.start(cluster.zookeeper.run)
        for name in names:
            cluster.add(name)
        yield cluster
        nursery.cancel_scope.cancel()
        return
    raise AssertionError(f"the test has not ended after {VIRTUAL_MAX} virtual seconds")
