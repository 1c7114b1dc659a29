"""Advisories: the broker tells of itself, on ``/topic/ActiveMQ.Advisory...`` names, as ActiveMQ does. A part of `Core`.

Only who subscribes to such names (``ActiveMQ`` in front, literally) makes them exist: without one `Core.watched` is False, and
nothing is looked at. They are non-durable, never about other advisories or links, never cross links, and are made at most
`limits.advisories_per_second` times a second for each name: the next one says how many were left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybroker.core.kinds import BACKLOG, SUBSCRIPTION, TEMPORARY
from pybroker.core.publishing import Topic, publish_here
from pybroker.core.queue import Queue
from pybroker.core.topics import SubscriptionTree
from pybroker.destination import QUEUE, TEMPORARY_QUEUE, TEMPORARY_TOPIC, TOPIC, Destination, parse_destination
from pybroker.errors import InvalidDestination
from pybroker.message import PRIORITY_DEFAULT, Message, encode_headers

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pybroker.core.broker import Core
    from pybroker.core.consumer import Connection, Consumer
    from pybroker.core.entry import Entry

PREFIX = "ActiveMQ.Advisory."
TOPIC_PREFIX = (
    f"/topic/{PREFIX}"  # of an advisory's destination; what follows may be longer than a name may be, or a pattern
)
KINDS = {QUEUE: "Queue", TOPIC: "Topic", TEMPORARY_QUEUE: "TempQueue", TEMPORARY_TOPIC: "TempTopic"}
NAMES_MAX = 10_000  # names whose rate is known
PRODUCED_MAX = 1_000  # destinations of one connection that it is known to produce for
SECOND = 1_000  # milliseconds

Headers = list[tuple[str, str]]


def is_advisory(target: Destination) -> bool:
    """Whether a topic is the broker's own: only it sends there."""
    return target.kind == TOPIC and target.name.startswith(PREFIX)


def _asks(parts: tuple[str, ...]) -> bool:
    """Whether a pattern is about advisories: one that begins with a wildcard is not."""
    return parts[0] == "ActiveMQ" and parts[1:2] in (("Advisory",), ("*",), (">",))


def announce_client(core: Core, connection: Connection, name: str) -> None:
    """The client of a connection was let in; its name is unique in all lives of the broker."""
    connection.name = name
    if core.watched:
        core.advisories.connection(connection, True)


class Advisories:
    """Who wants them, and how often each was made. `suppressed`: how many were left out."""

    def __init__(self, core: Core, id_prefix: str) -> None:
        self.core = core
        self._id_prefix = f"{id_prefix}advisory-"
        self._last = 0
        self.suppressed = 0
        self._tree: SubscriptionTree[Queue] = SubscriptionTree()
        self._made: dict[str, list[int]] = {}  # name to: begin of its present second, made in it, left out since

    # ---- who wants them

    def route(self, queue: Queue) -> None:
        """There is a subscription to a topic."""
        parts = tuple(queue.name.split("."))
        if _asks(parts):
            self._tree.add(parts, queue)
            self.core.watched = True

    def unroute(self, queue: Queue) -> None:
        """... no more."""
        parts = tuple(queue.name.split("."))
        if _asks(parts):
            self._tree.remove(parts, queue)
            self.core.watched = len(self._tree) > 0
            if not self.core.watched:
                self._made.clear()
                for connection in self.core.connections:
                    connection.produced.clear()  # who listens next is told anew

    # ---- what is told

    def connection(self, connection: Connection, there: bool) -> None:
        """A client was let in, or has gone."""
        self._tell("Connection", [*_about(connection), ("event", _event(there))])

    def consumer(self, consumer: Consumer, there: bool) -> None:
        """A consumer has come, or has gone."""
        queue = consumer.queue
        target = _target_of(queue)
        if target is not None:
            count = len(queue.consumers)
            if queue.kind == BACKLOG:
                count = self.core.links.plain_subscribers(queue.name)
            headers = [*_about(consumer.connection), ("consumerCount", str(count)), ("event", _event(there))]
            self._tell_of("Consumer", target, headers)

    def producers(self, connection: Connection, destinations: Iterable[str]) -> None:
        """A connection sends to these: who does so for the first time since somebody watches is told of."""
        produced = connection.produced
        for text in destinations:
            if text not in produced and len(produced) < PRODUCED_MAX and (target := _parsed(text)) is not None:
                produced[text] = target
                self._producer(connection, target, True)

    def gone(self, connection: Connection) -> None:
        """A connection has ended, and its consumers have left."""
        for target in connection.produced.values():
            self._producer(connection, target, False)
        if connection.name:
            self.connection(connection, False)

    def _producer(self, connection: Connection, target: Destination, there: bool) -> None:
        self._tell_of("Producer", target, [*_about(connection), ("event", _event(there))])

    def slow_consumer(self, consumer: Consumer) -> None:
        """A consumer does not keep up: what is on its way to its connection waits, or it is too far behind."""
        target = _target_of(consumer.queue)
        if target is not None:
            self._tell_of("SlowConsumer", target, _about(consumer.connection))

    def full(self, message: Message, limit: str) -> None:
        """There is no room for a message."""
        if (target := _parsed(message.destination)) is not None:
            self._tell_of("FULL", target, [("usageName", limit)])

    def dead_lettered(self, entry: Entry, reason: str) -> None:
        headers = [("reason", reason), ("deliveries", str(entry.deliveries))]
        self._tell_of("MessageDLQd", parse_destination(entry.message.destination), headers, entry.message)

    def expired(self, destination: str, message: Message | None = None) -> None:
        """A message has expired: in a queue, or for a topic."""
        self._tell_of("Expired", parse_destination(destination), [], message)

    def no_consumer(self, message: Message) -> None:
        """A message came that nobody consumes at this time."""
        self._tell_of("NoConsumer", parse_destination(message.destination), [], message)

    def _tell_of(self, kind: str, target: Destination, headers: Headers, message: Message | None = None) -> None:
        if target.kind == TOPIC and _asks(target.parts):
            return
        headers = [*headers, ("originalDestination", str(target))]
        if message is not None:
            headers.append(("originalMessageId", message.message_id.decode("latin-1")))
        self._tell(f"{kind}.{KINDS[target.kind]}.{target.name}", headers)

    def _tell(self, name: str, headers: Headers) -> None:
        subscribers = self._tree.match(tuple(f"{PREFIX}{name}".split(".")))
        if not subscribers:
            return
        left_out = self._left_out(name)
        if left_out is None:
            return
        if left_out:
            headers.append(("suppressed", str(left_out)))
        block = encode_headers([("type", "Advisory"), ("originBrokerName", self.core.links.name), *headers])
        core = self.core
        self._last += 1
        message_id = f"{self._id_prefix}{self._last:x}".encode()
        message = Message(f"{TOPIC_PREFIX}{name}", b"", block, False, PRIORITY_DEFAULT, 0, message_id, core.now)
        publish_here(core, message, Topic(subscribers, {}, (), False, None))

    def _left_out(self, name: str) -> int | None:
        """How many of this name were left out before this one; None if it is to be left out, too."""
        now = self.core.now
        made = self._made.get(name)
        if made is None:
            if len(self._made) >= NAMES_MAX:
                self._made.clear()
            made = self._made[name] = [now, 0, 0]
        if not 0 <= now - made[0] < SECOND:
            made[0], made[1] = now, 0
        if made[1] >= self.core.limits.advisories_per_second:
            made[2] += 1
            self.suppressed += 1
            return None
        made[1] += 1
        left_out, made[2] = made[2], 0
        return left_out


def _parsed(text: str) -> Destination | None:
    """None for what is no destination: who sends there is told so in another place."""
    try:
        return parse_destination(text)
    except InvalidDestination:
        return None


def _event(there: bool) -> str:
    return "start" if there else "stop"


def _about(connection: Connection) -> Headers:
    found = [("connectionId", connection.name)]
    if connection.client_id:
        found.append(("clientId", connection.client_id))
    return found


def _target_of(queue: Queue) -> Destination | None:
    """What the consumers of a queue consume, as others name it; None where nothing is told of it."""
    return queue.destination if queue.kind in (QUEUE, TEMPORARY, BACKLOG, SUBSCRIPTION) else None
