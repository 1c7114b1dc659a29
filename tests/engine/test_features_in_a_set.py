"""Schedules, message keys, redelivery, dead letters, chosen consumers, selectors and routing, when the leader of a set dies.

A leader is killed at many moments around those at which something is due or on its way to the followers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pytest
import trio

from pybroker.broker import Broker
from pybroker.client import Client, ReceivedMessage, Subscription
from pybroker.engine import Engine
from pybroker.errors import BrokerError
from tests.cluster.test_replica import DELAY
from tests.engine.sets import Embedded, brokers
from tests.engine.support import close_without_thread

Q = "/queue/q"
MINUTE = 15.0  # when a minute of the wall clock begins, in trio's time
START_MS = 1_767_225_600_000 - 15_000  # the wall clock when trio's is 0
MOMENTS = 9  # at which a leader is killed


@pytest.fixture(autouse=True)
def _one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No threads, and the wall clock of all brokers is trio's."""
    monkeypatch.setattr("pybroker.broker.close_store", close_without_thread)
    monkeypatch.setattr("pybroker.broker.Engine", partial(Engine, clock_ms=clock_ms))


def clock_ms() -> int:
    return START_MS + round(trio.current_time() * 1_000)


def after(seconds: float, **more: object) -> dict[str, str]:
    headers = {"AMQ_SCHEDULED_DELAY": str(round(seconds * 1_000))}
    return headers | {f"AMQ_SCHEDULED_{name.upper()}": str(value) for name, value in more.items()}


async def take(subscription: Subscription, count: int) -> list[str]:
    """Receive and acknowledge."""
    messages = [await subscription.receive() for _ in range(count)]
    for message in messages:
        await message.ack()
    return [message.body.decode() for message in messages]


async def drain(broker: Broker, destination: str = Q) -> list[ReceivedMessage]:
    """All that is there, acknowledged."""
    found: list[ReceivedMessage] = []
    async with broker.connect() as client, client.subscribe(destination) as messages:
        while True:
            with trio.move_on_after(0.5):
                batch = await messages.receive_batch(1_000)
                await messages.ack(batch)
                found += batch
                continue
            break
    return found


async def drained(broker: Broker, destination: str = Q) -> list[str]:
    return [message.body.decode() for message in await drain(broker, destination)]


async def test_what_is_scheduled_is_sent_as_often_as_it_should(autojump_clock: trio.abc.Clock) -> None:
    """The leader dies around the moment at which three things are due, in the middle of writing them, too."""
    senders: set[str] = set()
    for moment in range(MOMENTS):
        async with brokers() as group:
            leader = await group.settled()
            async with leader.broker.connect() as client:
                began = trio.current_time()
                async with client.transaction() as transaction:  # at its commit the delays begin
                    await transaction.send(Q, b"once", after(1.0))
                    await transaction.send("/topic/t", b"to nobody", after(1.0))
                    await transaction.send(Q, b"series", after(1.0, period=300, repeat=4))
                    await transaction.send(Q, b"later", after(20.0))
                await client.send(Q, b"long gone", after(0.5))
                await trio.sleep_until(began + 0.999 + DELAY * 3 * moment / MOMENTS)
            killed_ms = clock_ms()
            new = await group.kill_leader()
            await trio.sleep_until(began + 10.0)
            found = await drain(new.broker)
            assert Counter(each.body for each in found) == {b"once": 1, b"series": 5, b"long gone": 1}
            assert len({each.message_id for each in found}) == 7
            (once,) = (each for each in found if each.body == b"once")
            senders.add("the last leader" if once.timestamp <= killed_ms else "the next leader")
            async with new.broker.connect() as client, client.subscribe(Q) as messages:
                assert await take(messages, 1) == ["later"]
                assert trio.current_time() - began == pytest.approx(20.0, abs=0.05), "its delay went on"
            assert new.broker.statistics().scheduled == 0
            assert await drained(new.broker) == []
    assert len(senders) == 2, f"it was always {senders}"


@pytest.mark.parametrize("moment", range(0, MOMENTS, 3))
async def test_cron_goes_on_at_the_next_leader(autojump_clock: trio.abc.Clock, moment: int) -> None:
    """Each minute one, and each minute a series of three; the leader dies around the first of these minutes."""
    async with brokers() as group:
        leader = await group.settled()
        async with leader.broker.connect() as client:
            await client.send(Q, b"one", {"AMQ_SCHEDULED_CRON": "* * * * *"})
            await client.send(Q, b"three", after(0, cron="* * * * *", period=4_000, repeat=2))
        await trio.sleep_until(MINUTE - 0.001 + DELAY * 3 * moment / MOMENTS)
        new = await group.kill_leader()
        for minute in (MINUTE, MINUTE + 60):
            await trio.sleep_until(minute + 15)
            found = await drain(new.broker)
            assert Counter(each.body for each in found) == {b"one": 1, b"three": 3}
            assert len({each.message_id for each in found}) == 4


async def test_a_cancelled_schedule_stays_cancelled(autojump_clock: trio.abc.Clock) -> None:
    async with brokers() as group:
        leader = await group.settled()
        async with leader.broker.connect() as client:
            await client.send(Q, b"cancelled", after(5.0, period=1_000, repeat=-1))
            await client.send(Q, b"kept", after(5.0))
        await leader.broker.cancel_schedule("1")
        new = await group.kill_leader()
        await trio.sleep(10.0)
        assert await drained(new.broker) == ["kept"]


async def test_a_key_that_the_last_leader_stored_is_known_to_the_next_one(autojump_clock: trio.abc.Clock) -> None:
    """All sends are repeated. Those with keys may be of messages that are scheduled, too."""
    for moment in range(MOMENTS):
        async with brokers() as group:
            leader = await group.settled()
            confirmed: set[int] = set()

            async def send(client: Client, number: int) -> None:
                more = after(2.0) if number % 3 == 0 else {}
                try:
                    await client.send(Q, b"%d" % number, {"message-key": f"referral {number}"} | more)
                    confirmed.add(number)  # noqa: B023
                except BrokerError:
                    pass

            async with leader.broker.connect() as client, trio.open_nursery() as sending:
                for number in range(9):
                    sending.start_soon(send, client, number)
                    await trio.sleep(DELAY * moment / MOMENTS)
                new = await group.kill_leader()
                sending.cancel_scope.cancel()  # its program has ended with it
            known = set(confirmed)
            async with new.broker.connect() as client:
                for number in range(12):
                    await send(client, number)
            assert confirmed == set(range(12))
            assert new.broker.statistics().duplicates >= len(known)
            await trio.sleep(3.0)
            assert sorted(await drained(new.broker), key=int) == [str(number) for number in range(12)]


POLICIES: Sequence[dict[str, object]] = [
    {"match": "/queue/>", "redelivery_delay": 30.0, "deliveries_max": 3, "dead_letter_queue": "/queue/DLQ.{name}"}
]


async def test_what_waits_for_another_try_comes_at_once_and_its_deliveries_count(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with brokers(policy=POLICIES) as group:
        leader = await group.settled()
        async with leader.broker.connect() as client, client.subscribe(Q) as messages:
            await client.send(Q, b"rejected", {"ward": "3"})
            await (await messages.receive()).nack()
            await client.send(Q, b"good")
            assert await take(messages, 1) == ["good"]  # while the other one waits
            new = await group.kill_leader()
        began = trio.current_time()
        async with new.broker.connect() as client, client.subscribe(Q) as messages:
            again = await messages.receive()
            assert (again.body, again.redelivered, again.deliveries) == (b"rejected", True, 1)
            assert trio.current_time() - began < 1.0, "a delay is not stored"
            await again.nack()
            last = await messages.receive()
            assert trio.current_time() - began == pytest.approx(30.0, abs=0.5)
            await last.nack()
        await leader.start()
        assert await group.settled() is new
        newest = await group.kill_leader()
        (letter,) = await drain(newest.broker, "/queue/DLQ.q")
        names = ("origin", "reason", "deliveries")
        assert [letter.header(f"dead-letter-{name}") for name in names] == [Q, "deliveries", "3"]
        assert (letter.body, letter.header("ward")) == (b"rejected", "3")
        assert await drained(newest.broker) == []


async def test_groups_keep_their_order(autojump_clock: trio.abc.Clock) -> None:
    async with brokers() as group:
        leader = await group.settled()
        async with leader.broker.connect() as client, client.subscribe(Q) as left, client.subscribe(Q) as right:
            for number in range(8):
                for patient in ("anna", "bert"):
                    await client.send(Q, f"{patient} {number}".encode(), {"JMSXGroupID": patient})
            assert await take(left, 3) == ["anna 0", "anna 1", "anna 2"]
            assert await take(right, 5) == [f"bert {number}" for number in range(5)]
            new = await group.kill_leader()
        async with new.broker.connect() as client, client.subscribe(Q) as first, client.subscribe(Q) as second:
            for number in range(8, 10):
                for patient in ("anna", "bert"):
                    await client.send(Q, f"{patient} {number}".encode(), {"JMSXGroupID": patient})
            found: dict[str, list[str]] = {}
            for subscription in (first, second):
                with trio.move_on_after(1.0):
                    while True:
                        (body,) = await take(subscription, 1)
                        found.setdefault(body[:4], []).append(body)
        assert found == {
            "anna": [f"anna {number}" for number in range(3, 10)],
            "bert": [f"bert {number}" for number in range(5, 10)],
        }


async def test_exclusive_and_preferred_consumers_are_so_at_the_next_leader(autojump_clock: trio.abc.Clock) -> None:
    async def story(leader: Embedded) -> None:
        async with leader.broker.connect() as client:
            async with client.subscribe(Q, exclusive=True) as owner, client.subscribe(Q, exclusive=True) as standby:
                for body in (b"0", b"1"):
                    await client.send(Q, body)
                assert await take(owner, 2) == ["0", "1"]
                with trio.move_on_after(1.0):
                    raise AssertionError(await standby.receive())
            async with (
                client.subscribe("/queue/p", prefetch=1) as low,
                client.subscribe("/queue/p", prefetch=1, priority=5) as high,
            ):
                for body in (b"0", b"1"):
                    await client.send("/queue/p", body)
                assert (await take(low, 1), await take(high, 1)) == (["1"], ["0"])

    async with brokers() as group:
        await story(await group.settled())
        await story(await group.kill_leader())


async def test_durable_subscriptions_with_selectors_and_virtual_topics_collect_on(
    autojump_clock: trio.abc.Clock,
) -> None:
    audit = "/queue/Consumer.audit.VirtualTopic.reports"
    topic = "/topic/VirtualTopic.reports"

    async def publish(client: Client, *numbers: int) -> None:
        for number in numbers:
            await client.send(topic, b"%d" % number, {"ward": str(3 + number % 2)})

    async with brokers() as group:
        leader = await group.settled()
        async with leader.broker.connect("ward") as client:
            async with client.subscribe(topic, durable_name="d", selector="ward = 3"), client.subscribe(audit):
                pass
            await publish(client, *range(4))
            new = await group.kill_leader()
        async with new.broker.connect() as client:
            await publish(client, 4, 5)
            assert await drained(new.broker, audit) == ["0", "1", "2", "3", "4", "5"]
        ward = new.broker.connect("ward")
        async with ward as client, client.subscribe(topic, durable_name="d", selector="ward = 3") as messages:
            assert await take(messages, 3) == ["0", "2", "4"]
            with trio.move_on_after(1.0):
                raise AssertionError(await messages.receive())
