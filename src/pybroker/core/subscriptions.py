"""Who consumes what: consumers and durable subscriptions, how they come and how they leave. A part of `Core`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pybroker.consumer_options import PLAIN, ConsumerOptions
from pybroker.core.choosing import joined
from pybroker.core.consumer import ACK_MODES, AUTO, JOIN_WORK, Connection, Consumer
from pybroker.core.kinds import BACKLOG, CONSUMED, DELETED, SUBSCRIPTION
from pybroker.core.queue import Queue
from pybroker.core.retiring import drop_queue
from pybroker.core.temporary import TemporaryQueue
from pybroker.core.wildcard import Head
from pybroker.destination import (
    QUEUE,
    TEMPORARY_KINDS,
    TEMPORARY_TOPIC,
    Destination,
    parse_composite,
    parse_destination,
)
from pybroker.errors import LimitExceeded, SubscriptionError
from pybroker.operations import DELETE_QUEUE
from pybroker.selectors import compile_selector

if TYPE_CHECKING:
    from pybroker.core.broker import Core


def subscribe(
    core: Core,
    connection: Connection,
    destination: str,
    ack_mode: str,
    *,
    prefetch: int | None = None,
    durable_name: str | None = None,
    client_id: str | None = None,
    options: ConsumerOptions = PLAIN,
    context: Any = None,
) -> Consumer:
    """Make a consumer of a queue, of several (a pattern, or a composite) or of a topic; what is ready is dispatched by `start`.

    `durable_name` (with a client id) makes a durable subscription of a topic, or takes up the one that is there.
    Raises SubscriptionError, InvalidSelector, InvalidDestination, LimitExceeded.
    """
    limits = core.limits
    core.work += JOIN_WORK
    if len(connection.consumers) >= limits.subscriptions_max:
        raise LimitExceeded("limits.subscriptions_max", limits.subscriptions_max, "too many subscriptions")
    if ack_mode not in ACK_MODES:
        raise SubscriptionError(f"acknowledgement mode {ack_mode!r} is not one of {', '.join(ACK_MODES)}")
    if prefetch is None:
        prefetch = limits.prefetch_auto_default if ack_mode == AUTO else limits.prefetch_default
    elif prefetch < 1:
        raise SubscriptionError(f"prefetch must be at least 1, not {prefetch}")
    prefetch = min(prefetch, limits.prefetch_max)
    selector = options.selector
    matches = compile_selector(selector, limits.selector_bytes_max).matches if selector else None
    if "," in destination or ((target := parse_destination(destination)).kind == QUEUE and target.is_pattern):
        if durable_name is not None:
            raise SubscriptionError(
                f"a durable subscription is for one topic, or a pattern of topics, not {destination}"
            )
        patterns = parse_composite(destination)
        head = Head(connection, patterns, ack_mode, prefetch, limits.prefetch_bytes_max, context, options)
        core.wildcards.subscribe(head, matches)
        return head
    if selector and target.kind == TEMPORARY_TOPIC:
        raise SubscriptionError(f"selectors are not for temporary topics: subscribe to {destination} without one")
    if target.kind == QUEUE:
        if durable_name is not None:
            raise SubscriptionError(f"a durable subscription is for a topic; {destination} keeps its messages anyway")
        queue = core.queue(target)
    elif target.kind in TEMPORARY_KINDS:
        queue = core.temporaries.queue_for(connection, target, durable_name)
    elif durable_name is not None:
        queue = _durable_subscription(core, target, client_id or connection.client_id, durable_name, options)
    else:
        queue = core.new_queue(BACKLOG, target.name, selector=selector)
        core.route(queue)
        core.recovery.recover(queue, options.retroactive)
    consumer = Consumer(connection, queue, ack_mode, prefetch, limits.prefetch_bytes_max, context, options)
    connection.consumers[consumer] = None
    queue.consumers[consumer] = None
    if queue.kind in CONSUMED:
        consumer.matches = matches
        joined(queue, consumer)
    core.links.joined(queue)
    if core.watched:
        core.advisories.consumer(consumer, True)
    return consumer


def start(core: Core, consumer: Consumer) -> None:
    """Let a new consumer take part in the dispatch (apart from `subscribe`, so that the caller can prepare for it)."""
    consumer.start()


def _durable_subscription(
    core: Core, target: Destination, client_id: str, name: str, options: ConsumerOptions
) -> Queue:
    selector = options.selector
    if not client_id:
        raise SubscriptionError(f"durable subscription {name!r} needs a client id: give one when you connect")
    queue = core.subscriptions.get((client_id, name))
    if queue is None:
        queue = core.new_queue(SUBSCRIPTION, target.name, client_id, name, selector)
        core.subscriptions[client_id, name] = queue
        core.route(queue)
        core.touch(queue)
        core.links.subscribed(queue)
        core.recovery.recover(queue, options.retroactive)
    elif queue.name != target.name:
        raise SubscriptionError(
            f"durable subscription {name!r} of client {client_id!r} is for /topic/{queue.name}: "
            "unsubscribe it first, or use another name"
        )
    elif selector != (stored := "" if queue.selector is None else queue.selector.text):
        raise SubscriptionError(
            f"durable subscription {name!r} of client {client_id!r} has the selector {stored!r}, and has collected by it: "
            "unsubscribe it first, which deletes what it has collected, or use another name"
        )
    elif queue.consumers:
        raise SubscriptionError(f"durable subscription {name!r} of client {client_id!r} is in use")
    return queue


def unsubscribe(core: Core, consumer: Consumer) -> None:
    """End a consumer: its unacknowledged messages return. A durable subscription goes on collecting."""
    if isinstance(consumer, Head):
        core.wildcards.leave(consumer)
        return
    queue = consumer.queue
    if consumer not in queue.consumers:
        return
    core.idle.used(queue)
    queue.unlist_consumer(consumer)
    del queue.consumers[consumer]
    if queue.choosing is not None:
        queue.choosing.leave(consumer)
    consumer.connection.consumers.pop(consumer, None)
    entries = list(consumer.unacked.values())
    consumer.unacked.clear()
    consumer.credit = 0
    core.links.left(queue)
    if queue.kind == BACKLOG:
        core.unroute(queue)
        drop_queue(core, queue, entries)
    elif isinstance(queue, TemporaryQueue) and queue.hub is not None:
        queue.hub.left(queue)
        drop_queue(core, queue, entries)
    else:
        queue.put_back(entries)
        queue.dispatch()
    if core.watched:
        core.advisories.consumer(consumer, False)


def remove_subscription(core: Core, client_id: str, name: str) -> None:
    """Delete a durable subscription and what it has collected. Its consumer must have left."""
    queue = core.subscriptions.get((client_id, name))
    if queue is None:
        raise SubscriptionError(f"there is no durable subscription {name!r} of client {client_id!r}")
    if queue.consumers:
        raise SubscriptionError(f"durable subscription {name!r} of client {client_id!r} is in use")
    del core.subscriptions[client_id, name]
    core.unroute(queue)
    core.links.unsubscribed(queue)
    core.redeliveries.release(queue)
    queue.kind = DELETED
    if not queue.dirty:
        core.touch(queue)
    queue.empty()


def deleted(core: Core, queue: Queue) -> None:
    """The last message of a deleted subscription is gone."""
    if core.queues.pop(queue.queue_id, None) is not None:
        if queue.dirty:
            core.dirty.remove(queue)
        queue.dirty = True  # never again
        core.operations.append((DELETE_QUEUE, queue.queue_id))
