"""Feeds bytes to the server's session of the native protocol in every way a network may cut them, and says what came out."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import settings

from pybroker.config import NativeLimits
from pybroker.message import Message
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_session import LinkOpening, NativeSession, Opening, Violation

steady = settings(deadline=None)
HELLO = wire.encode_hello({"software": "test"})
FROM_CLIENT = {
    wire.SEND: (1, [["/queue/a", b"", b"", 20, 0]]),
    wire.COMMIT: (1, [], [], []),
    wire.SUBSCRIBE: (1, 1, "/queue/a", "auto", 0, ""),
    wire.UNSUBSCRIBE: (1, 1),
    wire.ACK: (0, 1, [1, 1]),
    wire.NACK: (0, 1, [1, 1]),
    wire.CREDIT: (1, 1),
    wire.REMOVE: (1, "name"),
    wire.CREATE: (1, "remote-temp-queue", "0123456789abcdef"),
    wire.DELETE: (1, "/remote-temp-queue/x"),
    wire.BEAT: (),
    wire.BYE: (),
    wire.ERROR: ("protocol", "text", {}),
}
FROM_BROKER = {
    wire.WELCOME: (1, {}),
    wire.CONFIRM: ([],),
    wire.REFUSED: (1, "full", ""),
    wire.DONE: (1,),
    wire.FAILED: (1, "full", ""),
    wire.DELIVER: (1, 1, []),
    wire.ENDED: (1, "full", ""),
    wire.MEMBERS: ({},),
}


def new_session(limits: NativeLimits | None = None) -> NativeSession:
    return NativeSession(limits or NativeLimits(), 100)


def open_session(limits: NativeLimits | None = None) -> NativeSession:
    session = new_session(limits)
    session.receive_data(HELLO)
    (event,) = session.next_events(10)
    assert isinstance(event, Opening)
    session.accept({})
    session.data_to_send()
    return session


def sends(count: int, first: int = 1, size: int = 1) -> bytes:
    return wire.encode_send(first, [Message("/queue/a", b"x" * size) for _ in range(count)])


def plain(event: Any) -> Any:
    if isinstance(event, Violation):
        return type(event.error), str(event.error)
    if isinstance(event, wire.Send | wire.Commit):
        return type(event), event[0], [(each.destination, each.body) for each in event.messages], event[2:]
    return type(event), event


def drain(session: NativeSession, count_max: int = 3) -> list[Any]:
    events: list[Any] = []
    while found := session.next_events(count_max):
        events += found
        if isinstance(found[-1], Opening):
            session.accept({})
    return events


def joined(events: list[Any]) -> list[Any]:
    """What came in portions, as it was sent."""
    found: list[Any] = []
    for event in events:
        last = found[-1] if found and isinstance(event, wire.Send) else None
        if isinstance(last, wire.Send) and last.first + len(last.messages) == event.first:
            found[-1] = wire.Send(last.first, [*last.messages, *event.messages])
        else:
            found.append(event)
    return [plain(event) for event in found]


def every_way(data: bytes, seed: int = 0) -> list[Any]:
    """Feed data whole, byte by byte, and cut at random; demand the same each time."""
    session = new_session()
    session.receive_data(data)
    events = drain(session)
    generator = random.Random(seed)
    cuts = sorted(generator.randrange(len(data) + 1) for _ in range(5))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    for way in ([data[at : at + 1] for at in range(len(data))], pieces, [*pieces, b"\0"]):
        again = new_session()
        found: list[Any] = []
        for piece in way:
            again.receive_data(piece)
            found += drain(again, 5)
        if events and isinstance(events[-1], LinkOpening):
            assert isinstance(found[-1], LinkOpening)
            assert data.startswith(found[-1].data)
            found[-1] = events[-1]
        assert joined(found) == joined(events)
    return events
