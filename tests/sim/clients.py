"""Clients of the simulated set: they send, receive, acknowledge, move messages in transactions, and try again at whoever leads.

Each is a process of its own: it notes what it tried before it tries, and what it was told when it was told.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from pybroker.errors import BrokerError, UnknownDelivery
from pybroker.local_client import LocalClient as Client
from pybroker.subscription import ReceivedMessage, Subscription
from tests.sim.member import Life

if TYPE_CHECKING:
    from tests.sim.simulation import Simulation

QUEUES = ("/queue/one", "/queue/two")
MOVED = "/queue/moved"
DEAD = "/queue/ActiveMQ.DLQ"
TRAVEL = 0.002  # seconds between a client and a broker

Work = Callable[[Life, Client], Awaitable[None]]


async def visit(sim: Simulation, life: Life, work: Work) -> None:
    """Do something as a client of one process, until it is done, an error is told, or the process is gone."""
    scope = trio.CancelScope()
    if life.dead:
        return
    life.visits[scope] = None
    try:
        with scope:
            await life.awake()
            async with life.broker.connect() as client:
                await work(life, client)
    except* BrokerError as errors:
        error: BaseException = errors
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        sim.count(f"clients were told {type(error).__name__}")
    finally:
        life.visits.pop(scope, None)


class SimClient(ABC):
    """What both kinds have: a name, random choices, and the way to whoever leads."""

    def __init__(self, sim: Simulation, name: str, pause: float) -> None:
        self.sim = sim
        self.name = name
        self.pause = pause  # mean seconds between two doings
        self.rng = random.Random(f"{sim.seed} client {name}")
        self.number = 0

    async def run(self) -> None:
        while True:
            life = self.sim.some_life(self.rng)
            if life is None:
                await trio.sleep(self.rng.uniform(0.05, 0.2))
                continue
            await trio.sleep(self.rng.uniform(0.5, 1.5) * TRAVEL)
            await visit(self.sim, life, self.work)
            await trio.sleep(self.rng.uniform(0.01, 0.1))

    @abstractmethod
    async def work(self, life: Life, client: Client) -> None:
        """What it does as a client of one process, on and on."""

    async def rest(self, life: Life) -> None:
        """For a moment, then until the process runs."""
        await trio.sleep(self.rng.expovariate(1 / self.pause))
        await life.awake()

    def new_message(self) -> tuple[str, bytes]:
        self.number += 1
        name = f"{self.name}-{self.number}"
        size = self.rng.choice((0, 20, 200, 200, 2000))
        return name, f"{name}|".encode() + self.rng.randbytes(size)


class Sender(SimClient):
    """Sends; what it was not told about it sends again, perhaps."""

    def __init__(self, sim: Simulation, name: str, pause: float) -> None:
        super().__init__(sim, name, pause)
        self.doubtful: list[tuple[str, bytes, str]] = []

    async def work(self, life: Life, client: Client) -> None:
        while True:
            await self.rest(life)
            choice = self.rng.random()
            with trio.move_on_after(self.rng.uniform(1.0, 6.0)):
                if choice < 0.7:
                    await self.send_one(client)
                elif choice < 0.85:
                    await self.send_many(client)
                else:
                    await self.send_together(client)
            if self.rng.random() < 0.03:
                return

    async def send_one(self, client: Client) -> None:
        if self.doubtful and self.rng.random() < 0.5:
            name, body, queue = self.doubtful.pop()
        else:
            name, body = self.new_message()
            queue = self.rng.choice(QUEUES)
        choice = self.rng.random()
        durable, expires = choice > 0.05, 0
        if choice > 0.93 and name not in self.sim.account.sent:
            expires = self.sim.wall_clock_ms() + self.rng.randint(100, 20_000)
        known = self.sim.account.sent.get(name)
        if known is not None:
            durable = known.durable
        self.sim.account.attempt(name, queue, body, durable, expires > 0)
        self.doubtful.append((name, body, queue))
        priority = self.rng.choice((4, 4, 4, 0, 9))
        sent = await client.send(queue, body, durable=durable, priority=priority, expires=expires)
        self.doubtful.remove((name, body, queue))
        self.sim.account.confirm(name, sent.message_id, sent.durable, trio.current_time())
        self.sim.trace(f"{name} is confirmed")

    async def send_many(self, client: Client) -> None:
        sent: list[str] = []
        async with client.publisher() as publisher:
            for _ in range(self.rng.randint(2, 8)):
                name, body = self.new_message()
                queue = self.rng.choice(QUEUES)
                self.sim.account.attempt(name, queue, body)
                await publisher.send(queue, body)
                sent.append(name)
        for name in sent:
            self.sim.account.confirm(name, "", True, trio.current_time())
        self.sim.trace(f"{', '.join(sent)} are confirmed")

    async def send_together(self, client: Client) -> None:
        sent: list[str] = []
        async with client.transaction() as transaction:
            for _ in range(self.rng.randint(1, 3)):
                name, body = self.new_message()
                queue = self.rng.choice(QUEUES)
                self.sim.account.attempt(name, queue, body)
                await transaction.send(queue, body)
                sent.append(name)
        for name in sent:
            self.sim.account.confirm(name, "", True, trio.current_time())
        self.sim.trace(f"{', '.join(sent)} are confirmed together")


class Receiver(SimClient):
    """Receives from one queue: acknowledges, gives back, moves on in a transaction, or leaves with what it has."""

    def __init__(self, sim: Simulation, name: str, pause: float, queue: str) -> None:
        super().__init__(sim, name, pause)
        self.queue = queue

    async def work(self, life: Life, client: Client) -> None:
        prefetch = self.rng.choice((1, 3, 10))
        async with client.subscribe(self.queue, ack="individual", prefetch=prefetch) as subscription:
            while True:
                with trio.move_on_after(self.rng.uniform(0.5, 5.0)):
                    messages = await subscription.receive_batch(self.rng.randint(1, 3))
                    await self.rest(life)
                    await self.settle(life, client, subscription, messages)
                if self.rng.random() < 0.03:
                    return

    async def settle(
        self, life: Life, client: Client, subscription: Subscription, messages: list[ReceivedMessage]
    ) -> None:
        choice = self.rng.random()
        if choice < 0.1:
            await subscription.nack(messages)
        elif choice < 0.25:
            await self.move(client, messages[0])
        elif choice < 0.3:
            return  # its delivery ends with the subscription
        else:
            await acknowledge(self.sim, client, subscription, messages)

    async def move(self, client: Client, message: ReceivedMessage) -> None:
        account = self.sim.account
        name, body = self.new_message()
        account.attempt(name, MOVED, body)
        move = account.try_move(message.message_id, name)
        try:
            async with client.transaction() as transaction:
                await transaction.ack(message)
                await transaction.send(MOVED, body)
                epoch = client._running.journal.position[0]
        except UnknownDelivery:
            return
        account.confirm_move(move, epoch, trio.current_time())
        self.sim.count("moves confirmed")
        self.sim.trace(f"{name} has taken the place of {message.body[:8]!r}")


async def acknowledge(
    sim: Simulation, client: Client, subscription: Subscription, messages: list[ReceivedMessage]
) -> None:
    epoch = client._running.journal.position[0]
    for message in messages:
        sim.account.try_ack(message.message_id)
    await subscription.ack(messages)
    for message in messages:
        sim.account.confirm_ack(message.message_id, epoch, trio.current_time())
        sim.trace(f"{message.body[:8]!r} is acknowledged")


async def drain(sim: Simulation, life: Life, left: dict[str, int], idle: float) -> None:
    """Take everything that is left, until nothing has come for `idle` seconds."""

    async def work(life: Life, client: Client) -> None:
        async with trio.open_nursery() as nursery:
            for queue in (*QUEUES, MOVED, DEAD):
                nursery.start_soon(empty, client, queue)

    async def empty(client: Client, queue: str) -> None:
        async with client.subscribe(queue, ack="individual", prefetch=1000) as subscription:
            while True:
                messages: list[ReceivedMessage] = []
                with trio.move_on_after(idle):
                    messages = await subscription.receive_batch(100)
                if not messages:
                    return
                for message in messages:
                    left[message.message_id] = left.get(message.message_id, 0) + 1
                await acknowledge(sim, client, subscription, messages)

    await visit(sim, life, work)
