"""What the core asks the run time to read from the store, and what it did not yet know when it asked.

A request stands in the list of held effects: so it is carried out when everything that the core had emitted before it is
committed, and what it brings can only be out of date by what the core has recorded since.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pybroker.core.entry import Entry
from pybroker.operations import DueEntry, StoredEntry

if TYPE_CHECKING:
    from pybroker.core.queue import Queue


class PageRequest:
    """Read the ready messages of a queue from `start` on, from the store and the spool.

    added    entries that came at or behind `start` since the request, kept in memory
    floor    the lowest order that came since and was not kept: the page may reach only below it
    removed  orders at or behind `start` that went since
    """

    __slots__ = ("added", "added_size", "count_max", "floor", "queue", "removed", "size_max", "start")

    def __init__(self, queue: Queue, start: int, count_max: int, size_max: int) -> None:
        self.queue = queue
        self.start = start
        self.count_max = count_max
        self.size_max = size_max
        self.added: dict[int, Entry] = {}
        self.added_size = 0
        self.floor: int | None = None
        self.removed: set[int] = set()


@dataclass(frozen=True, slots=True)
class DueRequest:
    """Read the expiry index up to `now` (milliseconds since the Unix epoch), at most `count_max` rows.

    `after`: only rows behind this one (expires, queue id, order): those before it are outstanding, and stay.
    `whole`: ids of queues whose messages have to be read, too (`read_whole`), of `size_max` bytes together (one always is).
    """

    now: int
    count_max: int
    after: tuple[int, int, int] | None = None
    whole: frozenset[int] = frozenset()
    size_max: int = 0


Whole = dict[tuple[int, int], StoredEntry]  # by queue id and order


def read_whole(source: Any, rows: Iterable[DueEntry], request: DueRequest) -> Whole:
    """The messages that a request wants of the rows that were read for it. `source` reads pages, as a store does."""
    found: Whole = {}
    size = 0
    for row in rows:
        if row.queue_id in request.whole and (not found or size + row.size <= request.size_max):
            page = source.read_page(row.queue_id, row.order, 1, 1)
            if page.entries and page.entries[0].order == row.order:
                found[row.queue_id, row.order] = page.entries[0]
                size += row.size
    return found
