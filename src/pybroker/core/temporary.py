"""Temporary queues and topics: one connection's own, gone with it, as replies need them. A part of `Core`.

Everybody may send to one; only its owner's connection consumes. Nothing of them is stored: what is sent there is taken as
non-durable, and a message that comes when its destination is gone is confirmed and counted as *unclaimed*, since who replies can't
help it. The name is made of a secret (`destination.temporary_destination`): so an owner that comes back over another connection
proves that it is the owner, and takes over.

In a network the owner's broker demands the name from the moment on that it exists; at other brokers a *stand-in* without owner
holds what is on its way there, for as long as there is one. A topic is a *hub* that gives a copy to each consumer's own queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybroker.core.consumer import Connection, Consumer
from pybroker.core.entry import DELAYED, SETTLING
from pybroker.core.kinds import TEMPORARY
from pybroker.core.queue import Queue
from pybroker.core.retiring import drop_queue
from pybroker.core.room import overrun
from pybroker.core.shared import SharedBody
from pybroker.destination import TEMPORARY_TOPIC, Destination, parse_destination, temporary_destination
from pybroker.errors import LimitExceeded, SubscriptionError
from pybroker.message import Message
from pybroker.operations import QueueRecord

if TYPE_CHECKING:
    from pybroker.core.broker import Core


class TemporaryQueue(Queue):
    """A temporary destination, or what waits for one consumer of a temporary topic.

    owner        whose it is; None: it stands for one of another broker
    hub          of a consumer's queue: the topic
    subscribers  of a topic here: the queues of its consumers, in order
    """

    __slots__ = ("hub", "owner", "subscribers", "target")

    def __init__(self, core: Core, queue_id: int, target: Destination) -> None:
        self.target = target
        super().__init__(core, QueueRecord(queue_id, TEMPORARY, target.name, "", ""))
        self.owner: Connection | None = None
        self.hub: TemporaryQueue | None = None
        self.subscribers: dict[TemporaryQueue, None] = {}

    @property
    def destination(self) -> Destination:
        return self.target

    def accept(self, message: Message, shared: SharedBody | None = None) -> None:
        """Put a new message at its place, and dispatch; it is not durable any more."""
        message.durable = False
        if self.target.kind != TEMPORARY_TOPIC or self.owner is None or self.hub is not None:
            super().accept(message)
            return
        self.counts.enqueued += 1
        self.core.temporaries.unclaimed += not self.subscribers
        for queue in list(self.subscribers):
            queue.accept(message)
            if queue.transient > self.core.limits.backlog_messages_max:
                overrun(self.core, queue)

    def head_at_least(self, start: int) -> None:
        """Nothing of it is stored."""

    def left(self, queue: TemporaryQueue) -> None:
        """A consumer of the topic has left; what it has not acknowledged nobody takes any more."""
        self.core.temporaries.unclaimed += queue.depth
        self.subscribers.pop(queue, None)


class Temporaries:
    """All temporary destinations of one core.

    unclaimed  messages to them that nobody took: sent when it was gone, or there when it went; of a topic, each consumer's copy
    """

    spread = False  # what is sent to them goes nowhere else

    def __init__(self, core: Core) -> None:
        self.core = core
        self.unclaimed = 0

    # ---- of clients of this broker

    def create(self, connection: Connection, kind: str, secret: str) -> str:
        """Make a temporary destination of a connection, or take over what is of that secret. Raises LimitExceeded.

        `kind` is one of `TEMPORARY_KINDS`; a secret is used once, or by who comes back. Returns the destination.
        """
        core = self.core
        limit = core.limits.temporary_destinations_max
        target = temporary_destination(kind, secret)
        text = str(target)
        queue = core.by_destination.get(text)
        if queue is not None:
            assert isinstance(queue, TemporaryQueue)
            if queue.owner is connection:
                return text
        if len(connection.temporaries) >= limit:
            raise LimitExceeded("limits.temporary_destinations_max", limit, "too many temporary destinations")
        if queue is not None and queue.owner is None and kind == TEMPORARY_TOPIC:
            self._remove(queue)  # it has no consumers yet: what was on its way is lost to them
            queue = None
        if queue is None:
            core.check_destinations()
            queue = self._add(target)
        if queue.owner is not None:
            text_taken = f"{text} was taken over by another connection of its owner"
            core.closing.extend((each, SubscriptionError(text_taken)) for each in self._consumers(queue))
            del queue.owner.temporaries[text]
        else:
            core.links.temporary(text, True)
        queue.owner = connection
        connection.temporaries[text] = queue
        return text

    def _add(self, target: Destination) -> TemporaryQueue:
        core = self.core
        queue = TemporaryQueue(core, core.new_id(), target)
        core.queues[queue.queue_id] = core.by_destination[str(target)] = queue
        core.links.route(queue)
        return queue

    def _consumers(self, queue: TemporaryQueue) -> list[Consumer]:
        """Those of a queue, or of all queues of a topic."""
        return [consumer for each in (queue, *queue.subscribers) for consumer in each.consumers]

    def delete(self, connection: Connection, destination: str) -> None:
        """Remove a temporary destination with what is in it. Raises SubscriptionError: unknown, or consumed."""
        queue = connection.temporaries.get(destination)
        if queue is None:
            raise SubscriptionError(f"there is no temporary destination {destination} of this connection")
        if self._consumers(queue):
            raise SubscriptionError(f"{destination} is in use: end its subscriptions first")
        self._leave(queue)

    def disconnected(self, connection: Connection) -> None:
        """A connection is over; it has no consumers any more."""
        for queue in list(connection.temporaries.values()):
            self._leave(queue)

    def _leave(self, queue: TemporaryQueue) -> None:
        """Its owner is done with it. If it came back at another broker meanwhile, what is here goes there."""
        text = str(queue.target)
        if queue.owner is not None:
            del queue.owner.temporaries[text]
            queue.owner = None
            self.core.links.temporary(text, False)
        if queue.routes is None:
            self._remove(queue)
        else:
            queue.dispatch()

    def _remove(self, queue: TemporaryQueue) -> None:
        self.unclaimed += queue.depth
        del self.core.by_destination[str(queue.target)]
        entries = [entry for entry in queue.outstanding.values() if entry.state not in (SETTLING, DELAYED)]
        drop_queue(self.core, queue, entries)

    def queue_for(self, connection: Connection, target: Destination, durable_name: str | None) -> TemporaryQueue:
        """What a new consumer consumes. Raises SubscriptionError."""
        if durable_name is not None:
            raise SubscriptionError(f"{target} is temporary: there are no durable subscriptions to it")
        queue = connection.temporaries.get(str(target))
        if queue is None:
            raise SubscriptionError(
                f"{target} is no temporary destination of this connection: only its owner can consume it"
            )
        if target.kind != TEMPORARY_TOPIC:
            return queue
        core = self.core
        core.check_destinations()
        own = TemporaryQueue(core, core.new_id(), target)
        own.hub = queue
        core.queues[own.queue_id] = own
        queue.subscribers[own] = None
        return own

    # ---- sending

    def send(self, message: Message) -> None:
        """Take a message: to whom it is for, here or elsewhere; or count it."""
        text = message.destination
        queue = self.core.by_destination.get(text)
        if queue is None and self.core.links.wanted(text):
            queue = self._add(parse_destination(text))
        if queue is None:
            self.unclaimed += 1
        else:
            queue.accept(message)

    def rerouted(self, queue: Queue) -> None:
        """Other brokers want it now, or want it no more."""
        if queue.routes is None and isinstance(queue, TemporaryQueue) and queue.owner is None:
            self._remove(queue)
