"""The rules of the state machine that drives the core and its store against `copies_model`; `test_copies_model` runs it.

A run has few destinations to send to, so that what meets there meets often.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pybroker.config import DeliveryPolicy, Limits
from pybroker.consumer_options import ConsumerOptions
from pybroker.core import routing as routing_module
from pybroker.core.consumer import INDIVIDUAL, Connection, Consumer
from pybroker.core.invariants import check_invariants
from pybroker.destination import TEMPORARY_QUEUE
from pybroker.message import Message
from pybroker.settings import make_config
from tests.core import copies_model
from tests.core.copies_model import DLQ, DROPPING, FILTERS, RULES, SECRET, TEMPORARY, CopiesModel, Copy, Pending, Sent
from tests.core.driver import Driver
from tests.core.machine import watched_closely
from tests.core.promises import leftovers, stored_messages

QUEUES = (
    "/queue/a",
    "/queue/small",
    DROPPING,
    "/queue/m",
    "/queue/b",
    DLQ,
    "/queue/Consumer.x.VirtualTopic.v",
    "/queue/Consumer.y.VirtualTopic.v",
    "/queue/Consumer.x.VirtualTopic.Mirror.m",
)
SUBSCRIPTIONS = (("one", "/topic/VirtualTopic.>"), ("two", "/topic/t"), ("three", "/topic/VirtualTopic.v"))
COLLECTING = tuple(name for name in QUEUES if name.startswith("/queue/Consumer."))
FILTERS_OF = ("", "s = '1'", "s IS NULL")  # of the durable subscriptions that are there from the beginning
FOCUS = (
    ("/queue/c", "/queue/a,/topic/VirtualTopic.v", "/topic/VirtualTopic.v"),
    ("/queue/f", "/queue/small,drop", DROPPING),
    ("/topic/t", "/queue/m", "/queue/m,c"),
    ("/queue/a", "/queue/small,/topic/t", DLQ),
    ("/queue/Consumer.x.VirtualTopic.v,/topic/VirtualTopic.v", "/topic/VirtualTopic.v", "/queue/r1,b"),
    (DROPPING, "/queue/drop,a", "/queue/f"),
    (f"/queue/a,{TEMPORARY}", f"/queue/c,{TEMPORARY}", f"/topic/t,{TEMPORARY},/queue/small"),
)
index = st.integers(0, 9)
SENDING = {
    "to": index,
    "s": st.sampled_from(("", "1", "2")),
    "durable": st.sampled_from((True, True, False)),
    "priority": st.sampled_from((4, 4, 4, 9)),
    "lasts": st.sampled_from((0, 0, 0, 50, 1_500, -1)),
    "key": st.sampled_from(("", "k", "k", "l")),
    "delay": st.sampled_from((0, 0, 40, 600)),
}
messages = st.lists(st.fixed_dictionaries(SENDING), min_size=1, max_size=4)


def policies() -> tuple[dict[str, Any], ...]:
    """The model's limits as a configuration."""
    values: dict[str, dict[str, Any]] = {DROPPING: {"full_policy": "drop_oldest"}}
    for name, limit in copies_model.MESSAGES_MAX.items():
        values.setdefault(name, {})["messages_max"] = limit
    for name, limit in copies_model.BYTES_MAX.items():
        values.setdefault(name, {}).update(bytes_max=limit, message_key_window=0)
    for name in copies_model.EXPIRED_ARE_DEAD_LETTERS:
        values.setdefault(name, {})["dead_letter_expired"] = True
    for kind in ("queue", "topic"):
        values[f"/{kind}/>"] = {"message_key_window": copies_model.KEY_WINDOW_MS / 1_000}
    return tuple({"match": name, **each} for name, each in values.items())


CONFIG = make_config(
    policy=policies(),
    routing={"mirrored_queues": list(copies_model.MIRRORS)},
    composite=tuple(
        {"name": each.name, "forward_to": each.forward_to, "forward_only": each.forward_only, "filter": each.filter}
        for each in RULES
    ),
)


def pick(items: Any, number: int) -> Any:
    listed = list(items)
    return listed[number % len(listed)]


class CopiesMachine(RuleBasedStateMachine):
    """The promises are checked in `CopiesModel`, `_check`, `rest` and `teardown`."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = watched_closely()
        self.patches.enter_context(patch.object(routing_module, "PLACES_MAX", 3))
        self.model = CopiesModel()
        self.connections: list[Connection] = []
        self.drops = 0  # of this life, as far as they were seen

    @initialize(
        focus=st.sampled_from(FOCUS),
        window=st.sampled_from((2, 4, 8)),
        collecting=st.lists(st.sampled_from(COLLECTING), unique=True),
        subscribed=st.lists(st.sampled_from((0, 1, 2)), unique=True),
        expiring=st.booleans(),
        scheduling=st.booleans(),
        keyed=st.sampled_from((False, True, True)),
    )
    def first(
        self,
        focus: tuple[str, ...],
        window: int,
        collecting: list[str],
        subscribed: list[int],
        expiring: bool,
        scheduling: bool,
        keyed: bool,
    ) -> None:
        self.expiring = expiring
        self.scheduling = scheduling
        self.keyed = keyed
        limits = Limits(
            window_messages_max=window, window_bytes_max=120 if window < 8 else 1_000, transaction_messages_max=6
        )
        self.driver = Driver(
            limits,
            DeliveryPolicy(deliveries_max=0, dead_letter_queue=DLQ),
            self.model,
            policies=CONFIG.policy,
            routing=CONFIG.routing,
            composites=CONFIG.composite,
        )
        self.model.driver = self.driver
        self.focus = focus
        for place in collecting:
            self._subscribe(0, place, 1, "s = '1'")
        for which in subscribed:
            self.subscribe_durably(0, which, FILTERS_OF[which])
        if collecting or subscribed:
            self.disconnect(0)

    # ---- helpers

    @property
    def core(self) -> Any:
        return self.driver.begin_turn()

    def done(self) -> None:
        """A call on the core has returned."""
        self.model.end_call()
        self.driver.end_turn()
        core = self.driver.core
        check_invariants(core)
        expired = 0
        for queue in core.queues.values():
            if queue.kind != "deleted":
                place = copies_model.place_of(queue)
                copies = self.model.copies(place).values()
                count = len(copies)
                spare = sum(each.holder is None and self.model.expired(each) for each in copies)
                expired += spare
                spare += self.model.drops_max if place == DROPPING else 0
                assert count - spare <= queue.depth <= count, f"{queue}: {copies}"
        if expired:
            self.rest()

    def rest(self, counted: bool = True) -> None:
        """What has expired goes, everything is written and read; the store has what the model says."""
        self.core.sweep()
        self.driver.end_turn()
        self.driver.settle()
        left = -1
        while left != len(self.driver.core.schedules):
            left = len(self.driver.core.schedules)
            self._release()
            self.driver.settle()
        self.model.end_call()
        core = self.driver.core
        check_invariants(core)
        report = self.driver.verify()
        assert report.ok, report.problems
        queue = core.by_destination.get(DROPPING)
        found = {
            f"/queue/{key[1]}" if key[0] == "queue" else f"{key[1]}/{key[2]}": {
                order: row[0] for order, row in rows.items()
            }
            for key, rows in stored_messages(self.driver.store).items()
        }
        if queue is not None:
            memory = {entry.order for entry in [*queue.window, *queue.outstanding.values()]}
            spooled = set(self._spooled(queue))
            left = memory | spooled | found.get(DROPPING, {}).keys()
            dropped = self.model.dropped(left)
            assert not counted or dropped == queue.counts.dropped - self.drops, "not counted"
            self.drops = queue.counts.dropped
        self.model.at_rest()
        if self.scheduling:
            window = self.driver.limits.window_messages_max
            assert len(core.schedules) == self.model.schedules_at_rest(min(window, 3))
        for place, copies in self.model.state.places.items():
            stored = {order: each.sent.body for order, each in copies.items() if each.durable}
            assert found.get(place, {}) == stored, place
        for each in core.queues.values():
            assert each.depth == len(self.model.copies(copies_model.place_of(each))), each
        self._nobody_starves()
        self.model.stored = self.model.state.durable()

    def _release(self) -> None:
        """Send what is due, as the engine's alarm does."""
        more = True
        while more:
            more = self.core.release_due(2)
            self.driver.end_turn()

    def _spooled(self, queue: Any) -> list[int]:
        if self.driver.spool_store is None:
            return []
        page = self.driver.spool.read_page(queue.queue_id, 0, 1_000, 1 << 20)
        return [] if page is None else [entry.order for entry in page.entries]

    def _nobody_starves(self) -> None:
        for consumer, (place, selector, prefetch) in self.model.members.items():
            if len(self.model.held_by(consumer)) >= prefetch:
                continue
            admits = FILTERS[selector] if place in QUEUES else FILTERS[""]
            waiting = [each for each in self.model.copies(place).values() if each.holder is None and admits(each.block)]
            assert not waiting, (consumer, waiting)

    def connection(self, number: int) -> Connection:
        if len(self.connections) < 3 and number % 3 >= len(self.connections):
            self.connections.append(self.driver.connect())
        return pick(self.connections, number)  # type: ignore[no-any-return]

    def deliveries(self) -> list[tuple[Consumer, Copy]]:
        """What clients could settle."""
        return [(who, each) for who in self.model.members for each in self.model.held_by(who) if each.visible]

    def make(
        self, to: int, s: str, durable: bool, priority: int, lasts: int, key: str, delay: int
    ) -> tuple[Sent, Message]:
        destination = pick(self.focus, to)
        delay = delay if self.scheduling else 0
        expires = self.driver.now + lasts if lasts and self.expiring and not delay else 0
        key = key if self.keyed else ""
        durable = durable or "b" in destination.split(",")
        sent = self.model.make(
            destination, b"s:%b\n" % s.encode() if s else b"", durable, priority, expires, key, delay
        )
        terms = b"AMQ_SCHEDULED_DELAY:%d\n" % delay if delay else b""
        return sent, Message(destination, sent.body, terms + sent.block, durable, priority, expires)

    # ---- rules: producers

    @rule(sends=messages)
    def send(self, sends: list[dict[str, Any]]) -> None:
        for how in sends:
            sent, message = self.make(**how)
            error = self.core.full(message)
            assert (error is not None) == (self.model.full(sent) and not self.model.repeats(sent)), (error, sent)
            if error is not None:
                continue
            self.model.expect(sent)
            self.core.send(message)
            if sent.durable and self.model.state.keys.get((sent.destination, sent.key), (0, False))[1]:
                self.core.confirm((None, sent))
            self.done()

    @rule(number=index, sends=messages)
    def send_later(self, number: int, sends: list[dict[str, Any]]) -> None:
        connection = self.connection(number)
        for how in sends:
            pending = self._begin(connection)
            if len(pending.sent) + len(pending.settled) < self.driver.limits.transaction_messages_max:
                sent, message = self.make(**how)
                self.core.send_later(connection, message, "x")
                pending.sent.append(sent)
                self.done()

    # ---- rules: consumers

    @rule(number=index, place=index, prefetch=st.integers(1, 3), selector=st.sampled_from(("", *FILTERS)))
    @precondition(lambda self: len(self.model.members) < 4)
    def subscribe(self, number: int, place: int, prefetch: int, selector: str) -> None:
        self._subscribe(number, pick(QUEUES, place), prefetch, selector)

    def _subscribe(
        self, number: int, place: str, prefetch: int, selector: str, connection: Connection | None = None
    ) -> None:
        core = self.core
        connection = connection or self.connection(number)
        options = ConsumerOptions(selector=selector)
        consumer = core.subscribe(connection, place, INDIVIDUAL, prefetch=prefetch, options=options)
        if place.startswith("/queue/Consumer."):
            self.model.state.collecting.add(place)
        self.model.members[consumer] = (place, selector, prefetch)
        core.start(consumer)
        self.done()

    @rule(number=index, which=index, selector=st.sampled_from(("", *FILTERS)))
    @precondition(lambda self: len(self.model.members) < 4)
    def subscribe_durably(self, number: int, which: int, selector: str) -> None:
        name, pattern = pick(SUBSCRIPTIONS, which)
        place = f"client/{name}"
        if any(at == place for at, *_ in self.model.members.values()):
            return
        _, selector = self.model.state.subscriptions.setdefault(place, (pattern, selector))
        core = self.core
        consumer = core.subscribe(
            self.connection(number),
            pattern,
            INDIVIDUAL,
            prefetch=2,
            durable_name=name,
            client_id="client",
            options=ConsumerOptions(selector=selector),
        )
        self.model.members[consumer] = (place, "", 2)
        core.start(consumer)
        self.done()

    @rule(number=index, prefetch=st.integers(1, 3), consuming=st.booleans())
    @precondition(lambda self: self.model.owner is None and TEMPORARY in self.focus[0])
    def make_a_temporary_queue(self, number: int, prefetch: int, consuming: bool) -> None:
        """What was sent to it before is gone."""
        connection = self.connection(number)
        self.core.temporaries.create(connection, TEMPORARY_QUEUE, SECRET)
        self.model.owner = connection
        self.done()
        if consuming:
            self._subscribe(self.connections.index(connection), TEMPORARY, prefetch, "", connection)

    @rule(number=index)
    @precondition(lambda self: self.model.members)
    def unsubscribe(self, number: int) -> None:
        consumer = pick(self.model.members, number)
        core = self.core
        self.model.leave(consumer)
        core.unsubscribe(consumer)
        self.done()

    @rule(number=index)
    @precondition(lambda self: self.connections)
    def disconnect(self, number: int) -> None:
        connection = self.connections.pop(number % len(self.connections))
        core = self.core
        self.model.disconnect(connection)
        core.disconnect(connection)
        self.done()

    @rule(number=index, done=st.sampled_from((True, True, False)))
    @precondition(lambda self: self.deliveries())
    def settle(self, number: int, done: bool) -> None:
        consumer, each = pick(self.deliveries(), number)
        tag = next(tag for tag, entry in consumer.unacked.items() if entry.order == each.order)
        core = self.core
        if done:
            self.model.forget(self.model.members[consumer][0], each)
            core.acknowledge(consumer, tag)
        else:
            self.model.give_back(each)
            core.reject(consumer, tag)
        self.done()

    # ---- rules: transactions

    def _begin(self, connection: Connection) -> Pending:
        if (connection, "x") not in self.model.pending:
            self.core.begin(connection, "x")
            self.model.pending[connection, "x"] = Pending()
        return self.model.pending[connection, "x"]

    @rule(number=index, done=st.sampled_from((True, True, False)))
    @precondition(lambda self: self.deliveries())
    def settle_later(self, number: int, done: bool) -> None:
        consumer, each = pick(self.deliveries(), number)
        pending = self._begin(consumer.connection)
        if len(pending.sent) + len(pending.settled) >= self.driver.limits.transaction_messages_max:
            return
        tag = next(tag for tag, entry in consumer.unacked.items() if entry.order == each.order)
        each.settled = True
        pending.settled.append((self.model.members[consumer][0], each, done))
        (self.core.acknowledge if done else self.core.reject)(consumer, tag, "x")
        self.done()

    @rule(number=index)
    @precondition(lambda self: self.model.pending)
    def commit(self, number: int) -> None:
        owner = pick(self.model.pending, number)
        pending = self.model.pending.pop(owner)
        core = self.core
        self.model.make_queues([sent for sent in pending.sent if not sent.delay])
        for sent in pending.sent:
            self.model.expect(sent)
        for place, each, done in pending.settled:
            if done:
                self.model.forget(place, each)
            else:
                self.model.give_back(each)
        core.commit(*owner)
        self.done()

    @rule(number=index)
    @precondition(lambda self: self.model.pending)
    def abort(self, number: int) -> None:
        owner = pick(self.model.pending, number)
        core = self.core
        self._give_back(owner[0])
        core.abort(*owner)
        self.done()

    def _give_back(self, connection: Connection) -> None:
        pending = self.model.pending.pop((connection, "x"), Pending())
        for _, each, _ in pending.settled:
            self.model.give_back(each)

    # ---- rules: time, the disk, and the end of the process

    @rule(milliseconds=st.sampled_from((10, 50, 700, 3_000)), steps=st.integers(0, 5))
    def pass_time(self, milliseconds: int, steps: int) -> None:
        """The sweep may be under way when the process dies."""
        self.driver.now += milliseconds
        self.core.sweep()
        self.driver.end_turn()
        self._release()
        for _ in range(steps):
            self.driver.step_commit() or self.driver.step_read()
        if steps > 3:
            self._crash()
        self.rest()

    @rule(steps=st.integers(1, 6))
    def write(self, steps: int) -> None:
        for _ in range(steps):
            self.driver.step_commit() or self.driver.step_read()

    @rule(steps=st.integers(0, 3))
    def crash(self, steps: int) -> None:
        for _ in range(steps):
            self.driver.step_commit()
        self._crash()

    def _crash(self) -> None:
        self.model.crashed()
        self.connections.clear()
        self.driver.crash()
        self.rest(counted=False)  # some were dropped by the life before

    @rule()
    def restart(self) -> None:
        core = self.core
        for connection in self.connections:
            self.model.disconnect(connection)
        for connection in list(core.connections):
            core.disconnect(connection)
        self.driver.end_turn()
        self.rest()
        self._crash()

    def teardown(self) -> None:
        try:
            if hasattr(self, "driver"):  # made by `first`
                self._empty()
        finally:
            self.patches.close()

    def _empty(self) -> None:
        """Whoever comes gets all that is there, and nothing stays in the store."""
        self.driver.now += 10_000
        self.restart()
        while places := [place for place, copies in self.model.state.places.items() if copies]:
            self._drain(places[0])
        assert not self.model.state.schedules
        assert not leftovers(self.driver.store)

    def _drain(self, place: str) -> None:
        if place in QUEUES:
            self._subscribe(0, place, 3, "")
        elif place in self.model.state.subscriptions:
            names = [name for name, _ in SUBSCRIPTIONS]
            self.subscribe_durably(0, names.index(place.removeprefix("client/")), "")
        else:
            self._subscribe(0, place, 3, "")
        consumer = list(self.model.members)[-1]
        self.rest()
        while self.model.copies(place):
            assert self.model.held_by(consumer), self.model.copies(place)
            self.settle(0, True)
            self.rest()
        self.unsubscribe(0)
