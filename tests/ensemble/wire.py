"""A STOMP client of the simplest kind that knows several addresses and doubts a silent server. Nothing of pybroker is used.

Owns one session. Unlike `tests.crash.wire.Connection`, whose parser it borrows, it asks for heart-beats: behind a cut, or with
a broker that is stopped, a connection does not end, it only falls silent.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time

from tests.crash.wire import Disconnected, Frame, FrameParser

CONNECT_TIMEOUT = 0.5  # seconds to reach a host, behind a cut there is none
SESSION_TIMEOUT = 0.8  # seconds until CONNECTED: a broker that is stopped still lets the kernel accept connections
SEND_TIMEOUT = 2.0  # seconds for which the server may take no bytes
HEARTBEAT_MS = 250  # asked of the server
SILENCE = 0.8  # seconds after which a server that should send heart-beats is given up
RECEIPT_TIMEOUT = 10.0

Address = tuple[str, int]


class Connection:
    """One session. Raises Disconnected when there is nobody, no more, or nobody who speaks.

    address  of the server
    opened   when connecting began (the clock is the same for all programs on the machine)
    error    what the server's ERROR frame said, or ""
    """

    def __init__(self, address: Address, client_id: str = "") -> None:
        self.address = address
        self.opened = time.monotonic()
        self.error = ""
        self._parser = FrameParser()
        self._ended = False
        try:
            self._socket = socket.create_connection(address, CONNECT_TIMEOUT)
        except OSError as error:
            raise Disconnected(str(error)) from error
        self._socket.settimeout(SEND_TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.heard = time.monotonic()
        try:
            headers = [("accept-version", "1.2"), ("host", "localhost"), ("heart-beat", f"0,{HEARTBEAT_MS}")]
            self.send("CONNECT", *headers, *([("client-id", client_id)] if client_id else []))
            frames = self.wait(SESSION_TIMEOUT)
            if not frames or frames[0].command != "CONNECTED":
                raise Disconnected(f"no session: {frames}")
        except Disconnected:
            self.close()
            raise

    def send(self, command: str, *headers: tuple[str, str], body: bytes = b"") -> None:
        lines = "".join(f"{name}:{value}\n" for name, value in headers)
        if body:
            lines += f"content-length:{len(body)}\n"
        try:
            self._socket.sendall(f"{command}\n{lines}\n".encode() + body + b"\0")
        except TimeoutError as error:  # half a frame may have gone: nothing more can
            self.close()
            raise Disconnected("it takes nothing") from error
        except OSError:
            pass  # what has come in meanwhile is still to be read; `wait` meets the end

    def wait(self, timeout: float) -> list[Frame]:
        """Frames that have come, after at most `timeout` seconds; none when there were none."""
        until = time.monotonic() + timeout
        while True:
            if self._ended:
                raise Disconnected(self.error)
            now = time.monotonic()
            end = self.heard + SILENCE
            if not self._readable(max(min(until, end) - now, 0)):
                if time.monotonic() > end:
                    self.close()
                    raise Disconnected("silent")
                if time.monotonic() > until:
                    return []
                continue
            frames = self._read()
            if frames:
                return frames

    def _readable(self, timeout: float) -> bool:
        try:
            return bool(select.select([self._socket], [], [], timeout)[0])
        except ValueError as error:  # closed by `send`
            raise Disconnected from error

    def _read(self) -> list[Frame]:
        try:
            data = self._socket.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            self._ended = True
            self.close()
            return []
        self.heard = time.monotonic()
        frames = [frame for _, frame in self._parser.feed(data)]
        for number, frame in enumerate(frames):
            if frame.command == "ERROR":
                self._ended = True
                self.error = f"{frame.headers.get('message')}: {frame.body.decode(errors='replace')}"
                return frames[:number]
        return frames

    def receipt(self, id: str, timeout: float = RECEIPT_TIMEOUT) -> list[Frame]:
        """Wait for a receipt; what else came with it."""
        until = time.monotonic() + timeout
        others: list[Frame] = []
        found = False
        while not found:
            for frame in self.wait(max(until - time.monotonic(), 0)):
                if frame.command == "RECEIPT" and frame.headers["receipt-id"] == id:
                    found = True
                else:
                    others.append(frame)
            if not found and time.monotonic() > until:
                self.close()
                raise Disconnected(f"no receipt {id} within {timeout} s")
        return others

    def close(self) -> None:
        self._ended = True
        with contextlib.suppress(OSError):
            self._socket.close()
