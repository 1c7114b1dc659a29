"""Bugs of networks, each put into the real code as long as a `with` block lasts, and the stories in which the checkers must find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import trio

from pybroker import link_connection
from pybroker.core import forwarding
from pybroker.core.broker import Core
from pybroker.core.links import Links
from pybroker.core.producers import LINK_PREFIX, Producers
from pybroker.link_connection import LinkConnection
from pybroker.link_dialling import Dialler
from tests.sim import net_ways
from tests.sim.checkers import Violation
from tests.sim.net_clients import Sender
from tests.sim.net_faults import random_story
from tests.sim.net_simulation import NetOptions, NetSimulation, Story, linked

Broken = Callable[[], AbstractContextManager[Any]]


@contextmanager
def forgetful() -> Iterator[None]:
    """Who takes over knows nothing of what links have brought before."""

    def begin(self: Producers, core: Core, records: Any = ()) -> None:
        plain(self, core, [record for record in records if not record.producer_id.startswith(LINK_PREFIX)])

    plain = Producers.__init__
    with mock.patch.object(Producers, "__init__", begin):
        yield


@contextmanager
def early() -> Iterator[None]:
    """ACCEPTED is said before the message is committed."""

    def confirm(self: Core, token: Any) -> None:
        sink, what = token
        if isinstance(sink, LinkConnection) and isinstance(what, link_connection._Taken):
            sink.confirm(what)
            sink.flush()
        else:
            plain(self, token)

    plain = Core.confirm
    with mock.patch.object(Core, "confirm", confirm):
        yield


@contextmanager
def faithful() -> Iterator[None]:
    """A link is dialled at the leader that was known first, for ever, and only by the lower name."""

    async def run(self: Dialler, reluctant: bool = False) -> None:
        if reluctant:
            await trio.sleep_forever()
        await plain(self, reluctant)

    plain = Dialler.run
    with (
        mock.patch.object(Dialler, "run", run),
        mock.patch.object(Dialler, "update", lambda self, urls, epoch: None),
        mock.patch.object(Dialler, "give_up", lambda self: None),
    ):
        yield


@contextmanager
def stuck() -> Iterator[None]:
    """A message never comes back to a broker that it has passed."""

    def choose(links: Any, queue: Any, message: Any) -> Any:
        consumers = queue.consumers
        queue.consumers = consumers or {None}
        try:
            return plain(links, queue, message)
        finally:
            queue.consumers = consumers

    plain = forwarding._choose
    with mock.patch.object(forwarding, "_choose", choose):
        yield


@contextmanager
def careless() -> Iterator[None]:
    """What was sent over a link that broke counts as arrived."""

    def down(self: Any, link: Any) -> None:
        for consumer in link.lanes.values():
            for entry in list(consumer.unacked.values()):
                entry.queue.settle(entry)
                entry.queue.remove(entry)
        plain(self, link)

    plain = Links.down
    with mock.patch.object(Links, "down", down):
        yield


@contextmanager
def repeating() -> Iterator[None]:
    """What a client sends again is stored again."""
    with mock.patch.object(Producers, "is_new", lambda self, producer_id, sequence, repeated=False: True):
        yield


@contextmanager
def unsaved() -> Iterator[None]:
    """Durable demand of others is not stored: who takes over knows nothing of it until it is linked."""
    with mock.patch.object(Links, "_save", lambda self, peer: None):
        yield


@dataclass(frozen=True)
class Plant:
    """A bug, and where it is looked for: a named story, or random ones with these faults. `seeds`: within so many it is found."""

    broken: Broken
    options: NetOptions
    way: Story | None = None
    weights: dict[str, float] | None = None
    seeds: int = 10

    @property
    def name(self) -> str:
        return self.broken.__name__

    def run(self, seed: str) -> None:
        story = self.way or random_story(seed, self.weights, pace=0.3, seconds=6.0)
        NetSimulation(seed, story, self.options).run()

    def search(self) -> tuple[int, Violation | None]:
        """How many runs it took, and what was found."""
        with self.broken():
            for number in range(self.seeds):
                try:
                    self.run(f"{self.name} {number}")
                except Violation as violation:
                    return number + 1, violation
        return self.seeds, None


async def _many_killed(sim: NetSimulation) -> None:
    await net_ways.killed_leaders(sim, "bbab")


async def _slow_and_killed(sim: NetSimulation) -> None:
    """Who takes is slow in writing, so that there is time between its word and its deed."""
    for member in sim.sets["b"].members.values():
        member.disk.slow, member.disk.slow_seconds = 0.5, 0.1
    await net_ways.killed_leaders(sim, "bbbb")


async def _moved_leader(sim: NetSimulation) -> None:
    """A set's leader is another one, and the machine of the one before is gone."""
    await net_ways.started(sim)
    net_ways.consume(sim, "consumer", "b")
    await net_ways.acknowledged(sim, await net_ways.send(sim, "before", "a", 2), net_ways.SOON, "there is no link")
    member = await sim.serving("b")
    member.kill()
    names = await net_ways.send(sim, "after", "a", 2)
    await net_ways.acknowledged(sim, names, net_ways.SOON, "the link does not follow the leader")
    await sim.finish()


async def _cut_and_killed(sim: NetSimulation) -> None:
    """While nobody reaches the subscriber's set, the one that sends to it gets another leader."""
    await net_ways.started(sim)
    await sim.subscribe_all()
    sim.calm = False
    home = sim.subscribers[0].members[0][0]
    other = "b" if home == "a" else "a"
    for one, two in product(sim.sets[home].names, sim.sets[other].names):
        sim.network.cut_both(one, two)
    member = await sim.serving(other)
    member.kill()
    sender = Sender(sim, "s0", sim.sets[other].names)
    sim.run_client(sender)
    await trio.sleep(5.0)
    await sim.finish()


FOLLOWING = NetOptions(sizes={"a": 1, "b": 3}, senders=0, receivers=0)

PLANTS = [
    Plant(forgetful, net_ways.FAILOVER, way=_many_killed, seeds=20),
    Plant(early, net_ways.FAILOVER, way=_slow_and_killed),
    Plant(careless, NetOptions(), weights={"link_reset": 3.0, "link_cut": 2.0}),
    Plant(faithful, FOLLOWING, way=_moved_leader, seeds=3),
    Plant(
        repeating,
        NetOptions(sizes={"a": 3}, pause=0.1),
        weights={"client_reset": 4.0, "hand_over": 1.0, "kill": 1.0},
        seeds=20,
    ),
    Plant(unsaved, NetOptions(sizes={"a": 3, "b": 3}, pairs=linked("ab"), subscribers=1), way=_cut_and_killed, seeds=3),
    Plant(stuck, net_ways.STUCK, way=net_ways.stuck, seeds=1),
]
