"""What befalls a simulated set: single faults, and the random stories that are made of them. Owns no rule of the set.

A fault ends by itself after a while; several may go on at a time. Lost disks are the exception: never more than the set
promises to bear (`Simulation.may_lose_disk`). Each story has a mood: most faults rare, some of them frequent.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import trio

from tests.sim.member import Member
from tests.sim.network import Weather
from tests.sim.one_set import Options, SimSet
from tests.sim.simulation import Simulation

Fault = Callable[["Faults"], Awaitable[None]]

# How often each fault comes, beside the others, before a mood changes it
WEIGHTS = {
    "kill": 3.0,
    "kill_two": 0.7,
    "power": 0.7,
    "wipe": 0.7,
    "restore": 0.6,
    "pause": 2.0,
    "cut": 2.0,
    "cut_one_way": 2.0,
    "isolate": 2.0,
    "reset": 2.0,
    "stall": 1.5,
    "storm": 1.0,
    "lose_zookeeper": 1.5,
    "expire": 1.0,
    "zookeeper_down": 0.7,
    "bad_zookeeper": 1.0,
    "failing_write": 1.0,
    "full_disk": 0.7,
    "slow_disk": 1.0,
    "flip_bit": 0.4,
    "hand_over": 0.7,
    "stop": 0.7,
    "clock": 0.7,
    "wipe_zookeeper": 0.15,
}


class Faults:
    """The faults of one story, with the random choices of its seed."""

    def __init__(self, sim: SimSet) -> None:
        self.sim = sim
        self.rng = random.Random(f"{sim.seed} faults")

    def member(self) -> Member:
        """Some member, the leader more often."""
        leaders = self.sim.leaders()
        if leaders and self.rng.random() < 0.4:
            return self.rng.choice(leaders)
        return self.rng.choice(list(self.sim.members.values()))

    def pair(self) -> tuple[str, str]:
        one, other = self.rng.sample(list(self.sim.members), 2)
        return one, other

    async def sleep(self, low: float, high: float) -> None:
        await trio.sleep(self.rng.uniform(low, high))

    async def start(self, member: Member) -> None:
        if member.life is None:
            member.start()

    # ---- processes and disks

    async def kill(self) -> None:
        member = self.member()
        member.kill(self.rng.random() < 0.3)
        await self.sleep(0.02, self.rng.choice((0.5, 3.0)))
        await self.start(member)

    async def kill_two(self) -> None:
        await self._kill_many(2)

    async def power(self) -> None:
        await self._kill_many(len(self.sim.members))

    async def _kill_many(self, count: int) -> None:
        members = self.rng.sample(list(self.sim.members.values()), count)
        silently = self.rng.random() < 0.5
        for member in members:
            member.kill(silently)
        self.rng.shuffle(members)
        for member in members:
            await self.sleep(0.0, 1.0)
            await self.start(member)

    async def wipe(self) -> None:
        member = self.member()
        if self.sim.may_lose_disk(member.name):
            member.kill(self.rng.random() < 0.3)
            member.disk.wipe()
            self.sim.trace(f"the disk of {member.name} is wiped")
            self.sim.count("disks wiped")
            await self.sleep(0.0, 1.5)
            await self.start(member)

    async def restore(self) -> None:
        """A copy of the disk is made now, and put back in a later life of its member."""
        member = self.member()
        backup = member.disk.back_up()
        await self.sleep(0.3, 5.0)
        if backup is None or not self.sim.may_lose_disk(member.name):
            return
        member.kill(self.rng.random() < 0.3)
        await self.sleep(0.0, 1.0)
        await self.start(member)
        await self.sleep(0.0, 2.0)
        if self.sim.may_lose_disk(member.name) and self.sim.has_lived_since(member.name, backup.identity.starts):
            member.kill(self.rng.random() < 0.3)
            member.disk.restore(backup)
            self.sim.trace(f"the disk of {member.name} is restored from a backup")
            self.sim.count("disks restored")
            await self.sleep(0.0, 1.5)
            await self.start(member)

    async def pause(self) -> None:
        life = self.member().life
        if life is not None and not life.paused:
            life.stand_still()
            await self.sleep(0.05, self.rng.choice((0.5, 3.0, 8.0)))
            life.go_on()

    async def stop(self) -> None:
        """SIGTERM, and a new start."""
        member = self.member()
        life = member.life
        if life is None or life.paused or life.stopping or not life.settled:
            return
        self.sim.trace(f"{life.name} is asked to stop")
        self.sim.count("stops")
        life.start_soon(self.sim.nursery, life.stop)
        await life.ended.wait()
        await self.sleep(0.0, 1.0)
        await self.start(member)

    async def hand_over(self) -> None:
        for member in self.sim.leaders():
            if member.life is not None:
                self.sim.trace(f"{member.life.name} is asked to hand over")
                self.sim.count("hand-overs")
                member.life.replica.hand_over()

    async def clock(self) -> None:
        self.member().clock_ms += self.rng.choice((-3_600_000, -5_000, 5_000, 30_000))
        self.sim.count("clock jumps")

    # ---- network

    async def cut(self) -> None:
        one, other = self.pair()
        await self._cut([(one, other), (other, one)])

    async def cut_one_way(self) -> None:
        await self._cut([self.pair()])

    async def isolate(self) -> None:
        member = self.member()
        name = member.name
        others = [other for other in self.sim.members if other != name]
        how = self.rng.random()
        pairs = [(name, other) for other in others] if how < 0.7 else []
        pairs += [(other, name) for other in others] if not 0.4 < how < 0.7 else []
        if self.rng.random() < 0.5:
            self.sim.nursery.start_soon(self._lose_zookeeper, member)
        await self._cut(pairs)

    async def _cut(self, pairs: list[tuple[str, str]]) -> None:
        self.sim.trace(f"cut: {', '.join(f'{one} to {other}' for one, other in pairs)}")
        self.sim.count("cuts")
        for pair in pairs:
            self.sim.network.cut(*pair)
        await self.sleep(0.1, self.rng.choice((1.0, 6.0)))
        self.sim.network.heal(*pairs)
        if self.rng.random() < 0.3:  # the connections did not live through it
            for one, other in pairs:
                self.sim.network.reset(one, other)

    async def reset(self) -> None:
        one, other = self.pair()
        self.sim.trace(f"connections between {one} and {other} are reset")
        self.sim.network.reset(one, other, self.rng.choice(("both", "both", one, other)))

    async def stall(self) -> None:
        one, other = self.pair()
        seconds = self.rng.uniform(0.1, 3.0)
        self.sim.trace(f"what {one} sends to {other} is held up for {seconds:.2f} s")
        self.sim.network.stall(one, other, seconds)

    async def storm(self) -> None:
        network = self.sim.network
        chance = self.rng.choice
        network.weather = Weather(
            delay=chance((0.001, 0.02, 0.1)),
            spike=chance((0.0, 0.01, 0.1)),
            tear=chance((0.05, 0.5)),
            flip=chance((0.0, 0.0, 0.02)),
            ghost=chance((0.0, 0.2, 0.5)),
            replay=chance((0.0, 0.7)),
            misroute=chance((0.0, 0.0, 0.1)),
        )
        self.sim.trace(f"{network.weather}")
        await self.sleep(0.5, 4.0)
        network.weather = Weather()

    # ---- ZooKeeper

    async def lose_zookeeper(self) -> None:
        await self._lose_zookeeper(self.member())

    async def _lose_zookeeper(self, member: Member) -> None:
        life = member.life
        if life is None or life.paused:
            return
        self.sim.trace(f"{life.name} is cut off from ZooKeeper")
        requests, answers = self.rng.choice(((True, True), (True, True), (True, False), (False, True)))
        self.sim.zookeeper.cut(
            life.coordinator,
            requests=requests,
            answers=answers,
            noticed=requests and answers and self.rng.random() < 0.5,
        )
        await self.sleep(0.1, self.rng.choice((1.0, 8.0)))
        if not life.dead and not life.paused:
            self.sim.zookeeper.heal(life.coordinator)

    async def expire(self) -> None:
        life = self.member().life
        if life is not None:
            self.sim.trace(f"the session of {life.name} expires")
            self.sim.count("sessions expired")
            self.sim.zookeeper.expire(life.coordinator)

    async def zookeeper_down(self) -> None:
        self.sim.trace("ZooKeeper is away")
        self.sim.count("times without ZooKeeper")
        self.sim.zookeeper.down()
        await self.sleep(0.2, 5.0)
        self.sim.zookeeper.up()

    async def bad_zookeeper(self) -> None:
        self.sim.trace("ZooKeeper's connections are bad")
        rng = random.Random(self.rng.random())
        self.sim.late_writes(rng, *(self.rng.choice((0.0, 0.05, 0.2)) for _ in range(3)))
        spread = self.rng.choice((0.0, 0.02, 0.1))
        self.sim.zookeeper.spread = lambda: rng.random() * spread
        await self.sleep(0.5, 5.0)
        self.sim.zookeeper.fate = None
        self.sim.zookeeper.spread = lambda: 0.0

    async def wipe_zookeeper(self) -> None:
        self.sim.trace("ZooKeeper's data are lost")
        self.sim.count("times that ZooKeeper was wiped")
        self.sim.zookeeper.wipe()

    # ---- disks in use

    async def failing_write(self) -> None:
        self.member().disk.fails = 1

    async def full_disk(self) -> None:
        disk = self.member().disk
        disk.full = True
        await self.sleep(0.2, 4.0)
        disk.full = False

    async def slow_disk(self) -> None:
        disk = self.member().disk
        disk.slow, disk.slow_seconds = self.rng.choice((0.05, 0.3)), self.rng.choice((0.1, 1.0))
        await self.sleep(0.5, 5.0)
        disk.slow = 0.0

    async def flip_bit(self) -> None:
        member = self.member()
        if self.sim.may_lose_disk(member.name):
            hit = member.disk.flip_bit()
            if hit:
                self.sim.trace(f"a bit of record {hit} of {member.name} is flipped")
                self.sim.count("bits flipped on a disk")


def random_options(rng: random.Random) -> Options:
    """What kind of set, mostly the usual one."""
    options = Options()
    if rng.random() < 0.3:
        options = replace(options, weights=tuple(rng.choice((0, 0, 1, 2)) for _ in range(3)))
    if rng.random() < 0.3:
        options = replace(options, ring_bytes_max=rng.choice((0, 2_000, 20_000)))
    chance = rng.random()
    if chance < 0.06:
        options = replace(options, names="abcde")
    elif chance < 0.1:
        options = replace(options, sync="quorum_mem", forgets=False)
    elif chance < 0.13:
        options = replace(options, sync=rng.choice(("local_disk", "local_mem")), forgets=False)
    return options


def random_story(seed: str, weights: dict[str, float] | None = None, **moods: Any) -> Callable[[Simulation], Any]:
    """A story of faults that come one after the other and at once. `weights`: only these, as often."""
    rng = random.Random(f"{seed} story")
    if weights is None:
        weights = {name: weight * rng.choice((0.0, 0.3, 1.0, 1.0, 3.0)) for name, weight in WEIGHTS.items()}
        for name in rng.sample(list(WEIGHTS), 3):  # some kinds are this story's own
            weights[name] = WEIGHTS[name] * 4 + 1
    pace = moods.get("pace") or rng.choice((0.4, 0.8, 1.5, 3.0))
    seconds = moods.get("seconds") or rng.uniform(6.0, 14.0)

    async def story(sim: Simulation) -> None:
        assert weights is not None
        faults = Faults(sim)
        names = [name for name, weight in weights.items() if weight > 0]
        shares = [weights[name] for name in names]
        sim.start_all()
        sim.start_clients()
        await trio.sleep(rng.uniform(0.0, 3.0))
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(seconds):
                while True:
                    await trio.sleep(rng.expovariate(1 / pace))
                    nursery.start_soon(getattr(faults, rng.choices(names, shares)[0]))
            nursery.cancel_scope.cancel()
        await sim.finish()

    return story


def simulate(seed: str, say: Any = None) -> Any:
    """The run of one seed of the CI's: its options, its story."""
    options = random_options(random.Random(f"{seed} options"))
    return Simulation(seed, random_story(seed), options, say).run()
