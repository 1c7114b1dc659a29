"""Case `schedules`: durable messages that are due over a minute, in process: how late each reaches its consumer.

They are scheduled first, all for the time after that, so most of them wait in the store only. The measured part is a process of
its own: ``python -m benchmarks.schedules --data DIR --messages N --seconds S``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from benchmarks.processes import run_child
from benchmarks.report import Row
from benchmarks.settings import Settings

DESTINATION = "/queue/benchmark"
MESSAGES = 100_000
SECONDS = 60.0
QUICK = (2_000, 2.0)
TARGET_MS = 50.0  # 99th percentile
IN_FLIGHT_MAX = 4_000
CHUNK_MESSAGES = 100
RECEIVE_MAX = 500
LEAD = 2.0  # seconds between scheduling and the first one that is due, at least
SENDS_PER_SECOND = 2_000  # at least: so long before the first one is due they are begun to be scheduled
BODY_BYTES = 256


def now_ms() -> int:
    return time.time_ns() // 1_000_000


async def measure(path: Path, messages: int, seconds: float) -> dict[str, Any]:
    """One run on a new store. Every message must come, once."""
    import pybroker  # here, so that the suite's other cases do not need it to be importable

    padding = b"x" * BODY_BYTES
    late: list[int] = []
    seen: set[int] = set()
    async with pybroker.open_broker(data_dir=path) as broker, broker.connect() as client:
        first = now_ms() + int((LEAD + messages / SENDS_PER_SECOND) * 1_000)
        started = time.perf_counter()
        async with client.publisher(max_in_flight=IN_FLIGHT_MAX) as publisher:
            for start in range(0, messages, CHUNK_MESSAGES):
                chunk = []
                for number in range(start, min(start + CHUNK_MESSAGES, messages)):
                    due = first + int(number * 7_919 % messages * seconds * 1_000 / messages)  # in no order of time
                    body = (b"%d " % number + padding)[:BODY_BYTES]
                    chunk.append((DESTINATION, body, {"AMQ_SCHEDULED_DELAY": str(max(due - now_ms(), 0))}))
                await publisher.send_many(chunk)
        scheduling = time.perf_counter() - started
        due_ms: dict[str, int] = {}  # as the broker has it: the delay counts from when it took the message
        last = None
        while page := await broker.schedules(after=last):
            due_ms.update((each.schedule_id, each.due_ms) for each in page)
            last = page[-1]
        early = min(due_ms.values()) - now_ms()
        if early < 0:
            raise AssertionError(f"scheduling ended {-early} ms after the first one was due")
        cpu = time.process_time()
        async with client.subscribe(DESTINATION, ack="individual", prefetch=IN_FLIGHT_MAX) as subscription:
            while len(seen) < messages:
                batch = await subscription.receive_batch(RECEIVE_MAX)
                now = now_ms()
                for message in batch:
                    late.append(now - due_ms[message.header("scheduledJobId") or ""])
                    seen.add(int(message.body.partition(b" ")[0]))
                await subscription.ack(batch, confirm=False)
        cpu = time.process_time() - cpu
    if len(late) != messages:
        raise AssertionError(f"{len(late)} messages came, {messages} were scheduled")
    late.sort()
    return {
        "messages": messages,
        "scheduled_per_second": messages / scheduling,
        "scheduled_before_ms": early,
        "p50_ms": late[messages // 2],
        "p99_ms": late[messages * 99 // 100],
        "max_ms": late[-1],
        "min_ms": late[0],
        "cpu_us": cpu / messages * 1e6,
    }


def run(settings: Settings) -> Iterator[Row]:
    """The median of the rounds counts."""
    messages, seconds = QUICK if settings.quick else (MESSAGES, SECONDS)
    results = []
    for _ in range(settings.rounds):
        with settings.store() as data:
            flags = ["--data", data, "--messages", messages, "--seconds", str(seconds)]
            results.append(run_child("benchmarks.schedules", flags))
        each = results[-1]
        settings.say(f"{messages:,} schedules: late by p99 {each['p99_ms']} ms, most {each['max_ms']} ms")
    for percentile in ("p50", "p99", "max"):
        figures = [result[f"{percentile}_ms"] for result in results]
        figure = statistics.median(figures)
        judged = percentile == "p99"
        yield Row(
            case="schedules",
            name=f"{messages:,} due over {seconds:g} s, late by {percentile}",
            figure=figure,
            unit="ms",
            low=min(figures),
            high=max(figures),
            target=f"< {TARGET_MS:g}" if judged else "",
            met=figure < TARGET_MS if judged else None,
            cpu_us=statistics.median(result["cpu_us"] for result in results),
            details={"ours": results} if judged else {},
        )


def main() -> None:
    """The command line of the measured process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--messages", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    print(json.dumps(trio.run(measure, options.data, options.messages, options.seconds)))


if __name__ == "__main__":
    main()
