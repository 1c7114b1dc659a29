"""Frames over a trio stream. Owns its reading and writing; knows nothing of what the frames mean.

Several tasks may send; a send that was cancelled or failed may have written half a frame, so the stream is not used again
after it. How long to wait is the callers' affair.
"""

from __future__ import annotations

import trio

from pybroker.cluster.frames import HANDSHAKE_BYTES_MAX, Frame, FrameReader, encode
from pybroker.errors import BrokerError

RECEIVE_BYTES = 256 * 1024  # most bytes of one read


class LinkBroken(BrokerError):
    """The connection between two replicas ended, is silent, or was ended here; the text says which."""

    code = "link-broken"


class FrameStream:
    """A stream of bytes as one of frames."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.reader = FrameReader(HANDSHAKE_BYTES_MAX)
        self._stream = stream
        self._writing = trio.Lock()
        self._left = False  # there may be whole frames in the reader
        self._broken = False

    async def receive(self, silence: float) -> list[Frame]:
        """The frames of one read; perhaps none that is whole yet. Raises LinkBroken (also after `silence` seconds without a byte)
        and ProtocolError.
        """
        if self._left:
            self._left = False
            frames = self.reader.feed(b"")
            if frames:
                return frames
        return self.reader.feed(await self._read(silence))

    async def _read(self, silence: float) -> bytes | bytearray:
        data: bytes | bytearray | None = None
        try:
            with trio.move_on_after(silence):
                data = await self._stream.receive_some(RECEIVE_BYTES)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LinkBroken("the connection was reset") from error
        if data is None:
            raise LinkBroken(f"silent for {silence:g} s")
        if not data:
            raise LinkBroken("the peer closed the connection")
        return data

    async def receive_one(self, silence: float) -> Frame:
        """One frame; what came with it waits for the next call of either method, and the limits of that moment."""
        frames = self.reader.feed(b"", 1) if self._left else []
        while not frames:
            frames = self.reader.feed(await self._read(silence), 1)
        self._left = True
        return frames[0]

    async def send(self, data: bytes) -> None:
        """Send encoded frames. Raises LinkBroken."""
        async with self._writing:
            if self._broken:
                raise LinkBroken("an earlier write was cut short")
            self._broken = True
            try:
                await self._stream.send_all(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                raise LinkBroken("the connection was reset") from error
            self._broken = False

    async def send_frame(self, frame: Frame) -> None:
        await self.send(encode(frame))

    async def farewell(self, frame: Frame, deadline: float) -> None:
        """A last frame, if the peer takes it within `deadline` seconds; whatever comes of it, the stream is over then."""
        with trio.move_on_after(deadline):
            try:
                await self.send_frame(frame)
            except LinkBroken:
                return
