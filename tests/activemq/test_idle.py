"""For a reader who knows ActiveMQ: ``gcInactiveDestinations`` with ``inactiveTimeoutBeforeGC="60000"``.

Each referral is answered to a queue of its own, and thousands of these would stay. See "Idle queues" in docs/activemq.md.
"""

from __future__ import annotations

import trio
from trio.testing import MockClock

from tests.engine.support import Disk, broker_on, engine_of

POLICY = [{"match": "/queue/answers.>", "idle_after": 60.0}]


async def test_queues_of_answers_go_when_nobody_uses_them(autojump_clock: MockClock) -> None:
    disk = Disk()
    async with broker_on(disk, policy=POLICY) as broker, broker.connect() as client:
        engine_of(broker).clock_ms = lambda: int(trio.current_time() * 1_000)

        def names() -> list[str]:
            return sorted(each.name for each in broker.statistics().destinations if each.kind == "queue")

        for number in range(3):
            await client.send(f"/queue/answers.{number}", b"seen")
        await client.send("/queue/referrals", b"knee")
        for name in ("answers.0", "answers.1", "referrals"):
            async with client.subscribe(f"/queue/{name}") as messages:
                await (await messages.receive()).ack()

        await trio.sleep(50)
        assert names() == ["answers.0", "answers.1", "answers.2", "referrals"]
        async with client.subscribe("/queue/answers.1"):
            await trio.sleep(20)
            # One has a message, one a consumer, and for one no policy says so.
            assert names() == ["answers.1", "answers.2", "referrals"]

        # It is there again as soon as somebody needs it.
        await client.send("/queue/answers.0", b"again")
    async with broker_on(disk, policy=POLICY) as broker, broker.connect() as client:
        for name, body in (("0", b"again"), ("2", b"seen")):
            async with client.subscribe(f"/queue/answers.{name}") as messages:
                message = await messages.receive()
                assert message.body == body
                await message.ack()
