"""Each fault of a process, of ZooKeeper and of a disk by name: a real set under load, three brokers on loopback.

What is shown each time: the set serves again, everything confirmed was delivered, nothing else was, and in the end all members
hold the same (`trial.py`). DESIGN.md sections 5 and 7. Faults of the network are in `test_partitions.py`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.wire import Disconnected, Frame
from tests.ensemble.disks import empty, fill, small_disk
from tests.ensemble.figures import note_gaps
from tests.ensemble.trial import SERVICE_TIMEOUT, Trial, trial
from tests.ensemble.wire import Connection
from tests.support.zookeeper import Ensemble

pytestmark = pytest.mark.slow

KILLS = 4  # in one trial; the gaps are printed
HANDOVERS = 4
SHORT_SESSION = 2.0  # seconds, where a test has to outlast it
PAST_SESSION = SHORT_SESSION + 1.0
QUIET = 1.0  # seconds of load between two faults


@pytest.fixture
def running(tmp_path: Path, zookeeper: Ensemble) -> Iterator[Trial]:
    """Under load, with a session timeout of 10 s: no failover here waits for it."""
    with trial(tmp_path, zookeeper.addresses) as found:
        yield found


@pytest.fixture
def running_short(tmp_path: Path, zookeeper: Ensemble) -> Iterator[Trial]:
    """Under load, with a session timeout that a test can outlast."""
    with trial(tmp_path, zookeeper.addresses, session_timeout=SHORT_SESSION) as found:
        yield found


def test_leader_killed(running: Trial):
    gaps = []
    for _ in range(KILLS):
        leader = running.set.wait_whole()
        running.wait_confirming()
        began = time.monotonic()
        leader.kill()
        running.set.wait_leader(leader.roles[-1][1])
        running.wait_confirming()
        gaps.append(running.gap(began))
        leader.start()
    note_gaps("kill -9 of the leader", gaps)
    assert max(gaps) < SERVICE_TIMEOUT / 3  # less than half of the session timeout, on any machine
    running.settle()


def test_follower_killed(running: Trial):
    leader = running.set.wait_whole()
    roles = leader.roles
    for follower in running.set.followers():
        began = time.monotonic()
        follower.kill()
        running.serve_until(began + QUIET)
        follower.start()
        running.set.wait_whole()
    assert leader.roles == roles, "the leader had no reason to change"
    running.settle()


def test_follower_wiped(running: Trial):
    """It comes back as a new copy, is filled, and counts again: with it alone the next leader serves."""
    leader = running.set.wait_whole()
    epoch = leader.role[1]
    wiped, other = running.set.followers()
    wiped.kill()
    wiped.wipe()
    running.serve_until(time.monotonic() + QUIET)
    wiped.start()
    assert running.set.wait_whole() is leader
    other.kill()
    running.wait_confirming()
    leader.kill()
    other.start()
    running.set.wait_leader(epoch)
    running.wait_confirming()
    leader.start()
    running.settle()


def test_all_killed_at_once(running: Trial):
    for member in running.set.members:
        member.kill()
    for member in running.set.members:
        member.start()
    running.wait_confirming()
    running.settle()


def test_leader_handed_over(running: Trial):
    gaps = []
    for _ in range(HANDOVERS):
        leader = running.set.wait_whole()
        epoch = leader.role[1]
        running.wait_confirming()
        began = time.monotonic()
        assert leader.terminate() == 0
        running.set.wait_leader(epoch)
        running.wait_confirming()
        gaps.append(running.gap(began))
        leader.start()
    note_gaps("SIGTERM of the leader", gaps)
    assert max(gaps) < SERVICE_TIMEOUT / 3
    running.settle()


def test_leader_that_slept_past_its_session_confirms_nothing(running_short: Trial):
    old = running_short.set.wait_whole()
    epoch = old.role[1]
    running_short.wait_confirming()
    with contextlib.closing(Connection(old.address)) as connection:
        began = time.monotonic()
        old.pause()
        for number in range(20):  # no ledger knows them: should one be stored, the account finds it unexpected
            head = ("destination", "/queue/shared"), ("id", f"late-{number}")
            connection.send("SEND", *head, ("receipt", str(number)), body=b"late")
        running_short.set.wait_leader(epoch)
        running_short.wait_confirming()
        running_short.serve_until(began + PAST_SESSION)
        old.resume()
        connection.heard = time.monotonic()  # it was silent for a reason
        frames: list[Frame] = []
        with contextlib.suppress(Disconnected):
            while True:
                frames += connection.wait(SERVICE_TIMEOUT)
        assert [frame for frame in frames if frame.command == "RECEIPT"] == []
        assert connection.error, "the session ended without a word"
    assert running_short.set.wait_whole() is not old
    running_short.settle()


def test_follower_that_slept_past_its_session(running_short: Trial):
    leader = running_short.set.wait_whole()
    roles = leader.roles
    follower = running_short.set.followers()[0]
    began = time.monotonic()
    follower.pause()
    running_short.serve_until(began + PAST_SESSION)
    follower.resume()
    assert running_short.set.wait_whole() is leader
    assert leader.roles == roles, "the leader had no reason to change"
    running_short.settle()


def test_zookeeper_away_under_load(running_short: Trial, zookeeper: Ensemble):
    """The set serves on past every session; it can't elect before ZooKeeper is back, and elects then."""
    leader = running_short.set.wait_whole()
    roles = leader.roles
    began = time.monotonic()
    try:
        zookeeper.kill()
        running_short.serve_until(began + PAST_SESSION)
        assert leader.roles == roles, "the leader had no reason to change"
        note_gaps(f"ZooKeeper away for {time.monotonic() - began:.1f} s", [running_short.gap(began)])
    finally:
        zookeeper.start()
    running_short.serve_until(time.monotonic() + QUIET)
    leader.kill()
    running_short.set.wait_leader(roles[-1][1])
    leader.start()
    running_short.settle()


def test_leader_killed_while_zookeeper_is_away(running_short: Trial, zookeeper: Ensemble):
    leader = running_short.set.wait_whole()
    epoch = leader.role[1]
    try:
        zookeeper.kill()
        running_short.wait_confirming()
        leader.kill()
        killed = time.monotonic()
        with pytest.raises(AssertionError, match="are confirmed"):
            running_short.wait_confirming(1, timeout=QUIET)
        assert running_short.set.leader() is None
        assert all(time < killed for time in running_short.times())
    finally:
        zookeeper.start()
    running_short.set.wait_leader(epoch)
    running_short.wait_confirming()
    leader.start()
    running_short.settle()


@pytest.mark.parametrize("victim", ["follower", "leader"])
def test_disk_full(tmp_path: Path, zookeeper: Ensemble, victim: str):
    """Its member stops counting, the others serve on; with room again it comes back by itself."""
    with contextlib.ExitStack() as stack:
        disks = {name: stack.enter_context(small_disk(tmp_path / name)) for name in "abc"}
        data_dirs = [disk / "data" for disk in disks.values()]
        found = stack.enter_context(trial(tmp_path, zookeeper.addresses, data_dirs=data_dirs))
        leader = found.set.wait_whole()
        epoch = leader.role[1]
        member = leader if victim == "leader" else found.set.followers()[0]
        began = time.monotonic()
        fill(disks[member.name])
        if member is leader:
            found.set.wait_leader(epoch, without=leader)
        found.set.wait("the member leaves its role", lambda: member.role[0] not in ("leader", "follower"))
        found.wait_confirming()
        found.serve_until(time.monotonic() + QUIET)
        note_gaps(f"disk of the {victim} full", [found.gap(began)])
        empty(disks[member.name])
        found.set.wait_whole()
        found.settle()
