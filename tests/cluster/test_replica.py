"""Whole replicas on virtual time: who leads, what stays, and what the set does when one of its parts is away."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import trio

from pybroker.cluster.leader import LeadershipLost
from pybroker.cluster.replica import CANDIDATE, FOLLOWER, LEADER, check_replica_set
from pybroker.errors import ConfigurationError, StoreDamaged, StoreError
from tests.cluster.members import CONFIG, DELAY, Cluster, Member, Network, running
from tests.cluster.replicas import until
from tests.store.forgetful import ForgetfulBackend

__all__ = ["CONFIG", "DELAY", "Cluster", "Member", "Network", "running"]  # other tests take them from here, too


async def test_three_replicas_elect_a_leader_and_a_batch_is_on_a_quorum(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        await leader.commit(1)
        assert leader.holds(1)
        assert any(one.holds(1) for one in cluster.followers)
        await until(lambda: all(one.holds(1) for one in cluster.followers), 1.0)
        status = leader.replica.status()
        assert (status["role"], status["leader"], status["zookeeper"]) == (LEADER, leader.name, "connected")
        assert [row["state"] for row in status["members"] if row["name"] != leader.name] == ["following"] * 2
        assert cluster.view.leader is not None
        assert cluster.view.leader.clients == (f"stomp://{leader.name}",)
        assert set(cluster.view.alive) == set("abc")


async def test_a_killed_leader_is_replaced_within_a_second_and_comes_back_as_a_follower(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with running() as cluster:
        old = await cluster.settle()
        for number in range(1, 21):
            await old.commit(number)
        await old.crash()
        began = trio.current_time()
        new = await cluster.wait_leader(1.0)
        assert trio.current_time() - began < 1.0
        assert new is not old
        assert all(new.holds(number) for number in range(1, 21))
        await new.commit(21)
        old.start()
        await until(lambda: old.replica.role == FOLLOWER and old.holds(21), 5.0)
        assert cluster.view.roster[old.name] == old.copies.identity.incarnation
        assert old.content == new.content


async def test_many_leaders_are_killed_and_nothing_is_lost(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        confirmed: list[int] = []
        for turn in range(6):
            leader = await cluster.settle()
            for number in range(10 * turn, 10 * turn + 10):
                await leader.commit(number + 1)
                confirmed.append(number + 1)
            await leader.crash()
            new = await cluster.wait_leader(1.0)
            assert all(new.holds(number) for number in confirmed)
            leader.start()


async def test_the_set_serves_on_without_zookeeper(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        cluster.zookeeper.down()
        for number in range(1, 11):
            await leader.commit(number)
            await trio.sleep(60)
        assert cluster.leaders == [leader]
        assert len(leader.led) == 1
        cluster.zookeeper.up()
        await until(lambda: cluster.view.leader is not None and cluster.view.leader.name == leader.name)
        await leader.commit(61)


async def test_a_leader_whose_session_expired_shows_itself_again(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        before = cluster.view
        cluster.zookeeper.expire(leader.coordinator)
        assert cluster.view.leader is None
        await until(lambda: cluster.view.leader is not None, 1.0)
        assert (cluster.view.leader, cluster.view.epoch) == (before.leader, before.epoch)
        await until(lambda: leader.name in cluster.view.alive, 15.0)


async def test_a_fourth_name_is_refused(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        await cluster.settle()
        fourth = cluster.add("d")
        await fourth.stopped.wait()
        assert isinstance(fourth.error, ConfigurationError)
        assert "has no place" in str(fourth.error)
        assert "d" not in cluster.view.slots


async def test_a_wiped_replica_comes_back_as_a_learner_and_is_registered(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        await leader.commit(1)
        wiped = cluster.followers[0]
        await wiped.crash()
        wiped.copies.start_anew()
        wiped.copies.close()
        assert cluster.view.roster[wiped.name] != wiped.copies.identity.incarnation
        wiped.start()
        await until(lambda: cluster.view.roster[wiped.name] == wiped.copies.identity.incarnation, 5.0)
        assert wiped.replica.role == FOLLOWER
        assert wiped.holds(1)


async def test_a_damaged_store_is_replaced_by_an_empty_one_and_filled(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        await leader.commit(1)
        damaged = cluster.followers[0]
        before = damaged.copies.identity.incarnation
        await damaged.crash()
        damaged.opening = [StoreDamaged("a file is damaged")]
        damaged.start()
        await until(lambda: damaged.holds(1) and damaged.replica.role == FOLLOWER, 5.0)
        await until(lambda: cluster.view.roster[damaged.name] == damaged.copies.identity.incarnation != before, 5.0)


async def test_a_copy_of_an_earlier_life_is_a_learner(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        restored = cluster.followers[0]
        await restored.crash()
        backup, identity = dict(restored.copies.backend.synced), restored.copies.identity  # type: ignore[attr-defined]
        restored.start()
        await until(lambda: restored.replica.role == FOLLOWER)
        await leader.commit(1)
        await restored.crash()
        restored.copies.backend = ForgetfulBackend(backup)
        restored.copies._identity = identity
        restored.start()
        await until(lambda: restored.holds(1) and restored.replica.role == FOLLOWER, 5.0)
        assert restored.copies.identity.incarnation != identity.incarnation
        await until(lambda: cluster.view.roster[restored.name] == restored.copies.identity.incarnation, 5.0)


async def test_a_leader_hands_over(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        old = await cluster.settle()
        await old.commit(1)
        began = trio.current_time()
        old.replica.hand_over()
        await until(lambda: not cluster.leaders)
        new = await cluster.wait_leader(1.0)
        assert trio.current_time() - began < 1.0
        assert new is not old
        assert new.holds(1)
        await until(lambda: old.replica.role == FOLLOWER, 5.0)
        assert len(new.led) == 1


async def test_a_leader_whose_write_fails_opens_its_store_again(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        await leader.commit(1)
        backend = leader.copies.backend
        assert isinstance(backend, ForgetfulBackend)
        backend.fail_write = backend.writes + 1
        starts = leader.copies.identity.starts
        with pytest.raises((StoreError, LeadershipLost)):
            await leader.commit(2)
        new = await cluster.settle()
        assert new.holds(2)  # a quorum had it
        await until(lambda: leader.copies.identity.starts == starts + 1, 5.0)


async def test_one_replica_alone_leads_nobody(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        others = cluster.followers
        for other in others:
            await other.crash()
        with trio.move_on_after(60):
            with pytest.raises(LeadershipLost):
                await leader.commit(1)
        assert not cluster.leaders
        await until(lambda: leader.replica.role == CANDIDATE)
        await trio.sleep(60)
        assert not cluster.leaders
        others[0].start()
        await cluster.wait_leader(5.0)


async def test_nothing_is_given_up_for_a_leader_that_does_not_speak(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        cluster.network.silent.add(leader.name)
        one = cluster.followers[0]
        await one.crash()
        one.start()
        await until(lambda: one.replica.role == CANDIDATE)
        await trio.sleep(5)
        assert one.replica.role == CANDIDATE
        assert cluster.view.slots[one.name][0].candidate is not None
        assert cluster.leaders == [leader]
        cluster.network.silent.clear()
        await until(lambda: one.replica.role == FOLLOWER, 5.0)
        assert cluster.view.slots[one.name][0].candidate is None


async def test_writes_whose_answers_are_lost_are_settled(autojump_clock: trio.abc.Clock) -> None:
    """Some requests to ZooKeeper arrive late or never, and some answers are lost: one leads all the same, with everything."""
    from pybroker.cluster.memory import Fate

    rng = random.Random(3)

    def fate(name: str, writes: Any) -> Fate | None:
        if not writes or rng.random() < 0.7:
            return None
        return rng.choice([Fate(None, None), Fate(DELAY, None), Fate(1.5, None)])

    async with running() as cluster:
        cluster.zookeeper.request_timeout = 0.5
        cluster.zookeeper.fate = fate
        confirmed: list[int] = []
        for turn in range(8):
            leader = await cluster.wait_leader(120.0)
            try:
                await leader.commit(turn + 1)
                confirmed.append(turn + 1)
            except LeadershipLost:
                pass
            await until(lambda: len(cluster.view.roster) == 3 and len(cluster.followers) >= 1, 120.0)
            leader = await cluster.wait_leader(120.0)
            await leader.crash()
            new = await cluster.wait_leader(120.0)
            assert all(new.holds(number) for number in confirmed)
            leader.start()
        assert len(confirmed) >= 4


@pytest.mark.parametrize(
    "options", [{"replicas": 2}, {"replicas": 0}, {"heartbeat_timeout": 0.3}, {"lease": 0.5}], ids=str
)
def test_a_set_that_can_not_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        check_replica_set(replace(CONFIG, **options))
