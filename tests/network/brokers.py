"""Brokers of one program that are linked by `wires`, on virtual time: started, stopped, killed and restarted as a test likes.

Each is an engine with its network on a disk that forgets what was not synced; no server, no sockets.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from pybroker.broker_network import BrokerNetwork, Members
from pybroker.cluster.announcer import Announcer, listen_for_peers
from pybroker.cluster.datagrams import Segment
from pybroker.cluster.discovery import parse_discovery
from pybroker.cluster.native_urls import parse_native_url
from pybroker.cluster.peers import PeerTable
from pybroker.config import BrokerConfig, NetworkConfig
from pybroker.core.consumer import Connection
from pybroker.core.invariants import check_invariants
from pybroker.engine import Engine
from pybroker.errors import BrokerClosed
from pybroker.local_client import LocalClient
from pybroker.spool import Spool
from pybroker.store.memory import MemoryBackend
from pybroker.store.store import Store
from tests.network.wires import Wire
from tests.store.forgetful import ForgetfulBackend

DISCOVERY = "multicast://239.255.2.3:6155?interface=127.0.0.1"
STOPPED = BrokerClosed("this broker is not there any more")
QUIET = 1.0  # seconds without a message after which a queue counts as empty


def url(name: str) -> str:
    return f"pybroker://{name}:61620"


class Randomness:
    """Of links, from a seed."""

    def __init__(self, seed: str) -> None:
        self._rng = random.Random(seed)

    def nonce(self) -> bytes:
        return self._rng.randbytes(32)

    def random(self) -> float:
        return self._rng.random()


class Node:
    """One broker, over all its lives. `epoch` is what it says of itself in the next one."""

    def __init__(self, world: World, name: str, place: str, config: BrokerConfig) -> None:
        self.world = world
        self.name = name
        self.place = place  # where it is reached
        self.config = config
        self.backend = ForgetfulBackend()
        self.epoch = 0
        self.members: Members = {}
        self.running = False
        self.lives = 0
        self.boots: set[bytes] = set()

    async def start(self) -> None:
        assert not self.running
        self.lives += 1
        store = Store.open(self.backend)
        self.engine = Engine(
            self.config,
            store,
            Spool(lambda: Store.open(MemoryBackend())),
            clock_ms=lambda: 1_000_000 + int(trio.current_time() * 1000),
            life=lambda: f"{self.place}-{self.lives}",
        )
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.running = True
        await self.world.nursery.start(self._run)

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        assert self.config.network is not None
        table = announcer = None
        discovery = parse_discovery(self.config.network.discovery) if self.config.network.discovery else None
        interval = self.config.network.announce_interval
        with self.scope:
            async with trio.open_nursery() as self.tasks:
                if discovery is not None:
                    table = PeerTable(10 * interval, own_name=self.name)
                    announcer = Announcer(
                        discovery,
                        name=self.name,
                        node=self.place,
                        epoch=self.epoch,
                        urls=(url(self.place),),
                        interval=interval,
                        boot=random.Random(f"{self.place} {self.lives}").randbytes(16),
                        open_datagrams=self.world.segment.open_at(self.place),
                    )

                    async def listen() -> None:
                        await listen_for_peers(
                            discovery,
                            table,
                            own_boots={announcer.boot},
                            open_datagrams=self.world.segment.open_at(self.place),
                        )

                    self.tasks.start_soon(listen)
                self.network = BrokerNetwork(
                    self.config,
                    self.engine,
                    epoch=self.epoch,
                    urls=(url(self.place),),
                    software="pybroker/test",
                    dial=self._dial,
                    peers=table,
                    announcer=announcer,
                    tell_members=self._tell_members,
                    randomness=Randomness(f"{self.place} {self.lives}"),
                )
                await self.tasks.start(self.engine.run)
                self.tasks.start_soon(self.network.run)
                task_status.started()
                await self.engine.wait_ended()
                self.tasks.cancel_scope.cancel()
        self.running = False
        self.ended.set()

    def _tell_members(self, members: Members) -> None:
        self.members = members

    async def _dial(self, address: str) -> trio.abc.Stream:
        return await self.world.dial(self.place, address)

    async def kill(self) -> None:
        """As kill -9, or power: what was not synced is gone; its connections are reset."""
        self.running = False
        clients = list(self.engine.core.connections)
        self.scope.cancel()
        await self.ended.wait()
        self.world.cut_all(self.place)
        self._end_clients(clients)
        self.backend = ForgetfulBackend(self.backend.crash().synced)

    async def stop(self) -> None:
        """In good order, as `Broker._stop` does it."""
        self.running = False
        self.network.stop()
        await self.network.wait_closed()
        core = self.engine.begin_turn()
        clients = list(core.connections)
        for connection in clients:
            core.disconnect(connection)
            if isinstance(connection.sink, LocalClient):
                connection.sink.refuse(STOPPED)
        self.engine.end_turn()
        self.engine.journal.close()
        await self.ended.wait()
        self._end_clients(clients)
        self.backend = ForgetfulBackend(self.backend.crash().synced)

    def _end_clients(self, connections: Sequence[Connection]) -> None:
        for connection in connections:
            if isinstance(connection.sink, LocalClient):
                connection.sink.fail(STOPPED)

    # ---- what clients see

    def connect(self, client_id: str = "") -> LocalClient:
        return LocalClient(lambda: self.engine, client_id)

    async def send(self, destination: str, *bodies: str, **options: Any) -> None:
        async with self.connect() as client:
            for body in bodies:
                await client.send(destination, body.encode(), **options)

    @asynccontextmanager
    async def consuming(self, destination: str, found: list[str], **options: Any) -> AsyncIterator[list[str]]:
        """Consume and acknowledge what comes into `found`, while the block runs."""
        client_id = options.pop("client_id", "")

        async def take(task_status: trio.TaskStatus[None]) -> None:
            async with self.connect(client_id) as client, client.subscribe(destination, **options) as messages:
                task_status.started()
                async for message in messages:
                    found.append(message.body.decode())
                    await message.ack()

        async with trio.open_nursery() as nursery:
            await nursery.start(take)
            yield found
            nursery.cancel_scope.cancel()

    async def drain(self, destination: str, quiet: float = QUIET) -> list[str]:
        """Take all that comes until nothing more does."""
        found: list[str] = []
        async with self.consuming(destination, found):
            count = -1
            while count != len(found):
                count = len(found)
                await trio.sleep(quiet)
        return found

    def depth(self, name: str) -> int:
        queue = self.engine.core.by_destination.get(f"/queue/{name}")
        return 0 if queue is None else queue.depth

    def waiting(self, name: str) -> int:
        """Messages on their way to a peer."""
        peer = self.engine.core.links.peers.get(name)
        return 0 if peer is None else peer.waiting

    def linked(self) -> set[str]:
        return {name for name, peer in self.engine.core.links.peers.items() if peer.link is not None}

    def peer(self, name: str) -> Any:
        return self.engine.core.links.peers[name]

    def status(self) -> Mapping[str, Any]:
        return self.network.status()

    def check(self) -> None:
        check_invariants(self.engine.core)


class World:
    """All brokers, and what is between them.

    plan     fault of the next connections: called with (number from 1, source, target), gives (limit, fault) or None
    refused  (source, target) pairs of places that can't reach each other
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.nodes: dict[str, Node] = {}
        self.wires: list[Wire] = []
        self.segment = Segment()
        self.plan: Callable[[int, str, str], tuple[int, str] | None] = lambda number, source, target: None
        self.refused: set[tuple[str, str]] = set()
        self.dials: Counter[tuple[str, str]] = Counter()
        self.dial_times: list[float] = []

    def add(
        self,
        name: str,
        peers: Sequence[str] = (),
        *,
        place: str = "",
        broker: Mapping[str, Any] | None = None,
        **network: Any,
    ) -> Node:
        """A broker; `peers` are places that it dials, as given addresses."""
        place = place or name
        network.setdefault("secret", "secret of the network")
        chosen = NetworkConfig(name=name, peers=tuple(url(peer) for peer in peers), **network)
        config = BrokerConfig(name=place, network=chosen, **(broker or {}))
        node = self.nodes[place] = Node(self, name, place, config)
        return node

    async def dial(self, source: str, address: str) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        target = parse_native_url(address).host
        self.dials[source, target] += 1
        self.dial_times.append(trio.current_time())
        node = self.nodes.get(target)
        if node is None or not node.running or (source, target) in self.refused:
            raise ConnectionRefusedError(f"{target} is not there")
        planned = self.plan(sum(self.dials.values()), source, target)
        wire = Wire(source, target, *(planned or (None, "cut")))
        self.wires.append(wire)
        node.tasks.start_soon(self._accept, node, wire.ends[1])
        return wire.ends[0]

    async def _accept(self, node: Node, end: trio.abc.Stream) -> None:
        await node.network.accept(end, b"")

    def between(self, one: str, other: str) -> list[Wire]:
        return [wire for wire in self.wires if {wire.source, wire.target} == {one, other}]

    def cut_all(self, place: str) -> None:
        for wire in self.wires:
            if place in (wire.source, wire.target):
                wire.cut()

    async def wait(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Until something is so; fails when it is not within the time."""
        with trio.move_on_after(seconds):
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.01)
            return
        raise AssertionError(f"not so after {seconds:g} s")

    async def wait_linked(self, *pairs: tuple[str, str], seconds: float = 30.0) -> None:
        """Pairs of places, linked at both ends."""
        await self.wait(
            lambda: all(
                self.nodes[one].running
                and self.nodes[other].running
                and self.nodes[other].name in self.nodes[one].linked()
                and self.nodes[one].name in self.nodes[other].linked()
                for one, other in pairs
            ),
            seconds,
        )

    def check(self) -> None:
        for node in self.nodes.values():
            if node.running and node.engine.error is None:
                node.check()


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        found = World(nursery)
        yield found
        found.check()
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def two(**network: Any) -> AsyncIterator[tuple[World, Node, Node]]:
    """Brokers "a" and "b", linked: "a" dials."""
    async with world() as found:
        a, b = found.add("a", ["b"], **network), found.add("b", **network)
        await b.start()
        await a.start()
        await found.wait_linked(("a", "b"))
        yield found, a, b
