"""Temporary destinations in the core: whose they are, what goes with them, and what crosses a network to find them.

A random walk beside a naive model counts every message: acknowledged, waiting, or unclaimed, and never two of these.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from pybroker.config import DeliveryPolicy, Limits, NetworkConfig
from pybroker.core.consumer import AUTO, Connection, Consumer
from pybroker.core.entry import Entry
from pybroker.core.kinds import LINK
from pybroker.destination import TEMPORARY_QUEUE, TEMPORARY_TOPIC, local_kind, parse_destination, temporary_destination
from pybroker.errors import InvalidDestination, LimitExceeded, SlowConsumer, SubscriptionError
from pybroker.message import Message
from tests.core.bench import Bench
from tests.core.machine import pick
from tests.core.network import Broker, World
from tests.core.network_story import chain


def create(bench: Bench, connection: Connection, kind: str = TEMPORARY_QUEUE, secret: str = "s") -> str:
    name = bench.core.temporaries.create(connection, kind, secret)
    bench.end()
    return name


def unclaimed(bench: Bench) -> int:
    return bench.driver.core.temporaries.unclaimed


# ---- names


def test_names() -> None:
    name = str(temporary_destination(TEMPORARY_QUEUE, "secret"))
    assert name.startswith("/remote-temp-queue/")
    assert "secret" not in name
    assert parse_destination(name) == temporary_destination(TEMPORARY_QUEUE, "secret")
    assert (
        temporary_destination(TEMPORARY_TOPIC, "secret").name != temporary_destination(TEMPORARY_QUEUE, "secret").name
    )
    assert local_kind("/temp-queue/a") == TEMPORARY_QUEUE
    assert local_kind("/temp-topic/a.b") == TEMPORARY_TOPIC
    assert local_kind("/queue/temp-queue/a") is None


@pytest.mark.parametrize(
    "text", ["/remote-temp-queue/", "/remote-temp-queue/*", "/remote-temp-topic/a.>", "/temp-queue/a"]
)
def test_what_is_no_name_of_one(text: str) -> None:
    with pytest.raises(InvalidDestination):
        parse_destination(text)


@pytest.mark.parametrize("text", ["/temp-queue/", "/temp-topic/>", "/temp-queue/a,b", "/temp-queue/a..b"])
def test_what_is_no_local_name(text: str) -> None:
    with pytest.raises(InvalidDestination):
        local_kind(text)


# ---- whose they are


def test_its_owner_consumes_and_everybody_sends() -> None:
    bench = Bench()
    asker = bench.connect()
    name = create(bench, asker)
    consumer = bench.subscribe(name, on=asker)
    bench.send(name, b"reply", durable=True)
    bench.settle()
    assert bench.bodies(consumer) == [b"reply"]
    bench.ack(consumer, b"reply")
    with pytest.raises(SubscriptionError, match="only its owner"):
        bench.subscribe(name)
    with pytest.raises(SubscriptionError, match="durable"):
        bench.subscribe(name, on=asker, durable_name="d", client_id="c")
    assert unclaimed(bench) == 0


def test_what_is_sent_before_anybody_consumes_waits() -> None:
    bench = Bench(window_messages_max=4)
    asker = bench.connect()
    name = create(bench, asker)
    bodies = [b"%d" % number for number in range(20)]
    bench.send(name, *bodies)  # most of it behind the window, in the spool
    consumer = bench.subscribe(name, AUTO, on=asker)
    bench.settle()
    assert bench.bodies(consumer) == bodies


def test_it_goes_with_its_connection_and_nothing_is_stored() -> None:
    bench = Bench(window_messages_max=4)
    asker = bench.connect()
    name = create(bench, asker)
    consumer = bench.subscribe(name, on=asker, prefetch=2)
    assert bench.core.send(Message(name, b"durable?", durable=True)) is False
    bench.end()
    bench.send(name, *[b"%d" % number for number in range(9)])
    bench.settle()
    assert len(bench.bodies(consumer)) == 2
    assert not bench.driver.store.records
    bench.disconnect(asker)
    assert unclaimed(bench) == 10
    assert name not in bench.driver.core.by_destination
    bench.send(name, b"late")
    assert unclaimed(bench) == 11
    bench.settle()
    core = bench.driver.core
    assert (core.memory_bytes, core.spooled, core.spooled_bytes) == (0, 0, 0)
    bench.crash()
    assert not bench.driver.core.queues


def test_what_an_owner_can_not_take_is_a_dead_letter() -> None:
    bench = Bench(deliveries_max=2)
    asker = bench.connect()
    name = create(bench, asker)
    consumer = bench.subscribe(name, on=asker)
    bench.send(name, b"poison")
    for _ in range(2):
        bench.settle()
        bench.nack(consumer, b"poison")
    assert bench.queue("/queue/DLQ").depth == 1
    assert unclaimed(bench) == 0


def test_an_open_transaction_of_its_owner_goes_first() -> None:
    bench = Bench()
    asker = bench.connect()
    name = create(bench, asker)
    consumer = bench.subscribe(name, on=asker)
    bench.send(name, b"1", b"2")
    bench.settle()
    bench.core.begin(asker, "t")
    bench.ack(consumer, b"1", "t")
    bench.disconnect(asker)
    assert unclaimed(bench) == 2


def test_limits() -> None:
    bench = Bench(temporary_destinations_max=2)
    asker = bench.connect()
    first = create(bench, asker, secret="1")
    create(bench, asker, TEMPORARY_TOPIC, secret="2")
    assert create(bench, asker, secret="1") == first
    with pytest.raises(LimitExceeded, match="temporary_destinations_max"):
        create(bench, asker, secret="3")
    bench.core.temporaries.delete(asker, first)
    create(bench, asker, secret="3")
    with pytest.raises(LimitExceeded, match="destinations_max"):
        create(Bench(destinations_max=0), asker)


def test_one_that_is_consumed_is_not_deleted() -> None:
    bench = Bench()
    asker = bench.connect()
    for kind in (TEMPORARY_QUEUE, TEMPORARY_TOPIC):
        name = create(bench, asker, kind)
        consumer = bench.subscribe(name, on=asker)
        with pytest.raises(SubscriptionError, match="in use"):
            bench.core.temporaries.delete(asker, name)
        bench.leave(consumer)
        bench.core.temporaries.delete(asker, name)
        bench.end()
        with pytest.raises(SubscriptionError, match="no temporary destination"):
            bench.core.temporaries.delete(asker, name)


def test_who_knows_the_secret_takes_over() -> None:
    """A client whose connection broke comes back before the broker has noticed."""
    bench = Bench()
    before, after = bench.connect(), bench.connect()
    name = create(bench, before)
    lost = bench.subscribe(name, on=before)
    bench.send(name, b"reply")
    bench.settle()
    assert create(bench, after) == name
    found = bench.subscribe(name, on=after)
    bench.settle()
    assert lost not in lost.queue.consumers
    assert bench.seen(found) == [(b"reply", 1)]
    bench.disconnect(before)
    bench.send(name, b"another")
    bench.settle()
    assert bench.bodies(found) == [b"reply", b"another"]
    bench.disconnect(after)
    assert unclaimed(bench) == 2


def test_a_topic_gives_a_copy_to_each_consumer_of_its_owner() -> None:
    bench = Bench(backlog_messages_max=3)
    asker = bench.connect()
    name = create(bench, asker, TEMPORARY_TOPIC)
    bench.send(name, b"nobody")
    assert unclaimed(bench) == 1
    wide = bench.subscribe("/topic/>")
    one, two = bench.subscribe(name, on=asker), bench.subscribe(name, AUTO, on=asker)
    bench.send(name, b"news")
    bench.settle()
    assert (bench.bodies(one), bench.bodies(two), bench.bodies(wide)) == ([b"news"], [b"news"], [])
    with pytest.raises(SubscriptionError):
        bench.subscribe(name)
    bench.leave(two)
    bench.send(name, *[b"%d" % number for number in range(4)])
    consumer, error = bench.eye.closed[0]
    assert consumer is one
    assert isinstance(error, SlowConsumer)
    assert one.queue.queue_id not in bench.driver.core.queues
    bench.disconnect(asker)
    assert name not in bench.driver.core.by_destination


@pytest.mark.parametrize("end", ["leave", "disconnect"])
def test_what_waits_for_a_consumer_of_a_topic_that_goes_is_counted(end: str) -> None:
    bench = Bench()
    asker = bench.connect()
    name = create(bench, asker, TEMPORARY_TOPIC)
    consumer = bench.subscribe(name, on=asker, prefetch=2)
    bench.send(name, b"1", b"2", b"3")
    bench.settle()
    bench.ack(consumer, b"1")
    assert unclaimed(bench) == 0
    bench.leave(consumer) if end == "leave" else bench.disconnect(asker)
    assert unclaimed(bench) == 2


# ---- a random walk beside a model


class TemporaryMachine(RuleBasedStateMachine):
    """Owners come, consume, leave and come back; what is sent is acknowledged, waits, or is counted as unclaimed."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(deliveries_max=0, window_messages_max=3)
        self.connections: list[Connection] = []
        self.owners: dict[str, Connection] = {}
        self.consumers: dict[Consumer, str] = {}
        self.waiting: Counter[str] = Counter()
        self.unclaimed = 0
        self.sent = 0

    @rule()
    def connect(self) -> None:
        if len(self.connections) < 3:
            self.connections.append(self.bench.connect())

    @rule(number=st.integers(0, 9), secret=st.sampled_from("ab"))
    def create(self, number: int, secret: str) -> None:
        if self.connections:
            connection = pick(self.connections, number)
            name = create(self.bench, connection, secret=secret)
            if self.owners.get(name) is not connection:
                self.consumers = {each: to for each, to in self.consumers.items() if to != name}
            self.owners[name] = connection

    @rule(number=st.integers(0, 9), prefetch=st.integers(1, 3))
    def consume(self, number: int, prefetch: int) -> None:
        if self.owners and len(self.consumers) < 4:
            name = pick(sorted(self.owners), number)
            consumer = self.bench.subscribe(name, on=self.owners[name], prefetch=prefetch)
            self.consumers[consumer] = name

    @rule(number=st.integers(0, 9), count=st.integers(1, 5), expires=st.booleans())
    def send(self, number: int, count: int, expires: bool) -> None:
        names = [str(temporary_destination(TEMPORARY_QUEUE, secret)) for secret in "ab"]
        name = pick(names, number)
        for _ in range(count):
            self.bench.send(name, b"%d" % self.sent, durable=bool(self.sent % 2), expires=2**42 * expires)
            self.sent += 1
            if name in self.owners:
                self.waiting[name] += 1
            else:
                self.unclaimed += 1

    @rule(number=st.integers(0, 9), reject=st.booleans())
    def settle_one(self, number: int, reject: bool) -> None:
        self.bench.settle()
        seen = [(each, tag) for each in self.consumers for tag in each.unacked]
        if not seen:
            return
        consumer, tag = pick(seen, number)
        if reject:
            self.bench.core.reject(consumer, tag)
        else:
            self.bench.core.acknowledge(consumer, tag)
            self.waiting[self.consumers[consumer]] -= 1
        self.bench.end()

    @rule(number=st.integers(0, 9))
    def leave(self, number: int) -> None:
        if self.consumers:
            consumer = pick(self.consumers, number)
            del self.consumers[consumer]
            self.bench.leave(consumer)

    @rule(number=st.integers(0, 9), settled=st.booleans())
    def disconnect(self, number: int, settled: bool) -> None:
        if not self.connections:
            return
        if settled:
            self.bench.settle()
        connection = pick(self.connections, number)
        self.connections.remove(connection)
        self.bench.disconnect(connection)
        self.consumers = {each: to for each, to in self.consumers.items() if each.connection is not connection}
        for name in [name for name, owner in self.owners.items() if owner is connection]:
            del self.owners[name]
            self.unclaimed += self.waiting.pop(name, 0)

    @rule(crash=st.booleans())
    def begin_again(self, crash: bool) -> None:
        if crash:
            self.bench.crash()
        else:
            self.bench.driver.restart()
        assert not self.bench.driver.core.queues, "something was stored"
        self.connections.clear()
        self.owners.clear()
        self.consumers.clear()
        self.waiting.clear()
        self.unclaimed = 0

    @rule()
    def come_to_rest(self) -> None:
        self.bench.settle()
        core = self.bench.driver.core
        assert core.temporaries.unclaimed == self.unclaimed
        depths = {name: core.by_destination[name].depth for name in self.owners}
        assert depths == {name: self.waiting[name] for name in self.owners}
        shown = {entry.message.body for entry in self.outstanding()}
        assert len(shown) == len(self.outstanding()), "one message with two consumers"

    def outstanding(self) -> list[Entry]:
        return [entry for each in self.consumers for entry in each.unacked.values()]

    def teardown(self) -> None:
        self.come_to_rest()


TestTemporaries = TemporaryMachine.TestCase
TestTemporaries.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ---- in a network


class Net(World):
    """Brokers, and what their clients are shown."""

    def __init__(self, names: str, **options: Any) -> None:
        super().__init__(
            names,
            chain(names),
            limits=Limits(window_messages_max=4),
            delivery=DeliveryPolicy(),
            network=NetworkConfig(**options),
        )
        self.shown: list[tuple[str, bytes]] = []
        self.untaken: list[tuple[Broker, Entry]] = []
        self.heal()

    def show(self, broker: Broker, consumer: Consumer, entry: Entry) -> None:
        self.shown.append((broker.name, entry.message.body))
        self.untaken.append((broker, entry))

    def take(self) -> bool:
        """The transports take what was shown."""
        untaken, self.untaken = self.untaken, []
        for broker, entry in untaken:
            broker.run(lambda core, entry=entry: core.taken([entry]))
        return bool(untaken)

    def quiet(self) -> None:
        """All links up, and everything at rest."""
        self.heal(self.take)

    def ask(self, name: str, kind: str = TEMPORARY_QUEUE, secret: str = "s") -> tuple[Connection, str]:
        """A client of a broker that consumes a temporary destination of its own."""
        broker = self.brokers[name]
        connection = broker.connect()

        def act(core: Any) -> str:
            destination: str = core.temporaries.create(connection, kind, secret)
            core.start(core.subscribe(connection, destination, AUTO))
            return destination

        return connection, broker.run(act)

    def send(self, name: str, to: str, *bodies: bytes) -> None:
        for body in bodies:
            self.brokers[name].run(lambda core, body=body: core.send(Message(to, body)))

    def counts(self) -> dict[str, int]:
        return {name: each.core.temporaries.unclaimed for name, each in self.brokers.items()}

    def left_over(self) -> list[str]:
        """Whatever is there but empty lanes."""
        return [
            f"{name}: {queue}"
            for name, broker in self.brokers.items()
            for queue in broker.core.queues.values()
            if queue.kind != LINK or queue.depth
        ]


@pytest.mark.parametrize("kind", [TEMPORARY_QUEUE, TEMPORARY_TOPIC])
def test_a_reply_finds_its_asker_two_brokers_away(kind: str) -> None:
    net = Net("abc", include=("/queue/only.these",))
    asker, name = net.ask("a", kind)
    net.rest(net.take)
    net.send("c", name, b"1", b"2")
    net.send("a", name, b"3")
    net.rest(net.take)
    assert sorted(net.shown) == [("a", b"1"), ("a", b"2"), ("a", b"3")]
    net.brokers["a"].run(lambda core: core.disconnect(asker))
    net.rest(net.take)
    net.send("c", name, b"late")
    net.quiet()
    assert net.counts() == {"a": 0, "b": 0, "c": 1}
    assert net.left_over() == []


def test_replies_on_their_way_when_the_asker_leaves_are_counted_where_they_are() -> None:
    net = Net("abc", link_messages_max=2)
    asker, name = net.ask("a")
    net.rest(net.take)
    net.send("c", name, *[b"%d" % number for number in range(12)])
    for way in net.ways():
        net.deliver(way, 1)
    net.brokers["a"].run(lambda core: core.disconnect(asker))
    net.quiet()
    assert sum(net.counts().values()) == 12
    assert net.left_over() == []


def test_a_cut_link_leaves_nothing_behind() -> None:
    net = Net("abc")
    _, name = net.ask("a")
    net.rest(net.take)
    net.send("c", name, b"before")
    net.cut(("a", "b"))
    for end in net.dead_ends():
        net.notice(end)
    net.rest(net.take)
    net.send("c", name, b"while it is cut")
    net.quiet()
    net.send("c", name, b"after")
    net.rest(net.take)
    assert ("a", b"after") in net.shown
    assert len(net.shown) + sum(net.counts().values()) == 3
    assert net.counts()["c"] >= 1


def test_an_asker_that_moves_to_another_broker_gets_what_waits_at_the_first() -> None:
    net = Net("ab")
    broker = net.brokers["a"]
    before = broker.connect()
    name = broker.run(lambda core: core.temporaries.create(before, TEMPORARY_QUEUE, "s"))
    net.send("a", name, b"1", b"2")
    _, same = net.ask("b")
    assert same == name
    net.rest(net.take)
    broker.run(lambda core: core.disconnect(before))
    net.quiet()
    net.send("a", name, b"3")
    net.rest(net.take)
    assert sorted(net.shown) == [("b", b"1"), ("b", b"2"), ("b", b"3")]
    assert sum(net.counts().values()) == 0


def test_a_reply_in_a_lane_is_taken_when_the_asker_is_gone() -> None:
    """What crosses a link is accepted there, and counted: it does not come back as a dead letter."""
    net = Net("ab")
    asker, name = net.ask("a")
    net.rest(net.take)
    net.send("b", name, b"reply")
    net.brokers["b"].settle()
    net.brokers["a"].run(lambda core: core.disconnect(asker))
    net.quiet()
    assert sum(net.counts().values()) == 1
    assert net.left_over() == []
