"""Scheduled messages through every client: in process, native and STOMP, on virtual time; and the engine's clock."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
import trio
from trio.testing import MockClock

from pybroker.broker import Broker
from pybroker.engine import wall_clock_ms
from pybroker.errors import BrokerError, InvalidMessage, LimitExceeded
from pybroker.store import schedules as store_schedules
from tests.client.conftest import World
from tests.client.support import bodies, nothing_comes
from tests.engine.support import Disk, broker_on, check, check_empty, engine_of

Q = "/queue/q"


class Clock:
    """A wall clock that goes with trio's, and can be changed."""

    def __init__(self) -> None:
        self.offset = wall_clock_ms() - int(trio.current_time() * 1_000)

    def __call__(self) -> int:
        return self.offset + int(trio.current_time() * 1_000)

    def rule(self, broker: Broker) -> None:
        engine_of(broker).clock_ms = self


def after(delay: float, **more: object) -> dict[str, str]:
    """Headers that say: in so many seconds."""
    headers = {"AMQ_SCHEDULED_DELAY": str(int(delay * 1_000))}
    return headers | {f"AMQ_SCHEDULED_{name.upper()}": str(value) for name, value in more.items()}


@pytest.mark.parametrize("durable", [True, False])
async def test_messages_come_exactly_when_they_are_due(autojump_clock: MockClock, world: World, durable: bool) -> None:
    broker = await world.broker()
    Clock().rule(broker)
    async with world.client() as client, client.subscribe(Q) as messages:
        start = trio.current_time()
        for number, delay in enumerate((30, 10, 20)):
            await client.send(Q, b"%d" % number, {"ward": "3", **after(delay)}, durable=durable)
        for delay, number in ((10, 1), (20, 2), (30, 0)):
            message = await messages.receive()
            assert trio.current_time() - start == pytest.approx(delay, abs=0.01)
            assert int(message.body) == number
            assert message.header("ward") == "3"
            assert message.header("scheduledJobId") == str(number + 1)
            assert message.header("AMQ_SCHEDULED_DELAY") is None
            await messages.ack([message])
        async with client.transaction() as transaction:
            await transaction.send(Q, b"7", after(5, period=1_000, repeat=2), durable=durable)
        start = trio.current_time()
        assert await bodies(messages, 3) == [7, 7, 7]
        assert trio.current_time() - start == pytest.approx(7, abs=0.01)
        assert await nothing_comes(messages)
    check_empty(broker)


async def test_what_is_wrong_is_refused(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"schedules_max": 1})
    for headers in (after(-1), after(0, cron="a b"), {"AMQ_SCHEDULED_REPEAT": "1"}):
        async with world.client() as client:
            with pytest.raises(InvalidMessage):
                await client.send(Q, b"x", headers)
    async with world.client() as client:
        await client.send(Q, b"1", after(1_000))
        with pytest.raises(LimitExceeded, match="schedules_max"):
            await client.send(Q, b"2", after(1_000))


async def test_a_topics_subscribers_are_those_of_that_time(autojump_clock: MockClock, world: World) -> None:
    broker = await world.broker()
    Clock().rule(broker)
    async with world.client() as client:
        await client.send("/topic/t", b"1", after(10))
        async with client.subscribe("/topic/t") as messages:
            assert await bodies(messages, 1) == [1]


async def test_listing_and_cancelling(autojump_clock: MockClock, world: World) -> None:
    broker = await world.start(limits={"window_messages_max": 4})
    Clock().rule(broker)
    async with world.client() as client:
        for number in range(20):
            await client.send(Q, b"%d" % number, after(100 - number), durable=number % 5 > 0)
        listed = await broker.schedules()
        assert [int(each.schedule_id) for each in listed] == list(range(20, 0, -1))
        assert (listed[0].destination, listed[0].left, listed[0].durable) == (Q, 0, True)
        assert await broker.schedules(3) == listed[:3]
        assert await broker.schedules(5, after=listed[2]) == listed[3:8]
        assert await broker.schedules(5, after=listed[-1]) == ()
        assert broker.statistics().scheduled == 20
        for number in (1, 2, 12, 20):
            await broker.cancel_schedule(str(number))
        for wrong in ("1", "12", "99", "", "x", "-1", "9" * 30):
            with pytest.raises(BrokerError, match="there is no schedule"):
                await broker.cancel_schedule(wrong)
        left = [number - 1 for number in range(20, 0, -1) if number not in (1, 2, 12, 20)]
        assert [int(each.schedule_id) - 1 for each in await broker.schedules()] == left
        async with client.subscribe(Q) as messages:
            assert await bodies(messages, len(left)) == left
            assert await nothing_comes(messages)
    check_empty(broker)


async def test_many_at_once_are_cancelled_once(autojump_clock: MockClock) -> None:
    async with broker_on(Disk(), limits={"window_messages_max": 1}) as broker, broker.connect() as client:
        for number in range(9):
            await client.send(Q, b"%d" % number, after(100 + number))
        done: list[str] = []

        async def cancel(schedule_id: str) -> None:
            try:
                await broker.cancel_schedule(schedule_id)
            except BrokerError:
                return
            done.append(schedule_id)

        async with trio.open_nursery() as nursery:
            for number in range(1, 10):
                for _ in range(3):
                    nursery.start_soon(cancel, str(number))
        assert sorted(done) == [str(number) for number in range(1, 10)]
        check_empty(broker)


async def test_a_schedule_that_is_always_due_keeps_no_broker_from_stopping(autojump_clock: MockClock) -> None:
    ticks = itertools.count(wall_clock_ms(), 5)
    async with broker_on(Disk()) as broker, broker.connect() as client, client.subscribe(Q) as messages:
        engine_of(broker).clock_ms = lambda: next(ticks)
        await client.send(Q, b"1", after(0, period=1, repeat=-1))
        assert await bodies(messages, 50) == [1] * 50


# ---- the clock


async def test_what_was_missed_while_the_broker_was_away_comes_at_once_and_once(autojump_clock: MockClock) -> None:
    disk = Disk()
    clock = Clock()
    async with broker_on(disk) as broker, broker.connect() as client:
        clock.rule(broker)
        await client.send(Q, b"1", after(10))
        await client.send(Q, b"2", after(20, period=20_000, repeat=-1))
        await client.send(Q, b"3", after(1_000))
        await client.send(Q, b"4", after(10), durable=False)
    await trio.sleep(65)
    async with broker_on(disk) as broker, broker.connect() as client, client.subscribe(Q) as messages:
        clock.rule(broker)
        start = trio.current_time()
        assert await bodies(messages, 3) == [1, 2, 2]
        assert trio.current_time() - start == pytest.approx(15, abs=1.1), "its rhythm stays: 80 s after it was sent"
        check(broker)


async def test_a_clock_that_is_changed(autojump_clock: MockClock) -> None:
    async with broker_on(Disk()) as broker, broker.connect() as client, client.subscribe(Q) as messages:
        clock = Clock()
        clock.rule(broker)
        await client.send(Q, b"1", after(300))
        await client.send(Q, b"2", after(600))
        clock.offset += 300_000
        with trio.fail_after(1.1):  # clock_check_interval
            assert await bodies(messages, 1) == [1]
        clock.offset -= 300_000
        start = trio.current_time()
        assert await bodies(messages, 1) == [2]
        assert trio.current_time() - start == pytest.approx(600, abs=2), "it is the wall clock that counts"


async def test_a_list_keeps_no_messages_and_names_what_it_can_not_show(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Twenty of half a megabyte each: no more than a page of them is in memory."""
    async with broker_on(Disk(), limits={"window_bytes_max": 1_000_000}) as broker, broker.connect() as client:
        for number in range(20):
            await client.send(Q, bytes(500_000), after(100 + number))
        tracemalloc.start()
        assert len(await broker.schedules()) == 20
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000
        backend = engine_of(broker).store.backend
        backend.write(backend.new_batch([(store_schedules.schedule_key(7), b"bad")]), True)
        assert [each.schedule_id for each in await broker.schedules(7)] == ["1", "2", "3", "4", "5", "6", "8"]
        assert "it is left out of the list" in caplog.text


async def test_what_can_not_be_read_is_in_the_statistics(autojump_clock: MockClock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, broker.connect() as client:
        await client.send(Q, b"1", after(1_000))
        await client.send(Q, b"2", after(1_000))
        assert broker.statistics().scheduled_corrupt == 0
        backend = engine_of(broker).store.backend
        changes = [(store_schedules.schedule_key(1), b"bad"), (store_schedules.due_key(2**62, 1)[:9], b"no such key")]
        backend.write(backend.new_batch(changes), True)
    async with broker_on(disk) as broker, broker.connect() as client:
        await client.send(Q, b"3", after(1_000))
        assert broker.statistics().scheduled_corrupt == 2
        assert [each.schedule_id for each in await broker.schedules()] == ["2", "3"]


async def test_a_full_queue_is_tried_again_when_there_is_room(autojump_clock: MockClock) -> None:
    async with broker_on(Disk(), limits={"queue_messages_max": 1}) as broker, broker.connect() as client:
        Clock().rule(broker)
        for number in range(3):
            await client.send(Q, b"%d" % number, after(1))
        await trio.sleep(5)
        assert broker.statistics().scheduled == 2
        async with client.subscribe(Q, prefetch=1) as messages:
            start = trio.current_time()
            assert await bodies(messages, 3) == [0, 1, 2]
            assert trio.current_time() - start < 0.5
