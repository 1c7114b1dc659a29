"""The same suite as `test_conformance`: transactions, topics, durable subscriptions, and what is over.

In process, over the native protocol, and (where it can) over STOMP.
"""

# ruff: noqa: PT012, SIM117 (blocks that nest are what is tested)
from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pybroker.errors import (
    BrokerClosed,
    BrokerError,
    InvalidDestination,
    LimitExceeded,
    SlowConsumer,
    SubscriptionError,
    UnknownDelivery,
)
from tests.client.conftest import World
from tests.client.support import bodies, fill, nothing_comes

Q, OTHER, TOPIC = "/queue/q", "/queue/other", "/topic/t"


class Wrong(Exception):
    pass


# ---- transactions


async def test_a_transaction_happens_at_its_end(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.client() as watcher:
        await fill(client, 3)
        async with client.subscribe(Q) as messages, watcher.subscribe(OTHER) as others:
            received = [await messages.receive() for _ in range(3)]
            async with client.transaction() as transaction:
                await transaction.send(OTHER, b"0", {"a": "1"}, priority=9)
                await transaction.send(OTHER, b"1", priority=1)
                await transaction.ack(received[0])
                await transaction.nack(received[1])
                assert await nothing_comes(others)
            assert await bodies(others, 2) == [0, 1]
            again = await messages.receive()
            assert (int(again.body), again.deliveries) == (1, 1)
            await messages.ack([received[2], again])
        async with client.subscribe(Q) as messages:
            assert await nothing_comes(messages)


async def test_an_aborted_transaction_did_not_happen(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.client() as watcher:
        await fill(client, 2)
        async with client.subscribe(Q) as messages, watcher.subscribe(OTHER) as others:
            received = [await messages.receive() for _ in range(2)]
            with pytest.raises(Wrong):
                async with client.transaction() as transaction:
                    await transaction.send(OTHER, b"0")
                    await transaction.ack(received[0])
                    await transaction.nack(received[1])
                    raise Wrong
            assert await nothing_comes(others)
            again = [await messages.receive() for _ in range(2)]
            assert [(int(each.body), each.deliveries) for each in again] == [(0, 1), (1, 1)]
            await messages.ack(again)


async def test_a_transaction_settles_a_message_once(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await fill(client, 2)
        async with client.subscribe(Q) as messages:
            first, second = [await messages.receive() for _ in range(2)]
            async with client.transaction() as transaction:
                await transaction.ack(first)
                with pytest.raises(UnknownDelivery):
                    await transaction.ack(first)
                with pytest.raises(UnknownDelivery):
                    await first.ack()
                await transaction.ack(second)
        async with client.subscribe(Q) as messages:
            assert await nothing_comes(messages)


async def test_an_empty_transaction(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        async with client.transaction():
            pass
        await client.send(Q, b"0")


async def test_a_transaction_takes_more_than_the_prefetch(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await fill(client, 6)
        async with client.subscribe(Q, prefetch=2) as messages:
            async with client.transaction() as transaction:
                for number in range(5):
                    message = await messages.receive()
                    assert int(message.body) == number
                    await transaction.ack(message)
            assert await bodies(messages, 1) == [5]
            await fill(client, 4)
            held = [await messages.receive() for _ in range(2)]
            assert await nothing_comes(messages), "the prefetch holds again"
            await messages.ack(held)
            assert await bodies(messages, 2) == [2, 3]


@pytest.mark.parametrize("done", [True, False])
async def test_cumulative_in_a_transaction(autojump_clock: MockClock, world: World, done: bool) -> None:
    async with world.client() as client:
        await fill(client, 8)
        async with client.subscribe(Q, ack="cumulative", prefetch=2) as messages:
            try:
                async with client.transaction() as transaction:
                    for _ in range(3):
                        await messages.receive()
                        message = await messages.receive()
                        await transaction.ack(message)
                    if not done:
                        raise Wrong
            except Wrong:
                assert sorted(await bodies(messages, 8)) == list(range(8))
            else:
                assert await bodies(messages, 2) == [6, 7]


async def test_wrong_sends_in_a_transaction(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        with pytest.raises(InvalidDestination):
            async with client.transaction() as transaction:
                await transaction.send(Q, b"0")
                await transaction.send("/queue/a..b", b"")
                if world.kind == "stomp":  # where the broker says it when it gets there
                    await trio.testing.wait_all_tasks_blocked()
                    await transaction.send(Q, b"")
        async with world.client() as other, other.subscribe(Q) as messages:
            assert await nothing_comes(messages)


async def test_limits_of_a_transaction(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"transaction_messages_max": 3})
    async with world.client() as client, world.client() as other:
        await fill(other, 1)
        with pytest.raises(BrokerError) as caught:
            async with client.subscribe(Q) as messages, client.transaction() as transaction:
                await transaction.ack(await messages.receive())
                for number in range(5):
                    await transaction.send(OTHER, b"%d" % number)
        assert isinstance(caught.value, LimitExceeded)
        assert caught.value.limit == "limits.transaction_messages_max"
        async with other.subscribe(Q) as messages, other.subscribe(OTHER) as others:
            assert await bodies(messages, 1) == [0]
            assert await nothing_comes(others)


async def test_a_message_of_another_client_in_a_transaction(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("the face does not know")
    async with world.client() as client, world.client() as other:
        await fill(client, 1)
        async with other.subscribe(Q) as messages:
            message = await messages.receive()
            with pytest.raises(UnknownDelivery):
                async with client.transaction() as transaction:
                    await transaction.ack(message)
            await message.ack()


# ---- topics


async def test_every_subscriber_gets_a_topic_message(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.client() as other:
        await client.send(TOPIC, b"0")  # nobody is there
        async with (
            client.subscribe(TOPIC) as mine,
            other.subscribe("/topic/*") as others,
            other.subscribe("/topic/t.>"),
        ):
            confirmation = await client.send(TOPIC, b"1")
            if world.kind != "stomp":
                assert not confirmation.durable, "no store has it"
            assert await bodies(mine, 1) == [1]
            assert await bodies(others, 1) == [1]


async def test_durable_subscriptions_collect(autojump_clock: MockClock, world: World) -> None:
    async with world.client("me") as client, world.client() as sender:
        async with client.subscribe(TOPIC, durable_name="d") as messages:
            await fill(sender, 2, TOPIC)
            assert await bodies(messages, 1) == [0]
        assert (await sender.send(TOPIC, b"2")).durable
        async with client.subscribe(TOPIC, durable_name="d") as messages:
            assert await bodies(messages, 2) == [1, 2]
    async with world.client("me") as client, client.subscribe(TOPIC, durable_name="d") as messages:
        assert await nothing_comes(messages)


async def test_a_durable_subscription_is_used_by_one(autojump_clock: MockClock, world: World) -> None:
    async with world.client("me") as client, client.subscribe(TOPIC, durable_name="d") as messages:
        with pytest.raises(SubscriptionError, match="in use"):
            async with world.client("me") as other, other.subscribe(TOPIC, durable_name="d"):
                pass
        await client.send(TOPIC, b"0")
        assert await bodies(messages, 1) == [0]


async def test_removing_a_durable_subscription(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("it is removed by its UNSUBSCRIBE")
    async with world.client("me") as client, world.client() as sender:
        async with client.subscribe(TOPIC, durable_name="d"):
            with pytest.raises(SubscriptionError):
                await client.remove_subscription("d")
        await sender.send(TOPIC, b"0")
        await client.remove_subscription("d")
        async with client.subscribe(TOPIC, durable_name="d") as messages:
            assert await nothing_comes(messages)
        with pytest.raises(SubscriptionError, match="no durable subscription 'e'"):
            await client.remove_subscription("e")


async def test_a_durable_subscription_keeps_its_topic(autojump_clock: MockClock, world: World) -> None:
    async with world.client("me") as client:
        async with client.subscribe(TOPIC, durable_name="d"):
            pass
        with pytest.raises(SubscriptionError, match="is for /topic/t"):
            async with client.subscribe("/topic/other", durable_name="d"):
                pass


async def test_a_slow_subscriber_of_a_topic_is_closed(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("its connection ends whole")
    await world.start(limits={"backlog_messages_max": 10})
    async with world.client() as client, world.client() as sender:
        async with client.subscribe(TOPIC, prefetch=1) as messages, client.subscribe(Q) as others:
            async with sender.publisher() as publisher:
                await publisher.send_many([(TOPIC, b"%d" % number) for number in range(30)])
            with pytest.raises(SlowConsumer, match="backlog_messages_max"):
                for _ in range(31):
                    await (await messages.receive()).ack()
            await sender.send(Q, b"0")
            assert await bodies(others, 1) == [0], "the other subscription goes on"


# ---- what is over


async def test_what_is_closed_is_closed(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("the face does not know")
    async with world.client() as client:
        await client.send(Q, b"0")
        async with client.subscribe(Q) as messages:
            message = await messages.receive()
        with pytest.raises(SubscriptionError, match="closed"):
            await messages.receive()
        with pytest.raises(SubscriptionError):
            async with messages:
                pass
        with pytest.raises(UnknownDelivery):
            await message.ack()
        left = client.subscribe(Q)
        await left.__aenter__()
    for call in (lambda: client.send(Q, b"1"), left.receive, message.ack, lambda: client.remove_subscription("d")):
        with pytest.raises(BrokerClosed):
            await call()  # type: ignore[operator]
    with pytest.raises(BrokerClosed):
        async with client.transaction():
            pass
    with pytest.raises(BrokerClosed):
        async with client.subscribe(Q):
            pass


async def test_a_subscription_that_was_not_entered(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("the face does not know")
    async with world.client() as client:
        if world.kind == "native":
            with pytest.raises(SubscriptionError, match="async with"):
                await client.subscribe(Q).receive()
        with pytest.raises((SubscriptionError, UnknownDelivery)):
            async with client.subscribe(Q) as messages:
                await client.send(Q, b"0")
                message = await messages.receive()
                await client.subscribe(Q).ack([message])
