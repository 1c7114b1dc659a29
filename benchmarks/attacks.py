"""Clients that mean harm, and a busy one that means none: a process of its own that goes on until it is ended.

``python -m benchmarks.attacks NAME --url URL``; prints ``attacking`` when all its connections have been made once. The pieces
that an attack is made of are those of the tests in ``tests/hostile``. A connection that the broker ends is made again at once.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import trio
from tests.hostile import native_pieces
from tests.hostile.stomp_pieces import CONNECTS, CRONS, SELECTORS, one_frame
from tests.native import peer as native
from tests.support.wire import frame

CONNECT = CONNECTS[0]
HELLO = native.pack([native.HELLO, "pybroker", [1], {}])
READ_BYTES = 65_536
FLOOD_FRAMES = 1_000  # of one piece that is sent again and again
PAUSE = 0.5  # seconds between the bytes of a slow client
NEIGHBOUR = "/topic/benchmark-neighbour"  # nobody listens
THEIRS = "/topic/benchmark-attack"
KEPT = "/queue/benchmark-attack"
PIECES_MAX = 200  # different ones of a flood of random frames

Pieces = Iterator[bytes | float]  # a number is a pause in seconds


@dataclass(frozen=True, slots=True)
class Attack:
    """What one client does, over so many connections at once.

    pieces  what the connection of that number sends, once
    reads   what comes back is read
    """

    pieces: Callable[[int], Pieces]
    connections: int = 1
    reads: bool = True


def forever(*pieces: bytes) -> Callable[[int], Pieces]:
    """The first piece, then the others over and over again."""
    return lambda _: itertools.chain(pieces[:1], itertools.cycle(pieces[1:]))


def once(*pieces: bytes) -> Callable[[int], Pieces]:
    """These pieces, then the connection is made anew."""
    return lambda _: iter(pieces)


def in_turn(start: bytes, choices: list[bytes]) -> Callable[[int], Pieces]:
    """For each new connection the next one of these pieces."""
    turn = itertools.cycle(choices)

    def pieces(_: int) -> Pieces:
        yield start
        yield next(turn)

    return pieces


def slowly(data: bytes) -> Callable[[int], Pieces]:
    """A byte now and then."""

    def pieces(_: int) -> Pieces:
        for byte in data:
            yield bytes([byte])
            yield PAUSE

    return pieces


def consumer_and_sender(consumer: bytes, *sender: bytes) -> Callable[[int], Pieces]:
    """Connection 0 subscribes, and waits; the others send over and over again."""

    def pieces(number: int) -> Pieces:
        if number:
            yield from forever(*sender)(number)
        else:
            yield consumer
            yield float("inf")

    return pieces


def filled(fill: bytes, then: bytes) -> Callable[[int], Pieces]:
    """Something is sent by the first connection, once; then each does the other thing, and waits."""
    first = iter([True])

    def pieces(_: int) -> Pieces:
        if next(first, False):
            yield fill
            yield 1.0
        yield then
        yield float("inf")

    return pieces


def flood(command: str, *headers: str, body: bytes = b"") -> bytes:
    """Many frames, each with its number in the place of ``{}``."""
    return b"".join(
        frame(command, *(header.replace("{}", str(number)) for header in headers), body=body)
        for number in range(FLOOD_FRAMES)
    )


def _stomp() -> dict[str, Attack]:
    to = f"destination:{THEIRS}"
    receipts = flood("SEND", f"destination:{NEIGHBOUR}", body=b"x" * 256) + frame(
        "SEND", f"destination:{NEIGHBOUR}", "receipt:r"
    )
    kept = flood("SEND", f"destination:{KEPT}", "persistent:true", body=b"x" * 256) + frame(
        "SEND", f"destination:{KEPT}", "persistent:true", "receipt:r"
    )
    line = b"a:" + b"b" * 60 + b"\n"
    selectors = [frame("SUBSCRIBE", "id:1", to, f"selector:{each}") for each in SELECTORS]
    slow = "a LIKE '%" + "a%" * 60 + "b'"
    long = "/queue/" + "a" * 65_000
    crons = b"".join(frame("SEND", to, f"AMQ_SCHEDULED_CRON:{each}", "receipt:r") for each in CRONS[:4] * 50)
    browse = flood("SUBSCRIBE", "id:{}", f"destination:{KEPT}", "browser:true")
    return {
        "neighbour": Attack(forever(CONNECT, receipts)),
        "durable neighbour": Attack(forever(CONNECT, kept)),
        "slow-loris": Attack(slowly(CONNECT), 200),
        "a body of 10 GB": Attack(
            once(CONNECT, b"SEND\n%b\ncontent-length:10737418240\n\n" % to.encode(), b"x" * 65_536)
        ),
        "a body without end": Attack(forever(CONNECT + f"SEND\n{to}\n\n".encode(), b"x" * 65_536)),
        "100,000 headers": Attack(once(CONNECT, b"SEND\n" + line * 100_000)),
        "subscriptions without end": Attack(forever(CONNECT, flood("SUBSCRIBE", "id:{}", f"{to}.{{}}"))),
        "wildcard subscriptions without end": Attack(forever(CONNECT, flood("SUBSCRIBE", "id:{}", f"{to}.*.{{}}.>"))),
        "a transaction without end": Attack(
            forever(CONNECT + frame("BEGIN", "transaction:t"), flood("SEND", to, "transaction:t", body=b"x" * 256))
        ),
        "a reader that never reads": Attack(
            consumer_and_sender(
                CONNECT + frame("SUBSCRIBE", "id:1", to), CONNECT, flood("SEND", to, body=b"x" * 4_000)
            ),
            2,
            reads=False,
        ),
        "receipts that are never read": Attack(
            forever(CONNECT, flood("SEND", to, "receipt:{}" + "r" * 500)), reads=False
        ),
        "selectors that are refused": Attack(in_turn(CONNECT, selectors)),
        "selectors that are slow": Attack(
            consumer_and_sender(
                CONNECT + b"".join(frame("SUBSCRIBE", f"id:{n}", to, f"selector:{slow}") for n in range(100)),
                CONNECT,
                frame("SEND", to, "a:" + "a" * 9_000),
            ),
            2,
        ),
        "destinations of 64 KB": Attack(in_turn(CONNECT, [frame("SEND", f"destination:{long}")])),
        "composite destinations": Attack(
            forever(CONNECT, flood("SEND", "destination:" + ",".join(f"/topic/a{n}" for n in range(60))))
        ),
        "malformed frames": Attack(in_turn(CONNECT, [one_frame(seed) * 50 for seed in range(PIECES_MAX)])),
        "cron entries": Attack(forever(CONNECT, crons)),
        "schedules that repeat at once": Attack(
            forever(CONNECT, flood("SEND", to, "AMQ_SCHEDULED_PERIOD:1", "AMQ_SCHEDULED_REPEAT:-1"))
        ),
        "browsers that never read": Attack(
            filled(CONNECT + flood("SEND", f"destination:{KEPT}", body=b"x" * 4_000), CONNECT + browse), 4, reads=False
        ),
        "connections again and again": Attack(once(CONNECT, frame("SUBSCRIBE", "id:1", f"destination:{KEPT}"))),
    }


def _native() -> dict[str, Attack]:
    pack = native.pack
    order = itertools.count(1)

    def sends(destination: str, block: bytes = b"", size: int = 256) -> Callable[[int], Pieces]:
        """Non-durable messages without end, numbered as the protocol wants it."""

        def pieces(_: int) -> Pieces:
            yield HELLO
            for first in itertools.count(1, 100):
                yield pack([native.SEND, first, [native.row(b"x" * size, destination, block=block, flags=4)] * 100])

        return pieces

    def nearly_right(_: int) -> Pieces:
        yield HELLO
        yield native_pieces.one_frame(random.Random(next(order)).randrange(2**32)) * 50

    def subscribe(number: int, destination: str, selector: str = "") -> list[object]:
        options = {"selector": selector} if selector else {}
        return [native.SUBSCRIBE, 7, number, destination, "auto", 30_000, "", options]

    def never_reads(number: int) -> Pieces:
        if number:
            yield from sends(THEIRS, size=4_000)(number)
        yield HELLO + pack(subscribe(1, THEIRS))
        yield float("inf")

    many = [subscribe(number, f"{THEIRS}.{number}") for number in range(1, FLOOD_FRAMES)]
    long = pack([native.SEND, 1, [native.row(b"", "/queue/" + "a" * 65_000)]])
    browse = pack(*([native.BROWSE, number, KEPT, "", 0, []] for number in range(1, 200)))
    fill = pack([native.SEND, 1, [native.row(b"x" * 4_000, KEPT)] * 1_000])
    return {
        "neighbour": Attack(sends(NEIGHBOUR)),
        "slow-loris": Attack(slowly(HELLO), 200),
        "a frame of 2 GB": Attack(once(HELLO, b"\x7f\xff\xff\xff", b"x" * 65_536)),
        "frames of nothing but nesting": Attack(once(HELLO, (60_000).to_bytes(4, "big") + b"\x91" * 60_000)),
        "subscriptions without end": Attack(forever(HELLO, pack(*many))),
        "a reader that never reads": Attack(never_reads, 2, reads=False),
        "selectors that are refused": Attack(in_turn(HELLO, [pack(subscribe(1, THEIRS, each)) for each in SELECTORS])),
        "destinations of 64 KB": Attack(in_turn(HELLO, [long])),
        "malformed frames": Attack(nearly_right),
        "schedules that repeat at once": Attack(sends(THEIRS, b"AMQ_SCHEDULED_PERIOD:1\nAMQ_SCHEDULED_REPEAT:-1\n")),
        "browsers that never read": Attack(filled(HELLO + fill, HELLO + browse), 4, reads=False),
        "connections again and again": Attack(once(HELLO, pack(subscribe(1, KEPT)))),
    }


ATTACKS: dict[str, dict[str, Attack]] = {"stomp": _stomp(), "pybroker": _native()}


async def connection(attack: Attack, number: int, host: str, port: int, opened: Callable[[], None]) -> None:
    """One connection, made again whenever it has ended."""
    for life in itertools.count():
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError:
            await trio.sleep(0.01)
            continue
        if life == 0:
            opened()
        async with stream, trio.open_nursery() as nursery:
            if attack.reads:
                nursery.start_soon(_read, stream)
            try:
                for piece in attack.pieces(number):
                    if isinstance(piece, float):
                        await trio.sleep(piece)
                    else:
                        await stream.send_all(piece)
                await stream.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                nursery.cancel_scope.cancel()


async def _read(stream: trio.SocketStream) -> None:
    try:
        while await stream.receive_some(READ_BYTES):
            pass
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    await stream.aclose()  # who sends notices it


async def main_loop(attack: Attack, host: str, port: int) -> None:
    """All connections of an attack, until the process is ended."""
    waiting = attack.connections

    def opened() -> None:
        nonlocal waiting
        waiting -= 1
        if waiting == 0:
            print("attacking", flush=True)

    async with trio.open_nursery() as nursery:
        for number in range(attack.connections):
            nursery.start_soon(connection, attack, number, host, port, opened)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attacks")
    parser.add_argument("name")
    parser.add_argument("--url", required=True)
    options = parser.parse_args()
    url = urlsplit(options.url)
    trio.run(main_loop, ATTACKS[url.scheme][options.name], url.hostname, url.port)


if __name__ == "__main__":
    main()
