"""Room: when the broker, or one destination, takes no more, and what is dropped where a policy says so. A part of `Core`. Pure.

Limits of a destination are looked at before a message is taken; what a transaction brings may pass them. Only what nobody has is
ever dropped, and each one dropped is counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybroker.core.kinds import BACKLOG, QUEUE
from pybroker.core.queue import Queue
from pybroker.core.sorted_window import SortedWindow
from pybroker.destination import TOPIC, parse_destination
from pybroker.errors import BrokerError, BrokerFull, SlowConsumer
from pybroker.operations import SEQUENCE_BITS, SEQUENCE_MASK
from pybroker.policies import BLOCK, DISCONNECT, DROP_LOWEST_PRIORITY, DROP_OLDEST, DestinationPolicy, Policies

if TYPE_CHECKING:
    from pybroker.core.broker import Core
    from pybroker.core.entry import Entry
    from pybroker.message import Message


def limits_destinations(policies: Policies) -> bool:
    """Whether there is any destination that producers may have to wait for."""
    return any(policies.all_of("messages_max")) or any(policies.all_of("bytes_max")) or blocks_topics(policies)


def blocks_topics(policies: Policies) -> bool:
    """Whether there is any topic whose producers wait for its slowest subscriber."""
    return BLOCK in policies.all_of("slow_consumer")


def trims(queue: Queue) -> bool:
    """Whether messages of a queue are dropped when there are too many."""
    policy = queue.policy
    if queue.kind == BACKLOG:
        return policy.slow_consumer in (DROP_OLDEST, DROP_LOWEST_PRIORITY)
    if queue.kind != QUEUE or queue.is_dead_letter_queue:  # a durable subscription, or dead letters: none is lost
        return False
    return policy.full_policy == DROP_OLDEST and bool(policy.messages_max or policy.bytes_max)


def crowded(core: Core) -> bool:
    """Whether `full` has to be asked for each message: to be looked at once a turn, which brings a bounded amount."""
    limits = core.limits
    return bool(
        core.memory_bytes > limits.memory_bytes_max
        or core.disk_full
        or core.limits_destinations
        or (limits.store_bytes_max and core.stored_bytes + core.spooled_bytes > limits.store_bytes_max)
    )


def full(core: Core, message: Message, sent: bool = True) -> BrokerFull | None:
    """Why there is no room for the message now, or None when there is. Makes room where it can.

    A send that repeats a message key needs none. `sent`: whether it is sent here; else nobody looks at its key.
    """
    if sent and core.message_keys.repeats(message):
        return None
    error = full_broker(core)
    if error is None and core.limits_destinations:
        return full_destinations(core, message)
    return error


def full_broker(core: Core) -> BrokerFull | None:
    """Why the broker has no room for any message, or None. Makes room where it can."""
    limits = core.limits
    if core.disk_full:
        return BrokerFull(core.disk_full)
    if core.memory_bytes > limits.memory_bytes_max:
        core.shrink()
        if core.memory_bytes > limits.memory_bytes_max:
            return _full("limits.memory_bytes_max", limits.memory_bytes_max)
    if limits.store_bytes_max and core.stored_bytes + core.spooled_bytes > limits.store_bytes_max:
        return _full("limits.store_bytes_max", limits.store_bytes_max)
    return None


def full_destinations(core: Core, message: Message) -> BrokerFull | None:
    """Why one of the destinations that get a copy of the message takes no more now, or None."""
    try:
        names = core.routing.places(message)
    except BrokerError:  # it is refused when it is sent
        return None
    for name in names:
        error = _full_destination(core, name)
        if error is not None:
            return error
    return None


def _full(limit: str, value: int) -> BrokerFull:
    return BrokerFull(f"the broker has no room: {limit} is {value}; consume messages, or raise the limit")


def _full_destination(core: Core, name: str) -> BrokerFull | None:
    queue = core.by_destination.get(name)
    if queue is None:
        target = parse_destination(name)
        for each in core.topic(target).subscribers if target.kind == TOPIC and core.blocks_topics else ():
            if each.kind == BACKLOG and each.policy.slow_consumer == BLOCK and each.transient >= _pending_max(each):
                return _destination_error(core, name, "pending_messages_max", each.policy, BLOCK)
        return None
    if queue.trims:
        return None
    policy = queue.policy
    full_policy = BLOCK if policy.full_policy == DROP_OLDEST else policy.full_policy  # it drops nothing
    if policy.messages_max and queue.depth >= policy.messages_max:
        return _destination_error(core, name, "messages_max", policy, full_policy)
    if policy.bytes_max and queue.size + queue.spooled_size >= policy.bytes_max:
        return _destination_error(core, name, "bytes_max", policy, full_policy)
    return None


def _destination_error(core: Core, name: str, value: str, policy: DestinationPolicy, full_policy: str) -> BrokerFull:
    limit = getattr(policy, value)
    inherited = {"messages_max": ("limits.queue_messages_max", core.limits.queue_messages_max)}
    field, default = inherited.get(value, ("", None))
    text = field if limit == default else f"policy value {value}"
    error = BrokerFull(f"{name} has no room: {text} is {limit}; consume messages, or raise the limit")
    error.full_policy = full_policy
    return error


# ---- what is dropped


def trim(queue: Queue) -> None:
    """Drop ready messages of a queue, as its policy says, until there are no more than it may have."""
    lowest = queue.kind == BACKLOG and queue.policy.slow_consumer == DROP_LOWEST_PRIORITY
    choosing = queue.choosing
    while _too_many(queue):
        if choosing is not None:
            if queue.page is not None:  # what is read may be older; this is called again when it is here
                return
            skipped = choosing.skipped
            if skipped is not None and _may_be_older(skipped, queue.window.first_order(skipped)):
                queue.read_from(skipped)
                queue.request_page()
                return
        if not queue.window:
            if queue.tail is not None:
                queue.request_page()
            return
        assert isinstance(queue.window, SortedWindow)
        entry = _victim(queue.window, lowest)
        queue.window.discard(entry.order)
        queue.counts.dropped += 1
        queue.forget(entry)


def _may_be_older(skipped: int, first: int) -> bool:
    """Whether something that a choosy queue has left to the store may be older than the first one of its window."""
    return skipped <= first or skipped >> SEQUENCE_BITS != first >> SEQUENCE_BITS


def _pending_max(queue: Queue) -> int:
    return queue.policy.pending_messages_max


def _too_many(queue: Queue) -> bool:
    policy = queue.policy
    if queue.kind == BACKLOG:
        return queue.transient > _pending_max(queue)
    if policy.messages_max and queue.depth > policy.messages_max:
        return True
    return bool(policy.bytes_max) and queue.size + queue.spooled_size > policy.bytes_max and queue.depth > 1


def _victim(window: SortedWindow, lowest: bool) -> Entry:
    """The oldest message (of the lowest priority); of those in memory."""
    entry: Entry | None = window.first()
    last = window.last().order >> SEQUENCE_BITS
    if lowest:
        entry = window.after(last << SEQUENCE_BITS)
    assert entry is not None
    oldest = entry
    while (level := entry.order >> SEQUENCE_BITS) < last:
        entry = window.after((level + 1) << SEQUENCE_BITS)
        assert entry is not None
        if entry.order & SEQUENCE_MASK < oldest.order & SEQUENCE_MASK:
            oldest = entry
    return oldest


def overrun(core: Core, queue: Queue) -> None:
    """A plain subscriber of a topic, or of a temporary one, has more waiting than it may: it is told so and closed, where
    its policy does not say otherwise.
    """
    if queue.policy.slow_consumer != DISCONNECT:
        return
    limit = _pending_max(queue)
    field = (
        "limit limits.backlog_messages_max"
        if limit == core.limits.backlog_messages_max
        else "policy value pending_messages_max"
    )
    text = f"subscription to {queue.destination} is {limit} messages behind ({field}): read faster"
    if queue.kind == BACKLOG:
        text += ", or make it durable"
    for consumer in queue.consumers:
        if core.watched:
            core.advisories.slow_consumer(consumer)
        core.closing.append((consumer, SlowConsumer(text)))
