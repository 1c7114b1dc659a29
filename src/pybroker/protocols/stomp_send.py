"""The meaning of a SEND frame's headers, and the memo that spares parsing header lines that were seen before.

Owns which headers the transport keeps for itself, which ones set a message's properties, and how the others become
a header block. It must never touch bodies or receipts: those differ from frame to frame. Follows "SEND", "Repeated
Header Entries" and "Value Encoding" of the STOMP specifications, and ActiveMQ's ``persistent``, ``priority`` and
``expires``. Of a header that is known the first one counts; repeats of others pass through in their order.
"""

from __future__ import annotations

from pybroker.destination import LOCAL_PREFIXES
from pybroker.errors import InvalidMessage, ProtocolError
from pybroker.message import PRIORITY_DEFAULT, PRIORITY_MAX, REPLY_TO, escape
from pybroker.protocols.stomp_events import Numbered
from pybroker.protocols.stomp_headers import decode_head, shown
from pybroker.protocols.stomp_numbered import NUMBERED, cut_sequence, parse_numbered

# What a SEND's header lines come to: destination, header block, durable, priority, expires, transaction, its number.
SendHeaders = tuple[str, bytes, bool, int, int, str | None, Numbered | None]

# Not passed on: they belong to one hop, or the broker says them itself in MESSAGE.
TRANSPORT_HEADERS = frozenset(
    {
        "ack",
        "content-length",
        "delivery-count",
        "destination",
        "message-id",
        "receipt",
        "redelivered",
        "subscription",
        "timestamp",
        "transaction",
        *NUMBERED,
    }
)
_PROPERTY_HEADERS = frozenset({"expires", "persistent", "priority"})  # passed on, too
_EXPIRES_DIGITS_MAX = 18
_LOCAL_PREFIXES = tuple(LOCAL_PREFIXES)
_ENTRY_BYTES_MAX = 4096  # longer header lines are not remembered


class LocalDestination(str):
    """Where a message is sent that names temporary destinations of its connection: there, or in its reply-to header."""

    __slots__ = ()


class HeaderMemo:
    """Remembers what header lines came to, within ``entries_max`` and ``bytes_max``; emptied when it is full.

    Producers repeat the same header lines, apart from receipt and content-length, which are cut out before, and from
    producer-sequence, which `read_send` cuts out. ``entries_max=0`` remembers nothing.
    """

    __slots__ = ("_bytes", "_entries", "_tables", "bytes_max", "entries_max")

    def __init__(self, entries_max: int = 64, bytes_max: int = 32_768) -> None:
        self.entries_max = entries_max
        self.bytes_max = bytes_max
        self._tables: dict[str, dict[bytes, SendHeaders]] = {}
        self._entries = 0
        self._bytes = 0

    def table(self, version: str) -> dict[bytes, SendHeaders]:
        """The entries of one version, for look-up; it stays the same object."""
        return self._tables.setdefault(version, {})

    def remember(self, table: dict[bytes, SendHeaders], lines: bytes, headers: SendHeaders) -> None:
        size = 2 * len(lines)  # the lines, and what was kept of them
        if size > _ENTRY_BYTES_MAX or size > self.bytes_max or not self.entries_max:
            return
        if self._entries >= self.entries_max or self._bytes + size > self.bytes_max:
            for each in self._tables.values():
                each.clear()
            self._entries = self._bytes = 0
        table[lines] = headers
        self._entries += 1
        self._bytes += size


def read_send(
    lines: bytes, version: str | None, durable_default: bool, memo: HeaderMemo, table: dict[bytes, SendHeaders]
) -> SendHeaders:
    """The meaning of header lines that are not in `table`, where it is remembered if it can be; raises as `parse_send`.

    A number differs from frame to frame: what is remembered of numbered frames is the rest, under a key that no lines have.
    """
    cut = cut_sequence(lines)
    if cut is None:
        headers = parse_send(lines, version, durable_default)
        if headers[-1] is None:
            memo.remember(table, lines, headers)
        return headers
    rest, sequence = cut
    key = rest + b"\0"
    known = table.get(key)
    if known is None:
        headers = parse_send(rest, version, durable_default, sequence)
        memo.remember(table, key, headers)
        return headers
    numbered = known[-1]
    assert numbered is not None
    return (*known[:-1], Numbered(numbered.producer, sequence, numbered.repeat))


def parse_send(lines: bytes, version: str | None, durable_default: bool, sequence: int | None = None) -> SendHeaders:
    """Parse a SEND's header lines; raise `ProtocolError` or `InvalidMessage` with how to mend them.

    With `sequence` that is what a producer-sequence header said which was in front of these lines.
    """
    known: dict[str, str] = {}
    local = False  # it names a temporary destination of its connection
    kept: list[str] = []
    plain = 92 not in lines and 13 not in lines  # no backslash, no CR: all but a colon is in canonical form already
    for name, value in decode_head(lines, version):
        if name in TRANSPORT_HEADERS:
            known.setdefault(name, value)
            continue
        if name == REPLY_TO:
            local = local or value.lstrip(" ").startswith(_LOCAL_PREFIXES)
        elif name in _PROPERTY_HEADERS:
            known.setdefault(name, value)
        kept.append(f"{name}:{value}\n" if plain and ":" not in value else f"{escape(name)}:{escape(value)}\n")
    if version == "1.0":
        known = {name: value.strip(" ") for name, value in known.items()}
    if sequence is not None:
        known["producer-sequence"] = str(sequence)
    destination = known.get("destination")
    if not destination:
        raise ProtocolError("SEND needs the header destination, for example destination:/queue/NAME")
    transaction = known.get("transaction")
    if transaction == "":
        raise ProtocolError("SEND has an empty transaction header: name a transaction, or leave it out")
    return (
        LocalDestination(destination) if local or destination.startswith(_LOCAL_PREFIXES) else destination,
        "".join(kept).encode(),
        _persistent(known.get("persistent"), durable_default),
        _priority(known.get("priority")),
        _expires(known.get("expires")),
        transaction,
        parse_numbered("SEND", *map(known.get, NUMBERED)),
    )


def _persistent(value: str | None, default: bool) -> bool:
    if value is None:
        return default
    if value not in ("true", "false"):
        raise InvalidMessage(f"SEND header persistent must be true or false, not {shown(value)}")
    return value == "true"


def _priority(value: str | None) -> int:
    if value is None:
        return PRIORITY_DEFAULT
    if len(value) != 1 or value not in "0123456789":
        raise InvalidMessage(f"SEND header priority must be a digit from 0 to {PRIORITY_MAX}, not {shown(value)}")
    return int(value)


def _expires(value: str | None) -> int:
    if value is None:
        return 0
    if not (value.isascii() and value.isdigit() and len(value) <= _EXPIRES_DIGITS_MAX):
        raise InvalidMessage(
            f"SEND header expires must be milliseconds since the Unix epoch, from 0, not {shown(value)}"
        )
    return int(value)
