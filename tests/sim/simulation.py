"""One run: a set of members, ZooKeeper, a network, clients, and a story of what befalls them. Owns all of it, and the end of it.

Simulation(seed, story, ...).run()      raises Violation, or returns what happened
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from pybroker.cluster.memory import Fate, MemoryZooKeeper
from pybroker.cluster.registry import View, parse_view
from pybroker.config import Limits, ReplicaSetConfig
from tests.sim import schedule
from tests.sim.checkers import Account, Findings, Positions, Violation
from tests.sim.clients import QUEUES, Receiver, Sender, SimClient, drain, visit
from tests.sim.member import WALL_CLOCK, Life, Member, watched
from tests.sim.network import SimNetwork

SERVICE = 30.0  # seconds from the end of all faults until a send is confirmed
WHOLE = 60.0  # ... until all members have everything again
END = 1_000.0  # seconds after which no run goes on

Story = Callable[["Simulation"], Awaitable[None]]


@dataclass(frozen=True)
class Options:
    """What kind of set it is. Times in seconds."""

    names: str = "abc"
    sync: Any = "quorum_disk"
    session_timeout: float = 4.0
    request_timeout: float = 1.0
    heartbeat_interval: float = 0.3
    ring_bytes_max: int = 64 * 1024 * 1024
    weights: tuple[int, ...] = (0, 0, 0)
    senders: int = 2
    receivers: int = 2
    pause: float = 0.4  # mean, between two doings of a client
    forgets: bool = True  # a process takes unsynced writes with it
    limits: Limits = field(default_factory=lambda: Limits(window_messages_max=16, batch_bytes_max=64 * 1024))


@dataclass
class Result:
    """What happened. `digest` is of the whole trace."""

    counts: Counter[str]
    digest: str
    trace: list[str]
    seconds: float


class Simulation:
    """One run of one seed."""

    def __init__(self, seed: str, story: Story, options: Options | None = None, say: Any = None) -> None:
        self.seed = seed
        self.story = story
        self.options = options or Options()
        self.limits = self.options.limits
        self.counts: Counter[str] = Counter()
        self.traced: list[str] = []
        self.say = say
        self.errors: list[BaseException] = []
        self.clients = trio.CancelScope()
        self.over = trio.CancelScope()
        self.findings = Findings(self.over.cancel)
        sync = self.options.sync
        self.positions = Positions(self.findings, sync.startswith("quorum"))
        lease = ReplicaSetConfig(name="", zookeeper="").lease
        self.account = Account(self.findings, self.positions, lease, sync.startswith("quorum"))
        self.network = SimNetwork(random.Random(f"{seed} network"), self.count)
        self.zookeeper = MemoryZooKeeper(
            session_timeout=self.options.session_timeout, request_timeout=self.options.request_timeout
        )
        self._zookeeper_rng = random.Random(f"{seed} zookeeper")
        self.zookeeper.delay = lambda: self._zookeeper_rng.uniform(0.0005, 0.003)
        self.members: dict[str, Member] = {}
        self.nursery: trio.Nursery

    # ---- for all

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def trace(self, text: str) -> None:
        line = f"{trio.current_time():9.4f} {text}"
        self.traced.append(line)
        if self.say is not None:
            self.say(line)

    def wall_clock_ms(self) -> int:
        return WALL_CLOCK + int(trio.current_time() * 1000)

    def set_config(self, name: str) -> ReplicaSetConfig:
        options = self.options
        return ReplicaSetConfig(
            name="set",
            zookeeper="simulated",
            replicas=len(options.names),
            bind=name,
            clients=(f"stomp://{name}",),
            sync=options.sync,
            weight=options.weights[options.names.index(name) % len(options.weights)],
            secret="between us",
            session_timeout=options.session_timeout,
            heartbeat_interval=options.heartbeat_interval,
            ring_bytes_max=options.ring_bytes_max,
        )

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    @property
    def view(self) -> View:
        return parse_view(self.zookeeper.nodes)

    @property
    def lives(self) -> list[Life]:
        return [member.life for member in self.members.values() if member.life is not None]

    def leaders(self) -> list[Member]:
        return [member for member in self.members.values() if member.leads]

    def some_life(self, rng: random.Random) -> Life | None:
        """Where a client goes: to one that leads, mostly."""
        lives = [member.life for member in self.leaders()] if rng.random() < 0.9 else list(self.lives)
        return rng.choice(lives) if lives else None

    # ---- the run

    def run(self) -> Result:
        """Run to the end; raises Violation with what was found first."""
        log = logging.getLogger("pybroker")
        handler = _Listener(self)
        before = (log.level, log.propagate)
        log.setLevel(logging.INFO if self.say is not None else logging.ERROR)
        log.propagate = False
        log.addHandler(handler)
        try:
            with watched():
                seconds = schedule.run(self.seed, self._main, self.findings.add)
        finally:
            log.removeHandler(handler)
            log.setLevel(before[0])
            log.propagate = before[1]
        if self.findings.texts:
            raise Violation("; ".join(self.findings.texts)) from (self.errors[0] if self.errors else None)
        self.counts["sends confirmed"] = self.account.confirmed
        self.counts["acknowledgements confirmed"] = self.account.acked
        self.counts["deliveries repeated"] = self.account.redelivered
        self.counts["batches committed"] = self.positions.commits
        self.counts["failovers"] = len(self.positions.leaders) - 1
        digest = hashlib.sha256("\n".join(self.traced).encode()).hexdigest()
        return Result(self.counts, digest, self.traced, seconds)

    async def _main(self) -> float:
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            await nursery.start(self.zookeeper.run)
            for name in self.options.names:
                self.members[name] = Member(self, name)
                self.members[name].disk.forgets = self.options.forgets
            with self.over, trio.move_on_after(END) as limit:
                await self.story(self)
            if limit.cancelled_caught:
                self.findings.add("the run does not come to its end")
            seconds = trio.current_time()
            for member in self.members.values():
                member.kill()
            nursery.cancel_scope.cancel()
        return seconds

    # ---- parts of stories

    def start_all(self) -> None:
        for member in self.members.values():
            if member.life is None:
                member.start()

    def start_clients(self) -> None:
        self.nursery.start_soon(self._run_clients)

    async def _run_clients(self) -> None:
        options = self.options
        clients: list[SimClient] = [Sender(self, f"s{number}", options.pause) for number in range(options.senders)]
        for number in range(options.receivers):
            clients.append(Receiver(self, f"r{number}", options.pause, QUEUES[number % len(QUEUES)]))
        with self.clients:
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(client.run)

    def heal(self) -> None:
        """End all faults."""
        self.trace("all is well")
        self.network.weather = type(self.network.weather)()
        self.network.heal()
        self.zookeeper.fate = None
        self.zookeeper.spread = lambda: 0.0
        self.zookeeper.up()
        for member in self.members.values():
            member.disk.full = False
            member.disk.fails = 0
            member.disk.slow = 0.0
            life = member.life
            if life is not None:
                life.go_on()
                self.zookeeper.heal(life.coordinator)
        self.nursery.start_soon(self._supervise)

    async def _supervise(self) -> None:
        """What ended is started again."""
        while True:
            self.start_all()
            await trio.sleep(0.5)

    async def finish(self) -> None:
        """All is well from now on: service returns in time, nothing is lost, and all members agree."""
        self.heal()
        began = trio.current_time()
        with trio.move_on_after(SERVICE) as late:
            await self.probe("after")
        if late.cancelled_caught:
            roles = {member.name: member.role for member in self.members.values()}
            self.findings.add(f"no send was confirmed within {SERVICE:g} s after all faults had ended ({roles})")
            return
        self.trace(f"service is back after {trio.current_time() - began:.3f} s")
        self.clients.cancel()
        await self.until(self.is_whole, WHOLE, "not all members are whole again")
        left: dict[str, int] = {}
        for _ in range(2):
            await drain(self, await self.leader(), left, 0.5)
        await self.until(self.is_whole, WHOLE, "not all members are whole at the end")
        stored = [name for member in self.members.values() for name in member.disk.messages()]
        self.account.settle(left, stored)

    async def probe(self, name: str) -> None:
        """Send until one send is confirmed."""
        number = 0
        confirmed = trio.Event()

        async def work(life: Life, client: Any) -> None:
            body = f"{name}{number}|".encode()
            self.account.attempt(f"{name}{number}", QUEUES[0], body)
            sent = await client.send(QUEUES[0], body)
            self.account.confirm(f"{name}{number}", sent.message_id, sent.durable, trio.current_time())
            confirmed.set()

        while not confirmed.is_set():
            number += 1
            with trio.move_on_after(3.0):
                await visit(self, await self.leader(), work)
            if not confirmed.is_set():
                await trio.sleep(0.05)

    async def leader(self) -> Life:
        """Whoever serves clients; waits for one."""
        while True:
            leaders = self.leaders()
            if leaders:
                life = max(leaders, key=lambda member: member.life.replica.epoch if member.life else 0).life
                assert life is not None
                return life
            await trio.sleep(0.02)

    async def until(self, condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
        """Wait until something is so; it is a violation if that takes too long."""
        with trio.move_on_after(seconds) as late:
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.02)
        if late.cancelled_caught:
            self.findings.add(f"{otherwise} after {seconds:g} s: {self.describe()}")
            await trio.sleep_forever()

    def is_whole(self) -> bool:
        """One leads, all others follow and count, and all stores are at one position.

        Where ZooKeeper's data were lost the set serves on without them, and whoever was away stays away until the leader's end.
        """
        view, lives = self.view, self.lives
        leaders = self.leaders()
        if len(leaders) != 1 or len(lives) != len(self.members):
            return False
        leader = leaders[0].life
        assert leader is not None
        following = [life for life in lives if life.broker.role == "follower" or life is leader]
        if view.epoch < leader.replica.epoch:
            if len(following) <= len(lives) // 2:
                return False
        elif any(view.roster.get(life.member.name) != life.copies.identity.incarnation for life in lives) or len(
            following
        ) < len(lives):
            return False
        return len({life.replica.position for life in following}) == 1

    def describe(self) -> str:
        parts = []
        for member in self.members.values():
            life = member.life
            position = tuple(life.replica.position or ()) if life is not None else ""
            parts.append(f"{member.name} {member.role} {position} {member.refused}".strip())
        return ", ".join(parts) + f"; roster {dict(self.view.roster)}"

    def may_lose_disk(self, name: str) -> bool:
        """Whether a quorum of other copies counts and is whole: more must not be lost (promise P1)."""
        roster = self.view.roster
        for member in self.members.values():
            copies = member.disk.copies
            identity = copies.identity if copies is not None else member.disk.identity
            backend = copies.backend if copies is not None else member.disk.backend
            if member.name != name and (
                identity is None
                or identity.incarnation == member.disk.lost
                or roster.get(member.name) != identity.incarnation
                or member.disk.is_damaged(backend)
            ):
                return False
        return True

    def has_lived_since(self, name: str, starts: int) -> bool:
        """Whether ZooKeeper has seen a later start of that member: a backup of the present life can't be told from it."""
        found = self.view.slots.get(name)
        return found is not None and found[0].starts > starts

    def late_writes(self, rng: random.Random, lost: float, unanswered: float, slow: float) -> None:
        """ZooKeeper's connections are bad: chances of a request that is lost, done but not answered, or slow."""

        def fate(name: str, writes: Sequence[Any]) -> Fate | None:
            chance = rng.random()
            if chance < lost:
                return Fate(None, None)
            if chance < lost + unanswered and writes:
                self.count("writes to ZooKeeper that were not answered")
                return Fate(rng.uniform(0, 4.0), None)
            if chance < lost + unanswered + slow:
                return Fate(rng.uniform(0, 0.4), rng.uniform(0, 0.4))
            return None

        self.zookeeper.fate = fate


class _Listener(logging.Handler):
    """What the program logs: a fault of the program is a violation."""

    def __init__(self, sim: Simulation) -> None:
        super().__init__(logging.INFO)
        self.sim = sim

    def emit(self, record: logging.LogRecord) -> None:
        process = schedule.PROCESS.get()
        if process is not None and process.dead:
            return
        if self.sim.say is not None:
            self.sim.say(f"{trio.current_time():9.4f}   log: {record.getMessage()}")
        if record.exc_info is not None and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self.sim.findings.add(f"{record.getMessage()}: {error!r}")
            self.sim.errors.append(error)
