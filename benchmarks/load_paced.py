"""Load at a fixed rate, for latency: each message is due at its time by the clock, whatever became of those before it.

Latency is counted from the time a message was *due* to its receipt, and to its delivery (free of coordinated
omission: a stall is seen by every message that was due in it). The generator's own lateness is in the figure, and is
printed beside it. Run as ``python -m benchmarks.load_paced --url URL``; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import select
import time
from typing import Any

from benchmarks.load import SILENCE_MAX, receive
from benchmarks.wire import Connection, Expected, LoadError, body, send_frame, subscribe_frame


def percentiles(samples: list[float]) -> dict[str, float]:
    """Of samples in seconds: p50, p99, p99.9 and the largest, in milliseconds."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000

    return {"p50_ms": at(0.5), "p99_ms": at(0.99), "p999_ms": at(0.999), "max_ms": ordered[-1] * 1000}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Send `rate` durable messages a second for `warm` + `seconds`; the warm part is not counted."""
    consumer = Connection(options.url)
    consumer.request(subscribe_frame(options.destination, "auto", "subscribed"), b"RECEIPT")
    producer = Connection(options.url)
    expected = Expected(options.size)
    total = int((options.warm + options.seconds) * options.rate)
    skipped = int(options.warm * options.rate)
    frames = [
        send_frame(options.destination, body(number, options.size), True, f"r{number}") for number in range(total)
    ]
    lateness: list[float] = []
    confirmed: list[float] = []
    delivered: list[float] = []
    interval = 1 / options.rate
    start = time.perf_counter() + 0.1
    sent = 0
    while len(confirmed) < total or len(delivered) < total:
        now = time.perf_counter()
        due = min(total, int((now - start) / interval) + 1) if now >= start else 0
        if due > sent:
            producer.socket.sendall(b"".join(frames[sent:due]))
            lateness.extend(now - start - number * interval for number in range(sent, due))
            sent = due
        patience = max(0.0, start + sent * interval - time.perf_counter()) if sent < total else SILENCE_MAX
        readable, _, _ = select.select([consumer.socket, producer.socket], [], [], patience)
        if not readable and sent == total and patience:
            raise LoadError(f"{total - len(confirmed)} receipts and {total - len(delivered)} messages missing")
        if producer.socket in readable:
            for frame in producer.scanner.feed(receive(producer.socket)):
                if b"receipt-id:r%d" % len(confirmed) not in frame.split(b"\n"):
                    raise LoadError(f"expected receipt r{len(confirmed)}, got {frame[:400]!r}")
                confirmed.append(time.perf_counter() - start - len(confirmed) * interval)
        if consumer.socket in readable:
            messages = consumer.scanner.feed(receive(consumer.socket))
            expected.take(messages)
            stamp = time.perf_counter() - start
            first = len(delivered)
            delivered.extend(stamp - number * interval for number in range(first, first + len(messages)))
    producer.close()
    consumer.close()
    return {
        "messages": total - skipped,
        "rate": options.rate,
        "receipt": percentiles(confirmed[skipped:]),
        "delivery": percentiles(delivered[skipped:]),
        "lateness": percentiles(lateness[skipped:]),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_paced")
    parser.add_argument("--url", required=True)
    parser.add_argument("--destination", default="/queue/benchmark.paced")
    parser.add_argument("--rate", type=float, default=1000.0, help="messages a second")
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--warm", type=float, default=1.0, help="seconds before it counts")
    parser.add_argument("--size", type=int, default=256)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
