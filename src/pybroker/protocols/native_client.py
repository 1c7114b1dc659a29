"""The client's side of one native connection: bytes in, events out, bytes out (NATIVE.md). Pure.

Owns what may come when, the numbers of requests and subscriptions, and how acknowledgements become few frames. What is sent once
outlives the connection and is kept by `native_sends`. Errors: what the broker does wrong comes out as `Closed`, once and last;
what the owner does wrong raises RuntimeError.

Subscriptions are never given a number twice by one client, so that a delivery's tag means nothing on any later connection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pybroker.consumer_options import PLAIN, ConsumerOptions
from pybroker.errors import BrokerError, BrokerUnavailable, ProtocolError, SendInDoubt
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_decoding import FrameCutter, HeaderBlocks, decode_frame
from pybroker.protocols.native_errors import error_of
from pybroker.protocols.native_frames import (
    Beat,
    Bye,
    Confirm,
    Deliver,
    Done,
    Ended,
    Error,
    Failed,
    Frame,
    Members,
    Page,
    Ranges,
    Refused,
    Welcome,
    encode_ack,
    encode_beat,
    encode_browse,
    encode_bye,
    encode_create,
    encode_credit,
    encode_delete,
    encode_hello,
    encode_nack,
    encode_remove,
    encode_subscribe,
    encode_unsubscribe,
    pack_options,
)
from pybroker.protocols.native_sends import FRAME_BYTES_MAX, Sends, Submission

HANDSHAKE_BYTES_MAX = (
    1024 * 1024
)  # the largest frame before the broker was let in (a WELCOME has the network's members)
RANGES_MAX = 1_000  # ranges in one acknowledgement
HEARTBEAT_MAX = 86_400.0  # seconds

# ---- states, and the frames that may come in each

OPENING, OPEN, CLOSING, CLOSED = "opening", "open", "closing", "closed"
_ANSWERS = frozenset(
    (
        *(wire.ERROR, wire.BYE, wire.BEAT, wire.CONFIRM, wire.REFUSED, wire.DONE),
        *(wire.FAILED, wire.DELIVER, wire.ENDED, wire.MEMBERS, wire.PAGE),
    )
)
_MAY_COME: Mapping[str, frozenset[int]] = {
    OPENING: frozenset((wire.WELCOME, wire.ERROR)),
    OPEN: _ANSWERS,
    CLOSING: _ANSWERS,
    CLOSED: frozenset(),
}


class Opened(NamedTuple):
    """The broker let this client in. Sizes in bytes, times in seconds; see WELCOME in NATIVE.md."""

    broker: str
    session: str
    software: str
    heartbeat: float
    body_bytes_max: int
    frame_bytes_max: int
    send_messages_max: int
    send_bytes_max: int
    transaction_messages_max: int
    transaction_bytes_max: int
    producer_known: bool
    members: Mapping[str, tuple[str, ...]]


class Confirmed(NamedTuple):
    """So many of a submission's messages are as safe as asked (`stored`: a store has them)."""

    submission: Submission
    messages: int
    stored: bool


class Rejected(NamedTuple):
    """One message of a submission, or a whole transaction, was refused; SendInDoubt: nobody knows."""

    submission: Submission
    error: BrokerError


class Answered(NamedTuple):
    """A request was answered; `contexts` are those of everybody who asked by it."""

    contexts: list[Any]
    error: BrokerError | None


class Shown(NamedTuple):
    """A page of a queue, for who asked for it."""

    context: Any
    page: Page


class Closed(NamedTuple):
    """The connection is over: the last event. None when it was closed in good order, by this side."""

    error: BrokerError | None


Event = Opened | Confirmed | Rejected | Answered | Shown | Deliver | Ended | Members | Closed


class _Settlement:
    """Tags of one subscription that are acknowledged, or given back, by one frame; and who wants to know."""

    __slots__ = ("contexts", "done", "number", "tags")

    def __init__(self, number: int, done: bool) -> None:
        self.number = number
        self.done = done
        self.tags: list[int] = []
        self.contexts: list[Any] = []


class Numbers:
    """Counters that outlive connections."""

    def __init__(self) -> None:
        self.subscription = 0


class NativeClientSession:
    """One connection's protocol state. Give it bytes and requests, take events, send its output.

    ::

        events = session.receive_data(data)  # b"" at the end of the stream
        while data := session.data_to_send():
            send(data)
    """

    def __init__(self, sends: Sends, numbers: Numbers, options: Mapping[str, Any]) -> None:
        self._sends = sends
        self._numbers = numbers
        self._cutter = FrameCutter(HANDSHAKE_BYTES_MAX, "the client's limit of a first frame")
        self._blocks = HeaderBlocks()
        self._output: list[bytes] = [encode_hello(options)]
        self._settlements: list[_Settlement] = []
        self._last: dict[int, _Settlement] = {}  # the last one of each subscription
        self._last_request = 0
        self._requests: dict[int, list[Any]] = {}
        self._bye_said = False
        self.state = OPENING

    # ---- input

    def receive_data(self, data: bytes | bytearray) -> list[Event]:
        """What the bytes bring, in order. Never raises."""
        events: list[Event] = []
        if self.state == CLOSED:
            return events
        if not data:
            self._end(BrokerUnavailable("the broker closed the connection"), events)
            return events
        try:
            self._cutter.feed(data)
            while self.state != CLOSED and (fields := self._cutter.next()) is not None:
                if fields[0] not in _MAY_COME[self.state]:
                    raise ProtocolError(
                        f"the broker sent a frame of type {fields[0]} while the connection is {self.state}"
                    )
                self._handle(decode_frame(fields, self._blocks), events)
        except ProtocolError as error:
            self._end(error, events)
        return events

    def _end(self, error: BrokerError | None, events: list[Event]) -> None:
        self.state = CLOSED
        self._output.clear()
        events.append(Closed(error))

    def _handle(self, frame: Frame, events: list[Event]) -> None:
        if isinstance(frame, Deliver):
            events.append(frame)
        elif isinstance(frame, Confirm):
            for first, last, stored in frame.results:
                for submission, count in self._sends.confirm(first, last):
                    events.append(Confirmed(submission, count, stored))
        elif isinstance(frame, Done):
            events.append(Answered(self._answered(frame.request), None))
        elif isinstance(frame, Page):
            for context in self._answered(frame.request):
                events.append(Shown(context, frame))
        elif isinstance(frame, Failed):
            events.append(Answered(self._answered(frame.request), error_of(frame.code, frame.text)))
        elif isinstance(frame, Refused):
            events.append(Rejected(self._sends.refuse(frame.sequence), error_of(frame.code, frame.text)))
        elif isinstance(frame, Ended | Members):
            events.append(frame)
        elif isinstance(frame, Welcome):
            events.append(self._welcome(frame))
        elif isinstance(frame, Error):
            self._end(error_of(frame.code, frame.text, frame.details), events)
        elif isinstance(frame, Bye):
            in_order = self.state == CLOSING
            self._end(None if in_order else ProtocolError("the broker said goodbye"), events)
        else:
            assert isinstance(frame, Beat)

    def _answered(self, request: int) -> list[Any]:
        try:
            return self._requests.pop(request)
        except KeyError:
            raise ProtocolError(f"the broker answered request {request}, which was not made") from None

    def _welcome(self, frame: Welcome) -> Opened:
        if frame.version not in wire.VERSIONS:
            raise ProtocolError(f"the broker wants to speak version {frame.version}, which was not offered")
        opened = _opened(frame.options)
        self._cutter.bytes_max = max(opened.frame_bytes_max, HANDSHAKE_BYTES_MAX)
        self._cutter.limit = "native.frame_bytes_max"
        self.state = OPEN
        return opened

    # ---- requests

    def _request(self, context: Any) -> int:
        self._last_request += 1
        self._requests[self._last_request] = [context]
        return self._last_request

    def _check_open(self) -> None:
        if self.state != OPEN:
            raise RuntimeError(f"nothing can be asked for on a connection that is {self.state}")

    def subscribe(
        self,
        context: Any,
        destination: str,
        ack: str,
        prefetch: int,
        durable: str,
        options: ConsumerOptions = PLAIN,
    ) -> int:
        """The number of the new subscription, which its deliveries have."""
        self._check_open()
        self._numbers.subscription += 1
        number = self._numbers.subscription
        self._output.append(
            encode_subscribe(self._request(context), number, destination, ack, prefetch, durable, pack_options(options))
        )
        return number

    def unsubscribe(self, context: Any, number: int) -> None:
        self._check_open()
        self._flush_settlements()
        self._output.append(encode_unsubscribe(self._request(context), number))

    def remove(self, context: Any, durable: str) -> None:
        self._check_open()
        self._output.append(encode_remove(self._request(context), durable))

    def create(self, context: Any, kind: str, secret: str) -> None:
        self._check_open()
        self._output.append(encode_create(self._request(context), kind, secret))

    def delete(self, context: Any, destination: str) -> None:
        self._check_open()
        self._output.append(encode_delete(self._request(context), destination))

    def browse(
        self, context: Any, destination: str, selector: str, limit: int, cursor: tuple[int, int, int] | None
    ) -> None:
        """Ask for a page of a queue."""
        self._check_open()
        self._output.append(encode_browse(self._request(context), destination, selector, limit, cursor))

    def credit(self, number: int, prefetch: int) -> None:
        self._check_open()
        self._output.append(encode_credit(number, prefetch))

    def settle(self, number: int, tags: Sequence[int], done: bool, context: Any = None) -> None:
        """Acknowledge (`done`) or give back deliveries; without a context no answer is wanted.

        For a cumulative subscription the caller gives the last tag only.
        """
        self._check_open()
        settlement = self._last.get(number)
        if settlement is None or settlement.done is not done:
            settlement = self._last[number] = _Settlement(number, done)
            self._settlements.append(settlement)
        settlement.tags += tags
        if context is not None:
            settlement.contexts.append(context)

    def _flush_settlements(self) -> None:
        for settlement in self._settlements:
            encode = encode_ack if settlement.done else encode_nack
            found = ranges_of(settlement.tags)
            for start in range(0, len(found), RANGES_MAX):
                request = 0
                if settlement.contexts and start + RANGES_MAX >= len(found):  # done when all in front of it is
                    self._last_request += 1
                    request = self._last_request
                    self._requests[request] = settlement.contexts
                self._output.append(encode(request, settlement.number, found[start : start + RANGES_MAX]))
        self._settlements.clear()
        self._last.clear()

    # ---- output

    @property
    def settling(self) -> bool:
        """Whether acknowledgements wait to be written."""
        return bool(self._settlements)

    @property
    def owes(self) -> bool:
        """Whether answers are waited for, or something is still to be written."""
        return bool(self._requests or self._settlements or self._output or self._sends.pending)

    def beat(self) -> None:
        """Say that this side is there."""
        if self.state in (OPEN, CLOSING) and not self._output:
            self._output.append(encode_beat())

    def bye(self) -> None:
        """Nothing more will be asked for; what is to be written goes first."""
        if self.state == OPEN:
            self.state = CLOSING

    def data_to_send(self) -> bytes:
        """What is to be written now, about a mebibyte at most; empty when there is nothing."""
        if self.state == CLOSED:
            return b""
        if self.state != OPENING:
            if self._settlements:
                self._flush_settlements()
            output = self._output
            size = sum(map(len, output))
            while size < FRAME_BYTES_MAX:
                frame = self._sends.next_frame()
                if frame is None:
                    if self.state == CLOSING and not self._bye_said and not self._sends.pending:
                        self._bye_said = True
                        output.append(encode_bye())
                    break
                output.append(frame)
                size += len(frame)
        if not self._output:
            return b""
        data = b"".join(self._output)
        self._output.clear()
        return data

    def orphans(self) -> list[Any]:
        """The connection is over: whose requests were not answered (and are in doubt)."""
        self.state = CLOSED
        found = [context for contexts in self._requests.values() for context in contexts]
        found += [context for settlement in self._settlements for context in settlement.contexts]
        self._requests.clear()
        self._settlements.clear()
        self._last.clear()
        return found


def ranges_of(tags: list[int]) -> Ranges:
    """Ranges of numbers that are all different; sorts the list.

    >>> ranges_of([3, 1, 2, 7])
    [(1, 3), (7, 7)]
    """
    tags.sort()
    if tags[-1] - tags[0] + 1 == len(tags):
        return [(tags[0], tags[-1])]
    found: list[tuple[int, int]] = []
    first = last = tags[0]
    for tag in tags[1:]:
        if tag != last + 1:
            found.append((first, last))
            first = tag
        last = tag
    found.append((first, last))
    return found


def lost(what: str, error: BrokerError | None) -> SendInDoubt:
    """The error for what was under way when the connection was lost."""
    return SendInDoubt(f"the connection was lost ({error}) while {what} was under way: it may be committed or not")


def _opened(options: Mapping[str, Any]) -> Opened:
    def number(name: str, least: int = 1) -> int:
        value = options.get(name, 0)
        if value.__class__ is not int or value < least:
            raise ProtocolError(f"WELCOME: {name} must be a whole number, {least} or more")
        return int(value)

    def text(name: str) -> str:
        value = options.get(name, "")
        if not isinstance(value, str):
            raise ProtocolError(f"WELCOME: {name} must be text")
        return value

    heartbeat = options.get("heartbeat", 0)
    if heartbeat.__class__ not in (int, float) or not 0 <= heartbeat <= HEARTBEAT_MAX:
        raise ProtocolError(f"WELCOME: heartbeat must be seconds from 0 to {HEARTBEAT_MAX:g}")
    known = options.get("producer_known", False)
    if known.__class__ is not bool:
        raise ProtocolError("WELCOME: producer_known must be true or false")
    members = options.get("members", {})
    if not isinstance(members, dict) or not all(
        isinstance(name, str) and isinstance(urls, tuple) and all(isinstance(url, str) for url in urls)
        for name, urls in members.items()
    ):
        raise ProtocolError("WELCOME: members must be a map of names to arrays of URLs")
    return Opened(
        text("broker"),
        text("session"),
        text("software"),
        float(heartbeat),
        number("body_bytes_max"),
        number("frame_bytes_max"),
        number("send_messages_max"),
        number("send_bytes_max"),
        number("transaction_messages_max", 0),
        number("transaction_bytes_max", 0),
        known,
        members,
    )
