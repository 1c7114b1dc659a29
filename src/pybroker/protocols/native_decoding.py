"""Frames of the native protocol from bytes: checks types and ranges of all that a peer says (NATIVE.md). Pure.

What a frame means, and whether it may come now, is the session's. Everything that is not as it should be is a `ProtocolError`.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Any

import msgpack

from pybroker.destination import TEMPORARY_KINDS
from pybroker.errors import InvalidMessage, InvalidSelector, LimitExceeded, ProtocolError
from pybroker.message import PRIORITY_MAX, Message, decode_headers, encode_headers
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_frames import (
    DURABLE,
    MAGIC,
    NUMBER_MAX,
    TEXT_MAX,
    Ack,
    Beat,
    Browse,
    Bye,
    Commit,
    Confirm,
    Create,
    Credit,
    Delete,
    Deliver,
    Done,
    Ended,
    Error,
    Failed,
    Frame,
    Hello,
    Members,
    Nack,
    Page,
    Ranges,
    Refused,
    Remove,
    Send,
    Subscribe,
    Unsubscribe,
    Welcome,
)

SELECTOR_MAX = 65_536  # characters of a selector; the broker's own limit is less
RANGES_MAX = 100_000  # ranges in one array
LARGE_BYTES = 1024 * 1024  # from this size on it is counted what a frame is made of
ITEMS_MAX = (
    1_000_000  # items in the arrays and maps of a large frame: each takes much more memory than bytes on the wire
)
SECRET_MIN, SECRET_MAX = 16, 64  # characters of a temporary destination's secret
HEADER_BLOCKS_MAX = 256  # header blocks that are remembered as well formed
HEADER_BLOCK_REMEMBERED = 2_048  # bytes of the longest one of these

_length = Struct(">I")
_FLAGS = {priority | flag: (flag > 0, priority) for flag in (0, DURABLE) for priority in range(PRIORITY_MAX + 1)}


class HeaderBlocks:
    """Knows which header blocks are well formed: as `encode_headers` writes them. Producers repeat theirs."""

    __slots__ = ("known",)

    def __init__(self) -> None:
        self.known: set[bytes] = {b""}

    def check(self, block: object) -> bytes:
        """The block; raises ProtocolError."""
        if not isinstance(block, bytes):
            raise ProtocolError("a header block must be bytes")
        if block in self.known:
            return block
        try:
            whole = encode_headers(decode_headers(block)) == block
        except (InvalidMessage, UnicodeDecodeError):
            whole = False
        if not whole:
            raise ProtocolError(
                "a header block is lines name:value, UTF-8 with the escapes of STOMP 1.2, and this is not one"
            )
        if len(block) <= HEADER_BLOCK_REMEMBERED:
            if len(self.known) >= HEADER_BLOCKS_MAX:
                self.known.clear()
                self.known.add(b"")
            self.known.add(block)
        return block


def number(value: Any, what: str, low: int = 0, high: int = NUMBER_MAX) -> int:
    """The value, if it is a whole number in that range; raises ProtocolError."""
    if value.__class__ is not int or not low <= value <= high:
        raise ProtocolError(f"{what} must be a whole number from {low} to {high}")
    return value


def text(value: Any, what: str, length_max: int = TEXT_MAX) -> str:
    """The value, if it is text and not too long; raises ProtocolError."""
    if value.__class__ is not str or len(value) > length_max:
        raise ProtocolError(f"{what} must be text of at most {length_max} characters")
    return value


def check_selector(selector: str) -> None:
    """Raise InvalidSelector for a selector that can't be sent: one that is no text of UTF-8, or longer than any broker takes."""
    try:
        selector.encode()
    except UnicodeEncodeError as error:
        what = f"character {error.start}: this is half of a character, which UTF-8 does not have"
        raise InvalidSelector(what, position=error.start, column=error.start + 1) from None
    if len(selector) > SELECTOR_MAX:
        what = f"the selector has {len(selector)} characters, and no broker takes more than {SELECTOR_MAX}: make it shorter"
        raise InvalidSelector(what, position=SELECTOR_MAX)


def array(value: Any, what: str) -> tuple[Any, ...]:
    if value.__class__ is not tuple:
        raise ProtocolError(f"{what} must be an array")
    return value


def mapping(value: Any, what: str) -> dict[str, Any]:
    if value.__class__ is not dict or any(key.__class__ is not str for key in value):
        raise ProtocolError(f"{what} must be a map with texts as keys")
    return value


def ranges_of(value: Any) -> list[tuple[int, int]]:
    """Ranges from first, last, first, last, ...: rising, without overlap."""
    flat = array(value, "ranges")
    if not flat or len(flat) % 2 or len(flat) > 2 * RANGES_MAX:
        raise ProtocolError(f"ranges must be pairs of numbers, at least one and at most {RANGES_MAX}")
    found = []
    before = -1
    for first, last in zip(flat[::2], flat[1::2], strict=True):
        if first.__class__ is not int or last.__class__ is not int or not before < first <= last <= NUMBER_MAX:
            raise ProtocolError("ranges must be rising pairs of numbers, first and last")
        found.append((first, last))
        before = last
    return found


def message_fields(destination: Any, body: Any, flags: Any, expires: Any) -> tuple[str, bytes, bool, int, int]:
    """What every form of a message has: destination, body, durable, priority, expires; raises ProtocolError."""
    if destination.__class__ is not str or body.__class__ is not bytes:
        raise ProtocolError("a message's destination must be text, and its body bytes")
    if flags.__class__ is not int or flags & ~DURABLE > PRIORITY_MAX or flags < 0:
        raise ProtocolError(
            f"a message's flags must be its priority, 0 to {PRIORITY_MAX}, with {DURABLE} added if it is durable"
        )
    if expires.__class__ is not int or not 0 <= expires <= NUMBER_MAX:
        raise ProtocolError("a message's expires must be milliseconds since the Unix epoch, or 0")
    return destination, body, flags >= DURABLE, flags & ~DURABLE, expires


def _messages(value: Any, blocks: HeaderBlocks) -> list[Message]:
    found = []
    known = blocks.known
    for row in array(value, "messages"):
        if row.__class__ is not tuple or len(row) != 5:
            raise ProtocolError("a message to be sent must be an array of 5")
        destination, body, block, flags, expires = row
        if (
            destination.__class__ is str
            and body.__class__ is bytes
            and block.__class__ is bytes
            and block in known
            and flags.__class__ is int
            and flags in _FLAGS
            and expires == 0
            and expires.__class__ is int
        ):  # as nearly all are: without a call for each
            durable, priority = _FLAGS[flags]
            found.append(Message(destination, body, block, durable, priority))
        else:
            fields = message_fields(destination, body, flags, expires)
            found.append(Message(fields[0], fields[1], blocks.check(block), fields[2], fields[3], fields[4]))
    return found


def _deliveries(value: Any, blocks: HeaderBlocks) -> list[tuple[Message, int]]:
    found = []
    check = blocks.check
    for row in array(value, "messages"):
        if row.__class__ is not tuple or len(row) != 8:
            raise ProtocolError("a delivery must be an array of 8")
        destination, body, block, flags, expires, message_id, timestamp, deliveries = row
        fields = message_fields(destination, body, flags, expires)
        if message_id.__class__ is not bytes:
            raise ProtocolError("a message id must be bytes")
        number(timestamp, "timestamp")
        number(deliveries, "deliveries")
        message = Message(fields[0], fields[1], check(block), fields[2], fields[3], fields[4], message_id, timestamp)
        found.append((message, deliveries))
    return found


def _settlements(value: Any) -> dict[int, Ranges]:
    found: dict[int, Ranges] = {}
    for each in array(value, "settlements"):
        subscription, ranges = _fields(array(each, "a settlement"), 2)
        found[number(subscription, "subscription")] = ranges_of(ranges)
    return found


def _fields(fields: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    if len(fields) != count:
        raise ProtocolError(f"{count} fields are expected, not {len(fields)}")
    return fields


def _hello(fields: tuple[Any, ...], _: HeaderBlocks) -> Hello:
    magic, versions, options = _fields(fields, 3)
    if magic != MAGIC:
        raise ProtocolError(f"a HELLO must say {MAGIC!r}")
    spoken = array(versions, "versions")
    for each in spoken:
        number(each, "a version")
    return Hello(spoken, mapping(options, "options"))


def _welcome(fields: tuple[Any, ...], _: HeaderBlocks) -> Welcome:
    version, options = _fields(fields, 2)
    return Welcome(number(version, "version"), mapping(options, "options"))


def _error(fields: tuple[Any, ...], _: HeaderBlocks) -> Error:
    code, said, details = _fields(fields, 3)
    return Error(text(code, "code", 64), text(said, "text"), mapping(details, "details"))


def _bye(fields: tuple[Any, ...], _: HeaderBlocks) -> Bye:
    _fields(fields, 0)
    return Bye()


def _beat(fields: tuple[Any, ...], _: HeaderBlocks) -> Beat:
    _fields(fields, 0)
    return Beat()


def _send(fields: tuple[Any, ...], blocks: HeaderBlocks) -> Send:
    first, messages = _fields(fields, 2)
    found = _messages(messages, blocks)
    if not found:
        raise ProtocolError("a SEND must have at least one message")
    return Send(number(first, "sequence", 1, NUMBER_MAX - len(found)), found)


def _commit(fields: tuple[Any, ...], blocks: HeaderBlocks) -> Commit:
    sequence, messages, acks, nacks = _fields(fields, 4)
    found = _messages(messages, blocks)
    return Commit(number(sequence, "sequence", 1), found, _settlements(acks), _settlements(nacks))


def _subscribe(fields: tuple[Any, ...], _: HeaderBlocks) -> Subscribe:
    options: dict[str, Any] = {}
    if len(fields) == 7:  # they may be left out
        options = mapping(fields[6], "options")
        fields = fields[:6]
    request, subscription, destination, ack, prefetch, durable = _fields(fields, 6)
    return Subscribe(
        number(request, "request", 1),
        number(subscription, "subscription"),
        text(destination, "destination"),
        text(ack, "ack", 32),
        number(prefetch, "prefetch"),
        text(durable, "durable"),
        options,
    )


def _unsubscribe(fields: tuple[Any, ...], _: HeaderBlocks) -> Unsubscribe:
    request, subscription = _fields(fields, 2)
    return Unsubscribe(number(request, "request", 1), number(subscription, "subscription"))


def _ack(fields: tuple[Any, ...], _: HeaderBlocks) -> Ack:
    request, subscription, ranges = _fields(fields, 3)
    return Ack(number(request, "request"), number(subscription, "subscription"), ranges_of(ranges))


def _nack(fields: tuple[Any, ...], _: HeaderBlocks) -> Nack:
    request, subscription, ranges = _fields(fields, 3)
    return Nack(number(request, "request"), number(subscription, "subscription"), ranges_of(ranges))


def _credit(fields: tuple[Any, ...], _: HeaderBlocks) -> Credit:
    subscription, prefetch = _fields(fields, 2)
    return Credit(number(subscription, "subscription"), number(prefetch, "prefetch"))


def _remove(fields: tuple[Any, ...], _: HeaderBlocks) -> Remove:
    request, durable = _fields(fields, 2)
    return Remove(number(request, "request", 1), text(durable, "durable"))


def _create(fields: tuple[Any, ...], _: HeaderBlocks) -> Create:
    request, kind, secret = _fields(fields, 3)
    if kind not in TEMPORARY_KINDS:
        raise ProtocolError(f"a temporary destination is one of {', '.join(TEMPORARY_KINDS)}")
    if len(text(secret, "secret", SECRET_MAX)) < SECRET_MIN:
        raise ProtocolError(f"a secret must have at least {SECRET_MIN} characters, hard to guess")
    return Create(number(request, "request", 1), kind, secret)


def _delete(fields: tuple[Any, ...], _: HeaderBlocks) -> Delete:
    request, destination = _fields(fields, 2)
    return Delete(number(request, "request", 1), text(destination, "destination"))


def _browse(fields: tuple[Any, ...], _: HeaderBlocks) -> Browse:
    request, destination, selector, limit, cursor = _fields(fields, 5)
    return Browse(
        number(request, "request", 1),
        text(destination, "destination"),
        text(selector, "selector", SELECTOR_MAX),
        number(limit, "limit"),
        _cursor(cursor),
    )


def _cursor(value: Any) -> tuple[int, int, int] | None:
    cursor = array(value, "a cursor")
    if not cursor:
        return None
    queue, position, stop = _fields(cursor, 3)
    return number(queue, "a cursor"), number(position, "a cursor"), number(stop, "a cursor")


def _page(fields: tuple[Any, ...], blocks: HeaderBlocks) -> Page:
    request, messages, outstanding, cursor, unread = _fields(fields, 5)
    found = _deliveries(messages, blocks)
    for each in array(outstanding, "outstanding"):
        number(each, "outstanding", 0, max(len(found) - 1, 0))
    return Page(number(request, "request", 1), found, outstanding, _cursor(cursor), number(unread, "unread"))


def _confirm(fields: tuple[Any, ...], _: HeaderBlocks) -> Confirm:
    (results,) = _fields(fields, 1)
    found = []
    for each in array(results, "results"):
        first, last, stored = _fields(array(each, "a result"), 3)
        if stored.__class__ is not bool:
            raise ProtocolError("stored must be true or false")
        found.append((number(first, "sequence", 1), number(last, "sequence", first), stored))
    return Confirm(found)


def _refused(fields: tuple[Any, ...], _: HeaderBlocks) -> Refused:
    sequence, code, said = _fields(fields, 3)
    return Refused(number(sequence, "sequence", 1), text(code, "code", 64), text(said, "text"))


def _done(fields: tuple[Any, ...], _: HeaderBlocks) -> Done:
    (request,) = _fields(fields, 1)
    return Done(number(request, "request", 1))


def _failed(fields: tuple[Any, ...], _: HeaderBlocks) -> Failed:
    request, code, said = _fields(fields, 3)
    return Failed(number(request, "request", 1), text(code, "code", 64), text(said, "text"))


def _deliver(fields: tuple[Any, ...], blocks: HeaderBlocks) -> Deliver:
    subscription, first_tag, messages = _fields(fields, 3)
    return Deliver(number(subscription, "subscription"), number(first_tag, "tag", 1), _deliveries(messages, blocks))


def _ended(fields: tuple[Any, ...], _: HeaderBlocks) -> Ended:
    subscription, code, said = _fields(fields, 3)
    return Ended(number(subscription, "subscription"), text(code, "code", 64), text(said, "text"))


def _members(fields: tuple[Any, ...], _: HeaderBlocks) -> Members:
    (members,) = _fields(fields, 1)
    found = {}
    for name, urls in mapping(members, "members").items():
        found[name] = tuple(text(url, "URL") for url in array(urls, "URLs"))
    return Members(found)


_DECODERS: dict[int, Callable[[tuple[Any, ...], HeaderBlocks], Frame]] = {
    wire.HELLO: _hello,
    wire.WELCOME: _welcome,
    wire.ERROR: _error,
    wire.BYE: _bye,
    wire.BEAT: _beat,
    wire.SEND: _send,
    wire.COMMIT: _commit,
    wire.SUBSCRIBE: _subscribe,
    wire.UNSUBSCRIBE: _unsubscribe,
    wire.ACK: _ack,
    wire.NACK: _nack,
    wire.CREDIT: _credit,
    wire.REMOVE: _remove,
    wire.CREATE: _create,
    wire.DELETE: _delete,
    wire.CONFIRM: _confirm,
    wire.REFUSED: _refused,
    wire.DONE: _done,
    wire.FAILED: _failed,
    wire.DELIVER: _deliver,
    wire.ENDED: _ended,
    wire.MEMBERS: _members,
    wire.BROWSE: _browse,
    wire.PAGE: _page,
}


def unpack_frame(data: bytes | memoryview) -> tuple[Any, ...]:
    """The array of a frame; raises ProtocolError."""
    try:
        if len(data) < LARGE_BYTES:
            fields = msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=True)
        else:
            fields = _unpack_large(data)
    except (ValueError, msgpack.exceptions.UnpackException) as error:  # UnicodeDecodeError is a ValueError
        raise ProtocolError(f"a frame is not msgpack: {type(error).__name__}") from None
    if fields.__class__ is not tuple or not fields or fields[0].__class__ is not int:
        raise ProtocolError("a frame must be an array that begins with its type")
    return fields


def _unpack_large(data: bytes | memoryview) -> Any:
    left = ITEMS_MAX

    def count(container: Any) -> Any:
        nonlocal left
        left -= len(container) + 1
        if left < 0:
            raise ProtocolError(f"a frame has more than {ITEMS_MAX} items")
        return container

    return msgpack.unpackb(
        data,
        raw=False,
        use_list=False,
        strict_map_key=True,
        list_hook=count,
        object_hook=count,
        max_array_len=ITEMS_MAX,
        max_map_len=ITEMS_MAX,
    )


def decode_frame(fields: tuple[Any, ...], blocks: HeaderBlocks) -> Frame:
    """The value of a frame's array; raises ProtocolError."""
    decoder = _DECODERS.get(fields[0])
    if decoder is None:
        raise ProtocolError(f"frames of type {fields[0]} are not known")
    return decoder(fields[1:], blocks)


class FrameCutter:
    """Cuts a stream of bytes into frames, as msgpack arrays. `bytes_max` is the limit of the moment, named by `limit`."""

    __slots__ = ("_buffer", "_from", "bytes_max", "limit")

    def __init__(self, bytes_max: int, limit: str) -> None:
        self.bytes_max = bytes_max
        self.limit = limit
        self._buffer = bytearray()
        self._from = 0

    def feed(self, data: bytes | bytearray) -> None:
        self._buffer += data

    def next(self) -> tuple[Any, ...] | None:
        """The next whole frame, None when more bytes are needed. Raises LimitExceeded, ProtocolError."""
        buffer = self._buffer
        start = self._from + 4
        if len(buffer) < start:
            self._compact()
            return None
        (length,) = _length.unpack_from(buffer, self._from)
        if length > self.bytes_max:
            raise LimitExceeded(self.limit, self.bytes_max, f"a frame has {length} bytes")
        if len(buffer) < start + length:
            self._compact()
            return None
        self._from = start + length
        with memoryview(buffer) as view, view[start : start + length] as piece:
            return unpack_frame(piece)

    def _compact(self) -> None:
        if self._from:
            del self._buffer[: self._from]
            self._from = 0

    @property
    def left(self) -> int:
        """Bytes of a frame that is not whole."""
        return len(self._buffer) - self._from
