"""Advisories as clients see them: in process, over the native protocol, and over STOMP."""

# ruff: noqa: SIM117 (blocks that nest are what is tested)
from __future__ import annotations

import pytest
import trio.lowlevel
from trio.testing import MockClock

from pybroker.client import Client
from pybroker.errors import BrokerFull, InvalidDestination
from pybroker.subscription import Subscription
from tests.client.conftest import World

PREFIX = "/topic/ActiveMQ.Advisory."
Q = "/queue/q"


async def told(advisories: Subscription) -> tuple[str, dict[str, str]]:
    message = await advisories.receive()
    return message.destination.removeprefix(PREFIX), dict(message.headers)


async def test_a_client_comes_works_and_goes(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as watcher, watcher.subscribe(PREFIX + ">", ack="auto") as advisories:
        async with world.client("ward") as client:
            name, headers = await told(advisories)
            assert (name, headers["clientId"], headers["type"]) == ("Connection", "ward", "Advisory")
            connection = headers["connectionId"]
            async with client.subscribe(Q):
                name, headers = await told(advisories)
                assert (name, headers["consumerCount"], headers["connectionId"]) == (
                    "Consumer.Queue.q",
                    "1",
                    connection,
                )
            assert (await told(advisories))[1]["event"] == "stop"
            await send_some(client)
            found = [await told(advisories) for _ in range(3)]
            assert [name for name, _ in found] == ["Producer.Queue.q", "NoConsumer.Queue.q", "NoConsumer.Queue.q"]
            assert found[0][1]["connectionId"] == connection
        assert [(await told(advisories))[1]["event"] for _ in range(2)] == ["stop", "stop"]


async def send_some(client: Client) -> None:
    await client.send(Q, b"1")
    async with client.publisher() as publisher:
        await publisher.send_many([(Q, b"2")])


async def test_a_full_broker_says_so(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"queue_messages_max": 1, "full_policy": "refuse"})

    async def overfill() -> None:
        async with world.client() as client:
            await client.send(Q, b"1")
            await client.send(Q, b"2")

    async with world.client() as watcher, watcher.subscribe(PREFIX + "FULL.>", ack="auto") as advisories:
        with pytest.raises(BrokerFull):
            await overfill()
        name, headers = await told(advisories)
        assert name == "FULL.Queue.q"
        assert "limits.queue_messages_max is 1" in headers["usageName"]


async def test_nobody_can_send_one(autojump_clock: MockClock, world: World) -> None:
    async def pretend() -> None:
        async with world.client() as client:
            await client.send(PREFIX + "Connection", b"")

    with pytest.raises(InvalidDestination, match="own advisories"):
        await pretend()


async def test_a_consumer_that_does_not_read_is_slow(autojump_clock: MockClock, world: World) -> None:
    if world.kind != "stomp":
        pytest.skip("the test has one hand on the stream only over STOMP")
    await world.start(limits={"outbox_bytes_max": 1_000})
    async with world.client() as watcher, watcher.subscribe(PREFIX + "SlowConsumer.>", ack="auto") as advisories:
        async with world.client() as lazy, world.client() as sender:
            async with lazy.subscribe(Q, ack="auto"):
                for _ in range(20):
                    await sender.send(Q, b"x" * 5_000)
                assert (await told(advisories))[0] == "SlowConsumer.Queue.q"
    await trio.lowlevel.checkpoint()
