"""One broker, and its clients in process, over the native protocol, and over STOMP: `World` is what the
conformance suite is run over. (Streams are in memory, so that tests can have virtual time; what sockets do is tested elsewhere.)
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import memory_stream_pair

from pybroker.broker import Broker
from pybroker.client import Client
from tests.client.stomp_face import stomp_client
from tests.client.support import HANGS, Wires
from tests.engine.support import Disk, broker_on, check

URL = "pybroker://broker:61620"
KINDS = ("local", "native", "stomp")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "pybroker.broker")


class World:
    """A broker, and clients of one kind. Fields of the configuration go to `start`, before there are clients."""

    def __init__(self, kind: str, nursery: trio.Nursery) -> None:
        self.kind = kind
        self.disk = Disk()
        self.wires = Wires(nursery)
        self._nursery = nursery
        self._broker: Broker | None = None
        self._over = trio.Event()
        self._ended = trio.Event()

    async def start(self, **overrides: object) -> Broker:
        """The broker, with these fields of its configuration."""
        assert self._broker is None
        broker: Broker = await self._nursery.start(self._run, overrides)
        self._broker = broker
        self.wires.serve_broker(URL, broker)
        return broker

    async def _run(self, overrides: dict[str, object], *, task_status: trio.TaskStatus[Broker]) -> None:
        async with broker_on(self.disk, **overrides) as broker:
            task_status.started(broker)
            await self._over.wait()
            check(broker)
        self._ended.set()

    async def stop(self) -> None:
        if self._broker is not None:
            self._over.set()
            await self._ended.wait()

    async def broker(self) -> Broker:
        return self._broker or await self.start()

    @asynccontextmanager
    async def client(self, client_id: str = "") -> AsyncIterator[Client]:
        broker = await self.broker()
        with trio.fail_after(HANGS):
            if self.kind == "local":
                async with broker.connect(client_id) as client:
                    yield client
            elif self.kind == "native":
                async with self.wires.client(URL, client_id) as remote:
                    yield remote
            else:
                ours, theirs = memory_stream_pair()
                self._nursery.start_soon(_served, broker, theirs)
                async with stomp_client(ours, client_id) as stomp:
                    yield stomp


async def _served(broker: Broker, stream: trio.abc.Stream) -> None:
    await broker._server.serve_stream(stream, native=False)


@pytest.fixture(params=KINDS)
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        world = World(request.param, nursery)
        yield world
        await world.stop()
        nursery.cancel_scope.cancel()
