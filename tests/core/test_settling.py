"""Settling by ranges of tags: against a model that does it one by one, with ranges of any size; credit; whole transactions."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.core.consumer import CUMULATIVE, INDIVIDUAL, Consumer
from pybroker.errors import BrokerError, LimitExceeded, TransactionError, UnknownDelivery
from pybroker.message import Message
from tests.core.bench import Bench

Q = "/queue/a"
COUNT = 12

ends = st.sets(st.integers(0, COUNT + 6) | st.sampled_from([2**40, 2**63 - 1]), min_size=2, max_size=8).map(sorted)


@st.composite
def ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    chosen = draw(ends)
    if draw(st.booleans()):
        return [(each, each) for each in chosen]
    return list(zip(chosen[: len(chosen) // 2 * 2 : 2], chosen[1::2], strict=True))


def started(mode: str = INDIVIDUAL, count: int = COUNT, **limits: int) -> tuple[Bench, Consumer]:
    """A consumer that was shown as many messages, with bodies that are their tags."""
    bench = Bench(100, **limits)
    consumer = bench.subscribe(Q, mode, prefetch=count)
    bench.send(Q, *(b"%d" % number for number in range(1, count + 1)))
    bench.settle()
    assert list(consumer.unacked) == list(range(1, count + 1))
    return bench, consumer


def rest(bench: Bench) -> None:
    """End the turn, and let everything come to rest."""
    bench.end()
    bench.settle()


def named(chosen: list[tuple[int, int]], tags: set[int]) -> tuple[set[int], bool]:
    """The tags of the ranges that are outstanding, and whether others are named too."""
    found = {tag for tag in tags if any(first <= tag <= last for first, last in chosen)}
    return found, sum(last - first + 1 for first, last in chosen) > len(found)


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), ranges()), max_size=4))
def test_ranges_settle_what_is_outstanding_of_them(steps: list[tuple[bool, list[tuple[int, int]]]]) -> None:
    bench, consumer = started()
    tags = {tag: tag for tag in range(1, COUNT + 1)}  # outstanding tag to the message's number
    last = COUNT
    done: set[int] = set()
    for acknowledges, chosen in steps:
        found, too_many = named(chosen, set(tags))
        settle = bench.core.acknowledge_ranges if acknowledges else bench.core.reject_ranges
        if too_many:
            with pytest.raises(UnknownDelivery):
                settle(consumer, chosen)
        else:
            settle(consumer, chosen)
        bench.end()
        numbers = sorted(tags.pop(tag) for tag in found)
        if acknowledges:
            done |= set(numbers)
        else:  # they come again at once, in their order
            for number in numbers:
                last += 1
                tags[last] = number
        bench.settle()
        assert {tag: int(entry.message.body) for tag, entry in consumer.unacked.items()} == tags
        assert consumer.credit == COUNT - len(tags)
        assert consumer.size == sum(entry.message.size for entry in consumer.unacked.values())
    assert bench.queue(Q).depth == COUNT - len(done)
    assert bench.queue(Q).counts.acknowledged == len(done)


@pytest.mark.parametrize("rejects", [False, True])
def test_ranges_without_end_cost_what_is_outstanding(rejects: bool) -> None:
    bench, consumer = started(count=2_000)
    settle = bench.core.reject_ranges if rejects else bench.core.acknowledge_ranges
    began = time.monotonic()
    with pytest.raises(UnknownDelivery):
        settle(consumer, [(number * 10_000_000, number * 10_000_000 + 9_999_999) for number in range(20_000)])
    with pytest.raises(UnknownDelivery, match="no delivery 2001 "):
        settle(consumer, [(2_001, 2**63 - 1)])
    assert time.monotonic() - began < 5.0
    bench.end()


def test_what_was_not_shown_yet_can_not_be_settled() -> None:
    bench = Bench()
    consumer = bench.subscribe(Q)
    bench.send(Q, b"1", b"2")  # dispatched, and held with their batch
    assert list(consumer.unacked) == [1, 2]
    for settle in (bench.core.acknowledge_ranges, bench.core.reject_ranges):
        with pytest.raises(UnknownDelivery):
            settle(consumer, [(1, 2)])
    with pytest.raises(TransactionError):
        bench.core.outstanding([(consumer, [(1, 2)])], [])
    rest(bench)
    bench.core.acknowledge_ranges(consumer, [(1, 2)])
    rest(bench)
    assert bench.queue(Q).depth == 0


def test_cumulative_ranges_mean_their_last_tag() -> None:
    bench, consumer = started(CUMULATIVE)
    bench.core.acknowledge_ranges(consumer, [(2, 2), (5, 6)])
    bench.end()
    assert list(consumer.unacked) == list(range(7, COUNT + 1))
    bench.core.reject_ranges(consumer, [(8, 9)])
    rest(bench)
    assert [int(entry.message.body) for entry in consumer.unacked.values()] == [10, 11, 12, 7, 8, 9]
    with pytest.raises(UnknownDelivery):
        bench.core.acknowledge_ranges(consumer, [(1, 1)])


def test_credit_can_be_changed_in_both_directions() -> None:
    bench, consumer = started(count=3)
    bench.send(Q, *b"a b c d e f".split())
    rest(bench)
    core = bench.core
    core.set_prefetch(consumer, 5)
    rest(bench)
    assert len(consumer.unacked) == 5
    core.set_prefetch(consumer, 2)
    core.acknowledge_ranges(consumer, [(1, 3)])
    rest(bench)
    assert (len(consumer.unacked), consumer.credit) == (2, 0)
    core.set_prefetch(consumer, 0)
    core.acknowledge_ranges(consumer, [(4, 5)])
    rest(bench)
    assert (len(consumer.unacked), consumer.credit) == (0, 0)
    core.set_prefetch(consumer, 10**9)
    rest(bench)
    assert len(consumer.unacked) == 4
    assert consumer.credit == core.limits.prefetch_max - 4


def test_credit_does_not_wake_who_is_paused() -> None:
    bench, consumer = started(count=1)
    bench.send(Q, b"2")
    bench.core.pause(consumer.connection)
    bench.core.set_prefetch(consumer, 5)
    rest(bench)
    assert len(consumer.unacked) == 1
    bench.core.resume(consumer.connection)
    rest(bench)
    assert len(consumer.unacked) == 2


# ---- whole transactions


def test_a_whole_transaction_at_once() -> None:
    bench, consumer = started(count=4)
    core = bench.core
    done, returned = core.outstanding([(consumer, [(1, 2)])], [(consumer, [(4, 4)])])
    assert core.transact([Message("/queue/b", b"b"), Message(Q, b"5")], done, returned) is True
    rest(bench)
    assert [int(entry.message.body) for entry in consumer.unacked.values()] == [3, 5, 4]
    assert bench.queue("/queue/b").depth == 1
    assert core.transact([Message("/queue/b", b"", durable=False)], [], []) is False
    assert core.transact([], [], []) is True
    rest(bench)
    bench.crash()
    assert bench.queue(Q).depth == 3


def test_what_a_transaction_settles_must_be_there_and_once() -> None:
    bench, consumer = started(count=4)
    other = bench.subscribe(Q, CUMULATIVE)
    core = bench.core
    wrong = [
        ([(consumer, [(1, 5)])], []),
        ([(consumer, [(0, 1)])], []),
        ([(consumer, [(1, 2)])], [(consumer, [(2, 2)])]),
        ([(consumer, [(1, 2)]), (consumer, [(2, 3)])], []),
        ([(other, [(1, 1)])], []),
        ([], [(consumer, [(1, 2**63 - 1)])]),
    ]
    for acks, nacks in wrong:
        with pytest.raises(TransactionError):
            core.outstanding(acks, nacks)
    bench.end()
    assert len(consumer.unacked) == 4


def test_a_transaction_that_can_not_be_carried_out_does_nothing() -> None:
    bench, consumer = started(count=4, transaction_messages_max=3, transaction_bytes_max=100, destinations_max=2)
    core = bench.core
    entries, _ = core.outstanding([(consumer, [(1, 1)])], [])
    wrong: list[tuple[list[Message], type[BrokerError]]] = [
        ([Message(Q, b"")] * 3, LimitExceeded),
        ([Message(Q, b"x" * 101)], LimitExceeded),
        ([Message("/queue/b", b""), Message("/queue/c", b"")], LimitExceeded),
        ([Message(Q, b""), Message("nowhere", b"")], BrokerError),
        ([Message(Q, b""), Message(Q, b"", priority=10)], BrokerError),
    ]
    for messages, kind in wrong:
        with pytest.raises(kind):
            core.transact(messages, entries, [])
        rest(bench)
        assert (bench.queue(Q).depth, list(consumer.unacked)) == (4, [1, 2, 3, 4])
    core.transact([Message(Q, b"")], entries, [])
    rest(bench)
    assert list(consumer.unacked) == [2, 3, 4, 5]
