"""Settling many deliveries at a time, and how many a consumer may hold: what the native protocol asks for. A part of `Core`."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pybroker.core import wildcard
from pybroker.core.consumer import CUMULATIVE, Consumer
from pybroker.core.entry import SENT, Entry
from pybroker.errors import TransactionError, UnknownDelivery

if TYPE_CHECKING:
    from pybroker.core.broker import Core
    from pybroker.core.queue import Queue

Ranges = Sequence[tuple[int, int]]  # of delivery tags: first, last, both included, rising
Settlements = Iterable[tuple[Consumer, Ranges]]


def acknowledge_each(entries: Iterable[Entry]) -> None:
    """Consumers are done with these deliveries, which may be of several queues."""
    queues: dict[Queue, None] = {}
    for entry in entries:
        queue = entry.queue
        queue.settle(entry)
        queue.remove(entry)
        queue.counts.acknowledged += 1
        queues[queue] = None
    for queue in queues:
        if queue.available or queue.members:
            queue.dispatch()


def acknowledge_ranges(core: Core, consumer: Consumer, ranges: Ranges) -> None:
    """The consumer is done with all deliveries of these ranges (CUMULATIVE: with all up to the last tag).

    What is outstanding is acknowledged in any case; raises UnknownDelivery when something named is not.
    """
    if consumer.ack_mode == CUMULATIVE:
        core.acknowledge(consumer, ranges[-1][1])
        return
    if consumer.members is not None:
        entries, unknown_tag = _find(consumer, ranges)
        acknowledge_each(entries)
        if unknown_tag is not None:
            raise _unknown(unknown_tag)
        return
    queue = consumer.queue
    unacked = consumer.unacked
    count = size = 0
    unknown: int | None = None
    for tags in _tags(unacked, ranges):
        for tag in tags:
            entry = unacked.get(tag)
            if entry is None or entry.state != SENT:
                unknown = tag if unknown is None else unknown
                continue
            del unacked[tag]
            count += 1
            size += entry.message.size
            queue.remove(entry)
    if count:
        consumer.credit += count
        consumer.size -= size
        queue.counts.acknowledged += count
        if not consumer.listed:
            queue.list_consumer(consumer)
        if queue.available:
            queue.dispatch()
    if unknown is not None:
        raise _unknown(unknown)


def reject_ranges(core: Core, consumer: Consumer, ranges: Ranges) -> None:
    """The consumer can't use these deliveries (CUMULATIVE: all up to the last tag): they go back to their places.

    What is outstanding is rejected in any case; raises UnknownDelivery when something named is not.
    """
    if consumer.ack_mode == CUMULATIVE:
        core.reject(consumer, ranges[-1][1])
        return
    entries, unknown = _find(consumer, ranges)
    if consumer.members is not None:
        wildcard.reject(consumer, entries)
    else:
        queue = consumer.queue
        for entry in entries:
            queue.settle(entry)
        queue.put_back(entries)
        queue.dispatch()
    if unknown is not None:
        raise _unknown(unknown)


def outstanding(core: Core, acks: Settlements, nacks: Settlements) -> tuple[list[Entry], list[Entry]]:
    """The deliveries that a transaction acknowledges and rejects.

    Raises TransactionError when one of them is not outstanding, or named twice.
    """
    found: set[Entry] = set()
    both: tuple[list[Entry], list[Entry]] = ([], [])
    for settlements, chosen in zip((acks, nacks), both, strict=True):
        for consumer, ranges in settlements:
            if consumer.ack_mode == CUMULATIVE:
                last = ranges[-1][1]
                entries, unknown = _find(consumer, [(last, last)])
                if entries:
                    entries = core.up_to(consumer, entries[0])
            else:
                entries, unknown = _find(consumer, ranges)
            if unknown is not None:
                raise TransactionError(f"the transaction was refused: {_unknown(unknown)}")
            for entry in entries:
                if entry in found:
                    raise TransactionError(f"the transaction was refused: it settles delivery {entry.tag} twice")
                found.add(entry)
            chosen += entries
    return both


def set_prefetch(core: Core, consumer: Consumer, prefetch: int) -> None:
    """From now on the consumer may hold so many messages, 0 = it is given none (at most `prefetch_max`)."""
    consumer.credit = min(prefetch, core.limits.prefetch_max) - len(consumer.unacked)
    if consumer.able:
        consumer.go_on()
    else:
        consumer.rest()


def _find(consumer: Consumer, ranges: Ranges) -> tuple[list[Entry], int | None]:
    """What of the ranges is outstanding, and the first tag that is not."""
    found = []
    unknown: int | None = None
    unacked = consumer.unacked
    for tags in _tags(unacked, ranges):
        for tag in tags:
            entry = unacked.get(tag)
            if entry is not None and entry.state == SENT:
                found.append(entry)
            elif unknown is None:
                unknown = tag
    return found, unknown


def _tags(unacked: dict[int, Entry], ranges: Ranges) -> Iterator[Iterable[int]]:
    """The tags of each range; of one that names more than there can be only those that are there, and one that is not."""
    budget = len(unacked)  # so that ranges without end cost no more than what is outstanding
    known: list[int] | None = None
    for first, last in ranges:
        count = last - first + 1
        if count <= budget:
            budget -= count
            yield range(first, last + 1)
            continue
        if known is None:
            known = sorted(unacked)
        tags = known[bisect_left(known, first) : bisect_right(known, last)]
        if len(tags) < count:
            tags.append(next((first + at for at, tag in enumerate(tags) if tag != first + at), first + len(tags)))
        yield tags


def _unknown(tag: int) -> UnknownDelivery:
    return UnknownDelivery(
        f"no delivery {tag} is outstanding on this subscription: it was acknowledged or rejected before, or never made"
    )
