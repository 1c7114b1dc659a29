"""Subscriptions over the native protocol: deliveries, acknowledgements by ranges, credit, redelivery, durable ones, their ends."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pybroker.broker import Broker, open_broker
from tests.engine.support import Disk, broker_on, check, check_empty, engine_of
from tests.native.peer import (
    ACK,
    CREDIT,
    DONE,
    ENDED,
    NACK,
    REMOVE,
    SEND,
    SUBSCRIBE,
    UNSUBSCRIBE,
    Delivery,
    Peer,
    connected,
    flat,
    row,
    rows,
)

A = "/queue/a"
TOPIC = "/topic/t"


def bodies(deliveries: list[Delivery]) -> list[bytes]:
    return [one.body for one in deliveries]


def numbers(start: int, stop: int) -> list[bytes]:
    return [b"%d" % number for number in range(start, stop)]


async def fill(peer: Peer, count: int, destination: str = A, first: int = 1) -> None:
    await peer.send([SEND, first, rows(count, destination)])
    await peer.confirms(*range(first, first + count))


def depth(broker: Broker, destination: str = A) -> int:
    return engine_of(broker).core.by_destination[destination].depth


async def test_ranges_acknowledge_what_they_name(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await fill(peer, 10)
        await peer.subscribe(1)
        got = await peer.deliveries(1, 10)
        assert bodies(got) == numbers(0, 10)
        tags = [one.tag for one in got]
        assert tags == list(range(tags[0], tags[0] + 10))
        await peer.do(ACK, 7, 1, [tags[0], tags[2], tags[5], tags[5], tags[8], tags[9]])
        assert depth(broker) == 4
        check(broker)
        await peer.do(UNSUBSCRIBE, 7, 1)
        await peer.subscribe(1)
        again = await peer.deliveries(1, 4)
        assert bodies(again) == [b"3", b"4", b"6", b"7"]
        assert [one.deliveries for one in again] == [1, 1, 1, 1]
        assert again[0].tag > tags[9], "tags go on rising"


async def test_an_acknowledgement_of_nothing_settles_the_rest_and_says_so(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await fill(peer, 6)
        await peer.subscribe(1)
        tags = [one.tag for one in await peer.deliveries(1, 6)]
        await peer.do(ACK, 7, 1, [tags[1], tags[1]])
        await peer.send([ACK, 8, 1, [tags[0], tags[3]]])
        assert str(tags[1]) in await peer.failed(8, "unknown-delivery")
        assert depth(broker) == 2
        await peer.send([NACK, 9, 1, [tags[2], tags[4]]])
        assert str(tags[2]) in await peer.failed(9, "unknown-delivery")
        assert (await peer.delivery(1)).deliveries == 1
        await peer.send([ACK, 10, 1, [0, 2**63 - 1]], [ACK, 11, 1, [5, 5]], [ACK, 12, 9, [1, 1]])
        await peer.failed(10, "unknown-delivery")
        await peer.failed(11, "unknown-delivery")
        await peer.failed(12, "subscription")
        assert depth(broker) == 0
        check_empty(broker)


async def test_rejected_messages_return_to_their_places_and_reach_the_dead_letters(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_broker(delivery={"deliveries_max": 3}) as broker, connected(broker) as peer:
        await fill(peer, 3)
        await peer.subscribe(1, prefetch=3)
        for times in range(3):
            got = await peer.deliveries(1, 3)
            assert bodies(got) == numbers(0, 3)
            assert [one.deliveries for one in got] == [times] * 3
            await peer.do(NACK, 7, 1, [got[0].tag, got[-1].tag])
        await peer.subscribe(2, "/queue/ActiveMQ.DLQ")
        assert bodies(await peer.deliveries(2, 3)) == numbers(0, 3)


async def test_cumulative_settles_all_up_to_a_tag(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await fill(peer, 10)
        await peer.subscribe(1, ack="cumulative", prefetch=8)
        got = await peer.deliveries(1, 8)
        await peer.do(ACK, 7, 1, [got[3].tag, got[3].tag])
        assert bodies(await peer.deliveries(1, 2)) == [b"8", b"9"]
        await peer.do(NACK, 7, 1, [got[5].tag, got[5].tag])
        assert bodies(await peer.deliveries(1, 2)) == [b"4", b"5"]
        assert depth(broker) == 6
        await peer.send([ACK, 8, 1, [got[0].tag, got[0].tag]])
        await peer.failed(8, "unknown-delivery")


async def test_auto_is_acknowledged_by_the_client_and_has_a_window_of_its_own(autojump_clock: trio.abc.Clock) -> None:
    limits = {"prefetch_auto_default": 7, "prefetch_default": 3}
    async with open_broker(limits=limits) as broker, connected(broker) as peer:
        await fill(peer, 10)
        await peer.subscribe(1, ack="auto")
        got = await peer.deliveries(1, 7)
        await peer.silent()
        assert depth(broker) == 10
        await peer.send([ACK, 0, 1, flat(one.tag for one in got)])
        assert bodies(await peer.deliveries(1, 3)) == numbers(7, 10)
        await peer.silent()
        assert depth(broker) == 3
        await peer.subscribe(2)
        await fill(peer, 10, first=11)
        await peer.deliveries(2, 3)


async def test_credit_is_kept_and_can_be_changed(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await fill(peer, 20)
        await peer.subscribe(1, prefetch=3)
        got = await peer.deliveries(1, 3)
        await peer.silent()
        await peer.send([CREDIT, 1, 5])
        got += await peer.deliveries(1, 2)
        await peer.silent()
        await peer.send([CREDIT, 1, 2])
        await peer.send([ACK, 0, 1, [got[0].tag, got[2].tag]])
        await peer.silent()
        await peer.send([ACK, 0, 1, [got[3].tag, got[3].tag]])
        got += await peer.deliveries(1, 1)
        await peer.silent()
        await peer.send([CREDIT, 1, 0], [ACK, 0, 1, [got[4].tag, got[5].tag]])
        await peer.silent()
        await peer.send([CREDIT, 1, 2**62])
        assert bodies(await peer.deliveries(1, 14)) == numbers(6, 20)
        check(broker)


async def test_a_broken_connection_gives_back_what_it_held(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker:
        async with connected(broker) as peer:
            await fill(peer, 5)
            await peer.subscribe(1)
            got = await peer.deliveries(1, 5)
            await peer.do(ACK, 7, 1, [got[1].tag, got[1].tag])
        async with connected(broker) as peer:
            await peer.subscribe(1)
            again = await peer.deliveries(1, 4)
            assert bodies(again) == [b"0", b"2", b"3", b"4"]
            assert {one.deliveries for one in again} == {1}
            assert [one.message_id for one in again] == [one.message_id for one in got if one.body != b"1"]
            await peer.send([ACK, 8, 1, flat(one.tag for one in got)])
            await peer.failed(8, "unknown-delivery")
            assert depth(broker) == 4, "tags of another connection mean nothing"


async def test_deliveries_wait_for_their_commit_and_those_taken_back_are_left_out(
    autojump_clock: trio.abc.Clock,
) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, connected(broker) as peer:
        await peer.subscribe(1)
        disk.shut()
        await peer.send([SEND, 1, rows(4)])
        await peer.silent()
        await peer.send([UNSUBSCRIBE, 8, 1], [SUBSCRIBE, 9, 2, A, "individual", 0, ""])
        await peer.silent()
        disk.gate.set()
        await peer.done(8)
        await peer.done(9)
        got = await peer.deliveries(2, 4)
        assert bodies(got) == numbers(0, 4)
        assert {one.deliveries for one in got} == {0}, "nobody has seen them before"


async def test_what_the_socket_has_not_taken_is_void_when_its_subscription_ends(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_broker() as broker, connected(broker) as sender, connected(broker, lockstep=True) as peer:
        await peer.subscribe(1)
        await fill(sender, 1)  # the writer hangs with this one
        await fill(sender, 4, first=2)
        await peer.send([UNSUBSCRIBE, 8, 1], [SUBSCRIBE, 9, 2, A, "individual", 0, ""])
        await wait_all_tasks_blocked()
        await peer.done(8)
        await peer.done(9)
        assert bodies(await peer.deliveries(1, 1)) == [b"0"]
        assert [one.deliveries for one in await peer.deliveries(2, 5)] == [1] * 5
        assert not peer.received(1), "they are with the second subscription"


async def test_deliveries_go_in_frames_of_bounded_size(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker(limits={"outbox_bytes_max": 64 * 1024 * 1024}) as broker, connected(broker) as peer:
        await peer.send([SEND, 1, [row(b"%d" % number) for number in range(2_500)]])
        await peer.confirms(*range(1, 2_501))
        await peer.subscribe(1, prefetch=5_000)
        assert bodies(await peer.deliveries(1, 2_500)) == numbers(0, 2_500)
        assert len(peer.sizes) >= 3
        await peer.do(UNSUBSCRIBE, 7, 1)
        peer.sizes.clear()
        await peer.send([SEND, 2_501, [row(b"x" * 700_000, "/queue/b") for _ in range(5)]])
        await peer.send([SEND, 2_506, [row(b"x" * 3_000_000, "/queue/b")]])
        await peer.confirms(*range(2_501, 2_507))
        await peer.subscribe(2, "/queue/b")
        await peer.deliveries(2, 6)
        assert max(peer.sizes[:-1]) < 1_100_000
        assert 3_000_000 < peer.sizes[-1] < 3_001_000


async def test_subscriptions_of_one_connection_share_a_queue(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await peer.subscribe(1, prefetch=100)
        await peer.subscribe(2, prefetch=100)
        await fill(peer, 10)
        assert bodies(await peer.deliveries(1, 5)) == [b"0", b"2", b"4", b"6", b"8"]
        assert bodies(await peer.deliveries(2, 5)) == [b"1", b"3", b"5", b"7", b"9"]


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ((1, A, "individual", 0, ""), "subscription", "is in use on this connection"),
        ((2, A, "client", 0, ""), "subscription", "is not one of individual, cumulative, auto"),
        ((2, "nowhere", "individual", 0, ""), "destination", "must start with /queue/"),
        ((2, "/queue/*,/topic/a", "individual", 0, ""), "subscription", "is for queues, not for a topic"),
        ((2, TOPIC, "individual", 0, "name"), "subscription", "needs a client id"),
        ((2, A, "individual", 0, "name"), "subscription", "is for a topic"),
    ],
)
async def test_a_subscription_that_can_not_be_made_fails_alone(
    autojump_clock: trio.abc.Clock, fields: tuple[object, ...], code: str, words: str
) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await peer.subscribe(1)
        await peer.send([SUBSCRIBE, 8, *fields])
        assert words in await peer.failed(8, code)
        await fill(peer, 1)
        await peer.delivery(1)


async def test_other_requests_that_fail_alone(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker(limits={"subscriptions_max": 1}) as broker, connected(broker) as peer:
        await peer.subscribe(1)
        await peer.send([SUBSCRIBE, 8, 2, A, "auto", 0, ""], [UNSUBSCRIBE, 9, 2], [REMOVE, 10, "none"])
        await peer.failed(8, "limit")
        await peer.failed(9, "subscription")
        await peer.failed(10, "subscription")


async def test_a_durable_subscription_collects_while_its_client_is_away(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, connected(broker) as sender:
        async with connected(broker, client_id="me") as peer:
            disk.shut()
            await peer.send([SUBSCRIBE, 8, 1, TOPIC, "individual", 0, "mine"])
            await wait_all_tasks_blocked()
            await sender.send([SEND, 1, rows(1, TOPIC, flags=4)])
            await peer.silent()  # it is not on the disk yet
            disk.gate.set()
            await peer.done(8)
            got = await peer.delivery(1)
            await peer.send([SUBSCRIBE, 9, 2, TOPIC, "individual", 0, "mine"])
            assert "in use" in await peer.failed(9, "subscription")
            await peer.do(ACK, 7, 1, [got.tag, got.tag])
        await fill(sender, 3, TOPIC, first=2)
        async with connected(broker, client_id="me") as peer:
            await peer.subscribe(1, TOPIC, durable="mine")
            assert bodies(await peer.deliveries(1, 3)) == numbers(0, 3)
            await peer.send([REMOVE, 9, "mine"])
            assert "in use" in await peer.failed(9, "subscription")
            await peer.do(UNSUBSCRIBE, 7, 1)
            await peer.do(REMOVE, 7, "mine")
            await peer.send([REMOVE, 9, "mine"])
            await peer.failed(9, "subscription")
        check_empty(broker)


async def test_a_durable_subscription_that_ends_before_it_began(autojump_clock: trio.abc.Clock) -> None:
    """Ended again before its making was committed: it is given nothing, and nothing is lost."""
    disk = Disk()
    async with broker_on(disk) as broker, connected(broker, client_id="me") as peer:
        disk.shut()
        await peer.send([SUBSCRIBE, 8, 1, TOPIC, "individual", 0, "mine"], [UNSUBSCRIBE, 9, 1])
        await peer.send([SEND, 1, rows(2, TOPIC)])
        await wait_all_tasks_blocked()
        disk.gate.set()
        assert [await peer.frame(), await peer.frame()] == [[DONE, 8], [DONE, 9]]
        await peer.confirms(1, 2)
        await peer.subscribe(2, TOPIC, durable="mine")
        assert bodies(await peer.deliveries(2, 2)) == numbers(0, 2)


async def test_a_slow_subscriber_of_a_topic_is_ended_and_the_connection_goes_on(autojump_clock: trio.abc.Clock) -> None:
    async with (
        open_broker(limits={"backlog_messages_max": 5}) as broker,
        connected(broker) as peer,
        connected(broker) as sender,
    ):
        await peer.subscribe(1, TOPIC, prefetch=1)
        await peer.subscribe(2)
        await fill(sender, 10, TOPIC)
        frame = await peer.frame()
        assert frame[:3] == [ENDED, 1, "slow-consumer"]
        assert "limits.backlog_messages_max" in frame[3]
        await peer.send([ACK, 0, 1, [1, 1]], [CREDIT, 1, 4])
        await fill(sender, 1, first=11)
        assert (await peer.delivery(2)).body == b"0"
        await peer.subscribe(1, TOPIC)
        await fill(sender, 1, TOPIC, first=12)
        assert (await peer.deliveries(1, 1))[-1].body == b"0"
        check(broker)


async def test_messages_that_expire_while_they_wait_leave_a_gap_in_the_tags(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, connected(broker) as peer:
        engine = engine_of(broker)
        engine.clock_ms = lambda: 1_000
        await peer.subscribe(1)
        disk.shut()
        await peer.send([SEND, 1, [row(b"0"), row(b"1", expires=2_000), row(b"2"), row(b"3", expires=3_000)]])
        await peer.silent()
        engine.clock_ms = lambda: 2_500
        disk.gate.set()
        got = await peer.deliveries(1, 3)
        assert bodies(got) == [b"0", b"2", b"3"]
        assert got[1].tag == got[0].tag + 2
        await peer.do(ACK, 7, 1, [got[0].tag, got[0].tag, got[1].tag, got[2].tag])
