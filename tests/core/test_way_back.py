"""`pybroker.core.dead_letters.way_back` with `browsing`: dead letters go back whole, once, and to whom they were for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pybroker.consumer_options import ConsumerOptions
from pybroker.core import dead_letters
from pybroker.core.browsing import BrowsePage, Moving
from pybroker.core.queue import Queue
from pybroker.message import Message, encode_headers
from tests.core.bench import Bench
from tests.core.test_dead_letters import DLQ, fail


def retry(b: Bench) -> BrowsePage:
    core = b.core
    page = core.browse(DLQ, None, moving=Moving(None, way=lambda letter: dead_letters.way_back(core, letter)))
    b.end()
    return page


def retried(b: Bench) -> BrowsePage:
    page = retry(b)
    b.settle()
    return page


def test_a_dead_letter_comes_back_as_the_message_that_it_was():
    b = Bench(2)
    block = encode_headers([("ward", "3")])
    fail(b, "/queue/a", b"1", 2, header_block=block, priority=7, expires=b.driver.now + 60_000)
    page = retry(b)
    b.settle()
    consumer = b.subscribe("/queue/a")
    b.settle()
    (entry,) = b.entries(consumer)
    message = entry.message
    assert (message.destination, message.body, message.header_block) == ("/queue/a", b"1", block)
    assert (message.priority, message.durable, message.expires) == (7, True, b.driver.now + 60_000)
    assert (entry.deliveries, page.moved, b.queue(DLQ).depth) == (0, 1, 0)
    assert message.message_id.startswith(b"id-1-")


def test_what_has_expired_meanwhile_comes_back_and_does_not_expire():
    b = Bench(1)
    fail(b, "/queue/a", b"1", expires=b.driver.now + 1_000)
    b.wait(2_000)
    retry(b)
    b.settle()
    consumer = b.subscribe("/queue/a")
    b.settle()
    assert [(entry.message.body, entry.message.expires) for entry in b.entries(consumer)] == [(b"1", 0)]


@pytest.mark.parametrize("window", [1, 100])
@pytest.mark.parametrize("steps", range(14))
def test_a_crash_during_a_retry_neither_loses_a_message_nor_leaves_two(steps: int, window: int):
    b = Bench(1, window_messages_max=window)
    bodies = [b"%d" % number for number in range(5)]
    for body in bodies:
        fail(b, "/queue/a", body)
    b.settle()
    retry(b)
    for _ in range(steps):
        b.driver.step_commit() or b.driver.step_read()
    b.crash()
    found = []
    for name in ("/queue/a", DLQ):
        consumer = b.subscribe(name)
        b.settle()
        found += b.bodies(consumer)
    assert sorted(found) == bodies


def test_what_was_in_a_durable_subscription_goes_back_to_that_one_only():
    b = Bench(1)
    one = b.subscribe("/topic/t.*", durable_name="one", client_id="c")
    two = b.subscribe("/topic/t.*", durable_name="two", client_id="c")
    b.send("/topic/t.x", b"1")
    b.settle()
    b.nack(one, b"1")
    b.ack(two, b"1")
    b.settle()
    retry(b)
    b.settle()
    assert (b.bodies(one), b.bodies(two)) == ([b"1", b"1"], [b"1"])


def test_what_has_nowhere_to_go_stays():
    b = Bench(1)
    consumer = b.subscribe("/topic/t", durable_name="one", client_id="c")
    b.send("/topic/t", b"1")
    b.settle()
    b.nack(consumer, b"1")
    b.leave(consumer)
    b.core.remove_subscription("c", "one")
    b.send(DLQ, b"no dead letter")
    own = encode_headers([("dead-letter-origin", DLQ), ("dead-letter-reason", "x")])
    b.send(DLQ, b"of its own queue", header_block=own)
    b.settle()
    page = retry(b)
    b.settle()
    assert (page.moved, page.stayed, b.queue(DLQ).depth) == (0, 3, 3)


def test_what_a_plain_subscriber_rejected_is_published_anew():
    b = Bench(1)
    consumer = b.subscribe("/topic/t")
    b.send("/topic/t", b"1")
    b.settle()
    b.nack(consumer, b"1")
    b.settle()
    retry(b)
    b.settle()
    assert b.bodies(consumer) == [b"1", b"1"]


def test_a_queue_that_is_gone_is_made_again():
    b = Bench(1)
    b.send(DLQ, b"1", header_block=encode_headers([("dead-letter-origin", "/queue/new"), ("dead-letter-reason", "x")]))
    b.settle()
    retry(b)
    b.settle()
    assert b.queue("/queue/new").depth == 1


def test_an_impossible_origin_is_no_way_back():
    b = Bench(1)
    for origin in ("nowhere", "/queue/a.*", "/topic/>", "/queue/a..b", "/topic/ActiveMQ.Advisory.Connection"):
        block = encode_headers([("dead-letter-origin", origin), ("dead-letter-reason", "x")])
        assert dead_letters.way_back(b.core, Message(DLQ, b"", block)) is None


OWNERS = [("ward", "a/b"), ("ward/a", "b"), ("ward", "a%b"), ("ward%25/a%2F", "%2525b")]


@pytest.mark.parametrize("number", range(len(OWNERS)))
def test_owners_with_slashes_are_told_apart(number: int):
    b = Bench(1)
    consumers = [b.subscribe("/topic/t", durable_name=name, client_id=client_id) for client_id, name in OWNERS]
    b.send("/topic/t", b"1")
    b.settle()
    for at, consumer in enumerate(consumers):
        (b.nack if at == number else b.ack)(consumer, b"1")
    b.settle()
    assert retried(b).moved == 1
    b.settle()
    assert [len(b.bodies(consumer)) for consumer in consumers] == [1 + (at == number) for at in range(len(OWNERS))]


def test_an_owner_as_older_versions_wrote_it_is_found_where_only_one_is_meant():
    b = Bench(1)
    one = b.subscribe("/topic/t", durable_name="a/b", client_id="ward")
    block = encode_headers(
        [
            ("dead-letter-origin", "/topic/t"),
            ("dead-letter-subscription", "ward/a/b"),
            ("dead-letter-reason", "deliveries"),
        ]
    )
    b.send(DLQ, b"1", header_block=block)
    b.settle()
    assert retried(b).moved == 1
    b.settle()
    assert b.bodies(one) == [b"1"]
    b.subscribe("/topic/other", durable_name="b", client_id="ward/a")
    b.send(DLQ, b"2", header_block=block)
    b.settle()
    assert retried(b).moved == 1, "the other one does not collect that topic"
    b.settle()
    b.subscribe("/topic/*", durable_name="b", client_id="ward/a2")
    b.subscribe("/topic/*", durable_name="a2/b", client_id="ward")
    b.send(DLQ, b"3", header_block=block.replace(b"a/b", b"a2/b"))
    b.settle()
    assert retried(b).stayed == 1
    b.settle()
    assert b.queue(DLQ).depth == 1


def test_the_owner_is_looked_up_and_a_hostile_one_costs_little():
    class Counted(dict[tuple[str, str], Queue]):
        def __iter__(self) -> Iterator[tuple[str, str]]:
            raise AssertionError("all subscriptions are looked through")

        keys = values = items = __iter__  # type: ignore[assignment]

    b = Bench(1)
    b.subscribe("/topic/t", durable_name="one", client_id="c")
    core = b.core
    core.subscriptions = Counted(core.subscriptions)
    for owner, there in (("c/one", True), ("c/two", False), ("c", False), ("/" * 10_000, False)):
        fields = [
            ("dead-letter-origin", "/topic/t"),
            ("dead-letter-subscription", owner),
            ("dead-letter-reason", "deliveries"),
        ]
        letter = Message(DLQ, b"1", encode_headers(fields))
        assert (dead_letters.way_back(core, letter) is not None) is there
    assert len(dead_letters._owners("/" * 65)) == 0


def test_what_a_topic_would_give_to_nobody_stays():
    b = Bench(1)
    consumer = b.subscribe("/topic/t")
    b.send("/topic/t", b"1")
    b.settle()
    b.nack(consumer, b"1")
    b.settle()
    b.leave(consumer)
    other = b.subscribe("/topic/t", options=ConsumerOptions(selector="ward = 3"))
    page = retry(b)
    b.settle()
    assert (page.moved, page.stayed, b.queue(DLQ).depth) == (0, 1, 1)
    b.leave(other)
    assert retried(b).stayed == 1
    b.settle()
    consumer = b.subscribe("/topic/t")
    assert retried(b).moved == 1
    b.settle()
    assert b.bodies(consumer) == [b"1"]
