"""A leader whose store can't be read any more, in whole sets on virtual time: it hands over, and is filled by the next one."""

from __future__ import annotations

from contextlib import suppress

import pytest
import trio

from pybroker.cluster.replica import FOLLOWER
from pybroker.errors import BrokerError, StoreDamaged
from pybroker.store import format as fmt
from tests.cluster.members import Member, running
from tests.cluster.replicas import until


def damage(member: Member) -> None:
    """LevelDB can't read a block any more: every snapshot of this copy ends with an error behind the first messages."""
    backend = member.copies.backend
    real = backend.snapshot
    first_bad = fmt.message_key(1, 5)

    class Damaged:
        def __init__(self) -> None:
            self.inner = real()

        def __enter__(self):
            self.reader = self.inner.__enter__()
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def get(self, key):
            return self.reader.get(key)

        def iterate(self, start, stop):
            for key, value in self.reader.iterate(start, stop):
                if key >= first_bad:
                    raise StoreDamaged("a block")
                yield key, value

    backend.snapshot = Damaged  # type: ignore[method-assign]


async def test_a_leader_that_can_not_read_its_store_hands_over_and_is_filled_anew(autojump_clock):
    async with running() as cluster:
        leader = await cluster.settle()
        for number in range(1, 20):
            await leader.commit(number)
        old, incarnation = leader.copies.backend, leader.copies.identity.incarnation
        damage(leader)
        assert leader.term is not None
        page = leader.term.store.read_page(1, 0, 100, 1 << 20)  # a consumer wants it
        assert page.unreadable
        await until(lambda: leader not in cluster.leaders and bool(cluster.leaders))
        [other] = cluster.leaders
        await other.commit(99)
        await until(lambda: leader.copies.backend is not old and leader.replica.role == FOLLOWER)
        await until(lambda: leader.content == other.content)
        assert all(leader.holds(number) for number in [*range(1, 20), 99])
        # The same copy as before: it was counted on all the time, as far as it said that it holds something.
        assert leader.copies.identity.incarnation == incarnation == cluster.view.roster[leader.name]
        await other.crash()
        await until(lambda: bool(cluster.leaders))


async def test_a_leader_that_can_not_read_its_store_goes_on_while_the_others_could_not_do_without_it(autojump_clock):
    async with running() as cluster:
        leader = await cluster.settle()
        for number in range(1, 20):
            await leader.commit(number)
        gone = cluster.followers[0]
        await gone.crash()
        damage(leader)
        assert leader.term is not None
        leader.term.store.read_page(1, 0, 100, 1 << 20)
        await trio.sleep(10)
        assert cluster.leaders == [leader]
        assert len(leader.led) == 1
        await leader.commit(30)
        gone.start()
        await until(lambda: leader not in cluster.leaders and bool(cluster.leaders))
        await until(lambda: leader.replica.role == FOLLOWER and leader.content == cluster.leaders[0].content)
        assert leader.holds(30)


async def test_a_walk_finds_what_nobody_reads_on_a_leader(autojump_clock):
    async with running(scrub_interval=5.0) as cluster:
        leader = await cluster.settle()
        for number in range(1, 20):
            await leader.commit(number)
        damage(leader)
        await until(lambda: leader not in cluster.leaders and bool(cluster.leaders))
        await until(lambda: leader.replica.role == FOLLOWER and leader.content == cluster.leaders[0].content)


@pytest.mark.parametrize("leads", [True, False])
async def test_a_store_that_refuses_writes_for_damage_is_filled_anew_instead_of_failing_again_and_again(
    autojump_clock, leads
):
    """LevelDB can't rewrite a table that has a bad block: it fails writes then, and again after each opening."""
    async with running() as cluster:
        leader = await cluster.settle()
        for number in range(1, 20):
            await leader.commit(number)
        member = leader if leads else cluster.followers[0]
        old = member.copies.backend
        failures = 0

        def write(batch: object, sync: bool) -> None:
            nonlocal failures
            failures += 1
            raise StoreDamaged("block checksum mismatch")

        real, old.write = old.write, write  # type: ignore[method-assign]
        with suppress(BrokerError):
            await leader.commit(20)
        await until(lambda: failures > 0)
        old.write = real  # type: ignore[method-assign]  # it opens, and takes some writes
        await until(lambda: member.copies.backend is not old and member.replica.role == FOLLOWER)
        assert failures == 1
        [other] = cluster.leaders
        await until(lambda: member.content == other.content)
        assert all(member.holds(number) for number in range(1, 20))
