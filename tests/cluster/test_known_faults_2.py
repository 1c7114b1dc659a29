"""More of the faults that others died of: files, names and limits of the wire, secrets, whole brokers, clocks.

See ``test_known_faults.py``. Where the fault is about files the replicas have real directories with LevelDB.
"""

from __future__ import annotations

import ast
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

import pybroker.cluster
from pybroker.cluster import catchup, follower, link
from pybroker.cluster import frames as f
from pybroker.cluster.registry import Position
from pybroker.cluster.replica import FOLLOWER
from pybroker.errors import ConfigurationError, NotLeader, ProtocolError, SendInDoubt, StoreFormatError
from pybroker.settings import make_config
from pybroker.store import chunks
from pybroker.store import format as fmt
from pybroker.store.compaction import Compactor
from pybroker.store.copies import DiskCopies
from pybroker.store.layout import current_name
from tests.cluster.faults import DiskMember, EmbeddedMember, FaultyCluster, faulty
from tests.cluster.puppets import puppet_leader, said
from tests.cluster.replicas import caught_up, fill, put, replica_set, until
from tests.cluster.test_known_faults import committed, holds_all

Q = "/queue/q"


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catching up by difference takes many steps also where there is little."""
    monkeypatch.setattr(catchup, "WINDOW_BYTES", 900)
    monkeypatch.setattr(chunks.digests, "__kwdefaults__", {"stop": chunks.STOP, "chunk_bytes": 300, "chunk_count": 8})


async def fall_behind(cluster: FaultyCluster) -> tuple[DiskMember, Any, list[int]]:
    """One that is down while its leader's ring forgets: it must catch up by difference. All that was confirmed, too."""
    leader = await cluster.settle()
    numbers = await committed(cluster, leader, 20)
    await until(lambda: all(holds_all(member, numbers) for member in cluster.others()))
    behind = cluster.followers[0]
    assert isinstance(behind, DiskMember)
    await behind.crash()
    numbers += await committed(cluster, leader, 150)
    return behind, leader, numbers


# ---- files


@pytest.mark.usefixtures("small_windows")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_crash_in_the_middle_of_catching_up(autojump_clock: trio.abc.Clock, tmp_path: Path, after: bool) -> None:
    """ActiveMQ's slave downloaded into the directory that it would start from: killed in the middle it had a store of two halves,
    and could be elected with it. Here, whichever step is the last, what starts again is the old whole copy or the new one."""
    async with faulty(disks=tmp_path, ring_bytes_max=4_000) as cluster:
        behind, leader, numbers = await fall_behind(cluster)
        await until(lambda: len(cluster.followers) == 1)
        incarnation = cluster.view.roster[behind.name]
        old = await content_of(behind)
        outcomes = set()
        behind.end_after = after
        for step in range(1, 100):
            behind.end_at = step
            behind.start()
            await until(
                lambda: behind.ended.is_set() or (behind.replica.role == FOLLOWER and holds_all(behind, numbers))
            )
            if not behind.ended.is_set():
                break
            await behind.crash()
            found = await content_of(behind)
            assert found in (old, leader.content), step
            assert behind.copies.identity.incarnation == incarnation
            outcomes.add(found == old)
        assert step > 12
        assert outcomes == ({True, False} if after else {True})
        assert behind.content == leader.content
        assert cluster.view.roster[behind.name] == incarnation


async def content_of(member: DiskMember) -> dict[bytes, bytes]:
    """What a replica that is not running would start with: looked at in a copy of its directory."""
    there = member.directory.with_name("looked-at")
    shutil.copytree(member.directory, there)
    copies = DiskCopies(there, "set", member.name, lambda: "another")
    try:
        store = copies.open()
        member.copies._identity = copies.identity
        return {key: value for key, value in store.backend.iterate(chunks.FIRST, chunks.STOP) if key != fmt.META_KEY}
    finally:
        copies.close()
        shutil.rmtree(there)


@pytest.mark.usefixtures("small_windows")
async def test_re_attach_destroys_the_last_good_copy(autojump_clock: trio.abc.Clock, tmp_path: Path) -> None:
    """ActiveMQ's slave moved its store to a stash at each attach, over the stash that was there: after the second attach in one
    transfer the last whole copy was gone, and when the master died meanwhile, everything. Here the old copy stands until a
    whole new one takes its place, however often the transfer begins again."""
    async with faulty(disks=tmp_path, ring_bytes_max=4_000) as cluster:
        behind, leader, numbers = await fall_behind(cluster)
        old = await content_of(behind)
        behind.start()
        broken = 0
        for turn in range(40):
            await until(lambda: behind.copies._side is not None)
            await trio.sleep(0.002 + 0.003 * turn)
            if behind.copies._side is None:
                break
            broken += 1
            if turn % 5 == 4:
                await behind.crash()
                assert await content_of(behind) == old
                behind.start()
                continue
            cluster.network.cut(leader.name, behind.name)
            cluster.network.heal()
            await until(lambda: behind.copies._side is None)
            assert behind.content == old
            assert len([path for path in behind.directory.iterdir() if path.is_dir()]) == 1
        assert broken >= 5
        cluster.network.isolate(leader.name)  # the master dies for good while it catches up again
        await leader.crash()
        new = await cluster.wait_leader()
        await until(lambda: behind.replica.role == FOLLOWER or new is behind)
        await until(lambda: all(holds_all(member, numbers) for member in cluster.others(leader)))


async def test_a_copy_restored_from_backup_votes(autojump_clock: trio.abc.Clock, tmp_path: Path) -> None:
    """A directory put back from a backup has the right name and an honest, old position: with one other that is behind it
    elects a master without what was confirmed since. Here the start counter in its slot tells, and it is a learner."""
    async with faulty(disks=tmp_path) as cluster:
        leader = await cluster.settle()
        restored, behind = cluster.followers
        assert isinstance(restored, DiskMember)
        await restored.crash()
        shutil.copytree(restored.directory, tmp_path / "backup")
        restored.start()
        await until(lambda: len(cluster.followers) == 2)
        await behind.crash()
        numbers = await committed(cluster, leader, 10)
        incarnation = cluster.view.roster[restored.name]
        await leader.crash()
        await restored.crash()
        shutil.rmtree(restored.directory)
        shutil.copytree(tmp_path / "backup", restored.directory)
        restored.start()
        behind.start()
        await trio.sleep(60)
        assert cluster.leaders == []
        assert restored.copies.identity.incarnation != incarnation
        leader.start()
        assert await cluster.wait_leader() is leader
        await cluster.settle()
        await until(lambda: all(holds_all(member, numbers) for member in cluster.others()))
        assert cluster.view.roster[restored.name] == restored.copies.identity.incarnation


def bytes_of(directory: Path) -> int:
    size = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # a table that a compaction has just removed
            size += path.stat().st_size
    return size


@pytest.mark.slow
def test_disk_space_not_given_back_after_consumption(tmp_path: Path) -> None:
    """ActiveMQ's log files stayed as long as anything in them was referred to, and its slaves kept files that the master had
    deleted: a store that was nearly empty filled the disk. Here the files shrink to what is stored, and some more."""
    copies = DiskCopies(tmp_path / "data", "set", "a", lambda: "copy")
    store = copies.open()
    compactor = Compactor()
    body = "x" * 4_000
    lsn = 0

    def apply(changes: list[Any]) -> None:
        nonlocal lsn
        lsn += 1
        store.apply(changes, (1, lsn), False)

    try:
        for start in range(0, 30_000, 500):
            apply([put(number, body) for number in range(start, start + 500)])
        most = bytes_of(tmp_path)
        assert most > 100_000_000
        for start in range(0, 30_000, 500):
            apply([(put(number)[0], None) for number in range(start, start + 500)])
        compactor.look(store)
        assert bytes_of(tmp_path) < 0.1 * most
        assert compactor.compactions == 1
        compactor.look(store)
        assert compactor.compactions == 1
    finally:
        copies.close()


async def test_disk_space_not_given_back_after_catching_up(autojump_clock: trio.abc.Clock, tmp_path: Path) -> None:
    """The same for the copies: after each swap there is one."""
    async with faulty(disks=tmp_path, ring_bytes_max=4_000) as cluster:
        await catch_up_and_look(cluster)
        await catch_up_and_look(cluster)


async def catch_up_and_look(cluster: FaultyCluster) -> None:
    behind, leader, numbers = await fall_behind(cluster)
    before = current_name(behind.directory)
    behind.start()
    await until(lambda: current_name(behind.directory) != before)  # before that the side copy may hold all of it
    await until(lambda: behind.replica.role == FOLLOWER and holds_all(behind, numbers))
    assert cluster.leaders == [leader]
    assert [path.name for path in behind.directory.iterdir() if path.is_dir()] == [current_name(behind.directory)]
    assert current_name(behind.directory) != "store"


# ---- the wire

PATHS = ["../../../x", "/etc/x", "..", ".", "a/b", "a\\b", "a\0b", "~", "", "x" * 65, "a\nb"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", ["name", "incarnation", "set_name"])
async def test_path_names_taken_from_the_wire(autojump_clock: trio.abc.Clock, field: str, path: str) -> None:
    """ActiveMQ's master opened whatever file a slave named ("GET ../../etc/passwd"), and its slaves wrote files of the names that
    the master sent. Here frames carry no file names, and a name that is not letters and digits is refused when it is read."""
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        refusal = await said(nodes, "a", **{field: path})
        assert isinstance(refusal, f.Refusal)
        assert refusal.code == "protocol"
        assert led.leader.statistics().followers == ()
        assert led.registered == []


@pytest.mark.parametrize("key", [b"../../../x", b"/x", b"\x20../../x", b"store/CURRENT", b"current"])
@pytest.mark.parametrize("how", [f.BATCHES, f.DIFFERENCE])
async def test_path_names_taken_from_the_wire_by_a_follower(
    autojump_clock: trio.abc.Clock, tmp_path: Path, how: str, key: bytes
) -> None:
    """The same from a hostile leader: it can fill a store with keys, but names no file."""
    home = tmp_path / "one" / "two" / "data"
    async with replica_set() as nodes:
        node = nodes["b"]
        node.copies = DiskCopies(home, "set", "b", lambda: "copy")  # type: ignore[assignment]
        node.store = node.copies.open()
        puppet = await puppet_leader(nodes, "b", 3, how)
        if how == f.BATCHES:
            await puppet.send(f.BatchFrame(3, Position(3, 1), Position(0, 0), f.encode_changes([(key, b"value")])))
        else:
            walk = f.Digests(3, Position(3, 9), ((b"\0", b"\xff", b"d" * 16, 0),))
            chunk = f.Chunk(3, b"\0", b"\xff", f.encode_entries([(key, b"value")]))
            await puppet.send(f.SnapshotBegin(3, Position(3, 9)), walk, chunk, f.SnapshotEnd(3, Position(3, 9)))
        await trio.sleep(1)
        await trio.aclose_forcefully(puppet.stream)
        await until(lambda: node.last is not None)
        node.copies.close()
    look_for_files_of_others(tmp_path, home, key)


def look_for_files_of_others(top: Path, home: Path, key: bytes) -> None:
    outside = [path for path in top.rglob("*") if path != home and home not in path.parents]
    assert sorted(path.name for path in outside) == ["one", "two"]
    assert {path.name for path in home.iterdir()} <= {"store", "identity", "lock", "current", "copy-1"}
    (home / "current").write_bytes(key)  # nor would a pointer lead out of it
    with pytest.raises(StoreFormatError, match="no copy of the store"):
        DiskCopies(home, "set", "b", lambda: "copy").open()


async def test_protocol_message_limit_reached_with_many_files(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ActiveMQ's answer to a slave named all files in one frame of at most 64 KiB: past some hundred files no slave could attach
    any more, for good. Here a store goes over in windows of so many ranges, and no frame grows with it."""
    monkeypatch.setattr(chunks.digests, "__kwdefaults__", {"stop": chunks.STOP, "chunk_bytes": 300, "chunk_count": 1})
    sizes: dict[str, list[int]] = {}

    def encode(frame: f.Frame) -> bytes:
        data = f.encode(frame)
        sizes.setdefault(type(frame).__name__, []).append(len(data))
        return data

    for module in (catchup, follower, link):
        monkeypatch.setattr(module, "encode", encode)
    async with replica_set() as nodes:
        fill(nodes, "ab", 6_000)
        nodes["a"].ring.clear()
        nodes["c"].write([put(number) for number in range(1, 6_000, 2)], (1, 1))  # half of the chunks differ
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        nodes.follow("c", "a", 2)
        await caught_up(nodes, led, "b", "c")
    assert len(sizes["Digests"]) >= 3  # more ranges than one frame may have
    assert max(sizes["Digests"]) < f.FRAME_BYTES_MAX
    assert max(sizes["Want"]) < f.CONTROL_BYTES_MAX
    # The most that there can be: the longest keys; ranges that differ and touch are wanted as one.
    keys = [bytes([number >> 8, number & 255]) + b"k" * (f.KEY_BYTES_MAX - 2) for number in range(f.RANGES_MAX + 1)]
    ranges = tuple(pairwise(keys))
    assert len(f.encode(f.Want(9, ranges[::2]))) < f.CONTROL_BYTES_MAX
    assert (
        len(f.encode(f.Digests(9, Position(9, 9), tuple((*one, b"d" * 16, 99) for one in ranges)))) < f.FRAME_BYTES_MAX
    )
    with pytest.raises(
        ProtocolError, match="limit FRAME_BYTES_MAX"
    ):  # said where the batch is made, not by a broken link
        f.encode(f.BatchFrame(9, Position(9, 9), Position(9, 8), bytes(f.FRAME_BYTES_MAX)))


@pytest.mark.parametrize("mine", ["", "between us"])
@pytest.mark.parametrize("theirs", ["", "between us", "another"])
async def test_default_secret_that_matches_everyone(autojump_clock: trio.abc.Clock, mine: str, theirs: str) -> None:
    """ActiveMQ's securityToken was "" unless somebody set it, equal to everybody else's "", on a port open to all: whoever
    connected got all messages. Here nobody who has a secret takes one without, or with another, and a set beyond loopback
    does not start without one."""
    async with replica_set(secret=mine) as nodes:
        nodes.lead("a", 2)
        answer = await said(nodes, "a", secret=theirs.encode() or None)
        if mine == theirs:
            assert isinstance(answer, f.Welcome)
        else:
            assert isinstance(answer, f.Refusal)
            assert answer.code == "secret"
            assert "between us" not in answer.text


@pytest.mark.parametrize("address", ["0.0.0.0:61619", "10.1.2.3:61619", "[::]:61619"])
def test_default_secret_that_matches_everyone_beyond_loopback(tmp_path: Path, address: str) -> None:
    """The same in the configuration."""
    given = {
        "name": "s",
        "zookeeper": "z:2181",
        "bind": address,
        "advertise": "10.1.2.3:61619",
        "allow": ("plaintext",),
    }
    with pytest.raises(ConfigurationError, match="secret"):
        make_config(name="a", data_dir=tmp_path, replica_set=given)
    assert (
        make_config(name="a", data_dir=tmp_path, replica_set=given | {"secret": "between us"}).replica_set is not None
    )


# ---- whole brokers


def leading(cluster: FaultyCluster) -> list[EmbeddedMember]:
    return [one for one in cluster.members.values() if isinstance(one, EmbeddedMember) and one.role == "leader"]


async def settled(cluster: FaultyCluster) -> EmbeddedMember:
    members: list[Any] = cluster.others()
    await until(lambda: sorted(one.role for one in members) == ["follower", "follower", "leader"], 15.0)
    return leading(cluster)[0]


async def received(member: EmbeddedMember) -> list[bytes]:
    """All that there is, acknowledged."""
    found = []
    async with member.broker.connect() as client, client.subscribe(Q) as messages:
        with trio.move_on_after(1):
            while True:
                message = await messages.receive()
                found.append(message.body)
                await message.ack()
    return found


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What closes files does so at once: the clock must not jump while a thread works."""

    async def close(store: Any) -> None:
        store.close()

    monkeypatch.setattr("pybroker.broker.close_store", close)


@pytest.mark.usefixtures("no_threads")
async def test_demoted_embedded_broker_stays_dead(autojump_clock: trio.abc.Clock) -> None:
    """ActiveMQ's demoted master stopped its broker and asked for a restart, which an embedding program had to do: in most it
    stayed dead, until no node was left. Here the same object goes on as a follower, tells its clients who leads, and leads
    again when it is elected."""
    async with faulty(embedded=True) as cluster:
        first = await settled(cluster)
        broker = first.broker
        sent: list[bytes] = []
        for turn in range(3):
            async with broker.connect() as client:
                await client.send(Q, b"%d" % turn)
                sent.append(b"%d" % turn)
                cluster.network.isolate(first.name)
                with pytest.raises(SendInDoubt):
                    await client.send(Q, b"in doubt")
                await until(lambda: len(leading(cluster)) == 1 and leading(cluster)[0] is not first, 10.0)
                cluster.network.heal()
                second = await settled(cluster)
                assert second is not first
                with pytest.raises(NotLeader, match=f"replica {second.name} does") as told:
                    await client.send(Q, b"late")
                assert told.value.leader == second.name
            for other in cluster.others(first, second):
                await other.crash()  # so that it is the first one's turn
            await second.broker.hand_over()
            await until(lambda: leading(cluster) == [first], 10.0)
            assert first.broker is broker
            for other in cluster.others(first, second):
                other.start()
            await settled(cluster)
        assert [body for body in await received(first) if body != b"in doubt"] == sent
        assert not first.stopped.is_set()


@pytest.mark.usefixtures("no_threads")
async def test_clock_jumps(autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wall clock that is set ends sessions and leases, or keeps them for ever, where they are measured with it. Here no rule of
    the set looks at it: of a jump one sees that messages with an expiry go earlier or later, and no other."""
    wall = {"ns": time.time_ns()}
    day = 86_400 * 10**9

    def now_ms(days: float = 0) -> int:
        return (wall["ns"] + int(days * day)) // 1_000_000

    monkeypatch.setattr(time, "time_ns", lambda: wall["ns"])
    monkeypatch.setattr(time, "time", lambda: wall["ns"] / 1e9)
    async with faulty(embedded=True) as cluster:
        leader = await settled(cluster)
        roles: Callable[[], list[tuple[str, int]]] = lambda: [  # noqa: E731
            (one.replica.role, one.replica.epoch) for one in cluster.others()
        ]
        before = roles()
        sent = []
        async with leader.broker.connect() as client:
            for jump in (3650, -3650, -3650, 3650):
                body = b"%d of %d" % (len(sent), jump)
                await client.send(Q, body)
                await client.send(Q, body + b", expires", expires=now_ms(1))
                sent.append(body)
                wall["ns"] += jump * day
                await trio.sleep(10)
                assert roles() == before
        # The last jump but one brought back the time; those of the first and the last send are over for ever.
        wall["ns"] -= 20 * day
        await leader.crash()
        began = trio.current_time()
        await until(lambda: bool(leading(cluster)), 5.0)
        assert trio.current_time() - began < 1.0
        wall["ns"] += 3650 * day
        new = leading(cluster)[0]
        leader.start()
        await settled(cluster)
        found = await received(new)
        assert [body for body in found if not body.endswith(b"expires")] == sent
        cluster.network.isolate(new.name)
        wall["ns"] -= 7300 * day
        await until(lambda: bool(leading(cluster)) and new not in leading(cluster), 10.0)
        cluster.network.heal()
        await settled(cluster)


def test_clock_jumps_can_not_matter_to_the_set() -> None:
    """No part of `cluster` reads the wall clock."""
    wall = {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "datetime", "CLOCK_REALTIME"}
    for path in sorted(Path(pybroker.cluster.__path__[0]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
                assert node.attr not in wall, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.ImportFrom) and node.module in ("time", "datetime"):
                assert not wall & {name.name for name in node.names}, f"{path.name}:{node.lineno}"
            if isinstance(node, ast.Import):
                assert "datetime" not in [name.name for name in node.names], f"{path.name}:{node.lineno}"
