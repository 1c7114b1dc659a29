"""A scenario for those who know ActiveMQ: message groups, an exclusive consumer, consumer priority and a selective consumer.

Two interfaces share a queue of ECGs; all of one patient (``JMSXGroupID``) go to the same one, in order. A hot standby archives with
``?consumer.exclusive=true``; a small machine helps out with ``?consumer.priority=-1``.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import pybroker


async def take(subscription: pybroker.Subscription, count: int) -> list[str]:
    messages = [await subscription.receive() for _ in range(count)]
    for message in messages:
        await message.ack()
    return [message.body.decode() for message in messages]


async def test_message_groups(tmp_path: Path) -> None:
    async with (
        pybroker.open_broker(data_dir=tmp_path) as broker,
        broker.connect() as client,
        client.subscribe("/queue/ecgs") as left,
    ):
        async with client.subscribe("/queue/ecgs") as right:
            for number in range(3):
                for patient in ("anna", "bert"):
                    await client.send("/queue/ecgs", f"{patient} {number}".encode(), {"JMSXGroupID": patient})
            assert await take(left, 3) == ["anna 0", "anna 1", "anna 2"]
            assert await take(right, 3) == ["bert 0", "bert 1", "bert 2"]
        # One interface has gone: its patients move to the other one.
        await client.send("/queue/ecgs", b"bert 3", {"JMSXGroupID": "bert", "JMSXGroupSeq": "-1"})
        assert await take(left, 1) == ["bert 3"]


async def test_an_exclusive_consumer_has_a_standby(tmp_path: Path) -> None:
    async with pybroker.open_broker(data_dir=tmp_path) as broker, broker.connect() as client, AsyncExitStack() as stack:
        owner = await stack.enter_async_context(client.subscribe("/queue/archive", exclusive=True))
        async with client.subscribe("/queue/archive", exclusive=True) as standby:
            for number in range(3):
                await client.send("/queue/archive", b"%d" % number)
            assert await take(owner, 2) == ["0", "1"]
            await stack.aclose()
            assert await take(standby, 1) == ["2"]


async def test_consumer_priority(tmp_path: Path) -> None:
    async with (
        pybroker.open_broker(data_dir=tmp_path) as broker,
        broker.connect() as client,
        client.subscribe("/queue/work", prefetch=2) as big,
        client.subscribe("/queue/work", priority=-1) as small,
    ):
        for number in range(4):
            await client.send("/queue/work", b"%d" % number)
        assert await take(small, 2) == ["2", "3"]  # the rest, as the big one has no more credit
        assert await take(big, 2) == ["0", "1"]


async def test_a_page_full_of_strangers(tmp_path: Path) -> None:
    """In ActiveMQ a selective consumer gets nothing when maxPageSize messages in front of its own wait for others."""
    small = {"window_messages_max": 100}
    async with pybroker.open_broker(data_dir=tmp_path, limits=small) as broker, broker.connect() as client:
        async with client.publisher() as publisher:
            for _ in range(2_000):
                await publisher.send("/queue/reports", b"for nobody here", {"ward": "1"})
        await client.send("/queue/reports", b"for ward 2", {"ward": "2"})
        async with client.subscribe("/queue/reports", selector="ward = 2") as ward:
            assert await take(ward, 1) == ["for ward 2"]
