"""Leader and follower against each other, on virtual time: batches, sync modes, learners, lease, silence, failing stores."""

from __future__ import annotations

import pytest
import trio

from pybroker.cluster.registry import Position
from pybroker.errors import StoreError
from pybroker.store.committer import Batch
from tests.cluster.replicas import caught_up, content, delete, fill, put, replica_set, until

P = Position
MODES = ["quorum_disk", "quorum_mem", "local_disk", "local_mem"]


# ---- batches


@pytest.mark.parametrize("sync", MODES)
async def test_batches_are_replicated_in_every_mode(autojump_clock, sync):
    async with replica_set(sync=sync) as nodes:
        led = nodes.lead("a", 1)
        nodes.follow("b", "a", 1)
        nodes.follow("c", "a", 1)
        await led.begin()
        for number in range(50):
            await led.commit([put(number), put(number + 1000), delete(number + 999)])
        await caught_up(nodes, led, "b", "c")
        assert len(content(led.node.store)) > 50
        assert led.lost is None
        assert led.leader.lease_valid


async def test_one_write_takes_all_batches_that_have_arrived(autojump_clock):
    async with replica_set(sync="local_disk") as nodes:
        nodes["a"].disk = 0.0001
        nodes["b"].disk = 0.05
        led = nodes.lead("a", 1)
        nodes.follow("b", "a", 1)
        await led.begin()
        await led.leader.wait_followers(1)
        for number in range(200):
            await led.commit([put(number)])
        await caught_up(nodes, led, "b")
        statistics = nodes["b"].current.statistics()
        assert statistics.batches >= 200
        assert statistics.writes < 50


@pytest.mark.parametrize(
    ("sync", "waits"), [("quorum_disk", True), ("quorum_mem", True), ("local_disk", False), ("local_mem", False)]
)
async def test_what_a_commit_waits_for(autojump_clock, sync, waits):
    async with replica_set(sync=sync) as nodes:
        led = nodes.lead("a", 1)
        done = trio.Event()

        async def begin() -> None:
            await led.begin()
            done.set()

        nodes.nursery.start_soon(begin)
        await trio.sleep(1)
        assert done.is_set() is not waits
        # The leader's own disk never holds what no quorum has.
        assert led.node.position == ((0, 0) if waits else (1, 1))
        nodes.follow("b", "a", 1)
        await done.wait()
        assert led.node.position == (1, 1)


@pytest.mark.parametrize(("sync", "held"), [("quorum_disk", True), ("quorum_mem", False)])
async def test_what_a_follower_s_answer_promises(autojump_clock, sync, held):
    async with replica_set(sync=sync) as nodes:
        led = nodes.lead("a", 1)
        nodes.follow("b", "a", 1)
        await led.begin()
        await led.commit([put(1)])
        nodes.scopes["b"].cancel()
        # The power goes the moment the leader has confirmed.
        assert (nodes["b"].copies.backend.crash().get(put(1)[0]) is not None) is held


async def test_in_memory_modes_the_disk_is_asked_soon_and_at_the_end(autojump_clock):
    async with replica_set(sync="quorum_mem") as nodes:
        led = nodes.lead("a", 1)
        nodes.follow("b", "a", 1)
        await led.begin()
        await led.commit([put(1)])
        await trio.sleep(1.5)
        backend = nodes["b"].copies.backend
        assert put(1)[0] in backend.synced
        await led.commit([put(2)])
        assert put(2)[0] not in backend.synced
        await nodes.stop("b")
        assert put(2)[0] in backend.synced  # so the position that it publishes is durable


@pytest.mark.parametrize("seed", range(5))
async def test_killed_links_lose_nothing(autojump_clock, seed):
    async with replica_set(seed=seed) as nodes:
        led = nodes.lead("a", 1)
        nodes.follow("b", "a", 1)
        nodes.follow("c", "a", 1)
        await led.begin()

        async def kill() -> None:
            while True:
                await trio.sleep(nodes.network.rng.uniform(0.01, 0.2))
                nodes.network.reset()

        nodes.nursery.start_soon(kill)
        for number in range(10, 110):
            await led.commit([put(number), delete(number - 5)])
        await until(lambda: led.leader.statistics().cut > 3)
        # Healing: no more kills reach a connection that is made now.
        nodes.network.reset = lambda: None  # type: ignore[method-assign]
        await caught_up(nodes, led, "b", "c")
        assert led.lost is None


async def test_a_follower_that_is_behind_gets_batches_from_the_ring(autojump_clock):
    async with replica_set() as nodes:
        fill(nodes, "ab", 10)
        fill(nodes, "c", 4)
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        nodes.follow("c", "a", 2)
        await caught_up(nodes, led, "b", "c")
        assert nodes["c"].current.swaps == nodes["b"].current.swaps == 0
        # c has the batches too, to serve them when it leads
        assert nodes["c"].ring.base == (0, 0)
        assert nodes["c"].ring.last == (2, 11)


async def test_a_follower_that_leads_serves_what_it_followed(autojump_clock):
    async with replica_set() as nodes:
        led = nodes.lead("a", 1)
        nodes.follow("b", "a", 1)
        await led.begin()
        for number in range(20):
            await led.commit([put(number)])
        await nodes.stop("b")
        again = nodes.lead("b", 2)
        nodes.follow("a", "b", 2)
        await again.begin()
        await caught_up(nodes, again, "a")
        assert nodes["a"].current.swaps == 0
        assert again.node.position == (2, 22)


# ---- lease, silence, slowness


async def test_the_lease_follows_the_answers(autojump_clock):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        await trio.sleep(0.5)
        assert not led.leader.lease_valid
        nodes.follow("b", "a", 2)
        await led.begin()
        assert led.leader.lease_valid
        await trio.sleep(10)
        assert led.leader.lease_valid
        stopped = trio.current_time()
        await nodes.stop("b")
        await until(lambda: not led.leader.lease_valid)
        assert 1.7 < trio.current_time() - stopped < 2.1
        nodes.follow("c", "a", 2)  # too late: a lease that was found over stays over
        await until(lambda: led.lost is not None)
        assert not led.leader.lease_valid
        with pytest.raises(Exception, match="no quorum"):
            await led.commit([put(1)])


@pytest.mark.parametrize("way", ["to the follower", "to the leader", "both"])
async def test_a_cut_in_either_direction_is_seen_by_both(autojump_clock, way):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        [(mine, other)] = nodes.network.wires
        if way != "to the leader":
            other.out.cut = True
        if way != "to the follower":
            mine.out.cut = True
        started = trio.current_time()
        await until(lambda: bool(nodes["b"].ended))
        assert trio.current_time() - started < (2.5 if way == "to the leader" else 1.3)
        await led.commit([put(1)])  # over a new connection
        assert led.lost is None


async def test_a_heartbeat_is_answered_while_the_disk_is_busy(autojump_clock):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        nodes["b"].gate = trio.Event()
        done = trio.Event()

        async def commit() -> None:
            await led.commit([put(1)])
            done.set()

        nodes.nursery.start_soon(commit)
        await trio.sleep(20)
        assert not done.is_set()
        assert led.leader.lease_valid
        assert led.leader.statistics().cut == 0
        nodes["b"].gate.set()
        await done.wait()


async def test_a_slow_follower_is_cut_and_catches_up_again(autojump_clock):
    async with replica_set(sync="quorum_disk", ring_bytes_max=200_000) as nodes:
        nodes.network.room = 10_000
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        nodes.follow("c", "a", 2)
        await led.begin()
        await led.leader.wait_followers(2)
        nodes.network.delay = 0.001
        for mine, other in nodes.network.wires:
            if nodes["c"].current._following._frames._stream is mine:
                other.out.delay = lambda: 0.5
        for number in range(300):
            await led.commit([put(number, "x" * 2000)])
            assert led.leader.ring.bytes < 210_000
            assert all(one.unsent_bytes < 210_000 for one in led.leader.statistics().followers)
        assert led.leader.statistics().cut >= 1
        await caught_up(nodes, led, "b", "c")


# ---- ends


async def test_a_leader_that_is_over_says_so_to_a_commit_that_waits(autojump_clock):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        with pytest.raises(Exception, match="no quorum has answered"):
            await led.begin()
        await until(lambda: led.lost is not None)
        assert led.node.position == (0, 0)


async def test_a_store_that_fails_ends_the_leadership(autojump_clock):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        nodes["a"].copies.backend.full = True
        with pytest.raises(StoreError):
            await led.commit([put(1)])
        await until(lambda: led.lost is not None)
        # what the ring has and the store has not is not of this replica's past
        nodes["a"].ring.align(P(*nodes["a"].store.position))
        assert nodes["a"].ring.last == (2, 1)


async def test_a_follower_s_store_that_fails_is_said(autojump_clock):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        nodes.follow("c", "a", 2)
        await led.begin()
        await led.leader.wait_followers(2)
        nodes["b"].copies.backend.full = True
        await led.commit([put(1)])
        await until(lambda: any("StoreError" in text for text in nodes["b"].ended))


async def test_batches_only_follow_each_other(autojump_clock):
    async with replica_set(replicas=1) as nodes:
        nodes.roster = {"a": nodes["a"].incarnation}
        led = nodes.lead("a", 2)
        await led.begin()
        assert led.leader.lease_valid
        for position in ((2, 3), (2, 1), (3, 2)):
            with pytest.raises(ValueError, match="can't follow"):
                await led.leader.commit(Batch([put(1)], position))
        await led.commit([put(1)])


async def test_waiting_for_followers_and_for_one_that_has_everything(autojump_clock):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        with trio.move_on_after(1):
            await led.leader.wait_followers(1)
            raise AssertionError
        nodes.follow("b", "a", 2)
        await led.leader.wait_followers(1)
        await led.begin()
        assert await led.leader.wait_caught_up() == "b"
        nodes.follow("c", "a", 2)
        await led.leader.wait_followers(2)
