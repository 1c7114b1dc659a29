"""A world of whole brokers joined by links, without trio: every step between two of them is a call that a test makes.

Each broker is a `Driver`: core, store, journal. A link is two queues of frames; an `End` of it does what
`pybroker.link_connection` does. A cut loses what is on its way, and each end notices it when the test says so. What clients
send and see is `network_clients`'.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pybroker.config import DeliveryPolicy, Limits, NetworkConfig
from pybroker.core.broker import Core
from pybroker.core.consumer import Consumer
from pybroker.core.entry import Entry
from pybroker.core.invariants import check_invariants
from pybroker.core.kinds import LINK
from pybroker.core.links import Link
from pybroker.errors import BrokerError, SendInDoubt
from pybroker.message import Message
from pybroker.operations import SEQUENCE_MASK
from tests.core.driver import Driver, Ignore

Frame = tuple[Any, ...]
STEPS_MAX = 60_000  # of coming to rest: more, and something goes round in a circle


class Arrival:
    """A token: what came with this tag is committed."""

    def __init__(self, end: End, lane: int, tag: int) -> None:
        self.end = end
        self.lane = lane
        self.tag = tag

    def committed(self) -> None:
        self.end.say_accepted(self.lane, self.tag)


class End:
    """One side of a link. `out`: frames on their way to the other side."""

    def __init__(self, wire: Wire, broker: Broker, peer: str) -> None:
        self.wire = wire
        self.broker = broker
        self.peer = peer
        self.out: deque[Frame] = deque()
        self.link: Link | None = None
        self.in_doubt = 0

    @property
    def other(self) -> End:
        one, two = self.wire.ends
        return two if one is self else one

    def say(self, *frame: Any) -> None:
        if not self.wire.cut:
            self.out.append(frame)

    def say_accepted(self, lane: int, tag: int) -> None:
        last = self.out[-1] if self.out else None
        if not self.wire.cut and last is not None and last[:2] == ("accepted", lane) and last[2][-1][1] == tag - 1:
            last[2][-1] = (last[2][-1][0], tag)
        else:
            self.say("accepted", lane, [(tag, tag)])
            self.say_news()  # one write has both

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """The core gives a message to the peer: a copy, as bytes would be. News of demand never come behind it."""
        self.say_news()
        lane = consumer.context
        self.say("forward", lane.number, lane.namespace, entry.tag, entry.order & SEQUENCE_MASK, copied(entry.message))

    def say_news(self) -> bool:
        links = self.broker.core.links
        if self.link is None or self.link not in links.changed:
            return False
        news = links.news(self.link)
        if news is not None:
            self.say("demand", *news)
        return news is not None

    def hear(self, core: Core, frame: Frame) -> None:
        """Take one frame, within a turn."""
        kind, *rest = frame
        if kind == "hello":
            self.broker.start(self)
        elif self.link is None:
            raise BrokerError(f"{kind} before the greeting")
        elif kind == "demand":
            core.links.hear(self.link, *rest)
        elif kind == "accepted":
            core.links.accepted(self.link, *rest)
        elif kind == "rejected":
            core.links.rejected(self.link, *rest)
        else:
            self.take(core, *rest)

    def take(self, core: Core, lane: int, namespace: str, tag: int, sequence: int, message: Message) -> None:
        assert self.link is not None
        self.broker.world.arrived(message)
        try:
            core.links.receive(self.link, namespace, sequence, message)
        except SendInDoubt:
            self.in_doubt += 1
        except BrokerError as error:
            self.say("rejected", lane, tag, error.code, str(error))
        else:
            core.confirm((self, Arrival(self, lane, tag)))


class Wire:
    """A connection between two brokers."""

    def __init__(self, one: Broker, two: Broker) -> None:
        self.cut = False
        self.ends = (End(self, one, two.name), End(self, two, one.name))

    def lose(self) -> None:
        self.cut = True
        for end in self.ends:
            end.out.clear()


class Watch(Ignore):
    """What one broker shows: to its clients, and to the other brokers."""

    def __init__(self, broker: Broker) -> None:
        super().__init__()
        self.broker = broker

    def shown(self, consumer: Consumer, entry: Entry) -> None:
        if consumer.queue.kind == LINK:
            consumer.sink.deliver(consumer, entry)
        else:
            self.broker.world.show(self.broker, consumer, entry)

    def confirmed(self, token: Any) -> None:
        token.committed()


class Broker(Driver):
    """One member of the network, through its lives."""

    def __init__(
        self, world: World, name: str, limits: Limits, delivery: DeliveryPolicy, network: NetworkConfig, now: int
    ) -> None:
        self.world = world
        self.name = name
        self.network = network
        self.lives = 0
        self.ends: dict[str, End] = {}  # by peer, the newest one
        super().__init__(limits, delivery, Watch(self), now)

    def make_core(self) -> Core:
        self.lives += 1
        return Core(
            self.limits,
            self.delivery,
            first_id=self.store.first_unused_id,
            id_prefix=f"{self.name}-{self.store.starts:x}-",
            records=self.store.records,
            producers=self.store.producers,
            peers=self.store.peers,
            now=self.now,
            network=self.network,
            network_name=self.name,
            life=f"{self.name}{self.lives}",
        )

    def run(self, act: Callable[[Core], Any]) -> Any:
        """One turn."""
        core = self.begin_turn()
        try:
            return act(core)
        finally:
            self.end_turn()
            check_invariants(core)

    def start(self, end: End) -> None:
        """The greeting of a peer is here; a link to it that is there still is a dead one."""
        before = self.ends.get(end.peer)
        if before is not None and before is not end:
            self.forget(before)
        self.ends[end.peer] = end
        end.link = self.core.links.up(end.peer, end)

    def forget(self, end: End) -> None:
        """Within a turn: an end is dead."""
        if end.link is not None:
            self.core.links.down(end.link)
            end.link = None
        if self.ends.get(end.peer) is end:
            del self.ends[end.peer]

    def __repr__(self) -> str:
        return f"<Broker {self.name}>"


class World:
    """Brokers, wires, and every step that can be taken. `log`: what was done, for who looks into a failure."""

    def __init__(
        self,
        names: Sequence[str],
        pairs: Iterable[tuple[str, str]],
        *,
        limits: Limits,
        delivery: DeliveryPolicy,
        network: NetworkConfig,
        seed: object = 0,
    ) -> None:
        self.random = random.Random(str(seed))
        self.now = 1_000_000
        self.wires: dict[tuple[str, str], Wire] = {}
        self.log: list[str] = []
        self.pairs = [(min(pair), max(pair)) for pair in pairs]
        self.cuts = 0
        self.crashes = 0
        self.stops = 0  # crashes, and ends in good order
        self.removals = 0
        self.changes = 0  # whatever may make a message turn round
        self.brokers: dict[str, Broker] = {}
        for name in names:
            self.brokers[name] = Broker(self, name, limits, delivery, network, self.now)

    def show(self, broker: Broker, consumer: Consumer, entry: Entry) -> None:
        """A client of a broker sees a delivery."""

    def arrived(self, message: Message) -> None:
        """A message has come over a link."""

    def crashed(self, broker: Broker, clean: bool) -> None:
        """A life of a broker is over, and its clients are gone."""

    def began(self, broker: Broker) -> None:
        """Another life of it has begun."""

    # ---- links

    def dial(self, pair: tuple[str, str]) -> None:
        """Begin a connection, unless there is one that stands; the ends of older ones need not have noticed."""
        wire = self.wires.get(pair)
        if wire is None or wire.cut:
            self.note("dial", *pair)
            self.changes += 1
            one, two = (self.brokers[name] for name in pair)
            wire = self.wires[pair] = Wire(one, two)
            for end in wire.ends:
                end.say("hello")

    def cut(self, pair: tuple[str, str]) -> None:
        """Lose what is on its way between two brokers; neither has noticed."""
        wire = self.wires.get(pair)
        if wire is not None and not wire.cut:
            self.note("cut", *pair)
            self.changes += 1
            self.cuts += 1
            wire.lose()

    def dead_ends(self) -> list[End]:
        """Ends of cut connections that have not noticed."""
        return [end for broker in self.brokers.values() for end in broker.ends.values() if end.wire.cut]

    def notice(self, end: End) -> None:
        self.note("notice", end.broker.name, end.peer)
        self.changes += 1
        end.broker.run(lambda core: end.broker.forget(end))

    def ways(self) -> list[End]:
        """Ends that have sent something which has not arrived."""
        return [end for wire in self.wires.values() for end in wire.ends if end.out]

    def deliver(self, end: End, count: int = 1) -> None:
        """Let the other side of `end` hear what this one has said first, in one turn."""
        other = end.other
        frames = [end.out.popleft() for _ in range(min(count, len(end.out)))]
        self.note("deliver", end.broker.name, other.broker.name, *(frame[0] for frame in frames))

        def hear(core: Core) -> None:
            for frame in frames:
                other.hear(core, frame)

        try:
            other.broker.run(hear)
        except BrokerError as error:
            self.note("error", other.broker.name, error)
            other.wire.lose()
            other.broker.run(lambda core: other.broker.forget(other))

    def say_news(self) -> bool:
        """Let all who have news of demand tell them."""
        said = [end.say_news() for broker in self.brokers.values() for end in list(broker.ends.values())]
        return any(said)

    # ---- brokers

    def stop(self, broker: Broker, clean: bool) -> None:
        """End a life: by a crash, which forgets what is not committed, or in good order; a new one begins."""
        self.note("stop" if clean else "crash", broker.name)
        self.changes += 1
        self.stops += 1
        self.crashes += not clean
        self.crashed(broker, clean)
        if clean:
            for end in list(broker.ends.values()):
                broker.run(lambda core, end=end: broker.forget(end))
            for connection in list(broker.core.connections):
                broker.run(lambda core, connection=connection: core.disconnect(connection))
            broker.settle()
        for wire in self.wires.values():
            if any(end.broker is broker for end in wire.ends):
                wire.lose()
        broker.ends.clear()
        broker.open()
        check_invariants(broker.core)
        self.began(broker)

    def tick(self) -> None:
        for broker in self.brokers.values():
            withheld = set(broker.core.links._withheld)
            broker.run(lambda core: core.links.tick())
            self.changes += withheld != broker.core.links._withheld

    def pass_time(self, milliseconds: int) -> None:
        self.now += milliseconds
        for broker in self.brokers.values():
            broker.now = self.now
            broker.run(lambda core: core.sweep())

    def note(self, *what: Any) -> None:
        self.log.append(" ".join(map(str, what)))

    # ---- to rest

    def step(self) -> bool:
        """One random step of what goes on by itself; False when nothing is under way."""
        brokers = list(self.brokers.values())
        self.random.shuffle(brokers)
        ways = self.ways()
        if ways and self.random.random() < 0.5:
            self.deliver(self.random.choice(ways), self.random.randint(1, 4))
            return True
        for broker in brokers:
            if broker.step_commit():  # which leaves the core as it is
                return True
            if broker.step_read():
                check_invariants(broker.core)
                return True
        if ways:
            self.deliver(self.random.choice(ways), self.random.randint(1, 4))
            return True
        return self.say_news()

    def rest(self, act: Callable[[], bool] = lambda: False) -> None:
        """Step until nothing moves, and `act` (clients) does nothing either."""
        for _ in range(STEPS_MAX):
            if not self.step() and not act():
                return
        raise AssertionError("the network does not come to rest")

    def heal(self, act: Callable[[], bool] = lambda: False) -> None:
        """Let all links come up, and everything come to rest."""
        for end in self.dead_ends():
            self.notice(end)
        for pair in self.pairs:
            self.dial(pair)
        for _ in range(3):  # a tick may ask for more, whose coming may make the next one ask for more
            self.rest(act)
            self.tick()
        self.rest(act)

    def linked(self) -> bool:
        """Whether both ends of every pair have a link that stands."""
        return all(
            pair in self.wires
            and not self.wires[pair].cut
            and all(end.link is not None for end in self.wires[pair].ends)
            for pair in self.pairs
        )


def copied(message: Message) -> Message:
    """A message as it comes out of a frame: another object, and with the priority that it was sent with."""
    route = message.route
    assert route is not None
    return Message(
        message.destination,
        message.body,
        message.header_block,
        message.durable,
        route.priority,
        message.expires,
        message.message_id,
        message.timestamp,
        route,
    )
