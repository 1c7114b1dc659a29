"""The four sync modes: what is confirmed when, what survives which loss, and that the set agrees afterwards. On virtual time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio

from pybroker.cluster.coordinator import SetNode, Write
from pybroker.cluster.leader import SYNC_INTERVAL
from tests.cluster.members import Cluster, Member, running
from tests.cluster.replicas import put, until
from tests.store.forgetful import ForgetfulBackend

MODES = ["quorum_disk", "quorum_mem", "local_disk", "local_mem"]


def on_disk(member: Member, number: int) -> bool:
    backend = member.copies.backend
    assert isinstance(backend, ForgetfulBackend)
    return put(number)[0] in backend.synced


async def commits(leader: Member, number: int, seconds: float = 1.0) -> bool:
    """Whether a batch is confirmed in that time."""
    with trio.move_on_after(seconds):
        await leader.commit(number)
        return True
    return False


async def all_agree(cluster: Cluster) -> None:
    leader = await cluster.settle()
    await leader.commit(9999)
    await until(lambda: all(one.content == leader.content for one in cluster.members.values()), 10.0)


@pytest.mark.parametrize("sync", MODES)
async def test_what_a_confirmation_waits_for(autojump_clock: trio.abc.Clock, sync: str) -> None:
    async with running(sync=sync) as cluster:
        leader = await cluster.settle()
        followers = cluster.followers
        assert await commits(leader, 1)
        assert on_disk(leader, 1) is (sync in ("quorum_disk", "local_disk"))
        if sync == "quorum_disk":
            assert any(on_disk(one, 1) for one in followers)
        if sync == "quorum_mem":
            assert any(one.holds(1) for one in followers)
            assert not any(on_disk(one, 1) for one in followers)
        followers[0].gate = trio.Event()
        assert await commits(leader, 2)
        followers[1].gate = trio.Event()  # now no other disk takes anything, and no other memory
        confirmed = trio.Event()

        async def commit() -> None:
            await leader.commit(3)
            confirmed.set()

        cluster.nursery.start_soon(commit)
        await trio.sleep(5)
        assert confirmed.is_set() is sync.startswith("local")
        for one in followers:
            assert one.gate is not None
            one.gate.set()
        with trio.fail_after(1):
            await confirmed.wait()
        await all_agree(cluster)


@pytest.mark.parametrize("sync", MODES)
async def test_what_survives_the_loss_of_the_leader(autojump_clock: trio.abc.Clock, sync: str) -> None:
    """In the local modes that is what the others have heard of; the rest was confirmed, and is lost: also at its disk."""
    async with running(sync=sync) as cluster:
        leader = await cluster.settle()
        for number in range(1, 11):
            assert await commits(leader, number)
        await trio.sleep(0.1)
        if sync.startswith("local"):
            cluster.network.cut(leader.name)
            for number in range(11, 16):
                assert await commits(leader, number)
            assert leader.holds(15)
        await leader.crash(keep=100)  # the process only
        cluster.network.silent.clear()
        new = await cluster.wait_leader()
        assert all(new.holds(number) for number in range(1, 11))
        assert not new.holds(11)
        await new.commit(20)
        assert leader.holds(15) is sync.startswith("local")
        leader.start()
        await all_agree(cluster)
        assert not leader.holds(15)  # the divergent tail was cut off
        assert leader.holds(20)


@pytest.mark.parametrize("sync", MODES)
async def test_what_survives_the_loss_of_all(autojump_clock: trio.abc.Clock, sync: str) -> None:
    """The power goes everywhere: in the mode that waits for a quorum's disks nothing is lost; in memory, the last second."""
    async with running(sync=sync) as cluster:
        leader = await cluster.settle()
        for number in range(1, 11):
            assert await commits(leader, number)
        await trio.sleep(2 * SYNC_INTERVAL)
        for number in range(11, 21):
            assert await commits(leader, number)
        members = list(cluster.members.values())
        async with trio.open_nursery() as nursery:
            for one in members:
                nursery.start_soon(one.crash)
        for one in members:
            one.start()
        new = await cluster.wait_leader()
        assert all(new.holds(number) for number in range(1, 11))
        if sync == "quorum_disk":
            assert all(new.holds(number) for number in range(11, 21))
        elif sync == "local_disk":
            await all_agree(cluster)
            assert leader.holds(20) is new.holds(
                20
            )  # the leader's disk had it: kept if it was one of those who elected
        elif sync == "local_mem":
            assert not new.holds(20)
        await all_agree(cluster)


@pytest.mark.parametrize("sync", MODES)
async def test_all_processes_killed_lose_nothing_in_any_mode_when_the_machines_stay(
    autojump_clock: trio.abc.Clock, sync: str
) -> None:
    async with running(sync=sync) as cluster:
        leader = await cluster.settle()
        for number in range(1, 11):
            assert await commits(leader, number)
        await trio.sleep(0.05)
        members = list(cluster.members.values())
        for one in members:
            await one.crash(keep=100)
        for one in members:
            one.start()
        new = await cluster.wait_leader()
        assert all(new.holds(number) for number in range(1, 11))
        await all_agree(cluster)


@pytest.mark.parametrize("sync", ["quorum_mem", "local_mem"])
async def test_a_published_position_is_on_disk_also_where_confirmations_do_not_wait_for_it(
    autojump_clock: trio.abc.Clock, sync: str
) -> None:
    async with running(sync=sync) as cluster:
        leader = await cluster.settle()
        for number in range(1, 11):
            assert await commits(leader, number)
        assert not on_disk(leader, 10)
        published: list[bool] = []

        def fate(name: str, writes: Sequence[Write]) -> None:
            if name == leader.name and any(
                isinstance(write, SetNode) and write.path.startswith("slots") for write in writes
            ):
                published.append(on_disk(leader, 10))

        cluster.zookeeper.fate = fate
        assert leader.replica._leading is not None
        leader.replica._leading.leader.step_down("a test says so")
        await until(lambda: bool(published), 1.0)
        assert all(published)


@pytest.mark.parametrize("sync", ["quorum_mem", "local_mem"])
async def test_a_disk_that_fails_when_it_is_asked_later_ends_the_leadership(
    autojump_clock: trio.abc.Clock, sync: str
) -> None:
    async with running(sync=sync) as cluster:
        leader = await cluster.settle()
        assert await commits(leader, 1)
        await trio.sleep(2 * SYNC_INTERVAL)
        assert await commits(leader, 2)
        await trio.sleep(0.1)
        backend = leader.copies.backend
        assert isinstance(backend, ForgetfulBackend)
        backend.full = True
        term = leader.term
        assert term is not None
        with trio.fail_after(2 * SYNC_INTERVAL):
            await term.lost.wait()
        new = await cluster.settle()
        assert new is not leader
        assert new.holds(2)
        await all_agree(cluster)
