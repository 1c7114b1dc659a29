"""Load through a failover: a producer that sends a durable message every few milliseconds and finds the leader by itself.

``python -m benchmarks.load_failover --url URL --url URL ... --times FILE`` sends until its standard input ends. Every send
asks for a receipt. When the connection breaks, or the oldest unconfirmed send is `--patience` old, it tries all addresses at
once, a refused one again after `RETRY`; what was unconfirmed is sent again over the first one that answers. FILE then holds
what happened and when, in records of `RECORD`, for whoever reads it meanwhile. One JSON object at the end.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import struct
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from benchmarks.wire import READ_BYTES, Scanner, body, connect_frame, send_frame

RECORD = struct.Struct("dB")  # time.monotonic, and what happened:
CONFIRMED, LOST, CONNECTED = 0, 1, 2
RETRY = 0.002  # seconds until a refused address is tried again
UNCONFIRMED_MAX = 64  # sends on their way; past it the producer waits


@dataclass(slots=True)
class Attempt:
    """A connection on its way to CONNECTED."""

    sock: socket.socket
    scanner: Scanner
    greeted: bool = False


class Producer:
    """One connection that works, or an attempt for each address."""

    def __init__(self, options: argparse.Namespace, times: BinaryIO) -> None:
        self._addresses = [((parts := urlsplit(url)).hostname, parts.port) for url in options.url]
        self._options = options
        self._times = times
        self._selector = selectors.DefaultSelector()
        self._sock: socket.socket | None = None
        self._scanner = Scanner()
        self._attempts: list[Attempt | None] = [None] * len(self._addresses)
        self._retry_at = [0.0] * len(self._addresses)
        self._unconfirmed: deque[tuple[int, float]] = deque()  # number and time of the last send
        self._unsent = b""
        self._number = 0
        self.confirmed = 0
        self.connections = 0

    def _note(self, what: int, now: float) -> None:
        self._times.write(RECORD.pack(now, what))

    # ---- searching

    def _search(self, now: float) -> None:
        """Begin the attempts that are due."""
        for index, address in enumerate(self._addresses):
            if self._attempts[index] is None and now >= self._retry_at[index]:
                sock = socket.socket()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.connect_ex(address)
                self._attempts[index] = Attempt(sock, Scanner())
                self._selector.register(sock, selectors.EVENT_WRITE, index)

    def _go_on(self, index: int, now: float) -> None:
        """One attempt: connected, answered, or refused."""
        attempt = self._attempts[index]
        assert attempt is not None
        try:
            if not attempt.greeted:
                error = attempt.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise ConnectionError(error)
                attempt.sock.send(connect_frame())
                attempt.greeted = True
                self._selector.modify(attempt.sock, selectors.EVENT_READ, index)
                return
            data = attempt.sock.recv(READ_BYTES)
            frames = attempt.scanner.feed(data)
            if not data or (frames and not frames[0].startswith(b"CONNECTED\n")):
                raise ConnectionError("not now")
        except OSError:
            self._give_up(index)
            self._retry_at[index] = now + RETRY
            return
        if frames:
            self._take(index, now)

    def _give_up(self, index: int) -> None:
        attempt = self._attempts[index]
        if attempt is not None:
            self._selector.unregister(attempt.sock)
            attempt.sock.close()
            self._attempts[index] = None

    def _take(self, index: int, now: float) -> None:
        """This address has the leader: send again what is unconfirmed."""
        attempt = self._attempts[index]
        assert attempt is not None
        self._attempts[index] = None
        for other in range(len(self._attempts)):
            self._give_up(other)
        self._sock, self._scanner = attempt.sock, attempt.scanner
        self._selector.modify(self._sock, selectors.EVENT_READ, None)
        self.connections += 1
        self._note(CONNECTED, now)
        again = [number for number, _ in self._unconfirmed]
        self._unconfirmed = deque((number, now) for number in again)
        self._unsent = b"".join(map(self._frame, again))

    def _lose(self, now: float) -> None:
        assert self._sock is not None
        self._selector.unregister(self._sock)
        self._sock.close()
        self._sock = None
        self._retry_at = [0.0] * len(self._addresses)
        self._note(LOST, now)

    # ---- sending

    def _frame(self, number: int) -> bytes:
        return send_frame(self._options.destination, body(number, self._options.size), True, f"r{number}")

    def _read(self, now: float) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(READ_BYTES)
        except OSError:
            data = b""
        if not data:
            self._lose(now)
            return
        for frame in self._scanner.feed(data):
            if b"RECEIPT\n" not in frame[:12]:  # an ERROR: the end of the connection follows
                continue
            number = int(frame.partition(b"receipt-id:r")[2].partition(b"\n")[0])
            while self._unconfirmed and self._unconfirmed[0][0] <= number:
                self._unconfirmed.popleft()
                self.confirmed += 1
                self._note(CONFIRMED, now)

    def _write(self, now: float) -> None:
        assert self._sock is not None
        try:
            sent = self._sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self._lose(now)
            return
        self._unsent = self._unsent[sent:]

    def run(self) -> None:
        """Until the standard input ends."""
        options = self._options
        self._selector.register(sys.stdin.buffer, selectors.EVENT_READ, "end")
        due = time.monotonic()
        while True:
            now = time.monotonic()
            if self._sock is None:
                self._search(now)
                wait = RETRY
            else:
                if now >= due and len(self._unconfirmed) < UNCONFIRMED_MAX:
                    self._unconfirmed.append((self._number, now))
                    self._unsent += self._frame(self._number)
                    self._number += 1
                    due = max(due + options.interval, now)
                if self._unsent:
                    self._write(now)
                if self._sock is not None and self._unconfirmed and now - self._unconfirmed[0][1] > options.patience:
                    self._lose(now)
                    continue
                wait = max(0.0, due - now) if len(self._unconfirmed) < UNCONFIRMED_MAX else options.interval
            for key, _ in self._selector.select(wait):
                now = time.monotonic()
                if key.data == "end":
                    return
                if key.data is None:
                    if self._sock is key.fileobj:
                        self._read(now)
                elif self._attempts[key.data] is not None and self._sock is None:
                    self._go_on(key.data, now)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_failover")
    parser.add_argument("--url", action="append", required=True)
    parser.add_argument("--times", type=Path, required=True, help="where to write what happened when")
    parser.add_argument("--destination", default="/queue/benchmark.failover")
    parser.add_argument("--interval", type=float, default=0.003, help="seconds between two sends")
    parser.add_argument("--patience", type=float, default=0.25, help="seconds that a send may stay unconfirmed")
    parser.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    with options.times.open("ab", buffering=0) as times:
        producer = Producer(options, times)
        with suppress(KeyboardInterrupt):
            producer.run()
    result: dict[str, Any] = {"confirmed": producer.confirmed, "connections": producer.connections}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
