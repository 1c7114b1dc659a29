"""Clients over a network in memory, on virtual time: to real brokers, and to puppets. Owns addresses, dialling and its faults."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from trio.testing import memory_stream_pair

from pybroker.addresses import parse_target
from pybroker.broker import Broker
from pybroker.client import Client
from pybroker.cluster.native_urls import NativeAddress
from pybroker.connect_options import ConnectOptions
from pybroker.connecting import connected
from pybroker.remote_client import RemoteClient
from pybroker.remote_search import Source
from pybroker.subscription import Subscription

HANGS = 2_000.0  # seconds of virtual time after which a test hangs

Serve = Callable[[trio.abc.Stream], Awaitable[None]]


class Wires:
    """A network: who answers at which address. Dialling an address at which nobody is is refused.

    dialled  every address in order, with trio's time
    held     addresses at which a connection is never answered
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._serving: dict[str, Serve] = {}
        self._streams: dict[str, list[tuple[trio.StapledStream, trio.StapledStream]]] = {}
        self.dialled: list[tuple[str, float]] = []
        self.held: set[str] = set()

    def serve(self, url: str, serve: Serve) -> None:
        """From now on this answers there."""
        self._serving[url] = serve

    def close(self, url: str) -> None:
        """Nobody answers there any more; the connections that are there stay."""
        self._serving.pop(url, None)

    def cut(self, url: str) -> None:
        """Break every connection with an address, as a reset does."""
        for ours, theirs in self._streams.pop(url, []):
            for stream in (ours, theirs):
                stream.send_stream.close()
                stream.receive_stream.close()

    async def dial(self, address: NativeAddress) -> trio.abc.Stream:
        """In the place of TCP."""
        url = address.url
        self.dialled.append((url, trio.current_time()))
        await trio.lowlevel.checkpoint()
        if url in self.held:
            await trio.sleep_forever()
        serve = self._serving.get(url)
        if serve is None:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = memory_stream_pair()
        self._streams.setdefault(url, []).append((ours, theirs))
        self._nursery.start_soon(self._run, serve, theirs)
        return ours

    async def _run(self, serve: Serve, stream: trio.abc.Stream) -> None:
        try:
            await serve(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            await trio.aclose_forcefully(stream)

    def serve_broker(self, url: str, broker: Broker) -> None:
        """A real broker answers there, in the native protocol."""

        async def serve(stream: trio.abc.Stream) -> None:
            await broker._server.serve_stream(stream, native=True)

        self.serve(url, serve)

    @asynccontextmanager
    async def client(
        self,
        url: str,
        client_id: str = "",
        options: ConnectOptions | None = None,
        *,
        source: Source | None = None,
        seed: int = 0,
        tls_only: bool = False,
    ) -> AsyncIterator[RemoteClient]:
        """`pybroker.connect` over these wires."""
        hello = {"client_id": client_id, "login": "", "passcode": ""}
        target = parse_target(url, options)
        async with connected(target, source, tls_only, self.dial, hello, random.Random(seed)) as client:
            yield client


@asynccontextmanager
async def wires() -> AsyncIterator[Wires]:
    """A network while the block runs; what still runs in it at the end is cut off."""
    with trio.fail_after(HANGS):
        async with trio.open_nursery() as nursery:
            yield Wires(nursery)
            nursery.cancel_scope.cancel()


# ---- steps of tests


async def fill(client: Client, count: int, destination: str = "/queue/q", **options: object) -> None:
    """Send the numbers 0, 1, ..."""
    for number in range(count):
        await client.send(destination, b"%d" % number, **options)  # type: ignore[arg-type]


async def bodies(subscription: Subscription, count: int, ack: bool = True) -> list[int]:
    """The numbers that come next."""
    found: list[int] = []
    while len(found) < count:
        batch = await subscription.receive_batch(count - len(found))
        found += [int(message.body) for message in batch]
        if ack:
            await subscription.ack(batch)
    return found


async def nothing_comes(subscription: Subscription) -> bool:
    """Whether no message comes for some time."""
    with trio.move_on_after(5):
        await subscription.receive()
        return False
    return True
