"""A state machine of consumers of several queues, beside others, over crashes and restarts.

Its model knows no order, that is `machine.py`'s part: what was sent is delivered to nobody twice at a time, only to who asked for
its queue, and is there in the end unless it was acknowledged. That nobody waits for what is there is said by the invariants.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pybroker.config import DeliveryPolicy, Limits, PolicyEntry
from pybroker.consumer_options import ConsumerOptions
from pybroker.core.consumer import ACK_MODES, AUTO, INDIVIDUAL, Connection, Consumer
from pybroker.core.entry import SENT, Entry
from pybroker.core.invariants import check_invariants
from pybroker.destination import matches
from pybroker.errors import LimitExceeded
from pybroker.message import Message
from tests.core.driver import Driver
from tests.core.test_model import SETTINGS

LIMITS = Limits(
    prefetch_bytes_max=60,
    window_bytes_max=90,
    transactions_max=2,
    transaction_messages_max=4,
    subscriptions_max=4,
)
DELIVERY = DeliveryPolicy(deliveries_max=2, dead_letter_queue="/queue/DLQ")
QUEUES = ("a", "b", "p.x", "p.y", "DLQ")
WANTED = {  # subscriptions, and the names of the queues that each is for
    "/queue/a": ("a",),
    "/queue/DLQ": ("DLQ",),
    "/queue/p.*": ("p.*",),
    "/queue/>": ("*", "p.*"),
    "/queue/a,/queue/b": ("a", "b"),
    "/queue/a,p.>,DLQ": ("a", "p.*", "DLQ"),
    "/queue/*,/queue/a": ("*",),
}
index = st.integers(0, 9)


class WildcardMachine(RuleBasedStateMachine):
    """`must`: bodies that are there; `may`: those that are there or not."""

    @initialize(window=st.sampled_from((1, 2, 4)), dead=st.booleans(), delay=st.sampled_from((0, 0, 0.05)))
    def first(self, window: int, dead: bool, delay: float) -> None:
        values: dict[str, Any] = {"dead_letter_expired": dead}
        if delay:
            values |= {"redelivery_delay": delay, "redelivery_waiting_max": 2}
        self.driver = Driver(
            replace(LIMITS, window_messages_max=window),
            DELIVERY,
            self,  # type: ignore[arg-type]
            policies=(PolicyEntry("/queue/>", values),) if dead or delay else (),
        )
        self.must: set[bytes] = set()
        self.may: set[bytes] = set()
        self.unsettled: set[bytes] = set()  # sent or acknowledged since the broker was last at rest
        self.transient: set[bytes] = set()
        self.holders: dict[bytes, tuple[Consumer, Entry]] = {}
        self.wanted: dict[Consumer, str] = {}
        self.pending: dict[tuple[Connection, str], set[bytes]] = {}
        self.number = 0

    # ---- what the driver tells

    def shown(self, consumer: Consumer, entry: Entry) -> None:
        body = entry.message.body
        client = consumer.head or consumer
        held = self.holders.get(body)
        assert held is None or held[1].state != SENT or held[1] is entry, (body, "with two at a time")
        assert body in self.must | self.may, (body, "acknowledged before")
        assert all(body not in bodies for bodies in self.pending.values()), (body, "settled in a transaction")
        name = entry.queue.name
        patterns = WANTED[self.wanted[client]]
        assert any(matches(tuple(each.split(".")), tuple(name.split("."))) for each in patterns), name
        assert name != "DLQ" or "DLQ" in patterns, "dead letters to who did not ask for them"
        self.holders[body] = client, entry

    def confirmed(self, token: Any) -> None: ...

    def closing(self, consumer: Consumer, error: Exception) -> None:
        raise AssertionError(error)

    def sealed(self) -> None: ...

    def written(self, snapshot: Any) -> None: ...

    # ---- helpers

    def done(self) -> None:
        self.driver.end_turn()
        check_invariants(self.driver.core)
        for consumer in self.wanted:
            assert len(consumer.unacked) == len({(each.queue, each.order) for each in consumer.unacked.values()})

    def pick(self, items: Any, number: int) -> Any:
        listed = list(items)
        return listed[number % len(listed)]

    def connection(self, number: int) -> Connection:
        connections = list(self.driver.core.connections)
        return connections[number] if number < len(connections) else self.driver.connect()

    def visible(self) -> list[tuple[Consumer, int]]:
        return [
            (consumer, tag)
            for consumer in self.wanted
            if consumer.ack_mode != AUTO
            for tag, entry in consumer.unacked.items()
            if entry.state == SENT
        ]

    def bodies(self, consumer: Consumer, tag: int) -> set[bytes]:
        """What one settlement is for."""
        entries = self.driver.core.up_to(consumer, consumer.unacked[tag])
        return {entry.message.body for entry in entries}

    def acknowledged(self, bodies: set[bytes]) -> None:
        self.must -= bodies
        self.unsettled |= bodies

    # ---- clients

    @rule(
        name=st.sampled_from(QUEUES),
        durable=st.booleans(),
        priority=st.sampled_from((4, 4, 7)),
        block=st.sampled_from((b"", b"s:1\n", b"JMSXGroupID:g\n")),
        expires=st.sampled_from((0, 0, 0, 40)),
        size=st.sampled_from((1, 1, 30)),
    )
    def send(self, name: str, durable: bool, priority: int, block: bytes, expires: int, size: int) -> None:
        self.number += 1
        body = b"%d " % self.number + b"x" * size
        core = self.driver.begin_turn()
        (self.may if expires else self.must).add(body)
        if durable:
            self.unsettled.add(body)
        else:
            self.transient.add(body)
        core.send(Message(f"/queue/{name}", body, block, durable, priority, core.now + expires if expires else 0))
        self.done()

    @rule(
        number=st.integers(0, 2),
        destination=st.sampled_from(sorted(WANTED)),
        mode=st.sampled_from(ACK_MODES),
        prefetch=st.integers(1, 3),
        selector=st.sampled_from(("", "", "s = '1'")),
        exclusive=st.sampled_from((False, False, True)),
        priority=st.sampled_from((0, 0, 5)),
    )
    def subscribe(
        self, number: int, destination: str, mode: str, prefetch: int, selector: str, exclusive: bool, priority: int
    ) -> None:
        connection = self.connection(number)
        core = self.driver.begin_turn()
        options = ConsumerOptions(selector, exclusive, priority)
        try:
            consumer = core.subscribe(connection, destination, mode, prefetch=prefetch, options=options)
        except LimitExceeded:
            assert len(connection.consumers) == LIMITS.subscriptions_max
        else:
            self.wanted[consumer] = destination
            core.start(consumer)
        self.done()

    @precondition(lambda self: self.visible())
    @rule(number=index, ranges=st.booleans(), transaction=st.sampled_from(("", "", "t")), accept=st.booleans())
    def settle(self, number: int, ranges: bool, transaction: str, accept: bool) -> None:
        consumer, tag = self.pick(self.visible(), number)
        core = self.driver.begin_turn()
        bodies = self.bodies(consumer, tag)
        if transaction:
            key = consumer.connection, transaction
            if key not in self.pending:
                core.begin(*key)
                self.pending[key] = set()
            try:
                (core.acknowledge if accept else core.reject)(consumer, tag, transaction)
                self.pending[key] |= bodies
            except LimitExceeded:
                pass
        else:
            if accept:
                self.acknowledged(bodies)
            if ranges:
                (core.acknowledge_ranges if accept else core.reject_ranges)(consumer, [(tag, tag)])
            else:
                (core.acknowledge if accept else core.reject)(consumer, tag)
        self.done()

    @precondition(lambda self: self.pending)
    @rule(number=index, commit=st.booleans())
    def end_transaction(self, number: int, commit: bool) -> None:
        key = self.pick(self.pending, number)
        core = self.driver.begin_turn()
        acknowledged = {entry.message.body for entry, done in key[0].transactions[key[1]].settled if done}
        del self.pending[key]
        if commit:
            self.acknowledged(acknowledged)
            core.commit(*key)
        else:
            core.abort(*key)
        self.done()

    @rule()
    def take(self) -> None:
        core = self.driver.begin_turn()
        for consumer in self.wanted:
            if consumer.ack_mode == AUTO:
                entries = [entry for entry in consumer.unacked.values() if entry.state == SENT]
                self.acknowledged({entry.message.body for entry in entries})
                core.taken(entries)
        self.done()

    @precondition(lambda self: self.wanted)
    @rule(number=index, pause=st.booleans())
    def pause(self, number: int, pause: bool) -> None:
        core = self.driver.begin_turn()
        (core.pause if pause else core.resume)(self.pick(self.wanted, number).connection)
        self.done()

    @precondition(lambda self: self.wanted)
    @rule(number=index, prefetch=st.integers(0, 4))
    def set_prefetch(self, number: int, prefetch: int) -> None:
        self.driver.begin_turn().set_prefetch(self.pick(self.wanted, number), prefetch)
        self.done()

    @precondition(lambda self: self.wanted)
    @rule(number=index)
    def unsubscribe(self, number: int) -> None:
        consumer = self.pick(self.wanted, number)
        core = self.driver.begin_turn()
        core.unsubscribe(consumer)
        self.done()
        del self.wanted[consumer]

    @precondition(lambda self: self.wanted)
    @rule(number=index)
    def disconnect(self, number: int) -> None:
        connection = self.pick(self.wanted, number).connection
        self.pending = {key: bodies for key, bodies in self.pending.items() if key[0] is not connection}
        self.driver.begin_turn().disconnect(connection)
        self.done()
        self.wanted = {each: text for each, text in self.wanted.items() if each.connection is not connection}

    # ---- the run time

    @rule(commits=st.integers(0, 4), reads=st.integers(0, 3))
    def steps(self, commits: int, reads: int) -> None:
        for _ in range(commits):
            self.driver.step_commit()
        for _ in range(reads):
            self.driver.step_read()
        self.done()

    @rule(milliseconds=st.sampled_from((1, 50, 3_000)))
    def wait(self, milliseconds: int) -> None:
        self.driver.wait(milliseconds)
        self.done()

    @rule()
    def rest(self) -> None:
        self.driver.settle()
        self.unsettled.clear()
        self.done()

    @rule(crash=st.booleans())
    def end_life(self, crash: bool) -> None:
        if not crash:
            self.pending.clear()
            self.driver.restart()
            self.unsettled.clear()
        else:
            self.driver.crash()
        self.may |= self.unsettled
        self.must -= self.unsettled | self.transient
        self.may -= self.transient
        self.unsettled.clear()
        self.holders.clear()
        self.wanted.clear()
        self.pending.clear()

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        core = self.driver.begin_turn()
        self.pending.clear()
        for connection in list(core.connections):
            core.disconnect(connection)
        self.done()
        self.driver.settle()
        self.driver.wait(10_000)
        self.wanted.clear()
        self.driver.limits = replace(LIMITS, prefetch_bytes_max=1_000_000)
        core.limits = self.driver.limits
        core = self.driver.begin_turn()
        everything = core.subscribe(self.driver.connect(), "/queue/a,p.>,DLQ", INDIVIDUAL, prefetch=1_000)
        others = core.subscribe(self.driver.connect(), "/queue/*,/queue/a", INDIVIDUAL, prefetch=1_000)
        self.wanted = {everything: "/queue/a,p.>,DLQ", others: "/queue/*,/queue/a"}
        core.start(everything)
        core.start(others)
        self.done()
        self.driver.settle()
        self.done()
        found = [entry.message.body for each in self.wanted for entry in each.unacked.values()]
        assert len(found) == len(set(found)), found
        assert self.must <= set(found), self.must - set(found)
        assert set(found) <= self.must | self.may, set(found) - self.must - self.may


def run(programs: int) -> None:
    run_state_machine_as_test(
        WildcardMachine, settings=settings(SETTINGS, max_examples=programs, stateful_step_count=40)
    )


def test_nothing_is_lost_between_several_queues() -> None:
    run(25)


@pytest.mark.slow
def test_nothing_is_lost_between_several_queues_in_many_programs() -> None:
    run(200)
