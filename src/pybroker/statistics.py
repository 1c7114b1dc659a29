"""What a broker has at one moment, as frozen values. Owns their shape; asked for by `Broker.statistics`."""

from __future__ import annotations

from dataclasses import dataclass

from pybroker.core.queue import Queue


@dataclass(frozen=True, slots=True)
class DestinationStatistics:
    """One queue, durable subscription or subscriber's backlog. Counters since the broker opened its store.

    depth        messages in it, delivered and unacknowledged ones included; `stored` of them are on disk
    outstanding  delivered and not acknowledged; `delayed` of these wait for their redelivery, with nobody
    dropped      messages that a policy dropped: for others, of a slow subscriber, or instead of making them dead letters
    corrupt      stored messages that could not be read, and so are not delivered
    forwarded    messages that went to other brokers of the network
    removed      messages that were purged, or moved to another queue, by an operator
    ready        messages that nobody has
    bytes        of all messages in it that are stored or in memory: headers and bodies
    oldest_ms    when the oldest message arrived that is next in turn or with a consumer: milliseconds since the Unix epoch;
                 0 = there is none, or none in memory
    """

    kind: str
    name: str
    subscription: str
    depth: int
    stored: int
    stored_bytes: int
    in_memory: int
    outstanding: int
    delayed: int
    consumers: int
    enqueued: int
    acknowledged: int
    redelivered: int
    dead_lettered: int
    dropped: int
    expired: int
    corrupt: int
    forwarded: int
    removed: int
    ready: int
    bytes: int
    oldest_ms: int


@dataclass(frozen=True, slots=True)
class BrokerStatistics:
    """The broker at one moment. Sizes in bytes.

    unclaimed   messages to temporary destinations that nobody took: their owner was gone, or went with them waiting
    temporary_destinations  that clients of this broker have at present
    scheduled   messages that are to be sent later
    scheduled_corrupt  of these could not be read, and so are not sent; an unreadable place, whatever is there, counts as one
    advisories_suppressed  that were left out for `limits.advisories_per_second`
    duplicates  sends that their producers repeated, and that were not stored again
    dropped  non-durable messages that were lost with a leadership, or when the store failed and was opened again
    repaired values that were bad when they were to be read, and were fetched from another replica, in this leadership
    """

    name: str
    role: str
    listeners: tuple[str, ...]
    connections: int
    connections_refused: int
    memory_bytes: int
    stored_bytes: int
    spooled_bytes: int
    epoch: int
    lsn: int
    batches: int
    unrouted: int
    expired_on_arrival: int
    unclaimed: int
    temporary_destinations: int
    scheduled: int
    scheduled_corrupt: int
    advisories_suppressed: int
    duplicates: int
    dropped: int
    repaired: int
    full: str
    destinations: tuple[DestinationStatistics, ...]


def queue_statistics(queue: Queue) -> DestinationStatistics:
    """One queue's row."""
    return DestinationStatistics(
        kind=queue.kind,
        name=queue.name,
        subscription=f"{queue.client_id}/{queue.subscription}" if queue.subscription else "",
        depth=queue.depth,
        stored=queue.count,
        stored_bytes=queue.size,
        in_memory=len(queue.window) + len(queue.outstanding),
        outstanding=len(queue.outstanding),
        delayed=len(queue.delayed),
        consumers=len(queue.consumers),
        enqueued=queue.counts.enqueued,
        acknowledged=queue.counts.acknowledged,
        redelivered=queue.counts.redelivered,
        dead_lettered=queue.counts.dead_lettered,
        dropped=queue.counts.dropped,
        expired=queue.counts.expired,
        corrupt=queue.counts.corrupt,
        forwarded=queue.counts.forwarded,
        removed=queue.counts.removed,
        ready=queue.depth - len(queue.outstanding),
        bytes=_bytes(queue),
        oldest_ms=_oldest(queue),
    )


def _bytes(queue: Queue) -> int:
    """Stored ones by the queue's count; of the others those in memory and in the spool."""
    if not queue.transient:
        return queue.size
    added = queue.page.added.values() if queue.page is not None else ()  # while a page is read
    loose = [*queue.window, *queue.outstanding.values(), *added]
    size: int = sum(entry.message.size for entry in loose if not entry.stored and not entry.spooled)
    return queue.size + queue.spooled_size + size


def _oldest(queue: Queue) -> int:
    first = [queue.window.first()] if queue.window else []
    return min((entry.message.timestamp for entry in (*first, *queue.outstanding.values())), default=0)
