"""The rules of the state machine that drives the core and its store against the model; `test_model` runs it.

Every random choice is an index into a list of what there is at that time, so that a failing run shrinks well.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pybroker.config import DeliveryPolicy, Limits, PolicyEntry
from pybroker.consumer_options import ConsumerOptions
from pybroker.core import broker as broker_module
from pybroker.core import queue as queue_module
from pybroker.core import retiring as retiring_module
from pybroker.core.consumer import ACK_MODES, AUTO, CUMULATIVE, INDIVIDUAL, Connection, Consumer
from pybroker.errors import LimitExceeded, SubscriptionError
from pybroker.message import Message
from pybroker.store import format as fmt
from pybroker.store.store import Store
from tests.core.driver import Driver, observing
from tests.core.model import DELAY_MAX_MS, SELECTORS, Copy, Key, Member, Model, Pending, Sent
from tests.core.promises import check_memory, check_nobody_starves, check_store, leftovers

LIMITS = Limits(
    window_messages_max=4,
    window_bytes_max=90,
    prefetch_bytes_max=60,
    memory_bytes_max=6_000,
    backlog_messages_max=10,
    transaction_messages_max=4,
    transactions_max=2,
    subscriptions_max=5,
)
DELIVERY = DeliveryPolicy(deliveries_max=2, dead_letter_queue="/queue/DLQ")
QUEUES = ("/queue/a", "/queue/b", "/queue/DLQ")
TOPICS = ("/topic/t.x", "/topic/t.y", "/topic/t.x.z")
FOCUS = (("/queue/a",), ("/topic/t.x",), ("/queue/a", "/queue/DLQ"), ("/queue/a", *TOPICS), QUEUES + TOPICS)
PATTERNS = ("/topic/t.x", "/topic/t.*", "/topic/t.>", "/topic/>", "/topic/*.x.z")
OWNERS = (("one", "first"), ("one", "second"), ("two", "first"))
index = st.integers(0, 9)
selectors = st.sampled_from(["", "", *SELECTORS])


def pick(items: Any, number: int) -> Any:
    listed = list(items)
    return listed[number % len(listed)]


def watched_closely() -> ExitStack:
    """Patches that are in force until they are closed: queues are observed, and what is rare in a core is common."""
    patches = ExitStack()
    for each in observing():
        patches.enter_context(each)
    # What happens once in thousands of messages must happen here, too.
    patches.enter_context(patch.object(queue_module, "HEAD_EVERY", 2))
    patches.enter_context(patch.object(retiring_module, "DUE_ROWS_MAX", 2))
    patches.enter_context(patch.object(broker_module, "ROUTES_MAX", 2))
    return patches


class CoreMachine(RuleBasedStateMachine):
    """See the first lines of the file; the promises are checked in `Model`, `_check` and `teardown`."""

    blocks: tuple[bytes, ...] = (b"", b"k:v\n")

    def __init__(self) -> None:
        super().__init__()
        self.patches = watched_closely()
        self.model = Model(DELIVERY.deliveries_max, LIMITS.prefetch_bytes_max)
        self.driver: Driver  # made by `first`
        self.connections: list[Connection] = []
        self.long_turn = False
        self.focus: tuple[str, ...] = QUEUES
        self.lasting: tuple[int, ...] = (0,)

    # ---- helpers

    @property
    def about_topics(self) -> bool:
        return any(destination.startswith("/topic/") for destination in self.focus)

    @property
    def core(self) -> Any:
        return self.driver.begin_turn()

    def done(self) -> None:
        """A call on the core has returned."""
        self.model.end_call()
        if not self.long_turn:
            self.end_the_turn()
        self._check()

    def end_the_turn(self) -> None:
        self.long_turn = False
        self.driver.end_turn()
        self.model.end_call()

    def between_turns(self) -> None:
        if self.long_turn:
            self.end_the_turn()

    def connection(self, number: int) -> Connection:
        if len(self.connections) < 3 and number % 3 >= len(self.connections):
            self.connections.append(self.driver.connect())
        return pick(self.connections, number)  # type: ignore[no-any-return]

    def deliveries(self) -> list[tuple[Consumer, Copy]]:
        """What clients could acknowledge."""
        return [
            (consumer, copy)
            for consumer, member in self.model.members.items()
            if member.mode != AUTO
            for copy in self.model.visible_to(consumer)
        ]

    # ---- rules: clients

    @initialize(
        focus=st.sampled_from(FOCUS),
        expiring=st.booleans(),
        window=st.sampled_from((1, 4, 4, 8)),
        delay=st.sampled_from((0, 0, 50)),
        waiting_max=st.integers(1, 3),
    )
    def first(self, focus: tuple[str, ...], expiring: bool, window: int, delay: int, waiting_max: int) -> None:
        """A run about few destinations gets further than one about all."""
        self.limits = replace(LIMITS, window_messages_max=window)
        self._open(delay, waiting_max)
        self.focus = focus
        self.lasting = (0, 50, 1_500) if expiring else (0,)

    def _open(self, delay: int, waiting_max: int) -> None:
        policies: tuple[PolicyEntry, ...] = ()
        if delay:
            values = {
                "redelivery_delay": delay / 1_000,
                "redelivery_backoff": 2.0,
                "redelivery_waiting_max": waiting_max,
                "redelivery_delay_max": DELAY_MAX_MS / 1_000,
            }
            policies = tuple(PolicyEntry(match, values) for match in ("/queue/>", "/topic/>"))
            self.model.delay, self.model.waiting_max = delay, waiting_max
            self.limits = replace(self.limits, window_bytes_max=1_000)
        self.driver = Driver(self.limits, DELIVERY, self.model, policies=policies)
        self.model.driver = self.driver

    @rule(
        to=index,
        count=st.integers(1, 6),
        size=st.sampled_from((0, 0, 10, 70)),
        durable=st.booleans(),
        priority=st.sampled_from((4, 4, 4, 0, 9)),
        lasts=index,
        block=index,
        receipt=st.booleans(),
    )
    def send(
        self, to: int, count: int, size: int, durable: bool, priority: int, lasts: int, block: int, receipt: bool
    ) -> None:
        for number in range(count):
            message = self._make(to, size, durable, priority, lasts, pick(self.blocks, block + number))
            if self.core.full(message[1]) is not None:
                break
            self.model.expect(message[0])
            self.core.send(message[1])
            self.model.end_call()
            if receipt:
                self.core.confirm((None, (message[0].number, self.driver.turn)))
        self.done()

    def _make(self, to: int, size: int, durable: bool, priority: int, lasts: int, block: bytes) -> tuple[Sent, Message]:
        ends = pick(self.lasting, lasts)
        expires = self.driver.now + ends if ends else 0
        return self.model.make(pick(self.focus, to), size, durable, priority, expires, block)

    @rule(
        number=index,
        to=index,
        mode=st.sampled_from(ACK_MODES),
        prefetch=st.integers(1, 3),
        start=st.booleans(),
        selector=selectors,
    )
    @precondition(lambda self: len(self.model.members) < 5)
    def subscribe(self, number: int, to: int, mode: str, prefetch: int, start: bool, selector: str) -> None:
        destination = pick(self.focus, to)
        if destination.startswith("/topic/"):
            destination = pick(PATTERNS, to)
        else:
            selector = ""
        self._subscribe(self.connection(number), destination, mode, prefetch, start, selector=selector)

    @rule(
        number=index,
        owner=st.sampled_from(OWNERS),
        pattern=st.sampled_from(PATTERNS),
        mode=st.sampled_from(ACK_MODES),
        prefetch=st.integers(1, 3),
        selector=selectors,
    )
    @precondition(lambda self: self.about_topics and len(self.model.members) < 5)
    def subscribe_durably(
        self, number: int, owner: tuple[str, str], pattern: str, mode: str, prefetch: int, selector: str
    ) -> None:
        known = self.model.patterns.get(owner)
        if known is not None:
            pattern, asked = "/topic/" + known[0], selector
            selector = known[1]
            if asked != selector:  # what it has collected fits the one that it has
                asking = partial(
                    self.core.subscribe, self.connection(number), pattern, mode, options=ConsumerOptions(asked)
                )
                with pytest.raises((SubscriptionError, LimitExceeded)):
                    asking(client_id=owner[0], durable_name=owner[1])
        self._subscribe(self.connection(number), pattern, mode, prefetch, True, owner, selector)

    def _subscribe(
        self,
        connection: Connection,
        to: str,
        mode: str,
        prefetch: int,
        start: bool,
        owner: tuple[str, str] | None = None,
        selector: str = "",
        exclusive: bool = False,
        priority: int = 0,
    ) -> None:
        core = self.core
        options = ConsumerOptions(selector, exclusive, priority)
        durable = {} if owner is None else {"client_id": owner[0], "durable_name": owner[1]}
        taken = owner and any(m.key == ("subscription", *owner) for m in self.model.members.values())
        try:
            consumer = core.subscribe(connection, to, mode, prefetch=prefetch, options=options, **durable)
        except SubscriptionError:
            assert taken
            return
        except LimitExceeded:
            assert sum(m.connection is connection for m in self.model.members.values()) >= self.limits.subscriptions_max
            return
        assert not taken
        if owner is not None:
            self.model.patterns.setdefault(owner, (to[len("/topic/") :], selector))
        key = self.model.key_of(consumer.queue)
        member = self.model.members[consumer] = Member(key, mode, prefetch, connection, selector, exclusive, priority)
        if start:
            member.started = True
            core.start(consumer)
        self.done()

    @rule(number=index, count=st.integers(1, 3))
    @precondition(lambda self: self.deliveries())
    def acknowledge(self, number: int, count: int) -> None:
        for _ in range(count):
            if self.deliveries():
                consumer, copy = pick(self.deliveries(), number)
                self.model.acknowledge(consumer, self.model.settled_by(consumer, copy))
                self.core.acknowledge(consumer, copy.tag)
                self.model.end_call()
        self.done()

    @rule(number=index)
    @precondition(lambda self: self.deliveries())
    def reject(self, number: int) -> None:
        consumer, copy = pick(self.deliveries(), number)
        for each in self.model.settled_by(consumer, copy):
            self.model.give_back(self.model.members[consumer].key, each)
        self.core.reject(consumer, copy.tag)
        self.done()

    @rule(number=index, count=st.integers(1, 4))
    @precondition(lambda self: any(self.model.outboxes.values()))
    def take(self, number: int, count: int) -> None:
        outbox = pick((one for one in self.model.outboxes.values() if one), number)
        taken, outbox[:count] = outbox[:count], []
        self.model.take(taken)
        self.core.taken([one.entry for one in taken])
        self.done()

    @rule(number=index)
    @precondition(lambda self: self.connections)
    def pause_or_resume(self, number: int) -> None:
        connection = self.connection(number)
        if connection.paused:
            for member in self.model.members.values():
                member.started = member.started or member.connection is connection
            self.core.resume(connection)
        else:
            self.core.pause(connection)
        self.done()

    @rule(number=index)
    @precondition(lambda self: self.model.members)
    def unsubscribe(self, number: int) -> None:
        consumer = pick(self.model.members, number)
        self.model.leave(consumer)
        self.core.unsubscribe(consumer)
        self.done()

    @rule(number=index, owner=st.sampled_from(OWNERS), away=st.booleans())
    def disconnect_or_remove(self, number: int, owner: tuple[str, str], away: bool) -> None:
        if away and self.connections:
            self._disconnect(number)
            return
        busy = any(member.key == ("subscription", *owner) for member in self.model.members.values())
        if owner in self.model.patterns and not busy:
            self.model.remove_subscription(owner)
            self.core.remove_subscription(*owner)
            self.done()

    def _disconnect(self, number: int) -> None:
        connection = self.connections.pop(number % len(self.connections))
        core = self.core
        for owner in [owner for owner in self.model.pending if owner[0] is connection]:
            self._give_back(owner, one_by_one=True, leaves=True)
        for consumer, member in list(self.model.members.items()):
            if member.connection is connection:
                self.model.leave(consumer, one_by_one=True)
        self.model.outboxes.pop(connection, None)
        core.disconnect(connection)
        self.done()

    # ---- rules: transactions

    def _begin(self, connection: Connection, name: str) -> Pending:
        if (connection, name) not in self.model.pending:
            self.core.begin(connection, name)
            self.model.pending[connection, name] = Pending()
        return self.model.pending[connection, name]

    @rule(
        number=index,
        name=st.sampled_from(("x", "y")),
        to=index,
        durable=st.booleans(),
        priority=st.sampled_from((4, 4, 0, 9)),
        lasts=index,
    )
    def send_later(self, number: int, name: str, to: int, durable: bool, priority: int, lasts: int) -> None:
        connection = self.connection(number)
        pending = self._begin(connection, name)
        sent, message = self._make(to, 0, durable, priority, lasts, b"")
        full = len(pending.sent) + len(pending.settled) >= self.limits.transaction_messages_max
        try:
            self.core.send_later(connection, message, name)
        except LimitExceeded:
            assert full
        else:
            assert not full
            pending.sent.append(sent)
        self.done()

    @rule(number=index, name=st.sampled_from(("x", "y")), done=st.booleans())
    @precondition(lambda self: self.deliveries())
    def settle_later(self, number: int, name: str, done: bool) -> None:
        consumer, copy = pick(self.deliveries(), number)
        pending = self._begin(consumer.connection, name)
        copies = self.model.settled_by(consumer, copy)
        count = len(pending.sent) + len(pending.settled) + len(copies)
        full = count > self.limits.transaction_messages_max
        if not full:
            for each in copies:
                each.transaction, each.done = name, done
            pending.settled += copies
        act = self.core.acknowledge if done else self.core.reject
        try:
            act(consumer, copy.tag, name)
        except LimitExceeded:
            assert full
        else:
            assert not full
        self.done()

    @rule(number=index)
    @precondition(lambda self: self.model.pending)
    def commit(self, number: int) -> None:
        owner = pick(self.model.pending, number)
        pending = self.model.pending.pop(owner)
        for sent in pending.sent:
            self.model.expect(sent)
        for key, copy in self._settled(pending):
            if copy.done:
                self.model.forget(key, copy)
            else:
                self.model.give_back(key, copy, one_by_one=True)
        self.core.commit(*owner)
        self.done()

    @rule(number=index)
    @precondition(lambda self: self.model.pending)
    def abort(self, number: int) -> None:
        owner = pick(self.model.pending, number)
        self._give_back(owner)
        self.core.abort(*owner)
        self.done()

    def _give_back(self, owner: tuple[Connection, str], one_by_one: bool = False, leaves: bool = False) -> None:
        for key, copy in self._settled(self.model.pending.pop(owner)):
            self.model.give_back(key, copy, one_by_one, leaves)

    def _settled(self, pending: Pending) -> list[tuple[Key, Copy]]:
        """What a transaction settled and is still in a queue."""
        return [
            (key, copy)
            for copy in pending.settled
            for key, copies in self.model.queues.items()
            if copies.get(copy.order) is copy
        ]

    # ---- rules: the run time

    @rule()
    def begin_or_end_long_turn(self) -> None:
        """Calls of one turn are made without anything between them."""
        if self.long_turn:
            self.end_the_turn()
            self._check()
        self.long_turn = not self.long_turn

    @rule(count=st.integers(1, 5))
    def step_commit(self, count: int) -> None:
        self.between_turns()
        for _ in range(count):
            before = self.model.durable
            if not self.driver.step_commit():
                break
            if self.model.durable is not before:
                self._check_store()
        self._check()

    @rule(count=st.integers(1, 3))
    @precondition(lambda self: self.driver.reads)
    def step_read(self, count: int) -> None:
        self.between_turns()
        for _ in range(count):
            if not self.driver.step_read():
                break
            self.model.end_call()
        self._check()

    @rule(milliseconds=st.sampled_from((10, 60, 1_600)), sweep=st.booleans())
    def pass_time(self, milliseconds: int, sweep: bool) -> None:
        self.between_turns()
        self.driver.wait(milliseconds)
        self.model.end_call()
        if sweep:
            self.core.sweep()
            self.done()

    @rule(number=index, broker=st.booleans())
    @precondition(lambda self: self.driver.core.queues)
    def shrink(self, number: int, broker: bool) -> None:
        """What a broker does whose memory is full, to all or to any of its queues."""
        if broker:
            self.core.shrink()
        else:
            pick(self.core.queues.values(), number).shrink(1, 0)
        self.done()

    @rule(sweep=st.booleans())
    def settle(self, sweep: bool) -> None:
        self.between_turns()
        self._come_to_rest()
        check_nobody_starves(self.driver, self.model)
        if sweep:
            self.core.sweep()
            self.done()
            self._come_to_rest()
            for queue in self.driver.core.queues.values():
                if queue.kind == "deleted":
                    continue
                copies = self.model.queues.get(self.model.key_of(queue), {}).values()
                left = [copy for copy in copies if not (copy.ready and self.model.expired(copy))]
                assert queue.depth == len(left), (queue, left)

    @rule(clean=st.booleans())
    def crash_or_restart(self, clean: bool) -> None:
        if clean:
            self.between_turns()
            while self.connections:
                self._disconnect(0)
            self._come_to_rest()
        self.long_turn = False
        self.connections.clear()
        self.model.forget_the_unwritten()
        report = self.driver.verify()
        assert report.ok, report.problems
        self.driver.crash()
        self._check()

    def _come_to_rest(self) -> None:
        for _ in range(10_000):
            if not self.driver.step_commit() and not self.driver.step_read():
                break
            self.model.end_call()
        else:
            raise AssertionError("the broker doesn't come to rest")
        self._check_store()
        self._check()

    # ---- what must hold

    def _check(self) -> None:
        check_memory(self.driver, self.model)

    def _check_store(self) -> None:
        check_store(self.driver, self.model)

    def teardown(self) -> None:
        try:
            if hasattr(self, "driver"):
                self._drain()
        finally:
            self.patches.close()

    def _drain(self) -> None:
        """Consume everything; then nothing may be left anywhere."""
        self.between_turns()
        model = self.model
        while self.connections:
            self._disconnect(0)
        self._come_to_rest()
        connection = self.driver.connect()
        self.connections.append(connection)
        for to in QUEUES:
            self._subscribe(connection, to, INDIVIDUAL, 3, True)
        for _ in range(2):  # before and after what expires has expired
            for owner, (pattern, selector) in model.patterns.items():
                if not any(member.key == ("subscription", *owner) for member in model.members.values()):
                    self._subscribe(self.driver.connect(), "/topic/" + pattern, CUMULATIVE, 2, True, owner, selector)
            self._come_to_rest()
            while deliveries := self.deliveries():
                consumer, copy = deliveries[-1]
                model.acknowledge(consumer, model.settled_by(consumer, copy))
                self.core.acknowledge(consumer, copy.tag)
                self.done()
                self._come_to_rest()
            self.driver.now += 10_000
            self.core.sweep()
            self.done()
            self._come_to_rest()
        left = [copy for copies in model.queues.values() for copy in copies.values() if not model.expired(copy)]
        assert not left, f"never came out: {left}"
        core = self.driver.core
        for queue in core.queues.values():
            assert queue.depth == 0, queue
        sums = (
            core.memory_bytes,
            core.stored_bytes,
            core.spooled_bytes,
            core.spooled,
            len(core.expiries),
            len(core.shared),
        )
        assert sums == (0, 0, 0, 0, 0, 0), sums
        assert not leftovers(self.driver.store), leftovers(self.driver.store)
        if self.driver.spool_store is not None:
            assert not leftovers(self.driver.spool_store, {fmt.QUEUE}), leftovers(self.driver.spool_store)
        kinds = {record.kind for record in Store(self.driver.backend, "", 0).records}
        assert "deleted" not in kinds, kinds
