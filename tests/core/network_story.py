"""Random stories of a network: what clients do, what fails, and what must hold in the end. A seed is a story.

Safety is checked all the time, liveness at the end: all links come up, everything that moves by itself is let move, and then
nothing is lost, nothing is there twice, and nothing is left that somebody waits for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise

from pybroker.config import DeliveryPolicy, Limits, NetworkConfig
from pybroker.core.forwarding import demands
from pybroker.core.groups import group_of
from pybroker.core.queue import Queue
from pybroker.message import Message
from tests.core.network import Broker
from tests.core.network_clients import Broken, ClientWorld, Member

QUEUES = ("/queue/a", "/queue/b", "/queue/only")
TOPICS = ("/topic/t.x", "/topic/t.y")
PATTERNS = ("/topic/t.x", "/topic/t.*", "/topic/t.>")
BLOCKS = (b"", b"k:v\n")
CHOOSY_BLOCKS = (
    b"",
    b"s:1\n",
    b"s:2\n",
    b"s:1\nJMSXGroupID:g\n",
    b"JMSXGroupID:h\n",
    b"JMSXGroupID:h\nJMSXGroupSeq:-1\n",
)
WANTED = (b"", b"", b"s:1\n", b"s:2\n")
DURABLE_NAMES = ("one", "two")
LIMITS = Limits(
    window_messages_max=4,
    window_bytes_max=200,
    producers_max=50,
    producer_ranges_max=4,
)
DELIVERY = DeliveryPolicy(deliveries_max=0)

Pairs = list[tuple[str, str]]


def chain(names: str) -> Pairs:
    return list(pairwise(names))


def star(names: str) -> Pairs:
    return [(names[0], name) for name in names[1:]]


def ring(names: str) -> Pairs:
    return [*chain(names), *([(names[0], names[-1])] if len(names) > 2 else [])]


def mesh(names: str) -> Pairs:
    return list(combinations(names, 2))


SHAPES: tuple[Callable[[str], Pairs], ...] = (chain, star, ring, mesh)


@dataclass(frozen=True)
class Kind:
    """What a story is about: how often each thing happens, and the limits."""

    steps: int = 250
    faults: float = 1.0  # 0: nothing fails
    queues: tuple[str, ...] = QUEUES
    topics: bool = True
    expiring: bool = True
    nacks: bool = True
    choosy: bool = False  # some consumers of queues have selectors, and some messages are of groups
    removals: float = 0.0  # how often a peer is removed: what waits for it may then be there twice
    hops: tuple[int, ...] = (16, 16, 2)


class Teller:
    """Tells one story."""

    def __init__(self, seed: object, kind: Kind = Kind()) -> None:
        self.seed = seed
        self.kind = kind
        rng = self.random = random.Random(f"story {seed}")
        names = "abcde"[: rng.choice((2, 2, 3, 3, 4, 5))]
        hops_max = self.hops_max = rng.choice(kind.hops)
        network = NetworkConfig(
            hops_max=hops_max,
            link_messages_max=rng.choice((2, 4, 30)),
            link_bytes_max=rng.choice((100, 10_000)),
            demand_backlog_max=rng.choice((3, 1_000)),
            exclude=("/queue/own.>",),
        )
        self.world = ClientWorld(
            names,
            rng.choice(SHAPES)(names),
            limits=LIMITS,
            delivery=DELIVERY,
            network=network,
            seed=seed,
        )
        self.brokers = list(self.world.brokers.values())
        self.home = {queue: rng.choice(self.brokers) for queue in QUEUES}
        self.acts: list[tuple[float, Callable[[], object]]] = [
            (12, self.move),
            (4, self.send),
            (3, self.acknowledge),
            (1, self.join),
            (0.7, self.leave),
            (1, self.world.say_news),
            (0.5, self.world.tick),
            (0.1, self.calm),
        ]
        if kind.nacks:
            self.acts.append((0.4, self.reject))
        if kind.expiring:
            self.acts.append((0.4, self.pass_time))
        if kind.removals:
            self.acts.append((kind.removals, self.remove))
        faults = kind.faults * rng.choice((0, 1, 1, 2))
        if faults:
            self.acts += [
                (0.5 * faults, self.cut),
                (0.7 * faults, self.notice),
                (0.7 * faults, self.dial),
                (0.2 * faults, self.crash),
                (0.1 * faults, self.restart),
            ]

    # ---- what happens

    def move(self) -> None:
        for _ in range(self.random.randint(1, 4)):
            self.world.step()

    def send(self) -> None:
        rng = self.random
        kind = self.kind
        destinations = kind.queues + TOPICS if kind.topics else kind.queues
        destination = rng.choice(destinations)
        broker = rng.choice(self.brokers)
        count = rng.choice((1, 1, 3, 8))
        expires = rng.choice((0, 0, 0, 40, 2_000)) if kind.expiring else 0
        for _ in range(count):
            self.world.send(
                broker,
                destination,
                producer=f"at {broker.name}",
                durable=rng.random() < 0.8,
                priority=rng.choice((4, 4, 4, 0, 9)),
                expires=expires and self.world.now + expires,
                block=rng.choice(CHOOSY_BLOCKS if kind.choosy else BLOCKS),
            )

    def join(self) -> None:
        rng = self.random
        world = self.world
        if len(world.alive()) >= 6:
            return
        broker = rng.choice(self.brokers)
        prefetch = rng.choice((1, 2, 10))
        if self.kind.topics and rng.random() < 0.5:
            pattern = rng.choice(PATTERNS)
            name = rng.choice(("", *DURABLE_NAMES))
            if name:
                pattern = world.durables.get((broker.name, name), pattern)
                if self._busy(broker.name, name):
                    return
            world.join(broker, pattern, durable_name=name, prefetch=prefetch)
            return
        queue = rng.choice(self.kind.queues)
        if queue == "/queue/only":  # one consumer, that stays
            if not any(each.destination == queue for each in world.members):
                world.join(self.home[queue], queue, prefetch=prefetch)
            return
        world.join(broker, queue, prefetch=prefetch, wants=rng.choice(WANTED) if self.kind.choosy else b"")

    def _busy(self, broker: str, name: str) -> bool:
        return any(each.receiver == (broker, name) for each in self.world.alive())

    def leave(self) -> None:
        members = [each for each in self.world.alive() if each.destination != "/queue/only"]
        free = [who for who in self.world.durables if not self._busy(*who)]
        if free and self.random.random() < 0.2:
            self.world.unsubscribe(self.random.choice(free))
        elif members:
            self.world.leave(self.random.choice(members))

    def acknowledge(self) -> None:
        opened = self.world.opened()
        for showing in self.random.sample(opened, min(len(opened), self.random.choice((1, 3)))):
            self.world.acknowledge(showing)

    def reject(self) -> None:
        opened = [each for each in self.world.opened() if each.member.destination != "/queue/only"]
        if opened:
            self.world.reject(self.random.choice(opened))

    def pass_time(self) -> None:
        self.world.pass_time(self.random.choice((10, 60, 3_000)))

    def cut(self) -> None:
        self.world.cut(self.random.choice(self.world.pairs))

    def notice(self) -> None:
        dead = self.world.dead_ends()
        if dead:
            self.world.notice(self.random.choice(dead))

    def dial(self) -> None:
        self.world.dial(self.random.choice(self.world.pairs))

    def crash(self) -> None:
        self.world.stop(self.random.choice(self.brokers), clean=False)

    def restart(self) -> None:
        self.world.stop(self.random.choice(self.brokers), clean=True)

    def remove(self) -> None:
        """An operator takes out a peer that can't be reached; it may come back."""
        unlinked = [
            (broker, name)
            for broker in self.brokers
            for name, peer in broker.core.links.peers.items()
            if peer.link is None
        ]
        if unlinked:
            self.world.remove_peer(*self.random.choice(unlinked))

    def calm(self) -> None:
        self.world.heal()
        assert self.world.linked()
        self.world.settled()

    # ---- the whole

    def run(self) -> ClientWorld:
        """Tell it. What is broken is raised as `Broken`, with the seed and the last steps in its text."""
        try:
            weights = [weight for weight, _ in self.acts]
            for _, act in self.random.choices(self.acts, weights, k=self.kind.steps):
                act()
            self._end()
        except Exception as error:
            last = "\n  ".join(self.world.log[-40:])
            raise Broken(f"seed {self.seed!r}: {type(error).__name__}: {error}\n  {last}") from error
        return self.world

    def _end(self) -> None:
        world = self.world
        world.heal()
        assert world.linked()
        world.check_census()
        if world.reaching:
            self.check_nobody_waits()
        for name, pattern in [*((queue, "") for queue in QUEUES), *world.durables.items()]:
            if isinstance(name, str):
                world.join(self.random.choice(self.brokers), name, prefetch=10)
            elif not self._busy(*name):
                world.join(world.brokers[name[0]], pattern, durable_name=name[1], prefetch=10)
        world.heal(world.acknowledge_all)
        world.check_census()
        world.check_topics()
        if world.reaching:
            self.check_consumed()
        world.check_stores()

    def check_nobody_waits(self) -> None:
        """Nothing is ready anywhere that some consumer could take (but beyond the hop limit), and nothing is on its way."""
        world = self.world
        able = {each.destination for each in world.alive() if self._able(each) and not each.wants}
        for broker in self.brokers:
            for queue in broker.core.queues.values():
                if queue.kind == "link":
                    assert not queue.depth, f"{queue} at {broker.name} is on its way still"
                name = f"/queue/{queue.name}"
                if queue.kind != "queue" or name not in able or demands(queue):
                    continue
                if any(map(demands, (each.core.by_destination[name] for each in self.withheld(name)))):
                    continue
                left = queue.depth - len(queue.outstanding)  # which has those that are at the hop limit
                if queue.choosing is not None:
                    left = len([each for each in world.waiting(broker, queue) if not self._stays(queue, each)])
                assert not left, f"{left} of {queue} at {broker.name} wait, and somebody could take them"

    def _stays(self, queue: Queue, message: Message) -> bool:
        """Whether a message of a choosy queue has to stay where it is: at the hop limit, or as one of somebody's group."""
        passed = () if message.route is None else message.route.passed
        name = group_of(message)
        choosing = queue.choosing
        owned = choosing is not None and bool(name) and choosing.groups.owner(name) is not None
        return owned or len(passed) >= self.hops_max

    def withheld(self, destination: str) -> list[Broker]:
        """Brokers that ask for no more of a queue at present, because so much waits there."""
        return [
            broker
            for broker in self.brokers
            if destination in broker.core.by_destination
            and broker.core.by_destination[destination] in broker.core.links._withheld
        ]

    def _able(self, member: Member) -> bool:
        return member.consumer.able

    def check_consumed(self) -> None:
        """Everything was consumed, but what is at the hop limit."""
        for broker in self.brokers:
            for queue in broker.core.queues.values():
                stay = len(queue.stranded)
                if queue.choosing is not None:
                    stay = sum(self._stays(queue, each) for each in self.world.waiting(broker, queue))
                assert queue.depth == stay, f"{queue} at {broker.name} was not emptied"
