"""The load generator: a process of its own that loads a STOMP server and prints one JSON object with what it saw.

``python -m benchmarks.load MODE --url URL ...``; modes: `pump` (produce and consume at once), `fill`, `drain`. One
thread drives both sockets, so that nothing but the kernel stands between the generator and the server. Every message
that is received is compared with the one that was sent (`wire.Expected`).
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from benchmarks.processes import cpu_seconds
from benchmarks.wire import (
    CHUNK_MESSAGES,
    CYCLE_CHUNKS,
    READ_BYTES,
    Connection,
    Expected,
    LoadError,
    Scanner,
    acknowledgements,
    chunk_cycle,
    disconnect_frame,
    subscribe_frame,
)

SILENCE_MAX = 60.0  # seconds without any progress before a run is given up
OUTSTANDING_CHUNKS = 40  # chunks sent and not yet confirmed: 4,000 messages in flight


@dataclass(slots=True)
class Producer:
    """Sends prebuilt chunks as fast as the socket and the outstanding receipts allow."""

    connection: Connection
    chunks: list[bytes]
    receipts: bool
    outstanding_max: int
    scanner: Scanner = field(default_factory=Scanner)
    outstanding: deque[bytes] = field(default_factory=deque)
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    chunks_sent: int = 0
    chunks_wanted: int = 0
    ends: float = 0.0  # when to stop sending, by the clock; 0 = when `chunks_wanted` are sent

    @property
    def finished(self) -> bool:
        """Everything sent and, where receipts are asked for, confirmed."""
        return self.chunks_sent == self.chunks_wanted and not self.unsent and not self.outstanding

    @property
    def may_send(self) -> bool:
        """Whether there is something that it may send now."""
        if self.unsent:
            return True
        return self.chunks_sent < self.chunks_wanted and len(self.outstanding) < self.outstanding_max

    def send(self) -> None:
        """Give the socket the next bytes."""
        if not self.unsent:
            chunk = self.chunks_sent % CYCLE_CHUNKS
            self.unsent = memoryview(self.chunks[chunk])
            self.chunks_sent += 1
            if self.receipts:
                self.outstanding.append(b"r%d" % chunk)
        try:
            sent = self.connection.socket.send(self.unsent)
        except BlockingIOError:
            return
        self.unsent = self.unsent[sent:]

    def read(self) -> None:
        """Take receipts. They must come in the order of the sends. Raises LoadError for anything else."""
        for frame in self.scanner.feed(receive(self.connection.socket)):
            if not frame.lstrip(b"\r\n").startswith(b"RECEIPT\n") or not self.outstanding:
                raise LoadError(f"the producer got {frame[:400]!r}")
            wanted = self.outstanding.popleft()
            if b"\nreceipt-id:" + wanted not in frame:
                raise LoadError(f"the producer waited for receipt {wanted!r} and got {frame[:400]!r}")


@dataclass(slots=True)
class Consumer:
    """Receives, checks, and acknowledges each message where the subscription asks for it."""

    connection: Connection
    expected: Expected
    individual: bool
    scanner: Scanner = field(default_factory=Scanner)
    unsent: bytes = b""
    wire_bytes: int = 0
    behind_max: int = 0  # most messages that were sent and not yet received: in flight, and in the queue

    def read(self) -> None:
        """One read: check all messages that it completes, acknowledge them with one write."""
        data = receive(self.connection.socket)
        self.wire_bytes += len(data)
        self.take(self.scanner.feed(data))

    def take(self, frames: list[bytes]) -> None:
        """Check and acknowledge these frames."""
        if frames:
            self.expected.take(frames)
            if self.individual:
                self.unsent += acknowledgements(frames)
                self.write()

    def write(self) -> None:
        """Send acknowledgements, as many as the socket takes."""
        try:
            sent = self.connection.socket.send(self.unsent)
        except BlockingIOError:
            return
        self.unsent = self.unsent[sent:]


def receive(sock: socket.socket) -> bytes:
    """The next bytes of a readable socket. Raises LoadError when the server closed it."""
    try:
        data = sock.recv(READ_BYTES)
    except BlockingIOError:
        return b""
    except OSError as error:
        raise LoadError(f"connection lost: {error}") from error
    if not data:
        raise LoadError("the server closed the connection")
    return data


def drive(producer: Producer | None, consumer: Consumer | None, messages: int = 0) -> float:
    """Run until all is sent, confirmed and received. Returns when the last message came in.

    With a producer the consumer waits for what that one sent in all, else until it has `messages`. Raises LoadError
    when nothing moves for SILENCE_MAX seconds, or when more comes than was sent.
    """
    last_message = time.perf_counter()
    producing = [producer.connection.socket] if producer else []
    consuming = [consumer.connection.socket] if consumer else []
    reading = consuming + producing
    while True:
        writing: list[socket.socket] = []
        if producer is not None:
            if producer.ends and time.perf_counter() >= producer.ends:
                producer.chunks_wanted = producer.chunks_sent
            if producer.may_send:
                writing += producing
            messages = producer.chunks_sent * CHUNK_MESSAGES
            if consumer is not None:
                consumer.behind_max = max(consumer.behind_max, messages - consumer.expected.received)
        if consumer is not None and consumer.unsent:
            writing += consuming
        consumed = consumer is None or (consumer.expected.received >= messages and not consumer.unsent)
        if consumed and (producer is None or producer.finished):
            break
        readable, writable, _ = select.select(reading, writing, [], SILENCE_MAX)
        if not readable and not writable:
            got = consumer.expected.received if consumer else 0
            raise LoadError(f"no progress for {SILENCE_MAX} s; {messages - got} messages missing")
        if consumer is not None and consumer.connection.socket in readable:
            consumer.read()
            last_message = time.perf_counter()
        if producer is not None:
            if producer.connection.socket in readable:
                producer.read()
            if producer.connection.socket in writable:
                producer.send()
        if consumer is not None and consumer.connection.socket in writable:
            consumer.write()
    if consumer is not None and consumer.expected.received != messages:
        raise LoadError(f"received {consumer.expected.received - messages} messages more than there are")
    return last_message


def open_producer(options: argparse.Namespace) -> Producer:
    """Connect a producer. Persistent sends are confirmed by a receipt per chunk; others are paced by TCP alone."""
    connection = Connection(options.url)
    connection.nonblocking()
    chunks = chunk_cycle(options.destination, options.size, options.persistent, options.persistent, options.distinct)
    return Producer(connection, chunks, options.persistent, min(options.outstanding, CYCLE_CHUNKS))


def open_consumer(options: argparse.Namespace) -> Consumer:
    """Connect a consumer and subscribe."""
    connection = Connection(options.url)
    individual = options.ack == "individual"
    frame = subscribe_frame(options.destination, "client-individual" if individual else "auto", "subscribed")
    connection.request(frame, b"RECEIPT")
    consumer = Consumer(connection, Expected(options.size), individual)
    consumer.scanner = connection.scanner
    connection.nonblocking()
    consumer.take(connection.take_early())
    return consumer


def close_consumer(consumer: Consumer) -> float:
    """DISCONNECT and wait for its receipt: every acknowledgement was handled. Returns when the receipt came."""
    connection = consumer.connection
    connection.socket.setblocking(True)
    connection.socket.settimeout(SILENCE_MAX)
    connection.request(disconnect_frame("gone"), b"RECEIPT")
    ended = time.perf_counter()
    connection.close()
    return ended


class Meter:
    """CPU time of the server and of this process over a stretch of time."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._server = self._read()
        self._own = time.process_time()

    def _read(self) -> float:
        return cpu_seconds(self._pid) if self._pid else 0.0

    def read(self) -> dict[str, float]:
        """Seconds since this object was made."""
        return {"server_cpu": self._read() - self._server, "load_cpu": time.process_time() - self._own}


def pump(options: argparse.Namespace) -> dict[str, Any]:
    """Produce and consume at once. Timed from the first send to the last message, or to the last confirmed ack.

    Sends for `seconds`, or `messages` in all, whichever is given.
    """
    consumer = open_consumer(options)
    producer = open_producer(options)
    producer.chunks_wanted = options.warm // CHUNK_MESSAGES
    drive(producer, consumer)
    meter = Meter(options.pid)
    wire_bytes, before = consumer.wire_bytes, consumer.expected.received
    started = time.perf_counter()
    if options.seconds:
        producer.ends = started + options.seconds
        producer.chunks_wanted = 1 << 60
    else:
        producer.chunks_wanted += options.messages // CHUNK_MESSAGES
    ended = drive(producer, consumer)
    closed = close_consumer(consumer)
    used = meter.read()
    producer.connection.close()
    messages = consumer.expected.received - before
    elapsed = (closed if consumer.individual else ended) - started
    return {
        "messages": messages,
        "seconds": elapsed,
        "rate": messages / elapsed,
        "body_bytes": messages * options.size,
        "wire_bytes": consumer.wire_bytes - wire_bytes,
        "behind_max": consumer.behind_max,
        **used,
    }


def fill(options: argparse.Namespace) -> dict[str, Any]:
    """Send only. Timed until the last receipt."""
    producer = open_producer(options)
    producer.chunks_sent = options.first // CHUNK_MESSAGES
    producer.chunks_wanted = producer.chunks_sent + options.messages // CHUNK_MESSAGES
    started = time.perf_counter()
    drive(producer, None)
    elapsed = time.perf_counter() - started
    producer.connection.close()
    return {"messages": options.messages, "seconds": elapsed, "rate": options.messages / elapsed}


def drain(options: argparse.Namespace) -> dict[str, Any]:
    """Receive only what is there. Timed from CONNECT to the receipt of the DISCONNECT behind the last message.

    With auto ack too: so that a short queue, which fits into the sockets' buffers, pays for its removal as a deep one.
    """
    meter = Meter(options.pid)
    started = time.perf_counter()
    consumer = open_consumer(options)
    drive(None, consumer, options.messages)
    elapsed = close_consumer(consumer) - started
    return {
        "messages": options.messages,
        "seconds": elapsed,
        "rate": options.messages / elapsed,
        **meter.read(),
    }


MODES = {"pump": pump, "fill": fill, "drain": drain}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--url", required=True)
    parser.add_argument("--destination", default="/queue/benchmark")
    parser.add_argument("--messages", type=int, default=0, help="a multiple of 100")
    parser.add_argument("--seconds", type=float, default=0.0, help="send for so long instead (pump)")
    parser.add_argument("--warm", type=int, default=0, help="messages before the clock starts")
    parser.add_argument("--first", type=int, default=0, help="messages that are in the queue already (fill)")
    parser.add_argument("--size", type=int, default=256, help="bytes of a body, at least 8")
    parser.add_argument("--persistent", action="store_true")
    parser.add_argument("--ack", choices=("auto", "individual"), default="auto")
    parser.add_argument("--distinct", action="store_true", help="a header of its own for each message of a cycle")
    parser.add_argument("--outstanding", type=int, default=OUTSTANDING_CHUNKS, help="chunks of 100 unconfirmed")
    parser.add_argument("--pid", type=int, default=0, help="server process whose CPU time is read")
    options = parser.parse_args()
    for count in (options.messages, options.warm, options.first):
        if count % CHUNK_MESSAGES:
            parser.error(f"counts must be multiples of {CHUNK_MESSAGES}")
    print(json.dumps(MODES[options.mode](options)))


if __name__ == "__main__":
    main()
