"""A queue: the place of messages, their window in memory, and their dispatch. A durable or plain subscription is one too.

Pure: no clock, no input or output. What must be stored is appended to the core's operations; deliveries are appended to its
effects. DESIGN.md sections 3 and 4. The rules that hold after every call are in `pybroker.core.invariants`.

Where an entry of a queue can be: *ready* below `tail` in the window; *ready* at or behind `tail` only in the store or the
spool (or, while a page is read, in the request's `added`); *outstanding* with a consumer or in a transaction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pybroker.core import loading
from pybroker.core.choosing import Choosing
from pybroker.core.consumer import Consumer
from pybroker.core.counts import QueueCounts
from pybroker.core.entry import GONE, HELD, READY, STRANDED, Entry
from pybroker.core.groups import may_be_grouped
from pybroker.core.kinds import BACKLOG, CONSUMED, DELETED, LINK, QUEUE, TEMPORARY
from pybroker.core.shared import SharedBody
from pybroker.core.sorted_window import SortedWindow
from pybroker.core.wildcard import Member, share
from pybroker.core.window import Window
from pybroker.destination import TOPIC, Destination
from pybroker.message import Message
from pybroker.operations import (
    DELETE_MESSAGE,
    PUT_DELIVERIES,
    PUT_MESSAGE,
    PUT_REFERENCE,
    SEQUENCE_BITS,
    SEQUENCE_MASK,
    QueueRecord,
    order_of,
)
from pybroker.selectors import compile_selector

if TYPE_CHECKING:
    from pybroker.core.broker import Core
    from pybroker.core.browsing import Removals
    from pybroker.core.links import Peer
    from pybroker.core.reads import PageRequest

HEAD_EVERY = 4_096  # removals after which the lower bound of a queue is worked out anew


class Queue:
    """One queue of one of the kinds above."""

    __slots__ = (
        "_removals",
        "available",
        "choosing",
        "client_id",
        "consumers",
        "core",
        "count",
        "counts",
        "delayed",
        "delayed_size",
        "dirty",
        "dispatched",
        "head",
        "is_dead_letter_queue",
        "kind",
        "members",
        "name",
        "next_sequence",
        "outstanding",
        "page",
        "policy",
        "queue_id",
        "removals",
        "routes",
        "selector",
        "size",
        "spooled",
        "spooled_size",
        "spread",
        "stalled",
        "stranded",
        "subscription",
        "tail",
        "transient",
        "trims",
        "unread",
        "window",
    )

    def __init__(self, core: Core, record: QueueRecord) -> None:
        self.core = core
        self.queue_id = record.queue_id
        self.kind = record.kind
        self.name = record.name
        self.client_id = record.client_id
        self.subscription = record.subscription
        named = self.kind not in (LINK, TEMPORARY)
        self.policy = core.policies.of(self.destination) if named else core.policies.base
        self.is_dead_letter_queue = self.kind == QUEUE and core.policies.is_dead_letter_queue(self.destination)
        self.trims = core.trims(self)
        if self.policy.dead_letter_expired and self.kind != LINK:
            core.expiring.add(self.queue_id)
        self.selector = compile_selector(record.selector) if record.selector else None  # of a subscription
        self.next_sequence = record.next_sequence
        self.count = record.count  # stored messages, ready or outstanding
        self.size = record.size  # bytes of these
        self.head = record.head  # lower bound of the order of all stored messages
        self.dispatched = list(record.dispatched)
        self.transient = 0  # messages that are not stored
        self.spooled = 0  # how many of these are in the spool
        self.spooled_size = 0  # and their bytes
        self._removals = 0
        self.dirty = False  # the descriptor in the store is out of date
        self.window: Window | SortedWindow = SortedWindow() if self.trims else Window()
        self.tail: int | None = record.head if record.count else None
        self.page: PageRequest | None = None
        self.removals: Removals | None = None  # what goes while somebody moves messages
        self.outstanding: dict[int, Entry] = {}
        self.consumers: dict[Consumer, None] = {}  # in the order in which they subscribed
        self.members: tuple[Member, ...] = ()  # those of `consumers` that are parts of a consumer of several queues
        self.choosing: Choosing | None = None  # while not every consumer may take every message
        self.available: deque[Consumer] = deque()  # consumers that may be given something, next one first
        # orders of stored messages that could not be read; behind UNREAD_MAX they are only counted
        self.unread: set[int] = set()
        self.routes: dict[Peer, tuple[int, frozenset[str]]] | None = None  # who of the network wants its messages
        self.stranded: list[Entry] = []  # those of `outstanding` that are at the hop limit
        self.delayed: dict[int, Entry] = {}  # those of `outstanding` that wait for their redelivery
        self.delayed_size = 0
        self.stalled: dict[Consumer, None] | None = None  # so much waits; who could be given something meanwhile
        self.spread = False  # what is sent to it may go elsewhere, too
        self.counts = QueueCounts()

    @property
    def destination(self) -> Destination:
        """What it is a queue of; for a subscription the topic (or pattern)."""
        return Destination(QUEUE if self.kind == QUEUE else TOPIC, self.name)

    @property
    def depth(self) -> int:
        """Messages in the queue, ready and outstanding."""
        return self.count + self.transient

    @property
    def unloaded(self) -> int | None:
        """From which order on ready messages may be in the store or the spool only; None = memory has them all."""
        passed = self.choosing.skipped if self.choosing is not None else None
        return self.tail if passed is None else passed

    def record(self) -> QueueRecord:
        """The descriptor as it is to be stored with everything emitted so far."""
        return QueueRecord(
            self.queue_id,
            self.kind,
            self.name,
            self.client_id,
            self.subscription,
            self.next_sequence,
            self.count,
            self.size,
            self.head,
            tuple(self.dispatched),
            "" if self.selector is None else self.selector.text,
        )

    # ---- messages come

    def accept(self, message: Message, shared: SharedBody | None = None) -> None:
        """Put a new message at its place, and dispatch."""
        core = self.core
        self.counts.enqueued += 1
        straight_on = self.routes is not None and not self.available and self.tail is None and not self.window
        if straight_on and shared is None and self.choosing is None and core.links.pass_on(self, message):
            return
        sequence = self.next_sequence
        self.next_sequence = sequence + 1
        order = sequence if self.kind == LINK else order_of(message.priority, sequence)
        if message.durable and self.kind != BACKLOG:
            entry = Entry(message, order, self, True, shared)
            if shared is None:
                core.operations.append((PUT_MESSAGE, self.queue_id, order, message))
            else:
                core.operations.append(
                    (PUT_REFERENCE, self.queue_id, order, shared.body_id, message.expires, message.size)
                )
            if not self.count or order < self.head:
                self.head = order
            self.count += 1
            self.size += message.size
            core.stored_bytes += message.size
            if not self.dirty:
                core.touch(self)
        else:
            entry = Entry(message, order, self, False)
            self.transient += 1
            if message.expires:
                core.expiries.add(entry)
        route = message.route
        if route is not None and route.deliveries and self.kind == QUEUE:
            self._count_earlier(entry, route.deliveries)
        core.hold(entry)
        if (
            self.available
            and self.tail is None
            and not self.window
            and self.choosing is None
            and not (message.header_block and may_be_grouped(message))
        ):
            self._deliver(entry)
        else:
            self.insert(entry)
            if self.available or self.routes is not None or self.choosing is not None or self.members:
                self.dispatch()
            elif core.watched and not self.consumers and self.kind == QUEUE:
                core.advisories.no_consumer(message)
            if self.trims:
                core.trim(self)

    def _count_earlier(self, entry: Entry, deliveries: int) -> None:
        """It was delivered elsewhere before it came here."""
        entry.deliveries = deliveries
        if entry.stored:
            self.core.operations.append((PUT_DELIVERIES, self.queue_id, entry.order, deliveries))
            entry.recorded = True

    def insert(self, entry: Entry) -> None:
        """Put a ready entry that memory holds into the window, or leave it behind the tail."""
        tail = self.tail
        if tail is not None and entry.order >= tail:
            if self.choosing is not None:
                self.choosing.came(entry.order)
            page = self.page
            if page is not None and entry.order >= page.start:
                if page.floor is None and page.added_size < page.size_max and len(page.added) < page.count_max:
                    page.added[entry.order] = entry
                    page.added_size += entry.message.size
                    return
                page.floor = entry.order if page.floor is None else min(page.floor, entry.order)
                page.removed.discard(entry.order)
            self.leave_to_store(entry)
            return
        window = self.window
        window.add(entry)
        if self.choosing is not None:
            self.choosing.came(entry.order)
            return
        limits = self.core.limits
        if len(window) > limits.window_messages_max or (window.size > limits.window_bytes_max and len(window) > 1):
            # a quarter at once, so that cutting costs little for each
            self.shrink(limits.window_messages_max * 3 // 4, limits.window_bytes_max)

    def shrink(self, count_keep: int, size_keep: int) -> None:
        """Leave the end of the window to the store and the spool."""
        choosing = self.choosing
        if choosing is not None and choosing.shrink(count_keep, size_keep):
            return
        for entry in self.window.cut(count_keep, size_keep):
            self.tail = entry.order
            self.leave_to_store(entry)
        if choosing is not None and self.tail is not None:
            choosing.cut(self.tail)

    def leave_to_store(self, entry: Entry) -> None:
        if not entry.stored and not entry.spooled:
            self.core.spool(entry)
        if entry.deliveries != self.deliveries_without_record(entry) or entry.recorded:
            # It comes back by a page: its deliveries must be found there.
            where = self.core.operations if entry.stored else self.core.spool_operations
            where.append((PUT_DELIVERIES, self.queue_id, entry.order, entry.deliveries))
        if entry.message.expires and not entry.stored:
            self.core.expiries.discard(entry)  # the spool's own index has it now
        entry.state = GONE
        self.core.let_go(entry)

    def read_from(self, order: int) -> None:
        """Leave what the window has from `order` on to the store and the spool: the queue is read again from there."""
        leaving = [entry for entry in self.window if entry.order >= order]
        self.tail = order
        for entry in reversed(leaving):
            self.window.discard(entry.order)
            self.leave_to_store(entry)
        if self.choosing is not None:
            self.choosing.cut(order)

    def deliveries_without_record(self, entry: Entry) -> int:
        """What a page finds for an entry that has no delivery record: once, if the mark has passed it."""
        if not entry.stored:
            return 0
        return int((entry.order & SEQUENCE_MASK) < self.dispatched[entry.order >> SEQUENCE_BITS])

    # ---- messages are given out

    def dispatch(self) -> None:
        """Give out ready messages while there is somebody to take them: round robin over the consumers with credit."""
        if self.members:
            share(self)
        if self.choosing is not None:
            self.choosing.dispatch()
            return
        window = self.window
        available = self.available
        while available:
            if not window:
                if self.tail is not None:
                    self.request_page()
                return
            entry = window.pop_first()
            if entry.message.header_block and may_be_grouped(entry.message) and self.kind in CONSUMED:
                window.add(entry)
                Choosing(self).dispatch()
                return
            expires = entry.message.expires
            if expires and expires <= self.core.now:
                self.core.expire(entry)
                continue
            self._deliver(entry)
        if self.routes is not None:
            self.core.links.forward(self)

    def _deliver(self, entry: Entry, consumer: Consumer | None = None) -> None:
        available = self.available
        if consumer is None:
            consumer = available[0]
        core = self.core
        order = entry.order
        tag = consumer.last_tag + 1
        consumer.last_tag = tag
        entry.consumer = consumer
        entry.tag = tag
        consumer.unacked[tag] = entry
        self.outstanding[order] = entry
        consumer.credit -= 1
        consumer.size += entry.message.size
        if consumer.credit <= 0 or consumer.size >= consumer.size_max:
            available.remove(consumer)
            consumer.listed = False
            if consumer.head is not None:
                consumer.head.spent(consumer)
        elif len(available) > 1:
            available.rotate(-1)
        if entry.stored:
            # ahead: the mark would be for what it passes, too
            ahead = self.choosing is not None and self.choosing.passed_over(order)
            if entry.deliveries or entry.recorded or ahead:  # a record of 0, too, would go before the mark
                core.operations.append((PUT_DELIVERIES, self.queue_id, order, entry.deliveries + 1))
                entry.recorded = True
            if not ahead:
                self._count_dispatched(order)
            entry.state = HELD
            consumer.holding += 1
            core.held.append(entry)
        elif consumer.holding or entry.message.durable:
            # Behind what waits for the journal, so that one producer's order stays; and a durable message of a topic
            # is shown to a plain subscriber no sooner than its commit.
            entry.state = HELD
            consumer.holding += 1
            core.held.append(entry)
        else:
            entry.state = HELD  # until the end of the turn: who leaves within it has not seen it
            core.instant.append(entry)
        if self.tail is not None and self.page is None and len(self.window) < core.page_below:
            self.request_page()

    def _count_dispatched(self, order: int) -> None:
        level = order >> SEQUENCE_BITS
        sequence = order & SEQUENCE_MASK
        if sequence >= self.dispatched[level]:
            self.dispatched[level] = sequence + 1
            if not self.dirty:
                self.core.touch(self)

    def list_consumer(self, consumer: Consumer) -> None:
        """Let a consumer that is able again take part in the dispatch."""
        if not consumer.listed and consumer.able:
            if self.stalled is not None:
                self.stalled[consumer] = None
                return
            consumer.listed = True
            self.available.append(consumer)
            if self.stranded:
                self._unstrand()

    def unlist_consumer(self, consumer: Consumer) -> None:
        if consumer.listed:
            consumer.listed = False
            self.available.remove(consumer)
            if self.choosing is not None:
                self.choosing.unlisted(consumer)

    def _unstrand(self) -> None:
        """There is somebody here for what can't be forwarded any more."""
        stranded, self.stranded = self.stranded, []
        for entry in stranded:
            if entry.state == STRANDED:
                del self.outstanding[entry.order]
                entry.state = READY
                self.insert(entry)

    # ---- messages go, or come back

    def settle(self, entry: Entry) -> None:
        """Take an outstanding entry from its consumer, whose credit it gives back; the entry stays outstanding."""
        consumer = entry.consumer
        assert consumer is not None
        del consumer.unacked[entry.tag]
        consumer.credit += 1
        consumer.size -= entry.message.size
        if not consumer.listed:
            self.list_consumer(consumer)

    def remove(self, entry: Entry) -> None:
        """An outstanding (settled) entry is done with."""
        del self.outstanding[entry.order]
        self.forget(entry)

    def forget(self, entry: Entry) -> None:
        """Remove an entry for good that stands in none of the queue's collections any more."""
        core = self.core
        entry.state = GONE
        if entry.stored:
            core.operations.append((DELETE_MESSAGE, self.queue_id, entry.order, entry.message.expires, entry.recorded))
            self.removed_stored(entry.order, entry.message.size, entry.message.expires)
            if entry.shared is not None:
                core.operations.append(core.shared.release(entry.shared))
        else:
            self.transient -= 1
            if entry.spooled:
                core.unspool(entry)
            if entry.message.expires:
                core.expiries.discard(entry)
                if core.due_removed is not None:
                    core.due_removed.add((self.queue_id, entry.order))
        if self.page is not None and entry.order >= self.page.start:
            self.page.removed.add(entry.order)
        if self.removals is not None:
            self.removals.orders.add(entry.order)
        core.let_go(entry)
        core.freed = True

    def removed_stored(self, order: int, size: int, expires: int) -> None:
        core = self.core
        self.count -= 1
        self.size -= size
        core.stored_bytes -= size
        if expires and core.due_removed is not None:
            core.due_removed.add((self.queue_id, order))
        self._removals += 1
        if self._removals >= HEAD_EVERY:
            self._removals = 0
            self.head_at_least(order_of(0, self.next_sequence) if self.tail is None else self.tail)
        if not self.dirty:
            core.touch(self)

    def put_back(self, entries: Iterable[Entry]) -> None:
        """Return settled entries to their places. Deliveries that were shown are counted; those past the limit move on."""
        core = self.core
        for entry in entries:
            del self.outstanding[entry.order]
            shown = entry.state != HELD
            holder = entry.consumer
            # A new object: the old one may stand in an outbox or in the held effects, and must mean nothing there.
            if not entry.stored and entry.message.expires:
                core.expiries.discard(entry)
            entry = entry.again()
            if not entry.stored and entry.message.expires:
                core.expiries.add(entry)
            entry.state = READY
            entry.consumer = None
            if shown:
                entry.deliveries += 1
                self.counts.redelivered += 1
                if core.dead_letter_due(entry):
                    core.dead_letter(entry, "deliveries")
                    continue
            expires = entry.message.expires
            if expires and expires <= core.now:
                core.expire(entry)
                continue
            if self.kind == DELETED:
                self.forget(entry)
            elif shown and core.redeliveries.delays(self, holder):
                core.redeliveries.hold(entry)
            else:
                self.insert(entry)

    # ---- pages: see loading.py

    request_page = loading.request_page
    page_loaded = loading.page_loaded
    empty = loading.empty

    # ---- its lower bound

    def head_at_least(self, start: int) -> None:
        """Raise the lower bound: nothing stored stands below `start`, the window, outstanding and unread ones apart."""
        if (unloaded := self.unloaded) is not None:
            start = min(start, unloaded)
        head = min(start, self.window.first_order(start), min(self.outstanding, default=start))
        if self.unread:  # they are to be found again, by the next life or when they are whole
            head = min(head, min(self.unread))
        if head > self.head:
            self.head = head
            if not self.dirty and self.kind != BACKLOG:
                self.core.touch(self)

    def __repr__(self) -> str:
        return f"<Queue {self.kind} {self.name!r} depth {self.depth}>"
