"""Small programs outside, each a process: ``python -m tests.network_real.carry NAME ARGUMENT...``. All URLs are native ones.

``carry FROM TO COUNT [CERTIFICATE,KEY,CA]``  subscribes at TO, and sends to FROM when it is told to by a line: each message
                                               comes once, unchanged and in order
``strand FROM TO COUNT``  subscribes at TO, and sends to FROM when it is told to by a line; it acknowledges nothing, and stays
``drain AT COUNT``  consumes so many messages, in order, each marked as redelivered

They end with 0 when it is so.
"""

from __future__ import annotations

import sys

import trio

import pybroker
from pybroker.client import Client
from pybroker.subscription import Subscription

Q = "/queue/carried"
TIMEOUT = 20.0  # seconds


def bodies(count: str) -> list[bytes]:
    return [b"%d" % number for number in range(int(count))]


async def send(client: Client, count: str) -> None:
    for body in bodies(count):
        await client.send(Q, body)


async def take(client: Client, count: str, *, redelivered: bool) -> None:
    async with client.subscribe(Q) as messages:
        await take_from(messages, count, redelivered=redelivered)


async def take_from(messages: Subscription, count: str, *, redelivered: bool) -> None:
    for body in bodies(count):
        message = await messages.receive()
        assert (message.body, message.redelivered) == (body, redelivered), (message, message.body, message.deliveries)
        await message.ack()


async def carry(source: str, target: str, count: str, files: str = "") -> None:
    tls = dict(zip(("certificate", "key", "ca"), filter(None, files.split(",")), strict=False))
    async with (
        pybroker.connect(source, **tls) as sender,
        pybroker.connect(target, **tls) as receiver,
        receiver.subscribe(Q) as messages,
        trio.open_nursery() as nursery,
    ):
        await trio.to_thread.run_sync(sys.stdin.readline)
        nursery.start_soon(send, sender, count)
        await take_from(messages, count, redelivered=False)


async def strand(source: str, target: str, count: str) -> None:
    async with pybroker.connect(source) as sender, pybroker.connect(target) as receiver, receiver.subscribe(Q):
        await trio.to_thread.run_sync(sys.stdin.readline)
        await send(sender, count)
        await trio.sleep_forever()


async def drain(url: str, count: str) -> None:
    async with pybroker.connect(url) as receiver:
        await take(receiver, count, redelivered=True)


async def main(name: str, *arguments: str) -> None:
    with trio.fail_after(TIMEOUT):
        await {"carry": carry, "strand": strand, "drain": drain}[name](*arguments)


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
