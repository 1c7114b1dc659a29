"""What befalls a simulated network: the faults of single sets, those of links, of clients' connections, and of announcements.

Owns no rule of the network. As in `faults`, each story has a mood, and every fault ends by itself. Disks are never lost: a broker
that stands alone has promised nothing without its own.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import trio

from pybroker.cluster.announcements import BOOT_BYTES, NUMBER_MAX, Announcement, encode
from pybroker.cluster.discovery import parse_discovery
from pybroker.config import DeliveryPolicy
from tests.sim.faults import Faults
from tests.sim.net_member import NetMember, url
from tests.sim.net_set import DISCOVERY
from tests.sim.net_simulation import NetOptions, NetSimulation, mesh
from tests.sim.network import Weather

# How often each fault comes, beside the others, before a mood changes it
OF_ANY = {
    "kill": 2.0,
    "pause": 1.0,
    "stop": 0.7,
    "clock": 0.3,
    "failing_write": 0.7,
    "full_disk": 0.5,
    "slow_disk": 0.7,
}
OF_REPLICAS = {
    "kill_two": 0.5,
    "power": 0.3,
    "cut": 0.5,
    "isolate": 0.7,
    "reset": 0.5,
    "lose_zookeeper": 0.5,
    "expire": 0.3,
    "hand_over": 0.7,
}
OF_LINKS = {
    "link_reset": 2.0,
    "link_cut": 1.5,
    "link_cut_one_way": 1.5,
    "link_stall": 1.0,
    "link_choke": 2.0,
    "away": 0.7,
    "client_reset": 1.5,
    "client_cut": 0.7,
    "storm": 0.7,
}
OF_AIR = {"bad_air": 1.0, "old_datagrams": 0.7, "forged_datagrams": 0.7}


class NetFaults:
    """The faults of one story, with the random choices of its seed."""

    def __init__(self, sim: NetSimulation) -> None:
        self.sim = sim
        self.rng = random.Random(f"{sim.seed} faults")
        self.of_sets = {name: Faults(each) for name, each in sim.sets.items()}

    def names(self) -> list[str]:
        """The faults that this network can have."""
        names = [*OF_ANY, *OF_LINKS]
        if any(not each.stands_alone for each in self.sim.sets.values()):
            names += OF_REPLICAS
        return names if self.sim.options.pairs else names + list(OF_AIR)

    async def befall(self, name: str) -> None:
        if name in OF_ANY or name in OF_REPLICAS:
            sets = [each for each in self.sim.sets.values() if name in OF_ANY or not each.stands_alone]
            await getattr(self.of_sets[self.rng.choice(sets).name], name)()
        else:
            await getattr(self, name)()

    async def sleep(self, low: float, high: float) -> None:
        await trio.sleep(self.rng.uniform(low, high))

    def pair(self) -> tuple[str, str]:
        """Members of two sets, mostly those that serve."""
        one, other = (self.member(name) for name in self.rng.sample(list(self.sim.sets), 2))
        return one.name, other.name

    def member(self, name: str) -> NetMember:
        serving = self.sim.sets[name].serving()
        if serving is not None and self.rng.random() < 0.8:
            return serving
        found = self.rng.choice(list(self.sim.sets[name].members.values()))
        assert isinstance(found, NetMember)
        return found

    # ---- links

    async def link_reset(self) -> None:
        one, other = self.pair()
        self.sim.trace(f"links between {one} and {other} are reset")
        self.sim.count("links reset")
        self.sim.network.reset(one, other, self.rng.choice(("both", one, other)))

    async def link_cut(self) -> None:
        one, other = self.pair()
        await self._cut([(one, other), (other, one)])

    async def link_cut_one_way(self) -> None:
        await self._cut([self.pair()])

    async def away(self) -> None:
        """All of a set from all others."""
        name = self.rng.choice(list(self.sim.sets))
        inside = self.sim.sets[name].names
        outside = [member.name for member in self.sim.all_members() if member.name not in inside]
        await self._cut([pair for one in inside for other in outside for pair in ((one, other), (other, one))])

    async def _cut(self, pairs: list[tuple[str, str]]) -> None:
        self.sim.trace(f"cut: {', '.join(f'{one} to {other}' for one, other in pairs)}")
        self.sim.count("links cut")
        for pair in pairs:
            self.sim.network.cut(*pair)
        await self.sleep(0.1, self.rng.choice((1.0, 4.0)))
        self.sim.network.heal(*pairs)
        if self.rng.random() < 0.3:
            for one, other in pairs:
                self.sim.network.reset(one, other)

    async def link_stall(self) -> None:
        one, other = self.pair()
        self.sim.network.stall(one, other, self.rng.uniform(0.1, 3.0))

    async def link_choke(self) -> None:
        """The next connections between two go dead, without a word, after so many pieces in one direction or in both."""
        one, other = self.pair()
        some = [self.rng.choice((None, 0, 1, 2, 3, 5, 9)) for _ in range(4)]
        self.sim.trace(f"connections between {one} and {other} are choked: {some}")
        for ends in ((one, other), (other, one)):
            self.sim.network.chokes.setdefault(ends, []).extend([(some[0], some[1]), (some[2], some[3])])
        self.sim.network.reset(one, other)

    # ---- clients

    def client_and_member(self) -> tuple[str, str]:
        kind, count = self.rng.choice((("s", self.sim.options.senders), ("r", self.sim.options.receivers)))
        name = f"{kind}{self.rng.randrange(max(count, 1))}"
        return name, self.member(self.rng.choice(list(self.sim.sets))).name

    async def client_reset(self) -> None:
        client, _ = self.client_and_member()
        for member in self.sim.all_members():
            self.sim.network.reset(client, member.name, self.rng.choice(("both", client, member.name)))
        self.sim.trace(f"connections of {client} are reset")
        self.sim.count("clients reset")

    async def client_cut(self) -> None:
        client, member = self.client_and_member()
        ways = [(client, member), (member, client)]
        await self._cut(ways if self.rng.random() < 0.5 else [self.rng.choice(ways)])

    async def storm(self) -> None:
        network = self.sim.network
        chance = self.rng.choice
        network.weather = Weather(
            delay=chance((0.001, 0.02, 0.1)),
            spike=chance((0.0, 0.01, 0.1)),
            tear=chance((0.05, 0.5)),
            ghost=chance((0.0, 0.2, 0.5)),
            replay=chance((0.0, 0.7)) if self.sim.options.secret else 0.0,
            misroute=chance((0.0, 0.0, 0.1)),
        )
        self.sim.trace(f"{network.weather}")
        await self.sleep(0.5, 3.0)
        network.weather = Weather()

    # ---- announcements

    async def bad_air(self) -> None:
        self.sim.bad_air = self.rng.choice((0.1, 0.5, 1.0))
        await self.sleep(0.5, 4.0)
        self.sim.bad_air = 0.0

    async def old_datagrams(self) -> None:
        """What somebody has recorded is said again."""
        for data in self.rng.sample(self.sim.datagrams, min(len(self.sim.datagrams), 20)):
            self.sim.segment.inject(data, parse_discovery(DISCOVERY))
        self.sim.count("old announcements said again")

    async def forged_datagrams(self) -> None:
        """Of somebody without the secret: changed ones, and one that says where a set is, though it is not."""
        if not self.sim.options.secret:
            return
        self.sim.count("announcements forged")
        where = parse_discovery(DISCOVERY)
        for data in self.rng.sample(self.sim.datagrams, min(len(self.sim.datagrams), 5)):
            place = self.rng.randrange(len(data) * 8)
            torn = bytearray(data)
            torn[place // 8] ^= 1 << place % 8
            self.sim.segment.inject(bytes(torn), where)
        name = self.rng.choice(list(self.sim.sets))
        boot = self.rng.randbytes(BOOT_BYTES)
        said = Announcement(name, f"{name}1", NUMBER_MAX, (url("nowhere"),), boot, 1)
        for secret in (None, b"of somebody else"):
            self.sim.segment.inject(encode(said, "default", secret), where)


def random_options(rng: random.Random) -> NetOptions:
    """What kind of network, small ones more often."""
    count = rng.choice((2, 2, 2, 3, 3, 4, 5))
    names = "abcde"[:count]
    triples = rng.choice((0, 1, 1, 2)) if count < 4 else rng.choice((0, 0, 1))
    large = rng.sample(names, min(triples, count))
    order = rng.sample(names, count)
    chain = frozenset(map(frozenset, pairwise(order)))
    ring = chain | {frozenset((order[0], order[-1]))}
    star = frozenset(frozenset((order[0], other)) for other in order[1:])
    pairs = rng.choice((frozenset(), frozenset(), mesh(names), chain, ring, star))
    subscribers = rng.choice((0, 0, 1, 3))
    return NetOptions(
        sizes={name: 3 if name in large else 1 for name in names},
        pairs=pairs,
        secret=rng.random() < 0.7,
        senders=rng.choice((1, 2, 3)),
        receivers=rng.choice((1, 2, 3, 4)),
        subscribers=subscribers,
        delivery=DeliveryPolicy(deliveries_max=0 if subscribers else 6),  # a dead letter does not say whose it was
        link_messages_max=rng.choice((2, 20, 2_000)),
        demand_backlog_max=rng.choice((5, 1_000)),
    )


def random_story(
    seed: str, weights: dict[str, float] | None = None, *, pace: float | None = None, seconds: float | None = None
) -> Callable[[NetSimulation], Awaitable[None]]:
    """A story of faults that come one after the other and at once. `weights`: only these, as often."""
    rng = random.Random(f"{seed} story")
    pace = pace or rng.choice((0.3, 0.6, 1.5))
    seconds = seconds or rng.uniform(3.0, 8.0)

    async def story(sim: NetSimulation) -> None:
        faults = NetFaults(sim)
        often = weights or moods(rng, faults.names())
        names = [name for name in faults.names() if often.get(name, 0) > 0]
        sim.start_all()
        if sim.options.subscribers:
            await sim.subscribe_all()
        sim.start_clients()
        sim.calm = False
        await trio.sleep(rng.uniform(0.0, 2.0))
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(seconds):
                while True:
                    await trio.sleep(rng.expovariate(1 / pace))
                    nursery.start_soon(faults.befall, rng.choices(names, [often[name] for name in names])[0])
            nursery.cancel_scope.cancel()
        await sim.finish()

    return story


def moods(rng: random.Random, names: list[str]) -> dict[str, float]:
    usual = {**OF_ANY, **OF_REPLICAS, **OF_LINKS, **OF_AIR}
    found = {name: usual[name] * rng.choice((0.0, 0.3, 1.0, 1.0, 3.0)) for name in names}
    for name in rng.sample(names, 2):
        found[name] = usual[name] * 4 + 1
    return found


def simulate(seed: str, say: Any = None) -> Any:
    """The run of one seed of the CI's: its options, its story."""
    options = random_options(random.Random(f"{seed} options"))
    return NetSimulation(seed, random_story(seed), options, say).run()
