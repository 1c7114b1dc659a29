"""What an operator does to a set: another name gets a place, a start is forced, a look at it all. On virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import trio

from pybroker.cluster.coordinator import CoordinatorLost, SetNode, Write
from pybroker.cluster.election import FORCED_STEP
from pybroker.cluster.memory import Fate
from pybroker.cluster.replica import CANDIDATE, FOLLOWER, LEADER
from pybroker.errors import BrokerError, ConfigurationError, NotLeader
from tests.cluster.members import DELAY, Cluster, Member, running
from tests.cluster.replicas import until


async def three_of_which_one_is_dead(cluster: Cluster) -> tuple[Member, Member, Member]:
    """The leader, a follower, and one that was killed."""
    leader = await cluster.settle()
    other, dead = cluster.followers
    await dead.crash()
    await leader.commit(1)
    return leader, other, dead


# ---- replacing


async def test_a_dead_member_s_place_is_given_to_another_name(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader, other, dead = await three_of_which_one_is_dead(cluster)
        await leader.replica.replace(dead.name, "d")
        assert cluster.view.roster == {
            leader.name: leader.copies.identity.incarnation,
            other.name: other.copies.identity.incarnation,
            "d": "",
        }
        new = cluster.add("d")
        await until(lambda: cluster.view.roster["d"] == new.copies.identity.incarnation, 5.0)
        assert new.holds(1)
        # From now on it counts as any other: without the follower too the leader confirms.
        await other.crash()
        await leader.commit(2)
        assert new.holds(2)
        await leader.crash()
        other.start()
        assert (await cluster.wait_leader()).holds(2)


async def test_the_one_whose_place_is_gone_ends_with_a_clear_error_and_no_other_does(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        gone, other = cluster.followers
        await leader.replica.replace(gone.name, "d")
        with trio.fail_after(5):
            await gone.stopped.wait()
        assert isinstance(gone.error, ConfigurationError)
        assert "has no place in the set" in str(gone.error)
        assert f"`pybroker replica replace OLD {gone.name}`" in str(gone.error)
        await leader.commit(1)
        cluster.add("d")
        await cluster.settle()
        assert not leader.stopped.is_set()
        assert not other.stopped.is_set()
        # Nor does it come back when it is started again, even into a place that nobody has taken yet.
        await leader.replica.replace("d", "e")
        gone.start()
        with trio.fail_after(5):
            await gone.stopped.wait()
        assert set(cluster.view.roster) == {leader.name, other.name, "e"}


async def test_the_leader_stops_counting_the_old_copy_before_the_roster_changes(
    autojump_clock: trio.abc.Clock,
) -> None:
    """It may answer as fast as it likes: from the moment when ZooKeeper is asked, a batch needs another copy."""
    async with running("abcde", replicas=5) as cluster:
        leader = await cluster.settle(5)
        gone, *others = cluster.followers
        counted: list[bool] = []

        def fate(name: str, writes: Sequence[Write]) -> Fate | None:
            if any(isinstance(write, SetNode) and write.path == "roster" for write in writes):
                counted.append(
                    any(row["counted"] for row in rows() if row["name"] == gone.name and row["state"] != "absent")
                )
                assert leader.replica._leading is not None
                counted.append(gone.name in {copy.name for copy in leader.replica._leading.leader._tracking.counted()})
                return Fate(3.0, DELAY)
            return None

        def rows() -> list[dict[str, Any]]:
            members: list[dict[str, Any]] = leader.replica.status()["members"]
            return members

        cluster.zookeeper.fate = fate
        cluster.nursery.start_soon(leader.replica.replace, gone.name, "f")
        await trio.sleep(1)  # the change is on its way
        assert counted[1:] == [False]
        assert gone.name in cluster.view.roster
        assert gone.replica.role != FOLLOWER
        for other in others[:2]:
            await leader.commit(1 + others.index(other))
            await other.crash()
        committed = trio.Event()

        async def commit() -> None:
            await leader.commit(3)
            committed.set()

        cluster.nursery.start_soon(commit)  # two are left, and the one that counts no more
        await trio.sleep(1)
        assert not committed.is_set()
        for other in others[:2]:
            other.start()
        with trio.fail_after(5):
            await committed.wait()
        await until(lambda: "f" in cluster.view.roster, 5.0)
        assert gone.name not in cluster.view.roster


@pytest.mark.parametrize("fate", [Fate(DELAY, None), Fate(1.5, None), Fate(None, None)], ids=["done", "late", "lost"])
async def test_a_change_that_was_not_answered_is_settled(autojump_clock: trio.abc.Clock, fate: Fate) -> None:
    async with running() as cluster:
        leader, other, dead = await three_of_which_one_is_dead(cluster)
        left = [fate]

        def once(name: str, writes: Sequence[Write]) -> Fate | None:
            asked = any(isinstance(write, SetNode) and write.path == "roster" for write in writes)
            return left.pop() if asked and left else None

        cluster.zookeeper.request_timeout = 0.5
        cluster.zookeeper.fate = once
        with trio.fail_after(10):
            await leader.replica.replace(dead.name, "d")
        assert set(cluster.view.roster) == {leader.name, other.name, "d"}
        await trio.sleep(3)
        assert set(cluster.view.roster) == {leader.name, other.name, "d"}
        new = cluster.add("d")
        await until(lambda: cluster.view.roster["d"] == new.copies.identity.incarnation, 5.0)
        assert cluster.leaders == [leader]


async def test_what_can_not_be_is_refused_and_changes_nothing(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        one, other = cluster.followers
        before = cluster.view.roster
        for old, new, words in (
            ("x", "d", "is not on the roster"),
            (one.name, other.name, "is on the roster already"),
            (leader.name, "d", "handover"),
            (one.name, "../d", "letters, digits"),
        ):
            with pytest.raises(ConfigurationError, match=words):
                await leader.replica.replace(old, new)
        with pytest.raises(NotLeader, match=f"ask replica {leader.name}") as caught:
            await one.replica.replace(other.name, "d")
        assert (caught.value.leader, caught.value.urls) == (leader.name, (f"stomp://{leader.name}",))
        await other.crash()
        with pytest.raises(ConfigurationError, match="too few copies"):
            await leader.replica.replace(one.name, "d")
        cluster.zookeeper.down()
        with pytest.raises(CoordinatorLost):
            await leader.replica.replace(other.name, "d")
        cluster.zookeeper.up()
        await until(lambda: leader.coordinator.connected)
        assert cluster.view.roster == before
        await leader.commit(1)
        assert one.holds(1)
        assert one.replica.role == FOLLOWER


async def test_without_a_leader_whoever_is_asked_does_it(autojump_clock: trio.abc.Clock) -> None:
    """Two of three disks are gone for good: a place is given to a new name, but who has not enough copies stays blocked."""
    async with running("abcde", replicas=5) as cluster:
        leader = await cluster.settle(5)
        await leader.commit(1)
        one, two, *dead = cluster.followers
        for member in (*dead, leader):
            await member.crash()
        await until(lambda: one.replica.role == two.replica.role == CANDIDATE, 5.0)
        with pytest.raises(NotLeader):  # ZooKeeper shows the dead leader still
            await one.replica.replace(dead[0].name, "f")
        await until(lambda: cluster.view.leader is None, 15.0)
        await one.replica.replace(dead[0].name, "f")
        assert "f" in cluster.view.roster
        assert dead[0].name not in cluster.view.roster
        dead[0].start()
        with trio.fail_after(5):
            await dead[0].stopped.wait()
        assert isinstance(dead[0].error, ConfigurationError)
        dead[1].start()
        new = await cluster.wait_leader()
        assert new.holds(1)
        cluster.add("f")
        await until(lambda: bool(cluster.view.roster["f"]), 5.0)


async def test_a_leader_learns_of_a_roster_that_another_has_changed(autojump_clock: trio.abc.Clock) -> None:
    """While its node is gone for a moment, another replica may be asked: the leader goes by the new roster at once."""
    async with running() as cluster:
        leader = await cluster.settle()
        gone, other = cluster.followers
        await trio.sleep(1)  # until the leader knows, too, that all are on the roster
        cluster.zookeeper.cut(leader.coordinator)
        await until(lambda: cluster.view.leader is None, 15.0)
        with pytest.raises(NotLeader):  # it follows one, whatever ZooKeeper shows
            await other.replica.replace(gone.name, "d")
        await gone.crash()
        outside = gone
        outside.start()  # it finds no leader in ZooKeeper
        await until(lambda: outside.replica.role == CANDIDATE, 5.0)
        await outside.replica.replace(gone.name, "d")
        with trio.fail_after(5):
            await outside.stopped.wait()
        assert isinstance(outside.error, ConfigurationError)
        cluster.zookeeper.heal(leader.coordinator)
        await until(lambda: cluster.view.leader is not None, 5.0)
        new = cluster.add("d")
        await until(lambda: cluster.view.roster["d"] == new.copies.identity.incarnation, 5.0)
        assert cluster.leaders == [leader]
        assert leader.led == [1]


async def test_a_leader_that_lost_its_own_place_leads_no_more(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        roster = {name: copy for name, copy in cluster.view.roster.items() if name != leader.name}
        assert leader.replica._leading is not None
        leader.replica._leading.leader.set_roster(roster | {"d": ""})
        assert leader.term is not None
        assert not leader.term.valid
        await until(lambda: leader.led == [1] and leader.replica.role != LEADER, 1.0)


# ---- a forced start


async def wiped_with_one_away(cluster: Cluster) -> tuple[Member, Member, Member]:
    """ZooKeeper has lost its data, and one member is dead: two that wait, the better one first."""
    leader, other, dead = await three_of_which_one_is_dead(cluster)
    await other.crash()
    await leader.crash()
    cluster.zookeeper.wipe()
    await trio.sleep(1)
    leader.start()
    other.start()
    await until(lambda: "force-start" in leader.replica.blocked and "force-start" in other.replica.blocked, 5.0)
    return leader, other, dead


async def test_a_forced_start_goes_on_with_what_is_there(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        one, other, dead = await wiped_with_one_away(cluster)
        await trio.sleep(60)
        assert not cluster.leaders
        best = max(one, other, key=lambda member: member.position)
        began = trio.current_time()
        best.replica.force_start()
        new = await cluster.wait_leader(1.0)
        assert trio.current_time() - began < 0.3
        assert new is best
        assert best.replica.epoch > FORCED_STEP
        assert best.holds(1)
        assert best.replica.blocked == ""
        await best.commit(2)
        dead.start()
        await cluster.settle()
        assert dead.holds(2)


async def test_a_start_is_not_forced_beside_a_leader(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader, other, _ = await three_of_which_one_is_dead(cluster)
        for member in (leader, other):
            with pytest.raises(BrokerError, match="has started"):
                member.replica.force_start()
        await leader.crash()
        await until(lambda: other.replica.role == CANDIDATE, 5.0)
        with pytest.raises(BrokerError, match=f"shows replica {leader.name} as the leader"):
            other.replica.force_start()


async def test_two_disks_are_gone_and_an_operator_goes_on_with_the_third(autojump_clock: trio.abc.Clock) -> None:
    """The others come back empty: they are learners, and count when they hold what is left."""
    async with running() as cluster:
        leader, other, dead = await three_of_which_one_is_dead(cluster)
        await other.crash()
        await until(lambda: leader.replica.role == CANDIDATE)
        for wiped in (other, dead):
            wiped.copies.start_anew()
            wiped.copies.close()
            wiped.start()
        await trio.sleep(30)
        assert not cluster.leaders
        leader.replica.force_start()
        assert await cluster.wait_leader() is leader
        await cluster.settle()
        assert other.holds(1)
        assert dead.holds(1)


# ---- a look


def rows(member: Member) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in member.replica.status()["members"]}


async def test_every_replica_shows_all_of_them_also_while_zookeeper_is_away(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        one, other = cluster.followers
        await trio.sleep(1)
        cluster.zookeeper.down()
        for number in range(1, 6):
            await leader.commit(number)
        await trio.sleep(30)
        for member in (leader, one, other):
            status = member.replica.status()
            assert {
                key: status[key]
                for key in ("set", "name", "epoch", "leader", "clients", "zookeeper", "blocked", "sync")
            } == {
                "set": "set",
                "name": member.name,
                "epoch": 1,
                "leader": leader.name,
                "clients": [f"stomp://{leader.name}"],
                "zookeeper": "not connected",
                "blocked": "",
                "sync": "quorum_disk",
            }
            assert status["position"] == list(member.position)
            assert [row["name"] for row in status["members"]] == ["a", "b", "c"]
            for name, row in rows(member).items():
                leads = name == leader.name
                assert row == {
                    "name": name,
                    "role": LEADER if leads else FOLLOWER,
                    "counted": True,
                    "position": list(leader.position),
                    "lag": 0,
                    "state": "leading" if leads else "following",
                    "address": name,
                    "incarnation": cluster.members[name].copies.identity.incarnation,
                }
        await other.crash()
        await leader.commit(6)
        await trio.sleep(1)
        assert rows(one)[other.name]["state"] == "running"  # as ZooKeeper said last
        cluster.zookeeper.up()
        await until(lambda: rows(one)[other.name]["state"] == "absent", 30.0)
        assert rows(leader)[other.name]["counted"]


async def test_without_a_leader_the_slots_say_who_stands(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader, other, dead = await three_of_which_one_is_dead(cluster)
        await leader.replica.replace(dead.name, "d")
        await trio.sleep(0.1)
        assert rows(leader)["d"]["state"] == rows(other)["d"]["state"] == "reserved"
        assert dead.name not in rows(leader) or rows(leader)[dead.name]["state"] == "running"
        await leader.crash()
        await until(lambda: cluster.view.leader is None, 20.0)
        await until(lambda: rows(other)[leader.name]["state"] == "absent", 20.0)
        table = rows(other)
        assert set(table) == {leader.name, other.name, "d"}
        assert (table[other.name]["role"], table[other.name]["state"]) == (CANDIDATE, "standing")
        assert table[other.name]["position"] == list(other.position)
        assert table[leader.name]["counted"]
        assert not table["d"]["counted"]
        assert other.replica.status()["leader"] is None
