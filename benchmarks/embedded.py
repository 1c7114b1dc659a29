"""Case `inprocess`: an embedded broker, one pipelined publisher and one consumer that takes and acks in batches.

Everything runs in one process and one event loop, so the figure holds the publisher's and the consumer's work too. The
measured part is a process of its own: ``python -m benchmarks.embedded --data DIR --messages N [--volatile]``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from benchmarks.processes import run_child
from benchmarks.report import Rounds, Row
from benchmarks.settings import Settings
from benchmarks.throughput import bare_rate
from benchmarks.wire import CHUNK_MESSAGES, CYCLE_CHUNKS, CYCLE_MESSAGES, Expected, body

DESTINATION = "/queue/benchmark"
TARGET = 60_000  # messages per second
BARE_SHARE = 0.45  # of bare plyvel, which meets the target as well
IN_FLIGHT_MAX = 4_000  # sends that are not confirmed, as in the case `stomp`
RECEIVE_MAX = 500  # messages of one batch
PREFETCH = 4_000
WARM_MESSAGES = 5_000
BODY_BYTES = 256


async def pump(client: Any, expected: Expected, messages: int, volatile: bool) -> float:
    """Send and receive so many messages at once. Returns seconds from the first send to the last confirmed ack."""
    cycle = [body(number, BODY_BYTES) for number in range(CYCLE_MESSAGES)]
    chunks = [
        [(DESTINATION, payload) for payload in cycle[first : first + CHUNK_MESSAGES]]
        for first in range(0, CYCLE_MESSAGES, CHUNK_MESSAGES)
    ]
    first_chunk = expected.received // CHUNK_MESSAGES
    goal = expected.received + messages

    async def publish() -> None:
        async with client.publisher(max_in_flight=IN_FLIGHT_MAX) as publisher:
            for chunk in range(first_chunk, first_chunk + messages // CHUNK_MESSAGES):
                await publisher.send_many(chunks[chunk % CYCLE_CHUNKS], durable=not volatile)

    started = time.perf_counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(publish)
        async with client.subscribe(DESTINATION, ack="individual", prefetch=PREFETCH) as subscription:
            while expected.received < goal:
                batch = await subscription.receive_batch(RECEIVE_MAX)
                expected.take_bodies([message.body for message in batch])
                # The last confirmation is for all before it, too: acks are committed in order.
                await subscription.ack(batch, confirm=expected.received >= goal)
            elapsed = time.perf_counter() - started
    return elapsed


async def measure(path: Path, messages: int, volatile: bool) -> dict[str, Any]:
    """One run on a new store."""
    import pybroker  # here, so that the suite's other cases do not need it to be importable

    async with pybroker.open_broker(data_dir=path) as broker, broker.connect() as client:
        expected = Expected(BODY_BYTES)
        await pump(client, expected, WARM_MESSAGES, volatile)
        cpu = time.process_time()
        elapsed = await pump(client, expected, messages, volatile)
        cpu = time.process_time() - cpu
    return {"messages": messages, "seconds": elapsed, "rate": messages / elapsed, "server_cpu": cpu}


def run(settings: Settings) -> Iterator[Row]:
    """Durable beside bare plyvel, which has the target; then not durable."""
    messages = int(settings.seconds * TARGET) // CHUNK_MESSAGES * CHUNK_MESSAGES
    for name, flags in (("durable", []), ("not durable", ["--volatile"])):
        ours, bare = Rounds(), Rounds()
        for _ in range(settings.rounds):
            if not flags:
                bare.results.append({"rate": bare_rate(settings)})
            with settings.store() as data:
                ours.results.append(run_child("benchmarks.embedded", ["--data", data, "--messages", messages, *flags]))
            settings.say(f"in process, {name}: {ours.results[-1]['rate']:,.0f} msg/s, {ours.cpu_us:.1f} µs CPU")
        rate = ours.median("rate")
        bar = bare.median("rate") if bare.results else None
        yield Row(
            case="inprocess",
            name=f"pipelined sends, batch acks, {name}",
            figure=rate,
            unit="msg/s",
            low=min(ours.values("rate")),
            high=max(ours.values("rate")),
            beside="bare plyvel" if bar else "",
            beside_figure=bar,
            target=f">= {TARGET:,} or {BARE_SHARE:.0%} of bare plyvel" if bar else "",
            met=(rate >= TARGET or rate >= BARE_SHARE * bar) if bar else None,
            cpu_us=ours.cpu_us,
            details={"ours": ours.results, "bare": bare.results},
        )


def main() -> None:
    """The command line of the measured process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--messages", type=int, required=True, help=f"a multiple of {CHUNK_MESSAGES}")
    parser.add_argument("--volatile", action="store_true", help="messages are not durable")
    options = parser.parse_args()
    print(json.dumps(trio.run(measure, options.data, options.messages, options.volatile)))


if __name__ == "__main__":
    main()
