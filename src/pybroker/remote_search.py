"""Which broker a client tries next. Owns the addresses that are known, and their order; opens nothing.

After a lost connection comes the same broker first, and others of its set: only they know what was sent and not confirmed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import trio

from pybroker.addresses import Target, parse_learned
from pybroker.cluster.native_urls import NativeAddress
from pybroker.cluster.peers import PeerTable

HINTS_MAX = 16  # addresses of a leader that one broker may name


class Source(Protocol):
    """Where addresses come from beside those that are given."""

    def addresses(self) -> Sequence[tuple[str, tuple[str, ...]]]:
        """The brokers that are known now: names and URLs."""

    async def wait_change(self) -> None:
        """Wait until there are others than `addresses` last said."""


class Announced:
    """The brokers that announce themselves, as a source."""

    def __init__(self, table: PeerTable) -> None:
        self._table = table
        self._version = table.snapshot().version

    def addresses(self) -> Sequence[tuple[str, tuple[str, ...]]]:
        snapshot = self._table.snapshot()
        self._version = snapshot.version
        return [(peer.name, peer.urls) for peer in snapshot.peers.values()]

    async def wait_change(self) -> None:
        await self._table.wait_change(self._version)


class Search:
    """The addresses of one client. `tls_only`: none without TLS is ever used but those that were given."""

    def __init__(self, target: Target, source: Source | None, tls_only: bool, chance: random.Random) -> None:
        self._target = target
        self._source = source
        self._tls_only = tls_only
        self._chance = chance
        self._hints: list[NativeAddress] = []  # of a leader, to be tried at once
        self._sets: dict[str, list[NativeAddress]] = {}  # what the network told: addresses by name
        self._last: NativeAddress | None = None
        self._own = ""  # the name in the network of the broker or set that let the client in last, "" = not known
        self._silent = False

    def _named(self) -> list[tuple[str, list[NativeAddress]]]:
        """What was announced or told: a broker's or set's name, and its addresses."""
        found = []
        if self._source is not None:
            found += [(name, parse_learned(urls, self._tls_only)) for name, urls in self._source.addresses()]
        if self._target.learns:
            found += self._sets.items()
        return found

    def _known(self, own_only: bool = False) -> list[list[NativeAddress]]:
        """All that is known, each list the addresses of one broker or set (of those that were given it is not known).

        `own_only`: without those that are known to be others' than the client's own broker or set.
        """
        named = self._named()
        if own_only and self._own:
            others = {address for name, addresses in named if name != self._own for address in addresses}
            given = [[address] for address in self._target.brokers if address not in others]
            return [*given, *(addresses for name, addresses in named if name == self._own)]
        return [*([address] for address in self._target.brokers), *(addresses for _, addresses in named)]

    @property
    def count(self) -> int:
        """Addresses that are known."""
        return len({address for each in self._known() for address in each})

    def round(self, own_only: bool = False) -> Iterator[NativeAddress]:
        """Every address once; what a broker names meanwhile as its leader comes next, if it was not tried yet.

        `own_only`: none that is known to be another set's.
        """
        known = self._known(own_only)
        mates = [address for each in known if self._last in each for address in each]
        rest = [address for each in known for address in each]
        if self._target.options.spread == "random":
            self._chance.shuffle(mates)
            self._chance.shuffle(rest)
        waiting = [*mates, *rest]
        if self._last is not None and (self._source is None or self._last in rest):
            if self._silent:
                waiting = [address for address in waiting if address != self._last]
                waiting.append(self._last)
            else:
                waiting.insert(0, self._last)
        tried: set[NativeAddress] = set()
        while self._hints or waiting:
            address = (self._hints or waiting).pop(0)
            if address not in tried:
                tried.add(address)
                yield address

    def hint(self, urls: Sequence[str]) -> None:
        """A broker says that these lead: they are tried next."""
        self._hints = parse_learned(urls[:HINTS_MAX], self._tls_only)

    def connected(self, address: NativeAddress) -> None:
        """This one let the client in."""
        self._last = address
        self._own = ""
        self._note_own()
        self._silent = False
        self._hints = []

    def _note_own(self) -> None:
        for name, addresses in self._named():
            if self._last in addresses:
                self._own = name

    def fell_silent(self) -> None:
        """The connection was lost without a word: the others are tried first, since this one may take all its time to fail."""
        self._silent = True

    def learn(self, members: Mapping[str, tuple[str, ...]]) -> None:
        """The network told of its members: they replace those that it told of before."""
        room = self._target.options.addresses_max
        self._sets = {}
        for name, urls in members.items():
            found = parse_learned(urls, self._tls_only)[:room]
            room -= len(found)
            if found:
                self._sets[name] = found
        self._note_own()

    async def wait(self, seconds: float) -> None:
        """Wait until it makes sense to try again: for about so long (clients come back one by one), or until there are others."""
        seconds *= self._chance.uniform(0.5, 1.0)
        source = self._source
        if source is None:
            await trio.sleep(seconds)
            return
        if not self.count:
            await source.wait_change()
            return
        with trio.move_on_after(seconds):
            await source.wait_change()
