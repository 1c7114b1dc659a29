"""A broker in memory on virtual time, somebody who attacks it, and a well-behaved client that must notice nothing.

Owns what holds after every attack (`Arena.check`): nothing was logged as a failure, the attacker's connections are gone with all
that they held, the core's invariants hold, and the well-behaved client is served. Knows no protocol's rules.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio
from trio.testing import MockClock, lockstep_stream_pair, memory_stream_pair

from pybroker.broker import Broker
from pybroker.core.invariants import check_invariants
from tests.engine.support import Disk, broker_on
from tests.support.wire import Peer, frame

PATIENCE = 120.0  # seconds of virtual time after which a connection that should have ended has hung
WITNESS = "/queue/witness"


class _Failures(logging.Handler):
    """Keeps what is logged as an error, or with a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            self.found.append(logging.Formatter().format(record))


@contextmanager
def failures() -> Iterator[list[str]]:
    """What the broker logs as a failure while the block runs."""
    handler = _Failures()
    logger = logging.getLogger("pybroker")
    logger.addHandler(handler)
    try:
        yield handler.found
    finally:
        logger.removeHandler(handler)


class Arena:
    """One broker with its well-behaved client."""

    def __init__(self, broker: Broker, witness: Peer, theirs: Any, failed: list[str]) -> None:
        self.broker = broker
        self.core: Any = broker._running().core
        self.failed = failed
        self.witness = theirs  # the broker's end of the well-behaved client's stream
        self._witness = witness
        self._sent = 0
        self._attackers: list[weakref.ref[Any]] = []

    @asynccontextmanager
    async def stream(self, *, native: bool = False, lockstep: bool = False) -> AsyncIterator[Any]:
        """A stream to the broker, which must end its side soon after the block has closed this one."""
        ours, theirs = lockstep_stream_pair() if lockstep else memory_stream_pair()
        ended = trio.Event()

        async def serve() -> None:
            await self.broker._server.serve_stream(theirs, native)
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            before = set(self.broker._server._connections)
            await trio.testing.wait_all_tasks_blocked()
            for connection in self.broker._server._connections - before:
                self._attackers.append(weakref.ref(connection))
            del before
            connection = None
            try:
                yield ours
            finally:
                await trio.aclose_forcefully(ours)
                with trio.CancelScope(shield=True), trio.fail_after(PATIENCE):
                    await ended.wait()

    async def attack(
        self, pieces: Iterable[bytes], *, native: bool = False, reads: bool = True, polite: bool = False
    ) -> bytes:
        """Send these bytes; what came back. `reads`: the answers are read; `polite`: the stream is ended before it is cut."""
        answers = bytearray()
        async with self.stream(native=native, lockstep=not reads) as stream, trio.open_nursery() as nursery:

            async def read() -> None:
                try:
                    while data := await stream.receive_some(65_536):
                        answers.extend(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass

            async def write() -> None:
                try:
                    for piece in pieces:
                        await stream.send_all(piece)
                        await trio.lowlevel.checkpoint()
                    if polite:
                        await stream.send_eof()
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    pass

            if reads:
                nursery.start_soon(read)
            with trio.move_on_after(5):
                await write()
            await trio.sleep(2)
            nursery.cancel_scope.cancel()
        return bytes(answers)

    async def check(self, *, gone: bool = True) -> None:
        """What holds after every attack, and (not `gone`) during it."""
        await self.serve()
        assert not self.failed, self.failed[0]
        check_invariants(self.core)
        if not gone:
            return
        assert self.broker._server.connections == 1, "the attacker's connection is still there"
        assert len(self.core.connections) == 1
        if any(one() is not None for one in self._attackers):
            gc.collect()
        left = [one for one in self._attackers if one() is not None]
        assert not left, (left, [gc.get_referrers(one()) for one in left])
        self._attackers.clear()

    async def serve(self) -> None:
        """The well-behaved client sends and gets a message."""
        self._sent += 1
        body = b"%d" % self._sent
        await self._witness.send(frame("SEND", f"destination:{WITNESS}", body=body))
        got = await self._witness.expect("MESSAGE")
        assert got.body == body
        await self._witness.do("ACK", f"id:{got['ack']}")


@asynccontextmanager
async def arena(**overrides: Any) -> AsyncIterator[Arena]:
    with failures() as failed:
        async with broker_on(Disk(), **overrides) as broker, trio.open_nursery() as nursery:
            ours, theirs = memory_stream_pair()
            nursery.start_soon(broker._server.serve_stream, theirs, False)
            witness = Peer(ours)
            await witness.open()
            await witness.do("SUBSCRIBE", "id:1", f"destination:{WITNESS}", "ack:client-individual")
            yield Arena(broker, witness, theirs, failed)
            await trio.aclose_forcefully(ours)
        assert not failed, failed[0]


def on_virtual_time(story: Callable[[], Awaitable[None]]) -> None:
    """Run an async story in which no time passes but by waiting."""
    trio.run(story, clock=MockClock(autojump_threshold=0))
