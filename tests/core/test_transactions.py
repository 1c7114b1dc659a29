"""Transactions: all or nothing, in memory, in the journal and across a crash."""

from __future__ import annotations

import pytest

from pybroker.core.consumer import CUMULATIVE, Connection, Consumer
from pybroker.errors import InvalidDestination, LimitExceeded, TransactionError, UnknownDelivery
from pybroker.message import Message
from tests.core.bench import Bench


class Story:
    """A connection with an open transaction ``x``, and a consumer on ``/queue/a`` that has 1, 2 and 3."""

    def __init__(self, mode: str = "individual", **limits: int) -> None:
        self.bench = Bench(**limits)
        self.connection: Connection = self.bench.connect()
        self.consumer: Consumer = self.bench.subscribe("/queue/a", mode, on=self.connection, prefetch=3)
        self.bench.send("/queue/a", *b"1 2 3 4 5".split())
        self.bench.settle()
        self.bench.core.begin(self.connection, "x")

    def send(self, to: str, body: bytes, **options: int) -> None:
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
