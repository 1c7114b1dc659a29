"""Load over the native protocol: the library's own clients, one that sends and one that receives and acknowledges.

``python -m benchmarks.load_native --url pybroker://HOST:PORT --pid PID``; prints one JSON object. With ``--to URL`` the receiver is
at another broker. Sender and receiver share a process, so that the broker has the other core. Every message that is received is
compared with the one that was sent at its place.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AsyncExitStack
from typing import Any

import trio

from benchmarks.processes import cpu_seconds
from benchmarks.wire import CHUNK_MESSAGES, CYCLE_CHUNKS, CYCLE_MESSAGES, Expected, LoadError, body

IN_FLIGHT_MAX = 8_000  # sends that are not confirmed
RECEIVE_MAX = 1_000  # messages that are taken, checked and acknowledged at once
PREFETCH = 8_000
BEHIND_MAX = 1_000_000
SILENCE_MAX = 60.0  # seconds without a message before a run is given up


class Flow:
    """Messages from one client to another one, in batches, each checked."""

    def __init__(self, sender: Any, receiver: Any, options: argparse.Namespace) -> None:
        self._sender = sender
        self._receiver = receiver
        self._options = options
        self._chunks = [
            [(options.destination, body(number, options.size)) for number in range(first, first + CHUNK_MESSAGES)]
            for first in range(0, CYCLE_MESSAGES, CHUNK_MESSAGES)
        ]
        self._chunks_sent = 0
        self._all_sent = False
        self._receiving = trio.CancelScope()
        self._received = trio.Event()
        self.expected = Expected(options.size)
        self.behind_max = 0  # most messages that were sent and not yet received

    @property
    def sent(self) -> int:
        return self._chunks_sent * CHUNK_MESSAGES

    async def run(self, messages: int, seconds: float) -> float:
        """Send so many messages (0: for so many seconds), receive all; seconds until the last acknowledgement is committed."""
        started = time.perf_counter()
        self._all_sent = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, messages, started + seconds)
            async with self._receiver.subscribe(self._options.destination, prefetch=PREFETCH) as subscription:
                with trio.CancelScope() as self._receiving:
                    while not (self._all_sent and self.expected.received == self.sent):
                        await self._receive(subscription)
            return (
                time.perf_counter() - started
            )  # leaving the subscription waits for the commit of all that was said before

    async def _send(self, messages: int, ends: float) -> None:
        chunks, durable = self._chunks, not self._options.volatile
        before, rate, started = self.sent, self._options.rate, trio.current_time()
        goal = before + messages
        async with self._sender.publisher(max_in_flight=IN_FLIGHT_MAX) as publisher:
            while self.sent < goal if messages else time.perf_counter() < ends:
                while self.sent - self.expected.received > self._options.behind:
                    self._received = trio.Event()
                    await self._received.wait()
                if rate:
                    await trio.sleep_until(started + (self.sent - before) / rate)
                await publisher.send_many(chunks[self._chunks_sent % CYCLE_CHUNKS], durable=durable)
                self._chunks_sent += 1
        self._all_sent = True
        if self.expected.received == self.sent:
            self._receiving.cancel()

    async def _receive(self, subscription: Any) -> None:
        try:
            with trio.fail_after(SILENCE_MAX):
                batch = await subscription.receive_batch(RECEIVE_MAX)
        except trio.TooSlowError:
            raise LoadError(f"nothing came for {SILENCE_MAX:g} s; {self.expected.received} of {self.sent}") from None
        self.behind_max = max(self.behind_max, self.sent - self.expected.received)
        self.expected.take_bodies([message.body for message in batch])
        await subscription.ack(batch, confirm=False)
        self._received.set()


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, once warm; CPU time is that of each process whose id was given."""
    import pybroker  # here, so that the suite's other cases do not need it to be importable

    async with AsyncExitStack() as stack:
        sender = await stack.enter_async_context(pybroker.connect(options.url))
        receiver = await stack.enter_async_context(pybroker.connect(options.to or options.url))
        flow = Flow(sender, receiver, options)
        await flow.run(options.warm, 0.0)
        warm = flow.sent
        own = time.process_time()
        cpu = [cpu_seconds(pid) for pid in options.pid]
        elapsed = await flow.run(options.messages, options.seconds)
        used = [cpu_seconds(pid) - before for pid, before in zip(options.pid, cpu, strict=True)]
        own = time.process_time() - own
    messages = flow.sent - warm
    return {
        "messages": messages,
        "seconds": elapsed,
        "rate": messages / elapsed,
        "server_cpu": sum(used),
        "each_cpu": used,
        "load_cpu": own,
        "behind_max": flow.behind_max,
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_native")
    parser.add_argument("--url", required=True, help="of the broker that is sent to")
    parser.add_argument("--to", default="", help="of the broker that is received from, if it is another one")
    parser.add_argument("--pid", type=int, action="append", default=[], help="of a broker whose CPU time is read")
    parser.add_argument("--destination", default="/queue/benchmark")
    parser.add_argument("--messages", type=int, default=0, help=f"a multiple of {CHUNK_MESSAGES}; 0 = by --seconds")
    parser.add_argument("--seconds", type=float, default=4.0, help="for which it sends")
    parser.add_argument("--behind", type=int, default=BEHIND_MAX, help="messages that may be sent and not yet received")
    parser.add_argument("--rate", type=float, default=0.0, help="messages a second; 0 = as fast as it goes")
    parser.add_argument("--warm", type=int, default=5_000, help="messages before it counts")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--volatile", action="store_true", help="messages are not durable")
    print(json.dumps(trio.run(measure, parser.parse_args())))


if __name__ == "__main__":
    main()
