"""Case `selectors`: 10,000 selectors on one topic, in process, beside as many subscribers that have a topic each and no selector.

The selectors ask for ``id = 'N'``: in one shape alone, in the other joined to more by AND; each message is for one of them.
In the last shape no selector can be found by a value, and a hundred look at each message. The measured part is a process of
its own: ``python -m benchmarks.selectors``.
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

TOPIC = "/topic/benchmark"
SHAPES = {
    "by value": (10_000, "id = '{}'"),
    "by value, with AND": (10_000, "id = '{}' AND ward BETWEEN 1 AND 5 AND kind LIKE 'ref%'"),
    "by order": (100, "number >= {0} AND number <= {0}"),
}
MESSAGES = 20_000
QUICK_MESSAGES = 2_000
CHUNK_MESSAGES = 100
SHARE = 0.5  # of the rate with topics instead of selectors
SUBSCRIPTIONS_MAX = 20_000  # of the one connection


async def measure(path: Path, subscribers: int, selector: str, messages: int) -> dict[str, Any]:
    """One run on a new store; every message must come to the one that selects it, and to no other. No selector: topics."""
    import pybroker  # here, so that the suite's other cases do not need it to be importable

    limits = {"subscriptions_max": SUBSCRIPTIONS_MAX}
    async with pybroker.open_broker(data_dir=path, limits=limits) as broker, broker.connect() as client:
        received = 0
        opened = trio.Event()
        waiting = subscribers

        async def consume(number: int) -> None:
            nonlocal received, waiting
            async with client.subscribe(topic(number), ack="auto", selector=selector.format(number)) as subscription:
                waiting -= 1
                if not waiting:
                    opened.set()
                while True:
                    for message in await subscription.receive_batch(CHUNK_MESSAGES):
                        assert message.header("number") == str(number), (message, number)
                        received += 1
                    if received >= messages:
                        done.set()

        def topic(number: int) -> str:
            return TOPIC if selector else f"{TOPIC}.{number}"

        done = trio.Event()
        body = b"x" * 256
        chunks = [
            [
                (
                    topic(at % subscribers),
                    body,
                    {"id": str(at % subscribers), "number": str(at % subscribers), "ward": "3", "kind": "referral"},
                )
                for at in range(first, first + CHUNK_MESSAGES)
            ]
            for first in range(0, messages, CHUNK_MESSAGES)
        ]
        async with trio.open_nursery() as nursery:
            begun = time.perf_counter()
            for number in range(subscribers):
                nursery.start_soon(consume, number)
            await opened.wait()
            subscribing = time.perf_counter() - begun
            cpu, begun = time.process_time(), time.perf_counter()
            async with client.publisher() as publisher:
                for chunk in chunks:
                    await publisher.send_many(chunk, durable=False)
            await done.wait()
            elapsed, cpu = time.perf_counter() - begun, time.process_time() - cpu
            nursery.cancel_scope.cancel()
    return {
        "messages": messages,
        "seconds": elapsed,
        "rate": messages / elapsed,
        "server_cpu": cpu,
        "subscribing_seconds": subscribing,
    }


def run(settings: Settings) -> Iterator[Row]:
    """Each shape beside the same with topics."""
    messages = QUICK_MESSAGES if settings.quick else MESSAGES
    for name, (subscribers, selector) in SHAPES.items():
        many, plain = Rounds(), Rounds()
        for _ in range(settings.rounds):
            for rounds, asked in ((plain, ""), (many, selector)):
                with settings.store() as data:
                    arguments = [
                        "--data",
                        data,
                        "--subscribers",
                        subscribers,
                        "--selector",
                        asked,
                        "--messages",
                        messages,
                    ]
                    rounds.results.append(run_child("benchmarks.selectors", arguments))
                what = f"selectors, {name}" if asked else "topics"
                settings.say(f"{subscribers:,} {what}: {rounds.results[-1]['rate']:,.0f} msg/s")
        rate, alone = many.median("rate"), plain.median("rate")
        indexed = subscribers > 100
        yield Row(
            case="selectors",
            name=f"{subscribers:,} selectors on a topic, {name}",
            figure=rate,
            unit="msg/s",
            low=min(many.values("rate")),
            high=max(many.values("rate")),
            beside="a topic for each",
            beside_figure=alone,
            target=f">= {SHARE:.0%} of it" if indexed else "",
            met=rate >= SHARE * alone if indexed else None,
            cpu_us=many.cpu_us,
            details={"many": many.results, "topics": plain.results},
        )


def main() -> None:
    """The command line of the measured process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selectors")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--subscribers", type=int, required=True)
    parser.add_argument("--selector", required=True, help="{} is the subscriber's number; '' = a topic for each")
    parser.add_argument("--messages", type=int, required=True, help=f"a multiple of {CHUNK_MESSAGES}")
    options = parser.parse_args()
    print(json.dumps(trio.run(measure, options.data, options.subscribers, options.selector, options.messages)))


if __name__ == "__main__":
    main()
