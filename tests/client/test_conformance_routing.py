"""Composites, virtual topics and mirrored queues: the same in process, over the native protocol and over STOMP."""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from pybroker.errors import BrokerError, InvalidDestination
from tests.client.conftest import World
from tests.client.support import bodies, nothing_comes


async def test_a_composite_goes_to_each_of_its_destinations(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, client.subscribe("/topic/t") as topic:
        await client.send("/queue/a,b,topic://t", b"1", {"ward": "3"})
        async with client.subscribe("/queue/a") as first, client.subscribe("/queue/b") as second:
            received = [await each.receive() for each in (first, second, topic)]
        assert [each.destination for each in received] == ["/queue/a", "/queue/b", "/topic/t"]
        assert {(each.body, each.header("ward")) for each in received} == {(b"1", "3")}


async def test_a_wrong_composite_is_refused_whole(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        with pytest.raises(BrokerError) as caught:
            await client.send("/queue/a,b.*", b"1")
        assert isinstance(caught.value, InvalidDestination)
    async with world.client() as client, client.subscribe("/queue/a") as messages:
        assert await nothing_comes(messages)


async def test_a_composite_in_a_transaction(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        async with client.transaction() as transaction:
            await transaction.send("/queue/a,b", b"1")
        async with client.subscribe("/queue/a") as first, client.subscribe("/queue/b") as second:
            assert await bodies(first, 1) == await bodies(second, 1) == [1]


async def test_forwarding_virtual_topics_and_mirrors(autojump_clock: MockClock, world: World) -> None:
    await world.start(
        composite=[{"name": "/queue/orders", "forward_to": ["/queue/a", "/topic/VirtualTopic.orders"]}],
        routing={"mirrored_queues": ["/queue/a"]},
    )
    async with world.client() as client:
        async with (
            client.subscribe("/queue/Consumer.audit.VirtualTopic.orders"),
            client.subscribe("/queue/Consumer.audit.VirtualTopic.Mirror.a"),
        ):
            pass
        await client.send("/queue/orders", b"1")
        for name in (
            "/queue/a",
            "/queue/Consumer.audit.VirtualTopic.orders",
            "/queue/Consumer.audit.VirtualTopic.Mirror.a",
        ):
            async with client.subscribe(name) as messages:
                message = await messages.receive()
                assert (message.destination, message.body) == (name, b"1")
                await message.ack()
        async with client.subscribe("/queue/orders") as messages:
            assert await nothing_comes(messages)


async def test_a_send_with_a_key_that_was_seen_is_confirmed_and_not_stored(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.client() as client:
        for number in range(3):
            await client.send("/queue/q", b"%d" % number, {"message-key": "a" if number < 2 else "b"})
        async with client.transaction() as transaction:
            await transaction.send("/queue/q", b"3", {"message-key": "a"})
            await transaction.send("/queue/q", b"4")
        async with client.subscribe("/queue/q") as messages:
            assert await bodies(messages, 3) == [0, 2, 4]
            assert await nothing_comes(messages)
