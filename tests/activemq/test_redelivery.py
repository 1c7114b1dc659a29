"""For a reader who knows ActiveMQ: a redelivery policy with exponential back-off, for some queues only.

There: ``<redeliveryPolicy queue="ward.>" initialRedeliveryDelay="10000" useExponentialBackOff="true" backOffMultiplier="3"
maximumRedeliveries="2"/>``; messages that fail are tried again later, others are not held up (``nonBlockingRedelivery``), and after
the last try they are in ``ActiveMQ.DLQ``.
"""

from __future__ import annotations

import trio
from trio.testing import MockClock

from tests.engine.support import Disk, broker_on, engine_of

WARD = {"match": "/queue/ward.>", "redelivery_delay": 10, "redelivery_backoff": 3, "deliveries_max": 3}


async def test_exponential_back_off_and_then_the_dead_letters(autojump_clock: MockClock) -> None:
    async with broker_on(Disk(), policy=[WARD]) as broker, broker.connect() as client:
        engine_of(broker).clock_ms = lambda: int(trio.current_time() * 1_000)
        await client.send("/queue/ward.3", b"referral")
        began = trio.current_time()
        seen = []
        async with client.subscribe("/queue/ward.3") as messages, client.subscribe("/queue/ActiveMQ.DLQ") as dead:
            for _ in range(3):
                message = await messages.receive()
                seen.append((round(trio.current_time() - began), message.deliveries))
                await message.nack()
            letter = await dead.receive()
            assert letter.header("dead-letter-deliveries") == "3"
        assert seen == [(0, 0), (10, 1), (40, 2)]
