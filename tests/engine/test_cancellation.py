"""Cancelled at any await, the client loses nothing (DESIGN.md section 7): at *every* checkpoint, one after the other.

A scenario is run again and again, cancelled at its first step, its second, and so on until it ends uncancelled; each time
twice, before the step and while it is blocked. After that the broker must serve others, have what was confirmed, give
back what was not acknowledged, and forget everything else.
"""

# ruff: noqa: SIM117 (whole blocks are what is tested, and the nesting shows what ends first)
from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from pybroker.broker import Broker, open_broker
from pybroker.client import Client, ReceivedMessage
from tests.engine.support import OWNER, Disk, Place, broker_on, cancelled_at, check, check_empty, drain, engine_of

Q, OTHER, TOPIC = "/queue/q", "/queue/other", "/topic/t"
DURABLE: Place = (TOPIC, "mine")
PLACES: tuple[Place, ...] = (Q, OTHER, DURABLE)
STEPS_MAX = 400


class Told:
    """What the cancelled code had done and been told. Items are (place, id)."""

    def __init__(self) -> None:
        self.tried: set[tuple[Place, str]] = set()
        self.confirmed: set[tuple[Place, str]] = set()
        self.handed: set[tuple[Place, str]] = set()
        self.ack_tried: set[tuple[Place, str]] = set()
        self.ack_confirmed: set[tuple[Place, str]] = set()
        self.together: list[set[tuple[Place, str]]] = []  # sends of one transaction
        self.swapped: list[tuple[tuple[Place, str], tuple[Place, str]]] = []  # (acknowledged, sent) in one transaction


Scenario = Callable[[Broker, Told], Awaitable[None]]


async def send(client: Client, told: Told, id: str, place: str = Q) -> None:
    told.tried.add((place, id))
    await client.send(place, id.encode(), {"id": id})
    told.confirmed.add((place, id))


def handed(told: Told, place: Place, messages: list[ReceivedMessage], auto: bool = False) -> None:
    items = {(place, message.header("id") or "") for message in messages}
    told.handed |= items
    if auto:
        told.ack_tried |= items
        told.ack_confirmed |= items


async def ack(told: Told, place: Place, message: ReceivedMessage) -> None:
    item = (place, message.header("id") or "")
    told.ack_tried.add(item)
    await message.ack()
    told.ack_confirmed.add(item)


async def sending(broker: Broker, told: Told) -> None:
    async with broker.connect() as client:
        for number in range(3):
            await send(client, told, f"s{number}")
        await client.send(Q, b"transient", {"id": "transient"}, durable=False)


async def publishing(broker: Broker, told: Told) -> None:
    async with broker.connect() as client:
        async with client.publisher(max_in_flight=2) as publisher:
            for number in range(4):
                told.tried.add((Q, f"p{number}"))
                await publisher.send(Q, f"p{number}".encode(), {"id": f"p{number}"})
            await publisher.wait_confirmed()
            told.confirmed |= {(Q, f"p{number}") for number in range(4)}
            many = [(Q, f"m{number}") for number in range(6)]
            told.tried |= set(many)
            await publisher.send_many([(place, id.encode(), {"id": id}) for place, id in many])
        told.confirmed |= set(many)


async def receiving(broker: Broker, told: Told) -> None:
    async with broker.connect() as client:
        async with client.subscribe(Q, prefetch=3) as messages:
            first = await messages.receive()
            handed(told, Q, [first])
            await ack(told, Q, first)
            batch = await messages.receive_batch(2)
            handed(told, Q, batch)
            await batch[0].nack()
            again = await messages.receive()
            handed(told, Q, [again])
            told.ack_tried |= {(Q, message.header("id") or "") for message in batch[1:]}
            await messages.ack(batch[1:])
            told.ack_confirmed |= {(Q, message.header("id") or "") for message in batch[1:]}
            async for message in messages:
                handed(told, Q, [message])
                break


async def receiving_auto(broker: Broker, told: Told) -> None:
    async with broker.connect() as client, client.subscribe(Q, ack="auto", prefetch=2) as messages:
        for _ in range(3):
            handed(told, Q, [await messages.receive()], auto=True)
            handed(told, Q, await messages.receive_batch(2), auto=True)


async def receiving_cumulative(broker: Broker, told: Told) -> None:
    async with broker.connect() as client, client.subscribe(Q, ack="cumulative") as messages:
        received = [await messages.receive() for _ in range(3)]
        handed(told, Q, received)
        items = {(Q, message.header("id") or "") for message in received}
        told.ack_tried |= items
        await messages.ack(received)
        told.ack_confirmed |= items
        await messages.nack([await messages.receive()])


async def transacting(broker: Broker, told: Told) -> None:
    async with broker.connect() as client, client.subscribe(Q) as messages:
        for number in range(2):
            message = await messages.receive()
            handed(told, Q, [message])
            sends: set[tuple[Place, str]] = {(OTHER, f"tx{number}-{part}") for part in range(2)}
            told.together.append(sends)
            told.tried |= sends
            old: tuple[Place, str] = (Q, message.header("id") or "")
            told.ack_tried.add(old)
            told.swapped.append((old, (OTHER, f"tx{number}-0")))
            async with client.transaction() as transaction:
                for _, id in sorted(sends, key=str):
                    await transaction.send(OTHER, id.encode(), {"id": id})
                await transaction.ack(message)
            told.confirmed |= sends
            told.ack_confirmed.add(old)
        message = await messages.receive()
        handed(told, Q, [message])
        async with client.transaction() as transaction:
            await transaction.nack(message)


async def subscribing_durably(broker: Broker, told: Told) -> None:
    async with broker.connect(OWNER) as client:
        async with client.subscribe(TOPIC, durable_name="mine") as messages:
            told.tried.add((DURABLE, "d"))
            await client.send(TOPIC, b"d", {"id": "d"})
            told.confirmed.add((DURABLE, "d"))
            handed(told, DURABLE, [await messages.receive()])
        async with client.subscribe(TOPIC, durable_name="brief"):
            pass
        await client.remove_subscription("brief")


async def together(broker: Broker, told: Told) -> None:
    """A program as it might be: tasks in a nursery, cancelled all at once."""

    async def produce(client: Client) -> None:
        for number in range(3):
            await send(client, told, f"n{number}", OTHER)

    async def consume(client: Client) -> None:
        async with client.subscribe(OTHER) as messages:
            for _ in range(3):
                message = await messages.receive()
                handed(told, OTHER, [message])
                await ack(told, OTHER, message)

    async with broker.connect() as client, trio.open_nursery() as nursery:
        nursery.start_soon(produce, client)
        nursery.start_soon(consume, client)
        await trio.sleep(1)


SCENARIOS = [
    sending,
    publishing,
    receiving,
    receiving_auto,
    receiving_cumulative,
    transacting,
    subscribing_durably,
    together,
]


def verify(there: dict[tuple[Place, str], bool], told: Told, initial: set[tuple[Place, str]]) -> None:
    """`there`: what was found, and whether it was marked as redelivered."""
    found = there.keys()
    assert found <= initial | told.tried, "nothing unexpected"
    assert (initial | told.confirmed) - told.ack_tried <= found, "confirmed, and lost"
    assert not told.ack_confirmed & found, "acknowledged, and back"
    for item in told.handed & found:
        assert there[item], f"{item} was handed out before, and is not marked"
    for sends in told.together:
        assert sends <= found or not sends & found, f"a transaction in part: {sends & found}"
    for old, new in told.swapped:
        assert (old in found) != (new in found), f"a transaction in part: {old}, {new}"


@pytest.mark.parametrize("window", [2_048, 2])
@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_cancelled_at_every_checkpoint(
    autojump_clock: trio.testing.MockClock, scenario: Scenario, blocked: bool, window: int
) -> None:
    for step in range(1, STEPS_MAX):
        disk = Disk()
        told = Told()
        async with broker_on(disk, limits={"window_messages_max": window}) as broker:
            initial: set[tuple[Place, str]] = {(Q, f"i{number}") for number in range(12)}
            async with broker.connect() as client, client.publisher() as publisher:
                await publisher.send_many([(Q, id.encode(), {"id": id}) for _, id in sorted(initial, key=str)])
            cancelled = await cancelled_at(step, blocked, lambda: scenario(broker, told))  # noqa: B023
            try:
                check(broker)
                async with trio.open_nursery() as nursery:  # others are served, at once
                    nursery.start_soon(serve_others, broker)
                found = await drain(broker, *PLACES)
                there = {(place, each.id): each.redelivered for place, all_ in found.items() for each in all_}
                assert len(there) == sum(map(len, found.values())), "twice"
                there.pop((Q, "transient"), None)
                verify(there, told, initial)
                check_empty(broker)
                assert not broker._engine.core.connections  # type: ignore[union-attr]
            except AssertionError as error:
                raise AssertionError(f"cancelled at step {step}: {error}") from error
        if not cancelled:
            assert step > 3
            return
    raise AssertionError(f"the scenario did not end within {STEPS_MAX} steps")


async def subscribe_once(client: Client) -> None:
    async with client.subscribe(TOPIC, durable_name="mine") as messages:
        await client.send(TOPIC, b"d")
        await (await messages.receive()).ack()


async def receive_once(client: Client) -> None:
    async with client.subscribe(Q) as messages:
        await (await messages.receive()).nack()


async def transact_once(client: Client) -> None:
    async with client.transaction() as transaction:
        await transaction.send(OTHER, b"x")


async def publish_once(client: Client) -> None:
    async with client.publisher() as publisher:
        await publisher.send_many([(OTHER, b"x")] * 3)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("once", [subscribe_once, receive_once, transact_once, publish_once])
async def test_a_client_outlives_what_was_cancelled(
    autojump_clock: trio.testing.MockClock, once: Callable[[Client], Awaitable[None]], blocked: bool
) -> None:
    """The connection stays in use: nothing of what was cancelled stays behind on it, and it can be done again."""
    for step in range(1, STEPS_MAX):
        async with broker_on(Disk()) as broker:
            async with broker.connect(OWNER) as client:
                await client.send(Q, b"x")
                cancelled = await cancelled_at(step, blocked, lambda: once(client))
                check(broker)
                (connection,) = engine_of(broker).core.connections
                assert not connection.consumers, f"cancelled at step {step}"
                assert not connection.transactions, f"cancelled at step {step}"
                with trio.fail_after(1):
                    await once(client)
                check(broker)
            await drain(broker, *PLACES)
            check_empty(broker)
        if not cancelled:
            assert step > 1
            return
    raise AssertionError(f"it did not end within {STEPS_MAX} steps")


async def serve_others(broker: Broker) -> None:
    with trio.fail_after(1):
        async with broker.connect() as client:
            await client.send("/queue/mine", b"x")
            async with client.subscribe("/queue/mine") as messages:
                await (await messages.receive()).ack()


@pytest.mark.parametrize("blocked", [False, True])
async def test_a_commit_cancelled_while_the_disk_hangs(autojump_clock: trio.testing.MockClock, blocked: bool) -> None:
    """The batch goes on without the one who waited for it."""
    disk = Disk()
    async with broker_on(disk) as broker:
        async with broker.connect() as client:
            disk.shut()
            with trio.move_on_after(5) as scope:
                async with client.transaction() as transaction:
                    await transaction.send(Q, b"x", {"id": "x"})
            assert scope.cancelled_caught
            disk.gate.set()
        found = await drain(broker, Q)
        assert [message.id for message in found[Q]] == ["x"]
        check_empty(broker)


async def test_a_blocked_producer_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """One who waits for room leaves nothing behind, and the others get the room."""
    limits = {"queue_messages_max": 2}
    async with broker_on(Disk(), limits=limits) as broker, broker.connect() as client:
        for id in ("a", "b"):
            await client.send(Q, b"", {"id": id})
        with trio.move_on_after(1) as scope:
            await client.send(Q, b"", {"id": "cancelled"})
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:

            async def produce(id: str) -> None:
                await client.send(Q, b"", {"id": id})

            for id in ("c", "d", "e"):
                nursery.start_soon(produce, id)
            await trio.testing.wait_all_tasks_blocked()
            found = await drain(broker, Q)
        found_later = await drain(broker, Q)
        ids = [message.id for message in found[Q] + found_later[Q]]
        assert ids[:2] == ["a", "b"]
        assert sorted(ids[2:]) == ["c", "d", "e"]
        check_empty(broker)


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("on_disk", [False, True])
async def test_open_broker_is_cancelled_at_every_checkpoint(tmp_path: Path, on_disk: bool, blocked: bool) -> None:
    """The directory's lock and the listener's port are free again, and what was confirmed is there."""
    directory = tmp_path / "data" if on_disk else None
    confirmed = 0

    async def run() -> None:
        nonlocal confirmed
        async with open_broker(data_dir=directory, listen=["stomp://127.0.0.1:0"]) as broker:
            async with broker.connect() as client:
                for _ in range(3):
                    await client.send(Q, b"x")
                    confirmed += 1
            await trio.lowlevel.checkpoint()

    for step in range(1, STEPS_MAX):
        confirmed = 0
        cancelled = await cancelled_at(step, blocked, run)
        async with open_broker(data_dir=directory) as broker, broker.connect() as client:
            count = 0
            async with client.subscribe(Q) as messages:
                while broker.statistics().destinations and broker.statistics().destinations[0].depth:
                    await (await messages.receive()).ack()
                    count += 1
            assert not on_disk or confirmed <= count <= confirmed + 1
            check_empty(broker)
        if not cancelled:
            assert confirmed == 3
            return
    raise AssertionError(f"open_broker did not end within {STEPS_MAX} steps")
