"""A client whose connection is cut at *every* point, or that is cancelled at every checkpoint, over a real broker.

Nothing is lost, nothing is stored twice, nothing is confirmed that is not so: the scenarios and their checks are those of
`tests.engine.test_cancellation`, made over the network; here the client connects again and goes on.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pybroker.broker import Broker
from pybroker.connect_options import ConnectOptions
from pybroker.errors import SendInDoubt, TransactionError, UnknownDelivery
from pybroker.remote_client import RemoteClient
from tests.client.conftest import URL
from tests.client.cutting import Cutter, How
from tests.client.support import Wires, wires
from tests.engine.support import Disk, broker_on, cancelled_at, check, check_empty, drain, engine_of
from tests.engine.test_cancellation import (
    OTHER,
    PLACES,
    SCENARIOS,
    Place,
    Q,
    Told,
    receiving_auto,
    serve_others,
    verify,
)

STEPS_MAX = 3_000
OPTIONS = ConnectOptions(reconnect_delay=0.01, close_timeout=1)


class Elsewhere:
    """What the scenarios take for a broker: its clients come over the network."""

    def __init__(self, net: Wires) -> None:
        self._net = net

    @asynccontextmanager
    async def connect(self, client_id: str = "") -> AsyncIterator[RemoteClient]:
        async with self._net.client(URL, client_id, OPTIONS) as client:
            yield client


async def start(net: Wires, broker: Broker) -> set[tuple[Place, str]]:
    """Messages are there before the scenario begins."""
    initial: set[tuple[Place, str]] = {(Q, f"i{number}") for number in range(12)}
    async with broker.connect() as client, client.publisher() as publisher:
        await publisher.send_many([(Q, id.encode(), {"id": id}) for _, id in sorted(initial, key=str)])
    net.serve_broker(URL, broker)
    return initial


async def settle(broker: Broker) -> None:
    """Until the broker has noticed that the connections are over."""
    with trio.fail_after(100):
        while engine_of(broker).core.connections:  # noqa: ASYNC110 (the core has no events)
            await trio.sleep(0.1)


async def finish(broker: Broker, told: Told, initial: set[tuple[Place, str]]) -> None:
    check(broker)
    await settle(broker)
    await serve_others(broker)
    found = await drain(broker, *PLACES)
    there = {(place, each.id): each.redelivered for place, all_ in found.items() for each in all_}
    assert len(there) == sum(map(len, found.values())), "twice"
    there.pop((Q, "transient"), None)
    verify(there, told, initial)
    check_empty(broker)


async def run_cut(scenario: Callable[[Any, Told], Awaitable[None]], at: int, how: How) -> bool:
    """The scenario with one cut; whether it came so far."""
    told = Told()
    async with broker_on(Disk()) as broker, wires() as net:
        initial = await start(net, broker)
        cutter = Cutter(net.dial, at, how)
        net.dial = cutter.dial  # type: ignore[method-assign]
        try:
            with trio.fail_after(100):
                await scenario(Elsewhere(net), told)
        except (UnknownDelivery, TransactionError, SendInDoubt):
            assert cutter.done
        except BaseExceptionGroup as group:
            if not cutter.done or group.split((UnknownDelivery, TransactionError, SendInDoubt))[1] is not None:
                raise
        if scenario is receiving_auto:
            told.ack_confirmed.clear()  # nobody asked for a confirmation
        done = cutter.done
        await finish(broker, told, initial)
    return done


async def sending_all_the_same(broker: Any, told: Told) -> None:
    """Sends of every form end with a confirmation, whatever is cut."""
    async with broker.connect() as client:

        async def one(id: str) -> None:
            told.tried.add((OTHER, id))
            confirmation = await client.send(OTHER, id.encode(), {"id": id})
            assert confirmation.durable
            told.confirmed.add((OTHER, id))

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(one, f"a{number}")
        async with client.publisher(max_in_flight=5) as publisher:
            many = [(OTHER, f"m{number}") for number in range(12)]
            told.tried |= set(many)
            await publisher.send_many([(place, id.encode(), {"id": id}) for place, id in many[:8]])
            for place, id in many[8:]:
                await publisher.send(place, id.encode(), {"id": id})
        told.confirmed |= set(many)
        sends: set[tuple[Place, str]] = {(OTHER, f"t{number}") for number in range(3)}
        told.tried |= sends
        told.together.append(sends)
        async with client.transaction() as transaction:
            for _, id in sorted(sends, key=str):
                await transaction.send(OTHER, id.encode(), {"id": id})
        told.confirmed |= sends
    told.handed.add((OTHER, "end"))


async def consuming_all_the_same(broker: Any, told: Told) -> None:
    """A consumer that goes on until it has acknowledged everything, in whatever connection."""
    async with broker.connect() as client, client.subscribe(Q, prefetch=4) as messages:
        left = {f"i{number}" for number in range(12)}
        while left:
            batch = await messages.receive_batch(3)
            for message in batch:
                id = message.header("id") or ""
                told.handed.add((Q, id))
                told.ack_tried.add((Q, id))
                try:
                    await message.ack()
                except UnknownDelivery:
                    continue  # it comes again
                except SendInDoubt:
                    left.discard(id)  # it may come again
                    continue
                told.ack_confirmed.add((Q, id))
                left.discard(id)


async def moving_all_the_same(broker: Any, told: Told) -> None:
    """Each message is moved by a transaction, again if the transaction was not done."""
    async with broker.connect() as client, client.subscribe(Q, prefetch=4) as messages:
        moved = 0
        while moved < 6:
            message = await messages.receive()
            id = message.header("id") or ""
            told.handed.add((Q, id))
            new: tuple[Place, str] = (OTHER, f"{id}-{moved}-{message.deliveries}")
            told.tried.add(new)
            told.ack_tried.add((Q, id))
            try:
                async with client.transaction() as transaction:
                    await transaction.send(OTHER, b"", {"id": new[1]})
                    await transaction.ack(message)
            except (UnknownDelivery, TransactionError):
                told.tried.discard(new)  # for certain
                told.ack_tried.discard((Q, id))
                continue
            moved += 1
            told.confirmed.add(new)
            told.ack_confirmed.add((Q, id))
            told.swapped.append(((Q, id), new))


async def lasts(scenario: Callable[[Any, Told], Awaitable[None]]) -> int:
    """Movements of the scenario when nothing is cut."""
    async with broker_on(Disk()) as broker, wires() as net:
        await start(net, broker)
        cutter = Cutter(net.dial, 10**9, "lost")
        net.dial = cutter.dial  # type: ignore[method-assign]
        await scenario(Elsewhere(net), Told())
    return cutter.moves


ALL_THE_SAME = [sending_all_the_same, consuming_all_the_same, moving_all_the_same]


@pytest.mark.parametrize("how", ["lost", "half", "arrived"])
@pytest.mark.parametrize("scenario", [*SCENARIOS, *ALL_THE_SAME])
async def test_cut_at_every_point(
    autojump_clock: MockClock, scenario: Callable[[Any, Told], Awaitable[None]], how: How
) -> None:
    at = 1
    while True:
        try:
            if not await run_cut(scenario, at, how):
                break
        except AssertionError as error:
            raise AssertionError(f"cut at point {at}, {how}: {error}") from error
        at += 1
    assert at > 5


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_cancelled_at_every_checkpoint(
    autojump_clock: MockClock, scenario: Callable[[Any, Told], Awaitable[None]], blocked: bool
) -> None:
    for step in range(1, STEPS_MAX):
        told = Told()
        async with broker_on(Disk()) as broker, wires() as net:
            initial = await start(net, broker)
            cancelled = await cancelled_at(step, blocked, lambda: scenario(Elsewhere(net), told))  # noqa: B023
            try:
                await finish(broker, told, initial)
            except AssertionError as error:
                raise AssertionError(f"cancelled at step {step}: {error}") from error
        if not cancelled:
            assert step > 3
            return
    raise AssertionError(f"the scenario did not end within {STEPS_MAX} steps")
