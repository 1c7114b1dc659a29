"""Who keeps the store: this broker alone, or a replica set of which it is a member. Owns the opening and closing of stores.

A *term* is a time in which this process may write: for a broker of its own from one opening of the store to its failure, in a
set one leadership. The broker runs an engine for each term and knows no difference.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import trio

from pybroker.config import BrokerConfig
from pybroker.errors import BrokerClosed, BrokerError, ConfigurationError, StoreError
from pybroker.mending import Fetch
from pybroker.spool import Spool
from pybroker.store.committer import Committer
from pybroker.store.compaction import INTERVAL, Compactor
from pybroker.store.layout import IDENTITY_FILE, current_name, read_identity
from pybroker.store.leveldb import LevelDBBackend
from pybroker.store.memory import MemoryBackend
from pybroker.store.spool import open_spool
from pybroker.store.store import Store

log = logging.getLogger("pybroker.keeper")

SPOOL = "spool"  # a directory in `data_dir`

Command = Callable[[Mapping[str, Any]], Awaitable[Any]]  # of the control socket: arguments in, what is shown out


class Term(Protocol):
    """A time in which this process may write to `store`.

    committer  what makes batches durable; None = the store itself
    lost       set when the term is over: nothing more may be shown or confirmed; `reason` says why
    handover   set when this process is asked to let another one serve: take nothing more, commit, and release the term
    """

    epoch: int
    store: Store
    lost: trio.Event
    handover: trio.Event
    reason: str

    @property
    def committer(self) -> Committer | None: ...

    @property
    def fetch(self) -> Fetch | None:
        """Asks other copies of the store for whole values in the place of bad ones; None where there is no other."""
        ...

    @property
    def valid(self) -> bool:
        """Whether effects may be shown now: asked at each turn."""
        ...

    def release(self) -> None:
        """The store is not used any more."""
        ...


class Keeper(Protocol):
    """Gives terms, one after the other.

    serves_always  whether the listeners are open all the time; or else only while there is a term
    """

    serves_always: bool

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until `stop` or cancelled. Raises what makes a start impossible."""
        ...

    async def next_term(self) -> Term:
        """Wait for a term."""
        ...

    async def stop(self) -> None:
        """End in good order, after the last term was released; `run` returns."""
        ...

    def hand_over(self) -> None:
        """Set the present term's `handover`; nothing where nobody else could serve."""
        ...

    def show_clients(self, urls: tuple[str, ...]) -> None:
        """The listeners that are open now: where clients of the present term find it."""
        ...

    def why_not(self) -> BrokerError:
        """Why there is no term now: what a client is told."""
        ...

    @property
    def role(self) -> tuple[str, int]:
        """The role and its epoch."""
        ...

    async def wait_role_change(self, seen: tuple[str, int]) -> tuple[str, int]:
        """Wait until the role or epoch is another one than `seen`."""
        ...

    def commands(self) -> Mapping[str, Command]:
        """What operators may ask over the control socket beside the broker's own statistics."""
        ...


class AloneTerm:
    """From one opening of the store to its close."""

    committer = None
    fetch = None
    valid = True

    def __init__(self, store: Store) -> None:
        self.epoch = store.position[0]
        self.store = store
        self.lost = trio.Event()
        self.handover = trio.Event()
        self.reason = ""
        self.released = trio.Event()

    def release(self) -> None:
        self.released.set()


class Alone:
    """The keeper of a broker of its own: opens the store, again and with back-off when it has failed."""

    serves_always = True

    def __init__(self, config: BrokerConfig) -> None:
        self._config = config
        self._term: AloneTerm | None = None
        self._changed = trio.Event()
        self._stopping = False
        self._ended = trio.Event()
        self._why_not: BrokerError = BrokerClosed("the broker is not running")

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        store = await open_store(self._config)
        task_status.started()
        try:
            while True:
                term = AloneTerm(store)
                self._set_term(term)
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(keep_compact, lambda opened=store: opened)
                        await term.released.wait()
                        nursery.cancel_scope.cancel()
                finally:
                    self._set_term(None)
                    await close_store(store)
                if self._stopping:
                    return
                self._why_not = reopening()
                store = await self._reopen()
        finally:
            self._ended.set()

    async def _reopen(self) -> Store:
        delay = self._config.reopen_delay
        while True:
            await trio.sleep(delay)
            try:
                return await open_store(self._config)
            except StoreError as error:
                delay = min(delay * 2, self._config.reopen_delay_max)
                log.error("the store can't be opened again, next try in %.1f s: %s", delay, error)
                self._why_not = reopening(error)

    def _set_term(self, term: AloneTerm | None) -> None:
        self._term = term
        self._changed.set()
        self._changed = trio.Event()

    async def next_term(self) -> AloneTerm:
        while self._term is None or self._term.released.is_set():
            await self._changed.wait()
        return self._term

    async def stop(self) -> None:
        self._stopping = True
        if self._term is not None:
            await self._ended.wait()

    def why_not(self) -> BrokerError:
        return self._why_not

    @property
    def role(self) -> tuple[str, int]:
        return ("standalone", self._term.epoch) if self._term is not None else ("starting", 0)

    async def wait_role_change(self, seen: tuple[str, int]) -> tuple[str, int]:
        while self.role == seen:
            await self._changed.wait()
        return self.role

    def hand_over(self) -> None:
        """There is nobody else."""

    def show_clients(self, urls: tuple[str, ...]) -> None:
        """Nobody asks."""

    def commands(self) -> Mapping[str, Command]:
        return {}


async def open_store(config: BrokerConfig) -> Store:
    """Open the store of a broker of its own, LevelDB in a thread. Raises StoreError."""
    directory = config.data_dir
    if directory is None:
        return Store.open(MemoryBackend())
    return await trio.to_thread.run_sync(_open_directory, Path(directory))


def _open_directory(directory: Path) -> Store:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"data_dir {directory} can't be made: {error.strerror}") from error
    identity = read_identity(directory)
    if identity is not None:
        raise ConfigurationError(
            f"data_dir {directory} belongs to replica {identity.name!r} of set {identity.set!r}: give replica_set; or, to use its "
            f"messages outside of the set for good, remove {directory / IDENTITY_FILE}, and it is no copy of the set any more"
        )
    return Store.open(LevelDBBackend(directory / current_name(directory)))


def make_spool(config: BrokerConfig) -> Spool:
    """The spool of one term; its directory is made with the first message that is spooled."""
    directory = config.data_dir
    create: Callable[[], Store]
    if directory is None:

        def create() -> Store:
            return Store.open(MemoryBackend())
    else:

        def create() -> Store:
            return open_spool(directory / SPOOL)

    return Spool(create)


def reopening(failure: BaseException | None = None) -> BrokerClosed:
    """What clients are told when the store has failed. Files are not named: they are the operator's, and in the log."""
    reason = str(failure).rpartition(": ")[2] if failure is not None else ""
    shown = f" ({reason})" if reason and " /" not in f" {reason}" else ""
    return BrokerClosed(f"the store failed{shown} and is being opened again: connect again in a moment")


async def keep_compact(store: Callable[[], Store | None]) -> None:
    """Give back the room of consumed messages, now and then, in a thread of its own."""
    compactor = Compactor()
    limiter = trio.CapacityLimiter(1)
    while True:
        await trio.sleep(INTERVAL)
        current = store()
        if current is not None and current.backend.blocking:
            try:
                await trio.to_thread.run_sync(compactor.look, current, limiter=limiter)
            except StoreError as error:  # it was closed, or failed, which whoever writes to it will meet
                log.debug("a compaction was interrupted: %s", error)


async def close_store(store: Store | Spool) -> None:
    """Close in a thread, also when cancelled: files, and nothing else may use them meanwhile."""
    with trio.CancelScope(shield=True):
        await trio.to_thread.run_sync(store.close)
