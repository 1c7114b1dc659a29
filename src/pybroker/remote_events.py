"""What a client over the network tells of its connection: events as they come, and figures of the moment. Owns their shape."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

import trio

from pybroker.errors import BrokerError

EVENTS_MAX = 100  # events that wait for one reader; the newest are kept


@dataclass(frozen=True, slots=True)
class ConnectionEvent:
    """Something happened to a client's connection.

    kind     ``connected``; ``disconnected`` (`error` says why); ``failed``: a try to connect did; ``members``: the network told
             who is in it
    url      of the broker
    broker   its name, as far as it is known
    members  with ``members``: names to URLs
    """

    kind: Literal["connected", "disconnected", "failed", "members"]
    url: str
    broker: str = ""
    error: BrokerError | None = None
    members: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """A client at one moment. Counters since it was opened.

    url, broker   of the present connection, "" without one
    connections   made so far; `failures`: tries that came to nothing
    sent          messages and transactions that were submitted; `confirmed`, `refused` and `in_doubt` of these are answered
    repeated      of them were written again after a lost connection (and are stored once)
    unconfirmed   of them are not answered yet, `unconfirmed_bytes` with their headers and bodies
    received      messages that were handed out; `buffered` wait to be
    addresses     brokers that are known
    """

    connected: bool
    url: str
    broker: str
    connections: int
    failures: int
    sent: int
    confirmed: int
    refused: int
    in_doubt: int
    repeated: int
    unconfirmed: int
    unconfirmed_bytes: int
    received: int
    buffered: int
    subscriptions: int
    addresses: int


class ConnectionEvents:
    """Events of a connection in order, beginning with what holds now; an async iterator that ends with the client.

    A reader that is too slow finds the newest `EVENTS_MAX`.
    """

    def __init__(self, latest: ConnectionEvent | None, over: bool) -> None:
        self._events: deque[ConnectionEvent] = deque((latest,) if latest is not None else (), EVENTS_MAX)
        self._arrived = trio.Event()
        self._over = over

    def __aiter__(self) -> ConnectionEvents:
        return self

    async def __anext__(self) -> ConnectionEvent:
        await trio.lowlevel.checkpoint()
        while not self._events:
            if self._over:
                raise StopAsyncIteration
            self._arrived = trio.Event()
            await self._arrived.wait()
        return self._events.popleft()

    def put(self, event: ConnectionEvent) -> None:
        """Client: one more."""
        self._events.append(event)
        self._arrived.set()

    def end(self) -> None:
        """Client: the last one was put."""
        self._over = True
        self._arrived.set()
