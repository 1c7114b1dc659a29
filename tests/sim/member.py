"""One member of the simulated set: a machine with a disk, on which processes live one after the other. Owns starting and killing them.

Each process is a whole broker of the real code over a simulated network, disk, ZooKeeper and clocks. What the checkers
must know is told to them here, by the few methods of the real classes that are watched while a run lasts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import trio

from pybroker import broker as broker_module
from pybroker.broker import Broker
from pybroker.cluster import catchup
from pybroker.cluster import leader as leader_module
from pybroker.cluster.lease_clock import LeaseClock
from pybroker.cluster.replica import Replica
from pybroker.cluster.term import Term
from pybroker.config import BrokerConfig
from pybroker.engine import Engine
from pybroker.errors import ConfigurationError, StoreError
from pybroker.local_client import LocalClient
from pybroker.replicated import Replicated
from tests.sim.disk import MASK, Disk, SimBackend
from tests.sim.schedule import PROCESS, Process

if TYPE_CHECKING:
    from tests.sim.one_set import SimSet

WINDOW_BYTES = 4_000  # small, or the small stores of a run would be brought up in one step
CHUNK_BYTES = 1_000
WALL_CLOCK = 1_700_000_000_000  # milliseconds since the Unix epoch at which a run begins


class Killed(Exception):
    """The process of this task is gone: nothing that it still does has any effect."""


class Life(Process):
    """One process of a member, from its start to its end."""

    def __init__(self, member: Member, number: int) -> None:
        super().__init__(f"{member.name}.{number}")
        self.member = member
        self.sim = member.sim
        self.rng = random.Random(f"{self.sim.seed} {self.name}")
        self.scope = trio.CancelScope()
        self.stopping = False
        self.scope_of_stop = trio.CancelScope()
        self.ended = trio.Event()
        self.visits: dict[trio.CancelScope, None] = {}  # of clients
        self.asleep = 0.0  # seconds for which the machine was suspended
        self.copies = member.disk.insert()
        self.coordinator = self.sim.zookeeper.connect(member.name)
        self._writing = trio.Lock()
        self._reading = trio.Lock()
        self.make_broker()

    def make_broker(self) -> None:
        self.replica = self.make_replica()
        self.broker = Broker(BrokerConfig(name=self.member.name, limits=self.sim.limits), Replicated(self.replica))

    def make_replica(self) -> Replica:
        member = self.member
        return Replica(
            member.config,
            member.name,
            self.copies,
            self.coordinator,
            self.sim.network.port(member.name),
            run_blocking=self.run_writing,
            run_reading=partial(self._run_blocking, self._reading),
            rng=self.rng,
        )

    @property
    def settled(self) -> bool:
        """Whether it has come as far as to have a store."""
        return self.replica.position is not None

    def clock_ms(self) -> int:
        return WALL_CLOCK + int(trio.current_time() * 1000) + self.member.clock_ms

    async def run_writing(self, call: Callable[[], Any]) -> Any:
        return await self._run_blocking(self._writing, call)

    async def _run_blocking(self, lock: trio.Lock, call: Callable[[], Any]) -> Any:
        """As a worker thread does: one call at a time, which nothing cancels once it has begun."""
        async with lock:
            with trio.CancelScope(shield=True):
                await trio.sleep(self.member.disk.latency())
                if self.dead:
                    raise Killed
                try:
                    return call()
                finally:
                    await trio.sleep(self.member.disk.latency())
                    if self.dead:
                        raise Killed

    def stand_still(self) -> None:
        """As after SIGSTOP. What was sent to ZooKeeper is still answered, and its session ends in its time."""
        self.sim.trace(f"{self.name} stands still")
        self.sim.count("pauses")
        self.sim.zookeeper.cut(self.coordinator, requests=True, answers=False, noticed=False)
        self.pause()

    def go_on(self) -> None:
        if self.paused and not self.dead:
            self.sim.trace(f"{self.name} goes on")
            self.sim.zookeeper.heal(self.coordinator)
            self.resume()

    async def stop(self) -> None:
        """As `serve` does at SIGTERM."""
        self.stopping = True
        with self.scope_of_stop:
            await self.broker._stop()

    async def run(self) -> None:
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.broker._run)
                    self.sim.trace(f"{self.name} runs")
                    async for role, epoch in self.broker.roles():
                        self.sim.trace(f"{self.name} is {role} (epoch {epoch})")
                        if role == "stopped":
                            await self.broker._stopped.wait()
                            break
        except BaseException as error:
            if isinstance(error, trio.Cancelled):
                raise
            if not self.dead:
                self._died_of(error)
        finally:
            self.member.gone(self)
            self.ended.set()

    def _died_of(self, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        self.sim.trace(f"{self.name} ended: {error!r}")
        if isinstance(error, ConfigurationError):
            self.member.refused = str(error)
        elif not isinstance(error, StoreError):
            self.sim.findings.add(f"{self.name} ended with {error!r}")
            self.sim.errors.append(error)


class Member:
    """A machine. `clock_ms`: by how much its wall clock is wrong; `epochs`: those it led."""

    def __init__(self, sim: SimSet, name: str) -> None:
        self.sim = sim
        self.name = name
        self.config = sim.set_config(name)
        self.rng = random.Random(f"{sim.seed} member {name}")
        self.disk = Disk(
            self.config.name,
            name,
            self.rng,
            sim.count,
            sim.positions.stored,
            lambda: sim.counts["bits flipped on a disk"] > 0,
        )
        self.clock_ms = 0
        self.life: Life | None = None
        self.lives = 0
        self.refused = ""

    def start(self) -> Life:
        assert self.life is None
        self.lives += 1
        self.sim.network.restore(self.name)
        life = self.new_life(self.lives)
        self.life = life
        self.sim.trace(f"{life.name} starts")
        life.start_soon(self.sim.nursery, life.run)
        return life

    def new_life(self, number: int) -> Life:
        return Life(self, number)

    def kill(self, silently: bool = False) -> None:
        """The process ends, now. `silently`: and the machine with it, so that nobody hears its connections break."""
        if self.life is not None:
            self.sim.count("kills")
            self._end("is killed silently" if silently else "is killed", silently)

    def _end(self, how: str, silently: bool = False) -> None:
        life = self.life
        assert life is not None
        self.sim.trace(f"{life.name} {how}")
        for visit in life.visits:
            visit.cancel()
        life.dead = True
        self.life = None
        self.sim.zookeeper.kill(life.coordinator)
        self.sim.network.remove(self.name, silently)
        self.disk.remove()
        life.resume()
        life.scope.cancel()
        life.scope_of_stop.cancel()

    def gone(self, life: Life) -> None:
        """A process has ended by itself."""
        if self.life is life:
            self._end("has ended")

    @property
    def leads(self) -> bool:
        """Whether it serves clients now."""
        life = self.life
        return life is not None and not life.paused and life.broker.role == "leader"

    @property
    def role(self) -> str:
        return self.life.broker.role if self.life is not None else "dead"


# ---- what is watched


def _life() -> Life:
    life = PROCESS.get()
    assert isinstance(life, Life)
    return life


class _WatchedTerm(Term):
    """Tells who was elected, and what was confirmed."""

    _plain_init = Term.__init__
    _plain_commit = Term.commit

    @staticmethod
    def init(self: Any, epoch: int, *arguments: Any, **options: Any) -> None:
        _WatchedTerm._plain_init(self, epoch, *arguments, **options)
        life = _life()
        if not life.dead:
            life.sim.trace(f"{life.name} is elected in epoch {epoch}")
            life.sim.count("elections")
            forgotten = life.sim.counts["times that ZooKeeper was wiped"] > 0
            life.sim.positions.elected(epoch, life.name, trio.current_time(), forgotten)

    @staticmethod
    async def commit(self: Any, batch: Any) -> None:
        await _WatchedTerm._plain_commit(self, batch)
        life = _life()
        backend = life.copies.backend
        if not life.dead and isinstance(backend, SimBackend):
            life.sim.trace(f"{life.name} commits {batch.position}")
            if backend.position == batch.position and not backend.damaged:
                fingerprint = backend.fingerprint & MASK
                life.sim.positions.confirmed(life.name, batch.position, fingerprint, backend.history)


_plain_deliver = LocalClient.deliver


def _deliver(self: LocalClient, consumer: Any, entry: Any) -> None:
    note_delivery(self._running, consumer, entry)
    _plain_deliver(self, consumer, entry)


def note_delivery(engine: Engine, consumer: Any, entry: Any) -> None:
    """A broker hands a message to a client."""
    assert isinstance(engine, _Engine)
    life = engine.life
    if not life.dead:
        sim, message = life.sim, entry.message
        queue = consumer.queue.client_id or consumer.queue.name  # a durable subscriber is known by its client
        sim.trace(f"{life.name} delivers {message.body[:8]!r} of {queue}")
        where = (life.name, engine.journal.position[0], queue)
        message_id = message.message_id.decode()
        sim.account.deliver(where, message_id, message.body, entry.deliveries > 0, trio.current_time())


class _Engine(Engine):
    """An engine that knows its process."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.life = _life()
        name = self.life.rng.randbytes(8).hex()
        super().__init__(*arguments, **options, clock_ms=self.life.clock_ms, life=lambda: name)


def _lease_clock(*_: Any) -> LeaseClock:
    life = _life()
    return LeaseClock(lambda: life.asleep)


async def _close(store: Any) -> None:
    store.close()


@contextmanager
def watched() -> Iterator[None]:
    """While a run lasts, the real classes tell the checkers; no thread and no clock of this machine is used."""
    with (
        mock.patch.object(Term, "__init__", _WatchedTerm.init),
        mock.patch.object(Term, "commit", _WatchedTerm.commit),
        mock.patch.object(LocalClient, "deliver", _deliver),
        mock.patch.object(broker_module, "Engine", _Engine),
        mock.patch.object(broker_module, "close_store", _close),
        mock.patch.object(broker_module, "version", lambda _: "simulated"),
        mock.patch.object(leader_module, "LeaseClock", _lease_clock),
        mock.patch.object(catchup, "WINDOW_BYTES", WINDOW_BYTES),
        mock.patch.object(catchup.chunks, "digests", partial(catchup.chunks.digests, chunk_bytes=CHUNK_BYTES)),
    ):
        yield
