"""The naive model: what the broker promises (DESIGN.md sections 1, 3 and 7), in dictionaries and lists.

Knows no window, page, spool, batch or shared body. It is told what happens (it is the driver's observer), says what may
happen, and raises AssertionError where the two differ. What it can't know is an interval: after a crash the count of
deliveries of a message lies between what was shown and what was begun; an expired message may be there or gone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from pybroker.core.consumer import AUTO, CUMULATIVE, Connection, Consumer
from pybroker.core.entry import Entry
from pybroker.core.queue import Queue
from pybroker.errors import BrokerError, SlowConsumer
from pybroker.message import Message, decode_headers
from pybroker.operations import order_of
from tests.core.driver import Driver

Key = tuple[Any, ...]  # ("queue", name), ("subscription", client, name) or ("backlog", number)
DLQ: Key = ("queue", "DLQ")
DELAY_MAX_MS = 1_600
SELECTORS: dict[str, Callable[[Sent], bool]] = {  # and which messages they are for
    "": lambda sent: True,
    "JMSPriority <= 4 AND JMSDeliveryMode = 'PERSISTENT'": lambda sent: sent.priority <= 4 and sent.durable,
    "k = 'v'": lambda sent: sent.block == b"k:v\n",
    "k IS NULL OR JMSPriority BETWEEN 5 AND 9": lambda sent: not sent.block or sent.priority >= 5,
}
QUEUE_SELECTORS: dict[str, Callable[[bytes], bool]] = {  # of the consumers of queues
    "": lambda block: True,
    "s = '1'": lambda block: b"s:1\n" in block,
    "s > '1' OR s = '2'": lambda block: b"s:2\n" in block,
    "s IS NULL": lambda block: b"s:" not in block,
}


@dataclass(frozen=True)
class Sent:
    """A message as its producer gave it."""

    number: int
    destination: str
    body: bytes
    block: bytes
    durable: bool
    priority: int
    expires: int


@dataclass(eq=False)
class Copy:
    """One message in one queue. `low` and `high` bound the number of deliveries that have ended unacknowledged."""

    uid: int
    sent: Sent
    destination: str
    block: bytes
    expires: int
    order: int
    stored: bool
    turn: int
    low: int = 0
    high: int = 0
    begun: bool = False  # a delivery of it was begun at some time
    unshown: bool = False  # it came back from a consumer that never saw it
    holder: Consumer | None = None
    tag: int = 0
    visible: bool = False  # the holder has seen it
    transaction: str = ""  # the holder settled it in this transaction
    done: bool = False  # ... by an acknowledgement
    due: int = 0  # not to be given out before

    @property
    def ready(self) -> bool:
        return self.holder is None

    @property
    def group(self) -> str:
        return dict(reversed(decode_headers(self.block))).get("JMSXGroupID", "")


@dataclass
class Member:
    """A consumer."""

    key: Key
    mode: str
    prefetch: int
    connection: Connection
    selector: str = ""
    exclusive: bool = False
    priority: int = 0
    started: bool = False
    last: dict[int, int] = field(default_factory=dict)  # priority: the highest order delivered for the first time


@dataclass(frozen=True)
class Outgoing:
    """An AUTO delivery in a connection's outbox."""

    consumer: Consumer
    entry: Entry
    order: int
    tag: int


@dataclass
class Pending:
    """A transaction."""

    sent: list[Sent] = field(default_factory=list)
    settled: list[Copy] = field(default_factory=list)


@dataclass
class Snapshot:
    """What a batch brings the store to."""

    queues: dict[Key, dict[int, Copy]]
    patterns: dict[tuple[str, str], tuple[str, str]]
    now: int


class Model:
    def __init__(self, deliveries_max: int, size_max: int) -> None:
        self.deliveries_max = deliveries_max
        self.delay = 0  # milliseconds before the first redelivery of a rejected message, twice as long each time
        self.waiting_max = 0  # with so many waiting nothing of a queue is given out
        self.size_max = size_max  # bytes that a consumer may hold
        self.driver: Driver  # set by whoever makes both
        self.queues: dict[Key, dict[int, Copy]] = {}
        self.patterns: dict[tuple[str, str], tuple[str, str]] = {}  # durable subscriptions, with their selectors
        self.members: dict[Consumer, Member] = {}
        self.pending: dict[tuple[Connection, str], Pending] = {}
        self.sents: dict[int, Sent] = {}
        self.ids: dict[int, bytes] = {}
        self.durable = Snapshot({}, {}, 0)
        self.shown_count: Counter[int] = Counter()  # by uid; no crash takes back what a client has seen
        self.expected: Counter[tuple[Key, int]] = Counter()  # arrivals that the call under way must bring
        self.dying: list[Copy] = []  # must reach the dead letters within the call under way
        self.zombies: list[Copy] = []  # their queue was removed: may reach the dead letters
        self.returning: set[int] = set()  # uids of a call that returns copies one after the other
        self.leaving: set[Consumer] = set()  # consumers that the call under way ends
        self.outboxes: dict[Connection, list[Outgoing]] = {}
        self.confirmations: Counter[int] = Counter()
        self.groups: dict[tuple[Key, str], Consumer] = {}  # message groups that have an owner
        self._uid = 0

    # ---- small questions

    @property
    def now(self) -> int:
        return self.driver.now

    def key_of(self, queue: Queue) -> Key:
        if queue.kind == "queue":
            return ("queue", queue.name)
        if queue.kind == "subscription":
            return ("subscription", queue.client_id, queue.subscription)
        assert queue.kind == "backlog", f"{queue} is not one that takes or gives"
        return ("backlog", queue.queue_id)

    def in_queue(self, key: Key) -> dict[int, Copy]:
        return self.queues.setdefault(key, {})

    def expired(self, copy: Copy) -> bool:
        return bool(copy.expires) and copy.expires <= self.now

    def exclusive(self, key: Key) -> Consumer | None:
        """Who gets everything of a queue."""
        found = [c for c, m in self.members.items() if m.key == key and m.exclusive and c not in self.leaving]
        return max(found, key=lambda consumer: self.members[consumer].priority, default=None)

    def may_take(self, consumer: Consumer, copy: Copy) -> bool | None:
        """Whether a copy may go to a consumer; None while consumers leave, one after the other, and it can't be said."""
        member = self.members[consumer]
        if member.key[0] != "queue":
            return True
        if not QUEUE_SELECTORS[member.selector](copy.block):
            return False
        if any(self.members[each].key == member.key for each in self.leaving):
            return None
        exclusive = self.exclusive(member.key)
        if exclusive is not None:
            return consumer is exclusive
        return self.groups.get((member.key, copy.group), consumer) is consumer

    def _bind(self, consumer: Consumer, copy: Copy) -> None:
        """A delivery may open or close a group."""
        member = self.members[consumer]
        key = member.key
        if not copy.group or key[0] != "queue" or member.exclusive:
            return
        owner = self.groups.get((key, copy.group))
        if b"JMSXGroupSeq:-1" in copy.block:
            self.groups.pop((key, copy.group), None)
        elif owner is None or owner in self.leaving:
            self.groups[key, copy.group] = consumer

    def held_by(self, consumer: Consumer) -> list[Copy]:
        """What a consumer has unacknowledged, in order of delivery."""
        copies = self.queues.get(self.members[consumer].key, {}).values()
        return sorted((c for c in copies if c.holder is consumer and not c.transaction), key=lambda copy: copy.tag)

    def waits(self, copy: Copy) -> bool:
        """Whether its redelivery is not due yet."""
        return copy.due > self.now

    def stalled(self, key: Key) -> bool:
        """Whether so much waits for its redelivery that a queue gives out nothing."""
        return sum(self.waits(copy) and copy.ready for copy in self.in_queue(key).values()) >= self.waiting_max > 0

    def visible_to(self, consumer: Consumer) -> list[Copy]:
        return [copy for copy in self.held_by(consumer) if copy.visible]

    def targets(self, sent: Sent) -> list[Key]:
        destination = sent.destination
        if destination.startswith("/queue/"):
            return [("queue", destination[7:])]
        name = destination[7:]
        keys: list[Key] = [
            ("subscription", *owner)
            for owner, (pattern, selector) in self.patterns.items()
            if topic_fits(pattern, name) and SELECTORS[selector](sent)
        ]
        for consumer, member in self.members.items():
            fits = member.key[0] == "backlog" and topic_fits(consumer.queue.name, name)
            if fits and SELECTORS[member.selector](sent):
                keys.append(member.key)
        return keys

    # ---- what tests do

    def make(
        self,
        destination: str,
        size: int = 0,
        durable: bool = True,
        priority: int = 4,
        expires: int = 0,
        block: bytes = b"",
    ) -> tuple[Sent, Message]:
        number = len(self.sents) + 1
        body = b"%d:" % number + b"x" * size
        sent = Sent(number, destination, body, block, durable, priority, expires)
        self.sents[number] = sent
        return sent, Message(destination, body, block, durable, priority, expires)

    def expect(self, sent: Sent) -> None:
        """The call under way sends this message."""
        if sent.expires and sent.expires <= self.now:
            return
        for key in self.targets(sent):
            self.expected[key, sent.number] += 1

    def give_back(self, key: Key, copy: Copy, one_by_one: bool = False, leaves: bool = False) -> None:
        """A consumer loses a copy without acknowledging it. `one_by_one`: others may be given out before it is back.

        Where the consumer stays the copy's redelivery is delayed.
        """
        if copy.visible or copy.transaction:
            copy.low += 1
            copy.high += 1
            if copy.low >= self.deliveries_max and key != DLQ:
                self.dying.append(copy)
            elif self.delay and not leaves and copy.holder in self.members and copy.holder not in self.leaving:
                copy.due = self.now + min(self.delay * 2 ** (copy.low - 1), DELAY_MAX_MS)
                if copy.expires:
                    copy.due = min(copy.due, copy.expires)
        else:
            copy.unshown = True
        copy.holder = None
        copy.visible = False
        copy.transaction = ""
        if one_by_one or key == DLQ:
            self.returning.add(copy.uid)

    def forget(self, key: Key, copy: Copy) -> None:
        del self.queues[key][copy.order]

    def acknowledge(self, consumer: Consumer, copies: Iterable[Copy]) -> None:
        for copy in list(copies):
            self.forget(self.members[consumer].key, copy)

    def settled_by(self, consumer: Consumer, copy: Copy) -> list[Copy]:
        """The copies that one acknowledgement is for."""
        if self.members[consumer].mode != CUMULATIVE:
            return [copy]
        return [other for other in self.held_by(consumer) if other.tag <= copy.tag]

    def leave(self, consumer: Consumer, one_by_one: bool = False) -> None:
        """The call under way ends a consumer."""
        member = self.members[consumer]
        self.leaving.add(consumer)
        if member.key[0] == "backlog":
            self.zombies += self.queues.pop(member.key, {}).values()
        else:
            for copy in self.held_by(consumer):
                self.give_back(member.key, copy, one_by_one)

    def take(self, outgoing: list[Outgoing]) -> None:
        """The transport took these deliveries; those of consumers that have left mean nothing any more."""
        for one in outgoing:
            if one.consumer in self.members:
                copy = self.queues[self.members[one.consumer].key].get(one.order)
                if copy is not None and copy.holder is one.consumer and copy.tag == one.tag:
                    self.acknowledge(one.consumer, [copy])

    def remove_subscription(self, owner: tuple[str, str]) -> None:
        del self.patterns[owner]
        self.zombies += self.queues.pop(("subscription", *owner), {}).values()

    def end_call(self) -> None:
        """A call on the core has returned."""
        assert not +self.expected, f"never arrived: {+self.expected}"
        for copy in self.dying:
            still = [key for key, copies in self.queues.items() if copies.get(copy.order) is copy]
            assert not still or self.expired(copy), f"{copy} had its last delivery and stays in {still}"
        for consumer in self.leaving:
            for copy in self.held_by(consumer):
                self.give_back(self.members[consumer].key, copy)
            del self.members[consumer]
        self.groups = {group: owner for group, owner in self.groups.items() if owner in self.members}
        self.leaving.clear()
        self.expected.clear()
        self.dying.clear()
        self.returning.clear()

    # ---- Observer: what the broker does

    def accepted(self, queue: Queue, message: Message) -> None:
        key = self.key_of(queue)
        number = int(message.body.partition(b":")[0])
        sent = self.sents[number]
        assert message.body == sent.body, (message.body, sent.body)
        assert self.ids.setdefault(number, message.message_id) == message.message_id, "the message id changed"
        assert (message.priority, message.durable) == (sent.priority, sent.durable), message
        copies = self.in_queue(key)
        order = order_of(message.priority, queue.next_sequence)
        ahead = [copy.order for copy in copies.values() if copy.sent.priority == message.priority]
        assert not ahead or order > max(ahead), (order, ahead)
        if self.expected[key, number] > 0:
            self.expected[key, number] -= 1
            assert (message.destination, message.header_block) == (sent.destination, sent.block), message
            assert message.expires == sent.expires, message
        else:
            assert key == DLQ, f"{message} was not sent to {key}"
            self._dead_letter(message, sent)
        self._uid += 1
        stored = message.durable and key[0] != "backlog"
        copies[order] = Copy(
            self._uid,
            sent,
            message.destination,
            message.header_block,
            message.expires,
            order,
            stored,
            self.driver.turn,
        )

    def _dead_letter(self, letter: Message, sent: Sent) -> None:
        assert letter.destination == "/queue/DLQ", letter
        assert letter.expires == 0, letter
        assert letter.header_block.endswith(sent.block), letter
        headers = dict(decode_headers(letter.header_block[: len(letter.header_block) - len(sent.block)]))
        assert headers["dead-letter-origin"] == sent.destination, headers
        assert headers["dead-letter-reason"] == "deliveries", headers
        deliveries = int(headers["dead-letter-deliveries"])
        assert deliveries >= self.deliveries_max, headers
        owner = headers.get("dead-letter-subscription")
        for key, copies in self.queues.items():
            if (key[0] == "subscription") != (owner is not None) or (owner and owner != f"{key[1]}/{key[2]}"):
                continue
            for copy in copies.values():
                if copy.sent is sent and copy.ready and key != DLQ and copy.low <= deliveries <= copy.high:
                    self.forget(key, copy)
                    return
        for copy in self.zombies:
            if copy.sent is sent:
                self.zombies.remove(copy)
                return
        raise AssertionError(f"{letter} is a dead letter without reason")

    def dispatched(self, queue: Queue, consumer: Consumer, entry: Entry) -> None:
        key = self.key_of(queue)
        member = self.members[consumer]
        assert member.key == key, (member.key, key)
        if consumer in self.leaving and key not in self.queues:
            return  # a backlog that goes in this call; what an aborted transaction gave back passes through it
        copies = self.in_queue(key)
        assert entry.order in copies, f"{entry} was acknowledged, moved or never there"
        copy = copies[entry.order]
        if copy.holder in self.leaving:
            self.give_back(key, copy, True)
        assert copy.ready, f"{copy} is given out twice"
        assert self.may_take(consumer, copy) is not False, f"{copy} is not for {consumer.options}"
        for other, one in self.members.items():
            if one.key == key and one.priority > member.priority and other.listed:
                assert not self.may_take(other, copy), f"{copy} is for {other.options} first"
        assert not self.expired(copy), f"{copy} is given out late"
        assert not self.waits(copy), f"{copy} is given out before it is due"
        assert not self.stalled(key), f"{copy} is given out of a queue that is stalled"
        assert not consumer.connection.paused, consumer
        assert member.started, consumer
        held = self.held_by(consumer)
        assert len(held) < member.prefetch, f"more than prefetch {member.prefetch}"
        size = sum(len(other.sent.body) + len(other.block) for other in held)
        assert size < self.size_max, f"more than {self.size_max} bytes"
        for other in copies.values():
            ahead = other.ready and other.order < copy.order and not self.expired(other) and not self.waits(other)
            if ahead and self.may_take(consumer, other):
                assert other.uid in self.returning, f"{copy} overtakes {other}"
        assert copy.low <= entry.deliveries <= copy.high, (entry.deliveries, copy)
        assert entry.deliveries < self.deliveries_max or key == DLQ, f"{copy} had its last delivery before"
        copy.low = copy.high = entry.deliveries
        copy.holder = consumer
        copy.tag = consumer.last_tag + 1
        copy.visible = False
        copy.begun = True
        self._bind(consumer, copy)
        self.returning.discard(copy.uid)

    def shown(self, consumer: Consumer, entry: Entry) -> None:
        assert consumer in self.members, "a delivery to a consumer that has left"
        member = self.members[consumer]
        copy = self.in_queue(member.key).get(entry.order)
        assert copy is not None, f"{entry} is shown and not in the queue"
        assert copy.holder is consumer, f"{copy} is shown to somebody else"
        assert not copy.visible, f"{copy} is shown twice"
        assert copy.tag == entry.tag, (copy, entry.tag)
        message = entry.message
        seen = (message.destination, message.body, message.header_block, message.priority, message.durable)
        sent = copy.sent
        assert seen == (copy.destination, sent.body, copy.block, sent.priority, sent.durable), seen
        assert message.expires == copy.expires, message
        assert message.message_id == self.ids[sent.number], message
        if sent.durable:
            assert copy.turn not in self.driver.unwritten, f"{copy} is shown before its commit"
        assert entry.deliveries == copy.low, (entry.deliveries, copy)
        before = self.shown_count[copy.uid]
        assert entry.deliveries >= before, f"{copy} was shown {before} times before, and says {entry.deliveries}"
        self.shown_count[copy.uid] += 1
        copy.visible = True
        if entry.deliveries == 0 and not copy.unshown and not copy.group:
            last = member.last.get(sent.priority, -1)
            assert copy.order > last, f"{copy} comes after {last}"
            member.last[sent.priority] = copy.order
        if member.mode == AUTO:
            outbox = self.outboxes.setdefault(consumer.connection, [])
            outbox.append(Outgoing(consumer, entry, entry.order, entry.tag))

    def confirmed(self, token: Any) -> None:
        number, turn = token
        assert not any(other <= turn for other in self.driver.unwritten), f"{number} is confirmed before its commit"
        self.confirmations[number] += 1
        assert self.confirmations[number] == 1, number

    def closing(self, consumer: Consumer, error: BrokerError) -> None:
        assert isinstance(error, SlowConsumer), error
        assert consumer in self.members, consumer
        key = self.members[consumer].key
        assert key[0] == "backlog", consumer
        assert consumer not in self.leaving, consumer
        self.leave(consumer)

    # ---- batches, crashes

    def sealed(self) -> Snapshot:
        queues = {
            key: {order: replace(copy) for order, copy in copies.items() if copy.stored}
            for key, copies in self.queues.items()
            if key[0] != "backlog"
        }
        return Snapshot(queues, dict(self.patterns), self.now)

    def written(self, snapshot: Snapshot) -> None:
        self.durable = snapshot

    def forget_the_unwritten(self) -> None:
        """The process died: what was written is what there is."""
        self.members.clear()
        self.groups.clear()
        self.pending.clear()
        self.outboxes.clear()
        self.zombies.clear()
        self.patterns = dict(self.durable.patterns)
        self.queues = {}
        for key, copies in self.durable.queues.items():
            for order, copy in copies.items():
                risen = replace(copy)
                risen.low = max(copy.low, self.shown_count[copy.uid])
                risen.high = max(copy.high + copy.begun, risen.low)
                risen.holder = None
                risen.visible = False
                risen.transaction = ""
                risen.unshown = True
                risen.due = 0
                self.in_queue(key)[order] = risen


def topic_fits(pattern: str, name: str) -> bool:
    """Whether a topic's name fits a pattern, as a regular expression says."""
    parts = pattern.split(".")
    expression = r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in parts if part != ">")
    if parts[-1] == ">":
        expression = (expression + r"(\..+)?") if expression else ".+"
    return re.fullmatch(expression, name) is not None
