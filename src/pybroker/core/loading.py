"""How a queue gets back what memory left to the store and the spool: pages are asked for, and their rows become entries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pybroker.core.entry import Entry
from pybroker.core.kinds import DELETED, LINK, QUEUE
from pybroker.core.reads import PageRequest
from pybroker.message import Message
from pybroker.operations import Operation, StoredEntry

if TYPE_CHECKING:
    from pybroker.core.queue import Queue

UNREAD_MAX = 4_096  # orders of unreadable messages that a queue remembers; behind that they are only counted


def message_of(queue: Queue, row: StoredEntry) -> Message:
    """A row's message as its queue has it: what a virtual topic's queues share has the topic as its destination."""
    message = row.message
    if row.body_id and queue.kind == QUEUE:
        return message.moved_to(f"/queue/{queue.name}", expires=message.expires)
    return message


def from_store(queue: Queue, row: StoredEntry, stored: bool) -> Entry:
    """The entry of a row of the store, or else (`stored` False) of the spool; it stands in no collection yet."""
    core = queue.core
    message = message_of(queue, row)
    shared = core.shared.loaded_from_store(row.body_id, row.references) if row.body_id else None
    entry = Entry(message, row.order, queue, stored, shared)
    entry.spooled = not stored
    if row.deliveries is None:
        entry.deliveries = queue.deliveries_without_record(entry)
    else:
        entry.recorded = True
        entry.deliveries = row.deliveries
    if message.expires and not stored:
        core.expiries.add(entry)
    core.hold(entry)
    return entry


def knows(queue: Queue, order: int, page: PageRequest) -> bool:
    """Whether memory knows better than the page: it has the message, or has seen it go."""
    known = order in page.removed or order in page.added or order in queue.outstanding
    return known or order in queue.window


def count_unread(queue: Queue, order: int) -> None:
    """A stored message could not be read."""
    if order not in queue.unread:
        queue.counts.corrupt += 1
        if len(queue.unread) < UNREAD_MAX:
            queue.unread.add(order)


def request_page(queue: Queue) -> None:
    """Ask for the messages behind the window, unless that is under way."""
    if queue.page is None and queue.tail is not None:
        limits = queue.core.limits
        queue.page = PageRequest(
            queue, queue.tail, max(limits.window_messages_max // 2, 1), max(limits.window_bytes_max // 2, 1)
        )
        queue.core.read_page(queue.page)


def page_loaded(
    queue: Queue,
    entries: list[StoredEntry],
    transient: list[StoredEntry],
    bound: int | None,
    unread: Iterable[int] = (),
    mended: Iterable[tuple[int, Operation]] = (),
) -> None:
    """Take what was read: stored entries and spooled ones, each ascending; all there is below `bound` (None = all).

    `unread`: orders that could not be read. `mended`: what makes the store whole again that was read with values from
    elsewhere in the place of bad ones, for the order that each stands in; not carried out for what came or went since.
    """
    page = queue.page
    assert page is not None
    queue.page = None
    if queue.tail is None or queue.tail < page.start:  # the window was cut meanwhile: what was read doesn't join it
        for entry in page.added.values():
            queue.leave_to_store(entry)
        _go_on(queue)
        return
    if page.floor is not None:
        bound = page.floor if bound is None else min(bound, page.floor)
    for order, operation in mended:
        if not knows(queue, order, page):
            queue.core.mend(operation)
    for order in unread:
        if (bound is None or order < bound) and not knows(queue, order, page):
            count_unread(queue, order)
    fresh: dict[int, Entry] = {}
    for stored, found in ((True, entries), (False, transient)):
        for row in found:
            order = row.order
            if bound is not None and order >= bound:
                break
            if not knows(queue, order, page):
                fresh[order] = from_store(queue, row, stored)
    for order, entry in page.added.items():
        if bound is None or order < bound:
            fresh[order] = entry
        else:
            queue.leave_to_store(entry)
    queue.tail = bound
    queue.head_at_least(page.start)
    core = queue.core
    leaving = []
    insert = queue.insert if queue.choosing is None else queue.window.add  # a choosy one looks at them first
    for order in sorted(fresh):
        entry = fresh[order]
        if queue.kind == DELETED or core.dead_letter_due(entry):
            leaving.append(entry)
        else:
            insert(entry)
    # Only now, when the window has the others: a removal may work out the queue's lower bound anew.
    for entry in leaving:
        if queue.kind == DELETED:
            queue.forget(entry)
        else:
            core.dead_letter(entry, "deliveries")
    _go_on(queue)


def _go_on(queue: Queue) -> None:
    """A page is here."""
    if queue.kind == DELETED:
        queue.empty()
    elif queue.kind == LINK and queue in queue.core.links.releasing:
        queue.core.links.release(queue)
    else:
        queue.dispatch()
        if queue.trims:
            queue.core.trim(queue)


def empty(queue: Queue) -> None:
    """Remove everything that is ready, page by page; with kind DELETED the queue itself goes in the end."""
    while queue.window:
        queue.forget(queue.window.pop_first())
    if queue.tail is not None:
        queue.request_page()
    elif not queue.outstanding:
        queue.core.deleted(queue)
