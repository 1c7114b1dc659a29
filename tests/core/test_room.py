"""`pybroker.core.room`: limits of single destinations, who waits for them, and what is dropped."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.consumer_options import ConsumerOptions
from pybroker.core.entry import Entry
from pybroker.core.room import _victim
from pybroker.core.sorted_window import SortedWindow
from pybroker.core.window import Window
from pybroker.errors import BrokerFull, SlowConsumer
from pybroker.message import Message, encode_headers
from pybroker.operations import order_of
from tests.core.bench import Bench

A, T = "/queue/a", "/topic/t"


def bench(match: str = A, window: int = 100, **values: Any) -> Bench:
    return Bench(policy=({"match": match, **values},), window_messages_max=window)


def full(b: Bench, to: str = A) -> BrokerFull | None:
    error = b.core.full(Message(to, b"x"))
    b.end()
    return error


# ---- queues


@pytest.mark.parametrize("policy", ["block", "refuse"])
def test_a_queue_with_a_limit_of_messages_takes_no_more_and_others_do(policy: str):
    b = bench(messages_max=2, full_policy=policy)
    assert b.core.crowded
    b.send(A, b"1")
    assert full(b) is None
    b.send(A, b"2")
    error = full(b)
    assert error is not None
    assert "/queue/a has no room: policy value messages_max is 2" in str(error)
    assert error.full_policy == policy
    assert full(b, "/queue/b") is None
    consumer = b.subscribe(A)
    b.settle()
    assert full(b) is not None  # what is out is in the queue
    b.ack(consumer, b"1")
    assert full(b) is None


@pytest.mark.parametrize("durable", [True, False])
def test_a_queue_with_a_limit_of_bytes(durable: bool):
    b = bench(bytes_max=10, window=1)
    b.send(A, b"1" * 6, durable=durable)
    assert full(b) is None
    b.send(A, b"2" * 6, durable=durable)
    b.send(A, b"3" * 6, durable=durable)
    assert "bytes_max is 10" in str(full(b))


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_the_oldest_messages_make_room_and_are_counted(durable: bool, window: int):
    b = bench(messages_max=3, full_policy="drop_oldest", window=window)
    for number in range(8):
        b.send(A, b"%d" % number, durable=durable)
        assert full(b) is None
        b.settle()
    assert (b.queue(A).depth, b.queue(A).counts.dropped) == (3, 5)
    consumer = b.subscribe(A)
    b.settle()
    assert b.bodies(consumer) == [b"5", b"6", b"7"]
    for body in b.bodies(consumer):
        b.ack(consumer, body)
    b.settle()
    assert (b.core.memory_bytes, b.core.stored_bytes, b.core.spooled) == (0, 0, 0)


def test_the_oldest_message_goes_first_whatever_its_priority_is():
    b = bench(messages_max=3, full_policy="drop_oldest")
    for body, priority in ((b"old", 0), (b"high", 9), (b"middle", 4), (b"new", 9)):
        b.send(A, body, priority=priority)
    consumer = b.subscribe(A)
    b.settle()
    assert b.bodies(consumer) == [b"high", b"new", b"middle"]


def test_what_a_consumer_has_is_not_dropped():
    b = bench(messages_max=2, full_policy="drop_oldest")
    consumer = b.subscribe(A, prefetch=2)
    b.send(A, *b"1 2 3 4".split())
    b.settle()
    assert b.bodies(consumer) == [b"1", b"2"]
    assert (b.queue(A).depth, b.queue(A).counts.dropped) == (2, 2)
    b.ack(consumer, b"1")
    b.ack(consumer, b"2")
    assert b.queue(A).depth == 0


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("window", [1, 2, 8, 100])
@pytest.mark.parametrize("headers", [{"ward": "1"}, {"JMSXGroupID": "g"}])
def test_the_oldest_make_room_where_somebody_able_may_not_take_them(
    durable: bool, window: int, headers: dict[str, str]
):
    """The head of the queue is in the store, and the newest messages in memory: those are not the ones that go."""
    b = bench(messages_max=20, full_policy="drop_oldest", window=window)
    block = encode_headers(headers)
    owner = b.subscribe(A, options=ConsumerOptions("ward = 1"), prefetch=1)
    picky = b.subscribe(A, options=ConsumerOptions("ward = 2"), prefetch=1_000)
    if "ward" not in headers:  # the group of an owner who has no credit
        owner = b.subscribe(A, options=ConsumerOptions("JMSXGroupID = 'g'"), prefetch=1)
        b.subscribe(A, options=ConsumerOptions("JMSXGroupID = 'g'"), prefetch=1_000)
    for number in range(100):
        b.send(A, b"%d" % number, durable=durable, header_block=block)
        b.settle()
        assert b.queue(A).depth <= 20
    assert b.bodies(owner) == [b"0"]
    assert not b.bodies(picky)
    assert b.queue(A).counts.dropped == 80
    for number in range(81, 100):
        b.ack(owner, b.bodies(owner)[-1])
        b.settle()
        assert b.bodies(owner)[-1] == b"%d" % number


@pytest.mark.parametrize("window", [4, 8])
def test_what_somebody_waits_for_does_not_go_before_what_is_older(window: int):
    b = bench(messages_max=20, full_policy="drop_oldest", window=window)
    urgent = b.subscribe(A, options=ConsumerOptions("JMSPriority = 9"), prefetch=1)
    b.subscribe(A, options=ConsumerOptions("ward = 2"), prefetch=1_000)
    b.send(A, b"urgent 0", priority=9)
    for number in range(30):
        b.send(A, b"%d" % number)
        b.settle()
    b.send(A, b"urgent 1", priority=9)
    b.settle()
    for number in range(30, 45):
        b.send(A, b"%d" % number)
        b.settle()
    b.ack(urgent, b"urgent 0")
    b.settle()
    assert b.bodies(urgent) == [b"urgent 0", b"urgent 1"]
    everything = b.subscribe(A, prefetch=100)
    b.settle()
    assert b.bodies(everything) == [b"%d" % number for number in range(27, 45)]


def test_a_crash_brings_back_what_was_kept():
    b = bench(messages_max=2, full_policy="drop_oldest")
    b.send(A, *b"1 2 3 4".split())
    b.settle()
    b.crash()
    consumer = b.subscribe(A)
    b.settle()
    assert b.bodies(consumer) == [b"3", b"4"]


@pytest.mark.parametrize("window", [1, 100])
def test_dead_letters_are_never_dropped(window: int):
    b = Bench(
        1,
        policy=({"match": "/queue/>", "messages_max": 2, "full_policy": "drop_oldest"},),
        window_messages_max=window,
    )
    consumer = b.subscribe(A)
    for number in range(5):
        b.send(A, b"%d" % number)
        b.settle()
        b.nack(consumer, b"%d" % number)
        b.settle()
    letters = b.queue("/queue/DLQ")
    assert (letters.depth, letters.counts.dropped) == (5, 0)
    error = full(b, "/queue/DLQ")
    assert error is not None, "it has a limit for who sends there"
    assert error.full_policy == "block"
    b.crash()
    b.subscribe(A)
    assert b.queue("/queue/DLQ").depth == 5


@pytest.mark.parametrize("limits", [{}, {"full_policy": "drop_oldest", "queue_messages_max": 2}])
def test_only_queues_drop_their_oldest_messages(limits: dict[str, Any]):
    """What a durable subscription collects is not limited; nor is what waits for a temporary queue's owner dropped."""
    values = {"messages_max": 2, "full_policy": "drop_oldest"}
    b = Bench(policy=({"match": "/topic/>", **values}, {"match": "/queue/>", **values}), **limits)
    b.leave(b.subscribe(T, durable_name="d", client_id="c"))
    owner = b.connect()
    temporary = b.core.temporaries.create(owner, "remote-temp-queue", "secret")
    for number in range(5):
        for to in (T, A, temporary):
            b.send(to, b"%d" % number)
    b.settle()
    depths = {queue.kind: queue.depth for queue in b.core.queues.values()}
    assert depths == {"subscription": 5, "queue": 2, "temporary": 5}
    b.crash()
    assert b.core.subscriptions["c", "d"].depth == 5


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=30, unique_by=lambda each: each[1]),
    st.booleans(),
)
def test_the_victim_is_the_oldest_one_also_of_the_lowest_priority(messages: list[tuple[int, int]], lowest: bool):
    window = SortedWindow()
    queue = Bench().queue(A)
    for priority, sequence in messages:
        window.add(Entry(Message(A, b""), order_of(priority, sequence), queue, False))
    low = min(priority for priority, _ in messages)
    wanted = min((sequence, priority) for priority, sequence in messages if not lowest or priority == low)
    assert _victim(window, lowest).order == order_of(wanted[1], wanted[0])


def test_who_is_dropped_is_found_without_a_walk_over_the_window(monkeypatch: pytest.MonkeyPatch):
    """Also behind the time of a choosy consumer. It took milliseconds for each send."""
    b = bench(messages_max=8, full_policy="drop_oldest")
    b.leave(b.subscribe(A, options=ConsumerOptions(selector="ward = 3")))
    for number in range(8):
        b.send(A, b"%d" % number, priority=number % 3)
    for kind in (Window, SortedWindow):
        monkeypatch.setattr(kind, "__iter__", lambda self: pytest.fail("a walk"))
    for number in range(8, 12):
        b.core.send(Message(A, b"%d" % number, priority=number % 3))
    monkeypatch.undo()
    b.end()
    consumer = b.subscribe(A)
    b.settle()
    assert sorted(map(int, b.bodies(consumer))) == list(range(4, 12))


# ---- plain subscribers of topics


def slow(b: Bench, count: int = 6, **priorities: int) -> Any:
    consumer = b.subscribe(T, prefetch=1)
    for number in range(count):
        b.send(T, b"%d" % number, durable=False, priority=priorities.get(f"p{number}", 4))
        b.settle()
    return consumer


def drain(b: Bench, consumer: Any) -> list[bytes]:
    found: list[bytes] = []
    while len(b.bodies(consumer)) > len(found):
        found = b.bodies(consumer)
        b.ack(consumer, found[-1])
        b.settle()
    return found


@pytest.mark.parametrize("window", [1, 100])
def test_a_slow_subscriber_loses_its_oldest_messages(window: int):
    b = bench(T, window, pending_messages_max=3, slow_consumer="drop_oldest")
    consumer = slow(b)
    assert (consumer.queue.depth, consumer.queue.counts.dropped) == (3, 3)
    assert drain(b, consumer) == [b"0", b"4", b"5"]
    assert not b.eye.closed


def test_a_slow_subscriber_loses_its_oldest_messages_of_the_lowest_priority():
    b = bench(T, pending_messages_max=3, slow_consumer="drop_lowest_priority")
    consumer = slow(b, p1=9, p2=2, p3=2, p4=5)
    assert drain(b, consumer) == [b"0", b"1", b"4"]


def test_a_slow_subscriber_is_disconnected_where_nothing_else_is_said():
    b = bench(T, pending_messages_max=3)
    slow(b)
    (_, error), *_ = b.eye.closed
    assert isinstance(error, SlowConsumer)
    assert "3 messages behind (policy value pending_messages_max)" in str(error)


def test_producers_wait_for_a_slow_subscriber():
    b = bench(T, pending_messages_max=3, slow_consumer="block")
    consumer = slow(b, 3)
    error = full(b, T)
    assert error is not None
    assert (error.full_policy, "pending_messages_max is 3" in str(error)) == ("block", True)
    assert full(b, "/topic/other") is None
    b.ack(consumer, b"0")
    assert full(b, T) is None
    assert not b.eye.closed
