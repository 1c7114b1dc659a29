"""A native client that knows nothing of pybroker: sends exactly the frames it is told to, and reads frames strictly.

Written from NATIVE.md, apart from the broker's codec, so that a fault in that one can't hide here. Over memory streams, and
so on virtual time, or over a real socket.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import trio

from pybroker.broker import Broker

HELLO, WELCOME, ERROR, BYE, BEAT = 1, 2, 3, 4, 5
SEND, COMMIT, SUBSCRIBE, UNSUBSCRIBE, ACK, NACK, CREDIT, REMOVE = range(10, 18)
CONFIRM, REFUSED, DONE, FAILED, DELIVER, ENDED, MEMBERS = range(20, 27)
BROWSE, PAGE = 27, 28
FIELDS = {
    WELCOME: 2,
    ERROR: 3,
    BYE: 0,
    BEAT: 0,
    CONFIRM: 1,
    REFUSED: 3,
    DONE: 1,
    FAILED: 3,
    DELIVER: 3,
    ENDED: 3,
    MEMBERS: 1,
    PAGE: 5,
}
DURABLE = 16
TIMEOUT = 10.0  # seconds that a test waits for what must come
QUIET = 0.05  # seconds without a frame after which none is expected
PRODUCER = "producer-0123456789"

Frame = Sequence[Any]


def pack(*frames: Frame) -> bytes:
    """Frames as bytes."""
    payloads = [msgpack.packb(frame, use_bin_type=True) for frame in frames]
    return b"".join(struct.pack(">I", len(payload)) + payload for payload in payloads)


def row(
    body: bytes, destination: str = "/queue/a", *, block: bytes = b"", flags: int = DURABLE | 4, expires: int = 0
) -> Frame:
    """A message to be sent."""
    return [destination, body, block, flags, expires]


def rows(count: int, destination: str = "/queue/a", **options: Any) -> list[Frame]:
    return [row(b"%d" % number, destination, **options) for number in range(count)]


class Delivery:
    """One delivered message, with its tag."""

    def __init__(self, tag: int, fields: Sequence[Any]) -> None:
        self.tag = tag
        (
            self.destination,
            self.body,
            self.block,
            self.flags,
            self.expires,
            self.message_id,
            self.timestamp,
            self.deliveries,
        ) = fields

    def __repr__(self) -> str:
        return f"<{self.body[:20]!r} tag {self.tag} deliveries {self.deliveries}>"


class Peer:
    """One connection. What comes is kept by kind: `confirmed` (sequence to stored), `refused`, deliveries by subscription."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.welcome: dict[str, Any] = {}
        self.confirmed: dict[int, bool] = {}
        self.refused: dict[int, tuple[str, str]] = {}
        self.beats = 0
        self.frames: list[list[Any]] = []  # read, and not asked for yet
        self.sizes: list[int] = []  # of all DELIVER frames, in bytes
        self._buffer = bytearray()
        self._waiting: dict[int, list[Delivery]] = {}
        self._tags: dict[int, int] = {}

    # ---- sending

    async def send(self, *frames: Frame) -> None:
        await self.stream.send_all(pack(*frames))

    async def hello(self, **options: Any) -> dict[str, Any]:
        await self.send([HELLO, "pybroker", [1], options])
        frame = await self.expect(WELCOME)
        assert frame[1] == 1
        self.welcome = frame[2]
        return self.welcome

    async def do(self, *frame: Any) -> None:
        """Send a request (its number is 7), and wait for DONE."""
        await self.send(frame)
        await self.done(7)

    async def subscribe(
        self, number: int, destination: str = "/queue/a", ack: str = "individual", prefetch: int = 0, durable: str = ""
    ) -> None:
        await self.do(SUBSCRIBE, 7, number, destination, ack, prefetch, durable)

    # ---- reading

    async def _read(self) -> bool:
        """Read some, and sort it; False at the end of the stream."""
        data = await self.stream.receive_some(65_536)
        if not data:
            assert not self._buffer, f"the stream ended within a frame: {bytes(self._buffer[:80])!r}"
            return False
        self._buffer += data
        while len(self._buffer) >= 4:
            (length,) = struct.unpack(">I", self._buffer[:4])
            if len(self._buffer) < 4 + length:
                break
            payload = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            frame = msgpack.unpackb(payload, raw=False)
            assert len(frame) == FIELDS[frame[0]] + 1, frame
            self._sort(frame, length)
        return True

    def _sort(self, frame: list[Any], length: int) -> None:
        kind = frame[0]
        if kind == CONFIRM:
            for first, last, stored in frame[1]:
                for sequence in range(first, last + 1):
                    assert sequence not in self.confirmed, f"{sequence} was confirmed twice"
                    assert sequence not in self.refused
                    self.confirmed[sequence] = stored
        elif kind == REFUSED:
            assert frame[1] not in self.confirmed
            self.refused[frame[1]] = (frame[2], frame[3])
        elif kind == DELIVER:
            self.sizes.append(length)
            subscription, tag, messages = frame[1:]
            assert messages
            for at, fields in enumerate(messages):
                assert tag + at > self._tags.get(subscription, 0), "tags must rise"
                self._tags[subscription] = tag + at
                self._waiting.setdefault(subscription, []).append(Delivery(tag + at, fields))
        elif kind == BEAT:
            self.beats += 1
        else:
            self.frames.append(frame)

    async def _until(self, condition: Any, what: str) -> None:
        with trio.move_on_after(TIMEOUT):
            while not condition():
                if not await self._read():
                    raise AssertionError(f"the stream ended before {what}; {self.frames}")
            return
        raise AssertionError(f"{what} did not come; {self.frames} did")

    async def frame(self) -> list[Any]:
        """The next frame that is no CONFIRM, REFUSED, DELIVER or BEAT."""
        await self._until(lambda: self.frames, "a frame")
        return self.frames.pop(0)

    async def expect(self, kind: int) -> list[Any]:
        frame = await self.frame()
        assert frame[0] == kind, frame
        return frame

    async def done(self, request: int) -> None:
        assert await self.frame() == [DONE, request]

    async def failed(self, request: int, code: str) -> str:
        frame = await self.frame()
        assert frame[:3] == [FAILED, request, code], frame
        text = frame[3]
        assert isinstance(text, str)
        return text

    async def confirms(self, *sequences: int) -> None:
        """Wait until these are confirmed."""
        await self._until(
            lambda: self.confirmed.keys() >= set(sequences), f"the confirmation of {sequences[0]} to {sequences[-1]}"
        )

    async def refusal(self, sequence: int) -> tuple[str, str]:
        await self._until(lambda: sequence in self.refused, f"the refusal of {sequence}")
        return self.refused[sequence]

    async def deliveries(self, number: int, count: int) -> list[Delivery]:
        """The next `count` deliveries of a subscription."""
        await self._until(lambda: len(self._waiting.get(number, ())) >= count, f"{count} deliveries of {number}")
        waiting = self._waiting[number]
        self._waiting[number] = waiting[count:]
        return waiting[:count]

    def received(self, number: int) -> list[Delivery]:
        """Deliveries that came, and were not asked for yet."""
        return self._waiting.get(number, [])

    async def delivery(self, number: int) -> Delivery:
        (one,) = await self.deliveries(number, 1)
        return one

    async def silent(self) -> None:
        """Nothing but heart-beats and what was asked for before comes."""
        before = self._seen()
        with trio.move_on_after(QUIET):
            while await self._read():
                assert self._seen() == before, self.frames
            raise AssertionError("the stream ended")

    def _seen(self) -> tuple[int, ...]:
        waiting = sum(map(len, self._waiting.values()))
        return len(self.frames), len(self.confirmed), len(self.refused), waiting

    async def listen(self, seconds: float) -> None:
        """Read all that comes for so long."""
        with trio.move_on_after(seconds):
            while await self._read():
                pass

    async def error(self, code: str) -> list[Any]:
        """The ERROR with which the connection ends: nothing comes behind it."""
        frames = await self.end()
        assert frames, "the connection ended without a word"
        assert frames[-1][:2] == [ERROR, code], frames
        return frames[-1]

    async def end(self) -> list[list[Any]]:
        """Read to the end of the stream; the frames that came."""
        with trio.fail_after(TIMEOUT):
            while await self._read():
                pass
        return self.frames


def flat(tags: Iterable[int]) -> list[int]:
    """Ranges of tags, each on its own."""
    return [end for tag in tags for end in (tag, tag)]


@asynccontextmanager
async def connected(broker: Broker, *, lockstep: bool = False, **options: Any) -> AsyncIterator[Peer]:
    """A client of a broker in this process, over memory streams; `options` are those of HELLO (``hello=False``: none is said).

    `lockstep`: the stream takes nothing before it is read.
    """
    ours, theirs = trio.testing.lockstep_stream_pair() if lockstep else trio.testing.memory_stream_pair()
    ended = trio.Event()

    async def serve() -> None:
        await broker._server.serve_stream(theirs, True)
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        peer = Peer(ours)
        if options.pop("hello", True):
            await peer.hello(**options)
        yield peer
        await ours.aclose()
        with trio.fail_after(TIMEOUT):
            await ended.wait()


@asynccontextmanager
async def dialled(port: int, **options: Any) -> AsyncIterator[Peer]:
    """A client over a real socket."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        peer = Peer(stream)
        await peer.hello(**options)
        yield peer
