"""The server's side of one STOMP connection: which frame may come when, what it asks for, and the replies.

Owns the session's state, version negotiation, and the frames that a server sends. It must never know queues,
subscriptions or transactions: identifiers go through to the core unchecked. What a frame's headers ask for is in
`stomp_send` and `stomp_requests`. Follows "Connecting", "Server Frames" and "Heart-beating" of STOMP 1.0, 1.1 and 1.2 (https://stomp.github.io).

Decisions where the specifications leave room:

* ``host`` is not demanded in CONNECT: there are no virtual hosts, and ActiveMQ and RabbitMQ take its absence too.
* A body on a frame that can't have one is an error; in 1.0, which says "ignored", it is.
* Before the version is known an ERROR frame is not escaped, as CONNECTED is not.
"""

from __future__ import annotations

from collections.abc import Mapping

from pybroker.config import StompLimits
from pybroker.errors import BrokerError, ProtocolError
from pybroker.message import PRIORITY_DEFAULT, Message
from pybroker.protocols.stomp_events import Ack, Connect, Disconnect, Event, Failed, Send
from pybroker.protocols.stomp_frames import FrameReader
from pybroker.protocols.stomp_headers import (
    HEARTBEAT,
    VERSIONS,
    Headers,
    block_for,
    decode_head,
    encode_frame,
    encode_pair,
    shown,
)
from pybroker.protocols.stomp_requests import first, parse_heart_beat, parse_request
from pybroker.protocols.stomp_send import HeaderMemo, read_send

_BEFORE_CONNECT = {b"CONNECT": False, b"STOMP": False}
_SESSION_COMMANDS = (b"SEND", b"SUBSCRIBE", b"UNSUBSCRIBE", b"ACK", b"NACK", b"BEGIN", b"COMMIT", b"ABORT")
_AFTER_CONNECT: Mapping[str, Mapping[bytes, bool]] = {
    # Whether a frame may have a body. CONNECT is among them so that a second one gets an answer of its own.
    "1.2": {name: name == b"SEND" for name in (*_SESSION_COMMANDS, b"DISCONNECT", b"CONNECT", b"STOMP")},
    "1.1": {name: name == b"SEND" for name in (*_SESSION_COMMANDS, b"DISCONNECT", b"CONNECT", b"STOMP")},
    "1.0": {name: True for name in (*_SESSION_COMMANDS, b"DISCONNECT", b"CONNECT") if name != b"NACK"},
}
_BACKSLASH, _COLON, _CR = 92, 58, 13
_DESTINATIONS_MAX = 16  # encoded destinations that a session remembers
_JOIN_BYTES_MIN = 16_384  # bodies from this size on are joined, not formatted: one copy less


class StompSession:
    """One connection's protocol state. Give it bytes, take events, send its output.

    ::

        session.receive_data(data)
        while events := session.next_events(cap):
            ...handle them, calling accept(), receipt() or error()...
            send(session.data_to_send())

    Read until `next_events` returns nothing before giving it more data: that bounds ``buffered_bytes`` to one
    frame and one read. After a `Connect` event nothing is read until `accept`; after `error`, a `Failed` or a
    `Disconnect` event nothing is read any more, and further data is dropped.

    ``memo`` may be shared by all sessions with the same limits and ``durable_default``.
    ``heartbeat_send_ms`` and ``heartbeat_receive_ms`` are the negotiated intervals, 0 = none.
    """

    def __init__(
        self,
        limits: StompLimits,
        *,
        durable_default: bool,
        server: str = "pybroker",
        memo: HeaderMemo | None = None,
    ) -> None:
        self._durable_default = durable_default
        self._server = server
        self._heartbeat_min_ms = limits.heartbeat_min_ms
        self._reader = FrameReader(limits)
        self._reader.expect(_BEFORE_CONNECT, None)
        self._memo = HeaderMemo() if memo is None else memo
        self._memo_table = self._memo.table("1.2")
        self._output: list[bytes] = []
        self._state = "new"  # -> "connecting" (Connect was given out) -> "connected" -> "closed"
        self._client_id: str | None = None
        self._negotiated = "1.2"
        self._said_error = False
        self._failure: bytes | None = None  # the ERROR frame of a `Failed` event
        self._destinations: dict[str, bytes] = {}
        self.version: str | None = None  # negotiated; None before CONNECT
        self.heartbeat_send_ms = 0
        self.heartbeat_receive_ms = 0

    # Input.

    @property
    def buffered_bytes(self) -> int:
        """Bytes received and not yet turned into events."""
        return self._reader.buffered_bytes

    @property
    def closed(self) -> bool:
        """Whether no more input is read: after `error`, `Failed` or `Disconnect`."""
        return self._state == "closed"

    def receive_data(self, data: bytes) -> None:
        """Take bytes from the peer; ``b""`` is the end of its stream."""
        self._reader.receive(data)

    def next_events(self, count_max: int) -> list[Event]:
        """At most ``count_max`` events; none when more data (or the answer to `Connect`) is needed. Never raises."""
        if self._state == "closed" or self._state == "connecting":
            return []
        reader = self._reader
        version = self.version
        frames = reader.read(count_max if version else min(count_max, 1))
        table = self._memo_table
        events: list[Event] = []
        receipt: bytes | None
        head = b"\n"
        try:
            for command, head, body in frames:
                lines = head
                receipt = None
                at = lines.find(b"\nreceipt:")
                if at >= 0 and version:
                    stop = lines.find(b"\n", at + 9)
                    receipt = lines[at + 9 : stop]
                    lines = lines[:at] + lines[stop:]
                    if (
                        _BACKSLASH in receipt
                        or _COLON in receipt
                        or _CR in receipt
                        or not receipt.isascii()
                        or version == "1.0"
                    ):
                        receipt = self._canonical_receipt(receipt)
                if command == b"SEND":
                    known = table.get(lines)
                    if known is None:
                        known = read_send(lines, version, self._durable_default, self._memo, table)
                    destination, block, durable, priority, expires, transaction, numbered = known
                    message = Message(destination, body, block, durable, priority, expires)
                    events.append(Send(message, transaction, receipt, numbered))
                    continue
                if command == b"ACK" and lines.startswith(b"\nid:") and version == "1.2":
                    ack_id = lines[4:-1]
                    if not (10 in ack_id or _BACKSLASH in ack_id) and ack_id.isascii() and ack_id:
                        events.append(Ack(ack_id, None, None, None, receipt))
                        continue
                if version is None:
                    events.append(self._connect(decode_head(lines, None)))
                    return events
                event = parse_request(command, decode_head(lines, version), version, self._client_id, receipt)
                events.append(event)
                if type(event) is Disconnect:
                    self._close()
                    return events
        except BrokerError as error:
            events.append(self._fail(error, head))
            return events
        if reader.failure is not None:
            events.append(self._fail(reader.failure, reader.failed_head))
        return events

    # Output.

    def data_to_send(self) -> bytes:
        """What the session has to say; empties the output."""
        output = self._output
        if not output:
            return b""
        data = output[0] if len(output) == 1 else b"".join(output)
        output.clear()
        return data

    def accept(self, session_id: str) -> None:
        """Answer `Connect` with CONNECTED. ``session_id`` must be unique; it has no line feed."""
        if self._state != "connecting":
            raise RuntimeError(f"accept() answers a Connect event; the session is {self._state}")
        version = self._negotiated
        headers = [("version", version), ("session", session_id), ("server", self._server)]
        if version != "1.0":
            headers.insert(1, ("heart-beat", f"{self._heartbeat_min_ms},{self._heartbeat_min_ms}"))
        self._output.append(encode_frame("CONNECTED", headers, None))
        self.version = version
        self._state = "connected"
        self._memo_table = self._memo.table(version)
        self._reader.expect(_AFTER_CONNECT[version], version)

    def receipt(self, receipt_id: bytes) -> None:
        """Confirm a frame: ``receipt_id`` is the event's ``receipt``."""
        self._output.append(self.receipt_frame(receipt_id))

    def receipt_frame(self, receipt_id: bytes) -> bytes:
        """One RECEIPT frame; it is returned, not added to the output (where an ERROR may wait for its turn)."""
        return b"RECEIPT\nreceipt-id:" + receipt_id + b"\n\n\0"

    def error(self, error: BrokerError | str, receipt_id: bytes | None = None) -> None:
        """Say ERROR, after which nothing is read any more; the owner closes the connection once it is sent.

        After an ERROR nothing more is said. One of a `Failed` event that is still in the output gives way: its frame
        came after the one that this error is about, or was not reached.
        """
        if self._failure is not None and self._output and self._output[-1] is self._failure:
            self._output.pop()
            self._failure = None
            self._said_error = False
        text = str(error).encode("utf-8", "replace").decode()
        code = error.code if isinstance(error, BrokerError) else BrokerError.code
        self._error([("message", text), ("code", code)], text, receipt_id)

    def heartbeat(self) -> None:
        """Say that this side is alive."""
        self._output.append(HEARTBEAT)

    def message_head(self, subscription_id: str | None) -> bytes:
        """The start of all MESSAGE frames of one subscription, for `message_frame`."""
        if subscription_id is None:
            return b"MESSAGE\n"
        return b"MESSAGE\n" + encode_pair("subscription", subscription_id, self.version).encode()

    def message_frame(
        self, head: bytes, message: Message, redelivered: bool, deliveries: int, ack_id: bytes | None
    ) -> bytes:
        """One MESSAGE frame; it is returned, not added to the output.

        ``message.message_id`` and ``ack_id`` go out as they are: they must be printable ASCII without colon and
        backslash. ``ack_id`` is said in 1.2 only. ``deliveries`` counts this one; it goes out (``delivery-count``)
        when the message is redelivered. A priority or expiry that the sender did not give as a header is added.
        """
        destination = self._destinations.get(message.destination)
        if destination is None:
            destination = self._encoded_destination(message.destination)
        block = message.header_block
        if _BACKSLASH in block and self.version != "1.2":
            block = block_for(block, self.version)
        if message.priority != PRIORITY_DEFAULT or message.expires:
            block = _with_properties(block, message)
        if ack_id is not None and self.version == "1.2":
            head = b"%back:%b\n" % (head, ack_id)
        if redelivered:
            head = b"%bredelivered:true\ndelivery-count:%d\n" % (head, deliveries)
        else:
            head += b"redelivered:false\n"
        body = message.body
        if len(body) >= _JOIN_BYTES_MIN:
            start = b"%bmessage-id:%b%b%d\ncontent-length:%d\n%b\n" % (
                head,
                message.message_id,
                destination,
                message.timestamp,
                len(body),
                block,
            )
            return b"".join((start, body, b"\0"))
        return b"%bmessage-id:%b%b%d\ncontent-length:%d\n%b\n%b\0" % (
            head,
            message.message_id,
            destination,
            message.timestamp,
            len(body),
            block,
            body,
        )

    def browser_end_frame(self, head: bytes, destination: str) -> bytes:
        """The MESSAGE that ends a queue browser, as ActiveMQ has it; it is returned, not added to the output."""
        named = encode_pair("destination", destination, self.version).encode()
        return head + b"browser:end\n" + named + b"message-id:0\ncontent-length:0\n\n\0"

    # Within.

    def _encoded_destination(self, destination: str) -> bytes:
        encoded = b"\n" + encode_pair("destination", destination, self.version).encode() + b"timestamp:"
        if len(self._destinations) >= _DESTINATIONS_MAX:
            self._destinations.clear()
        self._destinations[destination] = encoded
        return encoded

    def _canonical_receipt(self, raw: bytes) -> bytes:
        """Check a receipt that is not plain, and escape it as RECEIPT will."""
        ((_, value),) = decode_head(b"\nreceipt:" + raw + b"\n", self.version)
        if self.version == "1.0":
            value = value.strip(" ")
        return encode_pair("", value, self.version).encode()[1:-1]

    def _fail(self, error: BrokerError, head: bytes) -> Failed:
        """Tell the peer what it did wrong, with the receipt of the frame at fault, and read nothing more."""
        receipt = None
        at = head.find(b"\nreceipt:")
        if at >= 0 and self.version:
            try:
                receipt = self._canonical_receipt(head[at + 9 : head.find(b"\n", at + 9)])
            except ProtocolError:
                receipt = None  # it is itself what is wrong
        if isinstance(error, _NoCommonVersion):
            text = "Supported protocol versions are " + " ".join(VERSIONS)
            headers = [("version", ",".join(VERSIONS)), ("message", str(error)), ("code", error.code)]
            self._error(headers, text, None)
        else:
            self.error(error, receipt)
        self._failure = self._output[-1]
        return Failed(error)

    def _error(self, headers: Headers, text: str, receipt_id: bytes | None) -> None:
        if self._said_error:
            return
        self._said_error = True
        frame = encode_frame("ERROR", [*headers, ("content-type", "text/plain")], self.version, text.encode())
        if receipt_id is not None:
            frame = b"ERROR\nreceipt-id:" + receipt_id + frame[5:]
        self._output.append(frame)
        self._close()

    def _close(self) -> None:
        self._state = "closed"
        self._reader.stop()

    def _connect(self, headers: Headers) -> Connect:
        offered = first(headers, "accept-version")
        if offered is None:
            version = "1.0"
            headers = [(name, value.strip(" ")) for name, value in headers]
        else:
            names = {name.strip() for name in offered.split(",")}
            common = [name for name in VERSIONS if name in names]
            if not common:
                raise _NoCommonVersion(
                    f"accept-version {shown(offered)} has no version that is spoken here: {', '.join(VERSIONS)}"
                )
            version = common[0]
        can_send, wants = (0, 0) if version == "1.0" else parse_heart_beat(first(headers, "heart-beat"))
        minimum = self._heartbeat_min_ms
        self.heartbeat_send_ms = max(minimum, wants) if minimum and wants else 0
        self.heartbeat_receive_ms = max(minimum, can_send) if minimum and can_send else 0
        self._negotiated = version
        self._client_id = first(headers, "client-id") or None
        self._state = "connecting"
        return Connect(
            version,
            first(headers, "login"),
            first(headers, "passcode"),
            first(headers, "host"),
            self._client_id,
            (can_send, wants),
            headers,
        )


class _NoCommonVersion(ProtocolError):
    """None of the versions that the peer offers is spoken here."""


def _with_properties(block: bytes, message: Message) -> bytes:
    """The header block with a priority and an expiry that were set in process, not by a header."""
    lines = b"\n" + block
    if message.expires and lines.find(b"\nexpires:") < 0:
        block = b"expires:%d\n%b" % (message.expires, block)
    if message.priority != PRIORITY_DEFAULT and lines.find(b"\npriority:") < 0:
        block = b"priority:%d\n%b" % (message.priority, block)
    return block
