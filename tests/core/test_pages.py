"""Pages of a queue that changes while they are read: what came, what went, and what is out meanwhile."""

from __future__ import annotations

import pytest

from pybroker.core.consumer import Consumer
from tests.core.bench import Bench
from tests.core.promises import leftovers

DIGITS = [b"%d" % number for number in range(10)]


def reading(bench: Bench) -> None:
    """The first read in line has read the store and the spool, and has not been handed over."""
    bench.driver.commit()
    assert bench.driver.reads
    while bench.driver.reads[0].steps < 2:
        bench.driver.step_read()


def consume(bench: Bench, consumer: Consumer) -> list[bytes]:
    """Acknowledge everything that comes, one by one, and say what a client has seen in all."""
    bench.settle()
    while consumer.unacked:
        bench.ack(consumer, next(iter(consumer.unacked.values())).message.body)
        bench.settle()
    assert leftovers(bench.driver.store) == []
    assert bench.core.memory_bytes == 0
    assert bench.core.spooled == 0
    return bench.bodies(consumer)


def behind(durable: bool) -> tuple[Bench, Consumer]:
    """A consumer that has 1 and 2, with u (shown) and v (behind the window's end) of a higher priority."""
    bench = Bench(window_messages_max=8)
    consumer = bench.subscribe("/queue/a", prefetch=3)
    bench.core.pause(consumer.connection)
    bench.send("/queue/a", b"1", b"2", durable=durable)
    bench.queue("/queue/a").shrink(1, 0)
    bench.core.resume(consumer.connection)
    bench.end()
    bench.settle()
    assert bench.bodies(consumer) == [b"1", b"2"]
    bench.core.pause(consumer.connection)
    bench.send("/queue/a", b"u", b"v", priority=9, durable=durable)
    bench.queue("/queue/a").shrink(1, 0)
    bench.core.resume(consumer.connection)
    bench.end()
    assert consumer.queue.page is not None
    assert min(consumer.queue.outstanding) < consumer.queue.page.start < max(consumer.queue.outstanding)
    return bench, consumer


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_out_is_not_given_out_again_though_a_page_has_it(durable: bool):
    bench, consumer = behind(durable)
    reading(bench)
    bench.settle()
    assert bench.bodies(consumer) == [b"1", b"2", b"u"]
    assert consume(bench, consumer) == [b"1", b"2", b"u", b"v"]


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_acknowledged_while_a_page_is_read_does_not_come_back_with_it(durable: bool):
    bench, consumer = behind(durable)
    reading(bench)
    bench.ack(consumer, b"2")
    assert consume(bench, consumer) == [b"1", b"2", b"u", b"v"]


@pytest.mark.parametrize("durable", [True, False])
def test_what_comes_back_while_a_page_is_read_is_counted(durable: bool):
    bench, consumer = behind(durable)
    reading(bench)
    bench.nack(consumer, b"2")
    bench.settle()
    while consumer.unacked:
        bench.ack(consumer, next(iter(consumer.unacked.values())).message.body)
        bench.settle()
    assert bench.seen(consumer) == [(b"1", 0), (b"2", 0), (b"u", 0), (b"v", 0), (b"2", 1)]


@pytest.mark.parametrize("committed", [True, False])
@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_what_arrives_while_a_page_is_read_is_neither_lost_nor_doubled(count: int, durable: bool, committed: bool):
    bench = Bench(window_messages_max=8)  # a page has room for 4, and keeps 4 arrivals in memory
    bench.send("/queue/a", *DIGITS[:4], durable=durable)
    bench.queue("/queue/a").shrink(1, 0)
    consumer = bench.subscribe("/queue/a", prefetch=1)
    reading(bench)
    bench.send("/queue/a", *DIGITS[4 : 4 + count], durable=durable)
    if committed:
        bench.driver.commit()
    assert consume(bench, consumer) == DIGITS[: 4 + count]


@pytest.mark.parametrize("durable", [True, False])
def test_arrivals_before_the_read_come_once(durable: bool):
    bench = Bench(window_messages_max=4)
    bench.send("/queue/a", *DIGITS[:3], durable=durable)
    bench.queue("/queue/a").shrink(1, 0)
    consumer = bench.subscribe("/queue/a", prefetch=1)
    bench.send("/queue/a", *DIGITS[3:9], durable=durable)
    assert consume(bench, consumer) == DIGITS[:9]


def test_a_page_that_no_longer_joins_the_window_is_read_again():
    bench = Bench(window_messages_max=4)
    bench.send("/queue/a", *DIGITS[:6])
    bench.queue("/queue/a").shrink(2, 1 << 20)
    consumer = bench.subscribe("/queue/a", prefetch=1)
    reading(bench)
    page = consumer.queue.page
    bench.send("/queue/a", b"u", b"v", priority=9)
    bench.queue("/queue/a").shrink(1, 0)
    assert page is not None
    assert consumer.queue.tail is not None
    assert consumer.queue.tail < page.start
    bench.end()
    assert consume(bench, consumer) == [b"0", b"u", b"v", *DIGITS[1:6]]


@pytest.mark.parametrize("durable", [True, False])
def test_what_expires_while_a_page_is_read_does_not_come_with_it(durable: bool):
    bench = Bench(window_messages_max=8)
    bench.send("/queue/a", *DIGITS[:2], durable=durable)
    bench.send("/queue/a", *DIGITS[2:4], durable=durable, expires=bench.driver.now + 50)
    bench.send("/queue/a", *DIGITS[4:6], durable=durable)
    bench.queue("/queue/a").shrink(1, 0)
    bench.end()
    bench.settle()
    bench.driver.now += 100
    bench.core.sweep()
    consumer = bench.subscribe("/queue/a", prefetch=1)
    bench.driver.commit()
    assert len(bench.driver.reads) == 2
    for _ in range(6):  # the index, then the page; what the first one removed is not committed yet
        bench.driver.step_read()
    assert consume(bench, consumer) == [b"0", b"1", b"4", b"5"]
    assert consumer.queue.counts.expired == 2


def test_a_row_of_the_expiry_index_that_went_while_it_was_read_is_counted_once():
    bench = Bench()
    consumer = bench.subscribe("/queue/a", prefetch=2)
    bench.send("/queue/a", b"1", b"2", expires=bench.driver.now + 50)
    bench.settle()
    bench.driver.now += 100
    bench.core.sweep()
    bench.end()
    reading(bench)
    bench.ack(consumer, b"2")
    bench.core.pause(consumer.connection)
    bench.send("/queue/a", b"u", b"v", priority=9)
    consumer.queue.shrink(1, 0)
    assert consumer.queue.tail is not None
    bench.core.resume(consumer.connection)
    bench.end()
    bench.settle()
    assert consumer.queue.counts.expired == 0
    assert consume(bench, consumer) == [b"1", b"2", b"u", b"v"]


@pytest.mark.parametrize("kind", ["durable", "plain"])
def test_a_subscription_that_goes_while_its_page_is_read_leaves_nothing(kind: str):
    bench = Bench(window_messages_max=2)
    options = {"durable_name": "s", "client_id": "c"} if kind == "durable" else {}
    consumer = bench.subscribe("/topic/t", prefetch=1, **options)
    bench.send("/topic/t", *DIGITS)
    bench.settle()
    bench.ack(consumer, b"0")
    bench.driver.commit()
    bench.send("/topic/t", b"more")
    bench.leave(consumer)
    if kind == "durable":
        bench.core.remove_subscription("c", "s")
        bench.end()
    bench.settle()
    assert not bench.core.queues
    assert leftovers(bench.driver.store) == []
    assert (bench.core.memory_bytes, bench.core.stored_bytes, bench.core.spooled) == (0, 0, 0)
