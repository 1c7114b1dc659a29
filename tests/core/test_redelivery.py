"""`pybroker.core.redelivery`: how long a rejected message waits, where it is meanwhile, and what ends its waiting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.core.redelivery import delay_ms
from pybroker.policies import DestinationPolicy
from tests.core.bench import Bench


def bench(deliveries_max: int = 9, **values: float) -> Bench:
    return Bench(
        deliveries_max,
        policy=({"match": "/queue/>", "redelivery_delay": 1, **values}, {"match": "/topic/>", "redelivery_delay": 1}),
    )


# ---- how long


def test_each_further_redelivery_waits_longer_up_to_the_longest():
    policy = DestinationPolicy(redelivery_delay=1.5, redelivery_backoff=2.0, redelivery_delay_max=10.0)
    assert [delay_ms(policy, b"id", count) for count in (1, 2, 3, 4, 5, 10_000)] == [
        1500,
        3000,
        6000,
        10000,
        10000,
        10000,
    ]
    assert delay_ms(DestinationPolicy(), b"id", 1) == 0


@given(st.floats(0, 1e6), st.floats(1, 1_000), st.floats(0, 1e6), st.floats(0, 1), st.binary(), st.integers(1, 10**6))
def test_a_delay_is_within_its_bounds_and_always_the_same(
    delay: float, backoff: float, longest: float, jitter: float, message_id: bytes, count: int
):
    policy = DestinationPolicy(
        redelivery_delay=delay, redelivery_backoff=backoff, redelivery_delay_max=longest, redelivery_jitter=jitter
    )
    found = delay_ms(policy, message_id, count)
    assert found == delay_ms(policy, message_id, count)
    assert min(delay, longest) * (1 - jitter) * 1_000 - 1 <= found <= longest * 1_000


def test_jitter_spreads_the_messages_over_its_range():
    policy = DestinationPolicy(redelivery_delay=10.0, redelivery_jitter=0.5)
    found = [delay_ms(policy, b"id-%d" % number, 1) for number in range(1_000)]
    assert min(found) < 5_500
    assert max(found) > 14_500
    assert 9_500 < sum(found) / 1_000 < 10_500


# ---- where it is meanwhile


@pytest.mark.parametrize("durable", [True, False])
def test_others_are_delivered_while_a_rejected_message_waits(durable: bool):
    b = bench()
    consumer = b.subscribe("/queue/a", prefetch=1)
    b.send("/queue/a", b"1", b"2", b"3", durable=durable)
    b.settle()
    b.nack(consumer, b"1")
    b.settle()
    assert b.seen(consumer) == [(b"1", 0), (b"2", 0)]
    assert (b.queue("/queue/a").depth, len(b.queue("/queue/a").delayed)) == (3, 1)
    b.wait(999)
    b.ack(consumer, b"2")
    b.settle()
    assert b.bodies(consumer) == [b"1", b"2", b"3"]
    b.ack(consumer, b"3")
    b.wait(1)
    b.settle()
    assert b.seen(consumer)[3:] == [(b"1", 1)]
    b.ack(consumer, b"1")
    b.settle()
    assert (b.core.memory_bytes, b.core.stored_bytes) == (0, 0)


def test_when_it_is_due_it_stands_before_what_came_after_it():
    b = bench()
    consumer = b.subscribe("/queue/a", prefetch=1)
    b.send("/queue/a", *b"1 2 3".split())
    b.settle()
    b.nack(consumer, b"1")
    b.wait(1_000)
    b.settle()
    b.ack(consumer, b"2")
    b.settle()
    assert b.bodies(consumer) == [b"1", b"2", b"1"]


def test_after_the_last_delivery_it_is_a_dead_letter_at_once():
    b = bench(deliveries_max=2)
    consumer = b.subscribe("/queue/a")
    b.send("/queue/a", b"1")
    b.settle()
    for _ in range(2):
        b.nack(consumer, b"1")
        b.wait(1_000)
        b.settle()
    assert (b.queue("/queue/a").depth, b.queue("/queue/DLQ").depth) == (0, 1)


@pytest.mark.parametrize("how", ["leave", "disconnect", "disconnect in a transaction"])
def test_what_a_consumer_leaves_behind_does_not_wait(how: str):
    b = bench()
    connection = b.connect()
    consumer = b.subscribe("/queue/a", on=connection)
    other = b.subscribe("/queue/a", on=b.connect())
    b.send("/queue/a", b"1", b"2")
    b.settle()
    mine = b.bodies(consumer)
    if "transaction" in how:
        b.core.begin(connection, "x")
        b.ack(consumer, mine[0], "x")
    if how == "leave":
        b.leave(consumer)
    else:
        b.disconnect(connection)
    b.settle()
    assert (mine[0], 1) in b.seen(other)


def test_what_an_aborted_transaction_gives_back_waits():
    b = bench()
    connection = b.connect()
    consumer = b.subscribe("/queue/a", on=connection)
    b.send("/queue/a", b"1")
    b.settle()
    b.core.begin(connection, "x")
    b.ack(consumer, b"1", "x")
    b.core.abort(connection, "x")
    b.end()
    b.settle()
    assert b.bodies(consumer) == [b"1"]
    b.wait(1_000)
    b.settle()
    assert b.seen(consumer) == [(b"1", 0), (b"1", 1)]


def test_after_a_crash_it_is_redelivered_at_once_and_counted():
    b = bench(redelivery_delay=3_600)
    consumer = b.subscribe("/queue/a")
    b.send("/queue/a", b"1")
    b.settle()
    b.nack(consumer, b"1")
    b.settle()
    b.crash()
    consumer = b.subscribe("/queue/a")
    b.settle()
    assert b.seen(consumer) == [(b"1", 1)]


def test_one_that_expires_first_is_gone_then():
    b = bench(redelivery_delay=3_600)
    consumer = b.subscribe("/queue/a")
    b.send("/queue/a", b"1", expires=b.driver.now + 500)
    b.settle()
    b.nack(consumer, b"1")
    b.wait(499)
    assert b.queue("/queue/a").depth == 1
    b.wait(1)
    assert (b.queue("/queue/a").depth, b.queue("/queue/a").counts.expired) == (0, 1)


@pytest.mark.parametrize("durable_name", [None, "s"])
def test_a_subscription_that_goes_takes_with_it_what_waits(durable_name: str | None):
    b = bench()
    consumer = b.subscribe("/topic/t", durable_name=durable_name, client_id="c")
    b.send("/topic/t", b"1", b"2")
    b.settle()
    b.nack(consumer, b"1")
    b.leave(consumer)
    if durable_name:
        assert len(consumer.queue.delayed) == 1
        b.core.remove_subscription("c", "s")
        b.end()
    b.settle()
    assert (len(b.core.redeliveries), b.core.memory_bytes, b.core.stored_bytes) == (0, 0, 0)
    assert not b.core.queues


# ---- bounded


@pytest.mark.parametrize("limit", [{"redelivery_waiting_max": 3}, {"bytes": 300}])
def test_a_queue_in_which_much_waits_gives_out_nothing_until_some_of_it_is_due(limit: dict[str, int]):
    values = {name: value for name, value in limit.items() if name != "bytes"}
    policy = ({"match": "/queue/>", "redelivery_delay": 1, **values},)
    b = Bench(9, policy=policy, **({"window_bytes_max": limit["bytes"]} if "bytes" in limit else {}))
    consumer = b.subscribe("/queue/a", prefetch=1)
    bodies = [b"%d" % number * 100 for number in range(6)]
    b.send("/queue/a", *bodies)
    b.settle()
    for number in range(3):
        b.nack(consumer, bodies[number])
        b.wait(10)
        b.settle()
    assert b.bodies(consumer) == bodies[:3]
    late = b.subscribe("/queue/a")
    b.settle()
    assert b.bodies(late) == []
    b.wait(970)
    b.settle()
    assert b.seen(consumer)[3:] + b.seen(late)[:1] == [(bodies[0], 1), (bodies[3], 0)]


def test_a_consumer_that_leaves_a_stalled_queue_is_forgotten():
    b = bench(redelivery_waiting_max=1)
    consumer = b.subscribe("/queue/a")
    b.send("/queue/a", b"1")
    b.settle()
    b.nack(consumer, b"1")
    b.leave(consumer)
    other = b.subscribe("/queue/a")
    b.wait(1_000)
    b.settle()
    assert (b.bodies(consumer), b.bodies(other)) == ([b"1"], [b"1"])


# ---- the clock


def test_a_clock_that_is_put_back_lets_nothing_wait_longer():
    b = bench(redelivery_delay=30, redelivery_delay_max=60, redelivery_waiting_max=1)
    consumer = b.subscribe("/queue/a")
    b.send("/queue/a", b"1", b"2")
    b.settle()
    b.nack(consumer, b"1")
    b.wait(10_000)
    b.wait(-86_400_000)
    b.wait(19_999)
    b.settle()
    assert (b"1", 1) not in b.seen(consumer)
    b.wait(1)
    b.settle()
    assert b.seen(consumer).count((b"1", 1)) == 1
    assert b.queue("/queue/a").stalled is None


def test_what_waits_when_the_clock_is_put_back_unseen_waits_no_longer_than_the_longest_delay():
    b = bench(redelivery_delay=30, redelivery_delay_max=30)
    consumer = b.subscribe("/queue/a")
    b.send("/queue/a", b"1", b"2")
    b.settle()
    b.driver.now += 1_000
    b.nack(consumer, b"1")
    b.driver.now -= 86_400_000
    b.nack(consumer, b"2")  # the first time that the new time is seen
    b.wait(30_000)
    b.settle()
    assert sorted(b.seen(consumer)) == [(b"1", 0), (b"1", 1), (b"2", 0), (b"2", 1)]
