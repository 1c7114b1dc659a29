"""The served broker byte by byte: what it answers, in which order, and how a connection ends.

The peer is `tests.support.wire`, which shares no code with the broker. Its `end` and `error` demand an orderly end of
the stream: a reset, in which the last frame may be lost, fails the test.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio
import trustme
from trio.testing import wait_all_tasks_blocked

from pybroker.broker import Broker
from tests.support.serving import embedded
from tests.support.wire import Peer, connect_frame, dialled, frame

QUIET = 0.02  # seconds in which nothing moves: then nothing is on its way any more

every_version = pytest.mark.parametrize("version", ["1.0", "1.1", "1.2"])


def depth(broker: Broker, name: str) -> int:
    return sum(row.depth for row in broker.statistics().destinations if row.kind == "queue" and row.name == name)


# ---- connecting


@pytest.mark.parametrize(
    ("accept", "spoken"),
    [
        ("1.0,1.1,1.2", "1.2"),
        ("1.2,1.0", "1.2"),
        ("1.0,1.1", "1.1"),
        ("1.1,2.0", "1.1"),
        ("1.0", "1.0"),
        (None, "1.0"),
    ],
)
@pytest.mark.parametrize("command", ["CONNECT", "STOMP"])
async def test_the_best_common_version_is_chosen(accept: str | None, spoken: str, command: str):
    async with embedded() as (_, port), dialled(port, None) as peer:
        await peer.send(frame(command, *([f"accept-version:{accept}"] if accept else []), "host:h"))
        connected = await peer.expect("CONNECTED")
        assert connected["version"] == spoken


async def test_no_common_version():
    async with embedded() as (_, port), dialled(port, None) as peer:
        await peer.send(frame("CONNECT", "accept-version:2.0,3.1", "host:h"))
        error = await peer.error("accept-version")
        assert error["version"] == "1.2,1.1,1.0"


@pytest.mark.parametrize("command", ["SEND", "SUBSCRIBE", "BEGIN", "ACK", "DISCONNECT", "MESSAGE", "NONSENSE"])
async def test_nothing_comes_before_connect(command: str):
    async with embedded() as (broker, port), dialled(port, None) as peer:
        await peer.send(frame(command, "destination:/queue/a", "id:1", "transaction:t", "receipt:r"))
        await peer.error("CONNECT")
        assert broker.statistics().destinations == ()


@every_version
async def test_a_second_connect_is_refused(version: str):
    async with embedded() as (_, port), dialled(port, version) as peer:
        await peer.send(connect_frame(version, "receipt:r"))
        error = await peer.error("connected already")
        assert error["receipt-id"] == "r"


# ---- errors

BAD_FRAMES = {
    "no destination": frame("SEND", "receipt:r"),
    "unknown prefix": frame("SEND", "destination:/elsewhere/a", "receipt:r"),
    "empty name": frame("SEND", "receipt:r", "destination:/queue/"),
    "pattern": frame("SEND", "receipt:r", "destination:/queue/a.>"),
    "priority": frame("SEND", "receipt:r", "destination:/queue/a", "priority:99"),
    "transaction": frame("SEND", "receipt:r", "destination:/queue/a", "transaction:none"),
    "wrong content-length": frame("SEND", "receipt:r", "destination:/queue/a", "content-length:2", body=b"four"),
    "no number": frame("SEND", "receipt:r", "destination:/queue/a", "content-length:x"),
    "undefined escape": frame("SEND", "receipt:r", "destination:/queue/a", "x:\\t"),
    "no colon": frame("SEND", "receipt:r", "destination:/queue/a", "nothing"),
    "no UTF-8": b"SEND\nreceipt:r\ndestination:/queue/a\nx:\xff\n\n\0",
    "subscription without id": frame("SUBSCRIBE", "receipt:r", "destination:/queue/a"),
    "ack mode": frame("SUBSCRIBE", "receipt:r", "id:1", "destination:/queue/a", "ack:sometimes"),
    "prefetch": frame("SUBSCRIBE", "receipt:r", "id:1", "destination:/queue/a", "activemq.prefetchSize:0"),
    "selector": frame("SUBSCRIBE", "receipt:r", "id:1", "destination:/queue/a", "selector:a = = 1"),
    "unknown subscription": frame("UNSUBSCRIBE", "receipt:r", "id:1"),
    "unknown delivery": frame("ACK", "receipt:r", "id:1-1"),
    "unknown delivery, of a strange form": frame("NACK", "receipt:r", "id:../../x"),
    "begin without a name": frame("BEGIN", "receipt:r"),
    "unknown commit": frame("COMMIT", "receipt:r", "transaction:none"),
    "unknown abort": frame("ABORT", "receipt:r", "transaction:none"),
    "body where none may be": frame("BEGIN", "receipt:r", "transaction:t", body=b"x"),
}


@pytest.mark.parametrize("bad", BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
async def test_an_error_has_the_receipt_id_and_ends_the_connection(bad: bytes):
    async with embedded() as (broker, port), dialled(port) as peer:
        await peer.send(frame("SEND", "destination:/queue/first", "receipt:one"))
        await peer.send(bad + frame("SEND", "destination:/queue/late", "receipt:late") * 3)
        await peer.receipt("one")
        error = await peer.error()
        assert error["receipt-id"] == "r"
        assert error["message"]
        assert error["content-type"] == "text/plain"
        assert (depth(broker, "first"), depth(broker, "late"), depth(broker, "a")) == (1, 0, 0)


@pytest.mark.parametrize("command", ["NONSENSE", "CONNECTED", "MESSAGE", "send", " SEND", "SENDX"])
async def test_unknown_commands_are_refused(command: str):
    async with embedded() as (_, port), dialled(port) as peer:
        await peer.send(frame(command, "destination:/queue/a"))
        await peer.error(command, "SEND, SUBSCRIBE")


@pytest.mark.parametrize("behind", [0, 100_000, 10_000_000])
async def test_an_error_can_be_read_although_more_was_sent_behind(behind: int):
    """Closing a socket with unread input would make the kernel throw away what the peer has not read yet."""
    async with embedded() as (_, port), dialled(port) as peer, trio.open_nursery() as nursery:
        nursery.start_soon(peer.send, frame("SEND", "destination:bad", "receipt:r") + b"x" * behind)
        await wait_all_tasks_blocked(QUIET)
        assert (await peer.error("must start with"))["receipt-id"] == "r"


async def test_an_error_over_tls_can_be_read_although_more_was_sent_behind(tmp_path: Path):
    authority, pem = trustme.CA(), tmp_path / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with embedded(listen=[f"stomp+ssl://127.0.0.1:0?cert={pem}&key={pem}"]) as (_, port):
        plain = await trio.open_tcp_stream("127.0.0.1", port)
        peer = Peer(trio.SSLStream(plain, context, server_hostname="127.0.0.1", https_compatible=True))
        await peer.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.send, frame("SEND", "destination:bad", "receipt:r") + b"x" * 500_000)
            await wait_all_tasks_blocked(QUIET)
            assert (await peer.error("must start with"))["receipt-id"] == "r"
        await peer.cut()


async def test_the_first_of_two_faults_is_the_one_that_is_told():
    """The second frame is found to be wrong before the first one is tried: both come in one packet."""
    async with embedded() as (_, port), dialled(port) as peer:
        await peer.send(frame("ACK", "id:7-7", "receipt:first") + frame("SEND", "receipt:second"))
        assert (await peer.error("outstanding"))["receipt-id"] == "first"


async def test_receipts_of_earlier_frames_come_before_an_error():
    async with embedded() as (_, port):
        for wrong in (frame("SEND", "destination:bad", "receipt:r"), b"NONSENSE\n\n\0"):
            async with dialled(port) as peer:
                sends = [frame("SEND", "destination:/queue/a", f"receipt:{number}") for number in range(50)]
                await peer.send(b"".join(sends) + wrong)
                found = await peer.end()
                assert [each.get("receipt-id") for each in found[:-1]] == [str(number) for number in range(50)]
                assert found[-1].command == "ERROR"


async def test_an_error_in_one_connection_is_nobody_elses():
    async with embedded() as (_, port), dialled(port) as good, dialled(port) as bad:
        await good.do("SUBSCRIBE", "id:1", "destination:/queue/a")
        await bad.send(b"\x80\0\0")
        await bad.error()
        await good.do("SEND", "destination:/queue/b")


# ---- framing


@every_version
async def test_a_conversation_byte_by_byte(version: str):
    conversation = (
        connect_frame(version),
        frame("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:client", "receipt:s"),
        b"\n\n",
        frame("SEND", "destination:/queue/a", "content-length:3", body=b"\0\n\0"),
        frame("SEND", "destination:/queue/a", body=b"two"),
        frame("DISCONNECT", "receipt:d"),
    )
    async with embedded() as (_, port), dialled(port, None) as peer:
        for byte in b"".join(conversation):
            await peer.send(bytes([byte]))
        found = await peer.end()
        assert [each.command for each in found] == ["CONNECTED", "RECEIPT", "MESSAGE", "MESSAGE", "RECEIPT"]
        assert [each.body for each in found[2:4]] == [b"\0\n\0", b"two"]


async def test_many_frames_in_one_packet():
    sends = b"".join(frame("SEND", "destination:/queue/a", f"n:{number}", body=b"x") for number in range(2_000))
    async with embedded() as (broker, port), dialled(port, None) as peer:
        await peer.send(connect_frame() + sends + frame("DISCONNECT", "receipt:d"))
        found = await peer.end()
        assert [each.command for each in found] == ["CONNECTED", "RECEIPT"]
        assert depth(broker, "a") == 2_000


async def test_ends_of_lines_between_frames_are_skipped():
    async with embedded() as (_, port), dialled(port, None) as peer:
        await peer.send(b"\n\r\n\n" + connect_frame() + b"\n\n\n")
        await peer.expect("CONNECTED")
        for padding in (b"\n", b"\r\n", b"\n" * 3_000):
            await peer.send(frame("SEND", "destination:/queue/a", "receipt:r") + padding)
            await peer.receipt("r")


async def test_carriage_returns_end_lines_in_1_2():
    crlf = b"SEND\r\ndestination:/queue/a\r\nx:y\r\nreceipt:r\r\ncontent-length:2\r\n\r\n\r\n\0\r\n"
    async with embedded() as (_, port), dialled(port, None) as peer:
        await peer.send(b"CONNECT\r\naccept-version:1.2\r\nhost:h\r\n\r\n\0\r\n")
        await peer.expect("CONNECTED")
        await peer.send(crlf)
        await peer.receipt("r")
        await peer.send(b"SUBSCRIBE\r\nid:1\r\ndestination:/queue/a\r\n\r\n\0")
        message = await peer.expect("MESSAGE")
        assert (message["x"], message.body) == ("y", b"\r\n")


async def test_a_carriage_return_is_part_of_a_value_in_1_1():
    async with embedded() as (_, port), dialled(port, "1.1") as peer:
        await peer.do("SEND", "destination:/queue/a", "x:y\r")
        await peer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a"))
        assert (await peer.expect("MESSAGE"))["x"] == "y\r"
    async with embedded() as (_, port), dialled(port, "1.1") as peer:
        await peer.send(b"SEND\r\ndestination:/queue/a\r\n\r\n\0")
        await peer.error("SEND\\r")


async def test_headers_keep_their_order_and_repeats_and_the_first_of_known_ones_counts():
    lines = ("zeta:1", "alpha:2", "zeta:3", "priority:7", "alpha:2", "priority:1", "empty:", "a\\cb:c\\\\d")
    async with embedded() as (_, port), dialled(port) as peer:
        await peer.do("SEND", "destination:/queue/a", "destination:/queue/b", *lines)
        await peer.send(frame("SUBSCRIBE", "id:1", "id:2", "destination:/queue/a"))
        message = await peer.expect("MESSAGE")
        assert message["subscription"] == "1"
        own = ("subscription", "redelivered", "message-id", "destination", "timestamp", "content-length")
        assert [pair for pair in message.headers if pair[0] not in own] == [
            ("zeta", "1"),
            ("alpha", "2"),
            ("zeta", "3"),
            ("priority", "7"),
            ("alpha", "2"),
            ("priority", "1"),
            ("empty", ""),
            ("a:b", "c\\d"),
        ]


async def test_headers_that_are_the_brokers_own_are_not_taken_from_senders():
    claimed = ("message-id:mine", "redelivered:true", "subscription:9", "timestamp:1", "delivery-count:5", "ack:x")
    async with embedded() as (_, port), dialled(port) as peer:
        await peer.do("SEND", "destination:/queue/a", *claimed)
        await peer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a"))
        message = await peer.expect("MESSAGE")
        assert message.all("redelivered") == ["false"]
        assert message.all("subscription") == ["1"]
        assert message["message-id"] != "mine"
        assert len(message.all("message-id")) == len(message.all("timestamp")) == 1
        assert message.get("ack") is message.get("delivery-count") is None


@every_version
async def test_receipt_ids_come_back_as_they_went(version: str):
    plain = ["77", "with space in it", "ünïcode"]
    escaped = [] if version == "1.0" else ["a\\cb", "line\\nfeed", "back\\\\slash"]
    async with embedded() as (_, port), dialled(port, version) as peer:
        for receipt in plain + escaped:
            await peer.send(frame("SEND", "destination:/queue/a", f"receipt:{receipt}"))
            found = await peer.expect("RECEIPT")
            assert found.raw == f"RECEIPT\nreceipt-id:{receipt}\n\n\0".encode()


async def test_every_frame_can_ask_for_a_receipt():
    async with embedded() as (_, port), dialled(port) as peer:
        await peer.do("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:client-individual")
        await peer.do("BEGIN", "transaction:t")
        await peer.do("SEND", "destination:/queue/a", "transaction:t")
        await peer.send(frame("COMMIT", "transaction:t", "receipt:c"))
        found = sorted(await peer.frames(2), key=lambda each: each.command)
        assert [each.command for each in found] == ["MESSAGE", "RECEIPT"]
        await peer.do("BEGIN", "transaction:t")  # the name is free again
        await peer.do("ACK", f"id:{found[0]['ack']}", "transaction:t")
        await peer.send(frame("ABORT", "transaction:t", "receipt:a"))
        found = sorted(await peer.frames(2), key=lambda each: each.command)
        assert [each.command for each in found] == ["MESSAGE", "RECEIPT"]
        await peer.do("ACK", f"id:{found[0]['ack']}")
        await peer.do("UNSUBSCRIBE", "id:1")
        await peer.do("DISCONNECT")
        assert await peer.end() == []
