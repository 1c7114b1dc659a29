"""Each fault of the network by name: a real set under load, each broker, ZooKeeper and the programs outside on hosts of their own.

The hosts are network namespaces, and ways between them are cut in silence (`namespaces.py`): no connection is reset, packets
only stop to arrive. Shown as in `test_faults.py`; the programs outside reach every broker unless a test says otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ensemble.conftest import Hosts
from tests.ensemble.figures import note_gaps
from tests.ensemble.trial import Trial, trial

pytestmark = pytest.mark.slow

SESSION = 2.0  # seconds
PAST_SESSION = SESSION + 1.0
QUIET = 1.0  # seconds of load while a cut lasts


@pytest.fixture
def running(tmp_path: Path, hosts: Hosts) -> Iterator[Trial]:
    with trial(tmp_path, hosts.zookeeper.addresses, session_timeout=SESSION, **hosts.options) as found:
        try:
            yield found
        finally:
            hosts.network.heal()


def others(trial: Trial, name: str) -> list[str]:
    return [member.name for member in trial.set.members if member.name != name]


def fails_over(running: Trial, hosts: Hosts, what: str, since: float) -> None:
    """Another member leads, the set serves, and after healing the old leader follows it."""
    old = running.set.leader()
    assert old is not None
    running.set.wait_leader(old.role[1], without=old)
    running.wait_confirming()
    note_gaps(what, [running.gap(since)])
    running.serve_until(time.monotonic() + QUIET)
    running.set.wait("the old leader knows that it leads no more", lambda: old.role[0] != "leader")
    hosts.network.heal()
    assert running.set.wait_whole() is not old
    running.settle()


def test_leader_cut_from_followers(running: Trial, hosts: Hosts):
    """It still reaches ZooKeeper and the programs outside."""
    leader = running.set.wait_whole()
    began = time.monotonic()
    hosts.network.cut([leader.name], others(running, leader.name))
    fails_over(running, hosts, "leader cut from its followers", began)


def test_leader_cut_from_everybody(running: Trial, hosts: Hosts):
    leader = running.set.wait_whole()
    began = time.monotonic()
    hosts.network.cut([leader.name], [*others(running, leader.name), "zookeeper", "out"])
    fails_over(running, hosts, "leader cut from everybody", began)


def test_leader_speaks_to_nobody(running: Trial, hosts: Hosts):
    """One way: the followers hear nothing from it, it hears them."""
    leader = running.set.wait_whole()
    began = time.monotonic()
    hosts.network.cut_one_way(leader.name, others(running, leader.name))
    fails_over(running, hosts, "one way, the followers do not hear the leader", began)


def test_leader_hears_nobody(running: Trial, hosts: Hosts):
    """One way: it hears nothing from the followers, they hear it."""
    leader = running.set.wait_whole()
    began = time.monotonic()
    for name in others(running, leader.name):
        hosts.network.cut_one_way(name, [leader.name])
    fails_over(running, hosts, "one way, the leader does not hear its followers", began)


def test_follower_cut_from_everybody(running: Trial, hosts: Hosts):
    leader = running.set.wait_whole()
    roles = leader.roles
    follower = running.set.followers()[0]
    began = time.monotonic()
    hosts.network.cut([follower.name], [*others(running, follower.name), "zookeeper", "out"])
    running.set.wait("it follows no more", lambda: follower.role[0] != "follower")
    running.serve_until(began + PAST_SESSION)
    note_gaps("follower cut from everybody", [running.gap(began)])
    hosts.network.heal()
    assert running.set.wait_whole() is leader
    assert leader.roles == roles, "the leader had no reason to change"
    running.settle()


def test_leader_cut_from_zookeeper_past_its_session(running: Trial, hosts: Hosts):
    """It serves on, and shows itself again after that: a member that starts then finds it."""
    leader = running.set.wait_whole()
    roles = leader.roles
    began = time.monotonic()
    hosts.network.cut([leader.name], ["zookeeper"])
    running.serve_until(began + PAST_SESSION)
    note_gaps("leader cut from ZooKeeper", [running.gap(began)])
    hosts.network.heal()
    follower = running.set.followers()[0]
    follower.kill()
    follower.start()
    assert running.set.wait_whole() is leader
    assert leader.roles == roles, "the leader had no reason to change"
    running.settle()


def test_all_cut_from_zookeeper(running: Trial, hosts: Hosts):
    leader = running.set.wait_whole()
    roles = leader.roles
    began = time.monotonic()
    hosts.network.cut(["a", "b", "c"], ["zookeeper"])
    running.serve_until(began + PAST_SESSION)
    note_gaps("all cut from ZooKeeper", [running.gap(began)])
    hosts.network.heal()
    running.serve_until(time.monotonic() + QUIET)
    assert running.set.wait_whole() is leader
    assert leader.roles == roles, "the leader had no reason to change"
    running.settle()
