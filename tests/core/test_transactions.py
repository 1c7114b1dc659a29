"""Transactions: all or nothing, in memory, in the journal and across a crash."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.core.consumer import CUMULATIVE, Connection, Consumer
from pybroker.errors import BrokerError, InvalidDestination, LimitExceeded, TransactionError, UnknownDelivery
from pybroker.message import Message
from tests.core.bench import Bench


class Story:
    """A connection with an open transaction ``x``, and a consumer on ``/queue/a`` that has 1, 2 and 3."""

    def __init__(self, mode: str = "individual", **options: Any) -> None:
        self.bench = Bench(**options)
        self.connection: Connection = self.bench.connect()
        self.consumer: Consumer = self.bench.subscribe("/queue/a", mode, on=self.connection, prefetch=3)
        self.bench.send("/queue/a", *b"1 2 3 4 5".split())
        self.bench.settle()
        self.bench.core.begin(self.connection, "x")

    def send(self, to: str, body: bytes, **options: Any) -> None:
        self.bench.core.send_later(self.connection, Message(to, body, **options), "x")
        self.bench.end()

    def commit(self) -> None:
        self.bench.core.commit(self.connection, "x")
        self.bench.end()

    def abort(self) -> None:
        self.bench.core.abort(self.connection, "x")
        self.bench.end()


def drained(bench: Bench, to: str) -> list[tuple[bytes, int]]:
    consumer = bench.subscribe(to)
    bench.settle()
    return bench.seen(consumer)


def test_nothing_happens_before_the_commit_and_all_at_it():
    story = Story()
    bench = story.bench
    other = bench.subscribe("/queue/b")
    story.send("/queue/b", b"answer")
    bench.ack(story.consumer, b"1", "x")
    bench.settle()
    assert bench.seen(other) == []
    assert bench.queue("/queue/a").depth == 5
    story.commit()
    bench.settle()
    assert bench.seen(other) == [(b"answer", 0)]
    assert bench.queue("/queue/a").depth == 4


def test_settling_in_a_transaction_gives_credit_back_at_once():
    story = Story()
    story.bench.ack(story.consumer, b"1", "x")
    story.bench.nack(story.consumer, b"2", "x")
    story.bench.settle()
    assert story.bench.bodies(story.consumer) == [b"1", b"2", b"3", b"4", b"5"]


def test_an_abort_gives_back_what_was_acknowledged_and_what_was_rejected():
    story = Story()
    bench = story.bench
    story.send("/queue/b", b"answer")
    bench.ack(story.consumer, b"1", "x")
    bench.nack(story.consumer, b"2", "x")
    bench.settle()
    story.abort()
    bench.settle()
    assert "x" not in story.connection.transactions
    bench.disconnect(story.connection)
    assert drained(bench, "/queue/a") == [(b"1", 1), (b"2", 1), (b"3", 1), (b"4", 1), (b"5", 1)]
    assert drained(bench, "/queue/b") == []


def test_a_rejection_counts_at_the_commit():
    story = Story()
    story.bench.nack(story.consumer, b"2", "x")
    story.bench.ack(story.consumer, b"1", "x")
    story.commit()
    story.bench.disconnect(story.connection)
    assert drained(story.bench, "/queue/a")[:2] == [(b"2", 1), (b"3", 1)]


def test_a_disconnect_aborts():
    story = Story()
    story.send("/queue/b", b"answer")
    story.bench.ack(story.consumer, b"1", "x")
    story.bench.disconnect(story.connection)
    assert drained(story.bench, "/queue/a")[0] == (b"1", 1)
    assert drained(story.bench, "/queue/b") == []
    assert story.connection not in story.bench.core.connections


@pytest.mark.parametrize("steps", range(5))
def test_a_crash_at_any_step_of_the_commit_leaves_all_or_nothing(steps: int):
    story = Story()
    bench = story.bench
    for number in range(3):
        story.send(f"/queue/b{number}", b"answer")
    bench.ack(story.consumer, b"1", "x")
    bench.ack(story.consumer, b"2", "x")
    bench.driver.settle()
    story.commit()
    for _ in range(steps):
        bench.driver.step_commit()
    bench.crash()
    answers = [drained(bench, f"/queue/b{number}") for number in range(3)]
    left = [body for body, _ in drained(bench, "/queue/a")]
    if steps < 3:
        assert answers == [[]] * 3
        assert left == [b"1", b"2", b"3", b"4", b"5"]
    else:
        assert answers == [[(b"answer", 0)]] * 3
        assert left == [b"3", b"4", b"5"]


def test_a_crash_before_the_commit_gives_everything_back():
    story = Story()
    story.send("/queue/b", b"answer")
    story.bench.ack(story.consumer, b"1", "x")
    story.bench.settle()
    story.bench.crash()
    assert drained(story.bench, "/queue/a")[0] == (b"1", 1)
    assert drained(story.bench, "/queue/b") == []


def test_a_cumulative_acknowledgement_in_a_transaction_is_for_all_before_it():
    story = Story(CUMULATIVE)
    story.bench.ack(story.consumer, b"2", "x")
    story.commit()
    assert story.bench.queue("/queue/a").depth == 3


def test_what_is_settled_in_a_transaction_can_not_be_settled_again():
    story = Story()
    tag = story.bench.tag(story.consumer, b"1")
    story.bench.ack(story.consumer, b"1", "x")
    with pytest.raises(UnknownDelivery):
        story.bench.core.acknowledge(story.consumer, tag)


def test_the_number_of_messages_is_bounded_and_what_is_refused_changes_nothing():
    story = Story(transaction_messages_max=2)
    story.send("/queue/b", b"1")
    story.bench.ack(story.consumer, b"1", "x")
    with pytest.raises(LimitExceeded, match="transaction_messages_max"):
        story.send("/queue/b", b"2")
    with pytest.raises(LimitExceeded, match="transaction_messages_max"):
        story.bench.nack(story.consumer, b"2", "x")
    story.bench.ack(story.consumer, b"2")  # still outstanding
    story.commit()
    assert story.bench.queue("/queue/b").depth == 1
    assert story.bench.queue("/queue/a").depth == 3


def test_the_bytes_are_bounded():
    story = Story(transaction_bytes_max=10)
    story.send("/queue/b", b"x" * 10)
    with pytest.raises(LimitExceeded, match="transaction_bytes_max"):
        story.send("/queue/b", b"x")


def test_the_number_of_open_transactions_is_bounded():
    story = Story(transactions_max=1)
    with pytest.raises(LimitExceeded, match="transactions_max"):
        story.bench.core.begin(story.connection, "y")


def test_unknown_and_repeated_names_are_refused():
    story = Story()
    core = story.bench.core
    with pytest.raises(TransactionError, match="open already"):
        core.begin(story.connection, "x")
    tag = story.bench.tag(story.consumer, b"1")
    for act in (
        lambda: core.commit(story.connection, "y"),
        lambda: core.abort(story.connection, "y"),
        lambda: core.send_later(story.connection, Message("/queue/b", b""), "y"),
        lambda: core.acknowledge(story.consumer, tag, "y"),
    ):
        with pytest.raises(TransactionError, match="not open"):
            act()
    assert tag in story.consumer.unacked


def test_a_wrong_message_is_refused_when_it_is_sent_not_at_the_commit():
    story = Story()
    with pytest.raises(InvalidDestination):
        story.send("/topic/a.*", b"1")
    with pytest.raises(InvalidDestination):
        story.send("/nowhere/a", b"1")
    story.commit()


def test_a_commit_that_would_make_too_many_queues_does_nothing_and_gives_back():
    story = Story(destinations_max=2)
    story.send("/queue/b", b"1")
    story.send("/queue/c", b"1")
    story.bench.ack(story.consumer, b"1", "x")
    with pytest.raises(LimitExceeded, match="destinations_max"):
        story.bench.core.commit(story.connection, "x")
    story.bench.end()
    assert [queue.name for queue in story.bench.core.queues.values()] == ["a"]
    assert story.bench.queue("/queue/a").depth == 5
    story.bench.disconnect(story.connection)
    assert drained(story.bench, "/queue/a")[0] == (b"1", 1)


def test_memory_counts_what_waits_for_a_commit():
    story = Story()
    before = story.bench.core.memory_bytes
    story.send("/queue/b", b"x" * 100)
    assert story.bench.core.memory_bytes == before + 100
    story.abort()
    assert story.bench.core.memory_bytes == before


def test_a_consumer_may_leave_before_the_commit_of_its_acknowledgements():
    story = Story()
    story.bench.ack(story.consumer, b"1", "x")
    story.bench.leave(story.consumer)
    story.commit()
    assert [body for body, _ in drained(story.bench, "/queue/a")] == [b"2", b"3", b"4", b"5"]


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_a_durable_subscription_may_be_removed_before_the_end_of_a_transaction(end: str):
    bench = Bench()
    connection = bench.connect()
    consumer = bench.subscribe("/topic/t", on=connection, durable_name="s", client_id="c")
    bench.send("/topic/t", b"1", b"2")
    bench.settle()
    bench.core.begin(connection, "x")
    bench.ack(consumer, b"1", "x")
    bench.leave(consumer)
    bench.core.remove_subscription("c", "s")
    bench.end()
    bench.settle()
    (bench.core.commit if end == "commit" else bench.core.abort)(connection, "x")
    bench.end()
    bench.settle()
    assert not bench.core.queues
    assert bench.core.stored_bytes == 0


# ---- whatever a commit sends: all of it, or nothing


def start(**options: Any) -> Story:
    """A story whose transaction has acknowledged 1."""
    story = Story(**options)
    story.bench.ack(story.consumer, b"1", "x")
    return story


def test_a_scheduled_composite_that_has_expired_expires_at_each_of_its_places():
    """It was looked at as one name, which raised in the middle of the commit."""
    story = start(policy=({"match": "/queue/b", "dead_letter_expired": True},))
    bench = story.bench
    expires = bench.core.now + 5
    story.send("/queue/b,/queue/c", b"x", header_block=b"AMQ_SCHEDULED_DELAY:1000\n", expires=expires)
    story.send("/queue/out", b"result")
    bench.driver.now += 10
    story.commit()
    bench.settle()
    bench.crash()
    assert bench.queue("/queue/a").depth == 4
    assert drained(bench, "/queue/out") == [(b"result", 0)]
    assert (bench.queue("/queue/DLQ").depth, bench.queue("/queue/b").depth, bench.queue("/queue/c").depth) == (1, 0, 0)


def test_a_dead_letter_queue_that_a_commit_makes_takes_nobodys_place():
    story = start(destinations_max=3, policy=({"match": "/queue/>", "dead_letter_expired": True},))
    bench = story.bench
    bench.send("/queue/b", b"1")
    story.send("/queue/b", b"x", expires=bench.core.now + 5)
    story.send("/queue/out", b"result")
    bench.driver.now += 10
    story.commit()
    bench.settle()
    bench.crash()
    assert (bench.queue("/queue/a").depth, bench.queue("/queue/out").depth, bench.queue("/queue/DLQ").depth) == (
        4,
        1,
        1,
    )


@pytest.mark.parametrize("selector", ["JMSTimestamp > 1000005", "JMSMessageID LIKE 'id-%'"])
def test_a_filter_decides_at_the_commit_what_it_decides_when_it_is_checked(selector: str):
    rule = {"name": "/queue/b", "forward_to": ["/queue/c", "/queue/d"], "filter": selector}
    story = start(destinations_max=2, composite=(rule,))
    bench = story.bench
    story.send("/queue/b", b"x")
    bench.driver.now += 10
    with pytest.raises(LimitExceeded):
        bench.core.commit(story.connection, "x")
    bench.end()
    assert bench.core.by_destination.keys() == {"/queue/a"}
    bench.disconnect(story.connection)
    assert drained(bench, "/queue/a")[0] == (b"1", 1)


LONG = "/queue/" + "e" * 1_010  # too long for the topic of its mirror
NAMES = ("/queue/b", "/queue/c", "/queue/d", LONG, "/topic/t", "/remote-temp-queue/0", "/topic/VirtualTopic.x")
SENT = st.fixed_dictionaries(
    {
        "to": st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map(",".join),
        "header_block": st.sampled_from(
            (b"", b"AMQ_SCHEDULED_DELAY:9\n", b"AMQ_SCHEDULED_DELAY:9\nward:3\n", b"ward:3\n")
        ),
        "durable": st.booleans(),
        "lives": st.sampled_from((0, 5, 100)),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.lists(SENT, min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 3), st.booleans())
def test_a_commit_does_all_or_nothing(sent: list[dict[str, Any]], queues: int, schedules: int, whole: bool):
    """Nothing is emitted by what raises, and nothing but the library's own errors is raised."""
    bench = Bench(
        1,
        destinations_max=queues,
        schedules_max=schedules,
        policy=(
            {"match": "/queue/>", "dead_letter_expired": True, "dead_letter_queue": "/queue/DLQ.{name}"},
            {"match": "/topic/>", "dead_letter_expired": True},
        ),
        routing={"mirrored_queues": ["/queue/c", LONG]},
        composite=({"name": "/queue/d", "forward_to": ["/queue/f", "/queue/g"], "filter": "ward = 3"},),
    )
    connection = bench.connect()
    consumer = bench.subscribe("/queue/a", on=connection)
    bench.send("/queue/a", b"1", b"2")
    bench.settle()
    core = bench.core
    messages = []
    for each in sent:
        expires = each["lives"] and core.now + each["lives"]
        message = Message(each["to"], b"x", each["header_block"], each["durable"], 4, expires)
        try:
            core.check(message)
        except BrokerError:
            continue
        messages.append(message)
    if not whole:
        core.begin(connection, "x")
        for message in messages:
            core.send_later(connection, message, "x")
        bench.ack(consumer, b"1", "x")
        bench.nack(consumer, b"2", "x")
    bench.driver.now += 10
    core = bench.core
    entries = list(consumer.unacked.values())
    try:
        if whole:
            core.transact(messages, entries[:1], entries[1:])
        else:
            core.commit(connection, "x")
        done = True
    except BrokerError:
        done = False
    bench.end()
    bench.settle()
    bench.disconnect(connection)
    bench.settle()
    bench.crash()
    depths = {name: queue.depth for name, queue in bench.core.by_destination.items() if queue.depth}
    assert depths.pop("/queue/DLQ.a", 0) == (1 if done else 2)
    assert "/queue/a" not in depths
    if not done:
        assert depths == {}
        assert len(bench.core.schedules) == 0
        return
    alive = [each for each in messages if each.durable and not 0 < each.expires <= bench.core.now]
    scheduled = [each for each in alive if b"SCHEDULED" in each.header_block]
    assert len(bench.core.schedules) == len(scheduled)
    assert depths.get("/queue/b", 0) == sum("/queue/b" in each.destination for each in alive) - sum(
        "/queue/b" in each.destination for each in scheduled
    )
