"""A replica set of whole brokers, embedded in programs that can be killed, on virtual time. Knows no rule of messaging."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import trio

from pybroker.broker import Broker
from pybroker.cluster.memory import MemoryCoordinator, MemoryZooKeeper
from pybroker.cluster.replica import Replica
from pybroker.replicated import Replicated
from pybroker.settings import make_config
from pybroker.store.copies import MemoryCopies
from tests.cluster.replicas import until
from tests.cluster.test_replica import CONFIG, DELAY, Network
from tests.store.forgetful import ForgetfulBackend

HANGS = 600.0  # seconds of virtual time after which a test hangs


class Embedded:
    """A broker of a set, embedded in a program that can be killed."""

    def __init__(self, brokers: Brokers, name: str) -> None:
        self.brokers = brokers
        self.name = name
        rng = random.Random(name)
        self.copies = MemoryCopies("set", name, lambda: f"{rng.getrandbits(32):08x}", ForgetfulBackend)
        self.rng = rng
        self.roles: list[str] = []

    async def start(self) -> None:
        self.coordinator: MemoryCoordinator = self.brokers.zookeeper.connect(self.name)
        config = replace(CONFIG, bind=self.name, clients=(f"stomp://{self.name}:61613",))
        replica = Replica(
            config,
            self.name,
            self.copies,
            self.coordinator,
            self.brokers.network,
            run_blocking=self._run_blocking,
            rng=self.rng,
        )
        self.broker = Broker(make_config(name=self.name, **self.brokers.settings), Replicated(replica))
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        await self.brokers.nursery.start(self._run, self.scope)
        self.brokers.nursery.start_soon(self._watch, self.broker)

    async def _run(self, scope: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        with scope:
            await self.broker._run(task_status=task_status)
        self.ended.set()

    async def _watch(self, broker: Broker) -> None:
        async for role, _ in broker.roles():
            self.roles.append(role)

    async def _run_blocking(self, call: Callable[[], Any]) -> Any:
        await trio.sleep(0.001)
        return call()

    async def kill(self) -> None:
        self.brokers.zookeeper.kill(self.coordinator)
        self.scope.cancel()
        await self.ended.wait()
        backend = self.copies.backend
        assert isinstance(backend, ForgetfulBackend)
        self.copies.backend = backend.crash(0)


class Brokers:
    def __init__(self, nursery: trio.Nursery, settings: dict[str, object]) -> None:
        self.nursery = nursery
        self.settings = settings
        self.network = Network()
        self.zookeeper = MemoryZooKeeper(session_timeout=10.0, delay=lambda: DELAY)
        self.all = {name: Embedded(self, name) for name in "abc"}

    def leading(self) -> list[Embedded]:
        return [one for one in self.all.values() if one.broker.role == "leader"]

    async def leader(self) -> Embedded:
        await until(lambda: bool(self.leading()), 10.0)
        (leader,) = self.leading()
        return leader

    async def kill_leader(self) -> Embedded:
        """The leader's process ends; who leads then."""
        leader = await self.leader()
        await leader.kill()
        await until(lambda: any(one is not leader for one in self.leading()), 1.0)
        (new,) = (one for one in self.leading() if one is not leader)
        return new

    async def settled(self) -> Embedded:
        await until(
            lambda: sorted(one.broker.role for one in self.all.values()) == ["follower", "follower", "leader"], 10.0
        )
        return await self.leader()


@asynccontextmanager
async def brokers(**settings: object) -> AsyncIterator[Brokers]:
    """A set of three, with these settings of each broker, while the block runs."""
    with trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:
            group = Brokers(nursery, settings)
            await nursery.start(group.zookeeper.run)
            for one in group.all.values():
                await one.start()
            yield group
            nursery.cancel_scope.cancel()
