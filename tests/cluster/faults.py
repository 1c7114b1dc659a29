"""A set under faults that `test_replica` has none of: cuts in one direction, processes that are suspended, real disks.

Owns the faults of the named tests in ``test_known_faults*.py``; knows no rule of the set. A process is a tree of tasks: it is told
by its root whose words a network carries, and a suspended one's tasks do not run (as under SIGSTOP), while time goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio._core._run import Runner  # there is no public way to hold a task

from pybroker.broker import Broker
from pybroker.cluster.leader import LeadershipLost
from pybroker.config import BrokerConfig, ReplicaSetConfig
from pybroker.errors import StoreError
from pybroker.replicated import Replicated
from pybroker.store import format as fmt
from pybroker.store.chunks import FIRST, STOP
from pybroker.store.copies import DiskCopies
from tests.cluster.members import CONFIG, DELAY, Cluster, Member
from tests.cluster.replicas import Crash, Wire, _Way, put

_reschedule = Runner.reschedule


class Processes:
    """Which process a task belongs to, and which ones are suspended."""

    def __init__(self) -> None:
        self.roots: dict[trio.lowlevel.Task, str] = {}
        self._held: dict[str, list[trio.lowlevel.Task]] = {}

    def owner(self, task: trio.lowlevel.Task | None) -> str:
        while task is not None:
            if task in self.roots:
                return self.roots[task]
            task = task.parent_nursery.parent_task if task.parent_nursery is not None else None
        return ""

    def suspend(self, name: str) -> None:
        self._held.setdefault(name, [])

    def resume(self, name: str) -> None:
        for task in self._held.pop(name, []):
            task._runner.runq.append(task)

    @property
    def suspended(self) -> set[str]:
        return set(self._held)

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """While this holds, what wakes a task of a suspended process (also a deadline) only notes that."""

        def reschedule(runner: Runner, task: trio.lowlevel.Task, *result: Any) -> None:
            _reschedule(runner, task, *result)
            if self._held and (held := self._held.get(self.owner(task))) is not None:
                runner.runq.remove(task)
                held.append(task)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Runner, "reschedule", reschedule)
            yield


class CutWire(Wire):
    """A `Wire` whose end is not told either where its bytes do not arrive."""

    async def aclose(self) -> None:
        self.out.ended = True
        self.out.change()
        if self.out.cut:
            self.into.cut = True  # nobody says so to the other side: what it sends is swallowed
        else:
            self.into.broken = True
        self.into.change()
        await trio.lowlevel.checkpoint()


class CutNetwork:
    """`Network` of `test_replica`, with cuts from one replica to another. Addresses are the replicas' names."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._handlers: dict[str, tuple[trio.Nursery, Any]] = {}
        self._ways: list[tuple[str, str, _Way]] = []
        self._cuts: set[tuple[str, str]] = set()

    def cut(self, sender: str, receiver: str) -> None:
        """From now on nothing of `sender` arrives at `receiver`, and nobody is told."""
        self._cuts.add((sender, receiver))
        for one, other, way in self._ways:
            if (one, other) == (sender, receiver):
                way.cut = True
                way.change()

    def isolate(self, name: str, others: str = "abcde") -> None:
        for other in others:
            if other != name:
                self.cut(name, other)
                self.cut(other, name)

    def heal(self) -> None:
        """New connections work; those that were cut have lost bytes, and break."""
        self._cuts.clear()
        for _, _, way in self._ways:
            if way.cut:
                way.broken = True
                way.change()
        self._ways = [entry for entry in self._ways if not entry[2].broken]

    async def dial(self, address: str) -> trio.abc.Stream:
        me = self._processes.owner(trio.lowlevel.current_task())
        await trio.sleep(DELAY)
        if {(me, address), (address, me)} & self._cuts:
            await trio.sleep_forever()
        if address not in self._handlers:
            raise ConnectionRefusedError(address)
        there, back = (_Way(lambda: DELAY, 1 << 20) for _ in range(2))
        self._ways += [(me, address, there), (address, me, back)]
        nursery, handler = self._handlers[address]
        nursery.start_soon(handler, CutWire(back, there))
        return CutWire(there, back)

    async def serve(self, address: str, handler: Any, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._handlers[address] = (nursery, handler)
                task_status.started(address)
                await trio.sleep_forever()
        finally:
            del self._handlers[address]


class FaultyMember(Member):
    """A replica whose process can be suspended and whose disk can hang. `shown`: (when, number) of each confirmed send."""

    cluster: FaultyCluster

    def __init__(self, cluster: FaultyCluster, name: str, config: ReplicaSetConfig) -> None:
        super().__init__(cluster, name, config)
        self.hung = False
        self.shown: list[tuple[float, int]] = []
        self.sending = trio.Event()  # the next send begins

    async def _run(self, scope: trio.CancelScope, stopped: trio.Event) -> None:
        roots = self.cluster.processes.roots
        me = trio.lowlevel.current_task()
        roots[me] = self.name
        try:
            await super()._run(scope, stopped)
        finally:
            del roots[me]

    async def _run_blocking(self, call: Callable[[], Any]) -> Any:
        while self.hung:  # noqa: ASYNC110
            await trio.sleep(0.1)
        return await super()._run_blocking(call)

    def suspend(self) -> None:
        """SIGSTOP, past the patience of ZooKeeper if it lasts."""
        self.cluster.processes.suspend(self.name)
        self.cluster.zookeeper.cut(self.coordinator, noticed=False)

    def resume(self) -> None:
        self.cluster.zookeeper.heal(self.coordinator)
        self.cluster.processes.resume(self.name)

    def produce(self) -> None:
        """From now on it commits one number after the other while it leads, in its own process, as an engine does."""
        nursery, _ = self.cluster.network._handlers[self.name]
        nursery.start_soon(self._produce)

    async def _produce(self) -> None:
        while True:
            term = self.term
            if term is None or not term.valid:
                await trio.sleep(0.01)
                continue
            number = self.cluster.next_number()
            self.sending.set()
            self.sending = trio.Event()
            try:
                await self.commit(number)
            except (LeadershipLost, StoreError):
                await trio.sleep(0.01)
                continue
            if term.valid:  # what the engine asks before it shows anything
                self.shown.append((trio.current_time(), number))
            await trio.sleep(0.02)


class DiskMember(FaultyMember):
    """A replica on a real directory: LevelDB, identity and pointer files. A crash keeps what a killed process leaves."""

    def __init__(self, cluster: FaultyCluster, name: str, config: ReplicaSetConfig, directory: Path) -> None:
        super().__init__(cluster, name, config)
        self.directory = directory / name
        self.calls = 0  # of what blocks, in this life
        self.end_at = 0  # number of the call at which the process ends, before or after it was done
        self.end_after = False
        self.ended = trio.Event()
        self.copies = self._new_copies()  # type: ignore[assignment]

    def _new_copies(self) -> DiskCopies:
        return DiskCopies(self.directory, "set", self.name, lambda: f"{self.rng.getrandbits(32):08x}")

    async def _run_blocking(self, call: Callable[[], Any]) -> Any:
        while self.hung:  # noqa: ASYNC110
            await trio.sleep(0.1)
        await trio.sleep(0.001)
        if self.ended.is_set():
            raise Crash  # the files are not touched any more
        self.calls += 1
        ends = self.calls == self.end_at
        result = call() if not ends or self.end_after else None
        if ends:
            self.ended.set()
            raise Crash
        return result

    async def _run(self, scope: trio.CancelScope, stopped: trio.Event) -> None:
        try:
            await super()._run(scope, stopped)
        except* Crash:
            pass

    def start(self) -> None:
        self.calls = 0
        self.ended = trio.Event()
        super().start()

    async def crash(self) -> None:
        self.ended.set()
        assert self.scope is not None
        self.cluster.zookeeper.kill(self.coordinator)
        self.scope.cancel()
        await self.stopped.wait()
        self.copies.close()
        self.copies = self._new_copies()  # type: ignore[assignment]

    @property
    def content(self) -> dict[bytes, bytes]:
        store = self.copies._store
        assert store is not None
        return {key: value for key, value in store.backend.iterate(FIRST, STOP) if key != fmt.META_KEY}

    def holds(self, number: int) -> bool:
        store = self.copies._store
        return store is not None and store.backend.get(put(number)[0]) is not None

    @property
    def disk_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.directory.rglob("*") if path.is_file())


class EmbeddedMember(FaultyMember):
    """A whole broker of the set, as a program embeds it."""

    broker: Broker

    def start(self) -> None:
        super().start()
        self.broker = Broker(BrokerConfig(name=self.name), Replicated(self.replica))

    async def _run(self, scope: trio.CancelScope, stopped: trio.Event) -> None:
        roots = self.cluster.processes.roots
        me = trio.lowlevel.current_task()
        roots[me] = self.name
        try:
            with scope:
                await self.broker._run(task_status=trio.TASK_STATUS_IGNORED)
        finally:
            stopped.set()
            del roots[me]

    @property
    def role(self) -> str:
        return "" if self.stopped.is_set() else self.broker.role


class FaultyCluster(Cluster):
    members: dict[str, FaultyMember]  # type: ignore[assignment]

    def __init__(self, nursery: trio.Nursery, config: ReplicaSetConfig, disks: Path | None, embedded: bool) -> None:
        super().__init__(nursery, config)
        self.processes = Processes()
        self.network = CutNetwork(self.processes)  # type: ignore[assignment]
        self.disks = disks
        self.embedded = embedded
        self.most_leaders = 0
        self._number = 0

    def add(self, name: str, **options: Any) -> FaultyMember:
        config = replace(self.config, **options)
        if self.disks is not None:
            member: FaultyMember = DiskMember(self, name, config, self.disks)
        else:
            member = (EmbeddedMember if self.embedded else FaultyMember)(self, name, config)
        self.members[name] = member
        member.start()
        return member

    def __getitem__(self, name: str) -> FaultyMember:
        return self.members[name]

    def others(self, *but: Member) -> list[FaultyMember]:
        return [member for member in self.members.values() if member not in but]

    @property
    def leaders(self) -> list[Member]:
        asleep = self.processes.suspended
        awake = [member for name, member in self.members.items() if name not in asleep]
        return [member for member in awake if member.term is not None and member.term.valid]

    def next_number(self) -> int:
        self._number += 1
        return self._number

    @property
    def confirmed(self) -> list[int]:
        """What all producers were told is safe."""
        return sorted(number for member in self.members.values() for _, number in member.shown)

    async def watch(self) -> None:
        """Look often how many may show something at one moment."""
        while True:
            self.most_leaders = max(self.most_leaders, len(self.leaders))
            await trio.sleep(0.01)


@asynccontextmanager
async def faulty(
    names: str = "abc", disks: Path | None = None, embedded: bool = False, **options: Any
) -> AsyncIterator[FaultyCluster]:
    async with trio.open_nursery() as nursery:
        cluster = FaultyCluster(nursery, replace(CONFIG, **options), disks, embedded)
        with cluster.processes.in_charge():
            await nursery.start(cluster.zookeeper.run)
            nursery.start_soon(cluster.watch)
            for name in names:
                cluster.add(name)
            try:
                yield cluster
            finally:
                for name in cluster.processes.suspended:
                    cluster.processes.resume(name)
                for member in cluster.others():
                    member.hung = False
                nursery.cancel_scope.cancel()
                await trio.lowlevel.cancel_shielded_checkpoint()
