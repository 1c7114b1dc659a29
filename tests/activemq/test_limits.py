"""For a reader who knows ActiveMQ: a queue that fails sends when it is full, and a topic whose slow subscribers lose old ticks.

There: ``memoryLimit`` with ``sendFailIfNoSpace``, and ``<constantPendingMessageLimitStrategy limit="3"/>`` with
``<oldestMessageEvictionStrategy/>``.
"""

from __future__ import annotations

import pytest
from trio.testing import MockClock

from pybroker import BrokerFull
from tests.engine.support import Disk, broker_on

POLICY = [
    {"match": "/queue/orders", "messages_max": 2, "full_policy": "refuse"},
    {"match": "/topic/ticks.>", "pending_messages_max": 3, "slow_consumer": "drop_oldest"},
]


async def test_a_full_queue_refuses_and_others_go_on(autojump_clock: MockClock) -> None:
    async with broker_on(Disk(), policy=POLICY) as broker, broker.connect() as client:
        await client.send("/queue/orders", b"1")
        await client.send("/queue/orders", b"2")
        with pytest.raises(BrokerFull, match="policy value messages_max is 2"):
            await client.send("/queue/orders", b"3")
        await client.send("/queue/other", b"1")


async def test_a_slow_subscriber_gets_the_newest_ticks(autojump_clock: MockClock) -> None:
    async with (
        broker_on(Disk(), policy=POLICY) as broker,
        broker.connect() as client,
        client.subscribe("/topic/ticks.x", prefetch=1, ack="individual") as messages,
    ):
        for number in range(10):
            await client.send("/topic/ticks.x", b"%d" % number, durable=False)
        found = []
        for _ in range(3):
            message = await messages.receive()
            found.append(int(message.body))
            await message.ack()
        assert found == [0, 8, 9]
        (row,) = [each for each in broker.statistics().destinations if each.name == "ticks.x"]
        assert row.dropped == 7
