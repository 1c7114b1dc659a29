"""Scheduled messages against a naive model, by random programs: crashes, restarts and jumps of the clock in the middle.

The model is a set of schedules, and what was sent of them. What is due must come, in order, and each time once.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pybroker.config import DeliveryPolicy, Limits
from pybroker.core.consumer import INDIVIDUAL
from pybroker.core.invariants import check_invariants
from pybroker.core.queue import Queue
from pybroker.core.schedules import ScheduleLookup, Schedules
from pybroker.message import Message, decode_headers, encode_headers
from pybroker.operations import Schedule
from tests.core.driver import Driver, Ignore, observing

LIMITS = Limits(window_messages_max=4, window_bytes_max=200)
QUEUES = ("/queue/a", "/queue/b")
MINUTE = 60_000
CRON = "* * * * *"
index = st.integers(0, 9)


@dataclass
class Planned:
    """One schedule as the model has it."""

    number: int
    body: bytes
    to: str
    due: int
    durable: bool
    left: int = 0
    period: int = 0
    cron: bool = False
    delay: int = 0
    lives: int = 0

    @property
    def begins(self) -> bool:
        """Whether it begins a schedule at each time instead of sending its message."""
        return self.cron and bool(self.delay or self.left)


@dataclass
class State:
    """What a batch brings the store to. `sent`: what should be in the queues."""

    planned: dict[int, Planned] = field(default_factory=dict)
    sent: Counter[bytes] = field(default_factory=Counter)
    next_number: int = 1


class Eye(Ignore):
    """The model, and what it sees of the core."""

    def __init__(self, ordered: bool) -> None:
        super().__init__()
        self.state = State()
        self.durable = State()
        self.driver: Driver
        self.ordered = ordered  # the clock is never put back

    def new(self, **about: Any) -> Planned:
        planned = Planned(self.state.next_number, **about)
        self.state.planned[planned.number] = planned
        self.state.next_number += 1
        return planned

    def accepted(self, queue: Queue, message: Message) -> None:
        headers = dict(decode_headers(message.header_block))
        planned = self.state.planned[int(headers.pop("scheduledJobId"))]
        now = self.driver.now
        assert not planned.begins, planned
        assert (message.body, message.destination, message.durable) == (planned.body, planned.to, planned.durable)
        assert headers == {"k": "v"}, headers
        assert message.expires == (now + planned.lives if planned.lives else 0), message.expires
        self.come(planned)
        self.state.sent[message.body] += 1

    def come(self, planned: Planned) -> None:
        """It is at one of its times: it goes on to the next one."""
        now = self.driver.now
        assert planned.due <= now, f"{planned} came at {now}"
        if self.ordered:
            others = [p for p in self.state.planned.values() if (p.to, p.durable) == (planned.to, planned.durable)]
            assert min(others, key=lambda p: (p.due, p.number)) is planned, (planned, others)
        if planned.cron:
            planned.due = (max(now, planned.due) // MINUTE + 1) * MINUTE
        elif not planned.left:
            del self.state.planned[planned.number]
        else:
            planned.due += planned.period
            while planned.due <= now:
                planned.due += planned.period
            planned.left -= planned.left > 0

    def began(self, schedule: Schedule) -> None:
        """A time of a cron expression has come at which a schedule begins."""
        planned = self.state.planned[schedule.number]
        due = planned.due + (planned.delay or planned.period)
        self.come(planned)
        about = {"body": planned.body, "to": planned.to, "durable": planned.durable, "lives": planned.lives}
        self.new(due=due, left=planned.left, period=planned.period, **about)

    def sealed(self) -> State:
        return copy.deepcopy(self.state)

    def written(self, snapshot: State) -> None:
        self.durable = snapshot

    def crashed(self) -> None:
        """What was not written is gone, and what is not durable."""
        self.state = copy.deepcopy(self.durable)
        self.state.planned = {number: each for number, each in self.state.planned.items() if each.durable}
        self.state.sent = Counter({body: n for body, n in self.state.sent.items() if body.endswith(b"d")})


class ScheduleMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.patches = ExitStack()
        for each in observing():
            self.patches.enter_context(each)
        run = Schedules._run

        def watched(schedules: Schedules, schedule: Schedule) -> bool:
            before = len(self.eye.state.planned)
            done = run(schedules, schedule)
            planned = self.eye.state.planned.get(schedule.number)
            if done and planned is not None and planned.begins:
                assert before
                self.eye.began(schedule)
            return done

        self.patches.enter_context(patch.object(Schedules, "_run", watched))
        self.bodies = 0

    @initialize(window=st.sampled_from((1, 2, 4, 8)), room=st.sampled_from((0, 0, 2)), back=st.booleans())
    def first(self, window: int, room: int, back: bool) -> None:
        self.back = back and not room
        self.eye = Eye(ordered=not self.back)
        limits = replace(LIMITS, window_messages_max=window, queue_messages_max=room)
        self.driver = Driver(limits, DeliveryPolicy(), self.eye, now=1_000 * MINUTE)
        self.eye.driver = self.driver

    def teardown(self) -> None:
        with self.patches:
            if hasattr(self, "driver"):
                self.drain(None)
                self.driver.now += 2 * MINUTE
                self.drain(None)

    # ---- clients

    @rule(
        to=index,
        delay=st.sampled_from((0, 0, 1, 5, 50, 1_000, 70_000)),
        period=st.sampled_from((0, 0, 7, 400, 30_000)),
        repeat=st.sampled_from((0, 1, 3, -1)),
        cron=st.sampled_from((False, False, False, True)),
        durable=st.sampled_from((True, True, True, False)),
        lives=st.sampled_from((0, 0, 10**9)),
        size=st.sampled_from((0, 0, 60)),
        transaction=st.booleans(),
    )
    def schedule(
        self,
        to: int,
        delay: int,
        period: int,
        repeat: int,
        cron: bool,
        durable: bool,
        lives: int,
        size: int,
        transaction: bool,
    ) -> None:
        repeat = 0 if not period or (cron and repeat < 0) else repeat
        period = 0 if cron and not repeat else period
        self.bodies += 1
        body = b"%d%b%b" % (self.bodies, b"x" * size, b"d" if durable else b"n")
        headers = {"k": "v", "AMQ_SCHEDULED_DELAY": str(delay), "AMQ_SCHEDULED_PERIOD": str(period)}
        headers["AMQ_SCHEDULED_REPEAT"] = str(repeat)
        if cron:
            headers["AMQ_SCHEDULED_CRON"] = CRON
        core = self.driver.begin_turn()
        now = self.driver.now
        expires = now + lives if lives else 0
        message = Message(QUEUES[to % 2], body, encode_headers(headers), durable, expires=expires)
        if transaction:
            connection = self.driver.connect()
            core.begin(connection, "x")
            core.send_later(connection, message, "x")
            core.commit(connection, "x")
            core.disconnect(connection)
        else:
            assert core.send(message) is durable
        due = (now // MINUTE + 1) * MINUTE if cron else now + (delay or period)
        about = {"body": body, "to": QUEUES[to % 2], "durable": durable, "lives": lives}
        series = {"left": repeat, "period": period, "cron": cron, "delay": delay if cron else 0}
        self.eye.new(due=due, **about, **series)
        self.end()

    @rule(number=index, unknown=st.booleans())
    def cancel(self, number: int, unknown: bool) -> None:
        numbers = list(self.eye.state.planned) or [1]
        wanted = 10**6 if unknown and number == 9 else numbers[number % len(numbers)]
        life = self.driver.core

        def done(cancelled: bool) -> None:
            assert self.driver.core is life
            assert cancelled == (wanted in self.eye.state.planned), (wanted, cancelled)
            self.eye.state.planned.pop(wanted, None)

        schedules = self.driver.begin_turn().schedules
        if schedules.cancel(wanted):
            done(True)
        else:
            schedules.look_up(ScheduleLookup(wanted, done))
        self.end()

    # ---- the run time

    @rule(count=st.sampled_from((1, 2, 100)))
    def release(self, count: int) -> None:
        self.driver.begin_turn().release_due(count)
        self.end()

    @rule(milliseconds=st.sampled_from((1, 7, 60, 1_000, 40_000, 200_000)))
    def pass_time(self, milliseconds: int) -> None:
        self.driver.now += milliseconds

    @rule(milliseconds=st.sampled_from((1, 1_000, 100_000)))
    @precondition(lambda self: self.back)
    def put_back(self, milliseconds: int) -> None:
        self.driver.now -= milliseconds

    @rule(count=st.integers(1, 5))
    def step_commit(self, count: int) -> None:
        for _ in range(count):
            self.driver.step_commit()
        self.check()

    @rule(count=st.integers(1, 3))
    @precondition(lambda self: self.driver.reads)
    def step_read(self, count: int) -> None:
        for _ in range(count):
            self.driver.step_read()
        self.check()

    @rule()
    def crash(self) -> None:
        self.eye.crashed()
        self.driver.crash()
        self.check()

    @rule(how=st.none())
    def drain(self, how: None) -> None:
        """All that is due comes, and it is in the queues, each message as often as it was sent."""
        found: Counter[bytes] = Counter()
        self.driver.settle()  # what is asked for at the start is read
        for _ in range(10_000):
            more = self.driver.begin_turn().release_due(3)
            self.end()
            self.driver.settle()
            self.check()
            taken = self._take()
            found += taken
            if not more and not taken and not self.driver.core.schedules.changed:
                break
            self.driver.core.schedules.changed = False
        else:
            raise AssertionError("it never comes to rest")
        overdue = [each for each in self.eye.state.planned.values() if each.due <= self.driver.now]
        assert not overdue, overdue
        assert found == +self.eye.state.sent
        self.eye.state.sent.clear()
        self.driver.begin_turn().schedules._touch()  # so that a batch is closed, and the model remembers
        self.end()
        self.driver.settle()
        report = self.driver.verify()
        assert report.ok, report.problems
        assert report.schedules == sum(each.durable for each in self.eye.state.planned.values())

    def _take(self) -> Counter[bytes]:
        core = self.driver.begin_turn()
        connection = self.driver.connect()
        seen = len(self.eye.deliveries)
        for queue in list(core.by_destination):
            core.start(core.subscribe(connection, queue, INDIVIDUAL, prefetch=1_000))
        self.driver.end_turn()
        self.driver.settle()
        core = self.driver.begin_turn()
        taken = self.eye.deliveries[seen:]
        for consumer, entry, _, _ in taken:
            core.acknowledge(consumer, entry.tag)
        core.disconnect(connection)
        self.end()
        self.driver.settle()
        return Counter(body for _, _, _, body in taken)

    # ---- promises

    def end(self) -> None:
        self.driver.end_turn()
        self.check()

    def check(self) -> None:
        check_invariants(self.driver.core)
        schedules = self.driver.core.schedules
        wanted = self.eye.state.planned.values()
        assert (schedules.count, schedules.transient) == (
            sum(each.durable for each in wanted),
            sum(not each.durable for each in wanted),
        )
        for schedule in schedules.in_memory():
            planned = self.eye.state.planned[schedule.number]
            assert (schedule.due, schedule.left, schedule.message.body) == (planned.due, planned.left, planned.body)


def test_what_is_scheduled_comes_once_and_in_time() -> None:
    seconds = float(os.environ.get("PYBROKER_SOAK", "0"))
    examples = 150 if not seconds else int(seconds * 30)
    run_state_machine_as_test(
        ScheduleMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=bool(os.environ.get("CI")),
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
