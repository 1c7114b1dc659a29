"""Two ends of a link without a network: who they are, how they are joined, and bytes fed in every way a network may cut them."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import settings

from pybroker.errors import BrokerError
from pybroker.message import Message, Route
from pybroker.protocols.link_frames import Forward
from pybroker.protocols.link_handshake import Introduction
from pybroker.protocols.link_session import Established, LinkSession

steady = settings(deadline=None)  # a busy machine is no failure
SECRET = b"a secret of the network"


def introduction(name: str = "a", **changes: Any) -> Introduction:
    own = Introduction(
        group="default",
        name=name,
        life=f"life-of-{name}",
        epoch=1,
        nonce=name.encode()[:1] * 32,
        software="pybroker/test",
        urls=(f"pybroker://{name}:61620",),
        heartbeat=0.5,
        frame_bytes_max=1_000_000,
        messages_max=100,
        bytes_max=1_000_000,
    )
    return own._replace(**changes)


def session(
    own: Introduction | None = None, *, dialled: bool = False, secret: bytes | None = SECRET, **options: Any
) -> LinkSession:
    options.setdefault("handshake_bytes_max", 65_536)
    return LinkSession(own or introduction("a" if dialled else "b"), secret, dialled=dialled, **options)


def join(dialler: LinkSession, acceptor: LinkSession) -> None:
    """Let two ends link. Raises what either of them raises."""
    for source, target in ((dialler, acceptor), (acceptor, dialler), (dialler, acceptor)):
        target.receive_data(source.data_to_send())
        while (event := target.next_event()) is not None:
            assert isinstance(event, Established)
    assert dialler.state == acceptor.state == "up"


def pair(secret: bytes | None = SECRET) -> tuple[LinkSession, LinkSession]:
    """Two ends that are linked: "a" has dialled "b"."""
    dialler, acceptor = session(dialled=True, secret=secret), session(secret=secret)
    join(dialler, acceptor)
    return dialler, acceptor


def message(sequence: int = 1, passed: tuple[str, ...] = ("a",), **options: Any) -> Message:
    route = Route(passed, options.pop("targets", ()), options.pop("deliveries", 0), options.pop("priority", 4))
    options.setdefault("destination", "/queue/q")
    options.setdefault("body", b"%d" % sequence)
    return Message(**options, message_id=b"id-%d" % sequence, timestamp=1_000 + sequence, route=route)


def plain(event: object) -> object:
    """An event in a form that compares by value."""
    if isinstance(event, Forward):
        rows = [(sequence, *(getattr(each, name) for name in Message.__slots__)) for sequence, each in event.messages]
        return ("Forward", event.lane, event.namespace, event.first_tag, rows)
    return event


def drain(end: LinkSession) -> list[object]:
    """All events that are there; an error of the peer is the last one, and the end has answered it."""
    found: list[object] = []
    try:
        while (event := end.next_event()) is not None:
            found.append(plain(event))
    except BrokerError as error:
        found.append((error.__class__, error.code, str(error)))
        end.error(error)
    return found


def every_way(make: Any, data: bytes, seed: int = 0) -> list[object]:
    """Feed data whole, byte by byte, cut at random, and with more after it; demand the same each time."""
    generator = random.Random(seed)
    cuts = sorted(generator.randrange(len(data) + 1) for _ in range(5))
    ways = {
        "whole": [data],
        "byte by byte": [data[at : at + 1] for at in range(len(data))],
        f"cut at {cuts}": [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)],
        "with the start of a frame after it": [data, b"\0\0"],
    }
    results = {}
    for way, pieces in ways.items():
        end = make()
        results[way] = []
        for piece in pieces:
            end.receive_data(piece)
            results[way] += drain(end)
    expected = results["whole"]
    assert all(result == expected for result in results.values()), results
    return expected
