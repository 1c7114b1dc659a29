"""One simulated set: its members and its ZooKeeper, and what can be asked of them. Owns no run, no client and no story."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import trio

from pybroker.cluster.memory import Fate, MemoryZooKeeper
from pybroker.cluster.registry import View, parse_view
from pybroker.config import Limits, ReplicaSetConfig
from tests.sim.checkers import Findings, Positions
from tests.sim.member import Life, Member
from tests.sim.network import SimNetwork


@dataclass(frozen=True)
class Options:
    """What kind of set it is. Times in seconds."""

    names: str = "abc"
    sync: Any = "quorum_disk"
    session_timeout: float = 4.0
    request_timeout: float = 1.0
    heartbeat_interval: float = 0.3
    ring_bytes_max: int = 64 * 1024 * 1024
    weights: tuple[int, ...] = (0, 0, 0)
    senders: int = 2
    receivers: int = 2
    pause: float = 0.4  # mean, between two doings of a client
    forgets: bool = True  # a process takes unsynced writes with it
    limits: Limits = field(default_factory=lambda: Limits(window_messages_max=16, batch_bytes_max=64 * 1024))


class SimSet:
    """What members of a set know of the run that they are in, and what the run knows of them."""

    seed: str
    options: Options
    limits: Limits
    counts: Counter[str]
    errors: list[BaseException]
    findings: Findings
    positions: Positions
    account: Any
    network: SimNetwork
    zookeeper: MemoryZooKeeper
    members: dict[str, Member]
    nursery: trio.Nursery

    count: Callable[[str], None]
    trace: Callable[[str], None]

    def set_config(self, name: str) -> ReplicaSetConfig:
        options = self.options
        return ReplicaSetConfig(
            name="set",
            zookeeper="simulated",
            replicas=len(options.names),
            bind=name,
            clients=(f"stomp://{name}",),
            sync=options.sync,
            weight=options.weights[options.names.index(name) % len(options.weights)],
            secret="between us",
            session_timeout=options.session_timeout,
            heartbeat_interval=options.heartbeat_interval,
            ring_bytes_max=options.ring_bytes_max,
        )

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    @property
    def view(self) -> View:
        return parse_view(self.zookeeper.nodes)

    @property
    def lives(self) -> list[Life]:
        return [member.life for member in self.members.values() if member.life is not None]

    def leaders(self) -> list[Member]:
        return [member for member in self.members.values() if member.leads]

    def start_all(self) -> None:
        for member in self.members.values():
            if member.life is None:
                member.start()

    def is_whole(self) -> bool:
        """One leads, all others follow and count, and all stores are at one position.

        Where ZooKeeper's data were lost the set serves on without them, and whoever was away stays away until the leader's end.
        """
        view, lives = self.view, self.lives
        leaders = self.leaders()
        if len(leaders) != 1 or len(lives) != len(self.members):
            return False
        leader = leaders[0].life
        assert leader is not None
        following = [life for life in lives if life.broker.role == "follower" or life is leader]
        if view.epoch < leader.replica.epoch:
            if len(following) <= len(lives) // 2:
                return False
        elif any(view.roster.get(life.member.name) != life.copies.identity.incarnation for life in lives) or len(
            following
        ) < len(lives):
            return False
        return len({life.replica.position for life in following}) == 1

    def describe(self) -> str:
        parts = []
        for member in self.members.values():
            life = member.life
            position = tuple(life.replica.position or ()) if life is not None else ""
            parts.append(f"{member.name} {member.role} {position} {member.refused}".strip())
        return ", ".join(parts) + f"; roster {dict(self.view.roster)}"

    def may_lose_disk(self, name: str) -> bool:
        """Whether a quorum of other copies counts and is whole: more must not be lost (promise P1)."""
        roster = self.view.roster
        for member in self.members.values():
            copies = member.disk.copies
            identity = copies.identity if copies is not None else member.disk.identity
            backend = copies.backend if copies is not None else member.disk.backend
            if member.name != name and (
                identity is None
                or identity.incarnation == member.disk.lost
                or roster.get(member.name) != identity.incarnation
                or member.disk.is_damaged(backend)
            ):
                return False
        return True

    def has_lived_since(self, name: str, starts: int) -> bool:
        """Whether ZooKeeper has seen a later start of that member: a backup of the present life can't be told from it."""
        found = self.view.slots.get(name)
        return found is not None and found[0].starts > starts

    def late_writes(self, rng: random.Random, lost: float, unanswered: float, slow: float) -> None:
        """ZooKeeper's connections are bad: chances of a request that is lost, done but not answered, or slow."""

        def fate(name: str, writes: Sequence[Any]) -> Fate | None:
            chance = rng.random()
            if chance < lost:
                return Fate(None, None)
            if chance < lost + unanswered and writes:
                self.count("writes to ZooKeeper that were not answered")
                return Fate(rng.uniform(0, 4.0), None)
            if chance < lost + unanswered + slow:
                return Fate(rng.uniform(0, 0.4), rng.uniform(0, 0.4))
            return None

        self.zookeeper.fate = fate
