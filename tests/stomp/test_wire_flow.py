"""Flow control seen from outside: a full broker, peers that never read or hardly write, many peers at once."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pybroker.broker import Broker
from pybroker.statistics import DestinationStatistics
from tests.support.serving import embedded
from tests.support.wire import Peer, dialled, frame

QUIET = 0.02


def queue_row(broker: Broker, name: str) -> DestinationStatistics:
    (row,) = (row for row in broker.statistics().destinations if row.kind == "queue" and row.name == name)
    return row


async def silent(peer: Peer) -> None:
    """Nothing more comes to this peer."""
    with trio.move_on_after(QUIET) as scope:
        found = await peer.frame()
        raise AssertionError(f"{found} came")
    assert scope.cancelled_caught


def sends(count: int, destination: str = "/queue/a", *headers: str, size: int = 10) -> bytes:
    frames = [
        frame("SEND", f"destination:{destination}", f"receipt:{number}", *headers, body=b"x" * size)
        for number in range(count)
    ]
    return b"".join(frames)


# ---- a full broker


async def fill(producer: Peer, room: int) -> None:
    """One packet each: the limits are looked at once for what one read brought."""
    for _ in range(room):
        await producer.do("SEND", "destination:/queue/a", body=b"x" * 1_000)


FULL: dict[str, tuple[dict[str, Any], int]] = {  # what it is full of, and how many messages of 1,000 bytes go in
    "queue_messages_max": ({"queue_messages_max": 10}, 10),
    "store_bytes_max": ({"store_bytes_max": 10_000}, 11),
}


@pytest.mark.parametrize("limit", FULL)
async def test_a_producer_into_a_full_broker_is_slowed(limit: str):
    limits, room = FULL[limit]
    async with embedded(limits=limits) as (_, port), dialled(port) as producer, dialled(port) as consumer:
        await fill(producer, room)
        await producer.send(sends(5, size=1_000))
        await silent(producer)
        await consumer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:client-individual"))
        messages = await consumer.frames(room)
        for number in range(5):
            await silent(producer)
            await consumer.send(frame("ACK", f"id:{messages[number]['ack']}"))
            await producer.receipt(str(number))
            await consumer.expect("MESSAGE")


@pytest.mark.parametrize("limit", FULL)
async def test_a_producer_into_a_full_broker_is_refused_by_policy(limit: str):
    limits, room = FULL[limit]
    async with embedded(limits={**limits, "full_policy": "refuse"}) as (broker, port), dialled(port) as producer:
        await fill(producer, room)
        await producer.send(sends(5, size=1_000))
        error = await producer.error(f"limits.{limit}")
        assert (error["code"], error["receipt-id"]) == ("full", "0")
        assert queue_row(broker, "a").depth == room


async def test_a_slowed_producer_is_refused_in_the_end():
    limits = {"queue_messages_max": 3, "full_timeout": 0.1}
    async with embedded(limits=limits) as (_, port), dialled(port) as producer:
        await producer.send(sends(5))
        for number in range(3):
            await producer.receipt(str(number))
        error = await producer.error("limits.queue_messages_max", "limits.full_timeout")
        assert error["receipt-id"] == "3"


async def test_others_are_served_while_a_producer_is_slowed():
    async with embedded(limits={"queue_messages_max": 3}) as (broker, port), dialled(port) as producer:
        await producer.send(sends(50))
        async with dialled(port) as other:
            await other.do("SUBSCRIBE", "id:1", "destination:/topic/t")
            for _ in range(10):
                await other.do("SEND", "destination:/queue/b", body=b"x")
                if queue_row(broker, "b").depth == 3:
                    await other.send(frame("SUBSCRIBE", "id:b", "destination:/queue/b"))
                    await other.frames(3)
                    await other.do("UNSUBSCRIBE", "id:b")
        assert queue_row(broker, "a").depth == 3


async def test_a_slowed_producer_is_not_taken_for_silent():
    """Its heart-beats come, and are not read while it waits: that is not its fault."""
    limits, stomp = {"queue_messages_max": 3}, {"heartbeat_min_ms": 40}
    async with (
        embedded(limits=limits, stomp=stomp) as (_, port),
        dialled(port, "1.2", "heart-beat:40,0") as producer,
        dialled(port) as consumer,
    ):
        await producer.send(sends(4))
        for number in range(3):
            await producer.receipt(str(number))
        for _ in range(20):  # ten times what is tolerated
            await producer.send(b"\n")
            await trio.sleep(0.04)
        await consumer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a"))
        await producer.receipt("3")


async def test_an_error_behind_a_slowed_send_comes_after_its_receipt():
    """The bad frame came in the same packet, and is known long before the send is done."""
    async with (
        embedded(limits={"queue_messages_max": 3}) as (_, port),
        dialled(port) as producer,
        dialled(port) as consumer,
    ):
        await producer.send(sends(5) + b"NONSENSE\n\n\0")
        for number in range(3):
            await producer.receipt(str(number))
        await silent(producer)
        await consumer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a"))
        await producer.receipt("3")
        await producer.receipt("4")
        await producer.error("NONSENSE")


async def test_a_slowed_producer_that_leaves_takes_its_send_with_it():
    async with embedded(limits={"queue_messages_max": 3}) as (broker, port):
        async with dialled(port) as producer:
            await producer.send(sends(10))
            for number in range(3):
                await producer.receipt(str(number))
            await silent(producer)
        async with dialled(port) as consumer:
            await consumer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:client-individual"))
            await consumer.frames(3)
            assert queue_row(broker, "a").enqueued <= 10


# ---- peers that do not read


@asynccontextmanager
async def narrow(port: int) -> AsyncIterator[Peer]:
    """A peer whose socket takes as little as possible, so that one that does not read stalls soon."""
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    await sock.connect(("127.0.0.1", port))
    peer = Peer(trio.SocketStream(sock))
    try:
        await peer.open()
        yield peer
    finally:
        await peer.cut()


@pytest.mark.parametrize("destination", ["/queue/a", "/topic/a"])
async def test_a_stalled_consumer_costs_its_window_and_no_more(tmp_path: Path, destination: str):
    limits = {"outbox_bytes_max": 200_000, "prefetch_default": 50, "backlog_messages_max": 100_000}
    count, size = 3_000, 10_000
    async with (
        embedded(limits=limits, data_dir=tmp_path / "d", sync=False) as (broker, port),
        narrow(port) as stalled,
        dialled(port) as sender,
        dialled(port) as other,
    ):
        await stalled.do("SUBSCRIBE", "id:1", f"destination:{destination}", "ack:auto")
        await other.do("SUBSCRIBE", "id:1", f"destination:{destination}", "ack:auto")
        received = 0

        async def produce() -> None:
            for at in range(0, count, 100):
                await sender.send(sends(100, destination, "persistent:false", size=size))
                await sender.frames(100)
                assert broker.statistics().memory_bytes < 12_000_000, at

        async def consume() -> None:
            nonlocal received
            while True:
                await other.frame()
                received += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(consume)
            await produce()
            await wait_all_tasks_blocked(QUIET)
            nursery.cancel_scope.cancel()
        rows = [row for row in broker.statistics().destinations if row.name == "a"]
        assert max(row.outstanding for row in rows) <= 50
        if destination == "/topic/a":
            assert received == count
        else:
            given = sum(row.outstanding for row in rows)
            taken_by_kernel = count - received - given
            assert rows[0].depth == given  # nothing else waits
            assert taken_by_kernel * size < 10_000_000  # what a socket's buffers hold
        await sender.do("SEND", "destination:/queue/b")


async def test_a_peer_that_reads_no_receipts_is_not_read_any_more():
    """Its outbox stays bounded; the sends that were read are stored; others are served."""
    async with embedded(limits={"outbox_bytes_max": 50_000}) as (broker, port), narrow(port) as stalled:
        receipt = "r" * 10_000
        one = frame("SEND", "destination:/queue/a", f"receipt:{receipt}", "persistent:false")
        with trio.move_on_after(1.5) as scope:
            for _ in range(3_000):
                await stalled.stream.send_all(one)
        assert scope.cancelled_caught, "all 30 MB went in"
        depth = queue_row(broker, "a").depth
        await wait_all_tasks_blocked(QUIET)
        assert queue_row(broker, "a").depth == depth < 3_000
        async with dialled(port) as other:
            await other.do("SEND", "destination:/queue/b")


# ---- many


async def test_two_hundred_connections_at_once(tmp_path: Path):
    async with embedded(data_dir=tmp_path / "d") as (broker, port), trio.open_nursery() as nursery:
        present = 0
        everybody = trio.Event()

        async def one(number: int) -> None:
            nonlocal present
            async with dialled(port, ("1.0", "1.1", "1.2")[number % 3]) as peer:
                await peer.do("SUBSCRIBE", "id:1", f"destination:/queue/q{number}", "ack:client")
                await peer.do("SUBSCRIBE", "id:2", "destination:/topic/all")
                present += 1
                if present == 200:
                    assert broker.statistics().connections == 200
                    everybody.set()
                await everybody.wait()
                await peer.send(frame("SEND", f"destination:/queue/q{(number + 1) % 200}", body=b"%d" % number))
                assert (await peer.expect("MESSAGE")).body == b"%d" % ((number - 1) % 200)

        for number in range(200):
            nursery.start_soon(one, number)
