"""Idle queues go, with their records; one that is used in any way, or has a message of any sort, stays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pybroker.consumer_options import ConsumerOptions
from pybroker.core.consumer import Consumer
from pybroker.message import Message
from tests.core.bench import Bench

Q, OTHER = "/queue/referrals", "/queue/other"
SECOND = 1_000


def bench(idle_after: float = 10.0, **values: Any) -> Bench:
    return Bench(policy=({"match": "/queue/>", "idle_after": idle_after, **values},))


def sweep(one: Bench, seconds: float = 0) -> None:
    """Let time pass, and look at all queues."""
    one.driver.now += int(seconds * SECOND)
    one.core.sweep()
    one.end()
    one.settle()


def there(one: Bench, name: str = Q) -> bool:
    return name in one.driver.core.by_destination


def used_once(one: Bench, name: str = Q) -> None:
    one.send(name, b"a")
    consumer = one.subscribe(name)
    one.settle()
    one.ack(consumer, b"a")
    one.leave(consumer)
    one.settle()


def test_an_unused_queue_goes_in_time_and_nothing_of_it_stays_in_the_store():
    one = bench()
    used_once(one)
    first = one.driver.core.by_destination[Q].queue_id
    sweep(one)
    sweep(one, 9.9)
    assert there(one)
    sweep(one, 0.2)
    assert not there(one)
    assert first not in one.driver.core.queues
    one.crash()
    assert [record.name for record in one.driver.store.records] == []
    one.send(Q, b"b")
    one.settle()
    assert one.driver.core.by_destination[Q].queue_id != first
    consumer = one.subscribe(Q)
    one.settle()
    assert one.bodies(consumer) == [b"b"]


def test_by_default_none_goes():
    one = Bench()
    used_once(one)
    for _ in range(3):
        sweep(one, 1_000_000)
    assert there(one)


@pytest.mark.parametrize("durable", [True, False])
def test_one_with_a_message_stays(durable: bool):
    one = bench()
    one.send(Q, b"a", durable=durable)
    for _ in range(3):
        sweep(one, 60)
    consumer = one.subscribe(Q)
    one.settle()
    assert one.bodies(consumer) == [b"a"]
    for _ in range(3):
        sweep(one, 60)  # with its consumer
    one.core.begin(consumer.connection, "t")
    one.ack(consumer, b"a", "t")
    one.leave(consumer)
    for _ in range(3):
        sweep(one, 60)  # in a transaction
    assert there(one)
    one.disconnect(consumer.connection)
    again = one.subscribe(Q)
    one.settle()
    assert one.bodies(again) == [b"a"]


def test_one_that_waits_for_its_redelivery_stays():
    one = bench(redelivery_delay=1_000.0)
    one.send(Q, b"a")
    consumer = one.subscribe(Q)
    one.settle()
    one.nack(consumer, b"a")
    one.leave(consumer)
    for _ in range(3):
        sweep(one, 60)
    assert there(one)


@pytest.mark.parametrize("use", ["send", "consumer"])
def test_use_between_two_looks_begins_the_time_anew(use: str):
    one = bench()
    used_once(one)
    sweep(one)
    one.driver.now += 9 * SECOND
    if use == "send":
        used_once(one)
    else:
        one.leave(one.subscribe(Q))
    sweep(one, 2)
    assert there(one)
    sweep(one, 11)
    assert not there(one)


def test_a_clock_that_is_put_back_and_a_restart_begin_the_time_anew():
    one = bench()
    used_once(one)
    sweep(one)
    sweep(one, -3_600)
    sweep(one, 9)
    assert there(one)
    one.crash()
    sweep(one, 9)
    sweep(one, 9)
    assert there(one)
    sweep(one, 2)
    assert not there(one)


def test_what_collects_from_a_virtual_topic_stays():
    one = bench()
    name = "/queue/Consumer.lab.VirtualTopic.results"
    one.leave(one.subscribe(name))
    for _ in range(3):
        sweep(one, 60)
    one.send("/topic/VirtualTopic.results", b"a")
    consumer = one.subscribe(name)
    one.settle()
    assert one.bodies(consumer) == [b"a"]


def test_a_repeat_of_a_keyed_send_is_known_when_its_queue_has_gone():
    one = bench()
    headers = b"message-key:k\n"
    one.send(Q, b"a", header_block=headers)
    consumer = one.subscribe(Q)
    one.settle()
    one.ack(consumer, b"a")
    one.leave(consumer)
    sweep(one)
    sweep(one, 11)
    assert not there(one)
    one.send(Q, b"a", header_block=headers)
    assert one.driver.core.duplicates == 1
    assert not there(one)


def test_a_transaction_makes_the_queue_that_it_sends_to_anew():
    one = bench()
    used_once(one)
    sweep(one)
    connection = one.connect()
    core = one.core
    core.begin(connection, "t")
    core.send_later(connection, Message(Q, b"b"), "t")
    one.end()
    sweep(one, 11)
    assert not there(one)
    one.core.commit(connection, "t")
    one.end()
    consumer = one.subscribe(Q)
    one.settle()
    assert one.bodies(consumer) == [b"b"]


def test_a_move_under_way_finds_its_target_again():
    one = bench()
    one.send(OTHER, b"a")
    used_once(one)
    sweep(one)
    core = one.core
    core.browse(OTHER, None, moving=core.moving(OTHER, Q))
    one.driver.now += 11 * SECOND
    one.core.sweep()
    one.end()
    assert not there(one)
    one.settle()
    consumer = one.subscribe(Q)
    one.settle()
    assert one.bodies(consumer) == [b"a"]


def test_a_queue_that_had_a_selective_consumer_goes_too():
    one = bench()
    one.leave(one.subscribe(Q, options=ConsumerOptions(selector="ward = 'icu'")))
    sweep(one)
    sweep(one, 11)
    assert not there(one)


def test_each_sweep_looks_at_some_only():
    one = bench()
    one.driver.delivery = one.driver.core.delivery = type(one.driver.delivery)(idle_looks_max=3)
    for number in range(7):
        used_once(one, f"/queue/q{number}")
    left = []
    for _ in range(6):
        sweep(one, 11)
        left.append(len(one.driver.core.by_destination))
    assert left == [7, 7, 7, 4, 1, 0]


class IdleMachine(RuleBasedStateMachine):
    """Messages of three queues that come and go while time passes and lives end: what is not acknowledged is there."""

    names = st.sampled_from(["/queue/a", "/queue/b", "/queue/c"])

    def __init__(self) -> None:
        super().__init__()
        self.one = bench(2.0, deliveries_max=0)
        self.waiting: dict[str, list[bytes]] = {"/queue/a": [], "/queue/b": [], "/queue/c": []}
        self.consumers: dict[str, Consumer] = {}
        self.sent = 0

    @rule(name=names, count=st.integers(1, 3))
    def send(self, name: str, count: int) -> None:
        for _ in range(count):
            self.sent += 1
            self.waiting[name].append(b"%d" % self.sent)
            self.one.send(name, self.waiting[name][-1])
        self.one.settle()

    @rule(name=names, prefetch=st.integers(1, 3))
    def come(self, name: str, prefetch: int) -> None:
        if name not in self.consumers:
            self.consumers[name] = self.one.subscribe(name, prefetch=prefetch)
            self.one.settle()

    @rule(name=names)
    def acknowledge(self, name: str) -> None:
        self.one.settle()  # what is out has been shown
        if (consumer := self.consumers.get(name)) is not None:
            for entry in list(consumer.unacked.values()):
                self.waiting[name].remove(entry.message.body)
                self.one.ack(consumer, entry.message.body)

    @rule(name=names)
    def leave(self, name: str) -> None:
        if (consumer := self.consumers.pop(name, None)) is not None:
            self.one.leave(consumer)

    @rule(seconds=st.sampled_from([-1, 0, 1, 3]))
    def time_passes(self, seconds: int) -> None:
        self.one.driver.now += seconds * SECOND
        self.one.core.sweep()
        self.one.end()

    @rule()
    def settle(self) -> None:
        self.one.settle()

    @rule()
    def crash(self) -> None:
        self.one.settle()
        self.consumers.clear()
        self.one.crash()

    @invariant()
    def nothing_is_lost(self) -> None:
        for name, bodies in self.waiting.items():
            queue = self.one.driver.core.by_destination.get(name)
            assert (queue.depth if queue is not None else 0) == len(bodies), name

    def teardown(self) -> None:
        self.one.settle()
        self.one.crash()
        for name, bodies in self.waiting.items():
            queue = self.one.driver.core.by_destination.get(name)
            assert (queue.count if queue is not None else 0) == len(bodies), name


IdleMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestIdle = IdleMachine.TestCase
