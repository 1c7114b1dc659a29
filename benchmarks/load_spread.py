"""Load over many queues: fills each in turn with durable messages, so that what is sent later lies scattered in the store.

Run as ``python -m benchmarks.load_spread --url URL --queues N --each N``; prints one JSON object when all are confirmed. A
second run with ``--each 1`` changes as many places of the store as there are queues.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from typing import Any

from benchmarks.load import OUTSTANDING_CHUNKS
from benchmarks.wire import CHUNK_MESSAGES, Connection, LoadError, body, send_frame


def chunk(options: argparse.Namespace, first: int, last: int) -> bytes:
    """The SENDs from message `first` to before `last`; the last of them asks for a receipt."""
    return b"".join(
        send_frame(
            f"{options.prefix}{number // options.each}",
            body(number, options.size),
            True,
            f"r{last}" if number + 1 == last else "",
        )
        for number in range(first, last)
    )


def spread(options: argparse.Namespace) -> dict[str, Any]:
    """Send all. Raises LoadError when a receipt does not come, or another one than is due."""
    total = options.queues * options.each
    connection = Connection(options.url)
    unconfirmed: deque[int] = deque()
    started = time.perf_counter()
    for first in range(0, total, CHUNK_MESSAGES):
        last = min(total, first + CHUNK_MESSAGES)
        connection.socket.sendall(chunk(options, first, last))
        unconfirmed.append(last)
        while len(unconfirmed) > (OUTSTANDING_CHUNKS if last < total else 0):
            frame = connection.wait_for(b"RECEIPT")
            due = unconfirmed.popleft()
            if b"receipt-id:r%d" % due not in frame.split(b"\n"):
                raise LoadError(f"expected receipt r{due}, got {frame[:400]!r}")
    elapsed = time.perf_counter() - started
    connection.close()
    return {"messages": total, "seconds": elapsed, "rate": total / elapsed}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_spread")
    parser.add_argument("--url", required=True)
    parser.add_argument("--prefix", default="/queue/benchmark.spread.", help="of the queues' names; a number follows")
    parser.add_argument("--queues", type=int, required=True)
    parser.add_argument("--each", type=int, required=True, help="messages for each queue")
    parser.add_argument("--size", type=int, default=256)
    print(json.dumps(spread(parser.parse_args())))


if __name__ == "__main__":
    main()
