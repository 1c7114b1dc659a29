"""A message as every layer knows it. Owns its content and the escaped form of its headers; no rules of delivery.

Headers are kept as one *header block*: lines ``name:value`` that end in a line feed, with the escapes of STOMP 1.2
(specification section "Value Encoding"), UTF-8. Bytes that nobody asks for are never parsed; order and repeats stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pybroker.errors import InvalidMessage

PRIORITY_DEFAULT = 4
PRIORITY_MAX = 9
REPLY_TO = "reply-to"  # the header that says where a reply goes

_ESCAPES = str.maketrans({"\\": "\\\\", "\r": "\\r", "\n": "\\n", ":": "\\c"})


class Route(NamedTuple):
    """What a message remembers of its way through a network of brokers (DESIGN.md section 6).

    passed      the brokers that had it before this one, in order; one may be there more than once
    targets     topics: the brokers that this copy is for; a queue's message is for whoever consumes it
    deliveries  deliveries of it that had ended without an acknowledgement when it was forwarded
    priority    as it was sent: on a link, messages keep the order in which they were forwarded
    """

    passed: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    deliveries: int = 0
    priority: int = PRIORITY_DEFAULT


class Message:
    """One message. Immutable by convention once the core has taken it.

    destination   where it was sent, e.g. ``/queue/referrals``
    header_block  application headers, escaped (see above), without those that the transport owns
    body          the payload, bytes, never changed
    durable       kept on disk before it is confirmed
    priority      0 (low) to 9 (high)
    expires       milliseconds since the Unix epoch after which it is not delivered; 0 = never
    message_id    given at the first acceptance (by the core, or by a producer of its own); unchanged on redelivery and by
                  forwarding
    timestamp     milliseconds since the Unix epoch when the core accepted it
    size          bytes that it is counted with in every limit: header block and body
    route         its way through a network of brokers, None for a message that was sent here
    holders       how many queue entries in memory refer to it; only the core counts here
    """

    __slots__ = (
        "body",
        "destination",
        "durable",
        "expires",
        "header_block",
        "holders",
        "message_id",
        "priority",
        "route",
        "size",
        "timestamp",
    )

    def __init__(
        self,
        destination: str,
        body: bytes,
        header_block: bytes = b"",
        durable: bool = True,
        priority: int = PRIORITY_DEFAULT,
        expires: int = 0,
        message_id: bytes = b"",
        timestamp: int = 0,
        route: Route | None = None,
    ) -> None:
        self.destination = destination
        self.body = body
        self.header_block = header_block
        self.durable = durable
        self.priority = priority
        self.expires = expires
        self.message_id = message_id
        self.timestamp = timestamp
        self.route = route
        self.size = len(header_block) + len(body)
        self.holders = 0

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The application headers, decoded, in order, repeats included."""
        return decode_headers(self.header_block)

    def header(self, name: str) -> str | None:
        """The first header of that name, or None: of repeated headers the first one counts."""
        for key, value in decode_headers(self.header_block):
            if key == name:
                return value
        return None

    def moved_to(self, destination: str, extra_headers: bytes = b"", expires: int = 0) -> Message:
        """The same content and id under another destination, with more headers in front (dead letters)."""
        return Message(
            destination,
            self.body,
            extra_headers + self.header_block,
            self.durable,
            self.priority,
            expires,
            self.message_id,
            self.timestamp,
        )

    def __repr__(self) -> str:
        return f"<Message {self.message_id.decode('latin-1') or '(new)'} to {self.destination}, {len(self.body)} bytes>"


def escape(text: str) -> str:
    """Escape one header name or value as STOMP 1.2 says."""
    return text.translate(_ESCAPES)


def unescape(text: str) -> str:
    """Undo `escape`; raise `InvalidMessage` on an escape that STOMP 1.2 does not define."""
    if "\\" not in text:
        return text
    out: list[str] = []
    pieces = iter(text.split("\\"))
    out.append(next(pieces))
    for piece in pieces:
        if not piece:  # "\\\\": an escaped backslash; what follows is the next piece, literally
            out.append("\\")
            out.append(next(pieces, ""))
            continue
        try:
            out.append({"r": "\r", "n": "\n", "c": ":"}[piece[0]])
        except KeyError:
            raise InvalidMessage(f"header escape \\{piece[0]} is not defined in STOMP 1.2") from None
        out.append(piece[1:])
    return "".join(out)


def mentions(block: bytes, what: bytes) -> bool:
    """Whether a header block has these bytes somewhere: what `in` says too, which takes four times as long for bytes."""
    return block.partition(what)[1] != b""


def encode_headers(headers: Mapping[str, str] | Iterable[tuple[str, str]]) -> bytes:
    """Make a header block of pairs (or a mapping); raise `InvalidMessage` for what is not text or has no name."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    lines = []
    for name, value in pairs:
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidMessage(f"header {name!r} must be text with a text value, not {type(value).__name__}")
        if not name:
            raise InvalidMessage("a header has an empty name")
        lines.append(f"{escape(name)}:{escape(value)}\n")
    try:
        return "".join(lines).encode()
    except UnicodeEncodeError as error:
        raise InvalidMessage(f"a header can't be written as UTF-8: {error}") from None


def decode_headers(block: bytes) -> list[tuple[str, str]]:
    """Undo `encode_headers`."""
    if not block:
        return []
    pairs = []
    for line in block.decode().split("\n")[:-1]:
        name, _, value = line.partition(":")
        pairs.append((unescape(name), unescape(value)))
    return pairs
