"""Case `choosing`: a queue whose messages are not for everybody, in process: selectors beside queues, groups beside none.

The hundred consumers of one queue select a hundredth of its messages each, by the value of a header or by an order between
numbers; beside it stand a hundred queues with a consumer each and no selector. The messages come while all consume, or wait in
the store already; in one shape they come behind a page of messages that nobody selects. Ten thousand groups on sixteen consumers
stand beside the same messages without groups. The measured part is a process of its own: ``python -m benchmarks.choosing``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from benchmarks.processes import memory, run_child
from benchmarks.report import Rounds, Row
from benchmarks.settings import Settings

QUEUE = "/queue/benchmark"
MESSAGES = 100_000
QUICK_MESSAGES = 10_000
CHUNK_MESSAGES = 100
IN_FLIGHT_MAX = 4_000
RECEIVE_MAX = 500
PREFETCH = 100
BODY_BYTES = 256
GROUPS = 10_000
STRANGERS = 10_000  # more than a window holds
WARM_MESSAGES = 2_000
SHARE = 0.5  # of the rate with queues instead of selectors, or without groups


@dataclass(frozen=True, slots=True)
class Layout:
    """Who consumes which messages.

    consumers  how many there are
    selector   ``{}`` is the consumer's number; empty: none
    queues     each consumer has a queue of its own
    groups     the messages' groups; 0 = the same header by another name
    waiting    all messages are in the store before anybody consumes
    strangers  messages that nobody selects, before the others
    """

    consumers: int
    selector: str = ""
    queues: bool = False
    groups: int = 0
    waiting: bool = False
    strangers: int = 0

    def queue(self, number: int) -> str:
        return f"{QUEUE}.{number}" if self.queues else QUEUE


@dataclass(frozen=True, slots=True)
class Shape:
    """Two layouts that take turns."""

    name: str
    layout: str
    beside: str
    beside_name: str
    judged: bool = True


BY_VALUE = "ward = '{}'"
BY_ORDER = "number >= {0} AND number <= {0}"
LAYOUTS = {
    "queues": Layout(100, queues=True),
    "queues-waiting": Layout(100, queues=True, waiting=True),
    "value": Layout(100, BY_VALUE),
    "value-waiting": Layout(100, BY_VALUE, waiting=True),
    "value-strangers": Layout(100, BY_VALUE, strangers=STRANGERS),
    "order": Layout(100, BY_ORDER),
    "order-waiting": Layout(100, BY_ORDER, waiting=True),
    "plain": Layout(16),
    "plain-waiting": Layout(16, waiting=True),
    "groups": Layout(16, groups=GROUPS),
    "groups-waiting": Layout(16, groups=GROUPS, waiting=True),
}
SHAPES = (
    Shape("100 selectors by value", "value", "queues", "100 queues"),
    Shape("100 selectors by value, all waiting", "value-waiting", "queues-waiting", "100 queues"),
    Shape("100 selectors by value, behind a page of strangers", "value-strangers", "value", "no strangers"),
    Shape("100 selectors by order", "order", "queues", "100 queues", judged=False),
    Shape("100 selectors by order, all waiting", "order-waiting", "queues-waiting", "100 queues", judged=False),
    Shape("10,000 groups on 16 consumers", "groups", "plain", "no groups"),
    Shape("10,000 groups on 16 consumers, all waiting", "groups-waiting", "plain-waiting", "no groups"),
)


class Consumption:
    """What the consumers of a layout have received: every message once, of a selector its own, of a group in order by one."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._owners: dict[int, int] = {}
        self._last: dict[int, int] = {}
        self._seen: set[int] = set()
        self._wanted = 0
        self._done = trio.Event()

    def take(self, consumer: int, body: bytes) -> None:
        """A consumer has got a message. Raises AssertionError when it is not for him, or came before."""
        at = int(body.partition(b" ")[0])
        if at in self._seen:
            raise AssertionError(f"message {at} came twice")
        self._seen.add(at)
        layout = self._layout
        if layout.selector or layout.queues:
            if at % layout.consumers != consumer:
                raise AssertionError(f"message {at} came to consumer {consumer}")
        elif layout.groups:
            group = at % layout.groups
            if self._owners.setdefault(group, consumer) != consumer or self._last.get(group, -1) > at:
                raise AssertionError(f"message {at} came to consumer {consumer}, or out of order")
            self._last[group] = at
        if len(self._seen) >= self._wanted:
            self._done.set()

    async def wait(self, messages: int) -> None:
        """Until so many more have come than when the last wait ended."""
        self._wanted += messages
        if len(self._seen) < self._wanted:
            self._done = trio.Event()
            await self._done.wait()


def chunks(layout: Layout, first: int, count: int) -> Iterator[list[tuple[str, bytes, dict[str, str]]]]:
    """Messages `first` and so many on, to be sent together."""
    padding = b"x" * BODY_BYTES
    grouped = "JMSXGroupID" if layout.groups else "JMSXCorrel_"  # as long, so that it costs as much to carry
    for start in range(first, first + count, CHUNK_MESSAGES):
        chunk = []
        for at in range(start, start + CHUNK_MESSAGES):
            number = at % layout.consumers
            headers = {"ward": str(number), "number": str(number), grouped: f"patient-{at % GROUPS}"}
            chunk.append((layout.queue(number), (b"%d " % at + padding)[:BODY_BYTES], headers))
        yield chunk


async def measure(path: Path, layout: Layout, messages: int) -> dict[str, Any]:
    """One run on a new store, timed from the first send (waiting: from the first subscription) to the last confirmed ack."""
    import pybroker  # here, so that the suite's other cases do not need it to be importable

    consumption = Consumption(layout)
    async with pybroker.open_broker(data_dir=path) as broker, broker.connect() as client:

        async def publish(first: int, count: int) -> None:
            async with client.publisher(max_in_flight=IN_FLIGHT_MAX) as publisher:
                for chunk in prepared[first // CHUNK_MESSAGES : (first + count) // CHUNK_MESSAGES]:
                    await publisher.send_many(chunk)

        async def consume(number: int, stop: trio.Event) -> None:
            options = {"ack": "individual", "prefetch": PREFETCH, "selector": layout.selector.format(number)}
            async with client.subscribe(layout.queue(number), **options) as subscription, trio.open_nursery() as inner:

                async def receive() -> None:
                    while True:
                        batch = await subscription.receive_batch(RECEIVE_MAX)
                        for message in batch:
                            consumption.take(number, message.body)
                        await subscription.ack(batch, confirm=False)

                inner.start_soon(receive)
                opened[number].set()
                await stop.wait()
                inner.cancel_scope.cancel()  # leaving the subscription waits for the commit of all that was said before

        warm = 0 if layout.waiting else WARM_MESSAGES
        opened = [trio.Event() for _ in range(layout.consumers)]
        prepared = list(chunks(layout, 0, warm + messages))
        async with client.publisher(max_in_flight=IN_FLIGHT_MAX) as publisher:
            for _ in range(layout.strangers // CHUNK_MESSAGES):
                stranger = (layout.queue(0), b"x" * BODY_BYTES, {"ward": "none", "number": "-1"})
                await publisher.send_many([stranger] * CHUNK_MESSAGES)
        if layout.waiting:
            await publish(0, messages)
        before = memory(os.getpid())
        stop = trio.Event()
        started, cpu = time.perf_counter(), time.process_time()
        async with trio.open_nursery() as nursery:
            for number in range(layout.consumers):
                nursery.start_soon(consume, number, stop)
            if not layout.waiting:
                for each in opened:
                    await each.wait()
                nursery.start_soon(publish, 0, warm)
                await consumption.wait(warm)
                started, cpu = time.perf_counter(), time.process_time()
                nursery.start_soon(publish, warm, messages)
            await consumption.wait(messages)
            stop.set()
        elapsed, cpu = time.perf_counter() - started, time.process_time() - cpu
        left = sum(each.depth for each in broker.statistics().destinations)
        if left != layout.strangers:
            raise AssertionError(f"{left} messages are left of {layout.strangers}")
    return {
        "messages": messages,
        "seconds": elapsed,
        "rate": messages / elapsed,
        "server_cpu": cpu,
        "memory": memory(os.getpid()).peak - before.resident,
    }


def run(settings: Settings) -> Iterator[Row]:
    """Each shape beside what it has to be compared with."""
    messages = QUICK_MESSAGES if settings.quick else MESSAGES
    for shape in SHAPES:
        rounds = {shape.beside: Rounds(), shape.layout: Rounds()}
        for _ in range(settings.rounds):
            for layout, each in rounds.items():
                with settings.store() as data:
                    arguments = ["--data", data, "--layout", layout, "--messages", messages]
                    each.results.append(run_child("benchmarks.choosing", arguments))
                result = each.results[-1]
                cpu = result["server_cpu"] / result["messages"] * 1e6
                settings.say(f"{layout}: {result['rate']:,.0f} msg/s, {cpu:.1f} µs CPU")
        yield from rows(shape, rounds[shape.layout], rounds[shape.beside])


def rows(shape: Shape, ours: Rounds, beside: Rounds) -> Iterator[Row]:
    """Rate, and memory on top of what was there before anybody consumed, of one shape."""
    rate, other = ours.median("rate"), beside.median("rate")
    yield Row(
        case="choosing",
        name=shape.name,
        figure=rate,
        unit="msg/s",
        low=min(ours.values("rate")),
        high=max(ours.values("rate")),
        beside=shape.beside_name,
        beside_figure=other,
        target=f">= {SHARE:.0%} of it" if shape.judged else "",
        met=rate >= SHARE * other if shape.judged else None,
        cpu_us=ours.cpu_us,
        details={"ours": ours.results, "beside": beside.results, "beside_cpu_us": beside.cpu_us},
    )
    yield Row(
        case="choosing",
        name=f"{shape.name}: memory",
        figure=ours.median("memory") / 1e6,
        unit="MB",
        beside=shape.beside_name,
        beside_figure=beside.median("memory") / 1e6,
    )


def main() -> None:
    """The command line of the measured process."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosing")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--messages", type=int, required=True, help=f"a multiple of {CHUNK_MESSAGES}")
    options = parser.parse_args()
    print(json.dumps(trio.run(measure, options.data, LAYOUTS[options.layout], options.messages)))


if __name__ == "__main__":
    main()
