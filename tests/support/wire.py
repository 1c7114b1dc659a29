"""A STOMP peer that knows nothing of pybroker: sends exactly the bytes it is told to, and reads frames strictly.

Written from the specification, apart from the broker's codec, so that a fault in that one can't hide here. What a
server may not send fails at once: an unknown command, a header without a colon, an escape that the version does not
have, a body without its NUL, bytes behind the end.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

TIMEOUT = 10.0  # seconds that a test waits for what must come
SERVER_COMMANDS = {"CONNECTED", "MESSAGE", "RECEIPT", "ERROR"}
_ESCAPES = {"1.1": {"\\\\": "\\", "\\n": "\n", "\\c": ":"}, "1.2": {"\\\\": "\\", "\\n": "\n", "\\c": ":", "\\r": "\r"}}


@dataclass
class Frame:
    """One frame from the server; ``headers`` are unescaped, in order, repeats included."""

    command: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    raw: bytes = field(default=b"", repr=False)

    def __getitem__(self, name: str) -> str:
        """The first header of that name."""
        for key, value in self.headers:
            if key == name:
                return value
        raise AssertionError(f"{self.command} has no header {name}: {self.headers}")

    def get(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


class StrictReader:
    """Bytes in, frames out. ``heartbeats`` counts the line feeds between frames."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.version = "1.2"
        self.heartbeats = 0

    def feed(self, data: bytes) -> None:
        self.buffer += data

    def next_frame(self) -> Frame | None:
        buffer = self.buffer
        while buffer[:1] == b"\n":
            del buffer[:1]
            self.heartbeats += 1
        end = buffer.find(b"\n\n")
        if end < 0:
            assert b"\0" not in buffer, f"a frame ended inside its headers: {bytes(buffer)!r}"
            return None
        lines = bytes(buffer[:end]).decode().split("\n")
        command, headers = lines[0], [self._header(line, lines[0]) for line in lines[1:]]
        assert command in SERVER_COMMANDS, f"a server can't say {command!r}"
        lengths = [value for name, value in headers if name == "content-length"]
        start = end + 2
        if lengths:
            assert re.fullmatch("[0-9]+", lengths[0]), f"content-length {lengths[0]!r}"
            stop = start + int(lengths[0])
            if len(buffer) <= stop:
                return None
            assert buffer[stop] == 0, f"no NUL behind the body of {lines}"
        else:
            stop = buffer.find(b"\0", start)
            if stop < 0:
                return None
        frame = Frame(command, headers, bytes(buffer[start:stop]), bytes(buffer[: stop + 1]))
        del buffer[: stop + 1]
        if command == "CONNECTED":
            self.version = frame.get("version") or "1.0"
        assert frame.body == b"" or command in ("MESSAGE", "ERROR"), f"{command} has a body"
        return frame

    def _header(self, line: str, command: str) -> tuple[str, str]:
        name, colon, value = line.partition(":")
        assert colon, f"header without a colon: {line!r}"
        assert name, f"header without a name: {line!r}"
        table = _ESCAPES.get(self.version, {}) if command not in ("CONNECTED", "ERROR") or "\\" in line else {}
        if command == "CONNECTED" or not table:
            return name, value
        if command != "ERROR":  # an ERROR before CONNECTED is in no version
            assert ":" not in value, f"a colon that is not escaped: {line!r}"

        def replace(match: re.Match[str]) -> str:
            assert match[0] in table, f"escape {match[0]!r} is not in {self.version}"
            return table[match[0]]

        return re.sub(r"\\.?", replace, name), re.sub(r"\\.?", replace, value)


def frame(command: str, *headers: str, body: bytes = b"") -> bytes:
    """A client's frame: the headers are whole lines, ``name:value``, and go out as they are."""
    lines = "".join(line + "\n" for line in (command, *headers))
    return lines.encode() + b"\n" + body + b"\0"


def connect_frame(version: str = "1.2", *headers: str) -> bytes:
    accept = () if version == "1.0" else (f"accept-version:{version}", "host:localhost")
    return frame("CONNECT", *accept, *headers)


class Peer:
    """A peer in a trio test."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.reader = StrictReader()
        self.ended = False

    async def send(self, data: bytes) -> None:
        with trio.fail_after(TIMEOUT):
            await self.stream.send_all(data)

    async def open(self, version: str = "1.2", *headers: str) -> Frame:
        """CONNECT, and wait for CONNECTED."""
        await self.send(connect_frame(version, *headers))
        connected = await self.frame()
        assert connected.command == "CONNECTED", connected
        return connected

    async def frame(self, timeout: float = TIMEOUT) -> Frame:
        """The next frame. The end of the stream before it is an error, a reset too."""
        with trio.fail_after(timeout):
            while (found := self.reader.next_frame()) is None:
                data = await self.stream.receive_some(65_536)
                assert data, f"the connection ended; left: {bytes(self.reader.buffer)!r}"
                self.reader.feed(bytes(data))
        return found

    async def frames(self, count: int) -> list[Frame]:
        return [await self.frame() for _ in range(count)]

    async def expect(self, command: str) -> Frame:
        found = await self.frame()
        assert found.command == command, found
        return found

    async def receipt(self, receipt_id: str) -> None:
        """The next frame must be this receipt."""
        found = await self.expect("RECEIPT")
        assert found["receipt-id"] == receipt_id, found

    async def do(self, command: str, *headers: str, body: bytes = b"") -> None:
        """Send a frame with a receipt, and wait for that; no other frame may come before it."""
        await self.send(frame(command, *headers, "receipt:do", body=body))
        await self.receipt("do")

    async def end(self, timeout: float = TIMEOUT) -> list[Frame]:
        """Read to the orderly end of the stream; return the frames until then."""
        found: list[Frame] = []
        with trio.fail_after(timeout):
            while True:
                while (one := self.reader.next_frame()) is not None:
                    found.append(one)
                data = await self.stream.receive_some(65_536)
                if not data:
                    break
                self.reader.feed(bytes(data))
        assert not self.reader.buffer, f"half a frame at the end: {bytes(self.reader.buffer)!r}"
        return found

    async def error(self, *words: str) -> Frame:
        """The rest of the stream must be one ERROR with these words in its message, and then its end."""
        found = await self.end()
        assert [each.command for each in found] == ["ERROR"], found
        for word in words:
            assert word in found[0]["message"], found[0]
        return found[0]

    async def cut(self) -> None:
        """Close the socket without a word."""
        await trio.aclose_forcefully(self.stream)


@asynccontextmanager
async def dialled(port: int, version: str | None = "1.2", *headers: str) -> AsyncIterator[Peer]:
    """A peer that has connected (``version`` None: the socket only)."""
    peer = Peer(await trio.open_tcp_stream("127.0.0.1", port))
    try:
        if version is not None:
            await peer.open(version, *headers)
        yield peer
    finally:
        await peer.cut()


class BlockingPeer:
    """The same for tests without trio."""

    def __init__(self, port: int, version: str | None = "1.2", *headers: str) -> None:
        self.socket: Any = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        self.reader = StrictReader()
        if version is not None:
            self.send(connect_frame(version, *headers))
            connected = self.frame()
            assert connected.command == "CONNECTED", connected

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def frame(self, timeout: float = TIMEOUT) -> Frame:
        deadline = time.monotonic() + timeout
        while (found := self.reader.next_frame()) is None:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self.socket.recv(65_536)
            assert data, f"the connection ended; left: {bytes(self.reader.buffer)!r}"
            self.reader.feed(data)
        return found

    def do(self, command: str, *headers: str, body: bytes = b"") -> None:
        """Send a frame with a receipt, and wait for that; no other frame may come before it."""
        self.send(frame(command, *headers, "receipt:do", body=body))
        found = self.frame()
        assert (found.command, found.get("receipt-id")) == ("RECEIPT", "do"), found

    def end(self, timeout: float = TIMEOUT) -> list[Frame]:
        """Read to the orderly end of the stream; return the frames until then."""
        found: list[Frame] = []
        deadline = time.monotonic() + timeout
        while True:
            while (one := self.reader.next_frame()) is not None:
                found.append(one)
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self.socket.recv(65_536)
            if not data:
                return found
            self.reader.feed(data)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> BlockingPeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
