"""Sends over the native protocol: confirmations, refusals, portions, and messages arriving unchanged."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pybroker.broker import Broker, open_broker
from pybroker.message import Message
from tests.engine.support import Disk, broker_on, check, drain, engine_of
from tests.native.peer import ACK, BYE, CREDIT, DURABLE, SEND, SUBSCRIBE, Peer, connected, flat, row, rows

A = "/queue/a"


async def bodies(broker: Broker, *places: str) -> list[bytes]:
    found = await drain(broker, *places)
    return [message.body for place in places for message in found[place]]


async def test_what_is_sent_is_confirmed_and_delivered_unchanged(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        block = "näme:a\\nb\\cc\\\\\nname:\n".encode()
        sent = row(bytes(range(256)), "/queue/ä", block=block, flags=DURABLE | 9, expires=2**62)
        await peer.send([SEND, 1, [sent]], [SUBSCRIBE, 1, 5, "/queue/ä", "individual", 0, ""])
        await peer.done(1)
        got = await peer.delivery(5)
        assert peer.confirmed == {1: True}
        assert [got.destination, got.body, got.block, got.flags, got.expires] == sent
        assert got.deliveries == 0
        assert got.timestamp > 0
        check(broker)


async def test_confirmations_of_one_commit_are_one_range_and_say_what_is_stored(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, connected(broker) as peer:
        await peer.send([SEND, 1, [row(b"0")]])
        await peer.confirms(1)
        disk.shut()
        await peer.send([SEND, 2, rows(3)], [SEND, 5, rows(2, flags=4)], [SEND, 7, rows(2)])
        await peer.silent()
        disk.gate.set()
        await peer.confirms(*range(2, 9))
        assert [peer.confirmed[sequence] for sequence in range(1, 9)] == [True] * 4 + [False] * 2 + [True] * 2


async def test_nothing_is_confirmed_before_it_is_on_the_disk(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, connected(broker) as peer:
        disk.shut()
        await peer.send([SEND, 1, rows(10)])
        await peer.silent()
        assert peer.confirmed == {}
        disk.gate.set()
        await peer.confirms(*range(1, 11))


async def test_a_bad_message_is_refused_alone(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker(stomp={"body_bytes_max": 1_000, "header_block_bytes_max": 300}) as broker:
        async with connected(broker) as peer:
            batch = [
                row(b"0"),
                row(b"1", "nowhere"),
                row(b"2"),
                row(b"3", "/queue/a.*"),
                row(b"x" * 1_001),
                row(b"x" * 1_000),
                row(b"", block=b"name:" + b"v" * 300 + b"\n"),
                row(b"7"),
            ]
            await peer.send([SEND, 1, batch])
            await peer.confirms(1, 3, 6, 8)
            assert {sequence: code for sequence, (code, _) in peer.refused.items()} == {
                2: "destination",
                4: "destination",
                5: "limit",
                7: "limit",
            }
            assert "stomp.body_bytes_max is 1000" in peer.refused[5][1]
            assert "stomp.header_block_bytes_max is 300" in peer.refused[7][1]
        assert await bodies(broker, A) == [b"0", b"2", b"x" * 1_000, b"7"]


class Turns:
    """Counts what each turn of an engine sends."""

    def __init__(self, broker: Broker) -> None:
        engine = self.engine = engine_of(broker)
        self._send, self._end_turn = engine.core.send, engine.end_turn
        engine.core.send = self.send  # type: ignore[method-assign]
        engine.end_turn = self.end_turn  # type: ignore[method-assign]
        self.counts = [0]
        self.sizes = [0]

    def send(self, message: Message) -> bool:
        self.counts[-1] += 1
        self.sizes[-1] += message.size
        return self._send(message)

    def end_turn(self) -> None:
        self.counts.append(0)
        self.sizes.append(0)
        self._end_turn()


async def test_a_frame_of_many_messages_is_divided_into_turns(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        turns = Turns(broker)
        await peer.send([SEND, 1, rows(10_000)])
        await peer.confirms(*range(1, 10_001))
        assert max(turns.counts) <= broker.config.limits.turn_messages_max
        assert await bodies(broker, A) == [b"%d" % number for number in range(10_000)]


async def test_large_messages_are_divided_into_turns(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        turns = Turns(broker)
        await peer.send([SEND, 1, [row(b"%d" % n + b"x" * 400_000) for n in range(12)]], [BYE])
        await peer.confirms(*range(1, 13))
        assert max(turns.sizes) < 2_000_000
        assert [body[:3].rstrip(b"x") for body in await bodies(broker, A)] == [b"%d" % n for n in range(12)]


async def test_expired_on_arrival_and_without_a_subscriber_is_confirmed_as_not_stored(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await peer.send([SEND, 1, [row(b"", expires=1), row(b"", "/topic/t"), row(b"2")]])
        await peer.confirms(1, 2, 3)
        assert peer.confirmed == {1: False, 2: False, 3: True}


# ---- what a client may have unconfirmed


async def test_more_unconfirmed_messages_than_welcome_says_end_the_connection(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk, native={"send_messages_max": 10}) as broker, connected(broker) as peer:
        assert peer.welcome["send_messages_max"] == 10
        disk.shut()
        await peer.send([SEND, 1, rows(6)], [SEND, 7, rows(4)])
        await peer.silent()
        await peer.send([SEND, 11, rows(1)])
        await wait_all_tasks_blocked()
        disk.gate.set()
        error = await peer.error("limit")
        assert "native.send_messages_max is 10" in error[2]
        assert peer.confirmed.keys() == set(range(1, 11))


async def test_more_unconfirmed_bytes_than_welcome_says_end_the_connection(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk, native={"send_bytes_max": 1_000}) as broker, connected(broker) as peer:
        disk.shut()
        await peer.send([SEND, 1, [row(b"x" * 5_000)]])  # one message always may
        await peer.silent()
        await peer.send([SEND, 2, rows(1)])
        await wait_all_tasks_blocked()
        disk.gate.set()
        assert "native.send_bytes_max is 1000" in (await peer.error("limit"))[2]
        assert peer.confirmed == {1: True}


async def test_what_is_confirmed_or_refused_counts_no_more(autojump_clock: trio.abc.Clock) -> None:
    native = {"send_messages_max": 3, "send_bytes_max": 3_000}
    async with open_broker(native=native) as broker, connected(broker) as peer:
        for number in range(20):
            first = 3 * number + 1
            await peer.send([SEND, first, [row(b"x" * 1_000), row(b"x" * 1_000, "nowhere"), row(b"x" * 1_000)]])
            await peer.confirms(first, first + 2)
            await peer.refusal(first + 1)
        await peer.silent()


# ---- a full broker


FULL = {"limits": {"queue_messages_max": 5}}


async def test_acknowledgements_get_through_while_sends_wait_for_room(autojump_clock: trio.abc.Clock) -> None:
    """On one connection: what makes room comes behind what waits for it."""
    async with open_broker(**FULL) as broker, connected(broker) as peer:
        await peer.subscribe(1)
        await peer.send([SEND, 1, rows(12)], [SEND, 13, rows(1, "/queue/b")])
        got = await peer.deliveries(1, 5)
        await peer.confirms(*range(1, 6))
        await peer.silent()
        assert 13 not in peer.confirmed, "what waits keeps its order"
        await peer.send([ACK, 0, 1, flat(one.tag for one in got[:2])])
        await peer.confirms(6, 7)
        got = [*got[2:], *await peer.deliveries(1, 2)]
        assert [one.body for one in got] == [b"%d" % number for number in range(2, 7)]
        await peer.silent()
        while got:
            await peer.send([ACK, 0, 1, flat(one.tag for one in got)])
            got = await peer.deliveries(1, 5) if len(peer.confirmed) < 12 else []
        await peer.confirms(*range(1, 14))
        check(broker)


async def test_by_policy_a_full_broker_refuses_at_once(autojump_clock: trio.abc.Clock) -> None:
    limits = {"queue_messages_max": 5, "full_policy": "refuse"}
    async with open_broker(limits=limits) as broker, connected(broker) as peer:
        await peer.send([SEND, 1, [*rows(6), *rows(2, "/queue/b"), *rows(2)]])
        await peer.confirms(1, 2, 3, 4, 5, 7, 8)
        for sequence in (6, 9, 10):
            code, text = await peer.refusal(sequence)
            assert code == "full"
            assert "limits.queue_messages_max is 5" in text
        assert await bodies(broker, A) == [b"%d" % number for number in range(5)]


async def test_what_has_waited_for_too_long_is_refused_together(autojump_clock: trio.abc.Clock) -> None:
    limits = {"queue_messages_max": 5, "full_timeout": 3.0}
    async with open_broker(limits=limits) as broker, connected(broker) as peer:
        began = trio.current_time()
        await peer.send([SEND, 1, rows(105)])
        await peer.confirms(1, 2, 3, 4, 5)
        _, text = await peer.refusal(105)
        assert 3.0 <= trio.current_time() - began < 4.0, "not three seconds for each"
        assert "waited 3 s, limits.full_timeout" in text
        assert peer.refused.keys() == set(range(6, 106))
        await peer.send([SEND, 106, rows(1, "/queue/b")])
        await peer.confirms(106)


async def test_other_requests_are_answered_while_sends_wait(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker(**FULL) as broker, connected(broker) as peer, connected(broker) as other:
        await peer.send([SEND, 1, rows(6)])
        await peer.subscribe(1, "/queue/b")
        await other.send([SEND, 1, rows(2, "/queue/b")])
        assert [one.body for one in await peer.deliveries(1, 2)] == [b"0", b"1"]
        assert 6 not in peer.confirmed


async def test_a_full_batch_parks_sends_and_loses_none(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk, limits={"batch_bytes_max": 2_000}) as broker, connected(broker) as peer:
        disk.shut()
        for number in range(20):
            await peer.send([SEND, number * 5 + 1, [row(b"%d" % n + b"x" * 300) for n in range(5)]])
        await peer.silent()
        assert engine_of(broker).journal.open_bytes < 10_000
        disk.gate.set()
        await peer.confirms(*range(1, 101))
        found = await bodies(broker, A)
        assert [body.rstrip(b"x") for body in found] == [b"%d" % n for n in range(5)] * 20


async def test_who_leaves_takes_what_waits_with_it(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker(**FULL) as broker:
        async with connected(broker) as peer:
            await peer.send([SEND, 1, rows(9)])
            await peer.confirms(5)
            await peer.stream.send_eof()  # type: ignore[attr-defined]
            assert await peer.end() == []
            assert 6 not in peer.confirmed
        assert await bodies(broker, A) == [b"%d" % number for number in range(5)]
        assert await bodies(broker, A) == []


async def test_bye_waits_until_everything_is_confirmed(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker(**FULL) as broker, connected(broker) as peer, connected(broker) as consumer:
        await peer.send([SEND, 1, rows(9)], [BYE], [SEND, 100, rows(1)])
        await peer.confirms(5)
        await peer.silent()
        await consumer.subscribe(1)
        got = await consumer.deliveries(1, 5)
        await consumer.send([ACK, 0, 1, [got[0].tag, got[-1].tag]])
        assert await peer.end() == [[BYE]]
        assert peer.confirmed.keys() == set(range(1, 10))
        assert [one.body for one in await consumer.deliveries(1, 4)] == [b"5", b"6", b"7", b"8"]


async def test_credit_of_a_subscription_that_is_unknown_is_passed_over(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await peer.send([CREDIT, 9, 5], [ACK, 0, 9, [1, 5]], [SEND, 1, rows(1)])
        await peer.confirms(1)


@pytest.mark.parametrize(("size", "count"), [(1, 1_000), (100_000, 100)])
async def test_a_client_that_reads_nothing_is_read_no_more_and_loses_nothing(
    autojump_clock: trio.abc.Clock, size: int, count: int
) -> None:
    """Its outbox is bounded, its consumers pause; another consumer gets the rest."""
    async with open_broker(limits={"outbox_bytes_max": 10_000}) as broker, connected(broker) as other:
        ours, theirs = trio.testing.lockstep_stream_pair()  # takes nothing that is not read
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker._server.serve_stream, theirs, True)
            stalled = Peer(ours)
            await stalled.hello()
            await stalled.subscribe(1)
            await other.send([SEND, 1, [row(b"%d" % n + b"x" * size) for n in range(count)]])
            await other.confirms(*range(1, count + 1))
            core = engine_of(broker).core
            (held,) = [len(c.unacked) for connection in core.connections for c in connection.consumers]
            assert held * (size + 64) <= 2_000_000, "what one turn dispatched, at most"
            await ours.aclose()
        await other.subscribe(1)
        found = [await other.delivery(1) for _ in range(count)]
        assert [one.body.rstrip(b"x") for one in found] == [b"%d" % n for n in range(count)]
