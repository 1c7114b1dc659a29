"""One run: a set of members, ZooKeeper, a network, clients, and a story of what befalls them. Owns all of it, and the end of it.

Simulation(seed, story, ...).run()      raises Violation, or returns what happened
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from pybroker.cluster.memory import MemoryZooKeeper
from pybroker.config import ReplicaSetConfig
from tests.sim.checkers import Account, Positions
from tests.sim.clients import QUEUES, Receiver, Sender, SimClient, drain, visit
from tests.sim.member import Life, Member
from tests.sim.network import SimNetwork
from tests.sim.one_set import Options, SimSet
from tests.sim.run import END, Run

SERVICE = 30.0  # seconds from the end of all faults until a send is confirmed
WHOLE = 60.0  # ... until all members have everything again

Story = Callable[["Simulation"], Awaitable[None]]


class Simulation(SimSet, Run):
    """One run of one seed."""

    def __init__(self, seed: str, story: Story, options: Options | None = None, say: Any = None) -> None:
        super().__init__(seed, say)
        self.story = story
        self.options = options or Options()
        self.limits = self.options.limits
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

    def some_life(self, rng: random.Random) -> Life | None:
        """Where a client goes: to one that leads, mostly."""
        lives = [member.life for member in self.leaders()] if rng.random() < 0.9 else list(self.lives)
        return rng.choice(lives) if lives else None

    # ---- the run

    def sum_up(self) -> None:
        self.counts["sends confirmed"] = self.account.confirmed
        self.counts["acknowledgements confirmed"] = self.account.acked
        self.counts["deliveries repeated"] = self.account.redelivered
        self.counts["batches committed"] = self.positions.commits
        self.counts["failovers"] = len(self.positions.leaders) - 1

    async def main(self) -> float:
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
