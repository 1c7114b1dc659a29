"""Clients of a simulated network, over the wire: they find a broker, send, receive, settle, and move on when it is gone.

Each notes what it tries before it tries, and what it was told when it was told. What they do with connections, repeats and lost
brokers is the real client's doing.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from pybroker.addresses import parse_target
from pybroker.cluster.announcer import listen_for_peers
from pybroker.cluster.discovery import parse_discovery
from pybroker.cluster.native_urls import NativeAddress
from pybroker.cluster.peers import PeerTable
from pybroker.connect_options import ConnectOptions
from pybroker.connecting import connected
from pybroker.errors import BrokerError, BrokerFull, BrokerUnavailable, UnknownDelivery
from pybroker.remote_client import RemoteClient
from pybroker.remote_search import Announced, Source
from pybroker.subscription import ReceivedMessage, Subscription
from tests.sim.net_member import native, url
from tests.sim.net_set import DISCOVERY, SECRET

if TYPE_CHECKING:
    from tests.sim.net_simulation import NetSimulation

QUEUES = ("/queue/one", "/queue/two")
MOVED = "/queue/moved"
TOPIC = "/topic/news"
PATTERNS = (TOPIC, "/topic/*", "/topic/>")
DURABLE = "mine"  # the name of each subscriber's subscription
DEAD = "/queue/ActiveMQ.DLQ"
OPTIONS = ConnectOptions(
    deadline=4.0,
    connect_timeout=1.5,
    reconnect_delay_max=0.5,
    heartbeat_interval=0.5,
    close_timeout=1.0,
    learn=False,
    discovery_secret=SECRET,
)


@asynccontextmanager
async def client_of(
    sim: NetSimulation, name: str, members: Sequence[str], rng: random.Random
) -> AsyncIterator[RemoteClient]:
    """A client of these members, by its name in the network; of none: of those that it hears announced."""

    async def dial(address: NativeAddress) -> trio.abc.Stream:
        return await sim.network.dial(name, native(address.host))

    hello = {"client_id": name}
    if members:
        target = parse_target(f"failover:({','.join(map(url, members))})", OPTIONS)
        async with connected(target, None, False, dial, hello, rng) as client:
            yield client
        return
    discovery = parse_discovery(DISCOVERY)
    table = PeerTable()
    async with trio.open_nursery() as nursery:

        async def listen(task_status: trio.TaskStatus[None]) -> None:
            await listen_for_peers(
                discovery,
                table,
                secret=SECRET if sim.options.secret else "",
                open_datagrams=sim.segment.open_at(name),
                task_status=task_status,
            )

        await nursery.start(listen)
        source: Source = Announced(table)
        async with connected(
            parse_target(f"discovery:({DISCOVERY})", OPTIONS), source, False, dial, hello, rng
        ) as client:
            yield client
        nursery.cancel_scope.cancel()


class NetClient(ABC):
    """What all have: a name, random choices, and the members that it knows (none: it listens for announcements)."""

    def __init__(self, sim: NetSimulation, name: str, members: Sequence[str]) -> None:
        self.sim = sim
        self.name = name
        self.members = members
        self.rng = random.Random(f"{sim.seed} client {name}")
        self.number = 0

    async def run(self) -> None:
        while True:
            try:
                async with client_of(self.sim, self.name, self.members, self.rng) as client:
                    self.sim.count("clients connected")
                    try:
                        await self.work(client)
                    finally:
                        found = client.statistics()
                        self.sim.counts["sends repeated by clients"] += found.repeated
                        self.sim.counts["connections made again"] += found.connections - 1
            except* BrokerError as group:
                error: BaseException = group
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                self.sim.count(f"clients were told {type(error).__name__}")
            await trio.sleep(self.rng.uniform(0.01, 0.2))

    @abstractmethod
    async def work(self, client: RemoteClient) -> None:
        """What it does, on and on."""

    async def rest(self) -> None:
        await trio.sleep(self.rng.expovariate(1 / self.sim.options.pause))

    def new_message(self, receivers: tuple[str, ...] = ("",)) -> tuple[str, bytes]:
        self.number += 1
        name = f"{self.name}-{self.number}"
        body = f"{name}|".encode() + self.rng.randbytes(self.rng.choice((0, 20, 200, 2000)))
        self.sim.account.attempt(name, body, receivers)
        return name, body

    def confirmed(self, names: Sequence[str]) -> None:
        for name in names:
            self.sim.account.confirm(name, trio.current_time())
        self.sim.trace(f"{', '.join(names)} confirmed")


class Sender(NetClient):
    """Sends, each message once: what is repeated is repeated by the real client."""

    async def work(self, client: RemoteClient) -> None:
        while self.rng.random() > 0.03:
            await self.rest()
            choice = self.rng.random()
            with trio.move_on_after(self.rng.uniform(1.0, 6.0)):
                subscribers = tuple(self.sim.account.subscribers)
                if choice < 0.2 and subscribers:
                    await self.send_one(client, TOPIC, subscribers)
                elif choice < 0.6:
                    await self.send_one(client, self.rng.choice(QUEUES))
                elif choice < 0.85:
                    await self.send_many(client)
                else:
                    await self.send_together(client)

    async def send_one(self, client: RemoteClient, destination: str, receivers: tuple[str, ...] = ("",)) -> None:
        name, body = self.new_message(receivers)
        try:
            await client.send(destination, body, priority=self.rng.choice((4, 4, 4, 0, 9)))
        except (BrokerUnavailable, BrokerFull):
            self.sim.account.deny(name)
            raise
        self.confirmed([name])

    async def send_many(self, client: RemoteClient) -> None:
        names: list[str] = []
        async with client.publisher() as publisher:
            for _ in range(self.rng.randint(2, 8)):
                name, body = self.new_message()
                names.append(name)
                await publisher.send(self.rng.choice(QUEUES), body)
        self.confirmed(names)

    async def send_together(self, client: RemoteClient) -> None:
        names: list[str] = []
        async with client.transaction() as transaction:
            for _ in range(self.rng.randint(1, 3)):
                name, body = self.new_message()
                names.append(name)
                await transaction.send(self.rng.choice(QUEUES), body)
        self.confirmed(names)


class Receiver(NetClient):
    """Receives from one queue: acknowledges, gives back, moves on in a transaction, or leaves with what it has."""

    def __init__(self, sim: NetSimulation, name: str, members: Sequence[str], queue: str) -> None:
        super().__init__(sim, name, members)
        self.queue = queue

    async def work(self, client: RemoteClient) -> None:
        prefetch = self.rng.choice((1, 3, 10))
        async with client.subscribe(self.queue, ack="individual", prefetch=prefetch) as subscription:
            while self.rng.random() > 0.05:
                with trio.move_on_after(self.rng.uniform(0.5, 5.0)):
                    messages = await subscription.receive_batch(self.rng.randint(1, 5))
                    await self.rest()
                    await self.settle(client, subscription, messages)

    async def settle(self, client: RemoteClient, subscription: Subscription, messages: list[ReceivedMessage]) -> None:
        choice = self.rng.random()
        if choice < 0.08:
            await subscription.nack(messages)
        elif choice < 0.25:
            await self.move(client, messages[0])
        elif choice > 0.04:
            await acknowledge(self.sim, client, self.name, subscription, messages)

    async def move(self, client: RemoteClient, message: ReceivedMessage) -> None:
        name, body = self.new_message()
        self.sim.account.try_move(message.body, name)
        async with client.transaction() as transaction:
            await transaction.ack(message)
            await transaction.send(MOVED, body)
        self.sim.account.confirm_ack(message.body, self.name, where(client), trio.current_time())
        self.confirmed([name])
        self.sim.count("moves confirmed")


def where(client: RemoteClient) -> str:
    """The set that a client is connected with now; "" when it is with none."""
    return client.statistics().url.removeprefix("pybroker://")[:1]


async def acknowledge(
    sim: NetSimulation, client: RemoteClient, who: str, subscription: Subscription, messages: list[ReceivedMessage]
) -> None:
    for message in messages:
        sim.account.try_ack(message.body, who)
    try:
        await subscription.ack(messages)
    except UnknownDelivery:  # of some of them: the connection was another one meanwhile
        sim.count("acknowledgements of lost deliveries")
        return
    for message in messages:
        sim.account.confirm_ack(message.body, who, where(client), trio.current_time())
    sim.trace(f"{who} has acknowledged {[message.body[:8] for message in messages]}")


class Drain(NetClient):
    """Takes all that comes from one queue, and acknowledges it."""

    def __init__(self, sim: NetSimulation, name: str, members: Sequence[str], queue: str) -> None:
        super().__init__(sim, name, members)
        self.queue = queue

    async def work(self, client: RemoteClient) -> None:
        async with client.subscribe(self.queue, ack="individual", prefetch=100) as subscription:
            while True:
                messages = await subscription.receive_batch(100)
                await acknowledge(self.sim, client, self.name, subscription, messages)


class Subscriber(NetClient):
    """A durable subscriber of the topic at one set: acknowledges what comes, or is away for a while."""

    async def work(self, client: RemoteClient) -> None:
        pattern = PATTERNS[int(self.name[1:]) % len(PATTERNS)]
        async with client.subscribe(pattern, ack="individual", prefetch=10, durable_name=DURABLE) as subscription:
            while self.sim.calm or self.rng.random() > 0.05:
                with trio.move_on_after(self.rng.uniform(0.5, 5.0)):
                    messages = await subscription.receive_batch(10)
                    if self.sim.calm or self.rng.random() < 0.9:
                        await acknowledge(self.sim, client, self.name, subscription, messages)
        if self.rng.random() < 0.3:
            await trio.sleep(self.rng.uniform(0.0, 3.0))
