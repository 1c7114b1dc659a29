"""What a STOMP client may send that means harm: frames that are nearly right, and bytes that are nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

from hypothesis import strategies as st

NUMBERS = [
    "0", "1", "-1", "-0", "+1", "01", "1.0", "1e9", "0x10", "1_000", " 1", "1 ", "", "NaN", "inf", "٣", "²", "१",
    "255", "256", "2147483647", "2147483648", "4294967296", "9223372036854775807", "9223372036854775808",
    "999999999999999999", "1000000000000000000", "9" * 400, "10737418240", "-9223372036854775809",
]  # fmt: skip
NAMES = [
    "a", "b", "..", "../../etc/passwd", "con", "a.b.c", "*", ">", "a.>", "a.*.b", ".", "..a", "a..b", "a,b", "é", "a" * 1024,
    "a" * 1025, "a" * 15_000, ".".join("a" * 65), "\\c", "a\\nb", "a\x00b", "a\x7fb", "\u202e", "\ufeff", "a b", "/", "//", "%00",
    "ActiveMQ.DLQ", "ActiveMQ.Advisory.Queue", "VirtualTopic.a", "Consumer.a.VirtualTopic.a", "0" * 32,
]  # fmt: skip
KINDS = [
    "/queue/",
    "/topic/",
    "/temp-queue/",
    "/temp-topic/",
    "/remote-temp-queue/",
    "/remote-temp-topic/",
    "",
    "/",
    "/x/",
]
DESTINATIONS = ["/queue/a", "/queue/a", "/queue/b", "/topic/a", "/topic/a.b", "/temp-queue/a", "/temp-topic/a"]
IDENTIFIERS = ["1", "2", "t", "1-1", "1-2", "2-1", "1-99999999999999999999", "1-", "-1", "a\\cb", "", "x" * 5000]
CRONS = ["* * * * *", "0 0 31 2 *", "0 0 29 2 *", "*/0 * * * *", "99 * * * *", "* * * * 8#9", "@reboot", "1-0 * * * *", "L L L L L",
    "0 0 L 2 1#5", ",".join(map(str, range(60))) + " * * * *"]  # fmt: skip
SELECTORS = ["a = 1", "((((", "NOT " * 500 + "a", "'" , "a LIKE '%" + "%a" * 200 + "'", "(" * 1000 + "a=1" + ")" * 1000, "a IN ()",
    "1" * 500 + " > 0", "a" + " AND a" * 700]  # fmt: skip

WORDS = ["true", "false", "client", "client-individual", "auto", "", "TRUE", "0"]


def destination(generator: random.Random) -> str:
    if generator.random() < 0.8:
        return generator.choice(DESTINATIONS)
    return generator.choice(KINDS) + generator.choice(NAMES)


def identifier(generator: random.Random) -> str:
    return generator.choice(IDENTIFIERS[:4] if generator.random() < 0.8 else IDENTIFIERS)


def number(generator: random.Random) -> str:
    return generator.choice(NUMBERS[:2] if generator.random() < 0.5 else NUMBERS)


def name(generator: random.Random) -> str:
    return generator.choice(NAMES[:2] if generator.random() < 0.6 else NAMES)


def word(generator: random.Random) -> str:
    return generator.choice(WORDS[:5] if generator.random() < 0.8 else WORDS)


def either(values: list[str]) -> Callable[[random.Random], str]:
    return lambda generator: generator.choice(values)


HEADERS: dict[str, Callable[[random.Random], str]] = {
    "destination": destination,
    "id": identifier,
    "subscription": identifier,
    "message-id": identifier,
    "ack": word,
    "receipt": identifier,
    "transaction": identifier,
    "content-length": number,
    "content-type": name,
    "persistent": word,
    "priority": number,
    "expires": number,
    "timestamp": number,
    "reply-to": destination,
    "correlation-id": name,
    "producer-id": name,
    "producer-sequence": number,
    "producer-repeat": word,
    "client-id": name,
    "activemq.subscriptionName": name,
    "durable-subscription-name": name,
    "durable": word,
    "auto-delete": word,
    "activemq.prefetchSize": number,
    "prefetch-count": number,
    "activemq.priority": number,
    "activemq.exclusive": word,
    "selector": either(SELECTORS),
    "browser": word,
    "AMQ_SCHEDULED_DELAY": number,
    "AMQ_SCHEDULED_PERIOD": number,
    "AMQ_SCHEDULED_REPEAT": number,
    "AMQ_SCHEDULED_CRON": either(CRONS),
    "AMQ_SCHEDULED_": name,
    "JMSXGroupID": name,
    "JMSXGroupSeq": number,
    "heart-beat": lambda generator: f"{number(generator)},{number(generator)}",
    "accept-version": either(["1.0", "1.1", "1.2", "1.0,1.1,1.2", "9", ""]),
    "login": name,
    "passcode": name,
}
NEEDED = {
    "SEND": [["destination"], ["destination", "transaction"], ["destination", "AMQ_SCHEDULED_DELAY"],
             ["destination", "producer-id", "producer-sequence"], ["destination", "reply-to"],
             ["destination", "AMQ_SCHEDULED_CRON"]],
    "SUBSCRIBE": [["destination", "id"], ["destination", "id", "ack"],
                  ["destination", "id", "client-id", "activemq.subscriptionName"],
                  ["destination", "id", "ack", "activemq.prefetchSize"], ["destination", "id", "selector"]],
    "UNSUBSCRIBE": [["id"], ["id", "client-id", "activemq.subscriptionName"]],
    "ACK": [["id"], ["id", "transaction"], ["message-id", "subscription"]],
    "NACK": [["id"], ["id", "transaction"]],
    "BEGIN": [["transaction"]],
    "COMMIT": [["transaction"], ["transaction", "producer-id", "producer-sequence"]],
    "ABORT": [["transaction"]],
    "DISCONNECT": [[]],
    "CONNECT": [["accept-version"], ["accept-version", "heart-beat"]],
    "STOMP": [["accept-version"]],
}  # fmt: skip
COMMANDS = ["SEND"] * 12 + ["SUBSCRIBE"] * 8 + ["BEGIN"] * 3 + ["ACK", "NACK", "COMMIT"] * 2 + sorted(NEEDED)


def one_frame(seed: int) -> bytes:
    """A frame with the headers that it needs, most of them right, and now and then one that it does not need."""
    generator = random.Random(seed)
    command = generator.choice(COMMANDS)
    wanted = list(generator.choice(NEEDED[command]))
    while generator.random() < 0.3:
        wanted.append(generator.choice(sorted(HEADERS)))
    lines = [command.encode()]
    lines += [f"{each}:{HEADERS[each](generator)}".encode() for each in wanted]
    if generator.random() < 0.03:
        lines.append(generator.randbytes(generator.randrange(20)))
    body = generator.randbytes(generator.randrange(20)).replace(b"\0", b"") if command == "SEND" else b""
    return b"\n".join(lines) + b"\n\n" + body + b"\0"


seeds = st.integers(0, 2**32 - 1)
frames = seeds.map(one_frame)

# What the frames above may refer to: a connection with a queue's and a topic's consumer, a transaction and a delivery.
OPENING = (
    b"SUBSCRIBE\nid:1\ndestination:/queue/a\nack:client-individual\n\n\0"
    b"SUBSCRIBE\nid:2\ndestination:/topic/>\nack:client\n\n\0"
    b"BEGIN\ntransaction:t\n\n\0SEND\ndestination:/queue/a\n\none\0SEND\ndestination:/queue/a\npersistent:false\n\ntwo\0"
    b"SEND\ndestination:/topic/a\n\nthree\0"
)
CONNECTS = [b"CONNECT\naccept-version:1.%d\nhost:h\n\n\0" % minor for minor in (2, 1, 0)]


def in_pieces(seed: int, data: bytes) -> list[bytes]:
    """The bytes with up to three changes (mostly none), cut anywhere, and sometimes without their end."""
    generator = random.Random(seed)
    changed = bytearray(data)
    for _ in range(max(0, generator.randint(-4, 3))):
        at = generator.randint(0, len(changed))
        way = generator.randrange(4)
        if way == 0 and changed:
            changed[at % len(changed)] = generator.randrange(256)
        elif way == 1:
            del changed[at : at + generator.randint(1, 8)]
        elif way == 2:
            changed[at:at] = generator.randbytes(generator.randint(1, 8))
        else:
            changed[at:at] = changed[at : at + generator.randint(1, 80)]
    data = bytes(changed)
    cuts = sorted(generator.randint(0, len(data)) for _ in range(generator.randrange(5)))
    if generator.random() < 0.25 and cuts:
        data = data[: cuts[-1]]
    pieces = [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    return [piece for piece in pieces if piece]


def connection(start: bytes, opening: bool, sent: list[bytes], seed: int) -> list[bytes]:
    tail = b"".join(sent)
    if seed % 3:  # mostly what opens the connection is left as it is
        return [start, *([OPENING] if opening else []), *in_pieces(seed, tail)]
    return in_pieces(seed, start + (OPENING if opening else b"") + tail)


# What one connection sends.
connections = st.builds(
    connection,
    st.sampled_from([*CONNECTS, b""]),
    st.booleans(),
    st.lists(frames, max_size=8) | st.lists(frames | st.binary(max_size=30), max_size=8),
    seeds,
)
