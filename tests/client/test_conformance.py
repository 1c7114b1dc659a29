"""What a client sees of a broker is the same in process, over the native protocol, and (where it can) over STOMP.

Sending and receiving; one suite over all three. A test that STOMP can't pass says why it leaves it out.
"""

# ruff: noqa: SIM117 (blocks that nest are what is tested)
from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pybroker.errors import (
    BrokerFull,
    InvalidDestination,
    InvalidMessage,
    LimitExceeded,
    SubscriptionError,
    UnknownDelivery,
)
from pybroker.subscription import ReceivedMessage
from tests.client.conftest import World
from tests.client.support import bodies, fill, nothing_comes

Q = "/queue/q"
HEADERS = [
    ("plain", "value"),
    ("with:colon", "a:b"),
    ("lines", "one\ntwo\r\nthree"),
    ("back\\slash", "\\n\\c"),
    ("grüße", "Ωmega \U0001f600"),
    ("empty", ""),
    ("twice", "first"),
    ("twice", "second"),
    ("spaces ", "  both  "),
]


# ---- sending


async def test_a_message_arrives_unchanged(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        confirmation = await client.send(Q, b"\x00body\xff\n", HEADERS, priority=7, expires=2**42)
        assert confirmation.durable
        async with client.subscribe(Q) as messages:
            message = await messages.receive()
            assert (message.body, message.headers, message.destination) == (b"\x00body\xff\n", HEADERS, Q)
            assert (message.priority, message.expires) == (7, 2**42)
            assert message.header("twice") == "first"
            assert message.header("nobody") is None
            assert (message.deliveries, message.redelivered) == (0, False)
            assert message.timestamp > 1_600_000_000_000
            if world.kind != "stomp":  # which names no id in a receipt, and does not say what is durable
                assert (message.message_id, message.durable) == (confirmation.message_id, True)
            await message.ack()


@pytest.mark.parametrize("body", [b"", bytearray(b"x"), memoryview(b"xy"), b"x" * 3_000_000])
async def test_bodies(autojump_clock: MockClock, world: World, body: bytes) -> None:
    async with world.client() as client:
        await client.send(Q, body)
        async with client.subscribe(Q) as messages:
            message = await messages.receive()
            assert message.body == bytes(body)
            assert message.headers == []
            await message.ack()


async def test_a_mapping_of_headers(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await client.send(Q, b"", {"a": "1", "b": "2"})
        async with client.subscribe(Q, ack="auto") as messages:
            assert (await messages.receive()).headers == [("a", "1"), ("b", "2")]


async def test_order_and_priorities(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        for number, priority in enumerate([4, 4, 9, 0, 9, 4]):
            await client.send(Q, b"%d" % number, priority=priority)
        async with client.subscribe(Q, prefetch=1) as messages:
            assert await bodies(messages, 6) == [2, 4, 0, 1, 5, 3]


async def test_non_durable_is_confirmed_as_such(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        confirmation = await client.send(Q, b"0", durable=False)
        assert not confirmation.durable
        async with client.subscribe(Q) as messages:
            message = await messages.receive()
            if world.kind != "stomp":
                assert not message.durable
            await message.ack()


async def test_expired_messages_are_not_delivered(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await client.send(Q, b"0", expires=1)
        await client.send(Q, b"1")
        async with client.subscribe(Q) as messages:
            assert await bodies(messages, 1) == [1]
            assert await nothing_comes(messages)


@pytest.mark.parametrize("destination", ["nowhere", "/queue/", "/queue/a..b", "/queue/a.*", "/queue/>", "/topic/a,"])
async def test_wrong_destinations(autojump_clock: MockClock, world: World, destination: str) -> None:
    async with world.client() as client:
        with pytest.raises(InvalidDestination):
            await client.send(destination, b"")


@pytest.mark.parametrize(
    ("body", "headers", "options"),
    [
        ("text", None, {}),
        (b"", {"name": 5}, {}),
        (b"", {"": "x"}, {}),
        (b"", {"x": "\ud800"}, {}),
        (b"", None, {"priority": 10}),
        (b"", None, {"priority": -1}),
        (b"", None, {"expires": -5}),
    ],
)
async def test_wrong_messages(
    autojump_clock: MockClock, world: World, body: bytes, headers: dict[str, str] | None, options: dict[str, int]
) -> None:
    if world.kind == "stomp" and "priority" in options:
        pytest.skip("a priority that is none is a fault of the frame in STOMP")
    async with world.client() as client:
        with pytest.raises(InvalidMessage):
            await client.send(Q, body, headers, **options)  # type: ignore[arg-type]
        if world.kind != "stomp":  # there an error ends the connection
            assert (await client.send(Q, b"fine")).durable


async def test_a_body_above_the_limit(autojump_clock: MockClock, world: World) -> None:
    await world.start(stomp={"body_bytes_max": 1_000})
    async with world.client() as client:
        await client.send(Q, b"x" * 1_000)
        with pytest.raises(LimitExceeded) as caught:
            await client.send(Q, b"x" * 1_001)
        assert (caught.value.limit, caught.value.value) == ("stomp.body_bytes_max", 1_000)


async def test_a_full_broker_refuses(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"queue_messages_max": 2, "full_policy": "refuse"})
    async with world.client() as client:
        await fill(client, 2)
        with pytest.raises(BrokerFull):
            await client.send(Q, b"2")


async def test_a_full_broker_blocks_until_there_is_room(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"queue_messages_max": 2})
    async with world.client() as client, world.client() as other, trio.open_nursery() as nursery:
        await fill(client, 2)
        nursery.start_soon(client.send, Q, b"2")
        async with other.subscribe(Q) as messages:
            assert await bodies(messages, 3) == [0, 1, 2]


async def test_acknowledgements_get_through_while_sends_wait_for_room(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("a STOMP connection is not read while the broker is full")
    await world.start(limits={"queue_messages_max": 2})
    async with world.client() as client, client.subscribe(Q) as messages, trio.open_nursery() as nursery:
        await fill(client, 2)
        nursery.start_soon(client.send, Q, b"2")
        assert await bodies(messages, 3) == [0, 1, 2]


# ---- publishers


async def test_a_publisher_keeps_order_and_confirms_all(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        async with client.publisher(max_in_flight=7) as publisher:
            for number in range(20):
                await publisher.send(Q, b"%d" % number)
            await publisher.send_many([(Q, b"%d" % number) for number in range(20, 120)])
            await publisher.send_many([(Q, b"%d" % number, {"n": str(number)}) for number in range(120, 140)])
            await publisher.send_many([])
            await publisher.wait_confirmed()
            assert (publisher.in_flight, publisher.confirmed) == (0, 140)
        async with client.subscribe(Q) as messages:
            assert await bodies(messages, 140) == list(range(140))


async def test_in_front_of_a_wrong_message_all_are_sent(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.client() as other:
        async with client.publisher() as publisher:
            for wrong in ((Q, "text"), ("/queue/", b""), (Q, b"", {"": ""})):
                if world.kind == "stomp" and wrong[0] != Q:
                    continue  # an error ends the connection
                with pytest.raises((InvalidMessage, InvalidDestination)):
                    await publisher.send_many([(Q, b"1"), wrong, (Q, b"3")])
                await publisher.wait_confirmed()
                async with other.subscribe(Q) as messages:
                    assert await bodies(messages, 1) == [1]
                    assert await nothing_comes(messages)


async def test_a_publisher_with_no_room_is_refused(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("it has no publishers")
    async with world.client() as client:
        with pytest.raises(ValueError, match="at least 1"):
            async with client.publisher(max_in_flight=0):
                pass


# ---- receiving


async def test_only_acknowledged_messages_are_gone(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await fill(client, 4)
        async with client.subscribe(Q) as messages:
            received = [await messages.receive() for _ in range(4)]
            await received[1].ack()
            await messages.ack([received[3]])
        async with client.subscribe(Q) as messages:
            again = [await messages.receive() for _ in range(2)]
            assert [(int(each.body), each.deliveries, each.redelivered) for each in again] == [
                (0, 1, True),
                (2, 1, True),
            ]
            await messages.ack(again)
            assert await nothing_comes(messages)


async def test_cumulative_acknowledgements(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await fill(client, 5)
        async with client.subscribe(Q, ack="cumulative") as messages:
            received = [await messages.receive() for _ in range(5)]
            await received[1].ack()
            await messages.ack(received[2:4])
            with pytest.raises(UnknownDelivery):
                await settled_again(world, received[1])
        async with world.client() as other, other.subscribe(Q) as messages:
            assert await bodies(messages, 1) == [4]
            assert await nothing_comes(messages)


async def settled_again(world: World, message: ReceivedMessage) -> None:
    await message.ack()
    if world.kind == "stomp":
        raise UnknownDelivery("the face does not know")


async def test_automatic_acknowledgement(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.client() as other:
        await fill(client, 10)
        async with client.subscribe(Q, ack="auto", prefetch=2) as messages:
            assert await bodies(messages, 6, ack=False) == list(range(6))
            message = await messages.receive()
            with pytest.raises(UnknownDelivery):
                await message.ack()
        if world.kind == "stomp":
            return  # what was written is acknowledged, whoever reads it
        async with other.subscribe(Q) as messages:
            rest = [await messages.receive() for _ in range(3)]
            assert [int(each.body) for each in rest] == [7, 8, 9]
            await messages.ack(rest)


async def test_a_message_is_settled_once(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await fill(client, 2)
        async with client.subscribe(Q) as messages:
            first, second = [await messages.receive() for _ in range(2)]
            await first.ack()
            with pytest.raises(UnknownDelivery):
                await first.ack()
            with pytest.raises(UnknownDelivery):
                await first.nack()
            with pytest.raises(UnknownDelivery):
                await messages.ack([second, first])  # those in front of it are acknowledged
            assert await nothing_comes(messages)
        async with client.subscribe(Q) as messages:
            assert await nothing_comes(messages)


async def test_messages_are_settled_by_their_own_subscription(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await client.send(Q, b"0")
        await client.send("/queue/other", b"1")
        async with client.subscribe(Q) as messages, client.subscribe("/queue/other") as others:
            message, other = await messages.receive(), await others.receive()
            with pytest.raises(UnknownDelivery):
                await messages.ack([other])
            with pytest.raises(UnknownDelivery):
                await others.nack([message])
            await message.ack()
            await other.ack()


async def test_given_back_messages_return_to_their_place_and_are_counted(
    autojump_clock: MockClock, world: World
) -> None:
    async with world.client() as client:
        await fill(client, 3)
        async with client.subscribe(Q, prefetch=1) as messages:
            for deliveries in range(3):
                message = await messages.receive()
                assert (int(message.body), message.deliveries) == (0, deliveries)
                await message.nack()
            assert await bodies(messages, 3) == [0, 1, 2]


async def test_too_often_given_back_is_a_dead_letter(autojump_clock: MockClock, world: World) -> None:
    await world.start(delivery={"deliveries_max": 2})
    async with world.client() as client:
        await client.send(Q, b"0", {"a": "1"})
        async with client.subscribe(Q) as messages:
            for _ in range(2):
                await (await messages.receive()).nack()
        async with client.subscribe("/queue/ActiveMQ.DLQ") as messages:
            message = await messages.receive()
            assert (message.body, message.header("a")) == (b"0", "1")
            await message.ack()


async def test_prefetch_bounds_what_is_out(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.client() as other:
        await fill(client, 10)
        async with client.subscribe(Q, prefetch=3) as mine, other.subscribe(Q, prefetch=3) as others:
            first = [await mine.receive() for _ in range(3)]
            second = [await others.receive() for _ in range(3)]
            assert await nothing_comes(mine)
            await mine.ack(first[:2], confirm=False)
            assert [int(each.body) for each in [await mine.receive(), await mine.receive()]] == [6, 7]
            assert [int(each.body) for each in first + second] == list(range(6))


async def test_batches(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        async with client.publisher() as publisher:
            await publisher.send_many([(Q, b"%d" % number) for number in range(3_000)])
        found: list[int] = []
        async with client.subscribe(Q, prefetch=500) as messages:
            while len(found) < 3_000:
                batch = await messages.receive_batch(64)
                assert 1 <= len(batch) <= 64
                found += [int(message.body) for message in batch]
                await messages.ack(batch, confirm=False)
        assert found == list(range(3_000))
        async with client.subscribe(Q) as messages:
            assert await nothing_comes(messages)


async def test_two_consumers_share(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.client() as other:
        async with client.subscribe(Q, prefetch=1) as mine, other.subscribe(Q, prefetch=1) as others:
            await fill(client, 2)
            found = [await mine.receive(), await others.receive()]
            assert sorted(int(each.body) for each in found) == [0, 1]
            for each in found:
                await each.ack()


async def test_leaving_a_client_returns_what_it_holds(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as other:
        async with world.client() as client:
            await fill(client, 3)
            async with client.subscribe(Q) as messages:
                await (await messages.receive()).ack()
        async with other.subscribe(Q) as messages:
            assert await bodies(messages, 2) == [1, 2]


async def test_iterating(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await fill(client, 3)
        found = []
        async with client.subscribe(Q) as messages:
            async for message in messages:
                found.append(int(message.body))
                await message.ack()
                if len(found) == 3:
                    break
        assert found == [0, 1, 2]


@pytest.mark.parametrize(
    ("destination", "options", "error"),
    [
        ("nowhere", {}, InvalidDestination),
        ("/queue/a,/queue/b..c", {}, InvalidDestination),
        ("/queue/a,/topic/b", {}, SubscriptionError),
        ("/queue/a.*", {"durable_name": "d"}, SubscriptionError),
        (Q, {"durable_name": "d"}, SubscriptionError),
        ("/topic/t", {"durable_name": "d"}, SubscriptionError),
        (Q, {"prefetch": 0}, SubscriptionError),
        (Q, {"ack": "sometimes"}, SubscriptionError),
    ],
)
async def test_wrong_subscriptions(
    autojump_clock: MockClock, world: World, destination: str, options: dict[str, object], error: type[Exception]
) -> None:
    if world.kind == "stomp" and options:
        pytest.skip("a fault of the frame in STOMP")
    async with world.client() as client:
        with pytest.raises(error):
            async with client.subscribe(destination, **options):  # type: ignore[arg-type]
                pass
