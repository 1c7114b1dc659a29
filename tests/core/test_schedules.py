"""Scheduled messages: what the headers may say, and the rules of time, room and repeats, each with its story."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pybroker.core.invariants import check_invariants
from pybroker.core.schedule_headers import TIME_MAX, Terms, take_terms
from pybroker.core.schedules import ScheduleLookup, Schedules
from pybroker.errors import BrokerError, InvalidDestination, InvalidMessage, LimitExceeded, StoreDamaged
from pybroker.message import Message, encode_headers
from pybroker.operations import Schedule
from pybroker.store.backend import Change
from pybroker.store.format import encode_number
from pybroker.store.schedules import due_key, schedule_key
from tests.core.bench import Bench

MINUTE = 60_000
DELAY, PERIOD, REPEAT, CRON = (f"AMQ_SCHEDULED_{name}" for name in ("DELAY", "PERIOD", "REPEAT", "CRON"))


def plan(bench: Bench, body: bytes, to: str = "/queue/a", durable: bool = True, **headers: object) -> None:
    block = encode_headers([(f"AMQ_SCHEDULED_{name.upper()}", str(value)) for name, value in headers.items()])
    bench.core.send(Message(to, body, block, durable))
    bench.end()


def pass_time(bench: Bench, milliseconds: int) -> None:
    """Let time pass, and send what is due."""
    bench.driver.now += milliseconds
    for _ in range(100):
        more = bench.core.release_due(2)
        bench.end()
        bench.settle()
        if not more and not bench.driver.core.schedules.changed:
            return
        bench.driver.core.schedules.changed = False


# ---- what the headers say


def test_the_headers_of_a_schedule_are_taken_away_and_others_stay():
    block = encode_headers(
        [("a", f"{DELAY}:5"), (DELAY, "10"), (REPEAT, "2"), (PERIOD, "3"), (DELAY, "99"), ("b", "c")]
    )
    assert take_terms(block) == (Terms(10, 3, 2, ""), encode_headers([("a", f"{DELAY}:5"), ("b", "c")]))
    plain = encode_headers([("note", f"about {DELAY}")])
    assert take_terms(plain) == (None, plain)


WRONG: list[dict[str, str]] = [
    *({DELAY: text} for text in ("-1", "1.5", "soon", "", " 5", "0x10", "1e3", "٣", str(TIME_MAX + 1), "9" * 400)),
    {PERIOD: "-5"},
    {PERIOD: "10", REPEAT: "-2"},
    {PERIOD: "10", REPEAT: str(2**31)},
    {REPEAT: "3"},
    {DELAY: "3", REPEAT: "3"},
    {"AMQ_SCHEDULED_DELEY": "5"},
    *({CRON: text} for text in ("", " ", "* * * *", "* * * * * *", "61 * * * *", "a b c d e", "*/0 * * * *", "@daily")),
    *(
        {CRON: text}
        for text in ("0 0 30 2 *", "1-* * * * *", "LW/2 * L/L * *", "* * L/2/2 * *", "*," * 200 + "* * * * *")
    ),
    {CRON: "* * * * *", PERIOD: "5"},
    {CRON: "* * * * *", PERIOD: "5", REPEAT: "-1"},
]


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_what_can_not_be_meant_is_refused(headers: dict[str, str]):
    bench = Bench()
    for send in (bench.core.send, bench.core.check):
        with pytest.raises(InvalidMessage):
            send(Message("/queue/a", b"", encode_headers(headers)))
    bench.end()
    assert not len(bench.core.schedules)
    assert not bench.core.queues


# ---- when it comes


def test_a_message_comes_when_it_is_due_with_an_id_of_its_own():
    bench = Bench()
    consumer = bench.subscribe("/queue/a")
    plan(bench, b"later", delay=1_000)
    plan(bench, b"period alone", period=500)
    pass_time(bench, 499)
    assert bench.bodies(consumer) == []
    pass_time(bench, 1)
    assert bench.bodies(consumer) == [b"period alone"]
    pass_time(bench, 10_000)
    assert bench.bodies(consumer) == [b"period alone", b"later"]
    message = bench.entries(consumer)[1].message
    assert message.headers == [("scheduledJobId", "1")]
    assert message.timestamp == bench.driver.now


def test_repeats_keep_to_their_rhythm_and_leave_out_what_was_missed():
    bench = Bench()
    consumer = bench.subscribe("/queue/a")
    plan(bench, b"x", delay=100, period=1_000, repeat=3)
    pass_time(bench, 100)
    assert len(bench.bodies(consumer)) == 1
    pass_time(bench, 5_500)  # at 5,600: those of 1,100 to 5,100 are late, and come once
    assert len(bench.bodies(consumer)) == 2
    pass_time(bench, 499)
    assert len(bench.bodies(consumer)) == 2
    pass_time(bench, 1)  # 6,100
    assert len(bench.bodies(consumer)) == 3
    pass_time(bench, 1_000)
    pass_time(bench, 100_000)
    assert len(bench.bodies(consumer)) == 4, "one, and three repeats"
    assert not len(bench.core.schedules)


def test_a_cron_time_begins_a_series():
    """As ActiveMQ's documentation has it: each minute three messages, a second between them."""
    bench = Bench()
    bench.driver.now = 10 * MINUTE + 1
    consumer = bench.subscribe("/queue/a")
    plan(bench, b"x", cron="* * * * *", delay=1_000, period=1_000, repeat=2)
    pass_time(bench, MINUTE - 1)  # 11:00
    assert len(bench.bodies(consumer)) == 0
    for count in (1, 2, 3, 3):
        pass_time(bench, 1_000)
        assert len(bench.bodies(consumer)) == count
    pass_time(bench, MINUTE - 4_000)
    pass_time(bench, 1_000)
    assert len(bench.bodies(consumer)) == 4


@pytest.mark.parametrize("back", [3_600_000, 1])
def test_a_clock_that_is_put_back_sends_nothing_twice(back: int):
    bench = Bench()
    consumer = bench.subscribe("/queue/a")
    for body in (b"1", b"2", b"3"):
        plan(bench, body, delay=int(body) * 1_000)
    plan(bench, b"cron", cron="* * * * *")
    pass_time(bench, MINUTE)
    assert sorted(bench.bodies(consumer)) == [b"1", b"2", b"3", b"cron"]
    pass_time(bench, -back)
    bench.crash()
    consumer = bench.subscribe("/queue/a")
    pass_time(bench, back)
    assert len(bench.bodies(consumer)) == 4, "what was delivered before the crash, and nothing new"
    assert {deliveries for _, deliveries in bench.seen(consumer)} == {1}


def test_what_it_may_live_begins_when_it_is_sent():
    bench = Bench()
    consumer = bench.subscribe("/queue/a")
    now = bench.driver.now
    block = encode_headers([("expires", str(now + 50)), (DELAY, "1000")])
    bench.core.send(Message("/queue/a", b"x", block, expires=now + 50))
    bench.core.send(Message("/queue/a", b"too late", block, expires=now))
    pass_time(bench, 1_000)
    (entry,) = bench.entries(consumer)
    assert entry.message.expires == now + 1_050
    assert entry.message.header("expires") == str(now + 1_050)


def test_a_transaction_schedules_when_it_commits():
    bench = Bench()
    consumer = bench.subscribe("/queue/a")
    connection = bench.connect()
    block = encode_headers([(DELAY, "1000")])
    for name in ("done", "left"):
        bench.core.begin(connection, name)
        bench.core.send_later(connection, Message("/queue/a", name.encode(), block), name)
    pass_time(bench, 5_000)
    bench.core.commit(connection, "done")
    bench.core.abort(connection, "left")
    bench.end()
    pass_time(bench, 999)
    assert bench.bodies(consumer) == []
    pass_time(bench, 1)
    assert bench.bodies(consumer) == [b"done"]


# ---- room


def test_what_finds_no_room_waits_in_order_and_holds_up_nobody_else():
    bench = Bench(queue_messages_max=1)
    for body in (b"1", b"2", b"3"):
        plan(bench, body, delay=10)
    plan(bench, b"other", "/queue/b", delay=20)
    pass_time(bench, 100)
    assert bench.queue("/queue/a").depth == 1
    assert bench.queue("/queue/b").depth == 1
    bench.crash()
    consumer = bench.subscribe("/queue/a", prefetch=1)
    for body in (b"1", b"2", b"3"):
        pass_time(bench, 0)
        assert bench.bodies(consumer)[-1] == body
        bench.ack(consumer, body)
    assert not len(bench.core.schedules)


def test_what_waits_for_room_is_bounded_by_its_bytes_too():
    bench = Bench(window_bytes_max=1_000, queue_messages_max=1)
    bench.send("/queue/a", b"first")
    for _ in range(40):
        plan(bench, bytes(100), delay=10)
        bench.settle()
    pass_time(bench, 10)
    schedules = bench.core.schedules
    assert schedules.held_size == 1_000
    assert sum(each.message.size for each in schedules.in_memory()) < 3_000
    assert schedules.next_due is None
    consumer = bench.subscribe("/queue/a", prefetch=1)
    for _ in range(41):
        pass_time(bench, 0)
        bench.ack(consumer, bench.bodies(consumer)[-1])
    assert len(bench.bodies(consumer)) == 41
    assert not len(bench.core.schedules)


@pytest.mark.parametrize("waited", [False, True])
def test_one_turn_sends_about_the_bytes_of_a_window(waited: bool):
    bench = Bench(window_bytes_max=1_000)
    for _ in range(10):
        plan(bench, bytes(300), delay=10, period=1_000, repeat=1)
        bench.settle()
    bench.driver.now += 10
    if waited:
        bench.driver.core.disk_full = "no room"
        while bench.core.release_due(100):
            bench.end()
        bench.end()
        bench.driver.core.disk_full = ""
    turns = 0
    more = True
    while more:
        turns += 1
        more = bench.core.release_due(100)
        operations = bench.core.operations
        messages = [part for operation in operations for part in operation if isinstance(part, Message | Schedule)]
        sizes = [each.size if isinstance(each, Message) else each.message.size for each in messages]
        assert sum(sizes) < 1_000 + 2 * 400
        bench.end()
        bench.settle()
        more = more or bench.driver.core.schedules.changed
        bench.driver.core.schedules.changed = False
    assert bench.queue("/queue/a").depth == 10
    assert turns >= 5


def test_one_turn_tries_few_of_those_that_wait_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch):
    bench = Bench(queue_messages_max=1)
    for number in range(10):
        bench.send(f"/queue/{number}", b"first")
        plan(bench, b"second", f"/queue/{number}", delay=10)
    pass_time(bench, 10)
    tried: list[str] = []
    run = Schedules._run

    def watched(schedules: Schedules, schedule: Schedule) -> bool:
        tried.append(schedule.message.destination)
        return run(schedules, schedule)

    monkeypatch.setattr(Schedules, "_run", watched)
    for _ in range(3):
        for more in (True, True, False):
            before = len(tried)
            assert bench.core.release_due(4) is more
            bench.end()
            assert len(tried) - before <= 4
        assert tried == [f"/queue/{number}" for number in range(10)]
        tried.clear()
    plan(bench, b"other", "/queue/free", delay=1)
    pass_time(bench, 1)
    assert bench.queue("/queue/free").depth == 1


@pytest.mark.parametrize("limit", ["disk", "store"])
def test_a_series_begins_only_where_there_is_room_for_it(limit: str):
    bench = Bench(store_bytes_max=1_000 if limit == "store" else 0)
    plan(bench, bytes(600), cron="* * * * *", repeat=1, period=36_000_000)
    if limit == "store":
        plan(bench, bytes(600), delay=72_000_000)
    else:
        bench.driver.core.disk_full = "no room"
    stored = bench.core.stored_bytes
    for _ in range(5):
        pass_time(bench, MINUTE)
    assert bench.core.stored_bytes == stored
    assert bench.core.schedules.held_up == 1
    if limit == "store":
        assert bench.core.schedules.cancel(2)
        bench.end()
    else:
        bench.driver.core.disk_full = ""
    pass_time(bench, 0)
    assert bench.core.stored_bytes == 1_200
    assert not bench.core.schedules.held_up


def test_a_store_that_is_full_of_schedules_gets_rid_of_them():
    bench = Bench(store_bytes_max=100)
    plan(bench, b"x" * 101, delay=10)
    assert bench.core.full(Message("/queue/a", b"")) is not None
    consumer = bench.subscribe("/queue/a")
    pass_time(bench, 10)
    assert len(bench.bodies(consumer)) == 1


def test_limits():
    bench = Bench(schedules_max=2, destinations_max=1)
    plan(bench, b"1", delay=5)
    plan(bench, b"2", "/queue/b", delay=5, durable=False)
    with pytest.raises(LimitExceeded, match=r"limits\.schedules_max"):
        plan(bench, b"3", delay=5)
    with pytest.raises(InvalidDestination):
        plan(bench, b"3", "/queue/*", delay=5)
    connection = bench.connect()
    assert bench.core.schedules.cancel(2)
    bench.end()
    bench.core.begin(connection, "x")
    for body in (b"3", b"4"):
        bench.core.send_later(connection, Message("/queue/a", body, encode_headers([(DELAY, "5")])), "x")
    with pytest.raises(LimitExceeded):
        bench.core.commit(connection, "x")
    bench.end()
    assert len(bench.core.schedules) == 1, "all of a transaction, or nothing"
    plan(bench, b"5", "/queue/b", delay=6)
    pass_time(bench, 10)  # there is room for one queue only
    assert [schedule.message.body for schedule in bench.core.schedules.in_memory()] == [b"5"]


def test_the_shortest_period():
    bench = Bench(schedule_period_min=0.5)
    for wrong in ({"period": 499, "repeat": -1}, {"cron": "* * * * *", "period": 1, "repeat": 1}):
        with pytest.raises(LimitExceeded, match=r"limits\.schedule_period_min"):
            plan(bench, b"too often", **wrong)
        block = encode_headers([(f"AMQ_SCHEDULED_{name.upper()}", str(value)) for name, value in wrong.items()])
        with pytest.raises(LimitExceeded):
            bench.core.check(Message("/queue/a", b"", block))
    for right in ({"period": 1}, {"delay": 1}, {"period": 500, "repeat": -1}):
        plan(bench, b"x", **right)
    assert len(bench.core.schedules) == 3


# ---- memory, and cancelling


def test_few_are_in_memory_and_any_can_be_cancelled():
    bench = Bench(window_messages_max=4)
    for number in range(20):
        plan(bench, b"%d" % number, delay=100 - number)
    bench.settle()
    assert len(bench.core.schedules.in_memory()) <= 4
    answers: list[tuple[int, bool]] = []
    for number in (1, 1, 20, 12, 99):  # the first one is due last
        schedules = bench.core.schedules
        if schedules.cancel(number):
            answers.append((number, True))
        else:
            schedules.look_up(ScheduleLookup(number, lambda done, number=number: answers.append((number, done))))
        bench.end()
    bench.settle()
    assert sorted(answers) == [(1, False), (1, True), (12, True), (20, True), (99, False)]
    bench.crash()
    bench.settle()
    consumer = bench.subscribe("/queue/a")
    pass_time(bench, 200)
    assert bench.bodies(consumer) == [b"%d" % number for number in range(18, 0, -1) if number != 11]


def test_nothing_of_a_schedule_is_left_in_the_store():
    bench = Bench()
    plan(bench, b"x", delay=5, period=5, repeat=1)
    pass_time(bench, 5)
    pass_time(bench, 5)
    keys = [key.hex() for key, _ in bench.driver.backend.iterate(b"\x51", b"\x60")]
    assert keys == []


def test_an_unknown_error_of_sending_keeps_the_schedule(monkeypatch: pytest.MonkeyPatch):
    bench = Bench()
    plan(bench, b"x", delay=5)
    bench.settle()

    def refuse(message: Message) -> bool:
        raise BrokerError("no")

    monkeypatch.setattr(bench.driver.core, "send", refuse)
    pass_time(bench, 10)
    monkeypatch.undo()
    consumer = bench.subscribe("/queue/a")
    pass_time(bench, 0)
    assert bench.bodies(consumer) == [b"x"]


def test_one_that_is_cancelled_while_its_page_is_read_does_not_come_back():
    bench = Bench(window_messages_max=8)
    for number in range(1, 21):
        plan(bench, b"%d" % number, delay=10 * number)
    bench.settle()
    answers: list[bool] = []
    bench.core.schedules.look_up(ScheduleLookup(9, answers.append))
    bench.end()
    bench.driver.now += 30
    bench.core.release_due(10)  # few are left in memory: the next page is asked for, behind the lookup
    bench.end()
    bench.driver.commit()
    page = bench.core.schedules.page
    assert page is not None
    while bench.core.schedules.page is page:  # read while what the lookup led to is not committed
        bench.driver.step_read()
    bench.end()
    assert answers == [True]
    assert 10 in {schedule.number for schedule in bench.core.schedules.in_memory()}
    consumer = bench.subscribe("/queue/a")
    pass_time(bench, 1_000)
    assert bench.bodies(consumer) == [b"%d" % number for number in range(1, 21) if number != 9]


def test_one_that_waits_for_room_is_not_read_again_after_the_clock_was_put_back():
    bench = Bench(window_messages_max=2, queue_messages_max=1)
    bench.send("/queue/a", b"first")
    plan(bench, b"second", delay=10)
    pass_time(bench, 10)
    assert bench.driver.core.schedules.held_up == 1
    bench.driver.now -= 1_000
    for number in range(4):
        plan(bench, b"%d" % number, f"/queue/{number}", delay=10 + number)
    pass_time(bench, 990)
    assert len(bench.core.schedules) == 1
    consumer = bench.subscribe("/queue/a", prefetch=1)
    bench.settle()
    bench.ack(consumer, b"first")
    pass_time(bench, 5_000)
    bench.ack(consumer, b"second")
    pass_time(bench, 5_000)
    assert bench.bodies(consumer) == [b"first", b"second"]


# ---- damage


class Unreadable:
    """A reader of a backend's snapshot that can't read one key."""

    def __init__(self, reader: Any, key: bytes) -> None:
        self.reader = reader
        self.key = key

    def get(self, key: bytes) -> bytes | None:
        return self.reader.get(key)

    def iterate(self, start: bytes, stop: bytes) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self.reader.iterate(start, stop):
            if key == self.key:
                raise StoreDamaged("a block that can't be read")
            yield key, value


def test_what_stands_in_an_unreadable_place_comes_when_that_is_mended(monkeypatch: pytest.MonkeyPatch):
    bench = Bench()
    plan(bench, b"first", delay=1_000)
    plan(bench, b"second", delay=500_000)
    bench.settle()
    first = min(schedule.key for schedule in bench.core.schedules.in_memory())
    backend = bench.driver.backend
    snapshot = backend.snapshot

    @contextmanager
    def damaged() -> Iterator[Unreadable]:
        with snapshot() as reader:
            yield Unreadable(reader, due_key(*first))

    with monkeypatch.context() as patch:
        patch.setattr(backend, "snapshot", damaged)
        bench.driver.open()
        bench.driver.settle()
        schedules = bench.core.schedules
        assert (schedules.corrupt, len(schedules.places)) == (0, 1)
        plan(bench, b"third", delay=400_000)
        bench.driver.settle()
        check_invariants(bench.driver.core)
    bench.driver.open()
    bench.settle()
    assert not bench.core.schedules.places
    pass_time(bench, 2_000_000)
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.bodies(consumer) == [b"first", b"third", b"second"]
    assert not len(bench.core.schedules)


def test_a_bad_one_that_is_read_again_is_counted_once_and_comes_when_it_was_mended():
    bench = Bench(window_messages_max=4)
    for number in range(1, 9):
        plan(bench, b"%d" % number, delay=100 * number)
    bench.settle()
    key = schedule_key(7)
    backend = bench.driver.backend
    with backend.snapshot() as reader:
        whole = reader.get(key)
    backend.write(backend.new_batch([(key, b"bad")]), True)
    bench.driver.open()
    bench.driver.settle()
    pass_damaged(bench, 500)
    assert bench.core.schedules.corrupt == 1
    for number in range(3):  # those behind it are left to the store, and read again
        plan(bench, b"new%d" % number, delay=1)
        plan(bench, b"new%d" % number, delay=2)
        bench.driver.settle()
    pass_damaged(bench, 10)
    assert bench.core.schedules.corrupt == 1
    backend.write(backend.new_batch([(key, whole)]), True)
    bench.driver.open()
    bench.settle()
    pass_time(bench, 1_000)
    assert bench.queue("/queue/a").depth == 8 + 6


def pass_damaged(bench: Bench, milliseconds: int) -> None:
    """`pass_time`, with a store that `verify` finds bad."""
    bench.driver.now += milliseconds
    for _ in range(100):
        more = bench.core.release_due(2)
        bench.end()
        bench.driver.settle()
        check_invariants(bench.driver.core)
        if not more and not bench.driver.core.schedules.changed:
            return
        bench.driver.core.schedules.changed = False


@pytest.mark.parametrize("damage", ["bad", "missing", "another time"])
def test_one_that_the_index_does_not_have_can_be_cancelled(damage: str):
    bench = Bench()
    plan(bench, b"x", delay=1_000)
    plan(bench, b"y", delay=2_000)
    bench.settle()
    backend = bench.driver.backend
    due = bench.driver.now + 1_000
    row = due_key(due, 1)
    other = due_key(due + 500, 1)
    changes: dict[str, list[Change]] = {
        "bad": [(row, b"bad")],
        "missing": [(row, None)],
        "another time": [(row, None), (other, encode_number(other, 1))],
    }
    backend.write(backend.new_batch(changes[damage]), True)
    bench.driver.open()
    bench.driver.settle()
    answers: list[bool] = []
    for _ in range(2):
        bench.core.schedules.look_up(ScheduleLookup(1, answers.append))
        bench.driver.end_turn()
        bench.driver.settle()
    assert answers == [True, False]
    bench.settle()
    assert (len(bench.core.schedules), bench.core.schedules.corrupt) == (1, 0)
    pass_time(bench, 5_000)
    assert bench.queue("/queue/a").depth == 1
