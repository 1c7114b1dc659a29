"""Looking into a queue page by page, and moving what is found there. A part of `Core`.

A page is read from the store and the spool as committed, so nothing is shown before its commit; what only memory has is noted
when the page is asked for. A *cursor* says where the next page starts, and which messages came after the first one was asked
for: nothing else is kept between two pages, so a slow reader holds nothing, and a cursor is good in the next life of the core,
too. A message has one place in its queue for all time: so no page shows what an earlier one has shown, and none passes over
what was there all the time.

To move is to delete and to put in one turn, and so in one batch: a crash neither loses a message nor leaves two. Only ready
messages are taken; what a consumer or a transaction has stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import TYPE_CHECKING, Any, NamedTuple

from pybroker.core.entry import STRANDED, Entry
from pybroker.core.loading import message_of
from pybroker.core.queue import Queue
from pybroker.core.retiring import forget_unloaded
from pybroker.destination import QUEUE, parse_destination
from pybroker.errors import BrokerFull, InvalidDestination
from pybroker.message import Message
from pybroker.operations import LEVELS, SEQUENCE_BITS, SEQUENCE_MASK, DueEntry, StoredEntry

if TYPE_CHECKING:
    from pybroker.core.broker import Core

Matches = Callable[[Message], bool]
Place = tuple[
    Entry | None, StoredEntry | None, bool
]  # where a message was found: in memory, or a row (True: of the store)


class Cursor(NamedTuple):
    """Where a page starts. `stop`: the sequence from which on messages came after the first page was asked for."""

    queue_id: int
    position: int
    stop: int


@dataclass(frozen=True, slots=True)
class Browsed:
    """A message as it stands in its queue. `outstanding`: with a consumer or in a transaction, or waiting to be delivered again."""

    message: Message
    deliveries: int
    outstanding: bool


@dataclass(slots=True, eq=False)
class BrowsePage:
    """What one page brought; `cursor` is where the next one starts, None at the end.

    unread       messages that could not be read, and so are not shown
    moved        messages that were purged, moved or copied; `outstanding`: those that would have been, but are not ready
    stayed       messages that have no way to where they should go
    refused      why the target takes no more
    """

    messages: list[Browsed] = field(default_factory=list)
    cursor: Cursor | None = None
    unread: int = 0
    moved: int = 0
    outstanding: int = 0
    stayed: int = 0
    refused: BrokerFull | None = None


@dataclass(frozen=True, slots=True)
class Moving:
    """What happens to the ready messages of a page. `target`: the queue that they go to, None = they are deleted.

    `way`: says for each message what goes where instead of `target`, None = it stays where it is.
    """

    target: Queue | None
    keep: bool = False  # they also stay where they are
    way: Callable[[Message], tuple[Message, Callable[[Message], object]] | None] | None = None


class BrowseRequest:
    """Read a page of a queue, ready and outstanding messages alike; what it brings is put into `page`, which is then confirmed.

    in_memory  order to entry: what only memory had when it was asked for
    bound      the page may reach only below it: memory has more than a page of it
    """

    __slots__ = (
        "bound",
        "count_max",
        "cursor",
        "in_memory",
        "limit",
        "matches",
        "moving",
        "page",
        "queue",
        "sink",
        "size_max",
    )

    def __init__(
        self, queue: Queue, cursor: Cursor, matches: Matches | None, limit: int, moving: Moving | None, sink: Any
    ) -> None:
        limits = queue.core.limits
        self.queue = queue
        self.cursor = cursor
        self.matches = matches
        self.limit = limit
        self.moving = moving
        self.sink = sink
        self.count_max = min(limits.browse_messages_max, max(queue.count, queue.transient, 1))
        self.size_max = limits.browse_bytes_max
        self.in_memory: dict[int, Entry] = {}
        self.bound: int | None = None
        self.page = BrowsePage()


class Removals:
    """The orders that have left a queue since the first of `readers` pages was asked for, by which something is to be moved."""

    __slots__ = ("orders", "readers")

    def __init__(self) -> None:
        self.orders: set[int] = set()
        self.readers = 0


def browse(
    core: Core,
    destination: str,
    sink: Any,
    *,
    cursor: Cursor | None = None,
    matches: Matches | None = None,
    limit: int = 0,
    moving: Moving | None = None,
) -> BrowsePage:
    """Ask for a page of a queue, from the start or from a cursor on; it is filled when it is confirmed to `sink`.

    `limit`: messages that match, at most; 0 = as many as a page has. Raises InvalidDestination. A queue that is not there is empty.
    """
    queue = find(core, destination)
    if queue is None or (cursor is not None and cursor.queue_id != queue.queue_id):
        page = BrowsePage()
        core.confirm((sink, page))
        return page
    cursor = cursor or Cursor(queue.queue_id, 0, queue.next_sequence)
    request = BrowseRequest(queue, cursor, matches, limit, moving, sink)
    if queue.transient:
        _note_memory(request)
    if moving is not None:
        queue.removals = queue.removals or Removals()
        queue.removals.readers += 1
        core.shared.read_began()
    core.held.append(request)
    return request.page


def moving(core: Core, source: str, target: str | None, *, keep: bool = False) -> Moving:
    """What `browse` is to do with the ready messages of `source`: delete them, or (`target`) move or (`keep`) copy them.

    The target is made when it isn't there. Raises InvalidDestination, LimitExceeded.
    """
    found = find(core, source)
    if target is None:
        return Moving(None)
    find(core, target)
    if parse_destination(source) == parse_destination(target):
        raise InvalidDestination(f"{source} can't be moved or copied into itself: name another queue")
    return Moving(core.queue(parse_destination(target)) if found is not None else None, keep)


def find(core: Core, destination: str) -> Queue | None:
    """The queue of that name, None when there is none. Raises InvalidDestination for anything but the name of a queue."""
    target = parse_destination(destination)
    if target.kind != QUEUE or target.is_pattern:
        raise InvalidDestination(f"{destination} can't be looked into: name one queue, as /queue/NAME")
    return core.by_destination.get(str(target))


def _note_memory(request: BrowseRequest) -> None:
    queue = request.queue
    start = request.cursor.position
    where = [*queue.outstanding.values(), *queue.window, *(queue.page.added.values() if queue.page else ())]
    found = [entry for entry in where if not entry.stored and not entry.spooled and entry.order >= start]
    size = 0
    for count, entry in enumerate(nsmallest(request.count_max + 1, found, key=lambda entry: entry.order)):
        size += entry.message.size
        if count == request.count_max or (size > request.size_max and count):
            request.bound = entry.order
            return
        request.in_memory[entry.order] = entry


def browse_loaded(
    core: Core,
    request: BrowseRequest,
    stored: list[StoredEntry],
    transient: list[StoredEntry],
    bound: int | None,
    unread: Collection[int] = (),
) -> None:
    """Take what was read for a request: all messages from its start on and below `bound` (None = to the end).

    `unread`: the orders of those that could not be read, which may be beyond it.
    """
    queue = request.queue
    page = request.page
    removals = queue.removals
    if request.bound is not None:
        bound = request.bound if bound is None else min(bound, request.bound)
    if queue.queue_id in core.queues:
        found: dict[int, Place] = {row.order: (None, row, True) for row in stored}
        found |= {row.order: (None, row, False) for row in transient}
        found |= {order: (entry, None, False) for order, entry in request.in_memory.items()}
        orders = sorted(found)
        bound = _cut(request, orders, found, bound)
        page.cursor = _next(request.cursor, bound)
        for order in orders:
            if (bound is not None and order >= bound) or not _take(core, request, order, found[order]):
                break
        end = page.cursor.position if page.cursor is not None else LEVELS << SEQUENCE_BITS
        page.unread = sum(order < end and order & SEQUENCE_MASK < request.cursor.stop for order in unread)
    if request.moving is not None:
        assert removals is not None
        removals.readers -= 1
        if not removals.readers:
            queue.removals = None
        core.shared.read_ended()
        if queue.available or queue.members:
            queue.dispatch()
    core.confirm((request.sink, page))


def _cut(request: BrowseRequest, orders: list[int], found: dict[int, Place], bound: int | None) -> int | None:
    """Where a page ends at the latest that is no larger than it may be, by count and by size; one message always may."""
    size = 0
    for at, order in enumerate(orders):
        entry, row, _ = found[order]
        size += entry.message.size if entry is not None else row.message.size  # type: ignore[union-attr]
        if at == request.count_max or (size > request.size_max and at):
            return order if bound is None else min(bound, order)
    return bound


def _next(cursor: Cursor, bound: int | None) -> Cursor | None:
    """Where the next page starts. What came later on a level is jumped over: a fast producer would never be caught up with."""
    if bound is None:
        return None
    if bound & SEQUENCE_MASK >= cursor.stop:
        bound = ((bound >> SEQUENCE_BITS) + 1) << SEQUENCE_BITS
    return cursor._replace(position=bound) if bound >> SEQUENCE_BITS < LEVELS else None


def _take(core: Core, request: BrowseRequest, order: int, place: Place) -> bool:
    """Show or move one message of a page; False when there is to be no more."""
    queue = request.queue
    page = request.page
    entry, row, _ = place
    message = entry.message if entry is not None else message_of(queue, row)  # type: ignore[arg-type]
    if order & SEQUENCE_MASK >= request.cursor.stop or (message.expires and message.expires <= core.now):
        return True
    if request.matches is not None and not request.matches(message):
        return True
    out = queue.outstanding.get(order)
    if request.moving is None:
        if request.limit and len(page.messages) >= request.limit:
            page.cursor = request.cursor._replace(position=order)
            return False
        known = out or queue.window.get(order) or entry
        page.messages.append(Browsed(message, _deliveries(queue, order, known, row), out is not None))
        return True
    if out is not None and out.state != STRANDED:
        page.outstanding += 1
        return True
    if request.limit and page.moved >= request.limit:
        page.cursor = request.cursor._replace(position=order)
        return False
    return _move(core, request, order, place, message)


def _deliveries(queue: Queue, order: int, known: Entry | None, row: StoredEntry | None) -> int:
    if known is not None:
        return known.deliveries
    if row is not None and row.deliveries is not None:
        return row.deliveries
    return int((order & SEQUENCE_MASK) < queue.dispatched[order >> SEQUENCE_BITS])


def _move(core: Core, request: BrowseRequest, order: int, place: Place, message: Message) -> bool:
    queue, moving = request.queue, request.moving
    assert moving is not None
    assert queue.removals is not None
    if order in queue.removals.orders:
        return True
    copy, put = None, None
    if moving.way is not None:
        found = moving.way(message)
        if found is None:
            request.page.stayed += 1
            return True
        copy, put = found
    elif moving.target is not None:
        copy, put = (
            message.moved_to(f"/queue/{moving.target.name}", expires=message.expires),
            _present(core, moving.target).accept,
        )
    if copy is not None:
        refused = core.full(copy, sent=False)
        if refused is not None:
            request.page.refused = refused
            request.page.cursor = request.cursor._replace(position=order)
            return False
    if not moving.keep and not _remove_ready(core, queue, order, place):
        return True
    request.page.moved += 1
    if not moving.keep:
        queue.counts.removed += 1
    if copy is not None and put is not None:
        put(copy)
    return True


def _present(core: Core, target: Queue) -> Queue:
    """The queue of that name as it is now: it may have been removed as idle while the page was read."""
    found = core.by_destination.get(str(target.destination))
    return core.add_named_queue(target.destination) if found is None else found


def _remove_ready(core: Core, queue: Queue, order: int, place: Place) -> bool:
    """Delete a ready message, wherever it stands; False when it isn't there any more."""
    entry = queue.window.discard(order)
    if entry is None and queue.page is not None:
        entry = queue.page.added.pop(order, None)
        if entry is not None:
            queue.page.added_size -= entry.message.size
    if entry is None and order in queue.outstanding:
        entry = queue.outstanding.pop(order)
        queue.stranded.remove(entry)
    if entry is not None:
        queue.forget(entry)
        return True
    _, row, stored = place
    if (unloaded := queue.unloaded) is None or order < unloaded:
        return False
    if row is None:  # it was in memory when the page was asked for, and is in the spool by now
        found = place[0]
        assert found is not None
        row = StoredEntry(order, found.message)
    due = DueEntry(row.message.expires, queue.queue_id, order, row.message.size, row.body_id, row.references)
    forget_unloaded(core, queue, due, stored)
    return True
