"""Queue browsers: in process, over the native protocol, and over STOMP, the same."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pybroker.errors import BrokerError, InvalidDestination, InvalidSelector
from tests.client.conftest import World
from tests.client.support import bodies, fill, nothing_comes

Q = "/queue/q"


async def test_everything_is_shown_in_order_and_stays(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"browse_messages_max": 4})
    async with world.client() as client:
        await fill(client, 25)
        await client.send(Q, b"25", {"colour": "red"}, durable=False, priority=9)
        shown = [message async for message in client.browse(Q)]
        assert [int(message.body) for message in shown] == [25, *range(25)]
        assert shown[0].header("colour") == "red"
        assert (shown[0].priority, shown[0].destination, shown[1].redelivered) == (9, Q, False)
        async with client.subscribe(Q, prefetch=3) as messages:
            received = [await messages.receive() for _ in range(3)]
            again = [message async for message in client.browse(Q)]
            assert [int(message.body) for message in again] == [25, *range(25)]
            assert [message.deliveries for message in received] == [0, 0, 0]
            await messages.ack(received)
        assert [int(message.body) async for message in client.browse(Q)] == list(range(2, 25))


async def test_a_limit_ends_it(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        await fill(client, 10)
        assert [int(message.body) async for message in client.browse(Q, limit=3)] == [0, 1, 2]


async def test_a_selector_shows_what_it_is_true_for(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"browse_messages_max": 4})
    async with world.client() as client:
        for number in range(30):
            await client.send(Q, b"%d" % number, {"kind": "ecg" if number % 10 == 7 else "report"})
        assert [int(message.body) async for message in client.browse(Q, selector="kind = 'ecg'")] == [7, 17, 27]


async def test_an_unknown_queue_is_empty_and_is_not_made(autojump_clock: MockClock, world: World) -> None:
    broker = await world.broker()
    async with world.client() as client:
        assert [message async for message in client.browse("/queue/none")] == []
        assert broker.statistics().destinations == ()


@pytest.mark.parametrize(
    ("to", "selector", "error"),
    [("/topic/t", "", InvalidDestination), ("/queue/a.>", "", InvalidDestination), (Q, "a = ", InvalidSelector)],
)
async def test_what_is_wrong_is_said(
    autojump_clock: MockClock, world: World, to: str, selector: str, error: type[BrokerError]
) -> None:
    async def look() -> None:
        async with world.client() as client:
            async for _ in client.browse(to, selector=selector):
                pass

    with pytest.raises(error):
        await look()


async def test_a_browser_that_stands_still_holds_nobody(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"browse_messages_max": 2})
    async with world.client() as client, world.client() as other:
        await fill(client, 20)
        browser = client.browse(Q)
        first = await anext(browser)
        async with other.subscribe(Q) as messages:
            assert await bodies(messages, 20) == list(range(20))
            assert await nothing_comes(messages)
        await other.send(Q, b"later")
        rest = [message.body async for message in browser]
        assert first.body == b"0"
        assert b"later" not in rest


async def test_the_broker_itself_looks_purges_moves_and_copies(autojump_clock: MockClock, world: World) -> None:
    broker = await world.start(limits={"browse_messages_max": 4})
    async with world.client() as client:
        await fill(client, 20)
        async with client.subscribe(Q, prefetch=2) as messages:
            held = [await messages.receive() for _ in range(2)]
            steps: list[int] = []
            copied = await broker.copy(Q, "/queue/copy", progress=lambda moved: steps.append(moved.count))
            assert (copied.count, copied.outstanding) == (18, 2)
            assert len(steps) >= 5
            moved = await broker.move(Q, "/queue/moved", limit=5)
            assert moved.count == 5
            purged = await broker.purge(Q)
            assert (purged.count, purged.outstanding) == (13, 2)
            await messages.ack(held)
        assert [int(message.body) async for message in broker.browse("/queue/moved")] == list(range(2, 7))
        assert [int(message.body) async for message in broker.browse("/queue/copy")] == list(range(2, 20))
        (row,) = [row for row in broker.statistics().destinations if row.name == "q"]
        assert (row.depth, row.ready, row.removed, row.bytes) == (0, 0, 18, 0)
    with pytest.raises(InvalidDestination, match="itself"):
        await broker.move(Q, Q)


async def test_a_browser_ends_with_its_broker(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        world = World("local", nursery)
        broker = await world.start()
        async with world.client() as client:
            await fill(client, 3)
        await world.stop()
        with pytest.raises(BrokerError):
            await anext(broker.browse(Q))
        nursery.cancel_scope.cancel()


async def test_a_late_subscriber_gets_what_its_topic_has_kept(autojump_clock: MockClock, world: World) -> None:
    await world.start(policy=[{"match": "/topic/>", "recovery_messages": 3}])
    async with world.client() as client:
        for number in range(5):
            await client.send("/topic/t", b"%d" % number)
        async with client.subscribe("/topic/t", retroactive=True) as messages:
            assert await bodies(messages, 3) == [2, 3, 4]
            await client.send("/topic/t", b"5")
            assert await bodies(messages, 1) == [5]
            assert await nothing_comes(messages)
        async with client.subscribe("/topic/t") as messages:
            assert await nothing_comes(messages)
