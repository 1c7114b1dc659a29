"""The first start of a set on stores that were a broker's of its own: one is gone on with, two are never mixed."""

from __future__ import annotations

import trio

from tests.cluster.replicas import put, until
from tests.cluster.test_replica import Cluster, Member, running


def bring(cluster: Cluster, name: str, *numbers: int) -> Member:
    """A member that is not started yet, with messages of a time before the set."""
    member = Member(cluster, name, cluster.config)
    cluster.members[name] = member
    store = member.copies.open()
    for number in numbers:
        store.apply([put(number)], (0, store.position[1] + 1), True)
    member.copies.close()
    return member


async def test_a_set_goes_on_with_the_messages_of_one_broker(autojump_clock: trio.abc.Clock) -> None:
    async with running("") as cluster:
        loaded = bring(cluster, "c", 1, 2, 3)
        for member in (loaded, bring(cluster, "a"), bring(cluster, "b")):
            member.start()
        leader = await cluster.settle()
        assert leader is loaded
        assert all(member.holds(number) for member in cluster.members.values() for number in (1, 2, 3))


async def test_two_stores_of_their_own_are_not_mixed(autojump_clock: trio.abc.Clock) -> None:
    async with running("") as cluster:
        first, second, empty = bring(cluster, "b", 1), bring(cluster, "c", 2, 3), bring(cluster, "a")
        for member in (first, second):
            member.start()
        await until(lambda: "b, c all bring messages" in second.replica.blocked)
        empty.start()  # with it there would be a quorum without one of them
        await trio.sleep(5)
        assert all(member.led == [] for member in cluster.members.values())


async def test_a_store_of_its_own_that_comes_later_is_refused_before_it_is_overwritten(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with running("ab") as cluster:
        await cluster.wait_leader()
        late = bring(cluster, "c", 7)
        late.start()
        await late.stopped.wait()
        assert "move its data_dir away" in str(late.error)
        assert late.copies.open().position == (0, 1)
