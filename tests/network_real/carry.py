"""Carries messages from one broker to another, as a process outside: ``python -m tests.network_real.carry FROM TO COUNT [CERTIFICATE,KEY,CA]``.

Consumes at TO, sends COUNT messages to FROM (native URLs both; PEM files for TLS), and ends with 0 when each has come once,
unchanged and in order.
"""

from __future__ import annotations

import sys

import trio

import pybroker

Q = "/queue/carried"
TIMEOUT = 20.0  # seconds


async def carry(source: str, target: str, count: int, files: list[str]) -> None:
    tls = dict(zip(("certificate", "key", "ca"), files, strict=False))
    bodies = [b"%d" % number for number in range(count)]
    with trio.fail_after(TIMEOUT):
        async with pybroker.connect(source, **tls) as sender, pybroker.connect(target, **tls) as receiver:
            async with receiver.subscribe(Q) as messages:
                for body in bodies:
                    await sender.send(Q, body)
                found = []
                while len(found) < count:
                    message = await messages.receive()
                    found.append(message.body)
                    await message.ack()
            assert found == bodies, found


if __name__ == "__main__":
    trio.run(carry, sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4].split(",") if len(sys.argv) > 4 else [])
