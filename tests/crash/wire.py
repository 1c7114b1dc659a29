"""A STOMP 1.2 client of the simplest kind: a blocking socket, frames in and out. Nothing of pybroker is used here.

It stands for the programs outside: what it makes of the broker's bytes must not depend on the broker's own code.
"""

from __future__ import annotations

import select
import socket
import time
from contextlib import suppress
from typing import NamedTuple

CONNECT_TIMEOUT = 5.0  # seconds


class Frame(NamedTuple):
    command: str
    headers: dict[str, str]  # of repeated headers the first one
    body: bytes


class Disconnected(Exception):
    """The connection has ended; all that came before the end has been returned."""


class Refused(Exception):
    """The broker sent an ERROR frame."""


class FrameParser:
    """Bytes in, frames out, with the offset in the stream at which each frame began."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._offset = 0

    def feed(self, data: bytes) -> list[tuple[int, Frame]]:
        self._data += data
        frames = []
        while True:
            while self._data[:1] in (b"\n", b"\r"):
                self._drop(1)
            end = self._data.find(b"\n\n")
            if end < 0:
                return frames
            command, *lines = self._data[:end].decode().split("\n")
            headers: dict[str, str] = {}
            for line in lines:
                name, _, value = line.partition(":")
                headers.setdefault(name, value)
            start = end + 2
            if "content-length" in headers:
                stop = start + int(headers["content-length"])
                if len(self._data) <= stop:
                    return frames
                assert self._data[stop] == 0, self._data[stop]
            else:
                stop = self._data.find(b"\0", start)
                if stop < 0:
                    return frames
            frames.append((self._offset, Frame(command, headers, bytes(self._data[start:stop]))))
            self._drop(stop + 1)

    def _drop(self, count: int) -> None:
        del self._data[:count]
        self._offset += count


class Connection:
    """One session. Raises Disconnected when there is nobody, or no more."""

    def __init__(self, port: int, client_id: str = "") -> None:
        self._parser = FrameParser()
        self._ended = False
        try:
            self._socket = socket.create_connection(("127.0.0.1", port), CONNECT_TIMEOUT)
        except OSError as error:
            raise Disconnected(str(error)) from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        headers = [("accept-version", "1.2"), ("host", "localhost")]
        self.send("CONNECT", *headers, *([("client-id", client_id)] if client_id else []))
        frames = self.wait(CONNECT_TIMEOUT)
        if not frames or frames[0].command != "CONNECTED":
            self.close()
            raise Disconnected(f"no session: {frames}")

    def send(self, command: str, *headers: tuple[str, str], body: bytes = b"") -> None:
        lines = "".join(f"{name}:{value}\n" for name, value in headers)
        if body:
            lines += f"content-length:{len(body)}\n"
        with suppress(OSError):  # what has come in meanwhile is still to be read; `wait` meets the end
            self._socket.sendall(f"{command}\n{lines}\n".encode() + body + b"\0")

    def wait(self, timeout: float) -> list[Frame]:
        """Frames that have come, after at most `timeout` seconds; none when there were none."""
        until = time.monotonic() + timeout
        frames: list[Frame] = []
        while not frames:
            if self._ended:
                raise Disconnected
            if not select.select([self._socket], [], [], max(until - time.monotonic(), 0))[0]:
                return []
            frames = self._read()
        for frame in frames:
            if frame.command == "ERROR":
                raise Refused(f"{frame.headers.get('message')}: {frame.body!r}")
        return frames

    def _read(self) -> list[Frame]:
        try:
            data = self._socket.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            self._ended = True
            self.close()
        return [frame for _, frame in self._parser.feed(data)]

    def receipt(self, id: str, timeout: float = 10.0) -> list[Frame]:
        """Wait for a receipt; what else came with it."""
        others: list[Frame] = []
        found = False
        while not found:
            frames = self.wait(timeout)
            assert frames, f"no receipt {id} within {timeout} s"
            for frame in frames:
                if frame.command == "RECEIPT" and frame.headers["receipt-id"] == id:
                    found = True
                else:
                    others.append(frame)
        return others

    def close(self) -> None:
        self._socket.close()
