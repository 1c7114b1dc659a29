"""Faults that were found in the core, each with the smallest sequence that showed it."""

from __future__ import annotations

import pytest

from pybroker.core import queue as queue_module
from pybroker.core.consumer import AUTO
from pybroker.message import Message
from tests.core.bench import Bench
from tests.core.promises import leftovers


def test_a_subscription_removed_in_the_turn_that_touched_it_leaves_no_descriptor():
    bench = Bench()
    consumer = bench.core.subscribe(bench.connect(), "/topic/t", AUTO, durable_name="s", client_id="c")
    bench.core.unsubscribe(consumer)
    bench.core.remove_subscription("c", "s")
    bench.end()
    bench.settle()
    bench.crash()
    assert bench.driver.store.records == []


def test_a_removed_subscription_empties_itself_though_its_window_was_cut_during_a_read():
    bench = Bench(window_messages_max=2)
    bench.subscribe("/topic/t", durable_name="s", client_id="c", prefetch=1)
    consumer = next(iter(next(iter(bench.core.connections)).consumers))
    bench.send("/topic/t", *b"1 2 3 4 5 6".split())
    bench.settle()
    bench.ack(consumer, b"1")
    assert consumer.queue.page is not None  # a page is asked for ...
    bench.core.shrink()
    consumer.queue.shrink(1, 0)
    bench.send("/topic/t", b"urgent", b"more", priority=9)
    consumer.queue.shrink(1, 0)
    assert consumer.queue.tail < consumer.queue.page.start  # ... and doesn't join the window any more
    bench.leave(consumer)
    bench.core.remove_subscription("c", "s")
    bench.end()
    bench.settle()
    assert not bench.core.queues
    assert leftovers(bench.driver.store) == []


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_spooled_messages_of_a_plain_subscription_that_left_before_the_commit_are_counted_out_once(end: str):
    bench = Bench(window_messages_max=1)
    bench.send("/queue/other", b"a", b"b", b"c", durable=False)  # two of them are in the spool
    connection = bench.connect()
    consumer = bench.subscribe("/topic/t", on=connection, prefetch=1)
    bench.send("/topic/t", *b"1 2 3".split(), durable=False)
    bench.settle()
    bench.core.begin(connection, "x")
    for body in b"1 2 3".split():
        bench.ack(consumer, body, "x")
        bench.settle()
    bench.leave(consumer)
    (bench.core.commit if end == "commit" else bench.core.abort)(connection, "x")
    bench.end()
    assert (bench.core.spooled, bench.core.spooled_bytes) == (2, 2)
    other = bench.subscribe("/queue/other")
    bench.settle()
    assert bench.bodies(other) == [b"a", b"b", b"c"]


def test_a_dead_letter_of_a_page_does_not_raise_the_lower_bound_above_the_rest_of_the_page(monkeypatch):
    monkeypatch.setattr(queue_module, "HEAD_EVERY", 1)
    bench = Bench(deliveries_max=1, window_messages_max=8)
    consumer = bench.subscribe("/queue/a", prefetch=1)
    bench.send("/queue/a", *b"1 2 3 4 5 6 7 8".split())
    bench.settle()
    assert bench.seen(consumer) == [(b"1", 0)]
    bench.crash()  # "1" was its last delivery
    bench.subscribe("/queue/a", prefetch=1)
    bench.settle()  # verifies that no message lies before its queue's head
    bench.crash()
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.bodies(consumer) == [b"3", b"4", b"5", b"6", b"7", b"8"]  # "2" had its delivery, too


def test_a_spooled_message_that_goes_while_the_expiry_index_is_read_is_counted_out_once():
    bench = Bench(window_messages_max=1)
    consumer = bench.subscribe("/queue/a", prefetch=1)
    options = {"durable": False, "expires": bench.driver.now + 50}
    bench.send("/queue/a", b"1", b"2", b"3", **options)
    bench.settle()
    for body in (b"1", b"2"):
        bench.ack(consumer, body)
        bench.settle()
    assert bench.bodies(consumer) == [b"1", b"2", b"3"]  # "3" was in the spool, and its row is in the spool's index
    bench.driver.now += 100
    bench.core.sweep()
    bench.end()
    bench.driver.commit()
    bench.driver.step_read()
    bench.driver.step_read()  # both indexes were read
    bench.ack(consumer, b"3")
    bench.send("/queue/a", b"4", b"5", b"6", durable=False, priority=9)  # "6" has no room in the window
    bench.settle()
    queue = consumer.queue
    assert (queue.spooled, queue.transient, bench.core.spooled) == (1, 3, 1)


def test_what_a_consumer_left_in_the_same_turn_has_not_been_seen():
    bench = Bench()
    other = bench.subscribe("/queue/a")
    bench.core.pause(other.connection)
    leaving = bench.core.subscribe(bench.connect(), "/queue/a", AUTO)
    bench.core.start(leaving)
    bench.core.send(Message("/queue/a", b"1", durable=False))
    bench.core.resume(other.connection)
    bench.core.unsubscribe(leaving)
    bench.end()
    assert bench.seen(leaving) == []
    assert bench.seen(other) == [(b"1", 0)]


def test_an_outbox_that_drains_after_its_consumer_left_takes_nothing_from_the_next_consumer():
    bench = Bench()
    leaving = bench.subscribe("/queue/a", AUTO)
    bench.send("/queue/a", b"1")
    bench.settle()
    stale = bench.entries(leaving)
    bench.leave(leaving)
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    bench.core.taken(stale)
    bench.end()
    assert bench.seen(consumer) == [(b"1", 1)]
    bench.ack(consumer, b"1")


def test_a_plain_subscriber_sees_a_durable_message_of_a_topic_no_sooner_than_its_commit():
    bench = Bench()
    bench.subscribe("/topic/t", durable_name="s", client_id="c")
    plain = bench.subscribe("/topic/t")
    bench.settle()
    bench.send("/topic/t", b"1")
    assert bench.seen(plain) == []
    bench.settle()
    assert bench.seen(plain) == [(b"1", 0)]


def test_a_plain_subscriber_sees_nothing_of_a_transaction_before_its_commit():
    bench = Bench()
    plain = bench.subscribe("/topic/t")
    connection = bench.connect()
    bench.core.begin(connection, "x")
    bench.core.send_later(connection, Message("/queue/a", b"1"), "x")
    bench.core.send_later(connection, Message("/topic/t", b"2"), "x")
    bench.core.commit(connection, "x")
    bench.end()
    assert bench.seen(plain) == []
    bench.settle()
    assert bench.seen(plain) == [(b"2", 0)]


def test_a_message_that_only_went_out_of_memory_unseen_is_counted_from_its_first_showing():
    bench = Bench(window_messages_max=1)
    first = bench.subscribe("/queue/a", prefetch=1)
    bench.send("/queue/a", b"0", b"1")
    bench.leave(first)  # held, and never shown
    bench.settle()
    queue = bench.queue("/queue/a")
    bench.send("/queue/a", b"urgent", priority=9)
    queue.shrink(1, 0)
    bench.end()
    bench.settle()
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.seen(consumer) == [(b"urgent", 0), (b"0", 0), (b"1", 0)]
    bench.crash()
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.seen(consumer) == [(b"urgent", 1), (b"0", 1), (b"1", 1)]


def test_a_delivery_that_writes_nothing_but_the_mark_waits_for_it():
    bench = Bench()
    bench.send("/queue/a", b"1")
    bench.settle()
    bench.crash()
    consumer = bench.subscribe("/queue/a")
    for _ in range(3):
        bench.driver.step_read()
    assert bench.seen(consumer) == []
    bench.settle()
    assert bench.seen(consumer) == [(b"1", 0)]
    bench.crash()
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.seen(consumer) == [(b"1", 1)]


def test_a_subscriber_that_fell_behind_and_left_in_one_turn_is_not_ended_again():
    bench = Bench(backlog_messages_max=1)
    connection = bench.connect()
    consumer = bench.subscribe("/topic/t", on=connection, prefetch=1)
    for body in b"1 2 3 4".split():
        bench.core.send(Message("/topic/t", body, durable=False))
    bench.core.unsubscribe(consumer)
    bench.end()
    assert bench.eye.closed == []


def test_a_transaction_of_a_plain_subscription_that_left_is_counted_in_memory_until_its_end():
    bench = Bench()
    connection = bench.connect()
    consumer = bench.subscribe("/topic/t", on=connection)
    bench.send("/topic/t", b"1", durable=False)
    bench.core.begin(connection, "x")
    bench.ack(consumer, b"1", "x")
    bench.leave(consumer)  # checks the invariants
    assert bench.core.memory_bytes > 0
    bench.core.commit(connection, "x")
    bench.end()
    assert bench.core.memory_bytes == 0
