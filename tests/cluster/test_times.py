"""How long a set takes, in virtual time: to start, to fail over, to hand over. Nobody may wait for what can't come."""

from __future__ import annotations

import pytest
import trio

from tests.cluster.members import Cluster, Member, running
from tests.cluster.replicas import until

STEP = 0.001  # seconds between two looks


async def soon(condition: object, seconds: float) -> float:
    """Wait until a condition holds; how long that took."""
    began = trio.current_time()
    with trio.move_on_after(seconds):
        while not condition():  # type: ignore[operator]  # noqa: ASYNC110
            await trio.sleep(STEP)
        return trio.current_time() - began
    raise AssertionError(f"it did not come to that within {seconds} s")


async def leader_after(cluster: Cluster, seconds: float) -> Member:
    """The leader that a client can use, and how long that took at most."""
    began = trio.current_time()
    await soon(lambda: bool(cluster.leaders), seconds)
    await cluster.leaders[0].commit(1000 + int(1000 * trio.current_time()))
    assert trio.current_time() - began < seconds
    return cluster.leaders[0]


def slow_zookeeper(cluster: Cluster, transaction: float) -> None:
    cluster.zookeeper.delay = lambda: transaction / 2


async def test_a_first_start_and_one_after_all_were_killed_take_less_than_a_second(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with running("") as cluster:
        slow_zookeeper(cluster, 0.02)
        for name in "abc":
            cluster.add(name)
        await leader_after(cluster, 0.5)
        for member in cluster.members.values():
            await member.crash()
        for member in cluster.members.values():  # the dead leader's node is still there
            member.start()
        await leader_after(cluster, 0.5)


async def test_the_first_two_of_three_do_not_wait_for_the_third(autojump_clock: trio.abc.Clock) -> None:
    async with running("ab") as cluster:
        await leader_after(cluster, 0.5)


@pytest.mark.parametrize("sessions", ["alive", "expired"])
async def test_a_killed_leader_is_replaced_in_a_twentieth_of_a_second(
    autojump_clock: trio.abc.Clock, sessions: str
) -> None:
    async with running() as cluster:
        slow_zookeeper(cluster, 0.002)
        leader = await cluster.settle()
        if sessions == "expired":
            cluster.zookeeper.expire(leader.coordinator)
            await trio.sleep(0.001)
        await leader.crash()
        assert await leader_after(cluster, 0.05) is not leader


async def test_a_failover_takes_four_transactions(autojump_clock: trio.abc.Clock) -> None:
    """Two that stand, one election, one that gives its slot up; no slot is written twice for one that was elected already."""
    async with running() as cluster:
        leader = await cluster.settle()
        await trio.sleep(1)
        before = cluster.zookeeper.applied
        await leader.crash()
        await soon(lambda: len(cluster.leaders) == len(cluster.followers) == 1, 1.0)
        assert cluster.zookeeper.applied - before == 4


async def test_one_of_two_that_are_left_is_replaced_when_the_third_comes_back(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        slow_zookeeper(cluster, 0.002)
        leader = await cluster.settle()
        third = cluster.followers[0]
        await third.crash()
        await leader.commit(1)
        await leader.crash()
        await trio.sleep(3)
        third.start()
        await leader_after(cluster, 0.35)  # it gives the dead leader, which is shown still, a moment to speak


@pytest.mark.parametrize("zookeeper", ["there", "cut off too"])
async def test_a_leader_whose_links_go_silent_is_replaced_after_the_heartbeat_timeout(
    autojump_clock: trio.abc.Clock, zookeeper: str
) -> None:
    async with running() as cluster:
        slow_zookeeper(cluster, 0.002)
        leader = await cluster.settle()
        cluster.network.cut(leader.name)
        if zookeeper != "there":
            cluster.zookeeper.cut(leader.coordinator, noticed=False)
        await soon(lambda: any(one is not leader for one in cluster.leaders), cluster.config.heartbeat_timeout + 0.1)
        new = next(one for one in cluster.leaders if one is not leader)
        await new.commit(1)
        await until(lambda: cluster.leaders == [new])


async def test_a_hand_over_takes_a_twentieth_of_a_second(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        slow_zookeeper(cluster, 0.002)
        for _ in range(3):
            leader = await cluster.settle()
            await leader.commit(1)
            began = trio.current_time()
            leader.replica.hand_over()
            await soon(lambda: not cluster.leaders, 0.05)
            assert await leader_after(cluster, 0.05) is not leader
            assert trio.current_time() - began < 0.06


async def test_a_follower_that_lost_only_its_link_is_back_at_once(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        slow_zookeeper(cluster, 0.002)
        leader = await cluster.settle()
        cluster.network.reset(leader.name)
        await soon(lambda: len(cluster.followers) == 1, 0.05)
        await soon(lambda: len(cluster.followers) == 2, 0.1)
        assert cluster.leaders == [leader]
        assert len(leader.led) == 1
        assert all(row["state"] in ("leading", "following") for row in leader.replica.status()["members"])


async def test_a_leader_that_was_elected_and_never_speaks_holds_nobody_up(autojump_clock: trio.abc.Clock) -> None:
    async with running("abcde", replicas=5) as cluster:
        slow_zookeeper(cluster, 0.002)
        leader = await cluster.settle(5)
        others = [one.name for one in cluster.followers]
        cluster.network.silent.add(others[0])  # the best of those who are left: all else being equal, the first name
        await leader.crash()
        await soon(lambda: cluster.view.leader is not None and cluster.view.leader.name == others[0], 0.1)
        await trio.sleep(0.02)  # the others are connected, and wait for its first word
        await cluster.members[others[0]].crash()
        assert (await leader_after(cluster, 0.5)).name not in (others[0], leader.name)
