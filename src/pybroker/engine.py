"""The engine: drives the core, commits what it emits, and moves deliveries to the sinks. Owns no rule of messaging.

A *turn* is a number of calls on `core` without an await between them, then `end_turn`. DESIGN.md section 3. What is held
with a batch is released by the journal; a failed journal ends the engine (fail-stop), and its owner makes a new one.
"""

from __future__ import annotations

import logging
import math
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from zoneinfo import ZoneInfo

import trio

from pybroker.alarm import Alarm
from pybroker.config import BrokerConfig
from pybroker.core.broker import Core
from pybroker.core.browsing import BrowseRequest
from pybroker.core.consumer import Consumer
from pybroker.core.entry import HELD, SENT, Entry
from pybroker.core.reads import DueRequest, PageRequest, Whole, read_whole
from pybroker.core.schedules import SCHEDULE_WORK, ScheduleList, ScheduleLookup, SchedulesRequest
from pybroker.errors import BrokerClosed, BrokerError, BrokerFull, CorruptRecord
from pybroker.journal import Journal, LocalCommitter
from pybroker.mending import Fetch, Mender, Pages
from pybroker.message import Message
from pybroker.operations import DueEntry, Operation
from pybroker.spool import Spool
from pybroker.store.committer import Committer
from pybroker.store.store import Store

log = logging.getLogger("pybroker.engine")


def wall_clock_ms() -> int:
    """Milliseconds since the Unix epoch."""
    return time.time_ns() // 1_000_000


Read = PageRequest | DueRequest | BrowseRequest | SchedulesRequest | ScheduleLookup | ScheduleList


def random_life() -> str:
    """A name that no other engine ever had: what it forwards under it can't be taken for another's."""
    return secrets.token_hex(8)


class Sink(Protocol):
    """Where a connection's deliveries and confirmations go. No method blocks or raises."""

    touched: bool  # the engine will call `flush` at the end of the turn

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Take one delivery."""

    def confirm(self, token: Any) -> None:
        """Everything emitted before this token is committed."""

    def flush(self) -> None:
        """The turn is over: start moving what was taken."""

    def fail(self, error: BrokerError) -> None:
        """End the connection, and tell its owner why."""

    def fail_consumer(self, consumer: Consumer, error: BrokerError) -> None:
        """One subscription was ended by the broker: tell its owner why (a network connection ends whole)."""


class Engine:
    """One life of an open store. `epoch` is the leadership's: one opening of a store may see several."""

    def __init__(
        self,
        config: BrokerConfig,
        store: Store,
        spool: Spool,
        *,
        epoch: int = 0,
        committer: Committer | None = None,
        may_show: Callable[[], bool] | None = None,
        fetch: Fetch | None = None,
        clock_ms: Callable[[], int] = wall_clock_ms,
        life: Callable[[], str] = random_life,
    ) -> None:
        self.config = config
        self.store = store
        self.clock_ms = clock_ms
        self.core = Core(
            config.limits,
            config.delivery,
            first_id=store.first_unused_id,
            id_prefix=f"{store.store_id}-{store.starts:x}-{f'{epoch:x}-' if epoch else ''}",
            records=store.records,
            producers=store.producers,
            peers=store.peers,
            now=clock_ms(),
            network=config.network,
            network_name=config.network_name,
            life=life(),
            policies=config.policy,
            scheduling=store.scheduling,
            zone=ZoneInfo(config.delivery.cron_timezone),
            routing=config.routing,
            composites=config.composite,
        )
        self.journal = Journal(
            store, committer or LocalCommitter(store, config.sync), self.core.seal, self._release, spool.write
        )
        self.error: BrokerError | None = None  # why it can't be used any more
        self._may_show = may_show  # False: this process may not show or confirm anything any more (its lease is over)
        self.mender = Mender(fetch) if fetch is not None else None  # where there are other copies of the store
        self._spool = spool
        self._reader = trio.CapacityLimiter(1)
        self._reads_send, self._reads = trio.open_memory_channel[Read](float("inf"))
        self._touched: list[Sink] = []
        self._alarm = Alarm(
            lambda: self.clock_ms(), config.delivery.clock_check_interval
        )  # for what is due next in the core
        self._room = trio.Event()
        self._room_wanted = False
        self._schedules_changed = trio.Event()
        self._ended = trio.Event()

    # ---- turns

    def begin_turn(self) -> Core:
        """The core, with its time set. Raises what ended the engine."""
        if self.error is not None:
            raise self.error
        self.core.now = self.clock_ms()
        self.core.work = 0
        return self.core

    async def next_turn(self) -> Core:
        """End a turn that has taken enough, let others have theirs, and begin another. Raises what ended the engine."""
        self.end_turn()
        await trio.lowlevel.checkpoint()
        return self.begin_turn()

    def end_turn(self) -> None:
        """Hand on what the core emitted since the last turn."""
        core = self.core
        if self._may_show is not None and not self._may_show():
            return
        if core.closing:
            closing, core.closing = core.closing, []
            for overrun, error in closing:
                if overrun in overrun.connection.consumers:  # it may have left in this turn, or be here twice
                    core.unsubscribe(overrun)
                    overrun.sink.fail_consumer(overrun, error)
        if core.instant:
            instant, core.instant = core.instant, []
            for entry in instant:
                if entry.state == HELD:
                    entry.state = SENT
                    consumer = entry.consumer
                    assert consumer is not None
                    self._deliver(consumer, entry)
        if core.operations or core.held or core.spool_operations or core.dirty:
            operations, core.operations = core.operations, []
            held, core.held = core.held, []
            spool, core.spool_operations = core.spool_operations, []
            self.journal.add(operations, held, spool, bool(core.dirty))
        if core.redeliveries.moved:
            core.redeliveries.moved = False
            self._alarm.set(core.redeliveries.next_due)
        if core.links.changed:
            for link in core.links.changed:  # `flush` asks for the news
                self._touch(link.sink)
        if self._touched:
            self._flush()
        if core.schedules.changed:
            core.schedules.changed = False
            self._schedules_changed.set()
        if core.freed:
            core.freed = False
            if core.schedules.waiting:
                self._schedules_changed.set()
            if self._room_wanted:
                self._room_wanted = False
                self._room.set()
                self._room = trio.Event()

    def _deliver(self, consumer: Consumer, entry: Entry) -> None:
        sink: Sink = consumer.sink
        if not sink.touched:  # `_touch`, without the call
            sink.touched = True
            self._touched.append(sink)
        sink.deliver(consumer, entry)

    def _touch(self, sink: Sink) -> None:
        if not sink.touched:
            sink.touched = True
            self._touched.append(sink)

    def _flush(self) -> None:
        touched, self._touched = self._touched, []
        for sink in touched:
            sink.touched = False
            sink.flush()

    def _release(self, effects: list[Any]) -> None:
        if self._may_show is not None and not self._may_show():
            return  # committed, but not ours to confirm any more: whoever asked is told that it is in doubt
        expired: list[Entry] = []
        for effect in effects:
            kind = effect.__class__
            if kind is Entry:
                if effect.state == HELD:
                    consumer = effect.consumer
                    consumer.holding -= 1
                    if effect.message.expires and effect.message.expires <= self.clock_ms():
                        expired.append(effect)  # while its batch was being written: never shown late
                        continue
                    effect.state = SENT
                    self._deliver(consumer, effect)
            elif kind is tuple:
                sink, token = effect
                self._touch(sink)
                sink.confirm(token)
            else:
                self._reads_send.send_nowait(effect)
        if self._touched:
            self._flush()
        if expired:
            self.core.now = self.clock_ms()
            self.core.expire_held(expired)
            self.end_turn()

    # ---- flow control

    async def wait_room(self, message: Message) -> None:
        """Wait until there is room for the message. Raises BrokerFull by policy, or when the time for it is over."""
        limits = self.config.limits
        error = self.core.full(message)
        if error is None:
            return
        if self.core.watched:
            self.core.advisories.full(message, str(error))
            self.end_turn()
        if (error.full_policy or limits.full_policy) == "refuse":
            raise error
        with trio.move_on_after(limits.full_timeout):
            while self.error is None:
                await self.wait_freed()
                if self.core.full(message) is None:
                    return
        if self.error is not None:
            raise self.error
        raise BrokerFull(f"{error} (waited {limits.full_timeout:g} s, limits.full_timeout)")

    async def wait_freed(self) -> None:
        """Wait until room was made somewhere, or the engine has ended."""
        self._room_wanted = True
        await self._room.wait()

    @property
    def batch_full(self) -> bool:
        """Whether producers should wait for the journal (`journal.wait_room`)."""
        return self.journal.open_bytes >= self.config.limits.batch_bytes_max

    # ---- tasks

    async def wait_ended(self) -> None:
        """Wait until `run` is over."""
        await self._ended.wait()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until `close`; return when everything is committed. Raises what made the journal or the store fail."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._while_usable, self._run_reads)
                nursery.start_soon(self._while_usable, self._run_sweeps)
                nursery.start_soon(self._while_usable, self._run_schedules)
                nursery.start_soon(self._while_usable, self._run_due)
                if self.mender is not None:
                    nursery.start_soon(self._while_usable, self.mender.run, self.begin_turn, self.end_turn)
                self.end_turn()  # what restoring the core has emitted
                task_status.started()
                await self.journal.run()
                nursery.cancel_scope.cancel()
        except BaseException:
            self.error = self.error or BrokerClosed("the store has failed, or the broker was cancelled")
            raise
        finally:
            self.error = self.error or BrokerClosed("the broker has stopped")
            self._room.set()
            self.journal.end()
            self._ended.set()

    def fail(self, error: BrokerError) -> None:
        """The store can't be trusted any more: end every connection; nothing further is confirmed."""
        self.error = error
        self._room.set()
        for connection in list(self.core.connections):
            connection.sink.fail(error)

    async def _while_usable(self, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run a task that does turns; it is over when there are no more, and why is no error of its own.

        Whoever fails the engine cancels it, too, but a task that was about to run does so before it meets that.
        """
        try:
            await task(*arguments)
        except BrokerError as error:
            if error is not self.error:
                raise

    async def _run_reads(self) -> None:
        async for request in self._reads:
            if isinstance(request, PageRequest):
                await self._read_page(request)
            elif isinstance(request, BrowseRequest):
                await self._read_browsed(request)
            elif isinstance(request, DueRequest):
                await self._read_due(request)
            elif isinstance(request, SchedulesRequest):
                await self._read_schedules(request)
            elif isinstance(request, ScheduleLookup):
                await self._look_up(request)
            else:
                await self._list_schedules(request)
            self.end_turn()

    async def _read_page(self, request: PageRequest) -> None:
        queue = request.queue
        spooled = self.core.spooled > 0

        async def read(values: Mapping[bytes, bytes]) -> Pages:
            what = (queue.queue_id, request.start, request.count_max, request.size_max)

            def both() -> Pages:
                return self.store.read_page(*what, values), self._spool.read_page(*what) if spooled else None

            pages: Pages = await self._in_reader(both)
            return pages

        mended: list[tuple[int, Operation]] = []
        if self.mender is None:
            stored, transient = await read({})
        else:
            (stored, transient), mended = await self.mender.read(request, read)
        bounds = [page.next_order for page in (stored, transient) if page is not None and page.next_order is not None]
        for record in stored.corrupt:
            log.error("queue %s: %s; it stays in the store and is not delivered", queue.name, record)
        self.begin_turn().page_loaded(
            request,
            stored.entries,
            transient.entries if transient is not None else [],
            min(bounds, default=None),
            stored.unread,
            mended,
        )

    async def _read_browsed(self, request: BrowseRequest) -> None:
        queue = request.queue
        what = (queue.queue_id, request.cursor.position, request.count_max, request.size_max)
        spooled = self.core.spooled > 0

        def read() -> Pages:
            return self.store.read_page(*what), self._spool.read_page(*what) if spooled else None

        pages: Pages = await self._in_reader(read)
        stored, transient = pages
        bounds = [page.next_order for page in pages if page is not None and page.next_order is not None]
        self.begin_turn().browse_loaded(
            request,
            stored.entries,
            transient.entries if transient is not None else [],
            min(bounds, default=None),
            [order for page in pages if page is not None for order in page.unread],
        )

    async def _read_due(self, request: DueRequest) -> None:
        spooled = self.core.spooled > 0

        def read() -> tuple[list[DueEntry], list[DueEntry], Whole, Whole]:
            what = (request.now, request.count_max, request.after)
            rows, transient = self.store.read_due(*what), self._spool.read_due(*what) if spooled else []
            whole = read_whole(self._spool, transient, request) if transient else {}
            return rows, transient, read_whole(self.store, rows, request), whole

        found = await self._in_reader(read)
        self.begin_turn().due_loaded(request, *found)

    async def _read_schedules(self, request: SchedulesRequest) -> None:
        found = await self._in_reader(
            lambda: self.store.read_schedules(request.start, request.count_max, request.size_max)
        )
        for record in found.corrupt:
            log.error("a scheduled message: %s; it stays in the store and is not sent", record)
        self.begin_turn().schedules.loaded(request, found.schedules, found.next_key, found.unread, found.places)

    async def _list_schedules(self, request: ScheduleList) -> None:
        start, count_max = request.start, request.count_max
        found = await self._in_reader(
            lambda: self.store.read_schedules(start, count_max, self.config.limits.window_bytes_max)
        )
        for record in found.corrupt:
            log.error("a scheduled message: %s; it is left out of the list", record)
        bound = found.next_key
        others = [each for each in self.core.schedules.in_memory() if not each.message.durable and each.key >= start]
        rows = [*found.schedules, *(each for each in others if bound is None or each.key < bound)]
        rows.sort(key=lambda each: each.key)
        request.done(rows[:count_max], rows[count_max].key if len(rows) > count_max else bound)

    async def _look_up(self, lookup: ScheduleLookup) -> None:
        try:
            found = await self._in_reader(lambda: self.store.find_schedule(lookup.number))
        except CorruptRecord as error:
            log.error("a scheduled message: %s; it stays in the store and is not sent", error)
            found = None
        self.begin_turn().schedules.looked_up(lookup, found)

    async def _in_reader(self, read: Callable[[], Any]) -> Any:
        if self.store.backend.blocking:
            return await trio.to_thread.run_sync(read, limiter=self._reader)
        await trio.lowlevel.checkpoint()
        return read()

    async def _run_sweeps(self) -> None:
        while True:
            await trio.sleep(self.config.delivery.expiry_interval)
            core = self.begin_turn()
            core.disk_full = self._disk_full(self.config.data_dir)
            core.freed = core.freed or not core.disk_full
            core.sweep()
            self.end_turn()

    async def _run_schedules(self) -> None:
        """Send what is due, when it is due. The wall clock may be changed at any time, so it is looked at again and again."""
        limits = self.config.limits
        interval = self.config.delivery.clock_check_interval
        more = False
        changed = self._schedules_changed
        while not self.journal.closing:
            if not more:  # else what changes while it goes on is still to be looked at afterwards
                changed = self._schedules_changed = trio.Event()
            core = self.begin_turn()
            more = core.release_due(max(limits.turn_messages_max // SCHEDULE_WORK, 1))
            self.end_turn()
            if more:
                await self.journal.wait_room(limits.batch_bytes_max)
                await trio.lowlevel.checkpoint()
                continue
            wait = interval if len(core.schedules) else math.inf
            due = core.schedules.next_due
            if due is not None:
                wait = min(wait, max(due - self.clock_ms(), 0) / 1_000)
            with trio.move_on_after(wait):
                await changed.wait()

    async def _run_due(self) -> None:
        while True:
            await self._alarm.wait()
            core = self.begin_turn()
            core.redeliveries.moved = True  # the alarm has to be set again
            core.redeliveries.release_due()
            self.end_turn()

    def _disk_full(self, data_dir: Path | None) -> str:
        limit = self.config.limits.disk_free_bytes_min
        if data_dir is None or not limit:
            return ""
        free = shutil.disk_usage(data_dir).free
        if free >= limit:
            return ""
        return f"the disk of {data_dir} has {free} bytes left: limit limits.disk_free_bytes_min is {limit}; make room on it"
