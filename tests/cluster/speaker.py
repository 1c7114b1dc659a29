"""One broker's discovery as a program of its own, for tests on real networks: ``python -m tests.cluster.speaker URL [NAME ...]``.

Announces each NAME (none: it only listens), and prints the names and URLs that it knows, one line of JSON at each change. Ends in
good order at SIGTERM or when its standard input ends. `PYBROKER_SECRET` in the environment is the group's secret.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from functools import partial

import trio

from pybroker.cluster.announcer import Announcer, listen_for_peers
from pybroker.cluster.discovery import parse_discovery
from pybroker.cluster.peers import PeerTable


async def speak(url: str, names: list[str]) -> None:
    discovery, secret = parse_discovery(url), os.environ.get("PYBROKER_SECRET", "")
    table = PeerTable(timeout=2.0)
    host = discovery.interface or "localhost"
    announcers = [
        Announcer(
            discovery, name=name, node=name, epoch=0, urls=[f"pybroker://{host}:{port}"], secret=secret, interval=0.2
        )
        for port, name in enumerate(names, 1)
    ]
    own = frozenset(announcer.boot for announcer in announcers)
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(partial(listen_for_peers, discovery, table, secret=secret, own_boots=own))
            for announcer in announcers:
                await nursery.start(announcer.run)
            nursery.start_soon(show, table)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()


async def show(table: PeerTable) -> None:
    snapshot = table.snapshot()
    while True:
        print(json.dumps({name: list(peer.urls) for name, peer in snapshot.peers.items()}), flush=True)
        snapshot = await table.wait_change(snapshot.version)


if __name__ == "__main__":
    logging.basicConfig(level="INFO", stream=sys.stderr)
    trio.run(speak, sys.argv[1], sys.argv[2:])
