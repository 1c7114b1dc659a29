"""The server's side of one native connection: which frame may come when, and how much is handed on at a time.

Owns the session's state, the first frames with their options, and the limits on what one frame may bring. It must never
know queues, subscriptions, sequences or delivery tags: numbers go through to the server unchecked. Follows NATIVE.md.

Errors: what the peer does wrong comes out as a `Violation` event (remote); what the owner does wrong raises RuntimeError (local).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from pybroker.config import NativeLimits
from pybroker.errors import BrokerError, LimitExceeded, NotLeader, ProtocolError
from pybroker.protocols import native_frames as wire
from pybroker.protocols.link_frames import LINK_HELLO
from pybroker.protocols.native_decoding import FrameCutter, HeaderBlocks, decode_frame, text
from pybroker.protocols.native_frames import (
    VERSIONS,
    Ack,
    Commit,
    Frame,
    Hello,
    Nack,
    Send,
    encode_error,
    encode_welcome,
)

HEARTBEAT_MAX = 86_400.0  # seconds between two heart-beats of a client
CLIENT_ID_MAX = 255  # characters
URL_SCHEME = "pybroker"  # what URLs that a native client can use begin with

_PRODUCER = re.compile(r"[0-9A-Za-z_-]{16,64}")

# ---- which frame may come in which state; in those that are not here nothing is read.
NEW, OPENING, OPEN, CLOSED = "new", "opening", "open", "closed"
_MAY_COME: Mapping[str, frozenset[int]] = {
    NEW: frozenset((wire.HELLO, LINK_HELLO)),
    OPEN: frozenset(
        (
            *(
                wire.SEND,
                wire.COMMIT,
                wire.SUBSCRIBE,
                wire.UNSUBSCRIBE,
                wire.ACK,
                wire.NACK,
                wire.CREDIT,
                wire.REMOVE,
                wire.BROWSE,
            ),
            *(wire.CREATE, wire.DELETE),
            *(wire.BEAT, wire.BYE, wire.ERROR),
        )
    ),
}
_LAST = frozenset((wire.BYE, wire.ERROR))  # nothing is read behind these


class Opening(NamedTuple):
    """The client's HELLO. Nothing is read until `NativeSession.accept`. `heartbeat` in seconds, 0 = it sends none."""

    version: int
    software: str
    login: str
    passcode: str
    client_id: str
    heartbeat: float
    producer: str
    producer_new: bool


class LinkOpening(NamedTuple):
    """Another broker wants a link: all that was read of the stream. The session is over with it."""

    data: bytes


class Violation(NamedTuple):
    """The peer broke a rule; nothing more is read. The owner answers with `NativeSession.error`."""

    error: ProtocolError


Event = Frame | Opening | LinkOpening | Violation


class NativeSession:
    """One connection's protocol state. Give it bytes, take events, send its output.

    ::

        session.receive_data(data)
        while events := session.next_events(messages_max):
            ...handle them, calling accept() or error()...
            send(session.data_to_send())

    Read until `next_events` returns nothing before giving it more data: that bounds what is buffered to one frame and one
    read. After an `Opening` event nothing is read until `accept`; after `error`, and after a `Violation`, `LinkOpening`,
    `Error` or `Bye` event, nothing is read any more, and further data is dropped.

    `send_messages_max` (of the limits) bounds what one SEND brings, and `transaction_messages_max` what one COMMIT does.
    """

    def __init__(self, limits: NativeLimits, transaction_messages_max: int) -> None:
        self._limits = limits
        self._transaction_messages_max = transaction_messages_max
        self._cutter = FrameCutter(limits.handshake_bytes_max, "native.handshake_bytes_max")
        self._blocks = HeaderBlocks()
        self._opening = bytearray()  # what was read before the first frame was whole
        self._rest: Send | None = None  # of a SEND that is handed on in portions
        self._output: list[bytes] = []
        self._version = 0
        self.state = NEW

    # ---- input

    @property
    def buffered_bytes(self) -> int:
        """Bytes received and not yet turned into events (a SEND that is handed on in portions does not count)."""
        return self._cutter.left

    def receive_data(self, data: bytes | bytearray) -> None:
        """Take bytes from the peer."""
        if self.state == CLOSED:
            return
        if self.state == NEW:
            self._opening += data
        self._cutter.feed(data)

    def next_events(self, messages_max: int) -> list[Event]:
        """Events with about `messages_max` messages and acknowledgements at most (one frame always may; a SEND is divided).

        None when more data (or the answer to `Opening`) is needed. Never raises.
        """
        events: list[Event] = []
        count = 0
        try:
            while count < messages_max and self.state in _MAY_COME:
                frame: Event | None
                if self._rest is not None:
                    frame, self._rest = self._rest, None
                else:
                    frame = self._next()
                    if frame is None:
                        break
                kind = frame.__class__
                if kind is Send:
                    assert isinstance(frame, Send)
                    room = messages_max - count
                    count += len(frame.messages)
                    if count > messages_max:
                        self._rest = Send(frame.first + room, frame.messages[room:])
                        frame = Send(frame.first, frame.messages[:room])
                elif kind is Ack or kind is Nack:
                    assert isinstance(frame, Ack | Nack)
                    count += sum([last - first + 1 for first, last in frame.ranges])
                elif kind is wire.Beat:
                    continue  # it has done its work by having come
                else:
                    count += 1 + (len(frame.messages) if isinstance(frame, Commit) else 0)
                events.append(frame)
        except ProtocolError as error:
            self._close()
            events.append(Violation(error))
        return events

    def _next(self) -> Event | None:
        """The next frame that is whole. Raises ProtocolError."""
        fields = self._cutter.next()
        if fields is None:
            return None
        kind = fields[0]
        if kind not in _MAY_COME[self.state]:
            raise ProtocolError(self._misplaced(kind))
        if self.state == NEW:
            if kind == LINK_HELLO:
                data = bytes(self._opening)
                self._close()
                return LinkOpening(data)
            hello = decode_frame(fields, self._blocks)
            assert isinstance(hello, Hello)
            opening = _opening(hello)
            self._version = opening.version
            self._opening.clear()
            self.state = OPENING
            return opening
        if kind == wire.SEND or kind == wire.COMMIT:
            self._check_count(kind, fields)
        frame = decode_frame(fields, self._blocks)
        if kind in _LAST:
            self._close()
        return frame

    def _check_count(self, kind: int, fields: tuple[Any, ...]) -> None:
        """Before a message is made of any of the rows."""
        rows = fields[2] if len(fields) > 2 else None
        if rows.__class__ is not tuple:
            return
        if kind == wire.SEND and len(rows) > self._limits.send_messages_max:
            what = f"a SEND has {len(rows)} messages"
            raise LimitExceeded("native.send_messages_max", self._limits.send_messages_max, what)
        if kind == wire.COMMIT and len(rows) > self._transaction_messages_max:
            what = f"a transaction has {len(rows)} messages"
            raise LimitExceeded("limits.transaction_messages_max", self._transaction_messages_max, what)

    def _misplaced(self, kind: int) -> str:
        if self.state == NEW:
            return f"the first frame must be HELLO (type {wire.HELLO}), not one of type {kind}"
        if kind == wire.HELLO:
            return "a second HELLO: a connection is opened once"
        return f"a client sends no frames of type {kind}"

    def _close(self) -> None:
        self.state = CLOSED
        self._cutter = FrameCutter(0, "native.frame_bytes_max")
        self._opening.clear()
        self._rest = None

    # ---- output

    def data_to_send(self) -> bytes:
        """What the session has to say; empties the output."""
        data = b"".join(self._output)
        self._output.clear()
        return data

    def accept(self, options: Mapping[str, Any]) -> None:
        """Answer `Opening` with WELCOME."""
        if self.state != OPENING:
            raise RuntimeError(f"accept() answers an Opening event; the session is {self.state}")
        self._output.append(encode_welcome(self._version, options))
        self._cutter.bytes_max = self._limits.frame_bytes_max
        self._cutter.limit = "native.frame_bytes_max"
        self.state = OPEN

    def error(self, error: BrokerError) -> None:
        """Say ERROR, after which nothing is read any more; the owner closes the connection once it is sent."""
        self._close()
        self._output.append(error_frame(error))


def error_frame(error: BrokerError) -> bytes:
    """The ERROR frame that tells an error: where another replica leads, with its name and its URLs for native clients."""
    details: dict[str, Any] = {}
    if isinstance(error, NotLeader):
        urls = [url for url in error.urls if url.startswith(URL_SCHEME)]
        details = {"leader": error.leader, "urls": urls}
    return encode_error(error.code, str(error).encode("utf-8", "replace").decode(), details)


def _opening(hello: Hello) -> Opening:
    version = next((each for each in VERSIONS if each in hello.versions), None)
    if version is None:
        ours, theirs = (", ".join(map(str, versions)) or "none" for versions in (VERSIONS, hello.versions[:16]))
        raise ProtocolError(f"this broker speaks version {ours} of the protocol, and the client offers {theirs}")
    options = hello.options
    software, login, passcode, producer = (
        text(options.get(name, ""), name) for name in ("software", "login", "passcode", "producer")
    )
    client_id = text(options.get("client_id", ""), "client_id", CLIENT_ID_MAX)
    heartbeat = options.get("heartbeat", 0)
    fits = heartbeat.__class__ in (int, float) and math.isfinite(heartbeat) and 0 <= heartbeat <= HEARTBEAT_MAX
    if not fits:
        raise ProtocolError(f"heartbeat must be seconds from 0 to {HEARTBEAT_MAX:g}")
    if producer and not _PRODUCER.fullmatch(producer):
        raise ProtocolError("producer must be 16 to 64 letters, digits, - and _, hard to guess")
    new = options.get("producer_new", False)
    if new.__class__ is not bool:
        raise ProtocolError("producer_new must be true or false")
    return Opening(version, software, login, passcode, client_id, float(heartbeat), producer, new)
