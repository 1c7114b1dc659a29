"""Selectors are the same in process, over the native protocol, and over STOMP."""

# ruff: noqa: SIM117 (blocks that nest are what is tested)
from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from pybroker import queue_pages
from pybroker.client import Client
from pybroker.core import subscriptions
from pybroker.errors import InvalidSelector, SubscriptionError
from tests.client.conftest import World
from tests.client.support import bodies, nothing_comes
from tests.engine.support import Disk, broker_on
from tests.native import peer as wire

TOPIC = "/topic/t"
WARD_3 = "ward = 3 AND kind LIKE 'ref%'"


async def publish(client: Client, number: int, ward: str, kind: str = "referral", to: str = TOPIC) -> None:
    await client.send(to, b"%d" % number, {"ward": ward, "kind": kind, "grüße:": "a:b\n"})


async def test_a_subscriber_gets_what_it_selects(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client, world.client() as other:
        async with (
            client.subscribe(TOPIC, selector=WARD_3) as selective,
            other.subscribe("/topic/*", selector="\"grüße:\" = 'a:b\n' AND ward <> '3'") as others,
            other.subscribe(TOPIC) as everything,
        ):
            await publish(client, 0, "3")
            await publish(client, 1, "4")
            await publish(client, 2, "3", "report")
            await publish(client, 3, "3")
            assert await bodies(selective, 2) == [0, 3]
            assert await bodies(others, 1) == [1]
            assert await bodies(everything, 4) == [0, 1, 2, 3]
            assert await nothing_comes(selective)


async def test_a_durable_subscription_collects_what_it_selects(autojump_clock: MockClock, world: World) -> None:
    async with world.client("me") as client:
        async with client.subscribe(TOPIC, durable_name="d", selector=WARD_3):
            pass
    async with world.client() as sender:
        for number, ward in enumerate("3434"):
            await publish(sender, number, ward)
    async with world.client("me") as client, client.subscribe(TOPIC, durable_name="d", selector=WARD_3) as messages:
        assert await bodies(messages, 2) == [0, 2]
        assert await nothing_comes(messages)


async def test_a_durable_subscription_keeps_its_selector(autojump_clock: MockClock, world: World) -> None:
    async with world.client("me") as client:
        async with client.subscribe(TOPIC, durable_name="d", selector=WARD_3):
            pass
        await publish(client, 1, "3")
        with pytest.raises(SubscriptionError, match="unsubscribe it first"):
            async with client.subscribe(TOPIC, durable_name="d"):
                raise AssertionError
    async with world.client("me") as client:
        async with client.subscribe(TOPIC, durable_name="d", selector=WARD_3) as messages:
            assert await bodies(messages, 1) == [1]
        await client.remove_subscription("d")
        async with client.subscribe(TOPIC, durable_name="d") as messages:
            await publish(client, 2, "4")
            assert await bodies(messages, 1) == [2]


async def test_a_consumer_of_a_queue_gets_what_it_selects(autojump_clock: MockClock, world: World) -> None:
    queue = "/queue/q"
    async with world.client() as client, world.client() as other:
        for number, ward in enumerate("4434"):
            await publish(client, number, ward, to=queue)
        async with client.subscribe(queue, selector=WARD_3) as selective:
            assert await bodies(selective, 1) == [2]
            assert await nothing_comes(selective)
            await publish(client, 4, "3", to=queue)
            assert await bodies(selective, 1) == [4]
        async with other.subscribe(queue) as everything:
            assert await bodies(everything, 3) == [0, 1, 3]


async def test_a_wrong_selector_of_a_queue_is_refused(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        with pytest.raises(InvalidSelector, match="column 10: the selector ends"):
            async with client.subscribe("/queue/q", selector="ward IN ("):
                raise AssertionError


@pytest.mark.parametrize("durable_name", [None, "d"])
async def test_a_wrong_selector_is_refused(autojump_clock: MockClock, world: World, durable_name: str | None) -> None:
    async with world.client("me") as client:
        with pytest.raises(InvalidSelector, match="column 8: '=' can't stand here; expected a name, 'text', a number"):
            async with client.subscribe(TOPIC, durable_name=durable_name, selector="ward = = 3"):
                raise AssertionError


async def test_a_selector_that_is_too_long_is_refused(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"selector_bytes_max": 20})
    async with world.client() as client:
        async with client.subscribe(TOPIC, selector="ward = 3"):
            pass
        with pytest.raises(InvalidSelector, match=r"23 bytes, and limits\.selector_bytes_max is 20"):
            async with client.subscribe(TOPIC, selector="ward = 3 AND kind = 'x'"):
                raise AssertionError


async def test_others_have_their_turn_between_two_selectors(
    autojump_clock: MockClock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading one takes as long as many messages: a read full of SUBSCRIBE or BROWSE frames is no single turn."""
    seen = []
    compile_selector = subscriptions.compile_selector

    def noted(text: str, bytes_max: int) -> object:
        seen.append(text)
        return compile_selector(text, bytes_max)

    async def subscribe(client: Client, number: int) -> None:
        async with client.subscribe(f"/topic/{number}", selector=f"a = {number}"):
            opened.append(number)

    async def turns() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            seen.append("")

    if world.kind == "local":
        pytest.skip("each subscription is a turn of its own")
    monkeypatch.setattr(subscriptions, "compile_selector", noted)
    opened: list[int] = []
    async with world.client() as client, trio.open_nursery() as nursery:
        nursery.start_soon(turns)
        async with trio.open_nursery() as subscribers:
            for number in range(20):
                subscribers.start_soon(subscribe, client, number)
        nursery.cancel_scope.cancel()
    assert len(opened) == 20
    rows = "".join("s" if text else "." for text in seen)
    assert "sss" not in rows, rows  # two may be neighbours: tasks run in any order within a round of the scheduler


async def test_others_have_their_turn_between_two_browsers_selectors(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is between two SUBSCRIBE frames, for a read full of BROWSE frames."""
    seen = []
    compile_selector = queue_pages.compile_selector

    def noted(text: str, bytes_max: int) -> object:
        seen.append(text)
        return compile_selector(text, bytes_max)

    async def turns() -> None:
        while True:
            await trio.lowlevel.checkpoint()
            seen.append("")

    monkeypatch.setattr(queue_pages, "compile_selector", noted)
    async with broker_on(Disk(), limits={"browse_pages_max": 20}) as broker, trio.open_nursery() as nursery:
        ours, theirs = memory_stream_pair()
        nursery.start_soon(broker._server.serve_stream, theirs, True)
        await ours.send_all(wire.pack([wire.HELLO, "pybroker", [1], {}]))
        await trio.sleep(1)
        nursery.start_soon(turns)
        rows = [[wire.BROWSE, number, "/queue/q", f"b = {number}", 0, []] for number in range(1, 21)]
        await ours.send_all(wire.pack(*rows))
        while seen.count("") < 1_000:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert sum(map(bool, seen)) == 20
    shown = "".join("s" if text else "." for text in seen)
    assert "sss" not in shown, shown
