"""What topics keep for late subscribers: last value, last N, last T seconds; in order, once, and bounded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.consumer_options import ConsumerOptions
from pybroker.core import recovery
from pybroker.core.consumer import Consumer
from pybroker.message import Message
from pybroker.policies import DestinationPolicy
from tests.core.bench import Bench

T = "/topic/vitals.icu"
DIGITS = [b"%d" % number for number in range(6)]
ASKS = ConsumerOptions(retroactive=True)


def bench(**values: Any) -> Bench:
    limits = {name: values.pop(name) for name in list(values) if name in ("recovery_bytes_max", "recovery_topics_max")}
    return Bench(policy=({"match": "/topic/vitals.>", **values},), **limits)


def late(one: Bench, to: str = T, options: ConsumerOptions = ASKS, **more: Any) -> Consumer:
    consumer = one.subscribe(to, options=options, **more)
    one.settle()
    return consumer


@pytest.mark.parametrize("durable", [True, False])
def test_the_last_n_come_before_what_is_new_in_order_and_once(durable: bool):
    one = bench(recovery_messages=3)
    one.send(T, *DIGITS, durable=durable)
    consumer = late(one)
    one.send(T, b"new", durable=durable)
    one.settle()
    assert one.bodies(consumer) == [b"3", b"4", b"5", b"new"]


def test_the_last_value_alone_and_only_for_who_asks():
    one = bench(recovery_messages=1)
    one.send(T, *DIGITS)
    assert one.bodies(late(one)) == [b"5"]
    assert one.bodies(late(one, options=ConsumerOptions())) == []


def test_a_policy_may_give_it_to_everybody():
    one = bench(recovery_messages=1, recovery_always=True)
    one.send(T, *DIGITS)
    assert one.bodies(late(one, options=ConsumerOptions())) == [b"5"]


def test_the_last_seconds():
    one = bench(recovery_seconds=2.0)
    for body in DIGITS:
        one.send(T, body)
        one.driver.now += 1_000
    assert one.bodies(late(one)) == [b"4", b"5"]
    one.driver.now += 10_000
    assert one.bodies(late(one)) == []


def test_a_pattern_gets_those_of_all_its_topics_in_the_order_of_their_publication():
    one = bench(recovery_messages=2)
    for body in DIGITS:
        one.send("/topic/vitals.icu" if int(body) % 2 else "/topic/vitals.er", body)
    one.send("/topic/other", b"not kept")
    assert one.bodies(late(one, "/topic/vitals.*")) == [b"2", b"3", b"4", b"5"]


@pytest.mark.parametrize("always", [True, False])
def test_a_plain_subscriber_is_handed_no_more_than_may_wait_for_it(always: bool):
    """Else it would be ended as slow as soon as something new comes, each time that it comes back."""
    one = bench(recovery_messages=100, recovery_always=always, pending_messages_max=3)
    one.send(T, *DIGITS)
    consumer = late(one, prefetch=1)
    durable = late(one, durable_name="d", client_id="c")
    for body in (b"3", b"4", b"5"):
        assert one.bodies(consumer)[-1] == body
        one.ack(consumer, body)
        one.send(T, b"new")
        one.settle()
    assert not one.eye.closed
    assert one.bodies(consumer) == [b"3", b"4", b"5", b"new"]
    assert one.bodies(durable)[:6] == DIGITS


def test_the_newest_that_a_subscriber_wants_are_chosen():
    one = bench(recovery_messages=100, pending_messages_max=2)
    for body in DIGITS:
        one.send(T, body, header_block=b"even:%d\n" % (int(body) % 2 == 0))
    assert one.bodies(late(one, options=ConsumerOptions(retroactive=True, selector="even = 1"))) == [b"2", b"4"]


def test_who_asks_for_nothing_costs_no_walk_over_the_topics(monkeypatch: pytest.MonkeyPatch):
    one = bench(recovery_messages=1)
    one.send(T, b"1")
    monkeypatch.setattr(recovery, "matches", lambda pattern, parts: pytest.fail("a walk over the topics"))
    late(one, "/topic/>", ConsumerOptions())
    monkeypatch.undo()
    monkeypatch.setattr(one.core.policies, "of", lambda target: DestinationPolicy())
    assert one.bodies(late(one, "/topic/>")) == [b"1"], "by the policy that the topic had when something was kept"


def test_selectors_and_expiry_hold():
    one = bench(recovery_messages=10)
    one.core.send(Message(T, b"a", b"k:1\n"))
    one.core.send(Message(T, b"b", b"k:2\n"))
    one.core.send(Message(T, b"c", b"k:2\n", expires=one.driver.now + 10))
    one.end()
    one.driver.now += 20
    assert one.bodies(late(one, options=ConsumerOptions(selector="k = 2", retroactive=True))) == [b"b"]


def test_a_new_durable_subscription_keeps_what_it_was_given_through_a_crash_and_gets_it_once():
    one = bench(recovery_messages=2)
    one.send(T, *DIGITS)
    consumer = late(one, client_id="me", durable_name="sub")
    assert one.bodies(consumer) == [b"4", b"5"]
    one.crash()
    again = late(one, client_id="me", durable_name="sub")
    assert one.seen(again) == [(b"4", 1), (b"5", 1)]


def test_nothing_is_shown_before_it_is_committed():
    one = bench(recovery_messages=1)
    one.subscribe(T, client_id="me", durable_name="sub")
    one.settle()
    one.send(T, b"1")
    consumer = one.subscribe(T, options=ASKS)
    assert one.bodies(consumer) == []
    one.settle()
    assert one.bodies(consumer) == [b"1"]


def test_what_is_kept_is_bounded_in_all():
    one = bench(recovery_messages=100, recovery_bytes_max=2 * (512 + 20) + 10)
    for name in "abc":
        one.send(f"/topic/vitals.{name}", bytes(20))
    assert (one.core.recovery.size, len(one.core.recovery)) == (2 * (512 + 20), 2)
    assert one.bodies(late(one, "/topic/vitals.a")) == []
    few = bench(recovery_messages=1, recovery_topics_max=2)
    for name in "abc":
        few.send(f"/topic/vitals.{name}", b"x")
    assert len(few.core.recovery) == 2


@settings(deadline=None, max_examples=100)
@given(
    count=st.integers(0, 4),
    seconds=st.integers(0, 4),
    size_max=st.integers(1, 3_000),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2_000)), max_size=20),
)
def test_it_is_what_a_naive_list_would_give(count: int, seconds: int, size_max: int, steps: list[tuple[int, int]]):
    one = bench(recovery_messages=count, recovery_seconds=float(seconds), recovery_bytes=size_max)
    kept: list[tuple[int, bytes]] = []
    for size, wait in steps:
        body = bytes(size)
        one.send(T, body)
        kept.append((one.driver.now, body))
        kept = [each for each in kept if not seconds or each[0] >= one.driver.now - seconds * 1_000]
        kept = kept[-count:] if count else kept
        while sum(len(each) + 512 for _, each in kept) > size_max and len(kept) > 1:
            kept.pop(0)
        one.driver.now += wait
    expected = [body for at, body in kept if not seconds or at >= one.driver.now - seconds * 1_000]
    assert one.bodies(late(one)) == (expected if count or seconds else [])
