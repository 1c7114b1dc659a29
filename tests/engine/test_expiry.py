"""A message that expires while its batch is being written is not shown late."""

from __future__ import annotations

import trio

from tests.engine.support import Disk, broker_on, check, engine_of


async def test_a_delivery_that_expires_before_its_commit_is_not_shown(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, broker.connect() as client:
        engine = engine_of(broker)
        now = engine.clock_ms()
        engine.clock_ms = lambda: now
        async with client.subscribe("/queue/a", prefetch=1) as messages, client.publisher() as publisher:
            disk.shut()
            await publisher.send("/queue/a", b"late", expires=now + 50)
            await trio.sleep(1)
            now += 50
            disk.gate.set()
            await publisher.wait_confirmed()
            await publisher.send("/queue/a", b"in time", expires=now + 50)
            assert (await messages.receive()).body == b"in time"
            check(broker)
        (queue,) = broker.statistics().destinations
        assert queue.expired == 1
