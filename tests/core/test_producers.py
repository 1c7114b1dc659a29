"""Producers: which of their sends are stored, against a set of numbers; and through a store, with crashes and forgetting."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pybroker.config import DeliveryPolicy, Limits
from pybroker.core.broker import Core
from pybroker.core.consumer import AUTO, INDIVIDUAL
from pybroker.core.invariants import check_invariants
from pybroker.core.producers import FORGOTTEN_AFTER, IN_DOUBT, LINK_PREFIX, NEW, STORED, SWEEP_MAX, Producer
from pybroker.errors import LimitExceeded, SendInDoubt, TransactionError
from pybroker.message import Message
from pybroker.operations import DELETE_PRODUCER, PUT_PRODUCER, PUT_QUEUE, ProducerRecord
from tests.core.driver import Driver, Ignore

Q = "/queue/q"
P = "ward-3"
RETENTION = 604_800_000  # milliseconds


def core_with(*records: ProducerRecord, now: int = 1_000, **limits: Any) -> Core:
    return Core(Limits(**limits), DeliveryPolicy(), first_id=1, id_prefix="i-", producers=records, now=now)


def sealed(core: Core) -> list[ProducerRecord]:
    """The producers' records that a batch closed now would have."""
    return [record for tag, record in core.seal() if tag == PUT_PRODUCER]  # type: ignore[misc]


def answers(producer: Producer, upto: int) -> str:
    return "".join("ns?"[producer.look(sequence)] for sequence in range(upto))


# ---- one producer


class Numbers:
    """What a producer should know, kept in the plainest way."""

    def __init__(self, ranges_max: int) -> None:
        self.ranges_max = ranges_max
        self.kept: set[int] = set()
        self.ever: set[int] = set()
        self.floor = 0

    def runs(self) -> list[list[int]]:
        runs: list[list[int]] = []
        for number in sorted(self.kept):
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        return runs

    def stored(self, first: int, last: int) -> None:
        self.kept |= set(range(first, last + 1))
        self.ever |= set(range(first, last + 1))
        runs = self.runs()
        for at in range(len(runs) - self.ranges_max):
            self.kept -= set(range(runs[at][0], runs[at][1] + 1))
            self.floor = max(self.floor, runs[at + 1][0])

    def forget(self) -> None:
        self.floor = max([self.floor - 1, *self.kept]) + 1
        self.kept.clear()

    def look(self, number: int) -> int:
        if number in self.kept:
            return STORED
        return IN_DOUBT if number < self.floor else NEW


step = st.one_of(
    st.tuples(st.integers(0, 60), st.integers(0, 8)),
    st.tuples(st.just(-1), st.integers(0, 3)),  # goes on behind the highest
    st.just("forget"),
    st.just("restore"),
)


@settings(max_examples=300)
@given(st.integers(1, 4), st.lists(step, max_size=40))
def test_a_producer_knows_what_a_set_of_numbers_knows(ranges_max: int, steps: list[Any]) -> None:
    core = core_with(producer_ranges_max=ranges_max)
    producer = core.producers.open(P)
    numbers = Numbers(ranges_max)
    for each in steps:
        if each == "forget":
            producer.forget()
            numbers.forget()
        elif each == "restore":
            core = core_with(producer.record(), producer_ranges_max=ranges_max)
            producer = core.producers.open(P)
        else:
            first = producer.highest + 1 if each[0] == -1 else each[0]
            producer.stored(first, first + each[1])
            numbers.stored(first, first + each[1])
        for number in range(max(numbers.ever, default=0) + 3):
            assert producer.look(number) == numbers.look(number), (number, producer.record())
            assert not (number in numbers.ever and producer.look(number) == NEW), "it would be stored twice"
            assert not (number not in numbers.ever and producer.look(number) == STORED), "it would be lost"
            assert number <= producer.highest or producer.look(number) == NEW
        assert [list(pair) for pair in zip(*[iter(producer.ranges)] * 2, strict=True)] == numbers.runs()
        assert len(producer.ranges) <= 2 * ranges_max


def test_in_order_there_is_one_range() -> None:
    producer = core_with().producers.open(P)
    for sequence in range(1, 1_000):
        producer.stored(sequence, sequence)
    assert (producer.ranges, producer.floor, producer.highest) == ((1, 999), 0, 999)
    producer.stored(1_000, 10_000)
    assert producer.ranges == (1, 10_000)
    assert (producer.look(0), producer.look(10_000), producer.look(10_001)) == (NEW, STORED, NEW)


def test_at_too_many_gaps_the_lowest_is_given_up() -> None:
    producer = core_with(producer_ranges_max=3).producers.open(P)
    for sequence in (1, 3, 5):
        producer.stored(sequence, sequence)
    assert answers(producer, 8) == "nsnsnsnn"
    producer.stored(7, 7)
    assert answers(producer, 9) == "???snsnsn"
    producer.stored(4, 4)  # a gap that was kept is filled
    assert answers(producer, 9) == "???sssnsn"
    producer.stored(2, 2)  # by somebody who knows better
    assert answers(producer, 4) == "??ss"


def test_a_new_producer_goes_into_the_next_batch_and_a_known_one_when_it_sends() -> None:
    core = core_with()
    producer = core.producers.open(P)
    assert sealed(core) == [ProducerRecord(P, (), 0, 1_000)]
    core.now = 2_000
    assert core.producers.open(P) is core.producers.find(P) is producer
    assert not core.dirty
    producer.stored(1, 3)
    producer.stored(4, 4)
    assert sealed(core) == [ProducerRecord(P, (1, 4), 0, 2_000)]
    assert not core.dirty
    assert core.producers.find("other") is None


def test_what_is_not_durable_is_known_but_writes_nothing() -> None:
    core = core_with(ProducerRecord(P))
    assert core.send_once(Message(Q, b"", durable=False), (P, 1, False))
    assert not core.send_once(Message(Q, b"", durable=False), (P, 1, True))
    assert (core.duplicates, core.dirty, core.operations) == (1, [], [])
    assert core.send_once(Message(Q, b""), (P, 2, False))
    assert sealed(core) == [ProducerRecord(P, (1, 2), 0, 1_000)]


def test_a_message_keeps_the_id_that_its_producer_gave_it() -> None:
    core = core_with()
    given_id, without = Message(Q, b"", message_id=b"ward-3-1"), Message(Q, b"")
    core.send(given_id)
    core.send(without)
    assert (given_id.message_id, without.message_id) == (b"ward-3-1", b"i-1")


def test_a_refused_send_is_as_new_as_before() -> None:
    core = core_with(destinations_max=1)
    core.send(Message("/queue/only", b""))
    for repeated in (False, True):
        with pytest.raises(LimitExceeded):
            core.send_once(Message("/queue/more", b""), (P, 1, repeated))
    assert core.send_once(Message("/queue/only", b""), (P, 1, True))


def test_who_was_forgotten_and_comes_back_leaves_what_it_sent_before_in_doubt() -> None:
    core = core_with()
    with pytest.raises(SendInDoubt, match="not known here"):
        core.send_once(Message(Q, b""), (P, 5, True))
    assert core.producers.find(P) is None
    assert core.send_once(Message(Q, b""), (P, 6, False))
    with pytest.raises(SendInDoubt, match="below what is remembered"):
        core.send_once(Message(Q, b""), (P, 5, True))
    assert core.send_once(Message(Q, b""), (P, 7, True))


# ---- all producers


def test_the_one_unused_for_longest_goes_first() -> None:
    core = core_with(producers_max=2)
    for name in ("a", "b"):
        core.producers.open(name)
    core.seal()
    core.producers.open("a")
    core.producers.find("b")  # no use
    core.producers.open("c")
    assert core.operations == [(DELETE_PRODUCER, "b")]
    assert core.producers.find("b") is None
    assert core.producers.find("a") is not None
    assert [record.producer_id for record in sealed(core)] == ["c"]
    core.producers.open("d").stored(1, 1)
    core.producers.open("e")
    core.producers.open("f")
    assert core.operations[1:] == [(DELETE_PRODUCER, name) for name in ("a", "c", "d")]
    assert [record.producer_id for record in sealed(core)] == ["e", "f"], "what was deleted is not written behind that"
    check_invariants(core)


def test_restored_producers_are_in_order_of_their_use() -> None:
    records = [ProducerRecord("a", last_used=3), ProducerRecord("b", last_used=1), ProducerRecord("c", last_used=2)]
    core = core_with(*records, producers_max=3)
    assert not core.dirty
    core.producers.open("d")
    core.producers.open("e")
    assert core.operations == [(DELETE_PRODUCER, "b"), (DELETE_PRODUCER, "c")]


def test_clients_and_time_make_no_link_forgotten() -> None:
    core = core_with(producers_max=2)
    link = f"{LINK_PREFIX}north life"
    core.producers.open(link).stored(0, 9)
    for number in range(10):
        core.producers.open(f"client {number}")
    assert core.producers.find(link) is not None
    core.now += 100 * RETENTION
    core.producers.sweep()
    assert core.producers.open(link).look(9) == STORED
    for number in range(2):
        core.producers.open(f"{LINK_PREFIX}south {number}")
    assert core.producers.find(link) is None, "links are bounded, too"
    assert core.operations[-1] == (DELETE_PRODUCER, link)
    assert len(core.producers) == 2, "the clients were swept away"


def test_unused_producers_are_forgotten_in_two_steps() -> None:
    core = core_with(ProducerRecord("old", (1, 9), 0, 500), ProducerRecord("young", (1, 9), 0, 900))
    core.now = 500 + RETENTION
    core.producers.sweep()
    assert sealed(core) == [ProducerRecord("old", (), 10, 500)]
    old = core.producers.find("old")
    assert old is not None
    assert (old.look(9), old.look(10)) == (IN_DOUBT, NEW)
    core.now = 900 + RETENTION - 1
    core.producers.sweep()
    assert sealed(core) == []
    core.now += 1
    core.producers.sweep()
    assert [record.producer_id for record in sealed(core)] == ["young"]
    young = core.producers.open("young")
    young.stored(10, 10)  # it is back
    assert answers(young, 12) == "??????????sn"
    core.now = 500 + FORGOTTEN_AFTER * RETENTION
    core.producers.sweep()
    assert core.operations == [(DELETE_PRODUCER, "old")]
    assert answers(young, 12) == "???????????n"
    assert core.producers.find("old") is None
    check_invariants(core)


def test_a_sweep_changes_a_bounded_number_and_goes_on() -> None:
    many = SWEEP_MAX + 7
    core = core_with(*(ProducerRecord(str(number), (1, 1), 0, number) for number in range(many)))
    core.now = RETENTION + many
    core.sweep()
    assert len(sealed(core)) == SWEEP_MAX
    core.sweep()
    assert len(sealed(core)) == 7
    core.sweep()
    assert sealed(core) == []
    core.now *= FORGOTTEN_AFTER
    core.sweep()
    core.sweep()
    assert len(core.producers) == 0


def test_a_clock_that_goes_back_forgets_nobody() -> None:
    core = core_with(now=10 * RETENTION)
    core.producers.open("a").stored(1, 1)
    core.producers.sweep()
    core.now = 5
    core.producers.open("b").stored(1, 1)
    core.producers.sweep()
    assert [core.producers.open(name).look(1) for name in "ab"] == [STORED, STORED]


# ---- transactions


def transacting(**limits: Any) -> tuple[Driver, Any]:
    driver = Driver(Limits(**limits), DeliveryPolicy(), Ignore())
    return driver, driver.connect()


def depth(core: Core, destination: str = Q) -> int:
    queue = core.by_destination.get(destination)
    return 0 if queue is None else queue.depth


def test_a_transaction_records_what_it_sends_at_the_commit_only() -> None:
    driver, connection = transacting()
    core = driver.begin_turn()
    for name in ("kept", "aborted"):
        core.begin(connection, name)
        core.send_later(connection, Message(Q, b""), name, (P, 1, False))
    core.abort(connection, "aborted")
    producer = core.producers.open(P)
    assert producer.look(1) == NEW
    core.commit(connection, "kept")
    assert (depth(core), producer.look(1)) == (1, STORED)
    core.begin(connection, "again")
    core.send_later(connection, Message(Q, b""), "again", (P, 1, True))
    core.send_later(connection, Message(Q, b""), "again", (P, 2, False))
    core.commit(connection, "again")
    assert (depth(core), core.duplicates, producer.ranges) == (2, 1, (1, 2))
    with pytest.raises(TransactionError):
        core.send_later(connection, Message(Q, b""), "none", (P, 1, True))
    check_invariants(core)


def test_what_was_stored_between_send_and_commit_is_left_out() -> None:
    driver, connection = transacting()
    core = driver.begin_turn()
    core.begin(connection, "t")
    for sequence in (1, 2, 2, 3):  # one of them twice
        core.send_later(connection, Message(Q, b"%d" % sequence), "t", (P, sequence, False))
    core.send_later(connection, Message(Q, b"plain"), "t")
    core.send_once(Message(Q, b"1"), (P, 1, False))  # over another connection
    core.commit(connection, "t")
    driver.end_turn()
    driver.settle()
    page = driver.store.read_page(core.by_destination[Q].queue_id, 0, 100, 1 << 20)
    assert [entry.message.body for entry in page.entries] == [b"1", b"2", b"3", b"plain"]
    assert (core.duplicates, core.producers.open(P).ranges) == (2, (1, 3))
    assert driver.verify().ok


@pytest.mark.parametrize("open_again", [True, False])
def test_a_commit_that_is_repeated_is_done_once_and_gives_back_what_was_collected_since(open_again: bool) -> None:
    driver, connection = transacting()
    core = driver.begin_turn()
    core.send(Message(Q, b"consumed"))
    driver.end_turn()
    core.begin(connection, "t")
    core.send_later(connection, Message("/queue/r", b""), "t")
    core.commit(connection, "t", (P, 7, False))
    if open_again:
        consumer = core.subscribe(connection, Q, INDIVIDUAL)
        core.start(consumer)
        driver.end_turn()
        driver.settle()
        core.begin(connection, "t")
        core.send_later(connection, Message("/queue/r", b""), "t")
        core.acknowledge(consumer, 1, "t")
    core.commit(connection, "t", (P, 7, True))
    assert (depth(core, "/queue/r"), depth(core), core.duplicates) == (1, 1, 1)
    assert not connection.transactions
    with pytest.raises(TransactionError):
        core.commit(connection, "t", (P, 8, False))
    assert core.producers.open(P).look(8) == NEW
    driver.end_turn()
    driver.settle()
    if open_again:
        assert [body for *_, body in driver.observer.deliveries] == [b"consumed", b"consumed"]  # type: ignore[attr-defined]
    check_invariants(core)
    assert driver.verify().ok


def test_a_commit_in_doubt_or_refused_is_aborted_and_records_nothing() -> None:
    driver, connection = transacting(destinations_max=1)
    core = driver.begin_turn()
    core.producers.open(P, 5)
    for once, inside, error in (
        ((P, 4, True), (P, 6, False), SendInDoubt),  # the commit itself
        (("gone", 1, True), (P, 6, False), SendInDoubt),
        ((P, 7, False), (P, 6, False), LimitExceeded),
    ):
        core.begin(connection, "t")
        for destination in (Q, "/queue/other"):
            core.send_later(connection, Message(destination, b""), "t", inside)
            inside = (P, inside[1] + 1, False)
        with pytest.raises(error):
            core.commit(connection, "t", once)
        assert not connection.transactions
    core.begin(connection, "t")
    core.send_later(connection, Message(Q, b""), "t", (P, 6, False))
    core.producers.open(P).stored(8, 8)
    core.producers.open(P).forget()  # since it was sent
    with pytest.raises(SendInDoubt):
        core.commit(connection, "t")
    assert depth(core) == 0
    assert core.memory_bytes == 0
    check_invariants(core)


def test_a_producer_that_is_forgotten_between_send_and_commit_leaves_the_transaction_in_doubt() -> None:
    driver, connection = transacting(producers_max=1)
    core = driver.begin_turn()
    core.begin(connection, "t")
    core.send_later(connection, Message(Q, b""), "t", (P, 1, False))
    core.send_once(Message(Q, b""), (P, 1, True))  # over another connection
    core.send_once(Message(Q, b""), ("other", 1, False))
    with pytest.raises(SendInDoubt):
        core.commit(connection, "t")
    assert depth(core) == 2
    check_invariants(core)


# ---- through a store


class Producing(RuleBasedStateMachine):
    """Clients that repeat what was not confirmed; crashes at every step of a commit; forgetting, in every way.

    A client knows what it tried and what was confirmed, and uses new sequences in order, as it should.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names = ("a", "b", "c")

    @initialize(producers_max=st.integers(1, 3), ranges_max=st.integers(1, 3))
    def first(self, producers_max: int, ranges_max: int) -> None:
        limits = replace(Limits(), producers_max=producers_max, producer_ranges_max=ranges_max, producer_retention=1.0)
        self.driver = Driver(limits, DeliveryPolicy(), self)  # type: ignore[arg-type]
        self.connection = self.driver.connect()
        self.next = dict.fromkeys(self.names, 1)
        self.tried: set[tuple[str, int]] = set()
        self.confirmed_numbers: set[tuple[str, int]] = set()
        self.transaction: list[tuple[str, int]] | None = None
        self.in_doubt = 0

    # what the driver tells

    def confirmed(self, token: Any) -> None:
        self.confirmed_numbers |= set(token)

    def shown(self, *_: Any) -> None:
        raise AssertionError("nobody consumes")

    def sealed(self) -> None:
        pass

    def written(self, snapshot: Any) -> None:
        pass

    # what clients do

    def _sends(self, numbers: list[tuple[str, int]], together: bool, in_transaction: bool) -> None:
        core = self.driver.begin_turn()
        for number in numbers:
            repeated = number in self.tried
            self.tried.add(number)
            message = Message(Q, f"{number[0]} {number[1]}".encode())
            try:
                if in_transaction:
                    if not self.connection.transactions:
                        core.begin(self.connection, "t")
                    core.send_later(self.connection, message, "t", (*number, repeated))
                else:
                    core.send_once(message, (*number, repeated))
                    core.confirm((None, [number]))
            except SendInDoubt:
                assert repeated, "what was never sent is not in doubt"
                self.in_doubt += 1
            if not together:
                self.driver.end_turn()
                core = self.driver.begin_turn()
        self.driver.end_turn()

    @rule(
        name=st.integers(0, 2), count=st.integers(1, 3), skip=st.integers(0, 1), together=st.booleans(), t=st.booleans()
    )
    def send(self, name: int, count: int, skip: int, together: bool, t: bool) -> None:
        producer = self.names[name]
        start = self.next[producer] + skip
        self.next[producer] = start + count
        self._sends([(producer, start + number) for number in range(count)], together, t)

    @rule(which=st.integers(0, 30), count=st.integers(1, 4), together=st.booleans(), t=st.booleans())
    def repeat(self, which: int, count: int, together: bool, t: bool) -> None:
        """Also of what was confirmed long ago: a client may have lost the confirmation."""
        known = sorted(self.tried)
        if known:
            at = which % len(known)
            self._sends(known[at : at + count], together, t)

    @rule(abort=st.booleans())
    def end_transaction(self, abort: bool) -> None:
        core = self.driver.begin_turn()
        if self.connection.transactions:
            numbers = list(self.connection.transactions["t"].numbered.values())
            try:
                if abort:
                    core.abort(self.connection, "t")
                else:
                    core.commit(self.connection, "t")
                    core.confirm((None, numbers))
            except SendInDoubt:
                self.in_doubt += 1
        self.driver.end_turn()

    @rule(count=st.integers(1, 4))
    def commit(self, count: int) -> None:
        for _ in range(count):
            self.driver.step_commit()

    @rule(ms=st.sampled_from((1, 600, 1_000, 20_000)))
    def sweep(self, ms: int) -> None:
        self.driver.now += ms
        self.driver.begin_turn().sweep()
        self.driver.end_turn()
        self.driver.settle()

    @rule(crash=st.booleans())
    def restart(self, crash: bool) -> None:
        if crash:
            self.driver.crash()
        else:
            self.driver.restart()
        self.connection = self.driver.connect()

    # what holds

    @invariant()
    def nothing_twice_and_nothing_lost(self) -> None:
        if not hasattr(self, "driver"):
            return
        core = self.driver.core
        check_invariants(core)
        assert len(core.producers) <= core.producers._count_max
        queue = core.by_destination.get(Q)
        if queue is None:
            assert not self.confirmed_numbers
            return
        stored = self.driver.store.read_page(queue.queue_id, 0, 10_000, 1 << 30).entries
        there = Counter(entry.message.body for entry in stored)
        assert all(count == 1 for count in there.values()), f"stored twice: {there}"
        missing = {number for number in self.confirmed_numbers if f"{number[0]} {number[1]}".encode() not in there}
        assert not missing, f"confirmed, and lost: {missing}"

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.settle()
            self.nothing_twice_and_nothing_lost()
            assert self.driver.verify().ok


TestProducing = Producing.TestCase
TestProducing.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_with_a_consumer_a_repeat_is_shown_once() -> None:
    driver, connection = transacting()
    core = driver.begin_turn()
    consumer = core.subscribe(connection, Q, AUTO)
    core.start(consumer)
    for _ in range(3):
        core.send_once(Message(Q, b"once"), (P, 1, True) if core.producers.find(P) else (P, 1, False))
        driver.end_turn()
        driver.settle()
    assert [body for *_, body in driver.observer.deliveries] == [b"once"]  # type: ignore[attr-defined]


def test_the_records_of_a_batch_are_those_of_its_messages() -> None:
    """A batch has the record with the sequences that it stores: not those of later turns, and none is missing."""
    driver, _ = transacting()
    for sequence in (1, 2, 3):
        driver.begin_turn().send_once(Message(Q, b""), (P, sequence, False))
        driver.end_turn()
        if sequence == 1:
            driver.step_commit()  # the batch is closed; what comes now is for the next one
    driver.step_commit()
    driver.step_commit()
    driver.store.reload()
    assert [record.ranges for record in driver.store.producers] == [(1, 1)]
    assert [record.count for record in driver.store.records] == [1]
    driver.settle()
    driver.store.reload()
    assert [record.ranges for record in driver.store.producers] == [(1, 3)]
    assert PUT_QUEUE not in {operation[0] for operation in driver.core.seal()}
