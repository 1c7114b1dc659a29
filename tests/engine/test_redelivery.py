"""The engine wakes when a redelivery is due: not before, not by looking again and again, and though the clock is set."""

from __future__ import annotations

import trio
import trio.testing

from pybroker.alarm import Alarm
from tests.engine.support import Disk, broker_on, check, engine_of

POLICY = [{"match": "/queue/a", "redelivery_delay": 30}]


async def test_a_rejected_message_comes_again_when_its_delay_is_over(autojump_clock: trio.testing.MockClock) -> None:
    async with broker_on(Disk(), policy=POLICY) as broker, broker.connect() as client:
        engine_of(broker).clock_ms = lambda: int(trio.current_time() * 1_000)
        async with client.subscribe("/queue/a", prefetch=1) as messages:
            await client.send("/queue/a", b"1")
            first = await messages.receive()
            began = trio.current_time()
            await first.nack()
            await client.send("/queue/a", b"2")
            second = await messages.receive()
            assert (second.body, trio.current_time() - began < 1) == (b"2", True)
            await second.ack()
            (queue,) = broker.statistics().destinations
            assert (queue.depth, queue.delayed) == (1, 1)
            again = await messages.receive()
            assert (again.body, again.deliveries) == (b"1", 1)
            assert 29.99 < trio.current_time() - began < 30.1
            await again.ack()
            check(broker)


async def test_an_alarm_rings_once_and_never_early(autojump_clock: trio.testing.MockClock) -> None:
    offset = 0
    alarm = Alarm(lambda: int(trio.current_time() * 1_000) + offset, 1.0)
    start = trio.current_time()
    alarm.set(int(start * 1_000) + 5_500)
    await alarm.wait()
    assert 5.49 <= trio.current_time() - start < 5.52
    with trio.move_on_after(100) as scope:
        await alarm.wait()
    assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alarm.wait)
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        alarm.set(int(start * 1_000) + 50_000)
        await trio.testing.wait_all_tasks_blocked()
        alarm.set(int(start * 1_000) + 7_000)  # nearer
    assert 6.99 <= trio.current_time() - start < 7.02
    start = trio.current_time()
    alarm.set(int(start * 1_000) + 3_600_000)
    offset = 3_600_000  # the clock was set forward
    await alarm.wait()
    assert trio.current_time() - start < 1.1
