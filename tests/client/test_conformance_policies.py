"""What destination policies do for clients: the same in process, over the native protocol and over STOMP."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pybroker.broker import Broker
from pybroker.errors import BrokerFull
from tests.client.conftest import World
from tests.client.support import bodies, fill
from tests.engine.support import engine_of

Q = "/queue/q"


async def started(world: World, **overrides: object) -> Broker:
    """The broker, with the virtual clock as its wall clock."""
    broker = await world.start(**overrides)
    engine_of(broker).clock_ms = lambda: int(trio.current_time() * 1_000)
    return broker


async def test_a_rejected_message_is_delayed_and_others_are_not(autojump_clock: MockClock, world: World) -> None:
    await started(world, policy=[{"match": "/queue/>", "redelivery_delay": 20}])
    async with world.client() as client:
        await fill(client, 2)
        async with client.subscribe(Q, prefetch=1) as messages:
            await (await messages.receive()).nack()
            other = await messages.receive()
            assert other.body == b"1"
            await other.ack()
            began = trio.current_time()
            again = await messages.receive()
            assert 19 < trio.current_time() - began < 21
            assert (again.body, again.redelivered) == (b"0", True)
            await again.ack()


async def test_a_dead_letter_goes_to_the_queue_of_its_policy_and_says_where_it_was(
    autojump_clock: MockClock, world: World
) -> None:
    await started(world, policy=[{"match": "/queue/>", "deliveries_max": 1, "dead_letter_queue": "/queue/DLQ.{name}"}])
    async with world.client() as client:
        await fill(client, 1)
        async with client.subscribe(Q) as messages:
            await (await messages.receive()).nack()
        async with client.subscribe("/queue/DLQ.q") as messages:
            letter = await messages.receive()
            assert [letter.header(f"dead-letter-{name}") for name in ("origin", "reason", "deliveries")] == [
                Q,
                "deliveries",
                "1",
            ]
            await letter.ack()


async def test_a_dead_letter_that_is_sent_back_is_a_message_as_before(autojump_clock: MockClock, world: World) -> None:
    broker = await started(world, policy=[{"match": "/queue/>", "deliveries_max": 1}])
    async with world.client() as client:
        await client.send(Q, b"0", {"a": "1"})
        async with client.subscribe(Q) as messages:
            await (await messages.receive()).nack()
            assert (await broker.dead_letters.retry(origin=Q)).count == 1
            again = await messages.receive()
            assert (again.body, again.header("a"), again.header("dead-letter-origin")) == (b"0", "1", None)
            assert not again.redelivered
            await again.ack()


async def test_a_queue_has_a_limit_of_its_own_and_drops_its_oldest(autojump_clock: MockClock, world: World) -> None:
    await started(world, policy=[{"match": Q, "messages_max": 2, "full_policy": "drop_oldest"}])
    async with world.client() as client:
        await fill(client, 5)
        await fill(client, 5, "/queue/other")
        async with client.subscribe(Q) as messages, client.subscribe("/queue/other") as others:
            assert await bodies(messages, 2) == [3, 4]
            assert await bodies(others, 5) == [0, 1, 2, 3, 4]


async def test_a_queue_may_refuse_where_the_broker_waits(autojump_clock: MockClock, world: World) -> None:
    await started(world, policy=[{"match": Q, "messages_max": 2, "full_policy": "refuse"}])
    async with world.client() as client:
        await fill(client, 2)
        with pytest.raises(BrokerFull, match="messages_max is 2"):
            await client.send(Q, b"2")
