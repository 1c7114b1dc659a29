"""A broker that is none: one end of a link in a test's hands, which says what it is told to and shows what it hears."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from pybroker.message import Message, Route
from pybroker.protocols.link_frames import Forward, LinkFrame, Row, row_of
from pybroker.protocols.link_handshake import Introduction
from pybroker.protocols.link_session import Established, LinkSession
from pybroker.protocols.native_frames import Beat
from tests.network.brokers import Node, World, url

SECRET = b"secret of the network"


class Puppet:
    """Dials a broker as "puppet"."""

    def __init__(self, stream: trio.abc.Stream, **changes: Any) -> None:
        own = Introduction(
            group="default",
            name="puppet",
            life="its life",
            epoch=1,
            nonce=b"n" * 32,
            software="puppet",
            urls=(url("puppet"),),
            heartbeat=0.5,
            frame_bytes_max=1_000_000,
            messages_max=2_000,
            bytes_max=8_000_000,
        )
        self.stream = stream
        self.session = LinkSession(own._replace(**changes), SECRET, dialled=True, handshake_bytes_max=65_536)
        self.heard: list[LinkFrame] = []
        self.ended = trio.Event()

    async def send(self, *frames: bytes) -> None:
        await self.stream.send_all(b"".join(frames))

    async def link(self) -> None:
        await self.send(self.session.data_to_send())
        while self.session.peer is None or self.session.state != "up":
            self.session.receive_data(await self.stream.receive_some())
            while (event := self.session.next_event()) is not None:
                assert isinstance(event, Established)
                break
        await self.send(self.session.data_to_send())

    async def listen(self, *, beating: bool = True) -> None:
        async with trio.open_nursery() as nursery:
            if beating:
                nursery.start_soon(self._beat)
            while True:
                while (event := self.session.next_event()) is not None:
                    if not isinstance(event, Beat):
                        self.heard.append(event)  # type: ignore[arg-type]
                try:
                    data = await self.stream.receive_some()
                except trio.BrokenResourceError:
                    data = b""
                if not data:
                    break
                self.session.receive_data(data)
            nursery.cancel_scope.cancel()
        self.ended.set()

    async def _beat(self) -> None:
        try:
            while True:
                await trio.sleep(0.5)
                await self.send(b"\0\0\0\2\x91\x05")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def wait_ended(self) -> None:
        with trio.fail_after(100):
            await self.ended.wait()

    def of(self, kind: type) -> list[Any]:
        """What was heard of one kind of frame."""
        return [each for each in self.heard if isinstance(each, kind)]

    def forwarded(self) -> list[tuple[int, int, bytes]]:
        """(tag, sequence, body) of all messages that the broker has forwarded."""
        return [
            (frame.first_tag + at, sequence, message.body)
            for frame in self.of(Forward)
            for at, (sequence, message) in enumerate(frame.messages)
        ]


def row(sequence: int, destination: str = "/queue/q", **options: Any) -> Row:
    """A message that the puppet forwards."""
    route = Route(options.pop("passed", ("puppet",)), options.pop("targets", ()), options.pop("deliveries", 0), 4)
    options.setdefault("body", b"%d" % sequence)
    return row_of(sequence, Message(destination, **options, message_id=b"p-%d" % sequence, route=route))


@asynccontextmanager
async def puppet(network: World, node: Node, *, beating: bool = True, **changes: Any) -> AsyncIterator[Puppet]:
    """A puppet that is linked with a broker."""
    async with trio.open_nursery() as nursery:
        found = Puppet(await network.dial("puppet", url(node.place)), **changes)
        await found.link()
        nursery.start_soon(lambda: found.listen(beating=beating))
        await network.wait(lambda: "puppet" in node.linked())
        yield found
        nursery.cancel_scope.cancel()
