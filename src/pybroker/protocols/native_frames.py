"""Frames of the native protocol (NATIVE.md) as values, and their bytes. Owns the wire's shape; no state of a session.

A frame is a length of four bytes, big endian, and so many bytes of msgpack: an array whose first item is the frame's type.
`native_decoding` reads them. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from struct import Struct
from typing import Any, NamedTuple

import msgpack

from pybroker.consumer_options import PLAIN, ConsumerOptions
from pybroker.errors import SubscriptionError
from pybroker.message import Message

MAGIC = "pybroker"  # the second item of a HELLO
VERSIONS = (1,)  # what is spoken, best first

# ---- types of frames. On the wire: never renumber.

HELLO = 1
WELCOME = 2
ERROR = 3
BYE = 4
BEAT = 5
SEND = 10
COMMIT = 11
SUBSCRIBE = 12
UNSUBSCRIBE = 13
ACK = 14
NACK = 15
CREDIT = 16
REMOVE = 17
CREATE = 18
DELETE = 19
CONFIRM = 20
REFUSED = 21
DONE = 22
FAILED = 23
DELIVER = 24
ENDED = 25
MEMBERS = 26
BROWSE = 27
PAGE = 28

# ---- flags of a message: its priority, and this bit. On the wire: do not change.

DURABLE = 16

NUMBER_MAX = 2**63 - 1
TEXT_MAX = 4_096  # characters of a text that is no header

Ranges = Sequence[tuple[int, int]]  # (first, last), both included, rising


class Hello(NamedTuple):
    """The first frame of a client. `options`: see NATIVE.md."""

    versions: tuple[int, ...]
    options: Mapping[str, Any]


class Welcome(NamedTuple):
    version: int
    options: Mapping[str, Any]


class Error(NamedTuple):
    """The connection ends with it."""

    code: str
    text: str
    details: Mapping[str, Any]


class Bye(NamedTuple):
    """Nothing more comes from this side but what it still owes."""


class Beat(NamedTuple):
    """This side is there."""


class Send(NamedTuple):
    """Messages with the sequences `first`, `first` + 1, ..."""

    first: int
    messages: list[Message]


class Commit(NamedTuple):
    """A whole transaction, under one sequence. `acks`, `nacks`: subscription to ranges of delivery tags."""

    sequence: int
    messages: list[Message]
    acks: Mapping[int, Ranges]
    nacks: Mapping[int, Ranges]


class Subscribe(NamedTuple):
    """`ack`: individual, cumulative or auto; `prefetch` 0 = the broker's default; `durable` "" = not durable.

    `options`: of `ConsumerOptions` those that are not as usual.
    """

    request: int
    subscription: int
    destination: str
    ack: str
    prefetch: int
    durable: str
    options: Mapping[str, Any]


class Unsubscribe(NamedTuple):
    request: int
    subscription: int


class Ack(NamedTuple):
    """`request` 0 wants no answer."""

    request: int
    subscription: int
    ranges: Ranges


class Nack(NamedTuple):
    request: int
    subscription: int
    ranges: Ranges


class Credit(NamedTuple):
    """From now on so many messages of the subscription may be with the client unacknowledged."""

    subscription: int
    prefetch: int


class Remove(NamedTuple):
    """Delete the durable subscription of that name."""

    request: int
    durable: str


class Create(NamedTuple):
    """Make the temporary destination of a secret; `kind`: ``remote-temp-queue`` or ``remote-temp-topic``."""

    request: int
    kind: str
    secret: str


class Delete(NamedTuple):
    """Give up a temporary destination."""

    request: int
    destination: str


class Browse(NamedTuple):
    """A page of a queue is asked for. `cursor`: as the page before said it, None = from the start; `limit` 0 = none."""

    request: int
    destination: str
    selector: str
    limit: int
    cursor: tuple[int, int, int] | None


class Confirm(NamedTuple):
    """(first sequence, last sequence, stored): as safe as asked; `stored`: a store has them."""

    results: Sequence[tuple[int, int, bool]]


class Refused(NamedTuple):
    """A send or a transaction was refused, and is not stored; code in-doubt: nobody knows."""

    sequence: int
    code: str
    text: str


class Done(NamedTuple):
    request: int


class Failed(NamedTuple):
    request: int
    code: str
    text: str


class Deliver(NamedTuple):
    """Deliveries with the tags `first_tag`, `first_tag` + 1, ...; of each the message, and how often it was delivered before."""

    subscription: int
    first_tag: int
    messages: list[tuple[Message, int]]


class Ended(NamedTuple):
    """The broker ended a subscription."""

    subscription: int
    code: str
    text: str


class Page(NamedTuple):
    """The answer to BROWSE: messages with how often each was delivered, and which of them (by position) are outstanding.

    `cursor`: where the next page starts, None = this was the last one; `unread`: messages that could not be read.
    """

    request: int
    messages: list[tuple[Message, int]]
    outstanding: tuple[int, ...]
    cursor: tuple[int, int, int] | None
    unread: int


class Members(NamedTuple):
    """The brokers of the network: name to URLs for clients."""

    members: Mapping[str, tuple[str, ...]]


Frame = (
    Hello | Welcome | Error | Bye | Beat | Send | Commit | Subscribe | Unsubscribe | Ack | Nack | Credit | Remove | Create | Delete
    | Confirm | Refused | Done | Failed | Deliver | Ended | Members | Browse | Page
)  # fmt: skip

_USUAL = asdict(PLAIN)
_length = Struct(">I")
_pack = msgpack.Packer(use_bin_type=True).pack


def pack_frame(fields: Sequence[Any]) -> bytes:
    """A frame's bytes."""
    data: bytes = _pack(fields)
    return _length.pack(len(data)) + data


# ---- to bytes


def encode_hello(options: Mapping[str, Any], versions: Sequence[int] = VERSIONS) -> bytes:
    return pack_frame((HELLO, MAGIC, versions, dict(options)))


def encode_welcome(version: int, options: Mapping[str, Any]) -> bytes:
    return pack_frame((WELCOME, version, dict(options)))


def encode_error(code: str, text: str, details: Mapping[str, Any] | None = None) -> bytes:
    return pack_frame((ERROR, code, text[:TEXT_MAX], dict(details or {})))


def encode_bye() -> bytes:
    return pack_frame((BYE,))


def encode_beat() -> bytes:
    return pack_frame((BEAT,))


def _sent(messages: Iterable[Message]) -> list[tuple[str, bytes, bytes, int, int]]:
    return [
        (each.destination, each.body, each.header_block, each.priority | (each.durable and DURABLE), each.expires)
        for each in messages
    ]


def encode_send(first: int, messages: Iterable[Message]) -> bytes:
    return pack_frame((SEND, first, _sent(messages)))


def encode_commit(
    sequence: int, messages: Iterable[Message], acks: Mapping[int, Ranges], nacks: Mapping[int, Ranges]
) -> bytes:
    packed = [[(subscription, _flat(ranges)) for subscription, ranges in each.items()] for each in (acks, nacks)]
    return pack_frame((COMMIT, sequence, _sent(messages), *packed))


def encode_subscribe(
    request: int,
    subscription: int,
    destination: str,
    ack: str,
    prefetch: int = 0,
    durable: str = "",
    options: Mapping[str, Any] | None = None,
) -> bytes:
    said = (dict(options),) if options else ()  # a broker that knows of none wants six fields
    return pack_frame((SUBSCRIBE, request, subscription, destination, ack, prefetch, durable, *said))


def pack_options(options: ConsumerOptions) -> dict[str, Any]:
    """Of the options those that are not as usual."""
    return {name: value for name, usual in _USUAL.items() if (value := getattr(options, name)) != usual}


def unpack_options(packed: Mapping[str, Any]) -> ConsumerOptions:
    """The options of a SUBSCRIBE. Raises SubscriptionError for those that are not known, or are not what they should be."""
    for name, value in packed.items():
        if name not in _USUAL:
            raise SubscriptionError(f"option {name[:80]!r} is not one of {', '.join(_USUAL)}")
        if value.__class__ is not _USUAL[name].__class__:
            raise SubscriptionError(f"option {name} must be of type {_USUAL[name].__class__.__name__}")
    return ConsumerOptions(**packed)


def encode_unsubscribe(request: int, subscription: int) -> bytes:
    return pack_frame((UNSUBSCRIBE, request, subscription))


def encode_ack(request: int, subscription: int, ranges: Ranges) -> bytes:
    return pack_frame((ACK, request, subscription, _flat(ranges)))


def encode_nack(request: int, subscription: int, ranges: Ranges) -> bytes:
    return pack_frame((NACK, request, subscription, _flat(ranges)))


def encode_credit(subscription: int, prefetch: int) -> bytes:
    return pack_frame((CREDIT, subscription, prefetch))


def encode_remove(request: int, durable: str) -> bytes:
    return pack_frame((REMOVE, request, durable))


def encode_create(request: int, kind: str, secret: str) -> bytes:
    return pack_frame((CREATE, request, kind, secret))


def encode_delete(request: int, destination: str) -> bytes:
    return pack_frame((DELETE, request, destination))


def encode_confirm(results: Sequence[tuple[int, int, bool]]) -> bytes:
    return pack_frame((CONFIRM, results))


def encode_refused(sequence: int, code: str, text: str) -> bytes:
    return pack_frame((REFUSED, sequence, code, text[:TEXT_MAX]))


def encode_done(request: int) -> bytes:
    return pack_frame((DONE, request))


def encode_failed(request: int, code: str, text: str) -> bytes:
    return pack_frame((FAILED, request, code, text[:TEXT_MAX]))


def encode_browse(
    request: int, destination: str, selector: str, limit: int, cursor: tuple[int, int, int] | None
) -> bytes:
    return pack_frame((BROWSE, request, destination, selector, limit, cursor or ()))


def encode_page(
    request: int,
    messages: Iterable[tuple[Message, int]],
    outstanding: Sequence[int],
    cursor: tuple[int, int, int] | None,
    unread: int,
) -> bytes:
    return pack_frame((PAGE, request, _delivered(messages), outstanding, cursor or (), unread))


def encode_deliver(subscription: int, first_tag: int, messages: Iterable[tuple[Message, int]]) -> bytes:
    return pack_frame((DELIVER, subscription, first_tag, _delivered(messages)))


def _delivered(messages: Iterable[tuple[Message, int]]) -> list[tuple[Any, ...]]:
    return [
        (
            each.destination,
            each.body,
            each.header_block,
            each.priority | (each.durable and DURABLE),
            each.expires,
            each.message_id,
            each.timestamp,
            deliveries,
        )
        for each, deliveries in messages
    ]


def encode_ended(subscription: int, code: str, text: str) -> bytes:
    return pack_frame((ENDED, subscription, code, text[:TEXT_MAX]))


def encode_members(members: Mapping[str, Sequence[str]]) -> bytes:
    return pack_frame((MEMBERS, dict(members)))


def _flat(ranges: Ranges) -> list[int]:
    return [number for each in ranges for number in each]
