"""How messages leave without an acknowledgement: to the dead letters, or because they expired. A part of `Core`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pybroker.core import dead_letters
from pybroker.core.advisories import TOPIC_PREFIX
from pybroker.core.entry import STRANDED, Entry
from pybroker.core.forwarding import original
from pybroker.core.kinds import DELETED, LINK, SUBSCRIPTION
from pybroker.core.loading import from_store
from pybroker.core.queue import Queue
from pybroker.core.reads import DueRequest, Whole
from pybroker.destination import parse_destination
from pybroker.message import Message
from pybroker.operations import DELETE_MESSAGE, DELETE_QUEUE, DueEntry

if TYPE_CHECKING:
    from pybroker.core.broker import Core

DUE_ROWS_MAX = 1_000  # rows of the expiry index that one sweep reads at a time


def dead_letter_due(core: Core, entry: Entry) -> bool:
    queue = entry.queue
    limit = queue.policy.deliveries_max
    # On a link, to be sent again is no failed try.
    return bool(limit) and entry.deliveries >= limit and queue.kind != LINK and not queue.is_dead_letter_queue


def dead_letter(core: Core, entry: Entry, reason: str) -> None:
    """Move an entry, that stands in no collection of its queue, to the dead letters; or drop it, where a policy says so.

    An advisory is dropped: it is none of its own news, and its name may be one that nobody can send to.
    """
    queue = entry.queue
    if entry.message.destination.startswith(TOPIC_PREFIX):
        queue.forget(entry)
        queue.counts.dropped += 1
        return
    if queue.kind == LINK:
        message, subscription = original(entry.message), ""
        policy = core.policies.of(parse_destination(message.destination))
    else:
        message, policy = entry.message, queue.policy
        owned = queue.kind == SUBSCRIPTION
        subscription = dead_letters.owner_text(queue.client_id, queue.subscription) if owned else ""
    letter = dead_letters.letter(core, message, policy, reason, entry.deliveries, subscription)
    queue.forget(entry)
    if letter is None:
        queue.counts.dropped += 1
        return
    queue.counts.dead_lettered += 1
    if core.watched:
        core.advisories.dead_lettered(entry, reason)
    dead_letters.deliver(core, letter)


def expire(core: Core, entry: Entry) -> None:
    """Remove an expired entry that stands in no collection of its queue. It may be a dead letter, by policy."""
    queue = entry.queue
    queue.counts.expired += 1
    if core.watched and queue.kind != LINK:
        core.advisories.expired(entry.message.destination, entry.message)
    if queue.policy.dead_letter_expired and queue.kind not in (LINK, DELETED) and not queue.is_dead_letter_queue:
        dead_letter(core, entry, dead_letters.EXPIRED)
    else:
        queue.forget(entry)


def expire_on_arrival(core: Core, message: Message) -> bool:
    """A message has come that has expired already. True when the store will keep it, as a dead letter."""
    core.expired_on_arrival += 1
    if core.watched:
        core.advisories.expired(message.destination, message)
    target = parse_destination(message.destination)
    policy = core.policies.of(target)
    if not policy.dead_letter_expired or core.policies.is_dead_letter_queue(target):
        return False
    letter = dead_letters.letter(core, message, policy, dead_letters.EXPIRED, 0, "")
    if letter is None:
        return False
    dead_letters.deliver(core, letter)
    return letter.durable


def expire_held(core: Core, entries: list[Entry]) -> None:
    """Remove deliveries that expired before they could be shown; their consumers may be given others."""
    queues: dict[Queue, None] = {}
    for entry in entries:
        queue = entry.queue
        queue.settle(entry)
        del queue.outstanding[entry.order]
        core.expire(entry)
        queues[queue] = None
    for queue in queues:
        queue.dispatch()


def sweep(core: Core) -> None:
    """Remove what has expired by `now`, what is too old of producers, and idle queues; what the index knows is asked for."""
    core.producers.sweep()
    core.message_keys.sweep()
    core.redeliveries.release_due()  # as the clock may have been set
    core.idle.sweep()
    for entry in core.expiries.due(core.now):
        _expire_ready(core, entry.queue, entry.order)
    if core.due_removed is None:
        core.due_removed = set()
        core.shared.read_began()
        core.expiring &= core.queues.keys()
        core.held.append(_request(core, core.now, None))


def _request(core: Core, now: int, after: tuple[int, int, int] | None) -> DueRequest:
    return DueRequest(now, DUE_ROWS_MAX, after, frozenset(core.expiring), core.limits.window_bytes_max)


def _expire_ready(core: Core, queue: Queue, order: int) -> bool:
    """Expire a ready entry if memory has it; an outstanding one is looked at when it comes back."""
    entry = queue.window.discard(order)
    if entry is None and queue.page is not None:
        entry = queue.page.added.pop(order, None)
        if entry is not None:
            queue.page.added_size -= entry.message.size
    if entry is None:
        entry = queue.outstanding.get(order)
        if entry is None or entry.state != STRANDED:
            return entry is not None
        del queue.outstanding[order]
        queue.stranded.remove(entry)
    core.expire(entry)
    return True


def due_loaded(
    core: Core,
    request: DueRequest,
    rows: list[DueEntry],
    transient: list[DueEntry],
    whole: Whole | None = None,
    whole_transient: Whole | None = None,
) -> None:
    """Take what was read of the expiry index of the store and of the spool; ask for more where there is more.

    `whole`: messages that the request asked for. One that was not read is met again by the next sweep.
    """
    removed = core.due_removed or set()
    core.due_removed = None
    for stored, found, messages in ((True, rows, whole), (False, transient, whole_transient)):
        for row in found:
            queue = core.queues.get(row.queue_id)
            if queue is None or (row.queue_id, row.order) in removed or _expire_ready(core, queue, row.order):
                continue
            if (unloaded := queue.unloaded) is not None and row.order >= unloaded:
                if queue.policy.dead_letter_expired and not queue.is_dead_letter_queue:
                    read = (messages or {}).get((row.queue_id, row.order))
                    if read is not None:
                        core.expire(from_store(queue, read, stored))
                else:
                    _expire_unloaded(core, queue, row, stored)
    core.shared.read_ended()
    if max(len(rows), len(transient)) >= request.count_max:
        # Behind the last row of the index that ended first: the other one's rows are met again, which does no harm.
        ends = [found[-1] for found in (rows, transient) if len(found) >= request.count_max]
        last = min((row.expires, row.queue_id, row.order) for row in ends)
        core.due_removed = set()
        core.shared.read_began()
        core.held.append(_request(core, request.now, last))


def _expire_unloaded(core: Core, queue: Queue, row: DueEntry, stored: bool) -> None:
    queue.counts.expired += 1
    if core.watched and queue.kind != LINK:
        core.advisories.expired(str(queue.destination))
    forget_unloaded(core, queue, row, stored)


def forget_unloaded(core: Core, queue: Queue, row: DueEntry, stored: bool) -> None:
    """Remove a ready message for good that only the store (or else the spool) has."""
    operation = (DELETE_MESSAGE, queue.queue_id, row.order, row.expires, True)
    if stored:
        core.operations.append(operation)
        queue.removed_stored(row.order, row.size, row.expires)
        if row.body_id:
            body = core.shared.loaded_from_store(row.body_id, row.references)
            core.shared.hold(body)
            core.operations.append(core.shared.release(body))
            core.shared.let_go(body)
    else:
        core.spool_operations.append(operation)
        queue.transient -= 1
        core.count_spooled(queue, -1, -row.size)
        if row.expires and core.due_removed is not None:
            core.due_removed.add((queue.queue_id, row.order))
    if queue.page is not None and row.order >= queue.page.start:
        queue.page.removed.add(row.order)
    if queue.removals is not None:
        queue.removals.orders.add(row.order)
    core.freed = True


def drop_queue(core: Core, queue: Queue, entries: Iterable[Entry]) -> None:
    """Remove a queue of which nothing is stored, with what is in it. `entries`: those outstanding that nobody has any more."""
    core.redeliveries.release(queue)
    page = queue.page.added if queue.page is not None else {}
    for entry in [*entries, *queue.window, *page.values()]:
        queue.window.discard(entry.order)
        queue.outstanding.pop(entry.order, None)
        queue.forget(entry)
    page.clear()
    queue.stranded.clear()
    queue.tail = None
    if queue.choosing is not None:
        queue.choosing.cut(0)
    del core.queues[queue.queue_id]
    if queue.spooled:
        core.count_spooled(queue, -queue.spooled, -queue.spooled_size)
        core.spool_operations.append((DELETE_QUEUE, queue.queue_id))
        for entry in queue.outstanding.values():  # settled in transactions: not to be taken out of the spool again
            entry.spooled = False
