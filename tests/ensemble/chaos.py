"""All faults at random, on a set under load. Owns the choice of the faults, and that each is taken back.

Each fault is a context manager: it begins, time passes, it is taken back. Faults overlap. Where namespaces or small disks can't be
made, the faults that need them are left out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from tests.ensemble.disks import empty, fill
from tests.ensemble.namespaces import Namespaces
from tests.ensemble.replicas import ReplicaProcess
from tests.ensemble.trial import Trial
from tests.support.zookeeper import Ensemble

Fault = Callable[[], AbstractContextManager[None]]

HOLD = (0.05, 3.5)  # seconds that a fault lasts; the longest is past the soak's session timeout
OVERLAP = 0.35  # so many faults meet another one
HURRY = 0.4  # so many are followed by the next before all members are back
MEMBERS = ("a", "b", "c")


class Chaos:
    """`disks`: where the member's data lie, by name, if they are small; `network`: if the brokers are hosts of one."""

    def __init__(
        self,
        trial: Trial,
        zookeeper: Ensemble,
        rng: random.Random,
        *,
        network: Namespaces | None = None,
        disks: dict[str, Path] | None = None,
    ) -> None:
        self._trial = trial
        self._zookeeper = zookeeper
        self._rng = rng
        self._network = network
        self._disks = disks or {}
        self._began = time.monotonic()
        self.count = 0
        self._has_wiped = False  # a copy that has to be filled before another one may be lost
        faults: list[Fault] = [self.leader_killed, self.leader_killed, self.follower_killed, self.all_killed]
        faults += [self.member_wiped]
        faults += [self.leader_paused, self.follower_paused, self.handed_over, self.handed_over]
        faults += [self.zookeeper_killed, self.zookeeper_server_killed, self.zookeeper_paused]
        if network is not None:
            faults += [
                self.pair_cut,
                self.pair_cut_one_way,
                self.member_isolated,
                self.leader_cut,
                self.cut_from_zookeeper,
            ]
            faults += [self.leader_deaf, self.leader_mute]
        if disks:
            faults += [self.disk_full]
        self._faults = faults

    def run(self, until: float) -> None:
        """Fault after fault until the time `until`; after each the set must serve again."""
        while time.monotonic() < until:
            with ExitStack() as stack:
                self._begin(stack)
                if self._rng.random() < OVERLAP:
                    self._trial.hold(self._rng.uniform(0.0, 0.3))
                    self._begin(stack)
                self._trial.hold(self._rng.uniform(*HOLD) ** 2 / HOLD[1])  # many short ones, some long ones
            self._trial.wait_confirming(20)
            if self._rng.random() >= HURRY or self._has_wiped:
                self._trial.set.wait_whole()
                self._has_wiped = False

    def _begin(self, stack: ExitStack) -> None:
        fault = self._rng.choice(self._faults)
        self.count += 1
        leader = self._trial.set.leader()
        name = getattr(fault, "__name__", "")
        print(f"  {time.monotonic() - self._began:6.2f} {name} (leader: {leader.name if leader else 'none'})")
        stack.enter_context(fault())

    # ---- processes

    def _leader(self) -> ReplicaProcess | None:
        return self._trial.set.leader()

    def _follower(self) -> ReplicaProcess | None:
        leader = self._leader()
        able = [each for each in self._trial.set.members if each.running and not each.is_paused and each is not leader]
        return self._rng.choice(able) if able else None

    @contextmanager
    def _killed(self, *members: ReplicaProcess | None) -> Iterator[None]:
        killed = [member for member in members if member is not None and member.running]
        for member in killed:
            member.kill()
        try:
            yield
        finally:
            for member in killed:
                if not member.running:
                    member.start()

    @contextmanager
    def _paused(self, member: ReplicaProcess | None) -> Iterator[None]:
        if member is not None:
            member.pause()
        try:
            yield
        finally:
            if member is not None and member.running:
                member.resume()

    def leader_killed(self) -> AbstractContextManager[None]:
        return self._killed(self._leader())

    def follower_killed(self) -> AbstractContextManager[None]:
        return self._killed(self._follower())

    def all_killed(self) -> AbstractContextManager[None]:
        return self._killed(*self._trial.set.members)

    @contextmanager
    def member_wiped(self) -> Iterator[None]:
        """One member loses its disk: only when it is the one that may be lost."""
        member = self._trial.set[self._one()]
        if self._has_wiped or not self._trial.set.is_whole():
            yield
            return
        self._has_wiped = True
        with self._killed(member):
            member.wipe()
            yield

    def leader_paused(self) -> AbstractContextManager[None]:
        return self._paused(self._leader())

    def follower_paused(self) -> AbstractContextManager[None]:
        return self._paused(self._follower())

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        leader = self._leader()
        if leader is not None:
            status = leader.terminate()
            assert status == 0, f"a leader that was told to stop ended with {status}\n{leader.told()}"
        try:
            yield
        finally:
            if leader is not None:
                leader.start()

    # ---- ZooKeeper

    @contextmanager
    def zookeeper_killed(self) -> Iterator[None]:
        self._zookeeper.kill()
        try:
            yield
        finally:
            self._zookeeper.start()

    @contextmanager
    def zookeeper_server_killed(self) -> Iterator[None]:
        self._rng.choice(self._zookeeper.servers).kill()
        try:
            yield
        finally:
            self._zookeeper.start()

    @contextmanager
    def zookeeper_paused(self) -> Iterator[None]:
        self._zookeeper.pause()
        try:
            yield
        finally:
            self._zookeeper.resume()

    # ---- network

    def _others(self, name: str) -> list[str]:
        return [other for other in MEMBERS if other != name]

    def _one(self) -> str:
        return self._rng.choice(MEMBERS)

    def _leading(self) -> str:
        leader = self._leader()
        return leader.name if leader is not None else self._one()

    @contextmanager
    def _cut(self, *ways: tuple[str, list[str]]) -> Iterator[None]:
        assert self._network is not None
        for sender, receivers in ways:
            self._network.cut_one_way(sender, receivers)
        try:
            yield
        finally:
            self._network.heal()  # of an overlapping fault, too

    def _apart(self, name: str, others: list[str]) -> AbstractContextManager[None]:
        return self._cut((name, others), *((other, [name]) for other in others))

    def pair_cut(self) -> AbstractContextManager[None]:
        one, other = self._rng.sample(MEMBERS, 2)
        return self._apart(one, [other])

    def pair_cut_one_way(self) -> AbstractContextManager[None]:
        one, other = self._rng.sample(MEMBERS, 2)
        return self._cut((one, [other]))

    def member_isolated(self) -> AbstractContextManager[None]:
        one = self._one()
        return self._apart(one, [*self._others(one), "zookeeper", "out"])

    def leader_cut(self) -> AbstractContextManager[None]:
        one = self._leading()
        return self._apart(one, self._others(one))

    def cut_from_zookeeper(self) -> AbstractContextManager[None]:
        return self._apart("zookeeper", self._rng.sample(MEMBERS, self._rng.randint(1, 3)))

    def leader_deaf(self) -> AbstractContextManager[None]:
        one = self._leading()
        return self._cut(*((other, [one]) for other in self._others(one)))

    def leader_mute(self) -> AbstractContextManager[None]:
        one = self._leading()
        return self._cut((one, self._others(one)))

    # ---- disks

    @contextmanager
    def disk_full(self) -> Iterator[None]:
        disk = self._disks[self._one()]
        fill(disk)
        try:
            yield
        finally:
            empty(disk)
