"""The faults that ActiveMQ's replicated LevelDB store and others died of: elections, sessions, partitions, copies that vote.

Each test is named after one of them, and says what went wrong there and what must happen here. Real replicas on virtual time.
The faults that are about files, secrets, whole brokers and clocks are in ``test_known_faults_2.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import trio

from pybroker.cluster.coordinator import Node, SetNode, Write
from pybroker.cluster.memory import Fate
from pybroker.cluster.registry import Position, parse_view
from pybroker.cluster.replica import CANDIDATE, FOLLOWER, NONE
from pybroker.errors import ConfigurationError
from pybroker.store import format as fmt
from tests.cluster.faults import FaultyCluster, FaultyMember, faulty
from tests.cluster.members import DELAY
from tests.cluster.replicas import until
from tests.store.forgetful import ForgetfulBackend


def published(writes: Sequence[Write]) -> tuple[str, Position] | None:
    """Who stands with which position in a request to ZooKeeper."""
    for write in writes:
        if isinstance(write, SetNode) and write.path.startswith("slots/"):
            name = write.path.removeprefix("slots/")
            slot = parse_view({write.path: Node(write.data, 0)}).slots[name][0]
            if slot.candidate is not None:
                return name, slot.candidate
    return None


def on_disk(member: FaultyMember) -> Position:
    """The position that a power failure at this moment would leave."""
    backend = member.copies.backend
    assert isinstance(backend, ForgetfulBackend)
    value = backend.synced.get(fmt.POSITION_KEY)
    return Position(0, 0) if value is None else Position(*fmt.decode_pair(fmt.POSITION_KEY, value))


async def committed(cluster: FaultyCluster, leader: Any, count: int) -> list[int]:
    numbers = [cluster.next_number() for _ in range(count)]
    for number in numbers:
        await leader.commit(number)
    return numbers


def holds_all(member: Any, numbers: Sequence[int]) -> bool:
    return all(member.holds(number) for number in numbers)


# ---- what is published


@pytest.mark.parametrize("sync", ["quorum_disk", "quorum_mem", "local_disk", "local_mem"])
async def test_published_position_newer_than_what_is_on_disk(autojump_clock: trio.abc.Clock, sync: str) -> None:
    """ActiveMQ published the append position of its log, which was in memory in the default mode: after a power failure the
    elected master did not have what it was elected for. Here a published position is on the disk when it is published."""
    async with faulty(sync=sync) as cluster:
        seen: list[tuple[str, Position, Position]] = []

        def watch(_: str, writes: Sequence[Write]) -> None:
            if (found := published(writes)) is not None:
                seen.append((*found, on_disk(cluster[found[0]])))

        cluster.zookeeper.fate = watch
        leader = await cluster.settle()
        numbers = await committed(cluster, leader, 20)
        await until(lambda: all(holds_all(member, numbers) for member in cluster.others()))
        cluster.network.isolate(leader.name)
        if sync.startswith("local"):
            await committed(cluster, leader, 20)
        new = (await until(lambda: bool(set(cluster.leaders) - {leader}), 5.0), cluster.leaders[0])[1]
        await committed(cluster, new, 5)
        await until(lambda: leader.replica.role == CANDIDATE)
        cluster.network.heal()
        await cluster.settle()
        assert {name for name, position, _ in seen if position.lsn > 20} == set("abc")
        assert [entry for entry in seen if entry[1] > entry[2]] == []


async def test_no_term_in_the_position_so_that_an_isolated_ex_master_with_a_longer_log_wins(
    autojump_clock: trio.abc.Clock,
) -> None:
    """ActiveMQ compared lengths of logs. A master that went on alone had the longest, and its return undid what the others had
    confirmed since. Here the epoch comes first, and the ex-leader's tail is cut off by difference."""
    async with faulty(sync="local_disk") as cluster:
        old = await cluster.settle()
        early = await committed(cluster, old, 5)
        await until(lambda: all(holds_all(member, early) for member in cluster.followers))
        cluster.network.isolate(old.name)
        cluster.zookeeper.cut(old.coordinator)
        lonely = await committed(cluster, old, 200)
        await until(lambda: old.term is None, 10.0)
        await until(lambda: bool(cluster.leaders))
        new = cluster.leaders[0]
        late = await committed(cluster, new, 3)
        third = next(iter(cluster.others(old, new)))
        await until(lambda: holds_all(third, late))
        await new.crash()
        cluster.zookeeper.heal(old.coordinator)
        cluster.network.heal()
        await until(lambda: bool(cluster.leaders))
        assert cluster.leaders == [third]
        await until(lambda: old.replica.role == FOLLOWER and holds_all(old, late))
        assert old.content == third.content
        assert not any(old.holds(number) for number in lonely)
        assert holds_all(old, early)


# ---- elections


@pytest.mark.parametrize("who", ["one hangs", "the best falls silent after it stood"])
async def test_election_waits_for_every_connected_member(autojump_clock: trio.abc.Clock, who: str) -> None:
    """ActiveMQ elected only when each member in ZooKeeper had reported its position, so that one hung member, or the dead
    master's session, held up the others ("Not enough cluster members have reported their update positions yet"). Here a quorum
    is enough, and the best of all is waited for 50 ms."""
    async with faulty("", replicas=5) as cluster:
        for name in "abcde":
            cluster.add(name, weight=9 if name == "e" else 0)
        best = cluster["e"]
        leader = await cluster.settle(5)
        if leader is best:
            leader.replica.hand_over()
            await until(lambda: leader not in cluster.leaders)
            leader = await cluster.settle(5)
        numbers = await committed(cluster, leader, 5)
        if who == "one hangs":
            absent = cluster.others(leader, best)[0]
            absent.hung = True
        else:
            absent = best
            cluster.zookeeper.fate = lambda _, writes: suspend_when_it_stands(cluster, best, writes)
        began = trio.current_time()
        await leader.crash()
        new = await cluster.wait_leader(1.0)
        assert trio.current_time() - began < 0.3
        assert new not in (leader, absent)
        assert (best.name in cluster.processes.suspended) is (absent is best)
        assert {leader.name, absent.name} < set(cluster.view.alive)
        assert holds_all(new, numbers)


def suspend_when_it_stands(cluster: FaultyCluster, member: FaultyMember, writes: Sequence[Write]) -> None:
    found = published(writes)
    if found is not None and found[0] == member.name:
        cluster.processes.suspend(member.name)


async def test_all_nodes_stop_after_a_lost_session(autojump_clock: trio.abc.Clock) -> None:
    """ActiveMQ's nodes all stopped listening after their sessions had expired, and no quorum ever came again until each was
    restarted (AMQ-5082). Here a set that has a leader does not need sessions to go on, and elects again with new ones."""
    async with faulty() as cluster:
        leader = await cluster.settle()
        epoch = leader.replica.epoch
        numbers = await committed(cluster, leader, 3)
        for _ in range(3):
            for member in cluster.others():
                cluster.zookeeper.expire(member.coordinator)
            numbers += await committed(cluster, leader, 3)
            cluster.zookeeper.down()
            for session in list(cluster.zookeeper.sessions):
                cluster.zookeeper._end_session(session)  # and none outlives the outage
            await trio.sleep(30)
            numbers += await committed(cluster, leader, 3)
            cluster.zookeeper.up()
            await until(lambda: cluster.view.leader is not None, 5.0)
        await cluster.settle()
        assert (cluster.leaders, leader.led, leader.replica.epoch) == ([leader], [epoch], epoch)
        assert not any(member.stopped.is_set() for member in cluster.others())
        await leader.crash()
        for member in cluster.others(leader):
            cluster.zookeeper.expire(member.coordinator)  # also while there is none
        new = await cluster.wait_leader(2.0)
        assert holds_all(new, numbers)
        leader.start()
        await cluster.settle()


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "unnoticed"])
@pytest.mark.parametrize("seconds", [3.0, 60.0], ids=["within the session", "past the session"])
async def test_a_short_disconnection_from_zookeeper_demotes_a_healthy_master(
    autojump_clock: trio.abc.Clock, seconds: float, noticed: bool
) -> None:
    """ActiveMQ's master took itself for demoted at every "disconnected" of its ZooKeeper client, and stopped the broker, though
    all its slaves were attached. Here its followers' answers keep it, whatever its session does."""
    async with faulty() as cluster:
        leader = await cluster.settle()
        term = leader.term
        for _ in range(3):
            cluster.zookeeper.cut(leader.coordinator, noticed=noticed)
            await committed(cluster, leader, 2)
            await trio.sleep(seconds)
            await committed(cluster, leader, 2)
            cluster.zookeeper.heal(leader.coordinator)
            await trio.sleep(1)
        assert term is not None
        assert leader.term is term
        assert not term.lost.is_set()
        assert cluster.leaders == [leader]
        assert sum(len(member.led) for member in cluster.others()) == 1
        assert cluster.view.leader is not None
        assert cluster.view.leader.name == leader.name


async def test_a_master_suspended_past_its_session_wakes_up_and_confirms(autojump_clock: trio.abc.Clock) -> None:
    """A master that is stopped (SIGSTOP, a long collection, a moved virtual machine) while another one is elected goes on where
    it was when it wakes: ActiveMQ's then confirmed sends into a log that nobody had. Here the lease is over before anything is
    shown, though the answers of before the pause wait in its sockets."""
    async with faulty() as cluster:
        old = await cluster.settle()
        for member in cluster.others():
            member.produce()
        for turn in range(4):
            await trio.sleep(1 + 0.0027 * turn)
            old = (await until(lambda: bool(cluster.leaders)), cluster.leaders[0])[1]
            await old.sending.wait()
            await trio.sleep(1.5 * DELAY)  # a send is on its way, and will be answered while nobody listens
            old.suspend()
            await until(lambda: bool(cluster.leaders), 5.0)
            new = cluster.leaders[0]
            await trio.sleep(12)  # its session is over
            before = list(old.shown)
            old.resume()
            await until(lambda: len(cluster.followers) == 2, 10.0)
            await trio.sleep(0.5)
            assert old.shown == before
            assert cluster.leaders == [new]
        assert cluster.most_leaders == 1
        numbers = cluster.confirmed
        assert len(numbers) > 200
        await until(lambda: all(holds_all(member, numbers) for member in cluster.others()))


# ---- copies that vote


async def test_a_wiped_replica_votes(autojump_clock: trio.abc.Clock) -> None:
    """A replica that comes back empty under its old name made a quorum with one that was behind, and the two elected a master
    without what had been confirmed. Here an empty copy counts only when a leader has filled and registered it."""
    async with faulty() as cluster:
        leader = await cluster.settle()
        wiped, behind = cluster.followers
        await behind.crash()
        numbers = await committed(cluster, leader, 10)
        assert holds_all(wiped, numbers)
        await leader.crash()
        await wiped.crash()
        wiped.copies.start_anew()
        wiped.copies.close()
        wiped.start()
        behind.start()
        await trio.sleep(60)
        assert cluster.leaders == []
        assert cluster.view.epoch == leader.led[-1]
        leader.start()
        new = await cluster.wait_leader()
        assert new is leader
        await cluster.settle()
        await until(lambda: all(holds_all(member, numbers) for member in cluster.others()))


async def test_a_fourth_replica_with_a_new_name_is_let_in(autojump_clock: trio.abc.Clock) -> None:
    """ActiveMQ warned "too many cluster members are connected", and counted them: two of a set of four, or a copied directory
    under another name, were a majority beside the majority. Here a name that is not on a full roster is refused."""
    async with faulty() as cluster:
        leader = await cluster.settle()
        lost, other = cluster.followers
        await lost.crash()
        numbers = await committed(cluster, leader, 5)
        fourth = FaultyMember(cluster, "d", cluster.config)
        cluster.members["d"] = fourth
        fourth.copies.backend = ForgetfulBackend(dict(lost.copies.backend.synced))  # type: ignore[attr-defined]
        fourth.start()
        await until(fourth.stopped.is_set)  # also though one of the three is away
        assert isinstance(fourth.error, ConfigurationError)
        assert "its 3 replicas are a, b, c" in str(fourth.error)
        await leader.crash()
        fourth.error = None
        fourth.start()
        await until(fourth.stopped.is_set)  # and with nobody there who could lead
        assert isinstance(fourth.error, ConfigurationError)
        await trio.sleep(30)
        assert cluster.leaders == []
        assert set(cluster.view.slots) == set(cluster.view.roster) == set("abc")
        leader.start()
        assert await cluster.wait_leader() in (leader, other)
        assert holds_all(cluster.leaders[0], numbers)


# ---- ZooKeeper


async def test_a_write_to_zookeeper_arrives_long_after_it_was_given_up(autojump_clock: trio.abc.Clock) -> None:
    """A client library that queues requests, or a slow path, brings a write to ZooKeeper when its sender has long done something
    else: the replica's old position stood there again while it followed. Here each write names the version that was read, and
    one that was not answered is made void before anything else is done."""
    late: list[tuple[str, Sequence[Write]]] = []

    def delay(name: str, writes: Sequence[Write]) -> Fate | None:
        if not writes or any(write.path.startswith(("alive", "leader")) for write in writes) or len(late) >= 12:
            return None
        if sum(1 for one, _ in late if one == name) >= 4:
            return None
        late.append((name, writes))
        return Fate(25.0, None)

    async with faulty() as cluster:
        cluster.zookeeper.request_timeout = 0.3
        cluster.zookeeper.fences_sessions = False  # the worst that can be thought of: a session's end does not help
        leader = await cluster.settle()
        numbers = await committed(cluster, leader, 3)
        cluster.zookeeper.fate = delay
        await leader.crash()
        leader.start()
        await until(lambda: bool(cluster.leaders), 20.0)
        new = cluster.leaders[0]
        await until(lambda: len(cluster.followers) == 2, 20.0)
        numbers += await committed(cluster, new, 3)
        assert any(published(writes) for _, writes in late)
        before = {path: node for path, node in cluster.zookeeper.nodes.items() if not path.startswith("alive")}
        await trio.sleep(40)  # now they arrive
        after = {path: node for path, node in cluster.zookeeper.nodes.items() if not path.startswith("alive")}
        assert after == before
        assert cluster.leaders == [new]
        await new.crash()
        assert holds_all(await cluster.wait_leader(), numbers)


@pytest.mark.parametrize("rewound", [False, True], ids=["wiped", "rewound"])
async def test_zookeeper_s_data_wiped(autojump_clock: trio.abc.Clock, rewound: bool) -> None:
    """With ZooKeeper's data gone nobody knows who counts: whoever came first was master, with what it had. Here the set serves
    on while it has a leader; then it says what is wrong, and starts with all its copies or when an operator forces it."""
    async with faulty() as cluster:
        early = cluster.zookeeper.snapshot()
        leader = await cluster.settle()
        if rewound:
            early = cluster.zookeeper.snapshot()
            leader.replica.hand_over()
            await until(lambda: leader not in cluster.leaders)
            leader = await cluster.settle()
        behind, other = cluster.followers
        await behind.crash()
        numbers = await committed(cluster, leader, 10)
        cluster.zookeeper.rewind(early)
        numbers += await committed(cluster, leader, 10)
        await trio.sleep(60)
        numbers += await committed(cluster, leader, 10)
        assert cluster.leaders == [leader]
        epoch = leader.replica.epoch
        await leader.crash()
        await other.crash()
        behind.start()
        other.start()
        await trio.sleep(30)
        assert cluster.leaders == []
        assert any("ZooKeeper's data is older than the stores" in one.replica.blocked for one in (behind, other))
        leader.start()
        new = await cluster.wait_leader()
        assert new.led[-1] == epoch + 1
        await cluster.settle()
        await until(lambda: all(holds_all(member, numbers) for member in cluster.others()))


async def test_zookeeper_s_data_wiped_and_a_replica_gone_for_good(autojump_clock: trio.abc.Clock) -> None:
    """The same, and an operator forces the start: the epoch is one that the absent copy can't know, so that it can't lead with its
    longer past when it turns up after all."""
    async with faulty() as cluster:
        leader = await cluster.settle()
        gone, other = leader, cluster.followers[0]
        await committed(cluster, leader, 5)
        epoch = leader.replica.epoch
        await gone.crash()
        cluster.zookeeper.wipe()
        await trio.sleep(10)
        assert cluster.leaders == []
        for member in cluster.others(gone):
            member.replica.force_start()
        new = await cluster.wait_leader()
        assert new.led[-1] == epoch + 2**32
        numbers = await committed(cluster, new, 5)
        gone.start()
        await until(lambda: gone.replica.role == FOLLOWER and holds_all(gone, numbers))
        assert (cluster.leaders, other.stopped.is_set()) == ([new], False)


# ---- partitions


@pytest.mark.parametrize("way", ["nothing of it is heard", "it hears nothing"])
@pytest.mark.parametrize("zookeeper", ["reached", "hears it", "is heard"])
async def test_one_way_partition(autojump_clock: trio.abc.Clock, way: str, zookeeper: str) -> None:
    """A master that could send and not hear (or the other way) stayed master for ever, as its session was well, and no send ended:
    ActiveMQ's waits for its slaves' answers without a limit. Here both sides see silence, one of the others leads within
    seconds, and there are never two who may show anything."""
    async with faulty() as cluster:
        leader = await cluster.settle()
        for member in cluster.others():
            member.produce()
        await trio.sleep(1)
        began = trio.current_time()
        for other in cluster.others(leader):
            pair = (leader.name, other.name)
            cluster.network.cut(*(pair if way == "nothing of it is heard" else pair[::-1]))
        if zookeeper != "reached":
            cluster.zookeeper.cut(
                leader.coordinator,
                requests=zookeeper == "is heard",
                answers=zookeeper == "hears it",
                noticed=False,
            )
        await until(lambda: any(one is not leader for one in cluster.leaders), 8.0)
        took = trio.current_time() - began
        assert took < (2.0 if way == "nothing of it is heard" else 6.0)
        await until(lambda: leader.term is None, 10.0)
        await trio.sleep(5)
        assert leader not in cluster.leaders
        cluster.network.heal()
        cluster.zookeeper.heal(leader.coordinator)
        await until(lambda: leader.replica.role == FOLLOWER, 10.0)
        # A deposed leader that can't know it may think so until its lease ends; but it confirms nothing more.
        assert max(leader.shown)[0] < min(at for other in cluster.others(leader) for at, _ in other.shown)
        numbers = cluster.confirmed
        assert len(numbers) > 100
        await until(lambda: all(holds_all(member, numbers) for member in cluster.others()))


async def test_one_way_partition_of_a_follower(autojump_clock: trio.abc.Clock) -> None:
    """One follower that can't be heard, or can't hear, disturbs nobody and elects nobody; it comes back by itself."""
    async with faulty() as cluster:
        leader = await cluster.settle()
        epoch = leader.replica.epoch
        leader.produce()
        for pair in ((0, 1), (1, 0)):
            names = (leader.name, cluster.others(leader)[0].name)
            cluster.network.cut(names[pair[0]], names[pair[1]])
            await trio.sleep(8)
            assert cluster.leaders == [leader]
            assert cluster.others(leader)[0].replica.role in (CANDIDATE, NONE)
            cluster.network.heal()
            await until(lambda: len(cluster.followers) == 2)
        assert (leader.replica.epoch, leader.led) == (epoch, [epoch])
        numbers = cluster.confirmed
        times = [at for at, _ in leader.shown]
        assert max(later - at for at, later in pairwise(times)) < 0.1
        await until(lambda: all(holds_all(member, numbers) for member in cluster.others()))
