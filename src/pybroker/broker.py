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
from pathlib import Path

import trio

from pybroker.client import Client
from pybroker.config import BrokerConfig
from pybroker.control import ControlServer
from pybroker.engine import Engine
from pybroker.errors import BrokerClosed, StoreError
from pybroker.server import STOPPING, Server
from pybroker.settings import make_config
from pybroker.spool import Spool
from pybroker.store.leveldb import LevelDBBackend
from pybroker.store.memory import MemoryBackend
from pybroker.store.spool import open_spool
from pybroker.store.store import Store

log = logging.getLogger("pybroker.broker")

STORE = "store"  # directories in `data_dir`
SPOOL = "spool"


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

    def __init__(self, config: BrokerConfig) -> None:
        self.config = config
        self.software = f"pybroker/{version('pybroker')}"
        self._engine: Engine | None = None
        self._why_not = BrokerClosed("the broker is not running")
        self._server = Server(config, self._serving, self.software)
        self._stopping = False
        self._stopped = trio.Event()
        self._role_changed = trio.Event()

    # ---- the face

    @property
    def listeners(self) -> tuple[str, ...]:
        """URLs of the bound listeners, with their real ports."""
        return self._server.urls

    @property
    def role(self) -> str:
        """``"standalone"``, or ``"starting"`` while the store is (again) being opened, or ``"stopped"``."""
        if self._stopping:
            return "stopped"
        return "starting" if self._engine is None else "standalone"

    async def roles(self) -> AsyncIterator[tuple[str, int]]:
        """The role and its epoch, now and at each change. (Changes that follow each other at once may be seen as one.)"""
        shown: tuple[str, int] | None = None
        while True:
            changed = self._role_changed
            engine = self._engine
            now = (self.role, engine.journal.position[0] if engine is not None else 0)
            if now != shown:
                shown = now
                yield now
            else:
                await changed.wait()

    def _set_engine(self, engine: Engine | None) -> None:
        self._engine = engine
        self._role_changed.set()
        self._role_changed = trio.Event()

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
            raise self._why_not
        return self._engine

    def _serving(self) -> Engine:
        if self._stopping:
            raise STOPPING
        return self._running()

    async def _run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep a store open and an engine running until `_stop`; raises only what happens before it is ready."""
        try:
            async with trio.open_nursery() as nursery:
                store, spool = await _open(self.config)
                try:
                    await self._server.bind()
                except BaseException:
                    await _close(store, spool)
                    raise
                await self._run_engines(store, spool, nursery, task_status)
                nursery.cancel_scope.cancel()
        finally:
            self._stopped.set()

    async def _run_engines(
        self, store: Store, spool: Spool, nursery: trio.Nursery, task_status: trio.TaskStatus[None]
    ) -> None:
        """One engine after the other, each with a freshly opened store, until `_stop`."""
        config = self.config
        started = False
        while True:
            engine = Engine(config, store, spool)
            try:
                async with trio.open_nursery() as running:
                    await running.start(engine.run)
                    self._set_engine(engine)
                    if not started:
                        started = True
                        nursery.start_soon(self._server.run)
                        if config.data_dir is not None:
                            await nursery.start(ControlServer(config.data_dir, self.statistics).run)
                        task_status.started()
            except* (StoreError, OSError) as group:
                error = single(group)
                log.error("the store failed, every connection is closed: %s", error)
                self._why_not = BrokerClosed(f"the store failed and is being opened again: {error}")
                engine.fail(self._why_not)
            finally:
                self._set_engine(None)
                await _close(store, spool)
            if self._stopping:
                return
            store, spool = await self._reopen()

    async def _reopen(self) -> tuple[Store, Spool]:
        delay = self.config.reopen_delay
        while True:
            await trio.sleep(delay)
            try:
                return await _open(self.config)
            except StoreError as error:
                delay = min(delay * 2, self.config.reopen_delay_max)
                log.error("the store can't be opened again, next try in %.1f s: %s", delay, error)
                self._why_not = BrokerClosed(f"the store can't be opened again: {error}")

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


async def _open(config: BrokerConfig) -> tuple[Store, Spool]:
    """Open the store (in a thread) and prepare the spool. Raises StoreError."""
    directory = config.data_dir
    if directory is None:
        return Store.open(MemoryBackend()), Spool(lambda: Store.open(MemoryBackend()))
    return await trio.to_thread.run_sync(_open_directory, Path(directory))


def _open_directory(directory: Path) -> tuple[Store, Spool]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"data_dir {directory} can't be made: {error.strerror}") from error
    store = Store.open(LevelDBBackend(directory / STORE))
    return store, Spool(lambda: open_spool(directory / SPOOL))


async def _close(store: Store, spool: Spool) -> None:
    def close() -> None:
        store.close()
        spool.close()

    with trio.CancelScope(shield=True):  # files: bounded by the disk, and nothing else may use them meanwhile
        await trio.to_thread.run_sync(close)


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
    broker = Broker(checked)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(broker._run)
            try:
                yield broker
            finally:
                with trio.CancelScope(
                    shield=True
                ):  # bounded: `_stop` has a deadline of its own, the rest is the disk's
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
