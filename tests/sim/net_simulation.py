"""One run of a network: some sets, what links them, clients, and a story of what befalls them. Owns all of it, and its end.

NetSimulation(seed, story, options).run()      raises Violation, or returns what happened
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import trio

from pybroker.cluster.datagrams import Copies, Segment
from pybroker.config import DeliveryPolicy, Limits, ReplicaSetConfig
from pybroker.core.kinds import LINK
from pybroker.core.queue import Queue
from tests.sim.net_account import NetAccount
from tests.sim.net_clients import DEAD, MOVED, QUEUES, TOPIC, Drain, NetClient, Receiver, Sender, Subscriber, client_of
from tests.sim.net_member import NetMember, watched_network
from tests.sim.net_set import NetSet
from tests.sim.network import SimNetwork, Weather
from tests.sim.run import END, Run

HOPS_MAX = 16
WHOLE = 60.0  # seconds from the end of all faults until all sets are whole
CONVERGED = 15.0  # ... until what is sent anywhere comes to a consumer somewhere else
DRAINED = 40.0  # seconds in which everything that is left has to come to one consumer per queue
CALLS_MAX = 100  # tenths of seconds
PROBE = "/queue/probe"

Story = Callable[["NetSimulation"], Awaitable[None]]


@dataclass(frozen=True)
class NetOptions:
    """What kind of network it is.

    sizes   members of each set, by its name
    pairs   sets that are linked by addresses that were given; none: they find each other by announcements
    senders, receivers  clients of each kind
    subscribers  durable ones of the topic
    """

    sizes: dict[str, int] = field(default_factory=lambda: {"a": 1, "b": 1})
    pairs: frozenset[frozenset[str]] = frozenset()
    secret: bool = True
    senders: int = 2
    receivers: int = 2
    subscribers: int = 0
    pause: float = 0.3  # seconds, mean, between two doings of a client
    link_messages_max: int = 20
    demand_backlog_max: int = 1_000
    delivery: DeliveryPolicy = field(default_factory=DeliveryPolicy)
    limits: Limits = field(default_factory=lambda: Limits(window_messages_max=16, batch_bytes_max=64 * 1024))


def linked(*pairs: str) -> frozenset[frozenset[str]]:
    """``linked("ab", "bc")``: a with b, b with c."""
    return frozenset(map(frozenset, pairs))


def mesh(names: Sequence[str]) -> frozenset[frozenset[str]]:
    return frozenset(map(frozenset, combinations(names, 2)))


class NetSimulation(Run):
    """One run of one seed."""

    def __init__(self, seed: str, story: Story, options: NetOptions | None = None, say: Any = None) -> None:
        super().__init__(seed, say)
        self.story = story
        self.options = options or NetOptions()
        self.rng = random.Random(f"{seed} world")
        self.network = SimNetwork(random.Random(f"{seed} network"), self.count)
        self.segment = Segment(self._fate)
        self.datagrams: list[bytes] = []  # that were sent, some of them
        self.calm = True  # nothing fails before the first fault, or after the last
        self.bad_air = 0.0  # chance of a datagram that something happens to
        lease = ReplicaSetConfig(name="", zookeeper="").lease
        self.account = NetAccount(self.findings, self._later, lease, HOPS_MAX)
        self.subscribers: list[Subscriber] = []
        self._client_scopes: list[trio.CancelScope] = []
        self.sets: dict[str, NetSet] = {}
        for name, size in self.options.sizes.items():
            self.sets[name] = NetSet(self, name, size)
        self.nursery: trio.Nursery

    def __getitem__(self, name: str) -> NetMember:
        member = self.sets[name[0]].members[name]
        assert isinstance(member, NetMember)
        return member

    def _later(self, set_name: str, epoch: int) -> float | None:
        return self.sets[set_name].positions.later_than(epoch)

    def _fate(self, sender: str, receiver: str, data: bytes) -> Copies:
        """What becomes of an announcement."""
        rng = self.rng
        if len(self.datagrams) < 200 or rng.random() < 0.1:
            self.datagrams.append(data)
        if (sender, receiver) in self.network.cuts:
            return Copies(())
        delay = rng.uniform(0.0002, 0.002)
        if rng.random() >= self.bad_air:
            return Copies((delay,))
        chance = rng.random()
        if chance < 0.5:
            self.count("announcements lost")
            return Copies(())
        self.count("announcements repeated or late")
        return Copies((delay, rng.uniform(0.0, 2.0)) if chance < 0.8 else (rng.uniform(0.0, 2.0),))

    # ---- the run

    def watched(self) -> AbstractContextManager[None]:
        return watched_network(random.Random(f"{self.seed} secrets"))

    def sum_up(self) -> None:
        self.counts["sends confirmed"] = self.account.confirmed
        self.counts["acknowledgements confirmed"] = self.account.acked
        self.counts["deliveries repeated"] = self.account.redelivered
        self.counts["messages forwarded"] = self.account.forwarded

    async def main(self) -> float:
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            for each in self.sets.values():
                each.fill()
                if not each.stands_alone:
                    await nursery.start(each.zookeeper.run)
            with self.over, trio.move_on_after(END) as limit:
                await self.story(self)
            if limit.cancelled_caught:
                self.findings.add("the run does not come to its end")
            seconds = trio.current_time()
            for member in self.all_members():
                member.kill()
            nursery.cancel_scope.cancel()
        return seconds

    def all_members(self) -> Iterator[NetMember]:
        for each in self.sets.values():
            yield from each.members.values()

    def describe(self) -> str:
        return "; ".join([*(each.describe() for each in self.sets.values()), *self.demanded()])

    # ---- parts of stories

    def start_all(self) -> None:
        for each in self.sets.values():
            if not each.absent:
                each.start_all()

    def start_clients(self) -> None:
        """Each knows the members of one set or of all; with announcements some know nobody."""
        options, rng = self.options, self.rng
        all_names = [member.name for member in self.all_members()]
        clients: list[NetClient] = []

        def known() -> list[str]:
            if not options.pairs and rng.random() < 0.3:
                return []
            return all_names if rng.random() < 0.3 else self.sets[rng.choice(list(self.sets))].names

        for number in range(options.senders):
            clients.append(Sender(self, f"s{number}", known()))
        for number in range(options.receivers):
            clients.append(Receiver(self, f"r{number}", known(), (*QUEUES, MOVED)[number % 3]))
        for client in clients:
            self.run_client(client)

    async def subscribe_all(self) -> None:
        """Let all durable subscribers subscribe, and wait until each gets what is sent at any set: from then on it gets all."""
        for number in range(self.options.subscribers):
            home = self.rng.choice(list(self.sets.values()))
            self.subscribers.append(Subscriber(self, f"u{number}", home.names))
            self.run_client(self.subscribers[-1])
        names = [each.name for each in self.subscribers]
        self.account.subscribers = names
        for each in self.sets.values():
            heard: set[str] = set()
            number = 0
            async with client_of(self, f"caller {each.name}", each.names, self.rng) as client:
                while len(heard) < len(names):
                    number += 1
                    if number > CALLS_MAX:
                        self.findings.add(f"durable demand does not come to {each.name}: {heard} of {names}")
                        return
                    name, body = f"call{each.name}-{number}", f"call{each.name}-{number}|".encode()
                    self.account.attempt(name, body, ())
                    await client.send(TOPIC, body)
                    await trio.sleep(0.1)
                    heard |= {who for who, copy in self.account.sent[name].copies.items() if copy.deliveries}

    def run_client(self, client: NetClient) -> None:
        """Until `finish` ends all clients."""

        scope = trio.CancelScope()
        self._client_scopes.append(scope)

        async def run() -> None:
            with scope:
                await client.run()

        self.nursery.start_soon(run)

    def heal(self) -> None:
        """End all faults."""
        self.trace("all is well")
        self.calm = True
        self.bad_air = 0.0
        self.network.weather = Weather()
        self.network.chokes.clear()
        self.network.heal()
        for each in self.sets.values():
            each.zookeeper.fate = None
            each.zookeeper.spread = lambda: 0.0
            each.zookeeper.up()
            for member in each.members.values():
                member.disk.full = False
                member.disk.fails = 0
                member.disk.slow = 0.0
                if member.life is not None:
                    member.life.go_on()
                    each.zookeeper.heal(member.life.coordinator)
        self.nursery.start_soon(self._supervise)

    async def _supervise(self) -> None:
        while True:
            self.start_all()
            await trio.sleep(0.5)

    async def serving(self, name: str) -> NetMember:
        """Who serves in a set; waits for one."""
        while True:
            member = self.sets[name].serving()
            if member is not None:
                return member
            await trio.sleep(0.02)

    def end_clients(self) -> None:
        for scope in self._client_scopes:
            scope.cancel()
        self._client_scopes.clear()

    async def finish(self) -> None:
        """All is well from now on: everything that is sent anywhere comes to whoever wants it, and nothing is left."""
        self.heal()
        await self.until(self.is_whole, WHOLE, "not all sets are whole again")
        self.end_clients()
        await self.check_convergence()
        await self.drain()
        self.account.settle()
        self.end_clients()
        await self.until(
            lambda: not self.demanded(), CONVERGED, "nobody consumes a queue any more, and there is demand"
        )

    def is_whole(self) -> bool:
        return all(each.is_whole() for each in self.sets.values())

    def live_sets(self) -> list[NetSet]:
        return [each for each in self.sets.values() if not each.absent]

    async def check_convergence(self) -> None:
        """A new consumer somewhere gets what is sent everywhere else."""
        began = trio.current_time()
        live = self.live_sets()
        home = self.rng.choice(live)
        self.run_client(Drain(self, "probe", home.names, PROBE))
        names = []
        with trio.move_on_after(CONVERGED):
            for each in live:
                name, body = f"probe{each.name}-1", f"probe{each.name}-1|".encode()
                names.append(name)
                self.account.attempt(name, body)
                async with client_of(self, f"prober {each.name}", each.names, self.rng) as client:
                    await client.send(PROBE, body)
                self.account.confirm(name, trio.current_time())
        left = max(0.0, began + CONVERGED - trio.current_time())
        await self.until(
            lambda: all(self.account.sent[name].copy().acked_at is not None for name in names),
            left,
            f"what was sent anywhere did not come to a consumer at {home.name} ({', '.join(names)})",
        )
        self.trace(f"demand has converged after {trio.current_time() - began:.3f} s")
        if trio.current_time() - began > 5.0:
            self.count("convergences that took more than 5 s")

    async def drain(self) -> None:
        """One consumer for each queue, somewhere, gets everything that is left anywhere."""
        for queue in (*QUEUES, MOVED, DEAD):
            home = self.rng.choice(self.live_sets())
            self.run_client(Drain(self, f"drain{queue[7:]}", home.names, queue))
        for subscriber in self.subscribers:
            self.run_client(subscriber)
        with trio.move_on_after(DRAINED) as late:
            while self.account.waiting() or self.left():  # noqa: ASYNC110
                await trio.sleep(0.05)
        if late.cancelled_caught:
            self.findings.add(
                f"there are consumers, and this does not come to them: {self.account.waiting()[:3]}; {self.left()[:6]}"
            )

    def demanded(self) -> list[str]:
        """Demand for queues that sets know of others."""
        found = []
        for each in self.live_sets():
            member = each.serving()
            if member is not None and member.engine is not None:
                found += [f"{each.name}: {destination}" for destination in member.engine.core.links._wanted]
        return found

    def left(self) -> list[str]:
        """What is in the queues of those that serve."""
        found = []
        for each in self.live_sets():
            member = each.serving()
            engine = member.engine if member is not None else None
            if engine is None:
                found.append(f"{each.name} does not serve")
                continue
            found += [f"{each.name}: {shown(queue)}" for queue in engine.core.queues.values() if queue.depth]
        return found


def shown(queue: Queue) -> str:
    where = f"on the way to {queue.name}" if queue.kind == LINK else f"in {queue.name}"
    return f"{queue.depth} {where} ({len(queue.outstanding)} out, {len(queue.stranded)} at the hop limit)"
