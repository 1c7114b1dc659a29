"""Bugs, each put into the real code as long as a `with` block lasts, and the stories in which the checkers must find it.

Owns one function for each bug: those of the election's rules, and those of replication. Where a random story is too shallow for a
bug, `ways` has the way to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import trio

from pybroker.cluster import election
from pybroker.cluster.coordinator import CheckNode, SetNode
from pybroker.cluster.follower import Follower, _Following
from pybroker.cluster.frames import Answer, BatchFrame, Chunk, SnapshotEnd, encode
from pybroker.cluster.leader import Leader
from pybroker.cluster.memory import MemoryZooKeeper
from pybroker.cluster.replica import Replica
from pybroker.cluster.tracking import Tracking
from tests.sim import ways
from tests.sim.checkers import Violation
from tests.sim.faults import random_story
from tests.sim.one_set import Options
from tests.sim.simulation import Simulation, Story

Broken = Callable[[], AbstractContextManager[Any]]


@contextmanager
def moving() -> Iterator[None]:
    """A candidate goes back to a leader without giving up its slot first."""

    def give_up(view: Any, me: Any) -> list[Any]:
        return [write for write in plain(view, me) if isinstance(write, CheckNode)]

    plain = election.give_up
    with mock.patch.object(election, "give_up", give_up):
        yield


@contextmanager
def stale() -> Iterator[None]:
    """Leaving a slot does not check that the leader's epoch is still the present one."""

    def give_up(view: Any, me: Any) -> list[Any]:
        return [write for write in plain(view, me) if isinstance(write, SetNode)]

    plain = election.give_up
    with mock.patch.object(election, "give_up", give_up):
        yield


@contextmanager
def aba() -> Iterator[None]:
    """A slot's version starts again whenever it is written."""

    def apply(self: MemoryZooKeeper, session: int, writes: Any) -> bool:
        done = plain_apply(self, session, writes)
        if done:
            written = {write.path for write in writes if write.path.startswith("slots/")}
            nodes = {path: node._replace(version=0) if path in written else node for path, node in self.nodes.items()}
            self._store(nodes)
        return done

    plain_apply = MemoryZooKeeper._apply
    with mock.patch.object(MemoryZooKeeper, "_apply", apply):
        yield


@contextmanager
def longest() -> Iterator[None]:
    """The longest log wins, whatever its epoch."""

    def candidates(view: Any) -> Any:
        found = sorted(plain(view), key=lambda one: one[0])
        return sorted(found, key=lambda one: (one[1].candidate.lsn, one[1].weight), reverse=True)

    plain = election.candidates
    with mock.patch.object(election, "candidates", candidates):
        yield


@contextmanager
def minority() -> Iterator[None]:
    """One candidate is enough."""
    with mock.patch.object(election, "quorum", lambda replicas: 1):
        yield


@contextmanager
def oldcommit() -> Iterator[None]:
    """A new leader confirms batches of older epochs by counting copies, before one of its own is on a quorum."""

    async def commit(self: Any, batch: Any) -> None:
        last = self.position
        if last.lsn and last.epoch < self.epoch:
            await self.wait_reach(last.lsn)
            ways.confirm_position(last)
        await plain(self, batch)

    plain = Leader.commit
    with mock.patch.object(Leader, "commit", commit):
        yield


@contextmanager
def wiped() -> Iterator[None]:
    """A replica that lost its disk votes at once."""
    with mock.patch.object(election, "counts", lambda view, name, incarnation: True):
        yield


@contextmanager
def nofence() -> Iterator[None]:
    """A follower takes frames of another epoch than the one that it follows, and a leader the answers to them."""

    async def greet(self: Any, leader: Any, patience: float) -> Any:
        with trio.move_on_after(patience):
            return await Follower.greet(self._network, leader.replication)
        return None

    async def shake_hands(self: Any) -> None:
        self._epoch = self._challenge.epoch
        await plain(self)

    plain = _Following._shake_hands
    with (
        mock.patch.object(Replica, "_greet", greet),
        mock.patch.object(_Following, "_shake_hands", shake_hands),
    ):
        yield


@contextmanager
def early() -> Iterator[None]:
    """A follower answers before its disk has it."""

    async def write(self: Any, batches: Any) -> None:
        following = self._following
        await following._frames.send(encode(Answer(following._epoch, batches[-1][0].position)))
        await plain(self, batches)

    plain = Follower.write
    with mock.patch.object(Follower, "write", write):
        yield


@contextmanager
def unsynced() -> Iterator[None]:
    """What is confirmed was written, and the disk was not asked for it."""

    def follower(self: Any, *arguments: Any, **options: Any) -> None:
        plain_follower(self, *arguments, **options)
        self.synced = False

    def leader(self: Any, *arguments: Any, **options: Any) -> None:
        plain_leader(self, *arguments, **options)
        self._synced = False

    plain_follower, plain_leader = Follower.__init__, Leader.__init__
    with mock.patch.object(Follower, "__init__", follower), mock.patch.object(Leader, "__init__", leader):
        yield


@contextmanager
def swapped() -> Iterator[None]:
    """The side copy becomes the current one before it is complete."""

    async def catch_up(self: Any, frame: Any) -> None:
        await plain(self, frame)
        if isinstance(frame, Chunk) and self._side is not None:
            await self._follower.swap(self._side)
            self._side = None
            self.catching_up = False
            await self._answer()

    plain = _Following._catch_up
    with mock.patch.object(_Following, "_catch_up", catch_up):
        yield


@contextmanager
def unswapped() -> Iterator[None]:
    """Batches after a snapshot are answered before the side copy has become the current one."""

    async def catch_up(self: Any, frame: Any) -> None:
        follower, side = self._follower, self._side
        finished = getattr(self, "finished", None)
        if isinstance(frame, SnapshotEnd) and side is not None:
            await follower.run_on_side(partial(side.finish, frame.position))
            self.finished = trio.current_time()
            await self._frames.send(encode(Answer(self._epoch, frame.position)))
        elif isinstance(frame, BatchFrame) and finished is not None:
            changes = self._fitting(frame, frame.previous)
            await follower.run_on_side(partial(side.apply, frame.previous, frame.position, changes))
            await self._frames.send(encode(Answer(self._epoch, frame.position)))
            if trio.current_time() > finished + 1.0:
                await follower.swap(side)
                self._side = self.finished = None
                self.catching_up = False
        else:
            await plain(self, frame)

    plain = _Following._catch_up
    with mock.patch.object(_Following, "_catch_up", catch_up):
        yield


@contextmanager
def replaced() -> Iterator[None]:
    """What a replaced copy has answered counts for the one that has its name now."""

    def attach(self: Any, copy: Any, durable: int) -> int:
        before = self._known.get(copy.name)
        attachment = plain(self, copy, durable)
        if before is not None:
            self._known[copy.name].durable = max(durable, before.durable)
        return attachment

    plain = Tracking.attach
    with mock.patch.object(Tracking, "attach", attach):
        yield


@dataclass(frozen=True)
class Plant:
    """A bug, and where it is looked for: in up to `seeds` stories of these faults, or on one way."""

    broken: Broken
    weights: dict[str, float] = field(default_factory=dict)
    way: Story | None = None
    seeds: int = 1
    pace: float = 0.5
    seconds: float = 10.0
    options: Options = field(default_factory=Options)

    @property
    def name(self) -> str:
        return self.broken.__name__

    def story(self, seed: str) -> Story:
        return self.way or random_story(seed, self.weights, pace=self.pace, seconds=self.seconds)

    def run(self, seed: str, say: Any = None) -> None:
        Simulation(seed, self.story(seed), self.options, say).run()

    def search(self) -> tuple[int, Violation | None]:
        """Plant it; how many runs it took to find it, and what was found."""
        with ExitStack() as stack:
            stack.enter_context(self.broken())
            for number in range(self.seeds):
                try:
                    self.run(f"{self.name} {number}")
                except Violation as violation:
                    return number + 1, violation
        return self.seeds, None


FLAPPING = {"cut": 3.0, "isolate": 3.0, "reset": 2.0, "pause": 1.0, "cut_one_way": 2.0}

PLANTS = [
    Plant(moving, FLAPPING, seeds=60),
    Plant(stale, way=ways.stale, options=Options(request_timeout=3.0)),
    Plant(aba, way=ways.aba),
    Plant(longest, way=ways.longest, options=Options(weights=(1, 0, 2))),
    Plant(minority, FLAPPING, seeds=20),
    Plant(oldcommit, way=ways.oldcommit, options=Options(weights=(1, 0, 2))),
    Plant(wiped, {"wipe": 3.0, "kill": 2.0, "isolate": 1.0}, seeds=40),
    Plant(nofence, way=ways.nofence),
    Plant(early, way=ways.early),
    Plant(unsynced, {"power": 2.0, "kill_two": 1.0}, seeds=20),
    Plant(swapped, {"wipe": 2.0, "kill": 1.0}, seeds=20, options=Options(ring_bytes_max=0)),
    Plant(
        unswapped,
        {"kill": 3.0, "kill_two": 2.0, "slow_disk": 2.0},
        seeds=60,
        pace=0.3,
        options=Options(ring_bytes_max=0),
    ),
    Plant(replaced, way=ways.replaced),
]
