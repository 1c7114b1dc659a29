"""Faults at random on a network of sets under load. Owns the choice of the faults, and that each is taken back.

Each fault is a context manager: it begins, time passes, it is taken back. Some overlap, also in different sets.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from tests.ensemble.replicas import ReplicaProcess
from tests.network_real.trial import Trial
from tests.support.zookeeper import Ensemble

Fault = Callable[[], AbstractContextManager[None]]

HOLD = (0.05, 4.0)  # seconds that a fault lasts; the longest is past a lease, and past the heart-beats of links
OVERLAP = 0.4  # so many faults meet another one
HURRY = 0.4  # so many are followed by the next before everything is whole


class Chaos:
    """All faults of the sets that a trial has."""

    def __init__(self, trial: Trial, zookeeper: Ensemble, rng: random.Random) -> None:
        self._trial = trial
        self._sets = trial.sets
        self._zookeeper = zookeeper
        self._rng = rng
        self._began = time.monotonic()
        self.count = 0
        self._faults: list[Fault] = [
            *(self.master_killed, self.master_killed, self.masters_killed, self.follower_killed, self.set_killed),
            *(self.master_stopped, self.handed_over, self.master_unplugged, self.master_cut_from_its_followers),
            *(self.way_cut, self.way_cut, self.way_cut_one_way, self.zookeeper_stopped, self.zookeeper_killed),
        ]

    def run(self, until: float) -> None:
        """Fault after fault until the time `until`; after each all sets must serve again."""
        while time.monotonic() < until:
            with ExitStack() as stack:
                self._begin(stack)
                if self._rng.random() < OVERLAP:
                    self._trial.hold(self._rng.uniform(0.0, 0.5))
                    self._begin(stack)
                self._trial.hold(self._rng.uniform(*HOLD) ** 2 / HOLD[1])  # many short ones, some long ones
            since = time.monotonic()
            self._trial.wait_confirming(count=20)
            text = f"all serve within {time.monotonic() - since:.1f} s"
            if self._rng.random() >= HURRY:
                for site in self._sets.names:
                    self._sets.master(site)
                self._sets.wait_joined()
                text += f", are joined within {time.monotonic() - since:.1f} s"
            print(f"  {text}", flush=True)

    def _begin(self, stack: ExitStack) -> None:
        fault = self._rng.choice(self._faults)
        self.count += 1
        print(f"  {time.monotonic() - self._began:6.2f} {getattr(fault, '__name__', '')}", flush=True)
        stack.enter_context(fault())

    # ---- processes

    def _site(self) -> str:
        return self._rng.choice(self._sets.names)

    def _master(self, site: str) -> ReplicaProcess | None:
        return self._sets[site].leader()

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

    def master_killed(self) -> AbstractContextManager[None]:
        return self._killed(self._master(self._site()))

    def masters_killed(self) -> AbstractContextManager[None]:
        return self._killed(*map(self._master, self._sets.names))

    def follower_killed(self) -> AbstractContextManager[None]:
        followers = self._sets[self._site()].followers()
        return self._killed(self._rng.choice(followers) if followers else None)

    def set_killed(self) -> AbstractContextManager[None]:
        return self._killed(*self._sets[self._site()].members)

    @contextmanager
    def master_stopped(self) -> Iterator[None]:
        master = self._master(self._site())
        if master is not None:
            master.pause()
        try:
            yield
        finally:
            if master is not None and master.running:
                master.resume()

    @contextmanager
    def handed_over(self) -> Iterator[None]:
        master = self._master(self._site())
        if master is not None:
            status = master.terminate()
            assert status == 0, f"a master that was told to stop ended with {status}\n{master.told()}"
        try:
            yield
        finally:
            if master is not None:
                master.start()

    # ---- ways

    @contextmanager
    def _ways(self, *ways: tuple[list[str], list[str]]) -> Iterator[None]:
        for senders, receivers in ways:
            for sender in senders:
                self._sets.network.cut_one_way(sender, receivers)
        try:
            yield
        finally:
            self._sets.network.heal()  # of an overlapping fault, too

    def _master_host(self, site: str) -> str:
        master = self._master(site)
        return f"{site}-{master.name}" if master is not None else self._rng.choice(self._sets.hosts(site))

    @contextmanager
    def master_unplugged(self) -> Iterator[None]:
        self._sets.network.unplug(self._master_host(self._site()))
        try:
            yield
        finally:
            self._sets.network.heal()

    def master_cut_from_its_followers(self) -> AbstractContextManager[None]:
        site = self._site()
        host = self._master_host(site)
        others = [other for other in self._sets.hosts(site) if other != host]
        return self._ways(([host], others), (others, [host]))

    def way_cut(self) -> AbstractContextManager[None]:
        one, other = map(self._sets.hosts, self._rng.sample(self._sets.names, 2))
        return self._ways((one, other), (other, one))

    def way_cut_one_way(self) -> AbstractContextManager[None]:
        one, other = map(self._sets.hosts, self._rng.sample(self._sets.names, 2))
        return self._ways((one, other))

    # ---- ZooKeeper

    @contextmanager
    def zookeeper_killed(self) -> Iterator[None]:
        self._zookeeper.kill()
        try:
            yield
        finally:
            self._zookeeper.start()

    @contextmanager
    def zookeeper_stopped(self) -> Iterator[None]:
        self._zookeeper.pause()
        try:
            yield
        finally:
            self._zookeeper.resume()
