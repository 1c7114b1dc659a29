"""Message groups, exclusive consumers and consumer priority: the same in process, over the native protocol and over STOMP."""

from __future__ import annotations

from contextlib import AsyncExitStack

from trio.testing import MockClock

from pybroker.client import Client
from tests.client.conftest import World
from tests.client.support import bodies, fill, nothing_comes

Q = "/queue/q"


async def to_group(client: Client, group: str, *numbers: int, sequence: str = "") -> None:
    more = {"JMSXGroupSeq": sequence} if sequence else {}
    for number in numbers:
        await client.send(Q, b"%d" % number, {"JMSXGroupID": group} | more)


async def test_a_group_has_one_consumer_and_its_order(autojump_clock: MockClock, world: World) -> None:
    async with (
        world.client() as client,
        world.client() as other,
        client.subscribe(Q) as left,
        other.subscribe(Q) as right,
    ):
        for number in range(5):
            await to_group(client, "anna", number)
            await to_group(client, "bert", 10 + number)
        owners = {tuple(await bodies(messages, 5)) for messages in (left, right)}
        assert owners == {tuple(range(5)), tuple(range(10, 15))}
        assert await nothing_comes(left)
        assert await nothing_comes(right)


async def test_a_group_moves_when_its_consumer_leaves(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, AsyncExitStack() as leaving:
        owner = await leaving.enter_async_context(client.subscribe(Q))
        await to_group(client, "anna", 0)
        async with client.subscribe(Q) as heir:
            await to_group(client, "anna", 1, 2)
            assert await bodies(owner, 1) == [0]
            assert await nothing_comes(heir)
            await leaving.aclose()
            await to_group(client, "anna", 3)
            assert await bodies(heir, 3) == [1, 2, 3]


async def test_a_group_moves_when_its_consumers_connection_ends(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, AsyncExitStack() as leaving:
        lost = await leaving.enter_async_context(world.client())
        owner = await leaving.enter_async_context(lost.subscribe(Q))
        await to_group(client, "anna", 0, 1)
        assert await bodies(owner, 1) == [0]
        async with client.subscribe(Q) as heir:
            await leaving.aclose()
            await to_group(client, "anna", 2)
            assert await bodies(heir, 2) == [1, 2]


async def test_a_negative_sequence_closes_a_group(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, client.subscribe(Q, prefetch=2) as owner:
        await to_group(client, "anna", 0)
        async with client.subscribe(Q, priority=1) as preferred:
            await to_group(client, "anna", 1, sequence="-1")
            assert await bodies(owner, 2) == [0, 1], "the closing message still goes to the owner"
            await to_group(client, "anna", 2)
            assert await bodies(preferred, 1) == [2]
            assert await nothing_comes(owner)


async def test_an_exclusive_consumer_gets_everything_until_it_leaves(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.client() as other, AsyncExitStack() as leaving:
        owner = await leaving.enter_async_context(client.subscribe(Q, exclusive=True))
        async with other.subscribe(Q, exclusive=True) as standby, other.subscribe(Q) as plain:
            await fill(client, 4)
            assert await bodies(owner, 2) == [0, 1]
            assert await nothing_comes(standby)
            await leaving.aclose()
            assert await bodies(standby, 2) == [2, 3]
            assert await nothing_comes(plain)


async def test_the_higher_priority_is_filled_first(autojump_clock: MockClock, world: World) -> None:
    async with (
        world.client() as client,
        client.subscribe(Q, prefetch=2, priority=-128) as low,
        client.subscribe(Q, prefetch=2) as plain,
        client.subscribe(Q, prefetch=2, priority=127) as high,
    ):
        await fill(client, 6)
        assert await bodies(low, 2, ack=False) == [4, 5]
        assert await bodies(plain, 2, ack=False) == [2, 3]
        assert await bodies(high, 2) == [0, 1]
        await fill(client, 2)
        assert await bodies(high, 2) == [0, 1]
