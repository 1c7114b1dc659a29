"""Advisories in the core: what is told, to whom, how often, and that nothing is when nobody listens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.config import DeliveryPolicy, Limits, NetworkConfig
from pybroker.consumer_options import ConsumerOptions
from pybroker.core.advisories import PREFIX
from pybroker.core.consumer import AUTO, Connection, Consumer
from pybroker.destination import TEMPORARY_QUEUE, parse_destination
from pybroker.errors import InvalidDestination
from pybroker.message import Message
from tests.core.bench import Bench
from tests.core.network import World
from tests.core.network_story import chain

ALL = "/topic/ActiveMQ.Advisory.>"


class Watcher:
    """Somebody who subscribes to advisories."""

    def __init__(self, bench: Bench, to: str = ALL) -> None:
        self.bench = bench
        self.consumer = bench.subscribe(to, AUTO)
        self._read = 0
        self.news()

    def news(self) -> list[tuple[str, dict[str, str]]]:
        """What has been told since: the names without their beginning, and the headers."""
        self.bench.settle()
        entries = self.bench.entries(self.consumer)
        fresh, self._read = entries[self._read :], len(entries)
        self.bench.core.taken(fresh)
        self.bench.end()
        assert not any(entry.message.durable for entry in fresh)
        messages = [entry.message for entry in fresh]
        return [(each.destination.removeprefix(f"/topic/{PREFIX}"), dict(each.headers)) for each in messages]

    def names(self) -> list[str]:
        return [name for name, _ in self.news()]


def announce(bench: Bench, client_id: str = "") -> Connection:
    core = bench.core
    connection = core.connect(bench, client_id)
    core.announce(connection, "id-7")
    bench.end()
    return connection


# ---- what is told


def test_connections_consumers_and_producers() -> None:
    bench = Bench()
    watcher = Watcher(bench)
    connection = announce(bench, "ward")
    name, headers = watcher.news()[0]
    assert name == "Connection"
    assert headers == {
        "type": "Advisory",
        "originBrokerName": "",
        "connectionId": "id-7",
        "clientId": "ward",
        "event": "start",
    }
    one = bench.subscribe("/queue/a.b", on=connection)
    bench.subscribe("/topic/t.*", on=connection)
    (first, headers), (second, _) = watcher.news()
    assert (first, second) == ("Consumer.Queue.a.b", "Consumer.Topic.t.*")
    assert (headers["consumerCount"], headers["event"], headers["originalDestination"]) == ("1", "start", "/queue/a.b")
    bench.leave(one)
    ((name, headers),) = watcher.news()
    assert (name, headers["consumerCount"], headers["event"]) == ("Consumer.Queue.a.b", "0", "stop")
    for _ in range(2):
        bench.core.advisories.producers(connection, ["/queue/a.b", "/topic/x", "no destination", "/queue/a,b"])
    bench.end()
    assert watcher.names() == ["Producer.Queue.a.b", "Producer.Topic.x"]
    bench.disconnect(connection)
    found = [(name, headers["event"]) for name, headers in watcher.news()]
    assert found == [
        ("Consumer.Topic.t.*", "stop"),
        ("Producer.Queue.a.b", "stop"),
        ("Producer.Topic.x", "stop"),
        ("Connection", "stop"),
    ]


def test_who_listens_after_others_is_told_of_producers_again() -> None:
    bench = Bench()
    producer = announce(bench)
    for _ in range(2):
        watcher = Watcher(bench, "/topic/ActiveMQ.Advisory.Producer.>")
        for _ in range(2):
            bench.core.advisories.producers(producer, ("/queue/q",))
            bench.end()
        assert watcher.names() == ["Producer.Queue.q"]
        bench.leave(watcher.consumer)
        assert not producer.produced


def test_a_temporary_queue_s_consumer() -> None:
    bench = Bench()
    watcher = Watcher(bench)
    connection = announce(bench)
    to = bench.core.temporaries.create(connection, TEMPORARY_QUEUE, "s")
    bench.subscribe(to, on=connection)
    assert watcher.names() == ["Connection", f"Consumer.TempQueue.{to.removeprefix('/remote-temp-queue/')}"]


def test_messages_that_nobody_consumes_expire_or_are_dead_letters() -> None:
    bench = Bench(deliveries_max=1)
    watcher = Watcher(bench)
    bench.send("/queue/q", b"1")
    bench.send("/topic/t", b"nobody")
    (one, headers), (two, _) = watcher.news()
    assert (one, two) == ("NoConsumer.Queue.q", "NoConsumer.Topic.t")
    assert headers["originalMessageId"]
    consumer = bench.subscribe("/queue/q")
    bench.settle()
    bench.nack(consumer, b"1")
    found = dict(watcher.news())
    assert found["MessageDLQd.Queue.q"]["reason"] == "deliveries"
    assert "NoConsumer.Queue.DLQ" in found
    bench.leave(consumer)
    bench.send("/queue/q", b"2", expires=bench.driver.now + 10)
    bench.send("/queue/q", b"3", expires=bench.driver.now)
    bench.driver.now += 20
    bench.core.sweep()
    bench.end()
    assert watcher.names().count("Expired.Queue.q") == 2


def test_what_expires_behind_the_window() -> None:
    bench = Bench(window_messages_max=2)
    watcher = Watcher(bench, "/topic/ActiveMQ.Advisory.Expired.Queue.q")
    bench.send("/queue/q", *[b"%d" % number for number in range(9)], expires=bench.driver.now + 10)
    bench.settle()
    bench.driver.now += 20
    bench.core.sweep()
    bench.end()
    assert len(watcher.news()) == 9


def test_slow_consumers() -> None:
    bench = Bench(backlog_messages_max=2)
    watcher = Watcher(bench, "/topic/ActiveMQ.Advisory.SlowConsumer.>")
    connection = announce(bench)
    bench.subscribe("/queue/q", on=connection)
    bench.core.pause(connection)
    bench.end()
    assert watcher.names() == ["SlowConsumer.Queue.q"]
    bench.subscribe("/topic/t", prefetch=1)
    bench.send("/topic/t", *[b"%d" % number for number in range(4)])
    assert "SlowConsumer.Topic.t" in watcher.names()


def test_a_full_broker() -> None:
    bench = Bench()
    watcher = Watcher(bench)
    bench.core.advisories.full(Message("/queue/q", b""), "limits.queue_messages_max is 1")
    bench.core.advisories.full(Message("nonsense", b""), "limits.queue_messages_max is 1")
    bench.end()
    ((name, headers),) = watcher.news()
    assert (name, headers["usageName"]) == ("FULL.Queue.q", "limits.queue_messages_max is 1")


# ---- to whom


def test_nobody_listens_and_nothing_is_made() -> None:
    bench = Bench()
    wide, other = bench.subscribe("/topic/>"), bench.subscribe("/topic/*.Advisory.>")
    assert not bench.driver.core.watched
    bench.send("/queue/q", b"1")
    assert bench.bodies(wide) == bench.bodies(other) == []
    watcher = Watcher(bench, "/topic/ActiveMQ.>")
    assert bench.driver.core.watched
    bench.send("/queue/q", b"2")
    assert watcher.names() == ["NoConsumer.Queue.q"]
    assert bench.bodies(wide) == bench.bodies(other) == []
    bench.leave(watcher.consumer)
    assert not bench.driver.core.watched
    bench.send("/queue/q", b"3")
    assert bench.driver.core.unrouted == 0


def test_a_durable_subscription_hears_again_after_a_restart() -> None:
    bench = Bench()
    bench.subscribe(ALL, durable_name="d", client_id="c")
    bench.settle()
    bench.crash()
    assert bench.driver.core.watched
    bench.send("/queue/q", b"1")
    consumer = bench.subscribe(ALL, durable_name="d", client_id="c")
    bench.settle()
    names = [entry.message.destination for entry in bench.entries(consumer)]
    assert names == [f"/topic/{PREFIX}NoConsumer.Queue.q"]
    bench.leave(consumer)
    bench.core.remove_subscription("c", "d")
    bench.end()
    assert not bench.driver.core.watched


def test_no_advisories_about_advisories() -> None:
    """One watcher who does not read is ended; that is told to nobody, and nothing goes round in a circle."""
    bench = Bench(backlog_messages_max=3)
    lazy: Consumer = bench.subscribe("/topic/ActiveMQ.>", prefetch=1)
    watcher = Watcher(bench)
    for number in range(12):
        bench.send("/queue/q", b"%d" % number)
        assert set(watcher.names()) <= {"NoConsumer.Queue.q"}
    assert lazy not in lazy.queue.consumers
    assert bench.eye.closed[0][0] is lazy


@pytest.mark.parametrize("name", ["Connection", "Expired.Queue.q"])
def test_clients_can_not_pretend(name: str) -> None:
    bench = Bench()
    with pytest.raises(InvalidDestination, match="own advisories"):
        bench.send(f"/topic/{PREFIX}{name}", b"")
    with pytest.raises(InvalidDestination, match="own advisories"):
        bench.core.check(Message(f"/topic/{PREFIX}{name}", b""))
    bench.send("/topic/ActiveMQ.other", b"")


def test_no_rule_nor_mirror_leads_there_nor_does_a_topic_that_is_remembered() -> None:
    name = f"/topic/{PREFIX}x"
    bench = Bench(routing={"mirrored_queues": ["/queue/visory.>"], "mirror_prefix": "ActiveMQ.Ad"})
    consumer = bench.subscribe(ALL)
    bench.core.topic(parse_destination(name))
    told = len(bench.seen(consumer))
    for to in (name, "/queue/visory.x", "/queue/a,/queue/visory.x"):
        with pytest.raises(InvalidDestination, match="own advisories"):
            bench.send(to, b"forged")
    bench.settle()
    assert len(bench.seen(consumer)) == told


def test_they_do_not_cross_links() -> None:
    world = World("ab", chain("ab"), limits=Limits(), delivery=DeliveryPolicy(), network=NetworkConfig())
    world.heal()
    broker, other = world.brokers["a"], world.brokers["b"]
    connection = broker.connect()
    broker.run(lambda core: core.subscribe(connection, ALL, AUTO))
    world.heal()
    other.run(lambda core: core.send(Message("/queue/q", b"")))
    world.heal()
    assert not other.core.watched
    assert sum(queue.depth for queue in broker.core.queues.values()) == 0


def test_a_selector_picks_out_the_queues_that_nobody_consumes() -> None:
    """As ActiveMQ's documentation has it: ``consumerCount = 0``."""
    bench = Bench()
    monitor = bench.subscribe(
        "/topic/ActiveMQ.Advisory.Consumer.>", options=ConsumerOptions(selector="consumerCount = '0'")
    )
    consumers = [bench.subscribe("/queue/q") for _ in range(2)]
    for consumer in consumers:
        bench.leave(consumer)
    bench.settle()
    (entry,) = bench.entries(monitor)
    assert dict(entry.message.headers)["consumerCount"] == "0"


# ---- how often


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 700)), min_size=1, max_size=20), st.integers(1, 4))
def test_so_many_a_second_and_all_are_counted(bursts: list[tuple[int, int]], limit: int) -> None:
    bench = Bench(advisories_per_second=limit)
    watcher = Watcher(bench, "/topic/ActiveMQ.Advisory.NoConsumer.>")
    times: list[int] = []
    sent = counted = 0
    for count, pause in bursts:
        bench.send("/queue/q", *[b""] * count)
        sent += count
        for _, headers in watcher.news():
            times.append(bench.driver.now)
            counted += 1 + int(headers.get("suppressed", "0"))
        bench.driver.now += pause
    for start in times:
        assert sum(start <= time < start + 500 for time in times) <= 2 * limit
    bench.driver.now += 1_000
    bench.send("/queue/q", b"last")
    ((_, headers),) = watcher.news()
    assert counted + 1 + int(headers.get("suppressed", "0")) == sent + 1
    assert bench.driver.core.advisories.suppressed == sent - len(times)


@pytest.mark.parametrize("template", ["/queue/DLQ.{name}", "/queue/{name}.DLQ"])
@pytest.mark.parametrize("to", ["/queue/" + "a" * 1_020, "/topic/x.>", "/topic/x.*", "/queue/" + ".".join("a" * 64)])
def test_one_about_any_name_is_told_and_if_it_is_rejected_dropped(to: str, template: str) -> None:
    """Its own name may be too long for a name, or a pattern: nothing takes it for one that a message can be sent to."""
    policy = ({"match": "/topic/>", "dead_letter_queue": template, "dead_letter_expired": True},)
    bench = Bench(1, policy=policy, window_messages_max=2)
    connection = bench.driver.connect("c")
    watcher = bench.subscribe(ALL, on=connection, durable_name="d")
    mine = bench.subscribe("/queue/mine", on=connection)
    bench.send("/queue/mine", b"1")
    bench.settle()
    for _ in range(5):
        bench.leave(bench.subscribe(to))
    bench.settle()
    told = bench.entries(watcher)
    name = to.removeprefix("/queue/").removeprefix("/topic/")
    assert any(entry.message.destination.endswith(f".{name}") for entry in told)
    bench.core.reject(watcher, told[0].tag)
    bench.end()
    queue = watcher.queue
    assert (queue.counts.dropped, queue.counts.dead_lettered) == (1, 0)
    bench.disconnect(connection)
    bench.settle()
    assert not bench.queue("/queue/mine").outstanding
    assert mine not in bench.queue("/queue/mine").consumers
    assert queue.counts.dropped == len(told)
    assert bench.core.by_destination.keys() - {to} == {"/queue/mine", "/queue/DLQ"}
    assert bench.queue("/queue/DLQ").depth == 1, "the message in /queue/mine"
