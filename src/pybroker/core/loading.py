"""What a queue makes of rows that were read from the store or the spool. Decides nothing about what is given out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybroker.core.entry import Entry
from pybroker.destination import QUEUE
from pybroker.message import Message
from pybroker.operations import StoredEntry

if TYPE_CHECKING:
    from pybroker.core.queue import Queue
    from pybroker.core.reads import PageRequest

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
