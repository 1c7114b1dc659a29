"""Expiry of what is only in memory: nothing early, nothing forgotten, nothing that piles up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.core.entry import Entry
from pybroker.core.expiries import Expiries
from pybroker.message import Message
from tests.core.bench import Bench
from tests.core.promises import leftovers


def entry(expires: int) -> Entry:
    queue: Any = None
    return Entry(Message("/queue/a", b"", expires=expires), 0, queue, False)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 6_000)),
            st.tuples(st.just("discard"), st.integers(0, 20)),
            st.tuples(st.just("due"), st.integers(0, 1_500)),
        ),
        max_size=60,
    )
)
def test_due_takes_out_what_has_expired(steps: list[tuple[str, int]]):
    expiries = Expiries()
    model: list[Entry] = []
    now = 0
    for what, number in steps:
        if what == "add":
            model.append(entry(number))
            expiries.add(model[-1])
        elif what == "discard" and model:
            expiries.discard(model.pop(number % len(model)))
        elif what == "due":
            now += number
            found = set(expiries.due(now))
            assert found == {e for e in model if e.message.expires <= now}
            model = [e for e in model if e not in found]
        assert len(expiries) == len(model)


def test_discarding_what_is_not_there_does_nothing():
    expiries = Expiries()
    expiries.discard(entry(5))
    assert len(expiries) == 0


def test_far_seconds_that_were_emptied_do_not_pile_up():
    expiries = Expiries()
    for second in range(10_000):
        one = entry(second * 1_000 + 1)
        expiries.add(one)
        expiries.discard(one)
    assert len(expiries._seconds) <= 100


def test_a_sweep_removes_what_nobody_ever_asked_for_wherever_it_is():
    bench = Bench(window_messages_max=2)
    for durable in (True, False):
        for number in range(6):
            bench.send("/queue/a", b"%d" % number, durable=durable, expires=bench.driver.now + 50 + number)
    bench.send("/queue/a", b"stays")
    bench.settle()
    bench.driver.now += 52
    bench.core.sweep()
    bench.end()
    bench.settle()
    assert bench.queue("/queue/a").depth == 7  # 0, 1 and 2 of either kind have gone
    bench.driver.now += 1_000
    bench.core.sweep()
    bench.end()
    bench.settle()
    queue = bench.queue("/queue/a")
    assert (queue.depth, queue.counts.expired) == (1, 12)
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.bodies(consumer) == [b"stays"]


def test_what_is_out_when_it_expires_can_be_acknowledged_and_is_not_given_out_again():
    bench = Bench()
    consumer = bench.subscribe("/queue/a")
    bench.send("/queue/a", b"1", b"2", expires=bench.driver.now + 50)
    bench.settle()
    bench.driver.now += 100
    bench.core.sweep()
    bench.end()
    bench.settle()
    bench.ack(consumer, b"1")
    bench.nack(consumer, b"2")
    bench.settle()
    assert bench.seen(consumer) == [(b"1", 0), (b"2", 0)]
    assert bench.queue("/queue/a").depth == 0
    assert leftovers(bench.driver.store) == []


@pytest.mark.parametrize("durable", [True, False])
def test_what_has_expired_and_was_not_swept_yet_is_not_delivered(durable: bool):
    bench = Bench()
    bench.send("/queue/a", b"1", durable=durable, expires=bench.driver.now + 50)
    bench.send("/queue/a", b"2", durable=durable)
    bench.settle()
    bench.driver.now += 50
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.bodies(consumer) == [b"2"]
    assert bench.queue("/queue/a").counts.expired == 1


def test_a_message_that_has_expired_already_is_not_taken():
    bench = Bench()
    bench.send("/queue/a", b"1", expires=bench.driver.now)
    assert bench.queue("/queue/a").depth == 0
    assert bench.core.expired_on_arrival == 1


def test_shared_bodies_go_with_the_last_reference_that_expires():
    bench = Bench(window_messages_max=1)
    for name in ("one", "two", "three"):
        bench.leave(bench.subscribe("/topic/t", durable_name=name, client_id="c"))
    bench.send("/topic/t", b"1", b"2", b"3", expires=bench.driver.now + 50)
    bench.settle()
    bench.crash()
    bench.driver.now += 100
    bench.core.sweep()
    bench.end()
    bench.settle()
    assert leftovers(bench.driver.store) == []
