"""A broker joins a network while the others serve: what their clients notice of it. Part of case `network`.

``python -m benchmarks.joining --url URL ... --discovery URL`` sends durable messages at a fixed rate to each broker, in stretches
of time in which nothing else happens and stretches that each begin with a broker that joins; prints one JSON object. Latency is
counted from when a message was due (see `load_paced`). The one that joins lives in a process that is up already, so that the start
of a Python interpreter is no part of it: ``python -m benchmarks.joining --joiner --discovery URL``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import AsyncExitStack
from typing import Any

import trio

from benchmarks.load_paced import percentiles
from benchmarks.processes import ROOT, ServerFailed
from benchmarks.wire import body

DESTINATION = "/queue/benchmark.joining"
LINKED_MAX = 30.0  # seconds for a broker to be linked with all others
LOOK_INTERVAL = 0.01  # seconds
PAUSE = 1.0  # seconds between two stretches
SIZE = 256


# ---- the broker that joins


async def join_when_told(discovery: str, others: int) -> None:
    """For each line on stdin: open a broker, say when it is linked with all others; at the next line, close it."""
    import pybroker  # here, so that the suite's other cases do not need it to be importable

    while await trio.to_thread.run_sync(sys.stdin.readline):
        network = {"discovery": discovery}
        async with pybroker.open_broker(name="joiner", listen=["pybroker://127.0.0.1:0"], network=network) as broker:
            with trio.fail_after(LINKED_MAX):
                while sum(peer.state == "linked" for peer in broker.network_status().peers) < others:  # noqa: ASYNC110
                    await trio.sleep(LOOK_INTERVAL)
            print("linked", flush=True)
            await trio.to_thread.run_sync(sys.stdin.readline)
        print("left", flush=True)


class Joiner:
    """The process of the broker that joins."""

    def __init__(self, discovery: str, others: int) -> None:
        command = [sys.executable, "-m", "benchmarks.joining", "--joiner", "--discovery", discovery]
        self._process = subprocess.Popen(
            [*command, "--others", str(others)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
        )

    async def say(self, answer: str) -> None:
        """Let it join, or leave; returns when it has."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write("\n")
        stdin.flush()
        said = await trio.to_thread.run_sync(stdout.readline)
        if said.strip() != answer:
            raise ServerFailed(f"the broker that joins said {said!r} and not {answer!r}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


# ---- the load


async def send_paced(client: Any, rate: float, seconds: float, latencies: list[float]) -> None:
    """Send at that rate; the seconds from when each was due to its confirmation."""
    start = trio.current_time()

    async def send(number: int, due: float) -> None:
        await client.send(DESTINATION, body(number, SIZE))
        latencies.append(trio.current_time() - due)

    async with trio.open_nursery() as nursery:
        for number in range(int(rate * seconds)):
            due = start + number / rate
            await trio.sleep_until(due)
            nursery.start_soon(send, number, due)


async def consume(client: Any) -> None:
    async with client.subscribe(DESTINATION) as messages:
        while True:
            await messages.ack(await messages.receive_batch(100), confirm=False)


async def stretch(clients: list[Any], rate: float, seconds: float, joiner: Joiner | None) -> list[float]:
    """Load all brokers for so long; the latencies of all. With `joiner` that one joins as soon as the load is on."""
    latencies: list[float] = []
    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(send_paced, client, rate, seconds, latencies)
        if joiner is not None:
            await joiner.say("linked")
    if joiner is not None:
        await joiner.say("left")
    await trio.sleep(PAUSE)
    return latencies


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Quiet stretches and joins in turns. `p99_ms` of each are medians over the stretches."""
    import pybroker

    joiner = Joiner(options.discovery, len(options.url))
    try:
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(pybroker.connect(url)) for url in options.url]
            nursery = await stack.enter_async_context(trio.open_nursery())
            for client in clients:
                nursery.start_soon(consume, client)
            await stretch(clients, options.rate, options.seconds, None)  # warm
            quiet, joining = [], []
            for _ in range(options.rounds):
                quiet.append(percentiles(await stretch(clients, options.rate, options.seconds, None)))
                joining.append(percentiles(await stretch(clients, options.rate, options.seconds, joiner)))
            nursery.cancel_scope.cancel()
    finally:
        joiner.close()
    return {
        "quiet": quiet,
        "joining": joining,
        "quiet_p99_ms": statistics.median(each["p99_ms"] for each in quiet),
        "joining_p99_ms": statistics.median(each["p99_ms"] for each in joining),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.joining")
    parser.add_argument("--url", action="append", default=[], help="of each broker")
    parser.add_argument("--discovery", required=True, help="where the brokers find each other")
    parser.add_argument("--rate", type=float, default=200.0, help="messages a second to each broker")
    parser.add_argument("--seconds", type=float, default=3.0, help="of one stretch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--joiner", action="store_true", help="be the broker that joins, when told on stdin")
    parser.add_argument("--others", type=int, default=0, help="how many brokers it is to be linked with")
    options = parser.parse_args()
    if options.joiner:
        trio.run(join_when_told, options.discovery, options.others)
    else:
        print(json.dumps(trio.run(measure, options)))


if __name__ == "__main__":
    main()
