"""Whom a queue gives its messages to, in which order, and where they go when nobody wants them."""

from __future__ import annotations

import pytest

from pybroker.core.consumer import AUTO, CUMULATIVE
from pybroker.errors import SlowConsumer, SubscriptionError, UnknownDelivery
from pybroker.message import decode_headers
from tests.core.bench import Bench
from tests.core.promises import leftovers

DIGITS = [b"%d" % number for number in range(10)]


def test_consumers_take_turns():
    bench = Bench()
    consumers = [bench.subscribe("/queue/a") for _ in range(3)]
    bench.send("/queue/a", *DIGITS[:9], durable=False)
    assert [bench.bodies(consumer) for consumer in consumers] == [DIGITS[0:9:3], DIGITS[1:9:3], DIGITS[2:9:3]]


def test_a_consumer_without_credit_is_passed_over_and_comes_back():
    bench = Bench()
    slow = bench.subscribe("/queue/a", prefetch=1)
    quick = bench.subscribe("/queue/a", prefetch=10)
    bench.send("/queue/a", *DIGITS[:4], durable=False)
    assert bench.bodies(slow) == [b"0"]
    assert bench.bodies(quick) == [b"1", b"2", b"3"]
    bench.ack(slow, b"0")
    bench.send("/queue/a", b"4", b"5", durable=False)
    assert len(bench.bodies(slow)) == 2


def test_prefetch_bounds_what_is_out_and_an_acknowledgement_brings_the_next():
    bench = Bench()
    consumer = bench.subscribe("/queue/a", prefetch=2)
    bench.send("/queue/a", *DIGITS[:4], durable=False)
    assert bench.bodies(consumer) == DIGITS[:2]
    bench.ack(consumer, b"1")
    assert bench.bodies(consumer) == DIGITS[:3]


def test_prefetch_bytes_bound_what_is_out_but_one_message_always_goes():
    bench = Bench(prefetch_bytes_max=10)
    consumer = bench.subscribe("/queue/a")
    bench.send("/queue/a", b"x" * 100, b"y" * 6, b"z" * 6, b"last", durable=False)
    assert bench.bodies(consumer) == [b"x" * 100]
    bench.ack(consumer, b"x" * 100)
    assert bench.bodies(consumer)[1:] == [b"y" * 6, b"z" * 6]  # below the limit when the second one went
    bench.ack(consumer, b"y" * 6)
    assert bench.bodies(consumer)[3:] == [b"last"]


def test_higher_priorities_go_first_and_equal_ones_in_order():
    bench = Bench()
    for number, priority in enumerate((4, 0, 9, 4, 9, 5)):
        bench.send("/queue/a", DIGITS[number], priority=priority)
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.bodies(consumer) == [b"2", b"4", b"5", b"0", b"3", b"1"]


@pytest.mark.parametrize("window", [2, 100])
@pytest.mark.parametrize("durable", [True, False])
def test_what_comes_back_goes_to_its_place_marked_and_counted(window: int, durable: bool):
    bench = Bench(window_messages_max=window)
    first = bench.subscribe("/queue/a", prefetch=3)
    bench.send("/queue/a", *DIGITS[:6], durable=durable)
    bench.settle()
    bench.ack(first, b"1")
    bench.settle()
    bench.leave(first)  # it had 0, 2 and 3
    second = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.seen(second) == [(b"0", 1), (b"2", 1), (b"3", 1), (b"4", 0), (b"5", 0)]
    assert bench.queue("/queue/a").counts.redelivered == 3


def test_a_rejected_message_comes_back_before_what_followed_it():
    bench = Bench()
    consumer = bench.subscribe("/queue/a", prefetch=1)
    bench.send("/queue/a", b"1", b"2")
    bench.settle()
    bench.nack(consumer, b"1")
    bench.settle()
    assert bench.seen(consumer) == [(b"1", 0), (b"1", 1)]


def test_what_was_held_and_never_shown_is_not_counted():
    bench = Bench()
    first = bench.subscribe("/queue/a")
    bench.send("/queue/a", b"1")
    bench.leave(first)  # before the commit
    second = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.seen(first) == []
    assert bench.seen(second) == [(b"1", 0)]


def test_the_message_id_is_the_same_on_redelivery_and_after_a_crash():
    bench = Bench()
    consumer = bench.subscribe("/queue/a")
    bench.send("/queue/a", b"1")
    bench.settle()
    bench.nack(consumer, b"1")
    bench.settle()
    bench.crash()
    again = bench.subscribe("/queue/a")
    bench.settle()
    ids = {entry.message.message_id for entry in bench.entries(consumer) + bench.entries(again)}
    assert len(ids) == 1


def test_after_the_last_delivery_a_message_is_a_dead_letter_that_says_where_from_and_why():
    bench = Bench(deliveries_max=2)
    consumer = bench.subscribe("/queue/a")
    bench.send("/queue/a", b"1", header_block=b"k:v\n", priority=7, expires=bench.driver.now + 1_000)
    bench.settle()
    for _ in range(2):
        bench.nack(consumer, b"1")
        bench.settle()
    assert bench.seen(consumer) == [(b"1", 0), (b"1", 1)]
    graveyard = bench.subscribe("/queue/DLQ")
    bench.settle()
    (letter,) = [entry.message for entry in bench.entries(graveyard)]
    assert decode_headers(letter.header_block) == [
        ("dead-letter-origin", "/queue/a"),
        ("dead-letter-expires", str(bench.driver.now + 1_000)),
        ("dead-letter-reason", "deliveries"),
        ("dead-letter-deliveries", "2"),
        ("dead-letter-time", str(bench.driver.now)),
        ("k", "v"),
    ]
    assert (letter.body, letter.priority, letter.expires, letter.durable) == (b"1", 7, 0, True)
    assert letter.message_id == bench.entries(consumer)[0].message.message_id
    bench.ack(graveyard, b"1")
    bench.settle()
    assert leftovers(bench.driver.store) == []


def test_a_dead_letter_of_a_durable_subscription_names_it():
    bench = Bench(deliveries_max=1)
    consumer = bench.subscribe("/topic/t", durable_name="s", client_id="c")
    bench.send("/topic/t", b"1")
    bench.settle()
    bench.nack(consumer, b"1")
    graveyard = bench.subscribe("/queue/DLQ")
    bench.settle()
    headers = dict(bench.entries(graveyard)[0].message.headers)
    assert headers["dead-letter-subscription"] == "c/s"
    assert headers["dead-letter-origin"] == "/topic/t"


def test_dead_letters_that_are_rejected_stay_where_they_are():
    bench = Bench(deliveries_max=2)
    bench.send("/queue/DLQ", b"1")
    consumer = bench.subscribe("/queue/DLQ")
    bench.settle()
    for _ in range(5):
        bench.nack(consumer, b"1")
        bench.settle()
    assert bench.seen(consumer) == [(b"1", count) for count in range(6)]


def test_a_message_that_kills_its_consumers_process_becomes_a_dead_letter_in_the_end():
    bench = Bench(deliveries_max=3)
    bench.send("/queue/a", b"1", b"2")
    bench.settle()
    counts = []
    for _ in range(3):
        bench.crash()
        consumer = bench.subscribe("/queue/a", prefetch=1)
        bench.settle()
        counts += bench.seen(consumer)
    assert counts == [(b"1", 0), (b"1", 1), (b"1", 2)]
    bench.crash()
    consumer = bench.subscribe("/queue/a", prefetch=1)
    graveyard = bench.subscribe("/queue/DLQ")
    bench.settle()
    assert bench.bodies(consumer) == [b"2"]
    assert bench.bodies(graveyard) == [b"1"]


def test_a_cumulative_acknowledgement_is_for_all_before_it():
    bench = Bench()
    consumer = bench.subscribe("/queue/a", CUMULATIVE)
    bench.send("/queue/a", *DIGITS[:5])
    bench.settle()
    bench.ack(consumer, b"2")
    assert [entry.message.body for entry in consumer.unacked.values()] == [b"3", b"4"]
    with pytest.raises(UnknownDelivery):
        bench.core.acknowledge(consumer, 1)
    bench.nack(consumer, b"4")
    bench.settle()
    assert bench.seen(consumer)[5:] == [(b"3", 1), (b"4", 1)]


def test_what_was_settled_or_never_shown_can_not_be_acknowledged():
    bench = Bench()
    consumer = bench.subscribe("/queue/a")
    bench.send("/queue/a", b"1")
    tag = bench.tag(consumer, b"1")
    with pytest.raises(UnknownDelivery):
        bench.core.acknowledge(consumer, tag)  # held until its commit
    bench.settle()
    bench.ack(consumer, b"1")
    for act in (bench.core.acknowledge, bench.core.reject):
        with pytest.raises(UnknownDelivery):
            act(consumer, tag)
    auto = bench.subscribe("/queue/b", AUTO)
    bench.send("/queue/b", b"1")
    bench.settle()
    with pytest.raises(UnknownDelivery):
        bench.core.acknowledge(auto, bench.tag(auto, b"1"))


def test_automatic_acknowledgement_comes_when_the_transport_took_the_message():
    bench = Bench()
    consumer = bench.subscribe("/queue/a", AUTO, prefetch=1)
    bench.send("/queue/a", b"1", b"2")
    bench.settle()
    assert bench.bodies(consumer) == [b"1"]
    assert bench.queue("/queue/a").depth == 2
    bench.core.taken(bench.entries(consumer))
    bench.end()
    bench.settle()
    assert bench.bodies(consumer) == [b"1", b"2"]
    assert bench.queue("/queue/a").counts.acknowledged == 1


def test_a_paused_connection_is_given_nothing_until_it_resumes():
    bench = Bench()
    connection = bench.connect()
    paused = bench.subscribe("/queue/a", on=connection, prefetch=2)
    bench.core.pause(connection)
    bench.send("/queue/a", b"1", durable=False)
    assert bench.bodies(paused) == []
    other = bench.subscribe("/queue/a", prefetch=1)
    assert bench.bodies(other) == [b"1"]
    bench.send("/queue/a", b"2", b"3", durable=False)
    bench.core.resume(connection)
    bench.end()
    assert bench.bodies(paused) == [b"2", b"3"]


def test_an_acknowledgement_on_a_paused_connection_brings_nothing():
    bench = Bench()
    consumer = bench.subscribe("/queue/a", prefetch=1)
    bench.send("/queue/a", b"1", b"2", durable=False)
    bench.core.pause(consumer.connection)
    bench.ack(consumer, b"1")
    assert bench.bodies(consumer) == [b"1"]


def test_a_non_durable_message_does_not_overtake_a_durable_one_before_it():
    bench = Bench()
    consumer = bench.subscribe("/queue/a")
    bench.send("/queue/a", b"1", durable=True)
    bench.send("/queue/a", b"2", durable=False)
    assert bench.seen(consumer) == []
    bench.settle()
    assert bench.bodies(consumer) == [b"1", b"2"]


def test_a_subscriber_of_a_topic_that_falls_behind_is_closed_with_a_reason():
    bench = Bench(backlog_messages_max=5)
    slow = bench.subscribe("/topic/t", prefetch=1)
    quick = bench.subscribe("/topic/t", AUTO)
    durable = bench.subscribe("/topic/t", durable_name="s", client_id="c", prefetch=1)
    for number in range(8):
        bench.send("/topic/t", b"%d" % number, durable=False)
        bench.core.taken(bench.entries(quick))
        bench.end()
    ((consumer, error),) = bench.eye.closed
    assert consumer is slow
    assert isinstance(error, SlowConsumer)
    assert "backlog_messages_max" in str(error)
    assert len(bench.bodies(quick)) == 8
    assert durable.queue.depth == 8
    assert slow.queue.queue_id not in bench.core.queues


def test_a_durable_subscription_collects_while_its_owner_is_away():
    bench = Bench()
    bench.leave(bench.subscribe("/topic/a.*", durable_name="s", client_id="c"))
    bench.send("/topic/a.b", b"1")
    bench.settle()
    bench.crash()
    bench.send("/topic/a.c", b"2")
    bench.send("/topic/a.b.c", b"no")
    consumer = bench.subscribe("/topic/a.*", durable_name="s", client_id="c")
    bench.settle()
    assert bench.seen(consumer) == [(b"1", 0), (b"2", 0)]


def test_a_durable_subscription_has_one_consumer_and_one_topic():
    bench = Bench()
    bench.subscribe("/topic/t", durable_name="s", client_id="c")
    with pytest.raises(SubscriptionError, match="in use"):
        bench.subscribe("/topic/t", durable_name="s", client_id="c")
    with pytest.raises(SubscriptionError, match="unsubscribe it first"):
        bench.subscribe("/topic/other", durable_name="s", client_id="c")
    with pytest.raises(SubscriptionError, match="in use"):
        bench.core.remove_subscription("c", "s")
    with pytest.raises(SubscriptionError, match="no durable"):
        bench.core.remove_subscription("c", "other")
    with pytest.raises(SubscriptionError, match="client id"):
        bench.subscribe("/topic/t", durable_name="s")


@pytest.mark.parametrize("durable", [True, False])
def test_a_queue_far_deeper_than_its_window_comes_out_whole_and_in_order(durable: bool):
    bench = Bench(window_messages_max=4)
    bodies = [b"%d" % number for number in range(100)]
    bench.send("/queue/a", *bodies, durable=durable)
    bench.settle()
    queue = bench.queue("/queue/a")
    assert len(queue.window) <= 4
    assert queue.depth == 100
    consumer = bench.subscribe("/queue/a", prefetch=7)
    for _ in range(100):
        bench.settle()
        for entry in list(consumer.unacked.values()):
            bench.ack(consumer, entry.message.body)
    assert bench.seen(consumer) == [(body, 0) for body in bodies]
    bench.settle()
    assert bench.core.memory_bytes == 0
    assert bench.core.spooled_bytes == 0
    assert leftovers(bench.driver.store) == []


def test_non_durable_messages_do_not_survive_a_crash_and_durable_ones_keep_their_order():
    bench = Bench(window_messages_max=2)
    for number in range(8):
        bench.send("/queue/a", DIGITS[number], durable=bool(number % 2))
    bench.settle()
    bench.crash()
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.seen(consumer) == [(DIGITS[number], 0) for number in (1, 3, 5, 7)]
