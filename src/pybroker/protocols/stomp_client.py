"""The client's side of one STOMP connection, for the command line and for tests: bytes in, events out, bytes out.

Owns what a client says in each version and what it makes of a server's frames. It must never wait, retry or keep
messages. Follows "Client Frames" and "Server Frames" of STOMP 1.0, 1.1 and 1.2 (https://stomp.github.io).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pybroker.config import StompLimits
from pybroker.errors import BrokerError, ProtocolError
from pybroker.protocols.stomp_events import AckMode, Event, Failed
from pybroker.protocols.stomp_frames import FrameReader
from pybroker.protocols.stomp_headers import VERSIONS, Headers, decode_head, encode_frame
from pybroker.protocols.stomp_requests import first, parse_heart_beat

HeadersInput = Mapping[str, str] | Iterable[tuple[str, str]]

_BEFORE_CONNECTED = {b"CONNECTED": False, b"ERROR": True}
_AFTER_CONNECTED = {b"MESSAGE": True, b"RECEIPT": False, b"ERROR": True}
# 1.0 and its servers know no rule on bodies.
_AFTER_CONNECTED_1_0 = dict.fromkeys(_AFTER_CONNECTED, True)


class Connected(Event):
    """CONNECTED: the session is open."""

    __slots__ = ("headers", "server", "session", "version")

    def __init__(self, version: str, session: str | None, server: str | None, headers: Headers) -> None:
        self.version = version
        self.session = session
        self.server = server
        self.headers = headers


class MessageReceived(Event):
    """MESSAGE: all headers in order, and the body."""

    __slots__ = ("body", "headers")

    def __init__(self, headers: Headers, body: bytes) -> None:
        self.headers = headers
        self.body = body

    def header(self, name: str) -> str | None:
        """The first header of that name, or None."""
        return first(self.headers, name)


class ReceiptReceived(Event):
    """RECEIPT: the frame that asked for it was handled."""

    __slots__ = ("receipt_id",)

    def __init__(self, receipt_id: str) -> None:
        self.receipt_id = receipt_id


class ErrorReceived(Event):
    """ERROR: the last event; the server closes the connection."""

    __slots__ = ("body", "headers", "message")

    def __init__(self, message: str, headers: Headers, body: bytes) -> None:
        self.message = message
        self.headers = headers
        self.body = body

    def header(self, name: str) -> str | None:
        """The first header of that name, or None."""
        return first(self.headers, name)


class StompClientSession:
    """One connection's protocol state on the client's side; `RuntimeError` when it is used out of order.

    Methods named like frames add them to the output (`data_to_send`). ``receipt`` asks for a `ReceiptReceived` with
    that id. The events are `Connected`, `MessageReceived`, `ReceiptReceived`, `ErrorReceived` and `Failed` (the
    server broke the protocol).
    """

    def __init__(self, limits: StompLimits | None = None) -> None:
        self._reader = FrameReader(StompLimits() if limits is None else limits)
        self._reader.expect(_BEFORE_CONNECTED, None)
        self._output: list[bytes] = []
        self._state = "new"  # -> "connecting" -> "connected" -> "disconnecting"; or "closed"
        self._heart_beat = (0, 0)
        self._offered: tuple[str, ...] = ()
        self.version: str | None = None
        self.heartbeat_send_ms = 0
        self.heartbeat_receive_ms = 0

    def connect(
        self,
        host: str = "localhost",
        login: str | None = None,
        passcode: str | None = None,
        *,
        client_id: str | None = None,
        heart_beat: tuple[int, int] = (0, 0),
        versions: Iterable[str] = VERSIONS,
        headers: HeadersInput = (),
    ) -> None:
        """Ask for a session. ``versions=("1.0",)`` sends no accept-version, as a 1.0 client does."""
        if self._state != "new":
            raise RuntimeError("connect() comes once, before all else")
        offered = tuple(sorted(versions))
        if not offered or not set(offered) <= set(VERSIONS):
            raise ValueError(f"versions must be some of {', '.join(VERSIONS)}, not {offered}")
        lines: Headers = []
        if offered != ("1.0",):
            lines += [("accept-version", ",".join(offered)), ("host", host)]
            lines.append(("heart-beat", f"{heart_beat[0]},{heart_beat[1]}"))
        for name, value in (("login", login), ("passcode", passcode), ("client-id", client_id)):
            if value is not None:
                lines.append((name, value))
        lines += _pairs(headers)
        if any("\n" in text or ":" in name for name, value in lines for text in (name, value)):
            raise ValueError("a CONNECT header can't have a line feed, nor its name a colon: STOMP can't escape them")
        self._offered = offered
        self._heart_beat = heart_beat
        self._state = "connecting"
        self._output.append(encode_frame("CONNECT", lines, None))

    def send(
        self,
        destination: str,
        body: bytes,
        headers: HeadersInput = (),
        *,
        transaction: str | None = None,
        receipt: str | None = None,
    ) -> None:
        """Send a message. ``headers`` may say persistent, priority and expires."""
        lines = [("destination", destination), ("transaction", transaction), *_pairs(headers)]
        self._say("SEND", lines, receipt, body)

    def subscribe(
        self,
        destination: str,
        id: str,
        ack: AckMode = "auto",
        headers: HeadersInput = (),
        *,
        receipt: str | None = None,
    ) -> None:
        """Ask for the messages of a destination."""
        self._say("SUBSCRIBE", [("id", id), ("destination", destination), ("ack", ack), *_pairs(headers)], receipt)

    def unsubscribe(self, id: str, headers: HeadersInput = (), *, receipt: str | None = None) -> None:
        """End a subscription."""
        self._say("UNSUBSCRIBE", [("id", id), *_pairs(headers)], receipt)

    def ack(self, message: MessageReceived, *, transaction: str | None = None, receipt: str | None = None) -> None:
        """Say that a message was handled (mode ``client``: and all before it)."""
        self._say("ACK", [*self._delivery(message), ("transaction", transaction)], receipt)

    def nack(self, message: MessageReceived, *, transaction: str | None = None, receipt: str | None = None) -> None:
        """Say that a message was not handled; from 1.1."""
        if self.version == "1.0":
            raise RuntimeError("STOMP 1.0 has no NACK")
        self._say("NACK", [*self._delivery(message), ("transaction", transaction)], receipt)

    def begin(self, transaction: str, *, receipt: str | None = None) -> None:
        """Open a transaction."""
        self._say("BEGIN", [("transaction", transaction)], receipt)

    def commit(self, transaction: str, *, receipt: str | None = None) -> None:
        """Make a transaction's sends and acknowledgements count."""
        self._say("COMMIT", [("transaction", transaction)], receipt)

    def abort(self, transaction: str, *, receipt: str | None = None) -> None:
        """Drop a transaction."""
        self._say("ABORT", [("transaction", transaction)], receipt)

    def disconnect(self, receipt: str | None = None) -> None:
        """Say that nothing more is sent. With a receipt the client learns that all before it was handled."""
        self._say("DISCONNECT", [], receipt)
        self._state = "disconnecting"

    def heartbeat(self) -> None:
        """Say that this side is alive."""
        self._output.append(b"\n")

    def data_to_send(self) -> bytes:
        """What the session has to say; empties the output."""
        data = b"".join(self._output)
        self._output.clear()
        return data

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the server; ``b""`` is the end of its stream."""
        self._reader.receive(data)

    @property
    def buffered_bytes(self) -> int:
        """Bytes received and not yet turned into events."""
        return self._reader.buffered_bytes

    def next_events(self, count_max: int) -> list[Event]:
        """At most ``count_max`` events; none when more data is needed. Never raises."""
        if self._state == "closed":
            return []
        events: list[Event] = []
        frames = self._reader.read(count_max if self.version else min(count_max, 1))
        try:
            for command, head, body in frames:
                events.append(self._event(command, head, body))
                if self._state == "closed":
                    return events
            if self._reader.failure is not None:
                raise self._reader.failure
        except BrokerError as error:
            events.append(Failed(error))
            self._close()
        return events

    def _event(self, command: bytes, head: bytes, body: bytes) -> Event:
        if command == b"CONNECTED":
            return self._connected(decode_head(head, None))
        headers = decode_head(head, self.version)
        if command == b"MESSAGE":
            return MessageReceived(headers, body)
        if command == b"RECEIPT":
            receipt_id = first(headers, "receipt-id")
            if receipt_id is None:
                raise ProtocolError("the server's RECEIPT frame has no header receipt-id")
            return ReceiptReceived(receipt_id)
        self._close()
        return ErrorReceived(first(headers, "message") or "", headers, body)

    def _connected(self, headers: Headers) -> Connected:
        if self._state != "connecting":
            raise ProtocolError("the server sent CONNECTED before CONNECT")
        version = first(headers, "version") or "1.0"
        if version not in self._offered:
            raise ProtocolError(f"the server took version {version}, which was not offered")
        can_send, wants = parse_heart_beat(first(headers, "heart-beat"))
        mine, want = self._heart_beat
        self.heartbeat_send_ms = max(mine, wants) if mine and wants else 0
        self.heartbeat_receive_ms = max(want, can_send) if want and can_send else 0
        self.version = version
        self._state = "connected"
        self._reader.expect(_AFTER_CONNECTED_1_0 if version == "1.0" else _AFTER_CONNECTED, version)
        return Connected(version, first(headers, "session"), first(headers, "server"), headers)

    def _delivery(self, message: MessageReceived) -> list[tuple[str, str | None]]:
        """The headers that name a delivery: each version has its own."""
        names = {"1.2": (("id", "ack"),), "1.1": (("subscription",) * 2, ("message-id",) * 2)}
        pairs = names.get(self.version or "", (("message-id",) * 2,))
        lines: list[tuple[str, str | None]] = [(name, message.header(source)) for name, source in pairs]
        if any(value is None for _, value in lines):
            raise ValueError("the message has no delivery to acknowledge: was it subscribed to with ack=auto?")
        return lines

    def _say(
        self, command: str, headers: list[tuple[str, str | None]], receipt: str | None, body: bytes | None = None
    ) -> None:
        if self._state != "connected":
            raise RuntimeError(f"{command} needs an open session; this one is {self._state}")
        lines = [(name, value) for name, value in (*headers, ("receipt", receipt)) if value is not None]
        self._output.append(encode_frame(command, lines, self.version, body))

    def _close(self) -> None:
        self._state = "closed"
        self._reader.stop()


def _pairs(headers: HeadersInput) -> list[tuple[str, str]]:
    return list(headers.items() if isinstance(headers, Mapping) else headers)
