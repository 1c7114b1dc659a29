"""What every `Coordinator` must do, asked of both: ZooKeeper in memory and a real server.

DESIGN.md section 5. What only one of them can show is in test_memory_coordinator.py and test_zookeeper_coordinator.py.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Protocol

import pytest
import trio
from kazoo.client import KazooClient

from pybroker.cluster.coordinator import (
    CheckNode,
    Coordinator,
    CoordinatorLost,
    CreateNode,
    DeleteNode,
    Outcome,
    SetNode,
)
from pybroker.cluster.memory import MemoryCoordinator, MemoryZooKeeper
from pybroker.cluster.zookeeper import ZooKeeperCoordinator
from tests.support.zookeeper import Ensemble, ensemble

PATIENCE = 60.0  # seconds for anything that must happen
SESSION_TIMEOUT = 30.0  # longer than a slow machine takes to start a server again and to be found by its client
SETS = itertools.count()  # a set of its own for each test


class World(Protocol):
    """A service that clients connect to, and what happens to it."""

    async def connect(self) -> Coordinator: ...
    async def expire(self, client: Coordinator) -> None: ...
    async def down(self) -> None: ...
    async def up(self) -> None: ...


class MemoryWorld:
    def __init__(self, service: MemoryZooKeeper) -> None:
        self.service = service

    async def connect(self) -> Coordinator:
        return self.service.connect("client")

    async def expire(self, client: Coordinator) -> None:
        assert isinstance(client, MemoryCoordinator)
        self.service.expire(client)

    async def down(self) -> None:
        self.service.down()

    async def up(self) -> None:
        self.service.up()


class ZooKeeperWorld:
    def __init__(self, servers: Ensemble, name: str, stack: AsyncExitStack) -> None:
        self.servers = servers
        self.name = name
        self.stack = stack

    async def connect(self) -> Coordinator:
        client = ZooKeeperCoordinator(self.servers.addresses, self.name, session_timeout=SESSION_TIMEOUT)
        return await self.stack.enter_async_context(client)

    async def expire(self, client: Coordinator) -> None:
        """Whoever knows a session's password can end it: ZooKeeper's own way of testing this."""
        assert isinstance(client, ZooKeeperCoordinator)
        assert client._client is not None
        thief = KazooClient(self.servers.addresses, client_id=client._client.client_id)

        def steal() -> None:
            thief.start()
            thief.stop()
            thief.close()

        await trio.to_thread.run_sync(steal)

    async def down(self) -> None:
        await trio.to_thread.run_sync(self.servers.kill)

    async def up(self) -> None:
        await trio.to_thread.run_sync(self.servers.start)


@pytest.fixture(scope="module")
def server() -> Iterator[Ensemble]:
    with ensemble(1) as servers:
        yield servers


@pytest.fixture(params=["memory", "zookeeper"])
def servers(request: pytest.FixtureRequest) -> Ensemble | None:
    return None if request.param == "memory" else request.getfixturevalue("server")


@pytest.fixture
async def world(servers: Ensemble | None, nursery: trio.Nursery) -> AsyncIterator[World]:
    if servers is None:
        service = MemoryZooKeeper(session_timeout=SESSION_TIMEOUT)
        await nursery.start(service.run)
        yield MemoryWorld(service)
        return
    async with AsyncExitStack() as stack:
        yield ZooKeeperWorld(servers, f"set-{next(SETS)}", stack)


async def connected(client: Coordinator) -> Coordinator:
    seen = -1
    with trio.fail_after(PATIENCE):
        while not client.connected:
            seen = await client.wait_change(seen)
    return client


async def two(world: World) -> tuple[Coordinator, Coordinator]:
    return await connected(await world.connect()), await connected(await world.connect())


async def versions(client: Coordinator) -> dict[str, int]:
    return {path: node.version for path, node in (await client.read()).items()}


async def test_an_empty_set_has_no_nodes(world: World):
    client = await connected(await world.connect())
    assert await client.read() == {}
    assert client.session


async def test_versions_count_the_writes_and_never_repeat(world: World):
    client = await connected(await world.connect())
    assert await client.transact([CreateNode("epoch", b"0")]) is Outcome.DONE
    for version in range(5):
        assert (await client.read())["epoch"] == (b"%d" % version, version, 0)
        assert await client.transact([SetNode("epoch", b"%d" % (version + 1), version)]) is Outcome.DONE
        for old in range(version + 1):
            assert await client.transact([SetNode("epoch", b"old", old)]) is Outcome.REFUSED
        assert await client.transact([SetNode("epoch", b"new", version + 2)]) is Outcome.REFUSED
    assert (await client.read())["epoch"] == (b"5", 5, 0)


async def test_the_same_value_written_again_is_another_version(world: World):
    client = await connected(await world.connect())
    assert await client.transact([CreateNode("roster", b"same")]) is Outcome.DONE
    assert await client.transact([SetNode("roster", b"same", 0)]) is Outcome.DONE
    assert await versions(client) == {"roster": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        SetNode("epoch", b"x", 7),
        SetNode("roster", b"x", 0),
        CheckNode("epoch", 1),
        CheckNode("leader", 0),
        CreateNode("epoch", b"x"),
        CreateNode("slots/a", b"x", ephemeral=True),
        DeleteNode("epoch", 2),
        DeleteNode("alive/a", 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", [0, 1, 3])
async def test_a_transaction_is_done_whole_or_not_at_all(world: World, wrong, place: int):
    client = await connected(await world.connect())
    await client.transact([CreateNode("epoch", b"1"), CreateNode("slots/a", b"a"), CreateNode("slots/b", b"b")])
    before = await client.read()
    right = [SetNode("slots/a", b"A", 0), DeleteNode("slots/b", 0), CreateNode("config", b"c", ephemeral=True)]
    assert await client.transact([*right[:place], wrong, *right[place:]]) is Outcome.REFUSED
    assert await client.read() == before
    assert await client.transact(right) is Outcome.DONE
    assert await versions(client) == {"epoch": 0, "slots/a": 1, "config": 0}


async def test_checks_alone_write_nothing(world: World):
    client = await connected(await world.connect())
    await client.transact([CreateNode("epoch", b"1"), CreateNode("roster", b"r")])
    assert await client.transact([CheckNode("epoch", 0), CheckNode("roster", 0)]) is Outcome.DONE
    assert await client.transact([CheckNode("epoch", 0), CheckNode("roster", 1)]) is Outcome.REFUSED
    assert await versions(client) == {"epoch": 0, "roster": 0}


async def test_several_writes_to_one_node_in_one_transaction(world: World):
    client = await connected(await world.connect())
    assert await client.transact([CreateNode("epoch", b"0"), SetNode("epoch", b"1", 0), CheckNode("epoch", 1)])
    writes = [DeleteNode("epoch", 1), CreateNode("epoch", b"again")]
    assert await client.transact(writes) is Outcome.DONE
    assert (await client.read())["epoch"] == (b"again", 0, 0)


async def test_nonsense_is_not_submitted(world: World):
    client = await connected(await world.connect())
    with pytest.raises(ValueError, match="needs a write"):
        await client.transact([])
    with pytest.raises(ValueError, match="version"):
        await client.transact([SetNode("epoch", b"", -1)])


async def test_an_ephemeral_node_belongs_to_its_session(world: World):
    client, other = await two(world)
    assert client.session != other.session
    assert await client.transact([CreateNode("leader", b"me", ephemeral=True)]) is Outcome.DONE
    for reader in (client, other):
        assert (await reader.read())["leader"] == (b"me", 0, client.session)
    assert await other.transact([CreateNode("leader", b"I", ephemeral=True)]) is Outcome.REFUSED
    replace = [DeleteNode("leader", 0), CreateNode("leader", b"I", ephemeral=True)]
    assert await other.transact(replace) is Outcome.DONE
    assert (await client.read())["leader"] == (b"I", 0, other.session)


async def test_ephemeral_nodes_go_with_an_expired_session_and_a_new_one_begins(world: World):
    client, other = await two(world)
    await client.transact([CreateNode("leader", b"me", ephemeral=True), CreateNode("epoch", b"1")])
    before = client.session
    seen = client.changes
    await other.read()
    seen_by_other = other.changes
    await world.expire(client)
    with trio.fail_after(PATIENCE):
        while client.session in (0, before):
            seen = await client.wait_change(seen)
        await connected(client)
        while "leader" in await other.read():
            seen_by_other = await other.wait_change(seen_by_other)
    assert await versions(client) == {"epoch": 0}
    assert await client.transact([CreateNode("leader", b"again", ephemeral=True)]) is Outcome.DONE
    assert (await other.read())["leader"].owner == client.session


async def test_ephemeral_nodes_go_at_once_when_their_client_closes(world: World):
    client, other = await two(world)
    await client.transact([CreateNode("alive/a", b"", ephemeral=True), CreateNode("slots/a", b"")])
    with trio.fail_after(SESSION_TIMEOUT / 2):
        await client.aclose()
        assert await versions(other) == {"slots/a": 0}
    assert not client.connected
    assert client.session == 0
    with pytest.raises(CoordinatorLost):
        await client.read()
    with pytest.raises(CoordinatorLost):
        await client.transact([CreateNode("slots/b", b"")])
    await client.aclose()


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_closing_works_when_cancelled(world: World, is_cancelled: bool):
    client, other = await two(world)
    assert await client.transact([CreateNode("leader", b"me", ephemeral=True)]) is Outcome.DONE
    with trio.CancelScope() as scope:
        if is_cancelled:
            scope.cancel()
        await client.aclose()
    with trio.fail_after(SESSION_TIMEOUT / 2):
        seen = -1
        while await other.read():
            seen = await other.wait_change(seen)


async def test_each_sees_what_the_other_writes(world: World):
    client, other = await two(world)
    writes = [
        CreateNode("config", b"c"),
        CreateNode("slots/a", b"0"),
        CreateNode("slots/b", b"0"),
        SetNode("slots/a", b"1", 0),
        CreateNode("leader", b"me", ephemeral=True),
        SetNode("leader", b"still me", 0),
        DeleteNode("leader", 1),
        CreateNode("leader", b"again", ephemeral=True),
        CreateNode("alive/a", b"", ephemeral=True),
        DeleteNode("alive/a", 0),
        SetNode("slots/a", b"2", 1),
    ]
    nodes = await other.read()
    seen = await settled(other)
    for write in writes:
        assert await client.transact([write]) is Outcome.DONE
        expected = await client.read()
        with trio.fail_after(PATIENCE):
            while nodes != expected:
                seen = await other.wait_change(seen)
                nodes = await other.read()


async def settled(client: Coordinator) -> int:
    """The count of changes when none has come for a while."""
    seen = client.changes
    while True:
        with trio.move_on_after(0.2):
            seen = await client.wait_change(seen)
            continue
        return seen


async def test_wait_change_counts_from_nothing(world: World):
    client = await world.connect()
    with trio.fail_after(PATIENCE):
        assert await client.wait_change(0) == client.changes > 0  # connected
        await connected(client)
        await client.read()
    seen = await settled(client)
    assert seen > 0
    with trio.move_on_after(0.2) as scope:
        await client.wait_change(seen)
    assert scope.cancelled_caught
    assert await client.wait_change(seen - 1) == seen


async def test_a_read_is_never_older_than_a_write_that_was_acknowledged(world: World):
    client, other = await two(world)
    await client.transact([CreateNode("epoch", b"0")])
    for version in range(30):
        assert await client.transact([SetNode("epoch", b"%d" % version, version)]) is Outcome.DONE
        assert (await other.read())["epoch"].version > version
        client, other = other, client


async def test_versioned_writes_of_many_lose_none(world: World):
    clients = [*await two(world), *await two(world)]
    await clients[0].transact([CreateNode("epoch", b"0")])

    async def add(client: Coordinator, times: int) -> None:
        while times:
            node = (await client.read())["epoch"]
            write = SetNode("epoch", b"%d" % (int(node.data) + 1), node.version)
            if await client.transact([write]) is Outcome.DONE:
                times -= 1

    with trio.fail_after(PATIENCE):
        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(add, client, 5)
    assert (await clients[0].read())["epoch"] == (b"20", 20, 0)


async def test_cancelling_withdraws_nothing_and_breaks_nothing(world: World):
    client, other = await two(world)
    await client.transact([CreateNode("epoch", b"0")])
    for _ in range(10):
        version = (await client.read())["epoch"].version
        with trio.move_on_after(0):
            await client.transact([SetNode("epoch", b"maybe", version)])
        with trio.move_on_after(0.0005):
            await client.transact([SetNode("epoch", b"maybe", version)])
        with trio.move_on_after(0.0005):
            await client.read()
        found = (await other.read())["epoch"].version
        assert version <= found <= version + 1
        # a further versioned write settles it: after it, neither can be written any more
        while await client.transact([SetNode("epoch", b"settled", found)]) is Outcome.REFUSED:
            found = (await other.read())["epoch"].version
        assert (await other.read())["epoch"] == (b"settled", found + 1, 0)


async def test_while_disconnected_nothing_is_asked_and_the_session_goes_on(world: World):
    client = await connected(await world.connect())
    await client.transact([CreateNode("leader", b"me", ephemeral=True), CreateNode("epoch", b"1")])
    session, seen = client.session, await settled(client)
    await world.down()
    try:
        with trio.fail_after(PATIENCE):
            while client.connected:
                seen = await client.wait_change(seen)
        with pytest.raises(CoordinatorLost):
            await client.read()
        with pytest.raises(CoordinatorLost):
            await client.transact([SetNode("epoch", b"2", 0)])
        assert client.session == session
    finally:
        await world.up()
    with trio.fail_after(PATIENCE):
        while not client.connected:
            seen = await client.wait_change(seen)
    assert await client.read() == {"leader": (b"me", 0, session), "epoch": (b"1", 0, 0)}
    assert client.session == session
    assert await client.transact([SetNode("epoch", b"2", 0)]) is Outcome.DONE
