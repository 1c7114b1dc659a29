"""The STOMP 1.2 bytes of the load generator: prebuilt frames, the frame scanner, a blocking connection.

Follows the STOMP 1.2 specification as far as a generator of its own messages needs it. Must never cost more than the
broker that it loads: no parsing of headers that nobody asks for, no object per header.

Frame ends are found by NUL alone, without content-length. That is exact here, and only here, because every body that
the generator sends is its own and free of NUL, and headers cannot hold one. `Expected` then compares each received
body with the one that was sent at its place, so a frame that was cut wrongly, lost, repeated, reordered or changed is
an error and never a wrong count.
"""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

CHUNK_MESSAGES = 100  # messages in one prebuilt chunk; the last SEND of a chunk asks for the receipt
CYCLE_CHUNKS = 64  # chunks before bodies and receipt names repeat
CYCLE_MESSAGES = CHUNK_MESSAGES * CYCLE_CHUNKS
READ_BYTES = 1 << 18


class LoadError(Exception):
    """What came back is not what was sent, or nothing came in time."""


def body(number: int, size: int) -> bytes:
    """The body of message `number`: its number in the cycle, filled up to `size` bytes (at least 8)."""
    return (b"%08d" % (number % CYCLE_MESSAGES)).ljust(size, b"x")


def connect_frame(host: str = "localhost") -> bytes:
    """CONNECT without heart-beats."""
    return b"CONNECT\naccept-version:1.2\nhost:%b\nheart-beat:0,0\n\n\0" % host.encode()


def send_frame(destination: str, payload: bytes, persistent: bool, receipt: str = "", extra: bytes = b"") -> bytes:
    """SEND. `extra` is one more header line, or nothing."""
    lines = [b"SEND", b"destination:" + destination.encode(), b"content-length:%d" % len(payload)]
    lines.append(b"persistent:true" if persistent else b"persistent:false")
    if extra:
        lines.append(extra)
    if receipt:
        lines.append(b"receipt:" + receipt.encode())
    return b"\n".join(lines) + b"\n\n" + payload + b"\0"


def subscribe_frame(destination: str, ack: str, receipt: str) -> bytes:
    """SUBSCRIBE with id 0. `ack` is ``auto`` or ``client-individual``."""
    return b"SUBSCRIBE\nid:0\ndestination:%b\nack:%b\nreceipt:%b\n\n\0" % (
        destination.encode(),
        ack.encode(),
        receipt.encode(),
    )


def disconnect_frame(receipt: str) -> bytes:
    """DISCONNECT with a receipt: all frames before it were handled when the receipt comes."""
    return b"DISCONNECT\nreceipt:%b\n\n\0" % receipt.encode()


def chunk_cycle(destination: str, size: int, persistent: bool, receipts: bool, distinct: bool = False) -> list[bytes]:
    """All chunks of one cycle, ready to be sent. With `receipts` chunk n asks for the receipt ``r<n>``.

    With `distinct` each SEND of the cycle carries a header of its own, so that no two header blocks are equal.
    """
    chunks = []
    for chunk in range(CYCLE_CHUNKS):
        frames = []
        for number in range(chunk * CHUNK_MESSAGES, (chunk + 1) * CHUNK_MESSAGES):
            receipt = f"r{chunk}" if receipts and (number + 1) % CHUNK_MESSAGES == 0 else ""
            extra = b"correlation-id:%08d" % number if distinct else b""
            frames.append(send_frame(destination, body(number, size), persistent, receipt, extra))
        chunks.append(b"".join(frames))
    return chunks


def acknowledgements(frames: list[bytes]) -> bytes:
    """One ACK frame for each MESSAGE frame, by its `ack` header (STOMP 1.2, section ACK)."""
    ids = []
    for frame in frames:
        start = frame.index(b"\nack:") + 5
        ids.append(frame[start : frame.index(b"\n", start)])
    return b"ACK\nid:" + b"\n\n\0ACK\nid:".join(ids) + b"\n\n\0"


class Scanner:
    """Cuts a byte stream into frames at NUL. Bytes in, whole frames out; what is left waits for the next bytes."""

    __slots__ = ("frame_count", "rest")

    def __init__(self) -> None:
        self.rest = b""
        self.frame_count = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The frames that `data` completes, in order, without their NUL. Line ends before a frame may stay on it."""
        frames = (self.rest + data).split(b"\0")
        self.rest = frames.pop()
        self.frame_count += len(frames)
        return frames


class Expected:
    """Checks MESSAGE frames against what was sent: the same bodies in the same order, none missing, none twice."""

    __slots__ = ("_bodies", "_plain", "_prefix", "_size", "received")

    def __init__(self, size: int) -> None:
        self._size = size
        self._plain = [body(number, size) for number in range(CYCLE_MESSAGES)]
        self._prefix = b""
        self._bodies = self._plain * 2  # so that a run across the end of the cycle is one slice
        self.received = 0

    def take(self, frames: list[bytes]) -> None:
        """Count these frames. Raises LoadError for any other frame than the MESSAGE expected at its place."""
        start = -self._size - 2
        self.take_bodies([frame[start:] for frame in frames], b"\n\n", frames)

    def take_bodies(self, bodies: list[bytes], prefix: bytes = b"", frames: list[bytes] | None = None) -> None:
        """Count these bodies, each behind `prefix`. `frames` are shown when one is wrong."""
        if prefix != self._prefix:
            self._bodies = [prefix + plain for plain in self._plain] * 2
            self._prefix = prefix
        for first in range(0, len(bodies), CYCLE_MESSAGES):
            part = bodies[first : first + CYCLE_MESSAGES]
            position = self.received % CYCLE_MESSAGES
            if part != self._bodies[position : position + len(part)]:
                wrong = next(i for i, got in enumerate(part) if got != self._bodies[position + i])
                shown = (frames or bodies)[first + wrong]
                raise LoadError(f"message {self.received + wrong} is not what was sent at its place: {shown[:400]!r}")
            self.received += len(part)


class Connection:
    """A STOMP connection, blocking until `nonblocking()`. Used for the hand-shake and for what is not timed."""

    def __init__(self, url: str) -> None:
        """Connect to ``stomp://HOST:PORT`` and wait for CONNECTED. Raises LoadError if it is refused."""
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname or "127.0.0.1", parts.port or 61613), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.scanner = Scanner()
        self.early: list[bytes] = []  # frames read behind the one that was waited for
        self.socket.sendall(connect_frame())
        self.wait_for(b"CONNECTED")

    def wait_for(self, command: bytes, deadline: float = 60.0) -> bytes:
        """The next frame with this command. Others stay for `take_early`: a MESSAGE may come before the RECEIPT.

        Raises LoadError for an ERROR frame, a closed connection, or none within `deadline` seconds.
        """
        ends = time.monotonic() + deadline
        looked_at = 0
        while True:
            for at in range(looked_at, len(self.early)):
                frame = self.early[at].lstrip(b"\r\n")
                if frame.startswith(command + b"\n"):
                    del self.early[at]
                    return frame
                if frame.startswith(b"ERROR\n"):
                    raise LoadError(f"expected {command.decode()}, got {frame[:400]!r}")
            looked_at = len(self.early)
            if time.monotonic() > ends:
                raise LoadError(f"no {command.decode()} frame within {deadline} s")
            data = self.socket.recv(READ_BYTES)
            if not data:
                raise LoadError(f"connection closed while waiting for {command.decode()}")
            self.early.extend(self.scanner.feed(data))

    def take_early(self) -> list[bytes]:
        """Frames that came along with the ones waited for."""
        frames, self.early = self.early, []
        return frames

    def request(self, frame: bytes, command: bytes) -> bytes:
        """Send a frame, wait for the answer."""
        self.socket.sendall(frame)
        return self.wait_for(command)

    def nonblocking(self) -> None:
        """From here on the owner of the connection reads and writes the socket itself."""
        self.socket.setblocking(False)

    def close(self) -> None:
        """Close without DISCONNECT."""
        self.socket.close()
