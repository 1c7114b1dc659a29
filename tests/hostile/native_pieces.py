"""What a native client may send that means harm: frames that are nearly right, and bytes that are nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgpack
from hypothesis import strategies as st

from tests.hostile.stomp_pieces import CRONS, KINDS, NAMES, SELECTORS, in_pieces, seeds
from tests.native import peer as wire

CREATE, DELETE = 18, 19
NUMBERS = [0, 1, 2, 3, -1, 255, 10_001, 2**31, 2**32, 2**53, 2**63 - 1, 2**64 - 1, -(2**63)]
DESTINATIONS = ["/queue/a", "/queue/b", "/topic/a", "/topic/>"]
BLOCKS = [b"a:b\n", b"a", b"a:b", b"\n", b"\xff:a\n", b"a:\\q\n", b"reply-to:/temp-queue/a\n"]


def number(generator: random.Random) -> int:
    return generator.choice((1, 1, 2, 3) if generator.random() < 0.7 else NUMBERS)


def name(generator: random.Random) -> str:
    return "" if generator.random() < 0.6 else generator.choice(NAMES)


def destination(generator: random.Random) -> str:
    if generator.random() < 0.8:
        return generator.choice(DESTINATIONS)
    return generator.choice(KINDS) + generator.choice(NAMES)


def anything(generator: random.Random, depth: int = 0) -> Any:
    way = generator.randrange(9 if depth < 3 else 7)
    if way >= 7:
        values = [anything(generator, depth + 1) for _ in range(generator.randrange(3))]
        return values if way == 7 else {name(generator): value for value in values}
    return (None, True, number(generator), generator.random(), float("nan"), generator.randbytes(5), name(generator))[
        way
    ]


def block(generator: random.Random) -> bytes:
    if generator.random() < 0.6:
        return b""
    if generator.random() < 0.5:
        return generator.choice(BLOCKS)
    kind = generator.choice(("DELAY", "PERIOD", "REPEAT", "CRON"))
    return f"AMQ_SCHEDULED_{kind}:{generator.choice([*CRONS, '1', '-1', '9' * 400])}\n".encode()


def row(generator: random.Random) -> list[Any]:
    flags = generator.randrange(32) if generator.random() < 0.9 else number(generator)
    expires = 0 if generator.random() < 0.8 else number(generator)
    return [destination(generator), generator.randbytes(5), block(generator), flags, expires]


def rows(generator: random.Random) -> list[Any]:
    return [row(generator) for _ in range(generator.randrange(4))]


def ranges(generator: random.Random) -> list[int]:
    found = [number(generator) for _ in range(2 * generator.randrange(3))]
    return sorted(found) if generator.random() < 0.8 else found


def settlements(generator: random.Random) -> list[Any]:
    return [[number(generator), ranges(generator)] for _ in range(generator.randrange(3))]


def options(generator: random.Random) -> dict[str, Any]:
    if generator.random() < 0.7:
        return {}
    said = {"selector": generator.choice(SELECTORS), "exclusive": True, "priority": number(generator), "x": 1}
    kept = generator.choice(sorted(said))
    return {kept: said[kept] if generator.random() < 0.7 else anything(generator)}


def cursor(generator: random.Random) -> list[int]:
    return [number(generator) for _ in range(generator.choice((0, 0, 3, 3, 2)))]


def selector(generator: random.Random) -> str:
    return "" if generator.random() < 0.6 else generator.choice(SELECTORS)


def ack(generator: random.Random) -> str:
    return generator.choice(("auto", "individual", "cumulative", ""))


def secret(generator: random.Random) -> str:
    return generator.choice(("s" * 16, "t" * 16, "", "x" * 65))


def temporary(generator: random.Random) -> str:
    return generator.choice(("remote-temp-queue", "remote-temp-topic", "queue"))


FIELDS: dict[int, tuple[Callable[[random.Random], Any], ...]] = {
    wire.SEND: (number, rows),
    wire.COMMIT: (number, rows, settlements, settlements),
    wire.SUBSCRIBE: (number, number, destination, ack, number, name, options),
    wire.UNSUBSCRIBE: (number, number),
    wire.ACK: (number, number, ranges),
    wire.NACK: (number, number, ranges),
    wire.CREDIT: (number, number),
    wire.REMOVE: (number, name),
    CREATE: (number, temporary, secret),
    DELETE: (number, destination),
    wire.BROWSE: (number, destination, selector, number, cursor),
    wire.BYE: (),
    wire.BEAT: (),
    wire.ERROR: (name, name, lambda generator: {}),
    wire.HELLO: (lambda generator: "pybroker", lambda generator: [1], lambda generator: {}),
}
KINDS_OF_FRAMES = [wire.SEND] * 8 + [wire.SUBSCRIBE] * 8 + [wire.COMMIT, wire.ACK, wire.NACK] * 3 + sorted(FIELDS)


def one_frame(seed: int) -> bytes:
    """A frame whose fields are of the right kinds, but for one now and then."""
    generator = random.Random(seed)
    kind = generator.choice(KINDS_OF_FRAMES)
    fields = [each(generator) for each in FIELDS[kind]]
    if fields and generator.random() < 0.1:
        fields[generator.randrange(len(fields))] = anything(generator)
    payload = msgpack.packb([kind, *fields], use_bin_type=True)
    return len(payload).to_bytes(4, "big") + payload


def hello(seed: int) -> bytes:
    """A first frame: mostly a plain one."""
    generator = random.Random(seed)
    said: dict[str, Any] = {}
    if generator.random() < 0.4:
        said = {
            "client_id": name(generator),
            "producer": generator.choice(("p" * 16, "../../etc/passwd", "x")),
            "producer_new": generator.random() < 0.5,
            "heartbeat": generator.choice((0, 1, -1, float("nan"), float("inf"), 1e300)),
        }
        said = {key: value for key, value in said.items() if generator.random() < 0.5}
        if generator.random() < 0.1:
            said["software"] = anything(generator)
    return wire.pack([wire.HELLO, "pybroker", [1], said])


OPENING = wire.pack(
    [wire.SUBSCRIBE, 7, 1, "/queue/a", "individual", 0, ""],
    [wire.SUBSCRIBE, 7, 2, "/topic/>", "cumulative", 0, ""],
    [wire.SEND, 1, wire.rows(3)],
)
frames = seeds.map(one_frame)


def connection(start: bytes, opening: bool, sent: list[bytes], seed: int) -> list[bytes]:
    tail = b"".join(sent)
    if seed % 3:  # mostly what opens the connection is left as it is
        return [start, *([OPENING] if opening else []), *in_pieces(seed, tail)]
    return in_pieces(seed, start + (OPENING if opening else b"") + tail)


# What one connection sends.
connections = st.builds(connection, seeds.map(hello), st.booleans(), st.lists(frames, max_size=8), seeds)
