"""A control socket whose answers a test gives, served by a thread: the broker's side of a command."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import trio

from pybroker.control import ControlServer, Handler

START_TIMEOUT = 10.0


@contextmanager
def answering(directory: Path, handlers: Mapping[str, Handler]) -> Iterator[None]:
    """Answer at a directory while the block runs."""
    started = threading.Event()
    stops: list[tuple[trio.lowlevel.TrioToken, trio.CancelScope]] = []

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(ControlServer(directory, handlers).run)
            stops.append((trio.lowlevel.current_trio_token(), nursery.cancel_scope))
            started.set()

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    try:
        assert started.wait(START_TIMEOUT)
        yield
    finally:
        for token, scope in stops:
            token.run_sync_soon(scope.cancel)
        thread.join(START_TIMEOUT)
        assert not thread.is_alive()
