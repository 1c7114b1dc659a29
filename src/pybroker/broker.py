"""The broker: wires store, engine, listeners and clients together, and owns their lives.

A journal or store that fails ends the engine; the broker then closes the store and opens it again with back-off, on the same
listeners. Nothing that was not on disk is shown as confirmed. No global state: two brokers know nothing of each other.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

import trio

from pybroker.client import Client
from pybroker.config import BrokerConfig
from pybroker.control import ControlServer
from pybroker.engine import Engine
from pybroker.errors import BrokerClosed, StoreError
from pybroker.keeper import Alone, Keeper, Term, close_store, make_spool
from pybroker.server import STOPPING, Server
from pybroker.settings import make_config

log = logging.getLogger("pybroker.broker")


@dataclass(frozen=True, slots=True)
class DestinationStatistics:
    """One queue, durable subscription or subscriber's backlog. Counters since the broker opened its store.

    depth        messages in it, delivered and unacknowledged ones included; `stored` of them are on disk
    outstanding  delivered and not acknowledged
    corrupt      stored messages that could not be read, and so are not delivered
    """

    kind: str
    name: str
    subscription: str
    depth: int
    stored: int
    stored_bytes: int
    in_memory: int
    outstanding: int
    consumers: int
    enqueued: int
    acknowledged: int
    redelivered: int
    dead_lettered: int
    expired: int
    corrupt: int


@dataclass(frozen=True, slots=True)
class BrokerStatistics:
    """The broker at one moment. Sizes in bytes."""

    name: str
    role: str
    listeners: tuple[str, ...]
    connections: int
    connections_refused: int
    memory_bytes: int
    stored_bytes: int
    spooled_bytes: int
    epoch: int
    lsn: int
    batches: int
    unrouted: int
    expired_on_arrival: int
    full: str
    destinations: tuple[DestinationStatistics, ...]


class Broker:
    """A running broker. Made by `open_broker`."""

    def __init__(self, config: BrokerConfig, keeper: Keeper) -> None:
        self.config = config
        self.software = f"pybroker/{version('pybroker')}"
        self._keeper = keeper
        self._engine: Engine | None = None
        self._server = Server(config, self._serving, self.software)
        self._stopping = False
        self._stopped = trio.Event()

    # ---- the face

    @property
    def listeners(self) -> tuple[str, ...]:
        """URLs of the bound listeners, with their real ports."""
        return self._server.urls

    @property
    def role(self) -> str:
        """``"standalone"``, or ``"starting"`` while the store is (again) being opened, or ``"stopped"``."""
        return "stopped" if self._stopping else self._keeper.role[0]

    async def roles(self) -> AsyncIterator[tuple[str, int]]:
        """The role and its epoch, now and at each change. (Changes that follow each other at once may be seen as one.)"""
        seen = self._keeper.role
        while True:
            yield seen
            seen = await self._keeper.wait_role_change(seen)

    async def wait_role(self, role: str) -> int:
        """Wait until this broker has a role; returns the epoch."""
        seen = self._keeper.role
        while seen[0] != role:
            seen = await self._keeper.wait_role_change(seen)
        return seen[1]

    def connect(self, client_id: str = "") -> Client:
        """A client in this process: ``async with broker.connect() as client``. Durable subscriptions need a client id."""
        return Client(self._serving, client_id)

    def statistics(self) -> BrokerStatistics:
        """What there is at this moment. Raises BrokerClosed while the store is not open."""
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
            full=core.disk_full,
            destinations=tuple(
                DestinationStatistics(
                    kind=queue.kind,
                    name=queue.name,
                    subscription=f"{queue.client_id}/{queue.subscription}" if queue.subscription else "",
                    depth=queue.depth,
                    stored=queue.count,
                    stored_bytes=queue.size,
                    in_memory=len(queue.window) + len(queue.outstanding),
                    outstanding=len(queue.outstanding),
                    consumers=len(queue.consumers),
                    enqueued=queue.counts.enqueued,
                    acknowledged=queue.counts.acknowledged,
                    redelivered=queue.counts.redelivered,
                    dead_lettered=queue.counts.dead_lettered,
                    expired=queue.counts.expired,
                    corrupt=queue.counts.corrupt,
                )
                for queue in core.queues.values()
            ),
        )

    # ---- life

    def _running(self) -> Engine:
        if self._engine is None:
            raise self._keeper.why_not()
        return self._engine

    def _serving(self) -> Engine:
        if self._stopping:
            raise STOPPING
        return self._running()

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run an engine in each term until `_stop`; raises only what happens before it is ready."""
        config = self.config
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self._keeper.run)
                await self._server.bind()
                started = False
                while not self._stopping:
                    term = await self._keeper.next_term()
                    async with self._serve_term(term):
                        if not started:
                            started = True
                            nursery.start_soon(self._server.run)
                            if config.data_dir is not None:
                                await nursery.start(ControlServer(config.data_dir, self.statistics).run)
                            task_status.started()
                await self._keeper.stop()
                nursery.cancel_scope.cancel()
        finally:
            self._stopped.set()

    @asynccontextmanager
    async def _serve_term(self, term: Term) -> AsyncIterator[None]:
        """Run an engine on the term's store until the term, the engine or the broker ends. Yields once it runs."""
        spool = make_spool(self.config)
        engine = Engine(self.config, term.store, spool, committer=term.committer, may_show=lambda: term.valid)
        try:
            async with trio.open_nursery() as running:
                await running.start(engine.run)
                self._engine = engine
                running.start_soon(self._end_with_term, term, engine, running.cancel_scope)
                yield
                await engine.wait_ended()
                running.cancel_scope.cancel()
        except* (StoreError, OSError) as group:
            error = single(group)
            log.error("the store failed, every connection is closed: %s", error)
            engine.fail(BrokerClosed(f"the store failed and is being opened again: {error}"))
        finally:
            self._engine = None
            await close_store(spool)
            term.release()

    async def _end_with_term(self, term: Term, engine: Engine, scope: trio.CancelScope) -> None:
        """When the term is lost, nothing more may be shown: every connection ends, told where to go."""
        await term.lost.wait()
        log.warning("every connection is closed: %s", term.reason)
        self._engine = None
        engine.fail(self._keeper.why_not())
        scope.cancel()

    async def _stop(self) -> None:
        """Stop in good order, within `stop_timeout`: take nothing more, commit what was taken, return what is out."""
        config = self.config
        self._stopping = True
        with trio.move_on_after(config.stop_timeout):
            await self._server.stop_accepting()
            self._server.close_connections(STOPPING)
            await self._server.wait_closed()
        engine = self._engine
        if engine is None:
            return
        if engine.error is None:
            core = engine.begin_turn()
            connections = list(core.connections)
            for connection in connections:
                core.disconnect(connection)
                if isinstance(connection.sink, Client):  # or else one that never pauses would keep the journal going
                    connection.sink.refuse(STOPPING)
            engine.end_turn()
            engine.journal.close()
            await self._stopped.wait()
            for connection in connections:  # clients of this process that are still waiting for something
                connection.sink.fail(BrokerClosed("the broker has stopped"))
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
    broker = Broker(checked, Alone(checked))
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
