"""A replica whose own parts fail: its disk, its user, its process at any moment. On virtual time."""

from __future__ import annotations

import logging
import random

import pytest
import trio

from pybroker.cluster.leader import LeadershipLost
from pybroker.cluster.leadership import REMINDER
from pybroker.cluster.replica import FOLLOWER, LEADER
from pybroker.errors import StoreError
from pybroker.store.committer import Batch
from tests.cluster.members import Cluster, Member, running
from tests.cluster.replicas import put, until
from tests.store.forgetful import ForgetfulBackend


def backend_of(member: Member) -> ForgetfulBackend:
    backend = member.copies.backend
    assert isinstance(backend, ForgetfulBackend)
    return backend


class Broken(Member):
    """A member whose disk takes no writes while `broken`, however often its store is opened again."""

    broken = False

    async def _run_blocking(self, call: object) -> object:
        if self.broken and call != self.copies.open:
            backend_of(self).full = True
        return await super()._run_blocking(call)  # type: ignore[arg-type]


def with_broken(cluster: Cluster, name: str) -> Broken:
    member = Broken(cluster, name, cluster.config)
    cluster.members[name] = member
    member.start()
    return member


# ---- the disk


async def test_a_write_that_fails_in_the_user_s_engine_ends_the_leadership_and_reopens_the_store(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        await leader.commit(1)
        term, starts = leader.term, leader.copies.identity.starts
        assert term is not None
        backend_of(leader).fail_write = backend_of(leader).writes + 1
        with pytest.raises(StoreError):
            await leader.commit(2)
        assert term.doubtful
        assert not term.valid
        with pytest.raises(LeadershipLost):
            await term.committer.commit(Batch([put(3)], (1, 4)))
        await until(lambda: leader.copies.identity.starts == starts + 1, 1.0)
        # It published what it read back, and not what it had in memory.
        slot = cluster.view.slots[leader.name][0]
        assert slot.starts <= starts or slot.candidate in (None, (1, 2))
        new = await cluster.settle()
        assert new is not leader
        assert new.holds(2)  # a quorum had it; its sender was told that it is in doubt
        await until(lambda: leader.content == new.content, 5.0)


async def test_a_new_leader_whose_first_write_fails_makes_room_for_another(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        await leader.commit(1)
        best = cluster.followers[0]
        await trio.sleep(1)
        assert best.name < cluster.followers[1].name
        starts = best.copies.identity.starts
        backend_of(best).fail_write = backend_of(best).writes + 1
        await leader.crash()
        new = await cluster.wait_leader(1.0)
        assert new.holds(1)
        assert new is not best
        assert best.led == []  # it was elected, and nobody was given its term
        leader.start()
        await cluster.settle()
        assert best.copies.identity.starts == starts + 1
        await until(lambda: best.content == new.content, 5.0)


async def test_a_member_whose_disk_takes_no_writes_does_not_keep_the_others_from_leading(
    autojump_clock: trio.abc.Clock,
) -> None:
    """It is the best candidate again and again: that must not be an election again and again."""
    async with running("bc") as cluster:
        broken = with_broken(cluster, "a")
        leader = await cluster.settle()
        if leader is not broken:  # then make it so
            for _ in range(5):
                leader.replica.hand_over()
                await until(lambda: not cluster.leaders)
                leader = await cluster.settle()
                if leader is broken:
                    break
        assert leader is broken
        await leader.commit(1)
        broken.broken = True
        with pytest.raises((StoreError, LeadershipLost)):
            await leader.commit(2)
        new = await cluster.wait_leader(1.0)
        epoch, starts = cluster.view.epoch, broken.copies.identity.starts
        await trio.sleep(60)
        assert broken.copies.identity.starts - starts < 20  # it opens its store again less and less often
        for number in range(3, 10):
            await new.commit(number)
        assert cluster.view.epoch == epoch
        assert cluster.leaders == [new]
        await new.crash()  # of the two that are left one is broken: the set waits, and does not spin
        await trio.sleep(60)
        assert not cluster.leaders
        assert cluster.view.epoch < epoch + 30
        broken.broken = False
        back = await cluster.wait_leader(65.0)
        assert all(back.holds(number) for number in range(3, 10))


# ---- the user of a term


async def test_a_user_that_does_not_let_go_of_the_store_is_complained_about_until_it_does(
    autojump_clock: trio.abc.Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        term = leader.term
        assert term is not None
        let_go = trio.Event()
        release = term.release

        def later() -> None:
            cluster.nursery.start_soon(wait)

        async def wait() -> None:
            await let_go.wait()
            release()

        term.release = later  # type: ignore[method-assign]
        with caplog.at_level(logging.ERROR):
            assert leader.replica._leading is not None
            leader.replica._leading.leader.step_down("a test says so")
            new = await cluster.wait_leader(1.0)  # the others need not wait
            assert new is not leader
            await trio.sleep(3.5 * REMINDER)
        held = leader.copies._store is not None
        let_go.set()
        told = [record.getMessage() for record in caplog.records if "has not let go of it" in record.getMessage()]
        assert len(told) == 3
        assert f"for {3 * REMINDER:.0f} s" in told[-1]
        assert held  # nobody closes what it may be using
        await until(lambda: leader.replica.role == FOLLOWER, 5.0)


async def test_a_user_that_gives_its_term_back_hands_over(autojump_clock: trio.abc.Clock) -> None:
    """As a broker whose engine failed for a reason of its own."""
    async with running() as cluster:
        leader = await cluster.settle()
        await leader.commit(1)
        assert leader.term is not None
        leader.term.release()
        await until(lambda: leader.replica.role != LEADER, 1.0)
        assert await cluster.settle() is not leader


# ---- the end at any moment


@pytest.mark.parametrize("seed", range(4))
async def test_a_replica_can_be_cancelled_at_any_moment(autojump_clock: trio.abc.Clock, seed: int) -> None:
    """Its files are closed and nothing hangs, whatever it was doing: starting, standing, leading, catching up, handing over."""
    rng = random.Random(seed)
    async with running() as cluster:
        confirmed: list[int] = []
        for turn in range(40):
            leader = await cluster.wait_leader(10.0)
            try:
                await leader.commit(turn + 1)
                confirmed.append(turn + 1)
            except (LeadershipLost, AssertionError):
                pass
            one = rng.choice(list(cluster.members.values()))
            if rng.random() < 0.3:
                one.replica.hand_over()
            await trio.sleep(rng.choice([0.0, 0.001, 0.004, rng.uniform(0, 0.06), rng.uniform(0, 0.3)]))
            assert one.scope is not None
            with trio.fail_after(5):
                one.scope.cancel()
                await one.stopped.wait()
            assert one.error is None
            assert one.copies._store is None
            assert one.copies.side is None
            cluster.zookeeper.kill(one.coordinator)
            await trio.sleep(rng.choice([0.0, 0.01, rng.uniform(0, 0.1)]))
            one.start()
        leader = await cluster.settle()
        assert len(confirmed) > 20
        assert all(leader.holds(number) for number in confirmed)
