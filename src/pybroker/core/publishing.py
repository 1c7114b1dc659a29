"""Topics: who gets what is sent to one. A part of `Core`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybroker.core.kinds import SUBSCRIPTION
from pybroker.core.queue import Queue
from pybroker.core.room import overrun
from pybroker.core.selecting import choice_of
from pybroker.destination import Destination, parse_destination
from pybroker.message import Message
from pybroker.operations import PUT_BODY

if TYPE_CHECKING:
    from pybroker.core.broker import Core
    from pybroker.core.links import Peer
    from pybroker.policies import DestinationPolicy


class Topic:
    """The subscribers that one topic name has at present.

    origins  brokers elsewhere that have some, and the way to each
    queues   those that collect what is sent here to a virtual topic
    spread   what is sent to it may go elsewhere, too
    choice   says which of the subscribers get a message; None: all
    kept     the policy by which something is kept for late subscribers, or None
    """

    __slots__ = ("choice", "durable", "kept", "origins", "queues", "spread", "subscribers")

    def __init__(
        self,
        subscribers: list[Queue],
        origins: dict[str, Peer],
        queues: tuple[Queue, ...],
        spread: bool,
        kept: DestinationPolicy | None,
    ) -> None:
        self.kept = kept
        self.subscribers = subscribers
        self.origins = origins
        self.durable = sum(queue.kind == SUBSCRIPTION for queue in subscribers)
        self.choice = choice_of(subscribers)
        self.queues = queues
        self.spread = spread


def publish(core: Core, message: Message, target: Destination) -> bool:
    """Give a copy of a new message to a topic; True when the store will keep it."""
    return publish_to(core, message, core.topic(target))


def publish_to(core: Core, message: Message, topic: Topic) -> bool:
    """Give a message to a topic: here, and to brokers elsewhere. True when the store will keep it."""
    if topic.kept is not None:
        core.recovery.keep(message, topic.kept)
    if topic.origins:
        core.links.publish(message, topic.origins, topic.origins)
    if not topic.subscribers and not topic.queues:
        core.unrouted += not topic.origins
        if core.watched and not topic.origins:
            core.advisories.no_consumer(message)
        return message.durable and bool(topic.origins)
    return publish_here(core, message, topic, topic.queues) or (message.durable and bool(topic.origins))


def publish_for(core: Core, message: Message, targets: tuple[str, ...]) -> None:
    """A topic's message that came from another broker: to those of its targets that are here, or behind this one."""
    target = core.topic(parse_destination(message.destination))
    further = [name for name in targets if name != core.links.name]
    if further:
        core.links.publish(message, target.origins, further)
    if len(further) < len(targets):
        message.route = None  # it has arrived
        if target.kept is not None:
            core.recovery.keep(message, target.kept)
        if target.subscribers:
            publish_here(core, message, target)
        else:
            core.unrouted += 1


def publish_here(core: Core, message: Message, topic: Topic, queues: tuple[Queue, ...] = ()) -> bool:
    """Give a message to the subscribers of a topic at this broker. True when the store will keep it."""
    subscribers, durable = topic.subscribers, topic.durable
    if topic.choice is not None:
        subscribers = topic.choice.of(message)
        durable = sum(queue.kind == SUBSCRIPTION for queue in subscribers)
    core.work += len(subscribers) + len(queues)
    shared = None
    references = durable + len(queues)
    if references > 1 and message.durable:
        shared = core.shared.create(core.new_id(), references)
        core.shared.hold(shared)
        core.operations.append((PUT_BODY, shared.body_id, message, references))
    for queue in subscribers:
        if queue.kind == SUBSCRIPTION:
            queue.accept(message, shared if message.durable else None)
        else:
            queue.accept(message)
            if queue.transient > queue.policy.pending_messages_max:
                overrun(core, queue)
    for queue in queues:
        queue.accept(message.moved_to(f"/queue/{queue.name}", expires=message.expires), shared)
    if shared is not None:
        core.shared.let_go(shared)
    return message.durable and references > 0
