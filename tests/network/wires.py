"""The wires between brokers of one program: streams in memory on trio's clock, which a test cuts or makes silent at any byte.

As TCP, a stream keeps its order, and what is held is late, not lost; a cut connection is broken at both ends, or at one of them
only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

import trio

Accept = Callable[[trio.abc.Stream], Awaitable[None]]


class Pipe:
    """One direction."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.data: deque[bytes] = deque()
        self.ended = False  # the sender says no more
        self.broken_for_sender = False
        self.broken_for_receiver = False
        self.held = False
        self.passed = 0
        self._changed = trio.Event()

    def change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if self.broken_for_sender or self.ended:
            raise trio.BrokenResourceError
        for piece in self.wire.pass_on(data):
            self.data.append(piece)
            self.passed += len(piece)
        self.change()

    async def receive(self, count_max: int) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            if self.broken_for_receiver:
                raise trio.BrokenResourceError
            if not self.held:
                if self.data:
                    piece = self.data.popleft()
                    if len(piece) > count_max:
                        self.data.appendleft(piece[count_max:])
                    return piece[:count_max]
                if self.ended:
                    return b""
            await self._changed.wait()


class End(trio.abc.HalfCloseableStream):
    """One end of a connection."""

    def __init__(self, outward: Pipe, inward: Pipe) -> None:
        self.outward = outward
        self.inward = inward

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.outward.send(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        await trio.lowlevel.checkpoint()
        self.outward.ended = True
        self.outward.change()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.inward.receive(max_bytes or 65_536)

    async def aclose(self) -> None:
        self.outward.ended = True
        self.outward.change()
        self.inward.broken_for_sender = True
        self.inward.change()
        await trio.lowlevel.checkpoint()


class Wire:
    """A connection between two brokers.

    source, target  the brokers' names
    limit  bytes of both directions together that get through; then `fault` happens
    """

    def __init__(self, source: str, target: str, limit: int | None = None, fault: str = "cut") -> None:
        self.source = source
        self.target = target
        self.limit = limit
        self.fault = fault
        self.passed = 0
        there, back = Pipe(self), Pipe(self)
        self.pipes = (there, back)
        self.ends = (End(there, back), End(back, there))

    def pass_on(self, data: bytes) -> list[bytes]:
        """What of `data` gets through, and what befalls the connection by it."""
        if self.limit is not None and self.passed + len(data) >= self.limit:
            data = data[: self.limit - self.passed]
            self.limit = None
            self.passed += len(data)
            self.happen(self.fault)
            return [data] if data else []
        if self.limit is None and self.fault == "over":
            return []
        self.passed += len(data)
        return [data] if data else []

    def happen(self, fault: str) -> None:
        if fault == "cut":
            self.cut()
        else:
            self.hold()
        self.fault = "over"

    def cut(self) -> None:
        """Broken at both ends; what was on its way is lost."""
        for pipe in self.pipes:
            pipe.broken_for_sender = pipe.broken_for_receiver = True
            pipe.change()

    def break_for(self, name: str) -> None:
        """Broken, and only this end is told so: the other hears nothing ever again."""
        there, back = self.pipes
        outward, inward = (there, back) if name == self.source else (back, there)
        outward.broken_for_sender = inward.broken_for_receiver = True
        outward.held = inward.held = True
        outward.change()
        inward.change()

    def hold(self) -> None:
        """Nothing gets through any more, and nobody is told."""
        for pipe in self.pipes:
            pipe.held = True

    def let_go(self) -> None:
        for pipe in self.pipes:
            pipe.held = False
            pipe.change()
