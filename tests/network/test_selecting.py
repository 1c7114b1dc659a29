"""Selectors of topic subscribers behind a link: the broker that has them chooses, and others know no selectors."""

from __future__ import annotations

import trio

from tests.network.brokers import two

T = "/topic/news.local"


async def test_a_broker_chooses_for_its_own_subscribers(autojump_clock: trio.abc.Clock) -> None:
    async with two() as (network, a, b), b.connect("registry") as client, a.connect() as sender:
        async with client.subscribe(T, durable_name="d", selector="ward = 3"):
            pass  # it collects while its client is away
        async with client.subscribe("/topic/news.*", selector="ward = 3 AND JMSPriority > 4") as urgent:
            await network.wait(lambda: len(a.engine.core.links.demand.heard("b")) == 2)
            for number in range(12):
                await sender.send(T, b"%d" % number, {"ward": str(number % 4)}, priority=9 if number > 5 else 4)
            assert [(await urgent.receive()).body for _ in range(2)] == [b"7", b"11"]
        await network.wait(
            lambda: (a.peer("b").forwarded, b.peer("a").received) == (12, 12)
        )  # each once, whoever selects it
        async with client.subscribe(T, durable_name="d", selector="ward = 3") as collected:
            assert [(await collected.receive()).body for _ in range(3)] == [b"7", b"11", b"3"]
