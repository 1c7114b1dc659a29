"""The broker: wires store, engine, listeners and clients together, and owns their lives.

A journal or store that fails ends the engine; the broker then closes the store and opens it again with back-off, on the same
listeners. Nothing that was not on disk is shown as confirmed. No global state: two brokers know nothing of each other.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import trio

from pybroker.browser import QueueBrowser
from pybroker.cluster.leader import LeadershipLost
from pybroker.config import BrokerConfig
from pybroker.control import ControlServer
from pybroker.core.browsing import BrowsePage, Cursor
from pybroker.core.consumer import Connection
from pybroker.dead_letter_work import DeadLetters, dead_letter_command
from pybroker.destination import parse_destination
from pybroker.engine import Engine
from pybroker.errors import BrokerClosed, BrokerError, ConfigurationError, NotLeader, ProtocolError, StoreError
from pybroker.keeper import Alone, Keeper, Term, close_store, make_spool, reopening
from pybroker.local_client import LocalClient
from pybroker.network_membership import Membership, remove_peer
from pybroker.network_status import NetworkStatus
from pybroker.policies import DestinationPolicy, Explained, Policies
from pybroker.queue_pages import COPY, MOVE, PURGE, read_page
from pybroker.queue_work import Moved, Progress, browse_command, move_all, move_command
from pybroker.replicated import make_replicated
from pybroker.scheduling import LIST_MAX, ScheduledMessage, cancel_schedule, schedules
from pybroker.server import STOPPING, Server
from pybroker.settings import make_config
from pybroker.statistics import BrokerStatistics, queue_statistics

log = logging.getLogger("pybroker.broker")

LAST_WORDS = 1.0  # seconds for connections to hear why they end when a replica stops


class Broker:
    """A running broker. Made by `open_broker`."""

    def __init__(self, config: BrokerConfig, keeper: Keeper, membership: Membership | None = None) -> None:
        self.config = config
        self.software = f"pybroker/{version('pybroker')}"
        self._keeper = keeper
        self._membership = membership or Membership(config, self.software)
        self._policies = Policies(config.policy, config.limits, config.delivery)
        self._engine: Engine | None = None
        self._server = Server(config, self._serving, self.software)
        self._role = ("starting", 0)
        self._role_changed = trio.Event()
        self._waiting = trio.CancelScope()  # for a term
        self._dropped = 0  # non-durable messages that went with the terms they came in
        self._left: list[Connection] = []  # connections that were ended while their engine still commits
        self._stopping = False
        self._stopped = trio.Event()

    # ---- the face

    @property
    def listeners(self) -> tuple[str, ...]:
        """URLs of the bound listeners, with their real ports. None are open while another replica leads."""
        return self._server.urls

    @property
    def role(self) -> str:
        """``"standalone"``, or ``"starting"`` while the store is (again) being opened, or ``"stopped"``.

        In a replica set ``"none"``, ``"candidate"``, ``"joining"``, ``"follower"`` or ``"leader"``: only a leader serves clients.
        """
        return "stopped" if self._stopping else self._role[0]

    async def roles(self) -> AsyncIterator[tuple[str, int]]:
        """The role and its epoch, now and at each change. (Changes that follow each other at once may be seen as one.)"""
        while True:
            seen = self._role
            yield seen
            while self._role == seen:
                await self._role_changed.wait()

    async def wait_role(self, role: str) -> int:
        """Wait until this broker has a role; returns the epoch."""
        while self._role[0] != role:
            await self._role_changed.wait()
        return self._role[1]

    async def hand_over(self) -> None:
        """Let another replica lead; returns when this one does not any more. Does nothing where it does not lead."""
        self._keeper.hand_over()
        while self._role[0] == "leader":
            await self._role_changed.wait()

    def connect(self, client_id: str = "") -> LocalClient:
        """A client in this process: ``async with broker.connect() as client``. Durable subscriptions need a client id."""
        return LocalClient(self._serving, client_id)

    def statistics(self) -> BrokerStatistics:
        """What there is at this moment. Raises BrokerClosed while the store is not open, NotLeader at a replica that follows."""
        engine = self._running()
        core = engine.core
        epoch, lsn = engine.journal.position
        return BrokerStatistics(
            name=self.config.name,
            role=self.role,
            listeners=self.listeners,
            connections=self._server.connections,
            connections_refused=self._server.refused,
            memory_bytes=core.memory_bytes,
            stored_bytes=core.stored_bytes,
            spooled_bytes=core.spooled_bytes,
            epoch=epoch,
            lsn=lsn,
            batches=engine.journal.batches,
            unrouted=core.unrouted,
            expired_on_arrival=core.expired_on_arrival,
            unclaimed=core.temporaries.unclaimed,
            temporary_destinations=sum(len(each.temporaries) for each in core.connections),
            scheduled=len(core.schedules),
            scheduled_corrupt=core.schedules.corrupt + len(core.schedules.places),
            advisories_suppressed=core.advisories.suppressed,
            duplicates=core.duplicates,
            dropped=self._dropped,
            repaired=engine.mender.mended if engine.mender is not None else 0,
            full=core.disk_full,
            destinations=tuple(queue_statistics(queue) for queue in core.queues.values()),
        )

    def policy(self, destination: str) -> DestinationPolicy:
        """What holds for a destination (``/queue/NAME``, ``/topic/NAME``). Raises InvalidDestination."""
        return self._policies.of(parse_destination(destination))

    def explain_policy(self, destination: str) -> list[Explained]:
        """Each value of a destination's policy, with its unit and where it comes from. Raises InvalidDestination."""
        return self._policies.explain(parse_destination(destination))

    def browse(self, destination: str, *, selector: str = "", limit: int = 0) -> QueueBrowser:
        """Look into a queue, as `Client.browse`."""

        def read(cursor: Cursor | None, count: int) -> Awaitable[BrowsePage]:
            return read_page(self._running(), destination, cursor, selector=selector, limit=count)

        return QueueBrowser(read, limit)

    async def purge(
        self, destination: str, *, selector: str = "", limit: int = 0, progress: Progress | None = None
    ) -> Moved:
        """Delete what is ready in a queue: messages that the selector is true for, at most `limit` of them (0 = all).

        What is with a consumer or in a transaction stays, and is counted; so does what comes meanwhile. `progress` is called after
        each step. A crash leaves what was not done. Raises InvalidDestination, InvalidSelector.
        """
        return await move_all(self._running, PURGE, destination, "", selector, limit, progress)

    async def move(
        self, source: str, target: str, *, selector: str = "", limit: int = 0, progress: Progress | None = None
    ) -> Moved:
        """Move what is ready in a queue to another one, as `purge` deletes it.

        Ids, headers, bodies, priorities and expiry stay as they are. Each message leaves and arrives in one batch: a crash neither
        loses it nor leaves two. Raises also LimitExceeded, and BrokerFull where the target takes no more.
        """
        return await move_all(self._running, MOVE, source, target, selector, limit, progress)

    async def copy(
        self, source: str, target: str, *, selector: str = "", limit: int = 0, progress: Progress | None = None
    ) -> Moved:
        """As `move`, and the messages also stay where they are."""
        return await move_all(self._running, COPY, source, target, selector, limit, progress)

    @property
    def dead_letters(self) -> DeadLetters:
        """Looking at dead letters, sending them back, dropping them: `list`, `retry`, `drop`."""
        return DeadLetters(self._running)

    def network_status(self) -> NetworkStatus:
        """The brokers that this one is linked with, or knows, at this moment. Raises as `statistics`."""
        return self._membership.status(self._running())

    async def remove_peer(self, name: str) -> int:
        """Forget a broker of the network that will not come back: what was on its way to it returns to its queues.

        These messages are marked as redelivered, since the peer may have had them. Returns how many they are. Raises BrokerError
        for a peer that is not known, or linked.
        """
        return await remove_peer(self._running(), name)

    async def schedules(
        self, limit: int = LIST_MAX, after: ScheduledMessage | None = None
    ) -> tuple[ScheduledMessage, ...]:
        """Messages that are to be sent later, in order of time, as they are committed; `after`: those behind that one."""
        place = None if after is None else (after.due_ms, int(after.schedule_id))
        return await schedules(self._running(), limit, place)

    async def cancel_schedule(self, schedule_id: str) -> None:
        """Cancel a schedule: its message is not sent (again). Returns when that is committed.

        Raises BrokerError when there is none of that id (any more), SendInDoubt when the broker ended meanwhile.
        """
        await cancel_schedule(self._running(), schedule_id)

    # ---- life

    def _running(self) -> Engine:
        if self._engine is None:
            raise self._keeper.why_not()
        return self._engine

    def _serving(self) -> Engine:
        if self._stopping:
            raise STOPPING
        return self._running()

    def _update_role(self) -> None:
        """A leader is one that serves: while it commits its first batch or opens its listeners it is still a candidate."""
        role, epoch = self._keeper.role
        if role == "leader" and self._engine is None:
            role = "candidate"
        if self._stopping:
            role = "stopped"
        if (role, epoch) != self._role:
            self._role = (role, epoch)
            self._role_changed.set()
            self._role_changed = trio.Event()

    async def _watch_role(self) -> None:
        seen = self._keeper.role
        while True:
            self._update_role()
            seen = await self._keeper.wait_role_change(seen)

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run an engine in each term until `_stop`; raises only what happens before it is ready."""
        always = self._keeper.serves_always
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._keeper.run)
                nursery.start_soon(self._watch_role)
                nursery.start_soon(self._membership.listen)
                if always:
                    await self._server.bind()
                else:
                    await self._start_control(nursery)
                    task_status.started()
                started = not always
                while not self._stopping:
                    term = await self._next_term()
                    if term is None:
                        break
                    async with self._serve_term(term, nursery):
                        if not started:
                            started = True
                            nursery.start_soon(self._server.run)
                            await self._start_control(nursery)
                            task_status.started()
                await self._keeper.stop()
                if not always:
                    with trio.move_on_after(LAST_WORDS):
                        await self._server.wait_closed()
                nursery.cancel_scope.cancel()
        finally:
            self._stopped.set()

    async def _next_term(self) -> Term | None:
        """The next term, None when the broker is to stop before there is one."""
        with trio.CancelScope() as self._waiting:
            return await self._keeper.next_term()
        return None

    async def _start_control(self, nursery: trio.Nursery) -> None:
        if self.config.data_dir is not None:
            commands = {
                "status": self._status,
                "network-status": self._network_status,
                "network-remove": self._network_remove,
                "policy-show": self._policy_show,
                "queue-browse": self._queue_browse,
                "queue-move": self._queue_move,
                "dead-letters": self._dead_letters,
                "schedule-list": self._schedule_list,
                "schedule-cancel": self._schedule_cancel,
                **self._keeper.commands(),
            }
            await nursery.start(ControlServer(self.config.data_dir, commands).run)

    async def _status(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return asdict(self.statistics())

    async def _network_status(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return asdict(self.network_status())

    async def _network_remove(self, request: Mapping[str, Any]) -> int:
        return await self.remove_peer(str(request.get("peer", "")))

    async def _queue_browse(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return await browse_command(self._running(), request)

    async def _queue_move(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return await move_command(self._running(), request)

    async def _dead_letters(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return await dead_letter_command(self._running(), request)

    async def _policy_show(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [each._asdict() for each in self.explain_policy(str(request.get("destination", "")))]

    async def _schedule_list(self, request: Mapping[str, Any]) -> list[dict[str, Any]]:
        limit, after = request.get("limit"), request.get("after")
        if after is not None and not (isinstance(after, list) and [type(each) for each in after] == [int, int]):
            raise BrokerError("`after` is [due, number] of a schedule, or null")
        if type(limit) is not int or limit > LIST_MAX or (after and not all(0 <= each < 2**63 for each in after)):
            raise BrokerError(f"a list has at most {LIST_MAX} schedules")
        place = None if after is None else (after[0], after[1])
        return [asdict(each) for each in await schedules(self._running(), limit, place)]

    async def _schedule_cancel(self, request: Mapping[str, Any]) -> None:
        await self.cancel_schedule(str(request.get("id", "")))

    @asynccontextmanager
    async def _serve_term(self, term: Term, nursery: trio.Nursery) -> AsyncIterator[None]:
        """Run an engine on the term's store until the term, the engine or the broker ends. Yields once it serves."""
        spool = make_spool(self.config)
        engine = Engine(
            self.config,
            term.store,
            spool,
            epoch=term.epoch,
            committer=term.committer,
            fetch=term.fetch,
            may_show=None if self._keeper.serves_always else lambda: term.valid,
        )
        try:
            async with trio.open_nursery() as running:
                await running.start(engine.run)
                self._engine = engine
                running.start_soon(self._end_with_term, term, engine, running.cancel_scope)
                running.start_soon(self._hand_over_when_asked, term, engine)
                if self._keeper.serves_always or await self._open_listeners(nursery):
                    running.start_soon(self._membership.serve, engine, self._server, term.epoch)
                self._update_role()
                yield
                await engine.wait_ended()
                running.cancel_scope.cancel()
        except* LeadershipLost as group:
            log.warning("every connection is closed: %s", single(group))
            engine.fail(self._keeper.why_not())
        except* (StoreError, ProtocolError, OSError) as group:  # or a batch too large to be replicated
            error = single(group)
            log.error("the store failed, every connection is closed: %s", error)
            engine.fail(reopening(error))
        finally:
            self._engine = None
            self._update_role()
            if not self._keeper.serves_always:
                self._server.close_listeners()
            self._dropped += sum(queue.depth - queue.count for queue in engine.core.queues.values())
            await close_store(spool)
            term.release()
            left, self._left = self._left, []
            for connection in left:  # clients of this process that are still waiting for something
                connection.sink.fail(
                    BrokerClosed("the broker has stopped") if self._stopping else self._keeper.why_not()
                )

    async def _open_listeners(self, nursery: trio.Nursery) -> bool:
        """Serve this term's clients, if that can be. (The last ones are told why it ended after the store was released already.)"""
        self._server = Server(self.config, self._serving, self.software, self._server.ports)
        try:
            await self._server.bind()
        except ConfigurationError as error:
            log.error("this replica can't serve clients, another one is asked to lead: %s", error)
            self._keeper.hand_over()
            return False
        nursery.start_soon(self._server.run)
        self._keeper.show_clients(self._server.urls)
        return True

    async def _end_with_term(self, term: Term, engine: Engine, scope: trio.CancelScope) -> None:
        """When the term is lost, nothing more may be shown: every connection ends, told where to go."""
        await term.lost.wait()
        log.warning("every connection is closed: %s", term.reason)
        self._engine = None
        self._server.close_listeners()
        engine.fail(self._keeper.why_not())
        scope.cancel()

    async def _hand_over_when_asked(self, term: Term, engine: Engine) -> None:
        """Take nothing more, commit what was taken, and so end this term: another replica goes on with it."""
        await term.handover.wait()
        self._engine = None
        error = NotLeader("this replica is handing over to another one: connect again in a moment")
        self._server.close_listeners()
        self._membership.stop()
        self._server.close_connections(error)
        self._wind_up(engine, error)

    def _wind_up(self, engine: Engine, error: BrokerError) -> None:
        """End what is connected: what it sent is committed and confirmed; then the engine ends.

        What it was handed returns to its place: here, or, where others wait to go on, there. They count it as redelivered,
        since it lies below the mark that was written before it was handed out; writing it all once more would keep them waiting.
        """
        if engine.error is None:
            core = engine.begin_turn()
            self._left = list(core.connections)
            if not self._keeper.serves_always:
                core.pause_all()
            for connection in self._left:
                if self._keeper.serves_always:
                    core.disconnect(connection)
                if isinstance(
                    connection.sink, LocalClient
                ):  # or else one that never pauses would keep the journal going
                    connection.sink.refuse(error)
            engine.end_turn()
            engine.journal.close()

    async def _stop(self) -> None:
        """Stop in good order, within `stop_timeout`: take nothing more, commit what was taken, return what is out."""
        self._stopping = True
        self._waiting.cancel()
        engine = self._engine
        with trio.move_on_after(self.config.stop_timeout):
            self._server.close_listeners()
            self._membership.stop()
            self._server.close_connections(STOPPING)
            if self._keeper.serves_always:  # in a set others wait to serve: the last words are said later
                await self._server.wait_closed()
                await self._membership.wait_closed()
        self._update_role()
        if engine is not None:
            self._wind_up(engine, STOPPING)
        await self._stopped.wait()


@asynccontextmanager
async def open_broker(config: BrokerConfig | None = None, **overrides: object) -> AsyncIterator[Broker]:
    """Run a broker in this program while the block runs.

    ::

        async with pybroker.open_broker(data_dir="data", listen=["stomp://127.0.0.1:61613"]) as broker:
            async with broker.connect() as client:
                await client.send("/queue/referrals", b"...")

    `config` and `overrides` are the fields of `BrokerConfig` (nested ones as mappings). Without `data_dir` everything is in
    memory, and gone at the end. Raises ConfigurationError, StoreLocked, StoreFormatError, StoreDamaged.
    """
    checked = make_config(config, **overrides)
    if checked.data_dir is None:
        log.warning(
            "broker %s has no data_dir: messages are kept in memory only and are lost when it stops", checked.name
        )
    broker = Broker(checked, Alone(checked) if checked.replica_set is None else make_replicated(checked))
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(broker._run)
            try:
                yield broker
            finally:
                # Shielded, and bounded: `_stop` has a deadline of its own, the rest is the disk's.
                with trio.CancelScope(shield=True):
                    await broker._stop()
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        error = single(group)
        if error is group:
            raise
        raise error from error.__cause__


def single(error: BaseException) -> BaseException:
    """The one error in (nested) groups of one; a group of several stays as it is."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
