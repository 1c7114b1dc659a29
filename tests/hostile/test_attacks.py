"""Named attacks, each against a whole broker: it ends or is borne, leaves nothing behind, and others are served meanwhile."""

from __future__ import annotations

import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgpack
import pytest
import trio

from tests.hostile import native_pieces
from tests.hostile.arena import Arena, arena, on_virtual_time
from tests.hostile.stomp_pieces import CONNECTS, CRONS, NUMBERS, SELECTORS
from tests.native import peer as wire
from tests.support.wire import Peer, frame

CONNECT = CONNECTS[0]
HELLO = wire.pack([wire.HELLO, "pybroker", [1], {}])
MEGABYTE = 1024 * 1024
QUICK = 2.0  # seconds of real time; what they are about would take minutes, or never end


def story(action: Callable[[Arena], Awaitable[None]], **overrides: Any) -> None:
    async def run() -> None:
        async with arena(**overrides) as it:
            await action(it)
            await it.check()

    on_virtual_time(run)


def refused(answers: bytes, *words: str) -> None:
    """The connection ended with one ERROR that says so."""
    assert answers.count(b"ERROR\n") == 1, answers[-500:]
    for word in words:
        assert word.encode() in answers, answers[-500:]


# ---- slow peers


@pytest.mark.parametrize("native", [False, True], ids=["stomp", "native"])
def test_a_byte_now_and_then_before_the_first_frame_is_given_its_time_and_no_more(native: bool):
    async def action(it: Arena) -> None:
        started = trio.current_time()
        async with it.stream(native=native) as stream:
            with pytest.raises(trio.BrokenResourceError):  # noqa: PT012  (it is cut off at some time)
                for byte in itertools.cycle(b"\0\0\1\0" + bytes(60) if native else b"CONNECT\na:"):
                    await stream.send_all(bytes([byte]))
                    await it.serve()
                    await trio.sleep(1)
                    assert trio.current_time() - started < 20
            assert b"connect_timeout" in await stream.receive_some(65_536)

    story(action)


@pytest.mark.parametrize("native", [False, True], ids=["stomp", "native"])
def test_a_byte_now_and_then_inside_a_frame_holds_up_nobody(native: bool):
    whole = (
        wire.pack([wire.SEND, 1, [wire.row(b"x")]]) if native else frame("SEND", "destination:/queue/a", "receipt:r")
    )

    async def action(it: Arena) -> None:
        async with it.stream(native=native) as stream:
            await stream.send_all(HELLO if native else CONNECT)
            for byte in whole:
                await stream.send_all(bytes([byte]))
                await trio.sleep(10)
                await it.check(gone=False)
            assert it.core.by_destination["/queue/a"].depth == 1

    story(action)


@pytest.mark.parametrize("native", [False, True], ids=["stomp", "native"])
def test_a_consumer_that_never_reads_holds_its_outbox_and_no_more(native: bool):
    async def action(it: Arena) -> None:
        async with it.broker.connect() as sender, it.stream(native=native, lockstep=True) as stream:
            if native:
                await stream.send_all(HELLO)
                await stream.receive_some(65_536)
                await stream.send_all(wire.pack([wire.SUBSCRIBE, 7, 1, "/queue/a", "auto", 30_000, ""]))
            else:
                await stream.send_all(CONNECT)
                await stream.receive_some(65_536)
                await stream.send_all(frame("SUBSCRIBE", "id:1", "destination:/queue/a", "activemq.prefetchSize:30000"))
            for _ in range(30):
                async with sender.publisher() as publisher:
                    await publisher.send_many([("/queue/a", bytes(1_000))] * 200)
                await it.check(gone=False)
            (attacker,) = [each for each in it.broker._server._connections if each._stream is not it.witness]
            waiting = attacker._outbox.size if native else attacker._outbox_bytes
            del attacker  # or it would not be gone
            assert 500_000 < waiting < 2 * MEGABYTE
        await it.check()
        assert it.core.by_destination["/queue/a"].depth == 6_000

    story(action)


def test_who_asks_for_receipts_and_never_reads_them_is_not_read_either():
    async def action(it: Arena) -> None:
        async with it.stream(lockstep=True) as stream:
            await stream.send_all(CONNECT)
            await stream.receive_some(65_536)
            taken = 0
            with trio.move_on_after(30):
                while True:
                    await stream.send_all(frame("SEND", "destination:/topic/nobody", "receipt:" + "r" * 15_000))
                    taken += 1
            assert 50 < taken < 200
            await it.check(gone=False)

    story(action)


# ---- large numbers of things


@pytest.mark.parametrize("length", ["10737418240", "9" * 17, "9" * 400])
def test_a_body_of_ten_gigabytes_is_refused_before_it_comes(length: str):
    async def action(it: Arena) -> None:
        answers = await it.attack(
            [CONNECT, f"SEND\ndestination:/queue/a\ncontent-length:{length}\n\n".encode(), b"x" * 9]
        )
        refused(answers, "limit stomp.body_bytes_max")

    story(action)


def test_a_hundred_thousand_headers():
    async def action(it: Arena) -> None:
        for line in (b"a:b\n", b"a:\n", b"destination:/queue/a\n", b"content-length:0\n", b"receipt:1\n"):
            began = time.monotonic()
            answers = await it.attack([CONNECT, b"SEND\n" + line * 100_000 + b"\n\0"])
            refused(answers, "limit stomp.header_")
            assert time.monotonic() - began < QUICK
        assert "/queue/a" not in it.core.by_destination

    story(action)


@pytest.mark.parametrize(
    "destination", ["/queue/a{}", "/queue/same", "/topic/a", "/topic/a{}.>", "/temp-queue/a{}", "/temp-topic/a"]
)
def test_subscriptions_without_end(destination: str):
    count = 50_000  # a million are refused at the same place
    frames = b"".join(
        frame("SUBSCRIBE", f"id:{number}", f"destination:{destination.format(number)}") for number in range(count)
    )

    async def action(it: Arena) -> None:
        refused(await it.attack([CONNECT, frames]), "_max is 1000")
        left = [queue for queue in it.core.queues.values() if queue.consumers]
        assert len(left) == 1, "the well-behaved client's"

    story(action)


def test_temporary_destinations_without_end_over_the_native_protocol():
    frames = [[native_pieces.CREATE, 7, "remote-temp-queue", f"secret-0123456789-{number}"] for number in range(1_500)]

    async def action(it: Arena) -> None:
        answers = await it.attack([HELLO, wire.pack(*frames)], native=True)
        assert answers.count(b"limits.temporary_destinations_max") == 500
        assert len(it.core.queues) == 1

    story(action)


def test_a_transaction_without_end():
    send = frame("SEND", "destination:/queue/a", "transaction:t", body=bytes(10).replace(b"\0", b"x"))

    async def action(it: Arena) -> None:
        began = frame("BEGIN", "transaction:t")
        refused(await it.attack([CONNECT, began, send * 11_000]), "limit limits.transaction_messages_max is 10000")
        large = frame("SEND", "destination:/queue/a", "transaction:t", body=b"x" * MEGABYTE)
        refused(await it.attack([CONNECT, began, *[large] * 70]), "limit limits.transaction_bytes_max")
        many = b"".join(frame("BEGIN", f"transaction:{number}") for number in range(1_000))
        refused(await it.attack([CONNECT, many]), "limit limits.transactions_max is 100")
        await it.check()
        assert it.core.memory_bytes == 0

    story(action)


def test_who_connects_again_and_again_leaves_nothing():
    async def action(it: Arena) -> None:
        for number in range(200):
            native = number % 2 == 1
            async with it.stream(native=native) as stream:
                await stream.send_all(HELLO if native else CONNECT + frame("SUBSCRIBE", "id:1", "destination:/queue/a"))
        await it.check()
        assert not it.broker._server.beating

    story(action)


@pytest.mark.parametrize("parts", [3, 60, 10_000])
def test_a_destination_of_many(parts: int):
    """Within the limits of a name it is a composite, where there are such; beyond it is refused, and nothing is made."""
    text = ",".join(f"/queue/{number}" for number in range(parts))

    async def action(it: Arena) -> None:
        answers = await it.attack([CONNECT, frame("SEND", f"destination:{text}", "receipt:r")])
        if parts == 10_000:
            refused(answers)
            assert len(it.core.queues) == 1
        else:
            assert b"ERROR" not in answers
            assert b"RECEIPT" in answers
            assert len(it.core.queues) == 1 + parts  # the witness has one

    story(action)


@pytest.mark.parametrize("native", [False, True], ids=["stomp", "native"])
def test_many_browsers_that_never_read(native: bool):
    """So many pages at a time as one connection may, and no more than an outbox has room for."""

    async def action(it: Arena) -> None:
        async with it.broker.connect() as client:
            for _ in range(10):
                await client.send("/queue/b", bytes(1_000))
        before = set(it.broker._server._connections)
        async with it.stream(native=native, lockstep=True) as stream:
            if native:
                rows = [[wire.BROWSE, number, "/queue/b", "", 0, []] for number in range(1, 200)]
                data = HELLO + wire.pack(*rows)
            else:
                many = [frame("SUBSCRIBE", f"id:{n}", "destination:/queue/b", "browser:true") for n in range(200)]
                data = CONNECT + b"".join(many)
            with trio.move_on_after(5):
                await stream.send_all(data)
            (connection,) = set(it.broker._server._connections) - before
            for _ in range(100):
                await trio.sleep(0.01)
                size = connection._outbox.size if native else connection._outbox_bytes  # type: ignore[union-attr]
                assert size <= 20_000 + 3 * 4_000
            await it.check(gone=False)

    limits = {"outbox_bytes_max": 20_000, "browse_bytes_max": 2_000, "browse_pages_max": 3}
    story(action, limits=limits)


# ---- values

NUMERIC = ["content-length", "priority", "expires", "producer-sequence", "AMQ_SCHEDULED_DELAY", "AMQ_SCHEDULED_PERIOD",
           "AMQ_SCHEDULED_REPEAT", "JMSXGroupSeq", "timestamp"]  # fmt: skip
NUMERIC_OF_SUBSCRIBE = ["activemq.prefetchSize", "prefetch-count", "activemq.priority"]


@pytest.mark.parametrize("name", NUMERIC + NUMERIC_OF_SUBSCRIBE + ["heart-beat"])
def test_numbers_that_are_none_and_numbers_that_are_too_large(name: str):
    async def action(it: Arena) -> None:
        for value in NUMBERS:
            start = CONNECT
            if name == "heart-beat":
                start = frame("CONNECT", "accept-version:1.2", f"heart-beat:{value},{value}")
                asked = frame("SEND", "destination:/queue/a", "receipt:done")
            elif name in NUMERIC:
                more = ["producer-id:p"] if name == "producer-sequence" else []
                asked = frame("SEND", "destination:/queue/a", *more, f"{name}:{value}", "receipt:done")
            else:
                asked = frame("SUBSCRIBE", "destination:/queue/b", "id:1", f"{name}:{value}", "receipt:done")
            answers = await it.attack([start, asked])
            if not value.isascii() or not value.lstrip("-+").strip().isdigit():
                allowed = name in ("JMSXGroupSeq", "timestamp") or (value == "" and name == "activemq.priority")
                assert allowed or b"ERROR" in answers, (value, answers)
            assert answers.count(b"ERROR\n") + answers.count(b"receipt-id:done\n") <= 2
            await it.serve()

    story(action)


def test_bytes_that_are_no_text():
    bad = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\xaf", b"a\x80b"]

    async def action(it: Arena) -> None:
        for text in bad:
            for data in (
                b"SEND\ndestination:/queue/" + text + b"\n\n\0",
                b"SEND\ndestination:/queue/a\n" + text + b":a\n\n\0",
                b"SEND\ndestination:/queue/a\nreceipt:" + text + b"\n\n\0",
                b"SEND" + text + b"\n\n\0",
                b"SUBSCRIBE\ndestination:/queue/a\nid:" + text + b"\n\n\0",
                b"BEGIN\ntransaction:" + text + b"\n\n\0",
                b"ACK\nid:" + text + b"\n\n\0",
            ):
                refused(await it.attack([CONNECT, data]))
            refused(await it.attack([b"CONNECT\nlogin:" + text + b"\n\n\0"]))
        assert len(it.core.queues) == 1

    story(action)


def test_every_byte_in_a_destination():
    """One octet of each value, as it is, in a name: the name is taken as it is, or refused."""

    async def action(it: Arena) -> None:
        taken = set()
        for octet in range(256):
            answers = await it.attack([CONNECT, b"SEND\ndestination:/queue/x" + bytes([octet]) + b"x\nreceipt:r\n\n\0"])
            if b"RECEIPT" in answers:
                taken.add(octet)
            else:
                refused(answers)
        names = {queue.name for queue in it.core.queues.values()}
        assert ord(",") in taken, "it divides a composite"
        assert names - {"witness"} == {f"x{chr(octet)}x" for octet in taken} - {"x,x"} | {"x"}
        assert taken <= set(range(32, 127)), sorted(taken)

    story(action)


@pytest.mark.parametrize("size", [1_025, 64 * 1024 - 30, 64 * 1024])
def test_a_destination_of_64_kilobytes(size: int):
    async def action(it: Arena) -> None:
        for limits in (
            "/queue/" + "a" * size,
            "/queue/" + "a." * (size // 2) + "a",
            "/topic/" + "*." * (size // 2) + "*",
        ):
            for asked in (frame("SEND", f"destination:{limits}"), frame("SUBSCRIBE", f"destination:{limits}", "id:1")):
                answers = await it.attack([CONNECT, asked])
                refused(answers)
                assert len(answers) < 2_000, "what is refused is not repeated"
        answers = await it.attack(
            [HELLO, wire.pack([wire.SEND, 1, [wire.row(b"", "/queue/" + "a" * size)]])], native=True
        )
        assert len(answers) < 2_000
        assert len(it.core.queues) == 1

    story(action)


def test_acknowledgements_of_nothing():
    ids = ["1-1", "1-0", "1--1", "1-99999999999999999999", "1-1_0", "zz-1", "-", "1-", "1-٣", "x" * 10_000, "\\c"]

    async def action(it: Arena) -> None:
        subscribe = frame("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:client-individual")
        for command, each in itertools.product(("ACK", "NACK"), ids):
            answers = await it.attack([CONNECT, subscribe, frame(command, f"id:{each}")])
            refused(answers, "code:unknown-delivery")
            assert len(answers) < 3_000, "what is refused is not repeated"

    story(action)


def test_ranges_of_tags_that_nobody_was_given():
    async def action(it: Arena) -> None:
        began = time.monotonic()
        subscribe = [wire.SUBSCRIBE, 7, 1, "/queue/a", "individual", 0, ""]
        for ranges in ([1, 2**63 - 1], [2**32, 2**62], [0, 0], [1, 1, 1, 1], [5, 1], []):
            for kind in (wire.ACK, wire.NACK):
                await it.attack([HELLO, wire.pack(subscribe, [kind, 0, 1, ranges])], native=True)
            await it.attack([HELLO, wire.pack(subscribe, [wire.COMMIT, 1, [], [[1, ranges]], []])], native=True)
        assert time.monotonic() - began < QUICK

    story(action)


def test_schedules_that_never_end_or_never_begin():
    """(A period of a millisecond without end is what it says; on virtual time it would be all that happens.)"""
    crons = [*CRONS, "* " * 5_000, "1," * 120 + "1 * * * *", "* * * * *" + "\\n" * 9]
    more: list[list[str]] = [
        [],
        ["AMQ_SCHEDULED_REPEAT:-1", "AMQ_SCHEDULED_PERIOD:1"],
        ["AMQ_SCHEDULED_REPEAT:2147483648"],
    ]
    asked = [[f"AMQ_SCHEDULED_CRON:{cron}", *each] for cron, each in itertools.product(crons, more)]
    times = itertools.product(("0", "60000", "-1", "9" * 15), ("0", "60000", "9" * 15), ("0", "-1", "2147483648"))
    asked += [
        [f"AMQ_SCHEDULED_DELAY:{delay}", f"AMQ_SCHEDULED_PERIOD:{period}", f"AMQ_SCHEDULED_REPEAT:{repeat}"]
        for delay, period, repeat in times
    ]

    async def action(it: Arena) -> None:
        for headers in asked:
            await it.attack([CONNECT, frame("SEND", "destination:/topic/nobody", *headers)])

    story(action)


@pytest.mark.parametrize("native", [False, True], ids=["stomp", "native"])
def test_selectors_built_to_blow_up(native: bool):
    async def action(it: Arena) -> None:
        for selector in [*SELECTORS, "x" * 15_000, "a" + "+a" * 2_000 + "=1", "-" * 4_000 + "1=1", "'" + "''" * 2_000]:
            began = time.monotonic()
            if native:
                options = {"selector": selector}
                subscribe = wire.pack([wire.SUBSCRIBE, 7, 1, "/topic/a", "auto", 0, "", options])
                await it.attack([HELLO, subscribe, wire.pack([wire.SEND, 1, wire.rows(9, "/topic/a")])], native=True)
            else:
                subscribe = frame("SUBSCRIBE", "id:1", "destination:/topic/a", f"selector:{selector}")
                await it.attack([CONNECT, subscribe, frame("SEND", "destination:/topic/a", "a:" + "a" * 9_000) * 9])
            assert time.monotonic() - began < QUICK, selector[:80]

    story(action)


def test_frames_of_nothing_but_nesting_are_refused():
    async def action(it: Arena) -> None:
        for payload in (
            b"\x91" * 60_000,
            b"\x81\xa0" * 30_000,
            msgpack.packb([wire.HELLO, "pybroker", [1] * 60_000, {}]),
        ):
            await it.attack([len(payload).to_bytes(4, "big") + payload], native=True)

    story(action)


def test_the_broker_is_what_it_was_after_all_that():
    """The checks of these tests see a connection that stays."""

    async def run() -> None:
        async with arena() as it, it.stream() as stream:
            await Peer(stream).open()
            with pytest.raises(AssertionError, match="still there"):
                await it.check()

    on_virtual_time(run)
