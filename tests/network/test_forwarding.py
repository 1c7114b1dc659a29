"""Messages cross links between whole brokers: queues, topics, durable subscriptions; what local consumers want stays."""

from __future__ import annotations

import trio

from tests.network.brokers import two

Q = "/queue/q"


async def test_a_message_goes_where_it_is_consumed(autojump_clock: trio.abc.Clock) -> None:
    async with two() as (network, a, b):
        async with b.consuming(Q, []) as found:
            await a.send(Q, *map(str, range(500)))
            await network.wait(lambda: len(found) == 500)
        assert found == [str(number) for number in range(500)]
        await network.wait(lambda: a.depth("q") == b.depth("q") == a.waiting("b") == 0)
        assert (a.peer("b").forwarded, b.peer("a").received, b.peer("a").repeats) == (500, 500, 0)
