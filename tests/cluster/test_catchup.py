"""Catching up by difference, on virtual time: whatever the follower had, under load, and crashed at every step."""

from __future__ import annotations

import pytest
import trio

from pybroker.cluster.catchup import DifferenceSender
from pybroker.cluster.registry import Position
from tests.cluster.replicas import caught_up, content, delete, fill, put, replica_set, until

P = Position


@pytest.fixture
def small_windows(monkeypatch):
    """Catching up goes over a small store in many windows of several chunks."""
    monkeypatch.setattr("pybroker.cluster.catchup.WINDOW_BYTES", 600)
    defaults = {"stop": b"\xff", "chunk_bytes": 300, "chunk_count": 8}
    monkeypatch.setattr("pybroker.store.chunks.digests.__kwdefaults__", defaults)


@pytest.mark.parametrize("why", ["old", "divergent", "divergent and longer", "empty", "stand-alone", "longer"])
async def test_catching_up_by_difference(autojump_clock, why):
    async with replica_set() as nodes:
        fill(nodes, "ab", 300)
        if why == "old":
            fill(nodes, "c", 20)
            nodes["a"].ring.clear()
        elif why == "divergent":
            fill(nodes, "c", 290)
            fill(nodes, "c", 3, epoch=2, start=291, text="never confirmed")
        elif why == "divergent and longer":
            fill(nodes, "c", 299)
            fill(nodes, "c", 3, epoch=2, start=300, text="never confirmed")
        elif why == "longer":
            fill(nodes, "c", 305)
        elif why == "stand-alone":
            nodes["c"].store.apply([put(7, "of its own"), put(8)], (0, 5), True)
        led = nodes.lead("a", 3)
        nodes.follow("b", "a", 3)
        await led.begin()
        nodes.follow("c", "a", 3)
        await caught_up(nodes, led, "b", "c")
        assert nodes["b"].current.swaps == 0
        assert nodes["c"].current.swaps == 1
        await led.commit([put(1, "new")])
        await caught_up(nodes, led, "b", "c")


@pytest.mark.parametrize("seed", range(6))
async def test_catching_up_by_difference_under_load(autojump_clock, seed, small_windows):
    """Every window is read at another position, and batches change keys on both sides of the walk."""
    async with replica_set(seed=seed) as nodes:
        fill(nodes, "ab", 400)
        nodes["a"].ring.clear()
        fill(nodes, "c", 50, text="other")
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        nodes.follow("c", "a", 2)
        rng = nodes.network.rng
        during = 0
        while not (nodes["c"].current and nodes["c"].current.swaps):
            lsn = led.leader.position.lsn
            await led.commit([put(rng.randrange(500), f"at {lsn}"), delete(rng.randrange(500)), put(1000 + lsn)])
            during += 1
            assert during < 2_000
        assert during > 20
        await caught_up(nodes, led, "b", "c")
        assert nodes["c"].current.swaps == 1
        [statistics] = [one for one in led.leader.statistics().followers if one.name == "c"]
        assert statistics.chunks_compared > 40


async def test_a_walk_begins_again_when_the_ring_did_not_hold_what_came_meanwhile(
    autojump_clock, monkeypatch, small_windows
):
    walks = []
    walk = DifferenceSender._walk

    async def counted(self):
        walks.append(1)
        return await walk(self)

    monkeypatch.setattr(DifferenceSender, "_walk", counted)
    async with replica_set(ring_bytes_max=2_000) as nodes:
        fill(nodes, "ab", 400)
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        nodes["c"].disk = 0.02
        nodes.follow("c", "a", 2)
        for number in range(120):
            await led.commit([put(number, "x" * 200)])
        assert len(walks) > 1
        await caught_up(nodes, led, "b", "c")


async def test_only_the_difference_moves(autojump_clock):
    async with replica_set() as nodes:
        fill(nodes, "ab", 3000, text="x" * 250)
        nodes["a"].ring.clear()
        fill(nodes, "c", 2950, text="x" * 250)
        nodes["c"].write([put(100, "bad")], (1, 2951))
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        nodes.follow("c", "a", 2)
        await caught_up(nodes, led, "b", "c")
        [statistics] = [one for one in led.leader.statistics().followers if one.name == "c"]
        assert 0 < statistics.moved_bytes < 0.05 * 3000 * 300


async def test_nothing_is_answered_before_the_swap(autojump_clock):
    async with replica_set() as nodes:
        fill(nodes, "a", 300)
        nodes["a"].ring.clear()
        led = nodes.lead("a", 2)
        done = trio.Event()

        async def begin() -> None:
            await led.begin()
            done.set()

        nodes.nursery.start_soon(begin)
        node = nodes["c"]
        swap = node.copies.swap
        reached = []

        def watched(side):
            reached.append((led.leader.statistics().reach, done.is_set()))
            return swap(side)

        node.copies.swap = watched
        nodes.follow("c", "a", 2)
        await done.wait()
        assert reached == [(0, False)]
        assert led.leader.statistics().reach == 301


async def crash_in_step(step: int, after: bool) -> bool | None:
    """Catch up and crash in the disk's call number `step`; whether the old copy was there then. None: it takes fewer steps."""
    async with replica_set() as nodes:
        fill(nodes, "ab", 100)
        nodes["a"].ring.clear()
        fill(nodes, "c", 10, text="other")
        node = nodes["c"]
        old = content(node.store)
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        expected = content(led.node.store)
        node.crash_at, node.crash_after = node.calls + step, after
        nodes.follow("c", "a", 2)
        await until(lambda: "Crash" in "".join(node.ended) or (node.current and node.current.position == (2, 101)))
        if not node.dead:
            return None
        node.restart()
        found = content(node.store)
        assert found in (old, expected), step
        nodes.follow("c", "a", 2)
        await caught_up(nodes, led, "b", "c")
        return found == old


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_a_crash_at_any_step_of_catching_up_leaves_a_whole_copy(autojump_clock, after, small_windows):
    outcomes = []
    while (outcome := await crash_in_step(len(outcomes) + 1, after)) is not None:
        outcomes.append(outcome)
    assert len(outcomes) > 10
    assert set(outcomes) == ({True, False} if after else {True})  # the new copy is current only after the swap


async def test_a_broken_link_in_the_middle_of_catching_up_leaves_the_old_copy(autojump_clock, small_windows):
    async with replica_set() as nodes:
        fill(nodes, "a", 200)
        nodes["a"].ring.clear()
        fill(nodes, "c", 10, text="other")
        old = content(nodes["c"].store)
        nodes.lead("a", 2)
        node = nodes["c"]
        number = 0
        while True:
            number += 1
            with trio.move_on_after(number * 0.004):
                await node.follow_once(nodes.network, "a", 2)
            if node.current.swaps:
                break
            assert node.position == (1, 10)
            assert content(node.store) == old
        assert number > 5
        assert content(node.store) == content(nodes["a"].store)
