"""A bare loop over loopback: pack a batch with msgpack, send, receive, unpack; nothing else. The floor under non-durable figures.

Run as ``python -m benchmarks.bare_wire --messages N``; prints one JSON object. One thread and one connection with itself; the
batches have the fields of the native protocol's SEND (NATIVE.md).
"""

from __future__ import annotations

import argparse
import json
import socket
import time
from collections.abc import Iterator

import msgpack

from benchmarks.wire import CHUNK_MESSAGES, CYCLE_CHUNKS, READ_BYTES, Expected, body

SEND = 10  # the frame's type
FLAGS = 4  # priority 4, not durable
LENGTH_BYTES = 4
BODY_BYTES = 256
DESTINATION = "/queue/benchmark"


def connected() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sending = socket.create_connection(listener.getsockname())
        receiving, _ = listener.accept()
    for end in (sending, receiving):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sending, receiving


def received_bodies(receiving: socket.socket) -> Iterator[list[bytes]]:
    """The bodies of one frame after the other."""
    data = b""
    while True:
        while len(data) < LENGTH_BYTES or len(data) < LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "big"):
            data += receiving.recv(READ_BYTES)
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "big")
        frame = msgpack.unpackb(data[LENGTH_BYTES:end], use_list=False)
        data = data[end:]
        yield [message[1] for message in frame[2]]


def measure(messages: int, size: int) -> float:
    """Messages in one second, in batches of a hundred. Raises LoadError when one is not what was sent."""
    sending, receiving = connected()
    bodies = [
        [body(number, size) for number in range(chunk * CHUNK_MESSAGES, (chunk + 1) * CHUNK_MESSAGES)]
        for chunk in range(CYCLE_CHUNKS)
    ]
    expected = Expected(size)
    arriving = received_bodies(receiving)
    started = time.perf_counter()
    for chunk in range(messages // CHUNK_MESSAGES):
        rows = [(DESTINATION, payload, b"", FLAGS, 0) for payload in bodies[chunk % CYCLE_CHUNKS]]
        packed = msgpack.packb((SEND, chunk * CHUNK_MESSAGES + 1, rows))
        sending.sendall(len(packed).to_bytes(LENGTH_BYTES, "big") + packed)
        expected.take_bodies(next(arriving))
    elapsed = time.perf_counter() - started
    sending.close()
    receiving.close()
    return expected.received / elapsed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare_wire")
    parser.add_argument("--messages", type=int, default=500_000, help=f"a multiple of {CHUNK_MESSAGES}")
    parser.add_argument("--size", type=int, default=BODY_BYTES)
    options = parser.parse_args()
    print(json.dumps({"rate": measure(options.messages, options.size)}))


if __name__ == "__main__":
    main()
