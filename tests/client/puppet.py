"""A broker that does what a test tells it, frame by frame: for what a real one never does, or not when one wants it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from pybroker.message import Message
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_decoding import FrameCutter, HeaderBlocks, decode_frame
from pybroker.protocols.native_frames import Beat, Commit, Frame, Hello, Send, Subscribe

LIMITS = {
    "heartbeat": 5.0,
    "body_bytes_max": 10_000,
    "frame_bytes_max": 1_000_000,
    "send_messages_max": 100,
    "send_bytes_max": 50_000,
}
Kind = TypeVar("Kind", bound=Frame)


class Peer:
    """One connection, from the broker's side. `producer`: what the client's HELLO said."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._cutter = FrameCutter(2**31, "none")
        self._blocks = HeaderBlocks()
        self.producer = ""

    async def next(self, beats: bool = False) -> Frame | None:
        """The next frame, None at the end of the stream."""
        while True:
            fields = self._cutter.next()
            if fields is not None:
                frame = decode_frame(fields, self._blocks)
                if beats or not isinstance(frame, Beat):
                    return frame
                continue
            data = await self._stream.receive_some()
            if not data:
                return None
            self._cutter.feed(data)

    async def expect(self, kind: type[Kind]) -> Kind:
        frame = await self.next()
        assert isinstance(frame, kind), frame
        return frame

    async def say(self, *frames: bytes) -> None:
        await self._stream.send_all(b"".join(frames))

    async def welcome(self, known: bool = True, **options: Any) -> Hello:
        """Read HELLO and let the client in."""
        hello = await self.expect(Hello)
        self.producer = hello.options["producer"]
        await self.say(wire.encode_welcome(1, {**LIMITS, "broker": "puppet", "producer_known": known, **options}))
        return hello

    async def open_subscription(self) -> Subscribe:
        frame = await self.expect(Subscribe)
        await self.say(wire.encode_done(frame.request))
        return frame

    async def deliver(self, subscription: int, first_tag: int, *bodies: bytes, deliveries: int = 0) -> None:
        rows = [(Message("/queue/q", body, b"", message_id=b"m-" + body, timestamp=1), deliveries) for body in bodies]
        await self.say(wire.encode_deliver(subscription, first_tag, rows))

    async def confirm(self, first: int, last: int | None = None) -> None:
        await self.say(wire.encode_confirm([(first, first if last is None else last, True)]))

    async def confirm_all(self) -> None:
        """Confirm whatever is sent, until the client leaves; answer its BYE."""
        while (frame := await self.next()) is not None:
            if isinstance(frame, Send):
                await self.confirm(frame.first, frame.first + len(frame.messages) - 1)
            elif isinstance(frame, Commit):
                await self.confirm(frame.sequence)
            elif isinstance(frame, wire.Bye):
                await self.say(wire.encode_bye())
                return
            elif not isinstance(frame, wire.Credit):
                request = getattr(frame, "request", 0)
                if request:
                    await self.say(wire.encode_done(request))

    async def cut(self) -> None:
        await trio.aclose_forcefully(self._stream)

    async def wait_cut(self) -> None:
        """Until the client closes the connection."""
        while await self.next() is not None:
            pass


Script = Callable[[Peer], Awaitable[None]]


class Puppet:
    """Plays one script for each connection, in order; the last one again for all that follow. Faults of scripts are kept."""

    def __init__(self, *scripts: Script) -> None:
        self._scripts = list(scripts)
        self.connections = 0
        self.errors: list[BaseException] = []

    async def serve(self, stream: trio.abc.Stream) -> None:
        script = self._scripts[min(self.connections, len(self._scripts) - 1)]
        self.connections += 1
        try:
            await script(Peer(stream))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        except Exception as error:
            self.errors.append(error)

    def check(self) -> None:
        """Raise what went wrong in a script."""
        if self.errors:
            raise self.errors[0]


async def obliging(peer: Peer) -> None:
    """Lets the client in, and says yes to everything."""
    await peer.welcome()
    await peer.confirm_all()
