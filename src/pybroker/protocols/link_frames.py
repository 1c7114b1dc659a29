"""Frames of a link between two brokers (NATIVE.md, "Links") as values, from and to bytes. Owns the wire's shape; no state. Pure.

They are frames as `native_frames` has them, with types of their own; BYE, BEAT and ERROR are the same. What a frame means, and
whether it may come now, is the session's (`link_session`). Everything that is not as it should be is a `ProtocolError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from pybroker.errors import ProtocolError
from pybroker.message import Message, Route
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_decoding import (
    HeaderBlocks,
    array,
    decode_frame,
    mapping,
    message_fields,
    number,
    ranges_of,
    text,
)
from pybroker.protocols.native_frames import DURABLE, NUMBER_MAX, TEXT_MAX, Beat, Bye, Error, Ranges, pack_frame

LINK_MAGIC = "pybroker link"  # the second item of a LINK_HELLO
LINK_VERSIONS = (1,)  # what is spoken, best first

# ---- types of frames. On the wire: never renumber.

LINK_HELLO = 30
LINK_WELCOME = 31
LINK_PROOF = 32
DEMAND = 33
FORWARD = 34
ACCEPTED = 35
REJECTED = 36

NAME_MAX = 255  # characters of a broker's name, and of a namespace
PATH_MAX = 1_000  # brokers on a path, or that a message has passed
TARGETS_MAX = 10_000  # brokers that one copy of a message is for
VERSIONS_MAX = 64  # versions that a HELLO may offer
NONCE_BYTES_MAX = 64  # also of a proof
DELIVERIES_MAX = 2**32 - 1

Added = tuple[str, bool, str, tuple[str, ...]]  # destination, durable, origin, path to it
Dropped = tuple[str, bool, str]
# sequence, destination, body, header block, flags, expires, message id, timestamp, deliveries, passed, targets
Row = tuple[int, str, bytes, bytes, int, int, bytes, int, int, tuple[str, ...], tuple[str, ...]]


class LinkHello(NamedTuple):
    """The first frame of who dials. `options`: see NATIVE.md."""

    versions: tuple[int, ...]
    options: Mapping[str, Any]


class LinkWelcome(NamedTuple):
    """The answer of who was dialled. `options` has its proof."""

    version: int
    options: Mapping[str, Any]


class LinkProof(NamedTuple):
    """The dialler's proof: the link is up."""

    proof: bytes


class Demand(NamedTuple):
    """What is consumed at the sender, or behind it. `whole`: what was told before counts no more."""

    whole: bool
    adds: Sequence[Added]
    drops: Sequence[Dropped]


class Forward(NamedTuple):
    """Messages with the tags `first_tag`, `first_tag` + 1, ... of a lane; of each its sequence in the lane's namespace."""

    lane: int
    namespace: str
    first_tag: int
    messages: list[tuple[int, Message]]


class Accepted(NamedTuple):
    """The sender has what came with these tags as safely as it is asked to keep it."""

    lane: int
    ranges: Ranges


class Rejected(NamedTuple):
    """The sender will never take this message."""

    lane: int
    tag: int
    code: str
    text: str


LinkFrame = LinkHello | LinkWelcome | LinkProof | Demand | Forward | Accepted | Rejected | Beat | Bye | Error


# ---- to bytes


def encode_link_hello(options: Mapping[str, Any], versions: Sequence[int] = LINK_VERSIONS) -> bytes:
    return pack_frame((LINK_HELLO, LINK_MAGIC, versions, options))


def encode_link_welcome(version: int, options: Mapping[str, Any]) -> bytes:
    return pack_frame((LINK_WELCOME, version, options))


def encode_link_proof(proof: bytes) -> bytes:
    return pack_frame((LINK_PROOF, proof))


def encode_demand(whole: bool, adds: Iterable[Added], drops: Iterable[Dropped]) -> bytes:
    return pack_frame((DEMAND, whole, list(adds), list(drops)))


def row_of(sequence: int, message: Message) -> Row:
    """One message of a FORWARD. It has a route, whose priority is the one that it is sent with."""
    route = message.route
    assert route is not None
    return (
        sequence,
        message.destination,
        message.body,
        message.header_block,
        route.priority | (message.durable and DURABLE),
        message.expires,
        message.message_id,
        message.timestamp,
        route.deliveries,
        route.passed,
        route.targets,
    )


def encode_forward(lane: int, namespace: str, first_tag: int, rows: Sequence[Row]) -> bytes:
    """`rows` are messages from `row_of`."""
    return pack_frame((FORWARD, lane, namespace, first_tag, rows))


def encode_accepted(lane: int, ranges: Ranges) -> bytes:
    return pack_frame((ACCEPTED, lane, [number for each in ranges for number in each]))


def encode_rejected(lane: int, tag: int, code: str, said: str) -> bytes:
    return pack_frame((REJECTED, lane, tag, code, said[:TEXT_MAX]))


# ---- from bytes


def name_of(value: Any, what: str) -> str:
    """The value, if it can be a broker's name; raises ProtocolError."""
    name = text(value, what, NAME_MAX)
    if not name or not name.isprintable():
        raise ProtocolError(f"{what} must be a name: 1 to {NAME_MAX} characters that can be printed")
    return name


def names_of(value: Any, what: str, count_max: int) -> tuple[str, ...]:
    names = array(value, what)
    if len(names) > count_max:
        raise ProtocolError(f"{what} must be at most {count_max} names")
    for each in names:
        name_of(each, what)
    return names


def short_bytes(value: Any, what: str) -> bytes:
    if value.__class__ is not bytes or len(value) > NONCE_BYTES_MAX:
        raise ProtocolError(f"{what} must be at most {NONCE_BYTES_MAX} bytes")
    return bytes(value)


def _truth(value: Any, what: str) -> bool:
    if value.__class__ is not bool:
        raise ProtocolError(f"{what} must be true or false")
    return bool(value)


def _fields(value: Any, what: str, count: int) -> tuple[Any, ...]:
    fields = array(value, what)
    if len(fields) != count:
        raise ProtocolError(f"{what} must have {count} fields, not {len(fields)}")
    return fields


def _hello(fields: tuple[Any, ...], _: HeaderBlocks) -> LinkHello:
    magic, versions, options = _fields(fields, "LINK_HELLO", 3)
    if magic != LINK_MAGIC:
        raise ProtocolError(f"a LINK_HELLO must say {LINK_MAGIC!r}")
    spoken = array(versions, "versions")
    if len(spoken) > VERSIONS_MAX:
        raise ProtocolError(f"versions must be at most {VERSIONS_MAX}")
    for each in spoken:
        number(each, "a version")
    return LinkHello(spoken, mapping(options, "options"))


def _welcome(fields: tuple[Any, ...], _: HeaderBlocks) -> LinkWelcome:
    version, options = _fields(fields, "LINK_WELCOME", 2)
    return LinkWelcome(number(version, "version"), mapping(options, "options"))


def _proof(fields: tuple[Any, ...], _: HeaderBlocks) -> LinkProof:
    (proof,) = _fields(fields, "LINK_PROOF", 1)
    return LinkProof(short_bytes(proof, "a proof"))


def _demand(fields: tuple[Any, ...], _: HeaderBlocks) -> Demand:
    whole, adds, drops = _fields(fields, "DEMAND", 3)
    added: list[Added] = []
    for each in array(adds, "demands"):
        destination, durable, origin, path = _fields(each, "a demand", 4)
        added.append(
            (
                text(destination, "destination"),
                _truth(durable, "durable"),
                name_of(origin, "origin"),
                names_of(path, "a path", PATH_MAX),
            )
        )
    dropped: list[Dropped] = []
    for each in array(drops, "demands"):
        destination, durable, origin = _fields(each, "a demand that ends", 3)
        dropped.append((text(destination, "destination"), _truth(durable, "durable"), name_of(origin, "origin")))
    return Demand(_truth(whole, "whole"), added, dropped)


def _route(passed: Any, targets: Any, deliveries: int, priority: int) -> Route:
    passed = names_of(passed, "the brokers that a message has passed", PATH_MAX)
    if not passed:
        raise ProtocolError("a message that is forwarded has passed its sender at least")
    return Route(passed, names_of(targets, "the brokers that a message is for", TARGETS_MAX), deliveries, priority)


def _forward(fields: tuple[Any, ...], blocks: HeaderBlocks) -> Forward:
    lane, namespace, first_tag, rows = _fields(fields, "FORWARD", 4)
    known = blocks.known
    route = Route()  # of the message before, as a rule the same: checked, and made, once
    found: list[tuple[int, Message]] = []
    for row in array(rows, "messages"):
        if row.__class__ is not tuple or len(row) != 11:
            raise ProtocolError("a message that is forwarded must be an array of 11")
        sequence, destination, body, block, flags, expires, message_id, timestamp, deliveries, passed, targets = row
        if not (
            sequence.__class__ is timestamp.__class__ is deliveries.__class__ is int
            and 0 <= sequence <= NUMBER_MAX
            and 0 <= timestamp <= NUMBER_MAX
            and 0 <= deliveries <= DELIVERIES_MAX
        ):
            raise ProtocolError("a message's sequence, timestamp and deliveries must be whole numbers from 0 on")
        if message_id.__class__ is not bytes or len(message_id) > TEXT_MAX:
            raise ProtocolError(f"a message id must be at most {TEXT_MAX} bytes")
        _, body, durable, priority, expires = message_fields(destination, body, flags, expires)
        if block.__class__ is not bytes or block not in known:
            block = blocks.check(block)
        if (
            passed != route.passed
            or targets != route.targets
            or deliveries != route.deliveries
            or priority != route.priority
            or not found
        ):
            route = _route(passed, targets, deliveries, priority)
        message = Message(destination, body, block, durable, priority, expires, message_id, timestamp, route)
        found.append((sequence, message))
    if not found:
        raise ProtocolError("a FORWARD must have at least one message")
    first = number(first_tag, "tag", 1, NUMBER_MAX - len(found))
    return Forward(number(lane, "lane", 1), name_of(namespace, "namespace"), first, found)


def _accepted(fields: tuple[Any, ...], _: HeaderBlocks) -> Accepted:
    lane, ranges = _fields(fields, "ACCEPTED", 2)
    return Accepted(number(lane, "lane", 1), ranges_of(ranges))


def _rejected(fields: tuple[Any, ...], _: HeaderBlocks) -> Rejected:
    lane, tag, code, said = _fields(fields, "REJECTED", 4)
    return Rejected(number(lane, "lane", 1), number(tag, "tag", 1), text(code, "code", 64), text(said, "text"))


_DECODERS: dict[int, Callable[[tuple[Any, ...], HeaderBlocks], LinkFrame]] = {
    LINK_HELLO: _hello,
    LINK_WELCOME: _welcome,
    LINK_PROOF: _proof,
    DEMAND: _demand,
    FORWARD: _forward,
    ACCEPTED: _accepted,
    REJECTED: _rejected,
}
_SHARED = (wire.ERROR, wire.BYE, wire.BEAT)


def decode_link_frame(fields: tuple[Any, ...], blocks: HeaderBlocks) -> LinkFrame:
    """The value of a frame's array; raises ProtocolError."""
    kind = fields[0]
    decoder = _DECODERS.get(kind)
    if decoder is not None:
        return decoder(fields[1:], blocks)
    if kind in _SHARED:
        frame = decode_frame(fields, blocks)
        assert isinstance(frame, Beat | Bye | Error)
        return frame
    raise ProtocolError(f"frames of type {kind} are not known on a link")
