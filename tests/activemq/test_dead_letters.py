"""For a reader who knows ActiveMQ: individual dead-letter queues, with expired messages in them.

There: ``<policyEntry queue="ward.>"><deadLetterStrategy><individualDeadLetterStrategy queuePrefix="DLQ."/>``, with
``processExpired``.
"""

from __future__ import annotations

import trio
from trio.testing import MockClock

from tests.engine.support import Disk, broker_on, engine_of

WARD = {
    "match": "/queue/ward.>",
    "deliveries_max": 1,
    "dead_letter_queue": "/queue/DLQ.{name}",
    "dead_letter_expired": True,
}


async def test_individual_dead_letter_queues_with_expired_messages(autojump_clock: MockClock) -> None:
    async with broker_on(Disk(), policy=[WARD]) as broker, broker.connect() as client:
        engine = engine_of(broker)
        engine.clock_ms = lambda: int(trio.current_time() * 1_000)
        await client.send("/queue/ward.3", b"poison", {"patient": "7"})
        async with client.subscribe("/queue/ward.3") as messages:
            await (await messages.receive()).nack()
        await client.send("/queue/ward.3", b"too late", expires=engine.clock_ms() + 5_000)
        async with client.subscribe("/queue/DLQ.ward.3") as dead:
            letter = await dead.receive()
            assert (letter.body, letter.header("patient")) == (b"poison", "7")
            assert letter.header("dead-letter-origin") == "/queue/ward.3"
            assert letter.header("dead-letter-reason") == "deliveries"
            await letter.ack()
            letter = await dead.receive()
            assert (letter.body, letter.header("dead-letter-reason")) == (b"too late", "expired")
            await letter.ack()


async def test_the_way_back(autojump_clock: MockClock) -> None:
    """There: ``retryMessages()`` of the queue's MBean, for all of the queue; here with filters, and atomically."""
    async with broker_on(Disk(), policy=[WARD]) as broker, broker.connect() as client:
        for patient in ("7", "8"):
            await client.send("/queue/ward.3", b"referral", {"patient": patient})
        async with client.subscribe("/queue/ward.3") as messages:
            for _ in range(2):
                await (await messages.receive()).nack()
            found = [dict(letter.headers) async for letter in broker.dead_letters.list(origin="/queue/ward.>")]
            assert found == [{"patient": "7"}, {"patient": "8"}]
            assert (await broker.dead_letters.retry(selector="patient = '8'")).count == 1
            message = await messages.receive()
            assert (message.header("patient"), message.deliveries) == ("8", 0)
            await message.ack()
        assert (await broker.dead_letters.drop(queue="/queue/DLQ.ward.3")).count == 1
