"""The faults of ZooKeeper in memory, each on its own and on virtual time: what the simulator of a replica set relies on."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import trio
from trio.abc import Clock

from pybroker.cluster.coordinator import CoordinatorLost, CreateNode, DeleteNode, Outcome, SetNode, Write
from pybroker.cluster.memory import Fate, MemoryCoordinator, MemoryZooKeeper

SESSION = 10.0


@pytest.fixture
async def service(nursery: trio.Nursery) -> MemoryZooKeeper:
    service = MemoryZooKeeper(session_timeout=SESSION, delay=lambda: 0.002)
    await nursery.start(service.run)
    return service


async def connected(service: MemoryZooKeeper, name: str = "a") -> MemoryCoordinator:
    client = service.connect(name)
    await back(client)
    return client


async def back(client: MemoryCoordinator) -> None:
    seen = -1
    while not client.connected:
        seen = await client.wait_change(seen)


def once(fate: Fate, fallback: Fate | None = None):
    """A `fate` for the next transaction only."""
    fates = [fate]

    def choose(_name: str, writes: Sequence[Write]) -> Fate | None:
        return fates.pop() if writes and fates else fallback

    return choose


async def test_requests_and_connections_take_their_time(service: MemoryZooKeeper, autojump_clock: Clock):
    start = trio.current_time()
    client = await connected(service)
    assert trio.current_time() - start == pytest.approx(0.002)
    await client.transact([CreateNode("epoch", b"0")])
    await client.read()
    assert trio.current_time() - start == pytest.approx(0.010)


async def test_a_watch_is_told_once_until_the_next_read(service: MemoryZooKeeper, autojump_clock: Clock):
    client, other = await connected(service), await connected(service, "b")
    await other.transact([CreateNode("epoch", b"0")])
    seen = client.changes
    with trio.move_on_after(1) as scope:  # nothing was read: nothing is watched
        await client.wait_change(seen)
    assert scope.cancelled_caught
    await client.read()
    for version in range(3):
        await other.transact([SetNode("epoch", b"", version)])
    await trio.sleep(1)
    assert await client.wait_change(seen) == seen + 1


async def test_a_write_arrives_after_its_caller_was_cancelled(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    service.fate = once(Fate(arrives=60.0))
    with trio.move_on_after(0.5):
        await client.transact([CreateNode("epoch", b"late")])
    assert await client.read() == {}
    await trio.sleep(59)
    assert await client.read() == {}
    await trio.sleep(1)
    assert (await client.read())["epoch"].data == b"late"


async def test_a_write_arrives_after_its_outcome_was_unknown(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    session = client.session
    service.fate = once(Fate(arrives=60.0))
    seen = client.changes
    start = trio.current_time()
    assert await client.transact([CreateNode("epoch", b"late")]) is Outcome.UNKNOWN
    assert trio.current_time() - start == pytest.approx(service.request_timeout)
    assert await client.wait_change(seen) > seen  # the silent connection was given up
    await back(client)
    assert client.session == session
    assert await client.transact([CreateNode("epoch", b"new")]) is Outcome.DONE
    await trio.sleep(60)
    assert (await client.read())["epoch"] == (b"new", 0, 0)  # it came too late: the version was another one


@pytest.mark.parametrize(("fate", "is_applied"), [(Fate(0.0, None), True), (Fate(None, None), False)])
async def test_an_unknown_outcome_may_be_either(
    service: MemoryZooKeeper, autojump_clock: Clock, fate: Fate, is_applied: bool
):
    client = await connected(service)
    service.fate = once(fate)
    assert await client.transact([CreateNode("epoch", b"0")]) is Outcome.UNKNOWN
    await back(client)
    assert ("epoch" in await client.read()) is is_applied


@pytest.mark.parametrize("fences", [True, False])
async def test_what_arrives_from_a_session_that_ended(service: MemoryZooKeeper, autojump_clock: Clock, fences: bool):
    service.fences_sessions = fences
    client, other = await connected(service), await connected(service, "b")
    service.fate = lambda name, writes: Fate(60.0, 0.0) if writes else None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.transact, [CreateNode("leader", b"", ephemeral=True)])
        nursery.start_soon(client.transact, [CreateNode("epoch", b"")])
        await trio.sleep(1)
        session = client.session
        service.kill(client)
    assert session in service.sessions
    await trio.sleep(SESSION + 1)
    assert session not in service.sessions
    await trio.sleep(60)
    assert set(await other.read()) == (set() if fences else {"epoch"})


async def test_a_client_that_is_cut_off_loses_its_session_in_its_time(service: MemoryZooKeeper, autojump_clock: Clock):
    client, other = await connected(service), await connected(service, "b")
    await client.transact([CreateNode("leader", b"", ephemeral=True)])
    session = client.session
    service.cut(client)
    assert not client.connected
    with pytest.raises(CoordinatorLost):
        await client.read()
    await trio.sleep(SESSION - 0.1)
    assert "leader" in await other.read()
    await trio.sleep(0.2)
    assert await other.read() == {}
    assert client.session == session  # nobody has told it
    service.heal(client)
    await back(client)
    assert client.session not in (0, session)


async def test_a_short_cut_leaves_the_session(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    await client.transact([CreateNode("leader", b"", ephemeral=True)])
    session = client.session
    for _ in range(5):
        service.cut(client)
        await trio.sleep(SESSION - 0.1)
        service.heal(client)
        await back(client)
    assert client.session == session
    assert "leader" in await client.read()


async def test_a_cut_that_is_not_noticed(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    await client.transact([CreateNode("epoch", b"")])
    start = trio.current_time()
    service.cut(client, noticed=False)
    assert client.connected
    with pytest.raises(CoordinatorLost):  # no sync can be had: rather nothing than something old
        await client.read()
    assert trio.current_time() - start == pytest.approx(SESSION * 2 / 3)
    assert not client.connected
    service.heal(client)
    await back(client)
    assert "epoch" in await client.read()


async def test_a_client_that_never_noticed_goes_on_when_healed(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    session, seen = client.session, client.changes
    service.cut(client, noticed=False)
    await trio.sleep(1)
    service.heal(client)
    await trio.sleep(10 * SESSION)
    assert client.session == session
    assert client.connected
    assert client.changes == seen


async def test_a_client_that_never_noticed_wakes_up_without_its_session(
    service: MemoryZooKeeper, autojump_clock: Clock
):
    client = await connected(service)
    session = client.session
    service.cut(client, noticed=False)
    service.expire(client)
    assert client.connected
    assert client.session == session
    service.heal(client)
    assert not client.connected
    assert client.session == 0
    await back(client)
    assert client.session != session


async def test_a_one_way_cut_lets_requests_through(service: MemoryZooKeeper, autojump_clock: Clock):
    client, other = await connected(service), await connected(service, "b")
    service.cut(client, requests=False, noticed=False)
    assert await client.transact([CreateNode("leader", b"", ephemeral=True)]) is Outcome.UNKNOWN
    assert "leader" in await other.read()
    await trio.sleep(SESSION + 0.1)  # its session's time begins when it gives the connection up
    assert await other.read() == {}


async def test_the_whole_service_away_for_an_hour_ends_no_session(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    await client.transact([CreateNode("leader", b"", ephemeral=True)])
    session = client.session
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            assert await client.transact([CreateNode("epoch", b"")]) is Outcome.UNKNOWN

        nursery.start_soon(write)
        await trio.sleep(0.001)
        service.down()
    await trio.sleep(3600)
    service.up()
    await back(client)
    assert client.session == session
    assert set(await client.read()) == {"leader"}
    await trio.sleep(2 * SESSION)
    assert set(await client.read()) == {"leader"}


async def test_a_client_that_dies_while_the_service_is_away(service: MemoryZooKeeper, autojump_clock: Clock):
    client, other = await connected(service), await connected(service, "b")
    await client.transact([CreateNode("leader", b"", ephemeral=True)])
    service.down()
    service.kill(client)
    await trio.sleep(3600)
    service.up()
    await back(other)
    assert "leader" in await other.read()
    await trio.sleep(SESSION)
    assert await other.read() == {}


async def test_wiped_data_end_all_sessions(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    await client.transact([CreateNode("leader", b"", ephemeral=True), CreateNode("epoch", b"")])
    session, seen = client.session, client.changes
    service.wipe()
    assert await client.wait_change(seen) > seen
    await back(client)
    assert client.session != session
    assert await client.read() == {}


async def test_an_old_copy_comes_back(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    await client.transact([CreateNode("epoch", b"0"), CreateNode("alive/a", b"", ephemeral=True)])
    copy = service.snapshot()
    late = await connected(service, "b")
    await late.transact([SetNode("epoch", b"1", 0), CreateNode("slots/b", b""), DeleteNode("alive/a", 0)])
    sessions = client.session, late.session
    service.rewind(copy)
    await back(client)
    await back(late)
    assert set(await client.read()) == {"epoch", "alive/a"}
    assert client.session == sessions[0]  # the copy knows this one
    assert late.session > sessions[1]
    assert await late.transact([SetNode("epoch", b"other", 0)]) is Outcome.DONE


async def test_a_read_sees_each_node_at_a_moment_of_its_own(service: MemoryZooKeeper, autojump_clock: Clock):
    client, other = await connected(service), await connected(service, "b")
    await client.transact([CreateNode(path, b"0") for path in ("config", "epoch", "slots/a")])
    service.spread = lambda: 1.0
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            await trio.sleep(0.5)
            writes = [SetNode(path, b"1", 0) for path in ("config", "slots/a")]
            assert await other.transact(writes) is Outcome.DONE

        nursery.start_soon(write)
        seen = client.changes
        nodes = await client.read()
    assert [nodes[path].data for path in sorted(nodes)] == [b"0", b"0", b"1"]
    assert await client.wait_change(seen) > seen  # and it is told that some of it has changed


async def test_old_views_come_only_without_sync(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    service.age = lambda: 5.0
    await client.transact([CreateNode("epoch", b"0")])
    await trio.sleep(10)
    await client.transact([SetNode("epoch", b"1", 0)])
    assert (await client.read())["epoch"].data == b"1"
    client.syncs = False
    assert (await client.read())["epoch"].data == b"0"
    await trio.sleep(5)
    assert (await client.read())["epoch"].data == b"1"


async def test_an_expired_session_ends_what_was_asked(service: MemoryZooKeeper, autojump_clock: Clock):
    client = await connected(service)
    service.fate = once(Fate(1.0, 1.0))
    async with trio.open_nursery() as nursery:

        async def write() -> None:
            assert await client.transact([CreateNode("epoch", b"")]) is Outcome.UNKNOWN

        nursery.start_soon(write)
        await trio.sleep(0.5)
        service.expire(client)
        assert client.session == 0
    await back(client)
    await trio.sleep(2)
    assert await client.read() == {}  # it came from a session that had ended


@pytest.mark.parametrize("seed", range(5))
async def test_versions_and_confirmations_agree_under_all_faults(
    service: MemoryZooKeeper, autojump_clock: Clock, seed: int
):
    first = await faulty_run(service, seed)
    assert first.count("done") > 20


def test_a_seed_gives_the_same_run_again():
    def run(seed: int) -> list[str]:
        async def main() -> list[str]:
            service = MemoryZooKeeper(session_timeout=SESSION)
            async with trio.open_nursery() as nursery:
                await nursery.start(service.run)
                trace = await faulty_run(service, seed)
                nursery.cancel_scope.cancel()
            return trace

        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))

    assert run(7) == run(7)
    assert run(7) != run(8)


async def faulty_run(service: MemoryZooKeeper, seed: int) -> list[str]:
    """One writer under random faults. Every confirmed write counts once, an unknown one at most once."""
    choose = random.Random(seed)
    service.delay = lambda: choose.uniform(0.001, 0.003)
    trace: list[str] = []

    def fate(_name: str, _writes: Sequence[Write]) -> Fate | None:
        kind = choose.random()
        if kind < 0.1:
            return Fate(choose.uniform(0, 30), 0.0)
        if kind < 0.2:
            return Fate(choose.choice([0.001, None]), None)
        return None

    client = await connected(service)
    await client.transact([CreateNode("epoch", b"0")])
    service.fate = fate
    done = unknown = 0
    for _ in range(100):
        match choose.randrange(12):
            case 0:
                service.cut(client, noticed=choose.random() < 0.5)
                await trio.sleep(choose.uniform(0, 20))
                service.heal(client)
            case 1:
                service.expire(client)
            case 2:
                service.down()
                await trio.sleep(choose.uniform(0, 20))
                service.up()
        await back(client)
        try:
            version = (await client.read())["epoch"].version
            outcome = await client.transact([SetNode("epoch", b"", version)])
        except CoordinatorLost:
            trace.append(f"{trio.current_time():.6f} lost")
            continue
        trace += [outcome.value, f"{trio.current_time():.6f}"]
        done += outcome is Outcome.DONE
        unknown += outcome is Outcome.UNKNOWN
    await trio.sleep(100)
    assert done <= service.nodes["epoch"].version <= done + unknown
    return trace
