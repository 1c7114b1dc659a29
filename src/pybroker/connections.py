"""What connections of every protocol have in common, as the listeners know them, and how a connection is ended.

Owns no protocol and no socket of its own.
"""

from __future__ import annotations

import logging
from typing import Protocol

import trio

from pybroker.errors import BrokerError

log = logging.getLogger("pybroker.server")

RECEIVE_BYTES = 65_536  # most bytes of one read
# What a peer may still send after the last frame, in bytes and seconds, so that it gets to read that frame.
LINGER_BYTES_MAX = 64 * 1024 * 1024
LINGER = 1.0
LAST_WORDS = 1.0  # seconds in which who can't be served is told so


class ServedConnection(Protocol):
    """One connection that a listener has accepted."""

    async def run(self) -> None:
        """Serve the connection until it ends. Never raises but for cancellation."""

    def close(self, error: BrokerError) -> None:
        """Read nothing more; tell the peer why behind all that is being committed, and end."""

    def beat(self, now: float) -> None:
        """Every now and then (`now` is trio's time): say that this side is there; end a peer that has gone silent."""


async def say_last(stream: trio.abc.Stream, data: bytes) -> None:
    """Send the only and last bytes to a peer that can't be served, let it read them, and close the stream."""
    with trio.move_on_after(LAST_WORDS):
        try:
            await stream.send_all(data)
            await linger(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a peer did not wait for the answer")
    await trio.aclose_forcefully(stream)


async def linger(stream: trio.abc.Stream) -> None:
    """Let the peer read the last frame: closing with unread input would make the kernel throw that frame away."""
    socket = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    with trio.move_on_after(LINGER):
        try:
            if isinstance(socket, trio.abc.HalfCloseableStream):
                await socket.send_eof()
            left = LINGER_BYTES_MAX
            while left > 0 and (data := await socket.receive_some(RECEIVE_BYTES)):
                left -= len(data)
        except (trio.BusyResourceError, trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a peer did not wait for the end")
