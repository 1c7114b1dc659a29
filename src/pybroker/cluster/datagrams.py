"""How announcements travel, as a small protocol, and its version in memory. Owns no rule of what is in a datagram.

UDP multicast is in `pybroker.cluster.multicast`. Here is a segment of a network in memory, on trio's clock, with loss, delay,
duplication, reordering and cuts in a test's hands; deterministic, what is random comes from the caller's function.
"""

from __future__ import annotations

import errno
import heapq
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import trio

from pybroker.cluster.discovery import Discovery

WAITING_MAX = 256  # datagrams that wait to be received; like a full socket, one more is lost


class Datagrams(Protocol):
    """One place from which datagrams go to all that listen at an address, this place included. Any of them may be lost."""

    async def send(self, data: bytes) -> None:
        """Send one. Raises OSError when the network is not there, or the place is closed."""

    async def receive(self) -> bytes:
        """The next one. Raises OSError as `send` does."""

    def close(self) -> None:
        """Give the place up. May be called again."""


class Open(Protocol):
    """Opens a place."""

    def __call__(self, discovery: Discovery, *, listen: bool) -> Datagrams:
        """With `listen` false the place is only sent from. Raises OSError when it can't be opened now."""


class Copies(NamedTuple):
    """What becomes of one datagram on its way to one listener: a copy after each of these seconds; none: it is lost."""

    delays: tuple[float, ...] = (0.0,)


class Segment:
    """A segment of a network: what is sent from one host comes to every host that listens at the same address and port.

    fate  of each datagram: called with the sending and the receiving host and the bytes. Reordering is unequal delays
    """

    def __init__(self, fate: Callable[[str, str, bytes], Copies] = lambda sender, receiver, data: Copies()) -> None:
        self.fate = fate
        self.sent = 0
        self._places: list[_Place] = []
        self._cut: set[tuple[str, str]] = set()
        self._down: set[str] = set()

    def open_at(self, host: str) -> Open:
        """The way in for what runs on a host: give it to an announcer or a listener."""

        def open_place(discovery: Discovery, *, listen: bool) -> Datagrams:
            self.check_up(host)
            place = _Place(self, host, discovery, listen)
            self._places.append(place)
            return place

        return open_place

    def cut(self, senders: Iterable[str], receivers: Iterable[str]) -> None:
        """Nothing comes from these to those any more."""
        receivers = tuple(receivers)
        self._cut |= {(sender, receiver) for sender in senders for receiver in receivers}

    def heal(self) -> None:
        """All ways are open again, and every host's network is up."""
        self._cut.clear()
        self._down.clear()

    def take_down(self, host: str) -> None:
        """A host's network is gone, and it is told so: its places fail, and can't be opened until `bring_up`."""
        self._down.add(host)
        for place in [place for place in self._places if place.host == host]:
            place.fail()

    def bring_up(self, host: str) -> None:
        self._down.discard(host)

    def inject(self, data: bytes, discovery: Discovery, host: str = "attacker") -> None:
        """Send from a host without a place there."""
        self.sent += 1
        for place in self._places:
            if not place.listens or place.where != discovery[:2] or place.host in self._down:
                continue
            if (host, place.host) not in self._cut:
                for delay in self.fate(host, place.host, data).delays:
                    place.put(data, delay)

    def check_up(self, host: str) -> None:
        if host in self._down:
            raise OSError(errno.ENETUNREACH, "the host's network is down")

    def remove(self, place: _Place) -> None:
        if place in self._places:
            self._places.remove(place)


class _Place:
    """Where one host sends and receives."""

    def __init__(self, segment: Segment, host: str, discovery: Discovery, listens: bool) -> None:
        self.host = host
        self.listens = listens
        self.where = discovery[:2]
        self._discovery = discovery
        self._segment = segment
        self._coming: list[tuple[float, int, bytes]] = []
        self._count = 0
        self._error: OSError | None = None
        self._came = trio.Event()

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._check()
        self._segment.check_up(self.host)
        self._segment.inject(data, self._discovery, self.host)

    async def receive(self) -> bytes:
        await trio.lowlevel.checkpoint()
        while True:
            self._check()
            now = trio.current_time()
            if self._coming and self._coming[0][0] <= now:
                return heapq.heappop(self._coming)[2]
            self._came = trio.Event()
            with trio.move_on_at(self._coming[0][0] if self._coming else math.inf):
                await self._came.wait()

    def close(self) -> None:
        self._segment.remove(self)
        self._end(OSError(errno.EBADF, "the place is closed"))

    def fail(self) -> None:
        self._segment.remove(self)
        self._end(OSError(errno.ENETDOWN, "the host's network went down"))

    def put(self, data: bytes, delay: float) -> None:
        if len(self._coming) < WAITING_MAX:
            self._count += 1
            heapq.heappush(self._coming, (trio.current_time() + delay, self._count, data))
            self._came.set()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _end(self, error: OSError) -> None:
        self._error = self._error or error
        self._came.set()
