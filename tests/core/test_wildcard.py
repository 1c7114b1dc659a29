"""Consumers of several queues: patterns and composites."""

from __future__ import annotations

from typing import Any

import pytest

from pybroker.config import DeliveryPolicy, Limits, PolicyEntry
from pybroker.consumer_options import ConsumerOptions
from pybroker.core.consumer import AUTO, CUMULATIVE, INDIVIDUAL, JOIN_WORK, Connection, Consumer
from pybroker.core.invariants import check_invariants
from pybroker.errors import InvalidDestination, LimitExceeded, SubscriptionError, UnknownDelivery
from pybroker.message import Message
from tests.core.driver import Driver, Ignore


class Broker:
    """A driver, and what one of its clients does."""

    def __init__(self, limits: Limits | None = None, **options: Any) -> None:
        self.seen = Ignore()
        delivery = DeliveryPolicy(deliveries_max=2, dead_letter_queue="/queue/DLQ")
        self.driver = Driver(limits or Limits(), delivery, self.seen, **options)

    @property
    def core(self) -> Any:
        return self.driver.core

    def done(self) -> None:
        self.driver.end_turn()
        self.driver.settle()
        check_invariants(self.core)

    def send(self, name: str, *bodies: str, block: bytes = b"", expires: int = 0) -> None:
        core = self.driver.begin_turn()
        for body in bodies:
            core.send(Message(f"/queue/{name}", body.encode(), block, True, 4, expires and core.now + expires))
        self.done()

    def subscribe(
        self,
        destination: str,
        mode: str = INDIVIDUAL,
        prefetch: int = 10,
        connection: Connection | None = None,
        **options: Any,
    ) -> Consumer:
        connection = connection or self.driver.connect()
        core = self.driver.begin_turn()
        consumer: Consumer = core.subscribe(
            connection, destination, mode, prefetch=prefetch, options=ConsumerOptions(**options)
        )
        core.start(consumer)
        self.done()
        return consumer

    def got(self) -> list[str]:
        """What was delivered since the last call."""
        found = [
            f"{entry.message.destination.removeprefix('/queue/')}:{body.decode()}"
            for _, entry, _, body in self.seen.deliveries
        ]
        self.seen.deliveries.clear()
        return found

    def settle(self, consumer: Consumer, *tags: int, done: bool = True) -> None:
        core = self.driver.begin_turn()
        for tag in tags:
            (core.acknowledge if done else core.reject)(consumer, tag)
        self.done()

    def depth(self, name: str) -> int:
        depth: int = self.core.by_destination[f"/queue/{name}"].depth
        return depth


def test_a_pattern_gets_what_is_in_its_queues_and_what_comes_to_new_ones() -> None:
    broker = Broker()
    broker.send("orders.a", "1")
    broker.send("orders.b.c", "no")
    broker.send("other", "no")
    consumer = broker.subscribe("/queue/orders.*")
    assert broker.got() == ["orders.a:1"]
    broker.send("orders.new", "2")
    broker.send("orders.a", "3")
    assert broker.got() == ["orders.new:2", "orders.a:3"]
    broker.settle(consumer, 2, 1, 3)
    assert [broker.depth(name) for name in ("orders.a", "orders.new", "orders.b.c", "other")] == [0, 0, 1, 1]


def test_a_composite_makes_the_queues_that_it_names_and_may_have_patterns() -> None:
    broker = Broker()
    broker.subscribe("/queue/a, b,queue://c.>")
    assert {"/queue/a", "/queue/b"} <= broker.core.by_destination.keys()
    for name in ("a", "b", "c.d", "e"):
        broker.send(name, "1")
    assert broker.got() == ["a:1", "b:1", "c.d:1"]


def test_a_queue_that_two_parts_match_is_consumed_once() -> None:
    broker = Broker()
    broker.subscribe("/queue/a.*,/queue/a.b,/queue/>")
    broker.send("a.b", "1", "2")
    assert broker.got() == ["a.b:1", "a.b:2"]
    assert len(broker.core.by_destination["/queue/a.b"].consumers) == 1


@pytest.mark.parametrize("mode", [INDIVIDUAL, CUMULATIVE])
def test_a_deep_queue_does_not_starve_a_trickling_one(mode: str) -> None:
    broker = Broker()
    broker.send("q.deep", *map(str, range(40)))
    consumer = broker.subscribe("/queue/q.*", mode, prefetch=1)
    broker.send("q.trickle", "a", "b", "c")
    for tag in range(1, 6):
        broker.settle(consumer, tag)
    assert broker.got() == ["q.deep:0", "q.deep:1", "q.trickle:a", "q.deep:2", "q.trickle:b", "q.deep:3"]


def test_queues_share_a_large_credit_equally() -> None:
    broker = Broker()
    for name in ("q.a", "q.b", "q.c"):
        broker.send(name, *map(str, range(20)))
    broker.subscribe("/queue/q.*", prefetch=9)
    assert sorted(broker.got()) == [f"q.{name}:{number}" for name in "abc" for number in range(3)]


def test_the_credit_and_the_bytes_are_those_of_all_queues_together() -> None:
    broker = Broker(Limits(prefetch_bytes_max=20))
    consumer = broker.subscribe("/queue/a,/queue/b", prefetch=2)
    broker.send("a", "1")
    broker.send("b", "2")
    broker.send("a", "3")
    assert len(broker.got()) == 2
    broker.settle(consumer, 1)
    assert broker.got() == ["a:3"]
    broker.settle(consumer, 2, 3)
    broker.send("a", "x" * 30)
    broker.send("b", "5")
    assert broker.got() == ["a:" + "x" * 30]
    broker.settle(consumer, 4)
    assert broker.got() == ["b:5"]


def test_plain_consumers_of_the_queues_get_their_part() -> None:
    broker = Broker()
    plain = broker.subscribe("/queue/a")
    head = broker.subscribe("/queue/>")
    broker.send("a", *"123456")
    assert (len(plain.unacked), len(head.unacked)) == (3, 3)


def test_acknowledging_by_ranges_and_up_to_a_tag_over_several_queues() -> None:
    broker = Broker()
    consumer = broker.subscribe("/queue/a,/queue/b", CUMULATIVE)
    for name in "abab":
        broker.send(name, name)
    broker.settle(consumer, 3)
    assert [broker.depth(name) for name in "ab"] == [0, 1]
    other = broker.subscribe("/queue/c,/queue/d")
    for name in "cdcd":
        broker.send(name, name)
    core = broker.driver.begin_turn()
    core.acknowledge_ranges(other, [(1, 2)])
    core.reject_ranges(other, [(4, 4)])
    with pytest.raises(UnknownDelivery):
        core.acknowledge_ranges(other, [(1, 3)])
    broker.done()
    assert [broker.depth(name) for name in "cd"] == [0, 1]


def test_what_is_rejected_returns_to_its_own_queue_and_becomes_a_dead_letter_there() -> None:
    broker = Broker()
    consumer = broker.subscribe("/queue/a,/queue/b")
    broker.send("a", "1")
    broker.send("b", "2")
    broker.settle(consumer, 1, 2, done=False)
    broker.settle(consumer, 3, 4, done=False)
    assert broker.got() == ["a:1", "b:2", "a:1", "b:2"]
    assert [broker.depth(name) for name in ("a", "b", "DLQ")] == [0, 0, 2]


def test_dead_letters_are_consumed_by_patterns_that_read_as_their_names_only() -> None:
    policies = (PolicyEntry("/queue/own.>", {"dead_letter_queue": "/queue/DLQ.{name}"}),)
    broker = Broker(policies=policies)
    everything = broker.subscribe("/queue/>")
    letters = broker.subscribe("/queue/DLQ.*.*")
    alone = broker.subscribe("/queue/DLQ,/queue/none.*")
    broker.send("own.a", "1")
    broker.send("b", "2")
    for tags in ((1, 2), (3, 4)):
        broker.settle(everything, *tags, done=False)
    assert [entry.message.destination for entry in letters.unacked.values()] == ["/queue/DLQ.own.a"]
    assert [entry.message.destination for entry in alone.unacked.values()] == ["/queue/DLQ"]
    assert not everything.unacked


def test_leaving_returns_each_message_to_its_own_queue() -> None:
    broker = Broker()
    connection = broker.driver.connect()
    consumer = broker.subscribe("/queue/a,/queue/b", connection=connection)
    broker.send("a", "1", "2")
    broker.send("b", "3")
    core = broker.driver.begin_turn()
    core.disconnect(connection)
    core.unsubscribe(consumer)  # once more does nothing
    broker.done()
    assert [broker.depth(name) for name in "ab"] == [2, 1]
    broker.got()
    broker.send("c", "new")
    broker.subscribe("/queue/a")
    assert broker.got() == ["a:1", "a:2"]


def test_transactions_settle_deliveries_of_several_queues() -> None:
    broker = Broker()
    connection = broker.driver.connect()
    consumer = broker.subscribe("/queue/a,/queue/b", CUMULATIVE, 2, connection)
    broker.send("a", "1", "2")
    broker.send("b", "3", "4")
    for end in ("abort", "commit"):
        first, last = consumer.unacked
        core = broker.driver.begin_turn()
        core.begin(connection, "t")
        core.acknowledge(consumer, last, "t")
        broker.done()
        assert len(consumer.unacked) == 2, first
        getattr(broker.driver.begin_turn(), end)(connection, "t")
        broker.done()
        if end == "abort":
            assert [broker.depth(name) for name in "ab"] == [2, 2]
    assert broker.depth("a") + broker.depth("b") == 2


def test_a_paused_connection_is_given_nothing_of_any_queue() -> None:
    broker = Broker()
    connection = broker.driver.connect()
    consumer = broker.subscribe("/queue/*", connection=connection)
    broker.driver.begin_turn().pause(connection)
    broker.done()
    broker.send("a", "1")
    broker.send("b", "2")
    assert broker.got() == []
    broker.driver.begin_turn().resume(connection)
    broker.done()
    assert sorted(broker.got()) == ["a:1", "b:2"]
    broker.driver.begin_turn().set_prefetch(consumer, 0)
    broker.done()
    broker.send("c", "3")
    assert broker.got() == []
    broker.driver.begin_turn().set_prefetch(consumer, 3)
    broker.done()
    assert broker.got() == ["c:3"]


def test_nothing_is_given_before_the_start() -> None:
    broker = Broker()
    core = broker.driver.begin_turn()
    consumer = core.subscribe(broker.driver.connect(), "/queue/a,/queue/b", INDIVIDUAL)
    broker.send("a", "1")
    assert broker.got() == []
    core.start(consumer)
    broker.done()
    assert broker.got() == ["a:1"]


def test_selectors_groups_and_exclusive_consumers_in_each_queue() -> None:
    broker = Broker()
    broker.subscribe("/queue/*", selector="s = '1'", prefetch=1)
    broker.send("a", "no")
    broker.send("a", "yes", block=b"s:1\n")
    assert broker.got() == ["a:yes"]
    owner = broker.subscribe("/queue/x,/queue/y", exclusive=True, prefetch=1)
    broker.subscribe("/queue/x", prefetch=5)
    broker.send("x", "1", "2")
    assert broker.got() == ["x:1"]
    broker.settle(owner, 1)
    assert broker.got() == ["x:2"]
    one = broker.subscribe("/queue/g.*")
    two = broker.subscribe("/queue/g.*")
    for name in ("g.a", "g.b"):
        broker.send(name, "1", "2", block=b"JMSXGroupID:g\n")
    assert {len(one.unacked), len(two.unacked)} in ({2}, {4, 0})


def test_higher_priority_goes_first_in_each_queue() -> None:
    broker = Broker()
    low = broker.subscribe("/queue/a")
    high = broker.subscribe("/queue/*", priority=5, prefetch=2)
    broker.send("a", "1", "2", "3")
    assert (len(high.unacked), len(low.unacked)) == (2, 1)


def test_automatic_acknowledgement() -> None:
    broker = Broker()
    consumer = broker.subscribe("/queue/*", AUTO, 1)
    broker.send("a", "1", "2")
    broker.send("b", "3")
    for _ in range(3):
        broker.driver.begin_turn().taken(list(consumer.unacked.values()))
        broker.done()
    assert sorted(broker.got()) == ["a:1", "a:2", "b:3"]
    assert [broker.depth(name) for name in "ab"] == [0, 0]


def test_redelivery_delays_hold_one_queue_only() -> None:
    policies = (PolicyEntry("/queue/>", {"redelivery_delay": 1.0, "redelivery_waiting_max": 1}),)
    broker = Broker(policies=policies)
    consumer = broker.subscribe("/queue/a,/queue/b", prefetch=1)
    broker.send("a", "1", "2")
    broker.settle(consumer, 1, done=False)
    assert broker.got() == ["a:1"]
    broker.send("b", "3")
    broker.settle(consumer, 2)
    assert broker.got() == ["b:3"]
    broker.driver.wait(3_000)
    broker.done()
    broker.settle(consumer, 3)
    assert broker.got() == ["a:1", "a:2"]


def test_a_restart_joins_queues_of_the_store() -> None:
    broker = Broker()
    broker.send("a.x", "1")
    broker.driver.restart()
    broker.subscribe("/queue/a.*")
    assert broker.got() == ["a.x:1"]


def test_a_pattern_counts_once_and_a_composite_has_a_limit() -> None:
    limits = Limits(subscriptions_max=2, composite_destinations_max=3, destinations_max=4)
    broker = Broker(limits)
    connection = broker.driver.connect()
    with pytest.raises(LimitExceeded, match="composite_destinations_max"):
        broker.subscribe("/queue/a,b,c,d", connection=connection)
    broker.subscribe("/queue/a,b,c", connection=connection)
    broker.subscribe("/queue/>", connection=connection)
    with pytest.raises(LimitExceeded, match="subscriptions_max"):
        broker.subscribe("/queue/>", connection=connection)
    with pytest.raises(LimitExceeded, match="destinations_max"):
        broker.subscribe("/queue/d,e")
    assert "/queue/d" not in broker.core.by_destination


def test_all_queues_of_the_patterns_of_a_connection_have_a_limit() -> None:
    """A consumer that would miss a queue made later is ended, and told so; what it holds comes back."""
    broker = Broker(Limits(wildcard_queues_max=3))
    for name in ("q.1", "q.2"):
        broker.send(name, name)
    connection = broker.driver.connect()
    consumer = broker.subscribe("/queue/q.*", connection=connection)
    with pytest.raises(LimitExceeded, match=r"wildcard_queues_max is 3"):
        broker.subscribe("/queue/q.1,other", connection=connection)
    assert "/queue/other" not in broker.core.by_destination
    broker.send("q.3", "q.3")
    assert len(consumer.unacked) == connection.members == 3
    broker.subscribe("/queue/q.1")  # another connection has room of its own
    broker.send("q.4", "q.4")
    (closed,) = broker.seen.closed
    assert closed[0] is consumer
    assert "wildcard_queues_max" in str(closed[1])
    assert not connection.members
    after = broker.subscribe("/queue/q.2,q.3,q.4", connection=connection)
    assert sorted(entry.message.body for entry in after.unacked.values()) == [b"q.2", b"q.3", b"q.4"]


def test_each_queue_of_a_pattern_counts_in_a_turn() -> None:
    broker = Broker()
    for number in range(10):
        broker.send(f"q.{number}", "x")
    core = broker.driver.begin_turn()
    core.work = 0
    consumer = core.subscribe(broker.driver.connect(), "/queue/>", INDIVIDUAL)
    assert core.work >= 10 * JOIN_WORK
    core.work = 0
    core.unsubscribe(consumer)
    assert core.work >= 10 * JOIN_WORK


def test_what_is_refused() -> None:
    broker = Broker()
    core, connection = broker.core, broker.driver.connect("client")
    with pytest.raises(SubscriptionError, match="is for queues"):
        core.subscribe(connection, "/queue/a,/topic/b", INDIVIDUAL)
    with pytest.raises(SubscriptionError, match="durable"):
        core.subscribe(connection, "/queue/a.*", INDIVIDUAL, durable_name="d")
    with pytest.raises(InvalidDestination):
        core.subscribe(connection, "/queue/a,", INDIVIDUAL)
    assert not connection.consumers


@pytest.mark.parametrize("prefetch", range(1, 7))
@pytest.mark.parametrize("lasting", [0, 1])
def test_a_dead_letter_that_takes_the_credit_while_its_queue_is_walked(prefetch: int, lasting: int) -> None:
    policies = (PolicyEntry("/queue/>", {"dead_letter_expired": True}),)
    broker = Broker(Limits(window_messages_max=4), policies=policies)
    broker.subscribe("/queue/a", selector="s = 'none'", prefetch=3)
    for number in range(3):
        broker.send("a", f"early {number}", f"early {number} too", expires=50)
        broker.send("a", *("late",) * lasting)
    broker.driver.now += 100
    consumer = broker.subscribe("/queue/a,/queue/DLQ", prefetch=prefetch)
    broker.send("a", "last")
    while consumer.unacked:
        broker.settle(consumer, next(iter(consumer.unacked)))
    assert sorted(broker.got()) == sorted(
        [
            *(f"DLQ:early {number}{more}" for number in range(3) for more in ("", " too")),
            *("a:late",) * 3 * lasting,
            "a:last",
        ]
    )


def test_advisories_tell_of_each_queue() -> None:
    broker = Broker()
    broker.subscribe("/topic/ActiveMQ.Advisory.Consumer.Queue.>", AUTO, 100)
    connection = broker.driver.connect()
    broker.subscribe("/queue/p.*,/queue/a", connection=connection)
    broker.send("p.new", "1")
    broker.driver.begin_turn().disconnect(connection)
    broker.done()
    told = [entry.message.destination.rpartition("Queue.")[2] for _, entry, _, _ in broker.seen.deliveries]
    assert sorted(name for name in told if name in ("a", "p.new")) == ["a", "a", "p.new", "p.new"]
