"""The keeper of a broker in a replica set: gives a term for each leadership. Owns a replica's parts and the order they end in.

DESIGN.md section 5. Between the broker, which asks for terms and knows nothing of replication, and `cluster`, which knows
nothing of brokers. While another replica leads, whoever asks is told which one and where (`NotLeader`).
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

import trio

from pybroker.cluster.network import make_network
from pybroker.cluster.replica import LEADER, Replica
from pybroker.cluster.zookeeper import ZooKeeperCoordinator
from pybroker.config import BrokerConfig
from pybroker.errors import BrokerError, NotLeader
from pybroker.keeper import Command, Term, keep_compact
from pybroker.store.copies import DiskCopies

CLOSING = 3.0  # seconds for the end of ZooKeeper's session


class Replicated:
    """`Keeper` over a `Replica`. `session` is entered before the replica runs, and left after it: ZooKeeper's session."""

    serves_always = False

    def __init__(self, replica: Replica, session: AbstractAsyncContextManager[Any] | None = None) -> None:
        self.replica = replica
        self._session = session if session is not None else nullcontext()
        self._urls: tuple[str, ...] = replica.config.clients
        self._stopping = trio.Event()
        self._ended = trio.Event()
        replica.clients = lambda: self._urls

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        await self._session.__aenter__()
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.replica.run)
                nursery.start_soon(keep_compact, lambda: self.replica.store)
                task_status.started()
                await self._stopping.wait()
                nursery.cancel_scope.cancel()
        finally:
            self._ended.set()
            with trio.move_on_after(CLOSING, shield=True):
                await self._session.__aexit__(None, None, None)

    async def next_term(self) -> Term:
        return await self.replica.next_term()

    async def stop(self) -> None:
        """A leader has resigned, or time for that is over, when this returns."""
        with trio.move_on_after(2 * self.replica.config.handover_timeout):
            seen = self.role
            while seen[0] == LEADER:
                seen = await self.wait_role_change(seen)
        self._stopping.set()
        await self._ended.wait()

    def hand_over(self) -> None:
        self.replica.hand_over()

    def show_clients(self, urls: tuple[str, ...]) -> None:
        if not self.replica.config.clients and urls != self._urls:
            self._urls = urls
            self.replica.show_clients()

    def why_not(self) -> BrokerError:
        replica = self.replica
        leader = replica.leader
        head = f"replica {replica.name} of set {replica.config.name} does not lead"
        if leader is None or leader.name == replica.name:
            blocked = f" ({replica.blocked})" if replica.blocked else ""
            return NotLeader(f"{head}; no leader is known at the moment{blocked}: connect again in a moment")
        where = ", ".join(leader.clients) or "its clients' addresses are not known yet"
        return NotLeader(f"{head}: replica {leader.name} does, at {where}", leader.name, leader.clients)

    @property
    def role(self) -> tuple[str, int]:
        return self.replica.role, self.replica.epoch

    async def wait_role_change(self, seen: tuple[str, int]) -> tuple[str, int]:
        return await self.replica.wait_role_change(seen)

    def commands(self) -> Mapping[str, Command]:
        """``replica-status``, ``replica-handover``, ``replica-replace`` (old, new) and ``replica-force-start``."""
        replica = self.replica

        async def status(_: Mapping[str, Any]) -> Any:
            return replica.status()

        async def hand_over(_: Mapping[str, Any]) -> Any:
            epoch = replica.epoch
            if replica.role != LEADER:
                raise self.why_not()
            replica.hand_over()
            seen = self.role
            while seen == (LEADER, epoch) or seen[0] not in ("follower", LEADER):
                seen = await self.wait_role_change(seen)
            return replica.status()

        async def replace(arguments: Mapping[str, Any]) -> Any:
            await replica.replace(str(arguments["old"]), str(arguments["new"]))
            return replica.status()

        async def force_start(_: Mapping[str, Any]) -> Any:
            replica.force_start()
            await replica.wait_forced()
            return replica.status()

        return {
            "replica-status": status,
            "replica-handover": hand_over,
            "replica-replace": replace,
            "replica-force-start": force_start,
        }


def make_replicated(config: BrokerConfig) -> Replicated:
    """The keeper of a broker whose configuration names a set: real ZooKeeper, TCP, LevelDB. Opens nothing yet."""
    chosen = config.replica_set
    assert chosen is not None
    assert config.data_dir is not None
    coordinator = ZooKeeperCoordinator(
        chosen.zookeeper, chosen.name, session_timeout=chosen.session_timeout, secret=chosen.zookeeper_auth or None
    )
    copies = DiskCopies(config.data_dir, chosen.name, config.name, lambda: secrets.token_hex(8))
    replica = Replica(
        chosen,
        config.name,
        copies,
        coordinator,
        make_network(chosen),
        run_blocking=in_thread(),
        run_reading=in_thread(),
        rng=random.SystemRandom(),
    )
    return Replicated(replica, coordinator)


def in_thread() -> Callable[[Callable[[], Any]], Awaitable[Any]]:
    """Runs calls in a worker thread, one at a time."""
    limiter = trio.CapacityLimiter(1)

    async def run(call: Callable[[], Any]) -> Any:
        return await trio.to_thread.run_sync(call, limiter=limiter)

    return run
