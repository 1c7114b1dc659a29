"""Feeds bytes to STOMP sessions in every way a network may cut them, and says what came out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from hypothesis import settings

from pybroker.config import StompLimits
from pybroker.protocols.stomp_client import StompClientSession
from pybroker.protocols.stomp_events import Connect, Event, Failed, Send
from pybroker.protocols.stomp_send import HeaderMemo
from pybroker.protocols.stomp_session import StompSession

VERSIONS = ("1.0", "1.1", "1.2")
steady = settings(deadline=None)  # a busy machine is no failure


def connect_frame(version: str) -> bytes:
    accept = b"" if version == "1.0" else b"accept-version:" + version.encode() + b"\n"
    return b"CONNECT\n" + accept + b"host:localhost\n\n\0"


def new_session(limits: StompLimits | None = None, memo: HeaderMemo | None = None) -> StompSession:
    return StompSession(limits or StompLimits(), durable_default=True, server="pybroker/test", memo=memo)


def open_session(
    version: str = "1.2", limits: StompLimits | None = None, memo: HeaderMemo | None = None
) -> StompSession:
    """A server session after CONNECT and CONNECTED."""
    session = new_session(limits, memo)
    session.receive_data(connect_frame(version))
    (event,) = session.next_events(10)
    assert isinstance(event, Connect)
    session.accept("session-1")
    session.data_to_send()
    return session


def open_client(version: str = "1.2") -> StompClientSession:
    """A client session after CONNECT and CONNECTED."""
    client = StompClientSession()
    client.connect(versions=(version,))
    client.data_to_send()
    client.receive_data(b"CONNECTED\nversion:" + version.encode() + b"\n\n\0")
    assert len(client.next_events(10)) == 1
    return client


def drain(session: StompSession | StompClientSession, count_max: int = 3) -> list[Event]:
    """All events that are there, accepting a CONNECT on the way."""
    events: list[Event] = []
    while found := session.next_events(count_max):
        assert len(found) <= count_max
        events += found
        if isinstance(session, StompSession) and isinstance(found[-1], Connect):
            session.accept("session-1")
    return events


def plain(event: Event) -> object:
    """An event in a form that compares by value."""
    if isinstance(event, Send):
        message = event.message
        fields = (message.destination, message.body, message.header_block)
        fields += (message.durable, message.priority, message.expires)
        return ("Send", *fields, event.transaction, event.receipt, event.numbered)
    if isinstance(event, Failed):
        return ("Failed", type(event.error), str(event.error))
    return event


def feed(session: StompSession | StompClientSession, pieces: Iterable[bytes]) -> tuple[list[Event], bytes]:
    events: list[Event] = []
    for piece in pieces:
        session.receive_data(piece)
        events += drain(session)
    return events, session.data_to_send()


def every_way(
    make: Callable[[], StompSession | StompClientSession], data: bytes, seed: int = 0
) -> tuple[list[Event], bytes]:
    """Feed data whole, byte by byte, cut at random, and with more after it; demand the same each time."""
    session = make()
    events, output = feed(session, [data])
    expected = [plain(event) for event in events]
    generator = random.Random(seed)
    cuts = sorted(generator.randrange(len(data) + 1) for _ in range(5))
    pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    ways = {
        "byte by byte": [data[at : at + 1] for at in range(len(data))],
        f"cut at {cuts}": [piece for piece in pieces if piece],
    }
    if not session.buffered_bytes:  # whole frames, or nothing is read any more: what follows changes nothing
        ways["with heart-beats after it"] = [data + b"\n\n\n"]
        ways["with the start of a frame after it"] = [data + b"\n", b"S"]
    for way, split in ways.items():
        again, output_again = feed(make(), split)
        assert [plain(event) for event in again] == expected, way
        assert output_again == output, way
    return events, output
