"""Schedules: messages that are sent at a later time (ActiveMQ's AMQ_SCHEDULED_* headers). A part of `Core`.

A message with such headers is put here instead of its destination, in the batch that confirms it. When it is due, one batch takes
it from here (or moves it to its next time) and sends it: so neither a crash nor a clock that jumps sends it twice or never.

Stored schedules in memory are those before `tail`, in order of time; the others are only in the store, and are read in pages as
messages of a queue are. Non-durable ones are all in memory.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import tzinfo
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from pybroker.core.cron import next_time
from pybroker.core.entry import ENTRY_BYTES
from pybroker.core.schedule_headers import JOB_ID, PREFIX, Terms, take_terms
from pybroker.errors import BrokerError, InvalidMessage, LimitExceeded
from pybroker.message import Message, mentions
from pybroker.operations import DELETE_SCHEDULE, PUT_SCHEDULE, Schedule, SchedulingRecord

if TYPE_CHECKING:
    from pybroker.core.broker import Core

Key = tuple[int, int]  # when it is due, and its number

SCHEDULE_WORK = 16  # taking one, or sending what is due and moving it on, takes as long as so many messages
_EXPIRES = b"expires:"


class SchedulesRequest:
    """Read stored schedules from `start` on. See `PageRequest`: what came or went since it was made stands here."""

    __slots__ = ("added", "added_size", "count_max", "floor", "removed", "size_max", "start")

    def __init__(self, start: Key, count_max: int, size_max: int) -> None:
        self.start = start
        self.count_max = count_max
        self.size_max = size_max
        self.added: dict[Key, Schedule] = {}
        self.added_size = 0
        self.floor: Key | None = None
        self.removed: set[Key] = set()


class ScheduleLookup:
    """Read the schedule of that number, which is to be cancelled. `done` is called with whether it was."""

    __slots__ = ("done", "number")

    def __init__(self, number: int, done: Callable[[bool], None]) -> None:
        self.number = number
        self.done = done


class ScheduleList:
    """Read up to `count_max` schedules from `start` on in order of time, to be shown: stored ones as they are committed.

    `done` is called with them, and with where the next ones start, None at the end.
    """

    __slots__ = ("count_max", "done", "start")

    def __init__(self, start: Key, count_max: int, done: Callable[[list[Schedule], Key | None], None]) -> None:
        self.start = start
        self.count_max = count_max
        self.done = done


class Schedules:
    """All schedules of one core.

    count, size  those in the store, and the bytes of their messages
    transient    those that are not durable
    tail         stored ones from this key on are not in memory; None: all are
    waiting      destination to those that are due and for which there is no room in it, in order
    changed      something is due sooner than was known when this was last set to False
    places       where something may be missing: the store could not read its index there
    """

    def __init__(self, core: Core, record: SchedulingRecord, zone: tzinfo) -> None:
        self.core = core
        self.zone = zone
        self.count = record.count
        self.size = record.size
        self.next_number = record.next_number
        self.tail: Key | None = (record.head, 0) if record.count else None
        self.page: SchedulesRequest | None = None
        self.transient = 0
        self.waiting: dict[str, deque[Schedule]] = {}
        self.held_up = 0  # how many these are
        self.held_size = 0  # bytes of their messages
        self.changed = False
        self.places: set[Key] = set()
        self.dirty = False  # the record in the store is out of date
        self._keys: list[Key] = []  # of stored ones in memory that are not due, or not known to be
        self._transient: list[Key] = []  # a heap of non-durable ones; may have keys of cancelled ones
        self._loaded: dict[int, Schedule] = {}  # all in memory but those in `page.added`
        self._bad: dict[int, int] = {}  # numbers of those that could not be read, and when they are due
        self._unread: Key | None = None  # none that could not be read is before it
        self._lookups = 0  # under way
        self._left: set[Key] = set()  # keys of stored ones that went since these began
        limits = core.limits
        self._count_max = max(limits.window_messages_max, 1)
        self._size_max = max(limits.window_bytes_max, 1)
        self._bytes = 0  # of messages of `_keys`
        self._round: list[str] = []  # destinations that are still to be tried before any of `waiting` is tried again
        self._written = 0  # bytes of messages that this release has sent or stored
        core.stored_bytes += self.size
        self._request_page()

    def __len__(self) -> int:
        return self.count + self.transient

    def record(self) -> SchedulingRecord:
        """As it is to be stored with everything emitted so far."""
        heads = [schedule.due for queue in self.waiting.values() for schedule in queue]
        heads += [key[0] for key in (*self._keys[:1], self.tail, self._unread) if key is not None]
        return SchedulingRecord(self.next_number, self.count, self.size, min(heads, default=0))

    @property
    def corrupt(self) -> int:
        """Stored ones that could not be read, and so are not sent; without those in `places`."""
        return len(self._bad)

    def in_memory(self) -> list[Schedule]:
        """All that memory has, in no order."""
        return [*self._loaded.values(), *(self.page.added.values() if self.page is not None else ())]

    # ---- schedules come

    def _terms(self, message: Message) -> tuple[Terms | None, bytes]:
        """What a message says of a schedule, and its header block without that. Raises InvalidMessage."""
        terms, block = take_terms(message.header_block)
        shortest = self.core.limits.schedule_period_min
        if terms is not None and terms.repeat and terms.period < shortest * 1_000:
            text = f"{terms.period} ms between two sendings are too few: give a longer period, or lower the limit"
            raise LimitExceeded("limits.schedule_period_min", shortest, text)
        if terms is not None and terms.cron and next_time(terms.cron, self.core.now, self.zone) is None:
            raise InvalidMessage(f"the cron expression {terms.cron!r} has no time that ever comes")
        return terms, block

    def check(self, message: Message) -> None:
        """Raise what `take` would raise."""
        if self._terms(message)[0] is not None:
            self._check_room(1)

    def check_all(self, messages: list[Message]) -> list[Message]:
        """Those of the messages that `take` takes; raises what it would raise for one of them, all taken together."""
        found = [message for message in messages if self._takes(message)]
        if found:
            self._check_room(len(found))
        return found

    def _takes(self, message: Message) -> bool:
        if not mentions(message.header_block, PREFIX) or _expired(message, self.core.now):
            return False
        return self._terms(message)[0] is not None

    def _check_room(self, count: int) -> None:
        limit = self.core.limits.schedules_max
        if len(self) + count > limit:
            raise LimitExceeded(
                "limits.schedules_max", limit, "too many scheduled messages: cancel some, or raise the limit"
            )

    def take(self, message: Message) -> bool | None:
        """`Core.send` for a message that may have headers of a schedule; None, and nothing done, when it has none.

        So it is, too, for one that has expired: it goes where it would go without them, and expires in each of these places.
        """
        if not mentions(message.header_block, PREFIX) or _expired(message, self.core.now):
            return None
        terms, block = self._terms(message)
        if terms is None:
            return None
        core = self.core
        core.work += SCHEDULE_WORK
        core.check_destination(message.destination)
        self._check_room(1)
        if not message.message_id:
            message.message_id = core.new_message_id()
        message.timestamp = core.now
        self._schedule(message, terms, block)
        return message.durable

    def _schedule(self, message: Message, terms: Terms, block: bytes) -> None:
        core = self.core
        if terms.cron:
            due = next_time(terms.cron, core.now, self.zone)
            assert due is not None
        else:
            due = core.now + (terms.delay or terms.period)
        kept = Message(
            message.destination,
            message.body,
            block,
            message.durable,
            message.priority,
            message.expires,
            message.message_id,
            message.timestamp,
        )
        delay = terms.delay if terms.cron else 0
        self._new(Schedule(self._number(), due, kept, terms.repeat, terms.period, terms.cron, delay))

    def _number(self) -> int:
        self.next_number += 1
        return self.next_number - 1

    def _new(self, schedule: Schedule) -> None:
        if schedule.message.durable:
            self.count += 1
            self.size += schedule.message.size
            self.core.stored_bytes += schedule.message.size
            self._put(schedule, 0)
        else:
            self.transient += 1
        self._place(schedule)

    def _put(self, schedule: Schedule, due_before: int) -> None:
        self.core.operations.append((PUT_SCHEDULE, schedule, due_before))
        self._written += schedule.message.size
        if due_before:
            self._left_its_place((due_before, schedule.number))
        self._touch()

    def _left_its_place(self, key: Key) -> None:
        """What is being read may still have a stored one there."""
        if self.page is not None and key >= self.page.start:
            self.page.removed.add(key)
        if self._lookups:
            self._left.add(key)

    def _touch(self) -> None:
        if not self.dirty:
            self.dirty = True
            self.core.dirty.append(self)

    def _place(self, schedule: Schedule) -> None:
        """Put one where it belongs in order of time: into memory, or leave it to the store."""
        key = schedule.key
        if not schedule.message.durable:
            heappush(self._transient, key)
            self._load(schedule)
            self.changed = self.changed or self._transient[0] == key
            return
        if self.tail is not None and key >= self.tail:
            page = self.page
            if page is not None and key >= page.start:
                if page.floor is None and len(page.added) < page.count_max and page.added_size < page.size_max:
                    page.added[key] = schedule
                    page.added_size += schedule.message.size
                    self._count(schedule, 1)
                    return
                page.floor = key if page.floor is None else min(page.floor, key)
            return
        insort(self._keys, key)
        self._load(schedule)
        self._bytes += schedule.message.size
        self.changed = self.changed or self._keys[0] == key
        if len(self._keys) > self._count_max or self._bytes > self._size_max:
            self._cut(self._size_max)

    def _load(self, schedule: Schedule) -> None:
        self._loaded[schedule.number] = schedule
        self._count(schedule, 1)

    def _unload(self, schedule: Schedule) -> None:
        del self._loaded[schedule.number]
        self._count(schedule, -1)

    def _count(self, schedule: Schedule, sign: int) -> None:
        self.core.memory_bytes += sign * (schedule.message.size + ENTRY_BYTES)

    def _cut(self, size_keep: float) -> None:
        """Leave those that are due last to the store, but the first one: a quarter at once, and what is more than `size_keep`."""
        keep = self._count_max * 3 // 4 if len(self._keys) > self._count_max else self._count_max
        while len(self._keys) > 1 and (len(self._keys) > keep or self._bytes > size_keep):
            self.tail = self._keys.pop()
            schedule = self._loaded[self.tail[1]]
            self._bytes -= schedule.message.size
            self._unload(schedule)

    # ---- pages

    def _request_page(self) -> None:
        """Ask for the schedules behind those in memory, when these are few."""
        few = len(self._keys) <= self._count_max // 2 and self._bytes <= self._size_max // 2
        if self.page is None and self.tail is not None and (few or not self._keys):
            self.page = SchedulesRequest(self.tail, max(self._count_max // 2, 1), max(self._size_max // 2, 1))
            self.core.held.append(self.page)

    def loaded(
        self,
        request: SchedulesRequest,
        rows: Iterable[Schedule],
        bound: Key | None,
        unread: Iterable[Key] = (),
        places: Iterable[Key] = (),
    ) -> None:
        """Take what was read: all stored schedules from the request's start on and below `bound` (None = to the end).

        `unread` could not be read; from each of `places` on something may be missing.
        """
        assert request is self.page
        self.page = None
        self.changed = True
        if (
            self.tail is None or self.tail < request.start
        ):  # more was left to the store meanwhile: this does not join it
            for schedule in request.added.values():
                self._count(schedule, -1)
            self._request_page()
            return
        if request.floor is not None:
            bound = request.floor if bound is None else min(bound, request.floor)
        fresh: dict[Key, Schedule] = {}
        for row in rows:
            key = row.key
            if key not in request.removed and key not in request.added and row.number not in self._loaded:
                fresh[key] = row
                self._bad.pop(row.number, None)  # it was mended since it was read before
        self._pass_over(unread, places, request, bound)
        for key, schedule in request.added.items():
            self._count(schedule, -1)
            fresh[key] = schedule
        self.tail = bound
        for key in sorted(fresh):
            if bound is not None and key >= bound:
                break
            schedule = fresh[key]
            self._keys.append(key)
            self._load(schedule)
            self._bytes += schedule.message.size
        if len(self._keys) > self._count_max:
            self._cut(math.inf)  # not for its size: the same page would be read again at once
        self._request_page()

    def _pass_over(
        self, unread: Iterable[Key], places: Iterable[Key], request: SchedulesRequest, bound: Key | None
    ) -> None:
        """Remember what could not be read: no head is stored behind it, so that it is found when it has been mended."""
        bad = [key for key in unread if key not in request.removed and (bound is None or key < bound)]
        self._bad.update((number, due) for due, number in bad)
        unknown = [key for key in places if bound is None or key < bound]
        others = [key for key in self.places if key < request.start or (bound is not None and key >= bound)]
        self.places = {*others, *unknown}
        known = [self._unread] if self._unread is not None else []
        self._unread = min([*known, *bad, *unknown], default=None)

    # ---- schedules are due

    @property
    def next_due(self) -> int | None:
        """When `release` has something to do again, as far as memory knows; None: not before something changes."""
        if self.held_up >= self._count_max or self.held_size >= self._size_max:
            return None
        self._forget_cancelled()
        return min((keys[0][0] for keys in (self._keys, self._transient) if keys), default=None)

    def release(self, count_max: int) -> bool:
        """Send what is due, at most so many and the bytes of a window. True when there is more to be done at once."""
        self._written = 0
        more = self._release(count_max)
        self._request_page()
        return more

    def _release(self, count_max: int) -> bool:
        count = self._release_waiting(count_max)
        if self._round:
            return True
        now = self.core.now
        while (due := self.next_due) is not None and due <= now:
            if count >= count_max or self._written >= self._size_max:
                return True
            count += 1
            schedule = self._pop()
            destination = schedule.message.destination
            behind = self.waiting.get(destination)
            if behind is None and self._run(schedule):
                continue
            if behind is None:
                behind = self.waiting[destination] = deque()
            behind.append(schedule)
            self._hold_up(schedule, 1)
        return False

    def _hold_up(self, schedule: Schedule, sign: int) -> None:
        self.held_up += sign
        self.held_size += sign * schedule.message.size

    def _pop(self) -> Schedule:
        """The first one, which stays counted as in memory."""
        keys, transient = self._keys, self._transient
        if keys and (not transient or keys[0] < transient[0]):
            schedule = self._loaded[keys.pop(0)[1]]
            self._bytes -= schedule.message.size
            return schedule
        return self._loaded[heappop(transient)[1]]

    def _release_waiting(self, count_max: int) -> int:
        """Try again what found no room, each destination in order; returns how many were sent.

        At most so many tries: the next call goes on with `_round`, until each destination had its turn.
        """
        sent = 0
        if not self._round:
            self._round = list(reversed(self.waiting))
        for _ in range(count_max):
            if not self._round or self._written >= self._size_max:
                break
            destination = self._round[-1]
            queue = self.waiting.get(destination)  # None: what waited was cancelled
            if queue is not None and self._run(queue[0]):
                sent += 1
                self._hold_up(queue.popleft(), -1)
                if queue:
                    continue
                del self.waiting[destination]
            self._round.pop()
        return sent

    def _run(self, schedule: Schedule) -> bool:
        """Send a message that is due, and move its schedule on or take it away; False, and nothing done, if there is no room."""
        core = self.core
        successor = self._successor(schedule)
        begins = bool(schedule.cron and (schedule.delay or schedule.left))
        try:
            if begins:
                self._check_room(1)
            if self._no_room(schedule, successor, begins):
                return False
            if not begins:
                core.message_keys.send_anyway(_message(schedule, core.now))
                self._written += schedule.message.size
        except BrokerError:  # too many destinations, or the like: it is tried again
            return False
        self._unload(schedule)
        if successor is not None:
            if schedule.message.durable:
                self._put(successor, schedule.due)
            self._place(successor)
        else:
            self._forget(schedule.number, schedule.due, schedule.message)
        if begins:
            due = schedule.due + (schedule.delay or schedule.period)
            self._new(Schedule(self._number(), due, schedule.message, schedule.left, schedule.period))
        return True

    def _successor(self, schedule: Schedule) -> Schedule | None:
        """The same at its next time, in the future; None when this was the last one. Times that were missed are left out."""
        now = self.core.now
        if schedule.cron:
            due = next_time(schedule.cron, max(now, schedule.due), self.zone)
            return None if due is None else replace(schedule, due=due)
        if not schedule.left:
            return None
        due = schedule.due + schedule.period
        if due <= now:
            due += ((now - due) // schedule.period + 1) * schedule.period
        return replace(schedule, due=due, left=max(schedule.left - 1, -1))

    def _no_room(self, schedule: Schedule, successor: Schedule | None, begins: bool) -> bool:
        """Whether it has to wait. What is only moved takes no more of the store or the memory than before.

        A series that begins (`begins`) has no need of room at its destination yet.
        """
        core = self.core
        if core.memory_bytes > core.limits.memory_bytes_max:
            core.shrink()
        if core.disk_full or (successor is not None and core.full_broker() is not None):
            return True
        return not begins and core.limits_destinations and core.full_destinations(schedule.message) is not None

    # ---- schedules go

    def _forget(self, number: int, due: int, message: Message) -> None:
        """One is over that memory has no more."""
        if message.durable:
            self._removed(number, due, message.size)
        else:
            self.transient -= 1
        self.core.freed = True

    def _removed(self, number: int, due: int, size: int) -> None:
        core = self.core
        core.operations.append((DELETE_SCHEDULE, number, due))
        self.count -= 1
        self.size -= size
        core.stored_bytes -= size
        self._left_its_place((due, number))
        self._touch()

    def cancel(self, number: int) -> bool:
        """Take a schedule away; False when memory does not have it: `look_up` knows whether the store has."""
        schedule = self._loaded.get(number)
        if schedule is None:
            return False
        queue = self.waiting.get(schedule.message.destination)
        if queue is not None and schedule in queue:
            queue.remove(schedule)
            self._hold_up(schedule, -1)
            if not queue:
                del self.waiting[schedule.message.destination]
        elif schedule.message.durable:
            at = bisect_left(self._keys, schedule.key)
            del self._keys[at]
            self._bytes -= schedule.message.size
        self._unload(schedule)
        self._forget(number, schedule.due, schedule.message)
        self._forget_cancelled()
        self._request_page()
        return True

    def _forget_cancelled(self) -> None:
        """Drop keys of cancelled non-durable ones from the heap: at its top, and all when they are many."""
        heap = self._transient
        while heap and heap[0][1] not in self._loaded:
            heappop(heap)
        if len(heap) > 2 * self.transient + 64:
            self._transient = [key for key in heap if key[1] in self._loaded]
            heapify(self._transient)

    def look_up(self, lookup: ScheduleLookup) -> None:
        """Ask for a schedule that memory does not have, to cancel it."""
        self._lookups += 1
        self.core.held.append(lookup)

    def looked_up(self, lookup: ScheduleLookup, found: Schedule | None) -> None:
        """Take what the store had under the number of a lookup."""
        number = lookup.number
        self._lookups -= 1
        cancelled = self.cancel(number)
        if not cancelled and found is not None:
            cancelled = self._cancel_stored(found)
            if not cancelled:  # it was sent or cancelled while it was looked up, or has another time now
                self.look_up(lookup)
                return
        if not self._lookups:
            self._left.clear()
        lookup.done(cancelled)

    def _cancel_stored(self, found: Schedule) -> bool:
        """Take away one that memory does not have; False when it has left its place since it was looked up.

        One that is before `tail` should be in memory: it is not when its row of the index is bad or missing.
        """
        key = found.key
        if key in self._left:
            return False
        page = self.page
        added = page.added.pop(key, None) if page is not None else None
        if page is not None and added is not None:
            page.added_size -= added.message.size
            self._count(added, -1)
        self._removed(found.number, found.due, found.message.size)
        due = self._bad.pop(found.number, found.due)
        if due != found.due:  # the row has another time
            self.core.operations.append((DELETE_SCHEDULE, found.number, due))
        self.core.freed = True
        return True


def _expired(message: Message, now: int) -> bool:
    return bool(message.expires) and message.expires <= now


def _message(schedule: Schedule, now: int) -> Message:
    """What is sent: the id is a new one, and what it may live begins now."""
    message = schedule.message
    block = message.header_block
    expires = 0
    if message.expires:
        expires = now + message.expires - message.timestamp
        lines = block.split(b"\n")
        block = b"\n".join([b"expires:%d" % expires if line.startswith(_EXPIRES) else line for line in lines])
    block = b"%b:%d\n%b" % (JOB_ID.encode(), schedule.number, block)
    return Message(message.destination, message.body, block, message.durable, message.priority, expires)


def release_due(core: Core, count_max: int) -> bool:
    """Send scheduled messages that are due, at most so many. True when there are more."""
    return core.schedules.release(count_max)
