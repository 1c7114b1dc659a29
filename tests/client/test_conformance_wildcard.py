"""Consumers of several queues, by pattern or as a composite: the same in process, over the native protocol and over STOMP."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from pybroker.connect_options import ConnectOptions
from pybroker.errors import LimitExceeded, SubscriptionError
from tests.client.conftest import URL, World
from tests.client.support import nothing_comes, wires
from tests.engine.support import Disk, broker_on


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


async def test_one_that_would_miss_a_queue_is_ended_and_told(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("its connection ends whole")
    await world.start(limits={"wildcard_queues_max": 1})
    async with world.client() as client:
        await client.send("/queue/orders.a", b"1")
        async with client.subscribe("/queue/orders.*") as messages:
            await (await messages.receive()).ack()
            await client.send("/queue/orders.b", b"2")
            with pytest.raises(LimitExceeded, match="wildcard_queues_max"):
                await messages.receive()
        async with client.subscribe("/queue/orders.b") as messages:
            assert (await messages.receive()).body == b"2"


async def test_topics_are_refused_in_a_composite(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        with pytest.raises(SubscriptionError):
            async with client.subscribe("/queue/a,/topic/b") as messages:
                await messages.receive()


async def test_a_client_that_connects_again_goes_on_with_its_patterns(autojump_clock: MockClock) -> None:
    async with wires() as net, broker_on(Disk()) as broker:
        net.serve_broker(URL, broker)
        async with (
            net.client(URL, options=ConnectOptions(reconnect_delay=0.01)) as client,
            client.subscribe("/queue/orders.*,/queue/b") as messages,
        ):
            await client.send("/queue/orders.a", b"1")
            assert (await messages.receive()).body == b"1"
            net.cut(URL)
            again = await messages.receive()
            assert (again.destination, again.redelivered) == ("/queue/orders.a", True)
            await again.ack()
            await client.send("/queue/orders.new", b"2")
            assert (await messages.receive()).destination == "/queue/orders.new"
