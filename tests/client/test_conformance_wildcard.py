"""Consumers of several queues, by pattern or as a composite: the same in process, over the native protocol and over STOMP."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from pybroker.errors import SubscriptionError
from tests.client.conftest import World
from tests.client.support import nothing_comes


async def test_a_pattern_of_queues(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await client.send("/queue/orders.a", b"1")
        await client.send("/queue/others", b"no")
        async with client.subscribe("/queue/orders.>") as messages:
            first = await messages.receive()
            await client.send("/queue/orders.b.new", b"2")
            second = await messages.receive()
            assert [(each.destination, each.body) for each in (first, second)] == [
                ("/queue/orders.a", b"1"),
                ("/queue/orders.b.new", b"2"),
            ]
            await second.ack()
            assert await nothing_comes(messages)
        async with client.subscribe("/queue/orders.a") as messages:
            again = await messages.receive()
            assert (again.body, again.redelivered) == (b"1", True)
        async with client.subscribe("/queue/orders.b.new") as messages:
            assert await nothing_comes(messages)


async def test_a_composite_of_queues(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, client.subscribe("/queue/a,/queue/b,c", ack="cumulative") as messages:
        await client.send("/queue/a,b,c", b"1")
        received = [await messages.receive() for _ in range(3)]
        assert sorted(each.destination for each in received) == ["/queue/a", "/queue/b", "/queue/c"]
        await received[-1].ack()
    async with world.client() as client, client.subscribe("/queue/*") as messages:
        assert await nothing_comes(messages)


async def test_a_transaction_over_several_queues(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await client.send("/queue/a,b", b"1")
        async with client.subscribe("/queue/*") as messages:
            received = [await messages.receive() for _ in range(2)]
            async with client.transaction() as transaction:
                for each in received:
                    await transaction.ack(each)
                await transaction.send("/queue/done", b"2")
            assert (await messages.receive()).destination == "/queue/done"
        async with client.subscribe("/queue/a,b") as messages:
            assert await nothing_comes(messages)


async def test_topics_are_refused_in_a_composite(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        with pytest.raises(SubscriptionError):
            async with client.subscribe("/queue/a,/topic/b") as messages:
                await messages.receive()
