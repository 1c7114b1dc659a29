"""The lease: what found it over stays over, the machine's sleep counts, and no user gets a term without one."""

from __future__ import annotations

import pytest
import trio

from pybroker.cluster import lease_clock
from pybroker.cluster.leader import LeadershipLost
from pybroker.cluster.lease_clock import LeaseClock
from pybroker.cluster.registry import Position
from pybroker.cluster.replica import FOLLOWER, LEADER
from pybroker.cluster.tracking import Copy, Tracking
from pybroker.store.committer import Batch
from tests.cluster.members import running
from tests.cluster.replicas import put, replica_set, until


async def test_the_clock_goes_on_while_the_machine_is_asleep(autojump_clock: trio.abc.Clock) -> None:
    asleep = 100.0
    clock = LeaseClock(lambda: asleep)
    began = clock.now()
    await trio.sleep(1)
    asleep += 0.04  # the noise of reading two clocks
    assert clock.now() == began + 1
    asleep += 30
    assert clock.now() == pytest.approx(began + 31, abs=0.1)
    asleep -= 0.05  # never backwards
    assert clock.now() == pytest.approx(began + 31, abs=0.1)


def test_this_system_tells_how_long_it_was_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lease_clock.seconds_asleep() > -1.0
    monkeypatch.setattr(lease_clock, "_BOOTTIME", None)
    assert lease_clock.seconds_asleep() == 0.0


def test_the_end_of_the_lease_is_counted_once_until_it_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for at every turn of the engine."""
    tracking = Tracking(5, 2, "a", [Copy("b", "b1"), Copy("c", "c1")], 10)
    counted = 0
    count = tracking._count_lease_from

    def counting() -> float:
        nonlocal counted
        counted += 1
        return count()

    monkeypatch.setattr(tracking, "_count_lease_from", counting)
    attachments = {name: tracking.attach(Copy(name, f"{name}1"), 10) for name in "bc"}
    for attachment in attachments.values():
        number = tracking.beat(1.0)
        tracking.beat_sent(attachment, number)
        tracking.answer_beat(attachment, 5, number, Position(5, 10))
    assert [tracking.lease_until(2.0) for _ in range(100)] == [3.0] * 100
    assert counted == 1
    tracking.stop_counting("b")
    assert tracking.lease_until(2.0) == 3.0
    tracking.attach(Copy("c", "wiped"), 0)
    assert tracking.lease_until(2.0) < 0
    assert counted == 3


async def test_a_leader_that_slept_past_its_lease_is_over_though_answers_come_at_once(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = 0.0
    async with replica_set() as nodes:
        led = nodes.lead("a", 2, asleep=lambda: asleep)
        for name in "bc":
            nodes.follow(name, "a", 2)
        await led.begin()
        await led.leader.wait_followers(2)
        asleep = 1.0
        assert led.leader.lease_valid
        await trio.sleep(1)
        asleep = 4.0
        assert not led.leader.lease_valid
        monkeypatch.setattr(led.leader._tracking, "lease_until", lambda lease: 1e9)  # an answer that comes now, say
        assert not led.leader.lease_valid
        await until(lambda: led.lost is not None, 1.0)
        with pytest.raises(LeadershipLost, match="no quorum has answered"):
            await led.commit([put(1)])
        with pytest.raises(LeadershipLost):
            await led.leader.wait_lease()


async def test_a_lease_that_was_found_over_stays_over(autojump_clock: trio.abc.Clock) -> None:
    async with running() as cluster:
        leader = await cluster.settle()
        term = leader.term
        assert term is not None
        assert term.valid
        cluster.zookeeper.down()  # so that nobody else can be elected meanwhile
        for wires in cluster.network.wires[leader.name]:
            for wire in wires:
                wire.out.cut = True
        await trio.sleep(leader.config.lease - 0.3)
        assert term.valid
        await trio.sleep(0.4)
        assert not term.valid
        for wires in cluster.network.wires[leader.name]:
            for wire in wires:
                wire.out.cut = False
                wire.out.change()
        for _ in range(100):
            await trio.sleep(0.05)
            assert not term.valid
        assert term.lost.is_set()
        assert not cluster.leaders
        cluster.zookeeper.up()
        await cluster.settle()


async def test_a_term_is_given_when_its_lease_is_valid(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first batch was confirmed before any heartbeat was answered."""
    answer = Tracking.answer_beat

    def late(tracking: Tracking, attachment: int, epoch: int, number: int, position: Position) -> None:
        if number > 5:
            answer(tracking, attachment, epoch, number, position)

    monkeypatch.setattr(Tracking, "answer_beat", late)
    async with running() as cluster:
        given: list[bool] = []

        async def take(name: str) -> None:
            term = await cluster.members[name].replica.next_term()
            given.append(term.valid)

        for name in "abc":
            cluster.nursery.start_soon(take, name)
        await until(
            lambda: any(one.replica.role == LEADER and one.position == (1, 1) for one in cluster.members.values())
        )
        assert given == []
        await until(lambda: bool(given))
        assert given == [True]
        await cluster.settle()


async def test_a_replica_alone_is_a_quorum_and_has_a_lease_for_ever(autojump_clock: trio.abc.Clock) -> None:
    async with running("a", replicas=1) as cluster:
        leader = await cluster.wait_leader()
        await trio.sleep(3600)
        await leader.commit(1)
        assert leader.led == [1]
        # Nobody else can go on: after a hand-over it leads again.
        leader.replica.hand_over()
        await until(lambda: leader.led == [1, 2], 5.0)


async def test_a_leader_paused_past_its_lease_confirms_nothing_when_it_wakes(autojump_clock: trio.abc.Clock) -> None:
    """Its followers have elected another one meanwhile; what it hears first, when it wakes, are answers of before."""
    async with running() as cluster:
        leader = await cluster.settle()
        term = leader.term
        assert term is not None
        cluster.network.cut(leader.name)  # nothing reaches it, or leaves it
        cluster.zookeeper.cut(leader.coordinator, noticed=False)
        new = None
        with trio.fail_after(3):
            while new is None:
                await trio.sleep(0.01)
                new = next((one for one in cluster.leaders if one is not leader), None)
        await new.commit(1)
        await trio.sleep(2)
        assert not term.valid
        with pytest.raises(LeadershipLost):
            await term.committer.commit(Batch([put(2)], (1, 2)))
        cluster.network.silent.clear()
        cluster.zookeeper.heal(leader.coordinator)
        await until(lambda: leader.replica.role == FOLLOWER and leader.holds(1), 15.0)  # a request was lost
        assert not leader.holds(2)
