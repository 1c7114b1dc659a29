"""Demand: which brokers of the network consume what, and by which way they are reached (DESIGN.md section 6). Pure.

Each broker tells each peer what its own clients consume, and what it has heard from its other peers: a destination, whether
the demand is durable (it holds also while the way is cut), the broker that has the consumers (the *origin*), and the path to it. A
path that leads through the hearer is not told to it, and is not taken: so there are no loops, and a demand that ends is
forgotten everywhere. Of several paths to one origin the best is used and told on; of equally good ones that which is in use, as
messages that change their way may overtake each other.

A durable demand whose way is cut is told on as well: what is sent meanwhile waits at the cut. A broker that can't reach the
next one on a path stands there twice. So everybody ranks ways alike, those that are whole before those that are cut, and a way
that is made longer never gets better: else two brokers could change their minds because of each other without end.

Durable demand is told on when it is written down here: before that, what is sent because of it could find a broker that has
forgotten the way in a crash.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, KeysView
from itertools import pairwise
from typing import NamedTuple

from pybroker.errors import LimitExceeded

HEARD_MAX = 100_000  # demands that one peer may tell

Path = tuple[
    str, ...
]  # brokers, the next one first, the origin last; one that can't reach its next one now is there twice


class Key(NamedTuple):
    """What is demanded, and by whom. `destination` is ``/queue/NAME``, or ``/topic/`` and a name or pattern."""

    destination: str
    durable: bool
    origin: str


Added = tuple[str, bool, str, Path]
Dropped = tuple[str, bool, str]
News = tuple[bool, list[Added], list[Dropped]]  # whole: what was told before counts no more


class DemandTable:
    """The demand that one broker knows: its own, and what it heard."""

    def __init__(self, name: str, hops_max: int) -> None:
        self.name = name
        self.hops_max = hops_max
        self._own: dict[Key, None] = {}  # in order, as everywhere here: so that the core is deterministic
        self._paths: dict[Key, dict[str, Path]] = {}  # by peer
        self._heard: dict[str, dict[Key, None]] = {}  # by peer, also of peers that can't be reached now
        self._best: dict[Key, tuple[str, Path]] = {}  # the peer of the best path, and the path
        self._up: dict[str, dict[Key, Path]] = {}  # peers that can be reached: what they were told
        self._unwritten: Counter[Key] = Counter()  # not to be told yet
        self._unsaid: dict[str, dict[Key, None] | None] = {}  # keys to look at for a peer; None = all

    # ---- what is known

    def best(self, key: Key) -> tuple[str, Path] | None:
        """The next broker on the best way to a key's origin, and the way; None when nothing is known of that demand."""
        return self._best.get(key)

    def heard(self, peer: str) -> KeysView[Key]:
        """What a peer has told, as far as it still counts."""
        return self._heard.get(peer, {}).keys()

    def told(self, peer: str) -> int:
        """How many demands a peer that can be reached was told, and that hold."""
        return len(self._up.get(peer, {}))

    def path(self, peer: str, key: Key) -> Path:
        return self._paths[key][peer]

    # ---- what changes; each returns the keys whose best way is another one now, be it by the same peer

    def set_own(self, destination: str, durable: bool, there: bool) -> None:
        """This broker's own clients consume a destination, or do not any more."""
        key = Key(destination, durable, self.name)
        if there:
            self._own[key] = None
        else:
            self._own.pop(key, None)
        self._mark(key)

    def up(self, peer: str) -> list[Key]:
        """A peer can be reached: it has to be told everything, and ways through it are better."""
        self._up[peer] = {}
        self._unsaid[peer] = None
        return self._choose_again(list(self.heard(peer)))

    def down(self, peer: str) -> list[Key]:
        """A peer can't be reached any more: only its durable demand still counts."""
        self._up.pop(peer, None)
        self._unsaid.pop(peer, None)
        heard = list(self.heard(peer))
        for key in heard:
            if not key.durable:
                self._forget(peer, key)
        return self._choose_again(heard)

    def hear(self, peer: str, whole: bool, adds: Iterable[Added], drops: Iterable[Dropped]) -> list[Key]:
        """A peer tells its demand. What leads through this broker, or too far, is passed over.

        Raises LimitExceeded, and then nothing of it was heard.
        """
        adds = list(adds)
        drops = list(drops)
        self._check_count(peer, whole, adds, drops)
        touched: dict[Key, None] = {}
        if whole:
            touched.update(self._heard.get(peer, {}))
            for key in touched:
                self._forget(peer, key)
        for drop in drops:
            key = Key(*drop)
            self._forget(peer, key)
            touched[key] = None
        heard = self._heard.setdefault(peer, {})
        for destination, durable, origin, path in adds:
            key = Key(destination, durable, origin)
            touched[key] = None
            if not path or path[0] != peer or path[-1] != origin or self.name in path or hops(path) > self.hops_max:
                self._forget(peer, key)
                continue
            heard[key] = None
            self._paths.setdefault(key, {})[peer] = path
        return self._choose(list(touched))

    def _check_count(self, peer: str, whole: bool, adds: list[Added], drops: list[Dropped]) -> None:
        heard = {} if whole else self._heard.get(peer, {})
        if len(heard) + len(adds) > HEARD_MAX:  # seldom; only then it is worth while to look which of them are known
            there = heard.keys() - {Key(*drop) for drop in drops} | {Key(*add[:3]) for add in adds}
            if len(there) > HEARD_MAX:
                raise LimitExceeded("demands of one peer", HEARD_MAX, f"peer {peer} demands too many destinations")

    def forget_peer(self, peer: str) -> list[Key]:
        """A peer was taken out of the network."""
        keys = list(self.heard(peer))
        for key in keys:
            self._forget(peer, key)
        self._heard.pop(peer, None)
        return self._choose(keys)

    def _forget(self, peer: str, key: Key) -> None:
        self._heard.get(peer, {}).pop(key, None)
        paths = self._paths.get(key)
        if paths is not None:
            paths.pop(peer, None)
            if not paths:
                del self._paths[key]

    def _choose_again(self, keys: list[Key]) -> list[Key]:
        """Ways begin or end to be cut: also one that is still the best is told otherwise."""
        for key in keys:
            self._mark(key)
        return self._choose(keys)

    def _choose(self, keys: Iterable[Key]) -> list[Key]:
        changed = []
        for key in keys:
            paths = self._paths.get(key, {})
            before = self._best.get(key)
            used = None if before is None else before[0]
            nearest = min(paths, key=lambda peer: self._rank(peer, paths[peer], used), default=None)
            found = None if nearest is None else (nearest, paths[nearest])
            if found != before:
                changed.append(key)
                if found is None:
                    del self._best[key]
                else:
                    self._best[key] = found
                self._mark(key)
        return changed

    def _rank(self, peer: str, path: Path, used: str | None) -> tuple[bool, int, bool, str]:
        length = hops(path)
        return peer not in self._up or length < len(path), length, peer != used, peer

    # ---- what is told

    def _mark(self, key: Key) -> None:
        for unsaid in self._unsaid.values():
            if unsaid is not None:
                unsaid[key] = None

    def hold(self, keys: Iterable[Key]) -> None:
        """Tell nobody of these until `written` is called."""
        self._unwritten.update(keys)

    def written(self, keys: Iterable[Key]) -> None:
        """These are as safe as they have to be."""
        self._unwritten.subtract(keys)
        self._unwritten = +self._unwritten

    def has_news(self, peer: str) -> bool:
        """Whether `news` may have something for a peer."""
        unsaid = self._unsaid.get(peer, {})
        return unsaid is None or not unsaid.keys() <= self._unwritten.keys()

    def news(self, peer: str) -> News | None:
        """What a peer has to be told since it was told last; the first time everything. None when there is nothing."""
        told = self._up[peer]
        unsaid = self._unsaid[peer]
        later = self._unsaid[peer] = {}
        if unsaid is None:
            told.clear()
            for key in [*self._own, *self._best]:
                path = self._way(key, peer)
                if path is None:
                    continue
                if key in self._unwritten:
                    later[key] = None
                else:
                    told[key] = path
            return True, [(*key, path) for key, path in told.items()], []
        adds: list[Added] = []
        drops: list[Dropped] = []
        for key in unsaid:
            if key in self._unwritten:
                later[key] = None
                continue
            path = self._way(key, peer)
            if path is None:
                if told.pop(key, None) is not None:
                    drops.append((key.destination, key.durable, key.origin))
            elif told.get(key) != path:
                told[key] = path
                adds.append((*key, path))
        return (False, adds, drops) if adds or drops else None

    def _way(self, key: Key, peer: str) -> Path | None:
        """The path that a peer is told for a key; None when it is not told of it."""
        if key in self._own:
            return (self.name,)
        best = self._best.get(key)
        if best is None or best[0] == peer or key.origin == peer:
            return None
        path = best[1]
        if peer in path or hops(path) >= self.hops_max:
            return None
        return (self.name, *path) if best[0] in self._up else (self.name, self.name, *path)


def hops(path: Path) -> int:
    """The number of brokers on a path; below its length where it is cut."""
    return len(path) - sum(one == other for one, other in pairwise(path))
