"""A crash at every batch boundary of a scenario: what was confirmed by then is there, the rest is there whole or not at all.

One run of the scenario keeps, before and after each batch, what a crash at that moment would leave on the disk and what
clients had been told by then. Each of these states is then opened and drained. DESIGN.md sections 3, 4, 7 (P1-P4).
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from pybroker.broker import Broker
from pybroker.client import Client, ReceivedMessage, Subscription
from tests.engine.support import OWNER, Disk, Found, Place, broker_on, check_empty, drain

A, B, C, SINGLE, BAD = (f"/queue/{name}" for name in ("a", "b", "c", "single", "bad"))
DLQ = "/queue/ActiveMQ.DLQ"
FIRST: Place = ("/topic/t.*", "first")
SECOND: Place = ("/topic/>", "second")
GONE: Place = ("/topic/t.x", "gone")
TOPIC = "/topic/t.x"
PLACES: tuple[Place, ...] = (A, B, C, SINGLE, BAD, DLQ, FIRST, SECOND, GONE)


@dataclass
class Transaction:
    sends: set[tuple[Place, str]]
    acks: set[tuple[Place, str]]
    tried: bool = False
    aborted: bool = False
    confirmed: bool = False


@dataclass
class Told:
    """What clients have done and been told so far. Items are (place, id)."""

    tried: set[tuple[Place, str]] = field(default_factory=set)
    confirmed: set[tuple[Place, str]] = field(default_factory=set)
    shown: set[tuple[Place, str]] = field(default_factory=set)
    ack_tried: set[tuple[Place, str]] = field(default_factory=set)
    ack_confirmed: set[tuple[Place, str]] = field(default_factory=set)
    nacks: Counter[str] = field(default_factory=Counter)
    nacks_tried: Counter[str] = field(default_factory=Counter)
    subscriptions: set[Place] = field(default_factory=set)
    removal_tried: set[Place] = field(default_factory=set)
    removed: set[Place] = field(default_factory=set)
    transactions: dict[str, Transaction] = field(default_factory=dict)


class Scenario:
    """Sends, acknowledgements, rejections, transactions, durable subscriptions, dead letters."""

    def __init__(self) -> None:
        self.told = Told()

    def places_of(self, destination: str) -> list[Place]:
        return list(self.told.subscriptions - self.told.removal_tried) if destination == TOPIC else [destination]

    async def send(self, client: Client, destination: str, id: str, **options: Any) -> None:
        items = {(place, id) for place in self.places_of(destination)}
        self.told.tried |= items
        await client.send(destination, body_of(id), {"id": id}, **options)
        self.told.confirmed |= items

    async def receive(self, place: Place, messages: Subscription) -> ReceivedMessage:
        message = await messages.receive()
        self.told.shown.add((place, message.header("id") or ""))
        return message

    async def ack(self, place: Place, message: ReceivedMessage) -> None:
        item = (place, message.header("id") or "")
        self.told.ack_tried.add(item)
        await message.ack()
        self.told.ack_confirmed.add(item)

    async def nack(self, message: ReceivedMessage) -> None:
        id = message.header("id") or ""
        self.told.nacks_tried[id] += 1
        await message.nack()
        self.told.nacks[id] += 1

    async def run(self, broker: Broker) -> None:
        async with broker.connect() as client, broker.connect(OWNER) as owner:
            await self.queues(client)
            await self.subscriptions(client, owner)
            await self.transactions(client)
            await self.dead_letters(client)
            async with trio.open_nursery() as nursery:  # many in one batch, and batches that overlap turns
                for number in range(4):
                    nursery.start_soon(self.sender, broker, f"together-{number}")
                nursery.start_soon(self.consumer, broker)

    async def queues(self, client: Client) -> None:
        for number, priority in enumerate((4, 4, 9, 0, 4)):
            await self.send(client, A, f"a-{number}", priority=priority, expires=2**62 if number == 1 else 0)
        items = {(B, f"b-{number}") for number in range(10)}
        self.told.tried |= items
        async with client.publisher(max_in_flight=3) as publisher:
            await publisher.send_many([(B, body_of(id), {"id": id}) for _, id in sorted(items, key=str)])
        self.told.confirmed |= items
        async with client.subscribe(A, prefetch=2) as messages:
            first = await self.receive(A, messages)
            second = await self.receive(A, messages)
            await self.nack(first)
            await self.ack(A, second)
            again = await self.receive(A, messages)
            assert again.redelivered
            await self.ack(A, again)
            await self.receive(A, messages)  # is given back when the subscription is left
        async with client.subscribe(B, ack="cumulative") as messages:
            received = [await self.receive(B, messages) for _ in range(4)]
            items = {(B, message.header("id") or "") for message in received}
            self.told.ack_tried |= items
            await messages.ack(received)
            self.told.ack_confirmed |= items

    async def subscriptions(self, client: Client, owner: Client) -> None:
        told = self.told
        for place in (FIRST, SECOND, GONE):
            async with owner.subscribe(place[0], durable_name=place[1]):
                told.subscriptions.add(place)
        for number in range(4):
            await self.send(client, TOPIC, f"t-{number}", expires=2**62 if number == 2 else 0)
        async with owner.subscribe(FIRST[0], durable_name=FIRST[1]) as messages:
            for _ in range(2):
                await self.ack(FIRST, await self.receive(FIRST, messages))
        async with owner.subscribe(SECOND[0], durable_name=SECOND[1]) as messages:
            await self.receive(SECOND, messages)
        told.removal_tried.add(GONE)
        await owner.remove_subscription(GONE[1])
        told.removed.add(GONE)
        await self.send(client, TOPIC, "t-4")

    async def transactions(self, client: Client) -> None:
        told = self.told
        async with client.subscribe(A, prefetch=1) as messages:
            for name in ("kept", "aborted"):
                message = await self.receive(A, messages)
                item = (A, message.header("id") or "")
                sends = {(C, f"{name}-{number}") for number in range(3)} | {(B, f"{name}-b")}
                sends |= {(place, f"{name}-t") for place in self.places_of(TOPIC)}
                transaction = told.transactions[name] = Transaction(sends, {item})
                try:
                    async with client.transaction() as inside:
                        for destination, id in sorted({(p if isinstance(p, str) else TOPIC, id) for p, id in sends}):
                            await inside.send(destination, body_of(id), {"id": id})
                        await inside.ack(message)
                        await self.send(client, SINGLE, f"{name}-outside")
                        if name == "aborted":
                            transaction.aborted = True
                            raise KeyError
                        transaction.tried = True
                except KeyError:
                    continue
                transaction.confirmed = True

    async def dead_letters(self, client: Client) -> None:
        await self.send(client, BAD, "bad")
        async with client.subscribe(BAD) as messages:
            for _ in range(6):
                await self.nack(await self.receive(BAD, messages))

    async def sender(self, broker: Broker, name: str) -> None:
        async with broker.connect() as client:
            for number in range(5):
                await self.send(client, C, f"{name}-{number}")

    async def consumer(self, broker: Broker) -> None:
        async with broker.connect() as client, client.subscribe(C, prefetch=3) as messages:
            for _ in range(9):
                await self.ack(C, await self.receive(C, messages))


def body_of(id: str) -> bytes:
    return id.encode() * 7


def verify(found: dict[Place, list[Found]], told: Told) -> None:
    """Compare what a crash left with what clients had been told."""
    for place, messages in found.items():
        ids = [message.id for message in messages]
        assert len(ids) == len(set(ids)), (place, ids)
        for message in messages:
            assert message.body == body_of(message.id)
    there = {(place, message.id) for place, messages in found.items() for message in messages}
    sent = told.tried.union(*(t.sends for t in told.transactions.values()))
    dead = {id for place, id in there if place == DLQ}
    assert {item for item in there if item[0] != DLQ} <= sent, "nothing unexpected"
    assert dead <= {"bad"}
    wanted = told.confirmed - told.ack_tried
    for transaction in told.transactions.values():
        wanted -= transaction.acks
    wanted = {item for item in wanted if item[0] not in told.removal_tried}
    missing = {item for item in wanted - there if item[1] not in dead}
    assert not missing, f"confirmed, and lost: {missing}"
    assert not told.ack_confirmed & there, f"acknowledged, and back: {told.ack_confirmed & there}"
    for transaction in told.transactions.values():
        # what was sent may have been consumed since: only then it may be away
        sends = transaction.sends - told.ack_tried
        done = sends <= there
        assert done or not sends & there, f"a transaction in part: {sends & there} of {sends}"
        assert not transaction.confirmed or done
        assert transaction.tried or not done
        acks = transaction.acks & told.confirmed
        assert bool(acks & there) != done, f"acks {acks} and sends {sends} of a transaction went different ways"
    for place in told.removed:
        assert not found[place]
    for place, messages in found.items():
        for message in messages:
            if (place, message.id) in told.shown and place != DLQ:
                assert message.redelivered, f"{message} of {place} was shown before"
    if told.nacks["bad"] >= 6:
        assert dead == {"bad"}
    if told.nacks_tried["bad"] < 5:  # with five the sixth delivery may have begun, and the crash ended it
        assert not dead
    for message in found[DLQ]:
        assert (message.headers["dead-letter-origin"], message.headers["dead-letter-reason"]) == (BAD, "deliveries")


def in_order(messages: list[Found]) -> None:
    """By priority, then as sent: `a-0` before `a-1`."""
    keys = [(-message.priority, message.id) for message in messages if message.id.startswith("a-")]
    assert keys == sorted(keys)


@pytest.mark.parametrize("window", [2_048, 2])
async def test_a_crash_at_every_batch_boundary(autojump_clock: trio.testing.MockClock, window: int) -> None:
    scenario = Scenario()
    disk = Disk()
    moments: list[tuple[str, dict[bytes, bytes], Told]] = []

    def keep(when: str, number: int) -> None:
        moments.append((f"{when} batch {number}", dict(disk.backend.synced), copy.deepcopy(scenario.told)))

    disk.before = lambda number: keep("before", number)
    disk.after = lambda number: keep("after", number)
    limits = {"window_messages_max": window}
    async with broker_on(disk, limits=limits) as broker:
        await scenario.run(broker)
        keep("at the end, behind", disk.commits)
    assert len(moments) > 100
    for moment, state, told in moments:
        try:
            async with broker_on(Disk(state), limits=limits) as broker:
                found = await drain(broker, *PLACES)
                check_empty(broker)
            in_order(found[A])
            verify(found, told)
        except AssertionError as error:
            raise AssertionError(f"{moment}: {error}") from error


async def test_crash_after_crash(autojump_clock: trio.testing.MockClock) -> None:
    """Each life takes one message and dies: the message comes back marked, and reaches the dead letters in the end."""
    disk = Disk()
    async with broker_on(disk) as broker, broker.connect() as client:
        await client.send(A, body_of("poison"), {"id": "poison"})
    state = dict(disk.backend.synced)
    lives = 0
    while True:
        disk = Disk(state)
        async with broker_on(disk) as broker:
            async with broker.connect() as client, client.subscribe(A) as messages:
                with trio.move_on_after(1) as waiting:
                    message = await messages.receive()
                    assert message.deliveries == lives
                    lives += 1
                    state = dict(disk.backend.synced)  # the crash: what follows never happened
            if waiting.cancelled_caught:
                break
    assert lives == 6
    async with broker_on(Disk(state)) as broker:
        found = await drain(broker, A, DLQ)
        assert [message.id for message in found[DLQ]] == ["poison"]
        assert found[DLQ][0].headers["dead-letter-deliveries"] == "6"
        check_empty(broker)
