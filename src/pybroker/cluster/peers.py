"""The table of peers: who in the network was heard lately, and where. Owns who replaces whom, and expiry; no socket.

DESIGN.md section 6. It is fed with announcements (`apply`). A peer is a
broker or a set, by its name. For one name:

* A higher epoch replaces a lower one, whichever node it comes from; a lower one never replaces a higher one that is known, and
  is known for the expiry time even after that leader said that it is gone.
* In the same epoch the same node replaces what it said before (also after a restart: another boot). Another node does not,
  until the known one is gone or expired: two brokers have one name by mistake. Told as `Reason.NAME`.
* "gone" takes a peer away at once if it is of the peer's own node, boot and epoch, or of a newer epoch. Any other is passed over.

Nothing awaits but `wait_change` and `run_expiry`, which use trio; the clock comes in as a function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import trio

from pybroker.cluster.announcements import GONE, Announcement, Reason

TIMEOUT = 5.0  # seconds: 10 intervals of half a second
PEERS_MAX = 1_000


class Peer(NamedTuple):
    """A broker or a set that was heard.

    name, node, epoch, urls, boot  as it announced itself (`Announcement`); `boot` is empty where a link learned of it
    last_heard  by the table's clock, in seconds
    """

    name: str
    node: str
    epoch: int
    urls: tuple[str, ...]
    last_heard: float
    boot: bytes = b""


class Snapshot(NamedTuple):
    """The peers by name, at one version of the table. That somebody was heard again is no new version."""

    version: int
    peers: Mapping[str, Peer]


class PeerTable:
    """Who was heard within the last `timeout` seconds, at most `peers_max` of them.

    own_name, own_epoch  of this broker in the network: who announces itself by that name is no peer, but another leadership of
              its set (`Reason.OWN`) or, in the same epoch, a mistake (`Reason.NAME`). "" for a client
    dropped   datagrams that were dropped, by reason
    """

    def __init__(
        self,
        timeout: float = TIMEOUT,
        peers_max: int = PEERS_MAX,
        own_name: str = "",
        own_epoch: int = 0,
        clock: Callable[[], float] = trio.current_time,
    ) -> None:
        self._timeout = timeout
        self._peers_max = peers_max
        self._own_name = own_name
        self._own_epoch = own_epoch
        self._clock = clock
        self._peers: dict[str, Peer] = {}
        self._left: dict[str, Peer] = {}  # those that said that they are gone, until they would have expired
        self._version = 0
        self._snapshot: Snapshot | None = None
        self._change = trio.Event()
        self._fed = trio.Event()
        self.dropped: Counter[Reason] = Counter()

    def apply(self, announcement: Announcement) -> Reason | None:
        """Take what was announced; None, or why it was passed over (which is counted)."""
        peer = Peer(*announcement[:4], self._clock(), announcement.boot)
        reason = self._refusal(peer)
        if reason is not None:
            self.drop(reason)
        elif announcement.kind == GONE:
            self._leave(peer)
        else:
            self._enter(peer)
        return reason

    def drop(self, reason: Reason) -> None:
        """Count a datagram that did not come as far as the table."""
        self.dropped[reason] += 1

    def snapshot(self) -> Snapshot:
        """Who is there now."""
        self.expire()
        if self._snapshot is None:
            self._snapshot = Snapshot(self._version, MappingProxyType(dict(self._peers)))
        return self._snapshot

    async def wait_change(self, version: int) -> Snapshot:
        """Wait until the table is no more what it was at `version`. (`run_expiry` must run, or nobody sees peers expire.)"""
        while (snapshot := self.snapshot()).version == version:
            await self._change.wait()
        return snapshot

    def expire(self) -> None:
        """Forget those that were unheard of for the timeout."""
        now = self._clock()
        for name in [name for name, peer in self._peers.items() if self._end(peer) <= now]:
            del self._peers[name]
            self._changed()
        for name in [name for name, peer in self._left.items() if self._end(peer) <= now]:
            del self._left[name]

    async def run_expiry(self) -> None:
        """Let peers expire at their time, for ever. The table's clock must be trio's."""
        while True:
            if self._fed.is_set():
                self._fed = trio.Event()
            self.expire()
            first = min(map(self._end, self._peers.values()), default=None)
            if first is None:
                await self._fed.wait()
            else:  # a peer that is heard meanwhile makes this only too early
                await trio.sleep_until(first)

    def _end(self, peer: Peer) -> float:
        """When a peer expires. Always this very sum: with another one a clock could stand just before it for ever."""
        return peer.last_heard + self._timeout

    def _refusal(self, peer: Peer) -> Reason | None:
        if self._own_name and peer.name == self._own_name:
            return Reason.NAME if peer.epoch == self._own_epoch else Reason.OWN
        self.expire()
        known = self._peers.get(peer.name)
        left = self._left.get(peer.name)
        if any(one is not None and one.epoch > peer.epoch for one in (known, left)):
            return Reason.EPOCH
        if known is not None and peer.epoch == known.epoch and peer.node != known.node:
            return Reason.NAME
        return Reason.FULL if known is None and len(self._peers) >= self._peers_max else None

    def _enter(self, peer: Peer) -> None:
        known = self._peers.get(peer.name)
        self._peers[peer.name] = peer
        self._left.pop(peer.name, None)
        self._fed.set()
        if known is None or known._replace(last_heard=peer.last_heard) != peer:
            self._changed()
        else:
            self._snapshot = None

    def _leave(self, peer: Peer) -> None:
        known = self._peers.get(peer.name)
        if known is not None:
            if peer.epoch == known.epoch and known.boot and peer.boot != known.boot:
                return  # an earlier life of it, heard late
            del self._peers[peer.name]
            self._changed()
        if peer.name in self._left or len(self._left) < self._peers_max:
            self._left[peer.name] = peer

    def _changed(self) -> None:
        self._version += 1
        self._snapshot = None
        self._change.set()
        self._change = trio.Event()
