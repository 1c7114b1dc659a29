"""Every named limit that a peer can pass: it gets an ERROR that names it, and others are served on."""

from __future__ import annotations

import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.serving import embedded
from tests.support.wire import Peer, connect_frame, dialled, frame

QUIET = 0.02


def send(*headers: str, body: bytes = b"") -> bytes:
    return frame("SEND", "receipt:r", "destination:/queue/a", *headers, body=body)


FRAME_LIMITS = {  # the limit, its value, a frame that just keeps it, and one that passes it
    "command_bytes_max": (64, send(), b"S" * 65 + b"\nreceipt:r\n\n\0"),
    "header_count_max": (5, send("a:1", "b:2", "c:3"), send("a:1", "b:2", "c:3", "d:4")),
    "header_bytes_max": (100, send("x:" + "y" * 98), send("x:" + "y" * 99)),
    "header_block_bytes_max": (200, send(*["x:" + "y" * 60] * 2), send(*["x:" + "y" * 60] * 4)),
    "body_bytes_max": (1_000, send(body=b"b" * 1_000), send(body=b"b" * 1_001)),
}


@pytest.mark.parametrize("limit", FRAME_LIMITS)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "byte by byte"])
async def test_limits_of_a_frame(limit: str, whole: bool):
    value, good, bad = FRAME_LIMITS[limit]
    async with embedded(stomp={limit: value}) as (_, port), dialled(port) as peer, dialled(port) as other:
        await peer.send(good)
        await peer.receipt("r")
        async with trio.open_nursery() as nursery:
            if whole:
                nursery.start_soon(peer.send, bad)
            else:
                nursery.start_soon(trickle, peer, bad)
            error = await peer.error(f"stomp.{limit} is {value}")
            nursery.cancel_scope.cancel()
        assert error["code"] == "limit"
        await other.do("SEND", "destination:/queue/b")


async def trickle(peer: Peer, data: bytes) -> None:
    for byte in data:
        try:
            await peer.send(bytes([byte]))
        except trio.BrokenResourceError:
            return  # the broker has seen enough


async def test_a_declared_length_is_refused_before_the_body_comes():
    async with embedded(stomp={"body_bytes_max": 1_000}) as (_, port), dialled(port) as peer:
        await peer.send(b"SEND\nreceipt:r\ndestination:/queue/a\ncontent-length:1001\n\n")
        assert (await peer.error("stomp.body_bytes_max is 1000"))["receipt-id"] == "r"


async def test_a_frame_without_end_is_refused_at_its_limit():
    """Neither the end of a line, nor of the headers, nor of the body ever comes."""
    limits = {"header_bytes_max": 1_000, "header_block_bytes_max": 5_000, "body_bytes_max": 10_000}
    endless = {
        "stomp.command_bytes_max": b"S" * 100_000,
        "stomp.header_bytes_max": b"SEND\nx:" + b"y" * 100_000,
        "stomp.header_block_bytes_max": b"SEND\n" + b"x:y\n" * 20_000,
        "stomp.body_bytes_max": b"SEND\ndestination:/queue/a\n\n" + b"b" * 100_000,
    }
    for limit, data in endless.items():
        async with embedded(stomp={**limits, "header_count_max": 50_000}) as (_, port), dialled(port) as peer:
            await peer.send(data)
            await peer.error(limit)


@pytest.mark.parametrize("bad", [b"C" * 1_000, b"CONNECT\nlogin:" + b"x" * 100_000 + b"\n\n\0"])
async def test_limits_hold_before_connect_too(bad: bytes):
    async with embedded() as (_, port), dialled(port, None) as peer:
        await peer.send(bad)
        await peer.error("limit stomp.")


@pytest.mark.parametrize("pieces", [[], [b"CONNECT\nacc"], [bytes([byte]) for byte in b"CONNECT\n" * 12]])
async def test_connect_has_its_time(pieces: list[bytes]):
    """Also for one who sends a byte now and then (a slow loris); others are served meanwhile."""
    async with embedded(stomp={"connect_timeout": 0.3}) as (_, port), dialled(port) as other:
        started = trio.current_time()
        async with dialled(port, None) as peer, trio.open_nursery() as nursery:

            async def drip() -> None:
                for piece in pieces:
                    await peer.send(piece)
                    await trio.sleep(0.02)

            nursery.start_soon(drip)
            await other.do("SEND", "destination:/queue/a")
            await peer.error("stomp.connect_timeout is 0.3 seconds")
            nursery.cancel_scope.cancel()
        assert trio.current_time() - started < 2
        await other.do("SEND", "destination:/queue/a")  # for it the time is over long ago, and no matter


async def test_connections_have_a_limit():
    async with embedded(limits={"connections_max": 2}) as (broker, port), dialled(port) as one:
        async with dialled(port):
            for said in (b"", connect_frame()):
                # What it said before it was refused, and what nobody read, must not reset the connection.
                plain = socket.create_connection(("127.0.0.1", port))
                plain.sendall(said)
                plain.setblocking(False)
                third = Peer(trio.SocketStream(trio.socket.from_stdlib_socket(plain)))
                await wait_all_tasks_blocked(QUIET)
                await third.error("limits.connections_max is 2")
                await third.cut()
            await one.do("SEND", "destination:/queue/a")
            assert broker.statistics().connections_refused == 2
        await wait_all_tasks_blocked(QUIET)
        async with dialled(port) as another:
            await another.do("SEND", "destination:/queue/a")


async def test_subscriptions_of_a_connection_have_a_limit():
    async with embedded(limits={"subscriptions_max": 3}) as (_, port), dialled(port) as peer, dialled(port) as other:
        for number in range(3):
            await peer.do("SUBSCRIBE", f"id:{number}", f"destination:/queue/{number}")
        await peer.do("UNSUBSCRIBE", "id:1")
        await peer.do("SUBSCRIBE", "id:1", "destination:/topic/x")
        await other.do("SUBSCRIBE", "id:9", "destination:/queue/9")
        await peer.send(frame("SUBSCRIBE", "id:3", "destination:/queue/3", "receipt:r"))
        assert (await peer.error("limits.subscriptions_max is 3"))["receipt-id"] == "r"


async def test_transactions_of_a_connection_have_a_limit():
    async with embedded(limits={"transactions_max": 2}) as (_, port), dialled(port) as peer:
        await peer.do("BEGIN", "transaction:1")
        await peer.do("BEGIN", "transaction:2")
        await peer.do("COMMIT", "transaction:1")
        await peer.do("BEGIN", "transaction:3")
        await peer.send(frame("BEGIN", "transaction:4", "receipt:r"))
        assert (await peer.error("limits.transactions_max is 2"))["receipt-id"] == "r"


@pytest.mark.parametrize("what", ["sends", "acknowledgements"])
async def test_messages_of_a_transaction_have_a_limit(what: str):
    async with embedded(limits={"transaction_messages_max": 3}) as (_, port), dialled(port) as peer:
        await peer.do("BEGIN", "transaction:t")
        if what == "sends":
            acts = [frame("SEND", "destination:/queue/a", "transaction:t", "receipt:r")] * 4
        else:
            for _ in range(4):
                await peer.do("SEND", "destination:/queue/a")
            await peer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:client-individual"))
            ids = [message["ack"] for message in await peer.frames(4)]
            acts = [frame("ACK", f"id:{one}", "transaction:t", "receipt:r") for one in ids]
        for act in acts[:3]:
            await peer.send(act)
            await peer.receipt("r")
        await peer.send(acts[3])
        assert (await peer.error("limits.transaction_messages_max is 3"))["receipt-id"] == "r"


async def test_bytes_of_a_transaction_have_a_limit():
    async with embedded(limits={"transaction_bytes_max": 10_000}) as (_, port), dialled(port) as peer:
        await peer.do("BEGIN", "transaction:t")
        for _ in range(3):
            await peer.do("SEND", "destination:/queue/a", "transaction:t", body=b"x" * 3_000)
        await peer.send(frame("SEND", "destination:/queue/a", "transaction:t", "receipt:r", body=b"x" * 3_000))
        assert (await peer.error("limits.transaction_bytes_max is 10000"))["receipt-id"] == "r"


async def test_destinations_have_a_limit():
    async with embedded(limits={"destinations_max": 3}) as (_, port), dialled(port) as peer:
        for number in range(3):
            await peer.do("SEND", f"destination:/queue/{number}")
        await peer.do("SEND", "destination:/queue/1")
        await peer.send(frame("SEND", "destination:/queue/3", "receipt:r"))
        assert (await peer.error("limits.destinations_max is 3"))["receipt-id"] == "r"


async def test_a_prefetch_beyond_the_limit_is_cut_to_it():
    async with embedded(limits={"prefetch_max": 3, "prefetch_default": 2}) as (_, port), dialled(port) as peer:
        for _ in range(5):
            await peer.do("SEND", "destination:/queue/a")
        await peer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:client", "activemq.prefetchSize:1000"))
        await peer.frames(3)
        with trio.move_on_after(QUIET) as scope:
            await peer.frame()
        assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("name", "words"),
    [("a" * 1_025, "longer than 1024 bytes"), (".".join("a" * 65), "more than 64 parts"), ("a,", "empty")],
)
async def test_names_have_limits(name: str, words: str):
    async with embedded() as (_, port), dialled(port) as peer:
        await peer.send(frame("SEND", f"destination:/queue/{name}"))
        await peer.error(words)


async def test_a_topic_subscriber_that_is_too_far_behind_is_told_so():
    async with (
        embedded(limits={"backlog_messages_max": 20}) as (_, port),
        dialled(port) as slow,
        dialled(port) as sender,
    ):
        await slow.do("SUBSCRIBE", "id:1", "destination:/topic/a", "ack:client", "activemq.prefetchSize:1")
        for _ in range(30):
            await sender.do("SEND", "destination:/topic/a")
        await slow.expect("MESSAGE")
        await slow.error("limits.backlog_messages_max")
        await sender.do("SEND", "destination:/topic/a")
