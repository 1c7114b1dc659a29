"""Transactions over the native protocol: all of it or nothing, on any path to either."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from pybroker.broker import Broker, open_broker
from tests.engine.support import Disk, broker_on, check, check_empty, drain, engine_of
from tests.native.peer import ACK, COMMIT, SEND, UNSUBSCRIBE, Peer, connected, flat, row, rows

A, B, C = "/queue/a", "/queue/b", "/queue/c"


def depths(broker: Broker) -> dict[str, int]:
    return {name: queue.depth for name, queue in engine_of(broker).core.by_destination.items() if queue.depth}


async def taken(peer: Peer, count: int, number: int = 1, **options: Any) -> list[int]:
    """Messages in a queue, and with a subscription: their tags."""
    await peer.send([SEND, 1_000, rows(count)])
    await peer.confirms(*range(1_000, 1_000 + count))
    await peer.subscribe(number, **options)
    return [one.tag for one in await peer.deliveries(number, count)]


async def test_a_transaction_happens_as_a_whole(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        tags = await taken(peer, 6)
        messages = [row(b"b", B), row(b"c", C), row(b"b2", B)]
        await peer.send([COMMIT, 1, messages, [[1, [tags[0], tags[2]]]], [[1, [tags[4], tags[4]]]]])
        await peer.confirms(1)
        assert peer.confirmed[1] is True
        again = await peer.delivery(1)
        assert (again.body, again.deliveries) == (b"4", 1)
        assert depths(broker) == {A: 3, B: 2, C: 1}
        check(broker)
        await peer.do(ACK, 7, 1, flat([tags[3], tags[5], again.tag]))
        found = await drain(broker, B, C)
        assert [message.body for message in found[B]] == [b"b", b"b2"]
        check_empty(broker)


async def test_a_transaction_of_acknowledgements_only_and_an_empty_one(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        tags = await taken(peer, 2)
        await peer.send([COMMIT, 1, [], [[1, [tags[0], tags[1]]]], []], [COMMIT, 2, [], [], []])
        await peer.confirms(1, 2)
        check_empty(broker)


async def test_a_cumulative_settlement_takes_all_before_it(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        tags = await taken(peer, 5, ack="cumulative")
        await peer.send([COMMIT, 1, [], [], [[1, [tags[1], tags[1]]]]])
        await peer.confirms(1)
        assert [(one.body, one.deliveries) for one in await peer.deliveries(1, 2)] == [(b"0", 1), (b"1", 1)]
        await peer.send([COMMIT, 2, [], [[1, [tags[4], tags[4]]]], []])
        await peer.confirms(2)
        assert depths(broker) == {A: 2}


async def test_what_is_wrong_in_a_transaction_refuses_all_of_it(autojump_clock: trio.abc.Clock) -> None:
    limits = {"transaction_messages_max": 6, "transaction_bytes_max": 1_000, "destinations_max": 3}
    async with open_broker(limits=limits, stomp={"body_bytes_max": 500}) as broker, connected(broker) as peer:
        tags = await taken(peer, 7)
        await peer.send([SEND, 500, rows(1, B)])
        await peer.confirms(500)
        before = depths(broker)
        ack = [[1, [tags[0], tags[0]]]]
        wrong: list[tuple[str, list[Any]]] = [
            ("destination", [[row(b""), row(b"", "nowhere")], ack, []]),
            ("destination", [[row(b"", "/queue/x.>")], ack, []]),
            ("limit", [[row(b"x" * 501)], ack, []]),
            ("limit", [[row(b"x" * 400) for _ in range(3)], ack, []]),
            ("limit", [rows(6), ack, []]),
            ("limit", [[], [[1, [tags[0], tags[6]]]], []]),
            ("limit", [[row(b"", C), row(b"", "/queue/d")], ack, []]),
            ("transaction", [rows(1), [[1, [tags[0] - 1, tags[0]]]], []]),
            ("transaction", [rows(1), [[1, [tags[6] + 1, 2**63 - 1]]], []]),
            ("transaction", [rows(1), ack, [[1, [tags[0], tags[0]]]]]),
            ("transaction", [rows(1), [[2, [1, 1]]], []]),
        ]
        for number, (code, fields) in enumerate(wrong, 1):
            await peer.send([COMMIT, number, *fields])
            assert (await peer.refusal(number))[0] == code, fields
            assert depths(broker) == before
            check(broker)
        await peer.send([COMMIT, 100, rows(1), ack, []])
        await peer.confirms(100)
        await peer.silent()


async def test_sends_and_transactions_wait_in_order_while_acknowledgements_get_through(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_broker(limits={"queue_messages_max": 4}) as broker, connected(broker) as peer:
        tags = await taken(peer, 4)
        await peer.send([COMMIT, 1, [row(b"t", A), row(b"t", B)], [[1, [tags[0], tags[0]]]], []], [SEND, 2, rows(1, B)])
        await peer.silent()
        assert depths(broker) == {A: 4}
        await peer.send([ACK, 0, 1, [tags[1], tags[1]]])
        await peer.confirms(1, 2)
        assert depths(broker) == {A: 3, B: 2}
        check(broker)
        assert (await peer.delivery(1)).body == b"t"
        await peer.silent()


async def test_a_transaction_that_waits_for_too_long_is_refused_and_leaves_its_deliveries(
    autojump_clock: trio.abc.Clock,
) -> None:
    limits = {"queue_messages_max": 4, "full_timeout": 2.0}
    async with open_broker(limits=limits) as broker, connected(broker) as peer:
        tags = await taken(peer, 4)
        commit = [[row(b"t", A), row(b"t", B)], [[1, [tags[0], tags[0]]]], []]
        await peer.send([COMMIT, 1, *commit])
        assert (await peer.refusal(1))[0] == "full"
        assert depths(broker) == {A: 4}
        await peer.do(ACK, 7, 1, [tags[1], tags[1]])
        await peer.send([COMMIT, 2, *commit])
        await peer.confirms(2)


async def test_deliveries_that_are_settled_while_the_transaction_waits_refuse_it(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with open_broker(limits={"queue_messages_max": 4}) as broker, connected(broker) as peer:
        tags = await taken(peer, 4)
        await peer.send([COMMIT, 1, [row(b"t", A)], [[1, [tags[0], tags[0]]]], []])
        await peer.silent()
        await peer.do(UNSUBSCRIBE, 7, 1)
        await peer.subscribe(2)
        got = await peer.deliveries(2, 4)
        await peer.do(ACK, 7, 2, [got[0].tag, got[0].tag])
        assert (await peer.refusal(1))[0] == "transaction"
        assert depths(broker) == {A: 3}


@pytest.mark.parametrize("acked", [True, False])
async def test_a_crash_at_every_batch_boundary_leaves_all_of_a_transaction_or_nothing(
    autojump_clock: trio.abc.Clock, acked: bool
) -> None:
    disk = Disk()
    moments: list[tuple[dict[bytes, bytes], frozenset[int]]] = []
    confirmed: dict[int, bool] = {}

    def keep(number: int) -> None:
        moments.append((dict(disk.backend.synced), frozenset(confirmed)))

    disk.before = disk.after = keep
    async with broker_on(disk) as broker, connected(broker) as peer:
        confirmed = peer.confirmed
        tags = await taken(peer, 20)
        for number in range(10):
            settled = [[1, [tags[number], tags[number]]]]
            messages = [row(b"%d" % number, destination) for destination in (B, C, B)]
            await peer.send([COMMIT, number + 1, messages, settled if acked else [], [] if acked else settled])
            if number % 3 == 0:
                await peer.confirms(number + 1)
        await peer.confirms(*range(1, 11))
        keep(0)
    assert len(moments) > 10
    for state, told in moments:
        async with broker_on(Disk(state)) as broker:
            found = await drain(broker, A, B, C)
            check_empty(broker)
        in_b, in_c = ([int(message.body) for message in found[queue]] for queue in (B, C))
        done = sorted(set(in_c))
        assert in_c == done
        assert in_b == sorted(done * 2), "a transaction in part"
        assert {number - 1 for number in told if number < 1_000} <= set(done), "confirmed, and lost"
        left = {int(message.body) for message in found[A]}
        assert len(left) == len(found[A])
        if acked and 1_019 in told:
            assert left == set(range(20)) - set(done)
        elif 1_019 in told:
            assert left == set(range(20))
