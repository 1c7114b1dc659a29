"""A network of brokers in one process, all linked with each other: how soon all know of a new consumer, and of a new broker.

Real sockets on loopback, stores in memory, discovery by multicast on loopback. Part of case `network`; the measured part is a
process of its own: ``python -m benchmarks.mesh --brokers N --rounds N``; prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import trio

WAIT_MAX = 120.0  # seconds for all of it
LOOK_INTERVAL = 0.02  # seconds between two looks at all brokers
STANDING_QUEUES = 100  # that somebody consumes already, spread over the brokers
PORT = 6_155


class Mesh:
    """Brokers of one group of their own. `url`: where they find each other."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.url = f"multicast://239.255.2.3:{PORT}?group=benchmark-{os.getpid()}&interface=127.0.0.1"
        self.brokers: list[Any] = []

    async def add(self) -> Any:
        """One more broker."""
        import pybroker  # here, so that the suite's other cases do not need it to be importable

        broker = await self._stack.enter_async_context(
            pybroker.open_broker(
                name=f"broker-{len(self.brokers):02}",
                listen=["pybroker://127.0.0.1:0"],
                network={"discovery": self.url},
            )
        )
        self.brokers.append(broker)
        return broker

    def linked(self, broker: Any) -> bool:
        """Whether a broker is linked with all others."""
        states = [peer.state for peer in broker.network_status().peers]
        return len(states) == len(self.brokers) - 1 and all(state == "linked" for state in states)

    async def wait_whole(self) -> None:
        """Wait until all are linked with each other."""
        while not all(map(self.linked, self.brokers)):  # noqa: ASYNC110
            await trio.sleep(LOOK_INTERVAL)


async def demand_round(clients: Sequence[Any], consumer: Any, queue: str) -> float:
    """Seconds from a subscription at one broker until a message that waited at each of the others has come.

    So it is known to all then, and each link has carried something.
    """
    senders = [client for client in clients if client is not consumer]
    for client in senders:
        await client.send(queue, b"waiting")
    started = time.perf_counter()
    async with consumer.subscribe(queue) as messages:
        for _ in senders:
            await (await messages.receive()).ack()
        return time.perf_counter() - started


async def join_round(mesh: Mesh, stack: AsyncExitStack, clients: list[Any]) -> float:
    """Seconds from opening one more broker until it has had a message that waited at each of the others."""
    queue = f"/queue/benchmark.joined.{len(mesh.brokers)}"
    for client in clients:
        await client.send(queue, b"waiting")
    started = time.perf_counter()
    joined = await stack.enter_async_context((await mesh.add()).connect())
    async with joined.subscribe(queue) as messages:
        for _ in clients:
            await (await messages.receive()).ack()
        return time.perf_counter() - started


async def measure(brokers: int, rounds: int) -> dict[str, Any]:
    """Build the mesh, change demand in it, and let one more broker join. Raises TooSlowError when that never ends."""
    with trio.fail_after(WAIT_MAX):
        async with AsyncExitStack() as stack:
            return await _measure(stack, brokers, rounds)


async def _measure(stack: AsyncExitStack, brokers: int, rounds: int) -> dict[str, Any]:
    mesh = Mesh(stack)
    started = time.perf_counter()
    for _ in range(brokers):
        await mesh.add()
    await mesh.wait_whole()
    built = time.perf_counter() - started
    clients = [await stack.enter_async_context(broker.connect()) for broker in mesh.brokers]
    for number in range(STANDING_QUEUES):
        await stack.enter_async_context(clients[number % brokers].subscribe(f"/queue/benchmark.standing.{number}"))
    demand = [
        await demand_round(clients, clients[number % brokers], f"/queue/benchmark.new.{number}")
        for number in range(rounds)
    ]
    joined = await join_round(mesh, stack, clients)
    return {"brokers": brokers, "built": built, "demand": demand, "joined": joined}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mesh")
    parser.add_argument("--brokers", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10, help="subscriptions that come and go")
    options = parser.parse_args()
    print(json.dumps(trio.run(measure, options.brokers, options.rounds)))


if __name__ == "__main__":
    main()
