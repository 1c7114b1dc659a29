"""Whole brokers in a replica set, on virtual time: what an embedding program and its clients see of leading and following."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from pybroker.errors import BrokerClosed, BrokerError, NotLeader, SendInDoubt
from tests.cluster.replicas import until
from tests.cluster.test_replica import DELAY
from tests.engine.sets import brokers
from tests.engine.support import close_without_thread, stomp_peer
from tests.support.wire import frame

Q = "/queue/q"


def numbered(sequence: int) -> tuple[str, str]:
    return "producer-id:ward-3-1b9f", f"producer-sequence:{sequence}"


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pybroker.broker.close_store", close_without_thread)


async def test_a_follower_says_who_leads_and_where(autojump_clock: trio.abc.Clock) -> None:
    async with brokers() as group:
        leader = await group.settled()
        follower = next(one for one in group.all.values() if one is not leader)
        with pytest.raises(NotLeader, match=f"replica {leader.name} does, at stomp://{leader.name}:61613") as caught:
            async with follower.broker.connect():
                pass
        assert (caught.value.leader, caught.value.urls) == (leader.name, (f"stomp://{leader.name}:61613",))
        with pytest.raises(NotLeader):
            follower.broker.statistics()
        assert follower.broker.listeners == ()
        assert await leader.broker.wait_role("leader") == leader.broker.statistics().epoch


async def test_a_killed_leaders_messages_are_at_the_next_one(autojump_clock: trio.abc.Clock) -> None:
    async with brokers() as group:
        leader = await group.settled()
        async with leader.broker.connect() as client:
            for number in range(50):
                await client.send(Q, b"%d" % number)
        await leader.kill()
        await until(lambda: any(one is not leader for one in group.leading()), 1.0)
        (new,) = (one for one in group.leading() if one is not leader)
        async with new.broker.connect() as client, client.subscribe(Q) as messages:
            assert [(await messages.receive()).body for _ in range(50)] == [b"%d" % number for number in range(50)]
            await client.send(Q, b"more")
        await leader.start()
        await until(lambda: leader.broker.role == "follower", 5.0)


async def test_a_hand_over_confirms_what_was_sent_and_tells_clients_where_to_go(autojump_clock: trio.abc.Clock) -> None:
    async with brokers() as group:
        leader = await group.settled()
        confirmed: list[int] = []
        errors: list[BrokerError] = []

        async def send(client: Any, number: int) -> None:
            try:
                await client.send(Q, b"%d" % number)
                confirmed.append(number)
            except BrokerError as error:
                errors.append(error)

        async with leader.broker.connect() as client, client.subscribe("/queue/other") as nothing:
            await client.send("/queue/transient", b"", durable=False)
            async with trio.open_nursery() as sending:
                for number in range(20):
                    sending.start_soon(send, client, number)
                await trio.lowlevel.checkpoint()
                began = trio.current_time()
                await leader.broker.hand_over()
                assert trio.current_time() - began < 0.1
            new = await group.leader()
            assert new is not leader
            assert sorted(confirmed) == list(range(20))
            assert errors == []
            with pytest.raises(NotLeader, match=f"replica {new.name} does"):  # as it is now, not as it was then
                await client.send(Q, b"late")
            with pytest.raises(NotLeader, match=f"replica {new.name} does"):
                await nothing.receive()
        async with new.broker.connect() as client, client.subscribe(Q) as messages:
            assert sorted([int((await messages.receive()).body) for _ in range(20)]) == list(range(20))
        await until(lambda: leader.broker.role == "follower", 5.0)
        await new.broker.hand_over()  # and it leads again when it is its turn
        await until(lambda: leader.broker.role == "leader", 10.0)
        assert leader.broker.statistics().dropped == 1
        assert "stopped" not in leader.roles


async def test_a_leader_cut_off_leaves_its_sends_in_doubt_and_comes_back_by_itself(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with brokers() as group:
        leader = await group.settled()
        async with leader.broker.connect() as client:
            await client.send(Q, b"first")
            for one in group.all.values():
                if one is not leader:
                    await one.kill()
            with pytest.raises(SendInDoubt):
                await client.send(Q, b"alone")
            with pytest.raises(NotLeader, match="no leader is known"):
                await client.send(Q, b"again")
        for one in group.all.values():
            if one is not leader:
                await one.start()
        new = await group.settled()
        async with new.broker.connect() as client, client.subscribe(Q) as messages:
            assert (await messages.receive()).body == b"first"
        assert leader.roles[-1] in ("leader", "follower")


async def test_stopping_a_leader_hands_over_and_stopping_a_follower_disturbs_nobody(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with brokers() as group:
        leader = await group.settled()
        follower = next(one for one in group.all.values() if one is not leader)
        await follower.broker._stop()
        assert leader.broker.role == "leader"
        await follower.start()
        await group.settled()
        async with leader.broker.connect() as client:
            await client.send(Q, b"kept")
            began = trio.current_time()
            await leader.broker._stop()
            with pytest.raises(BrokerClosed):
                await client.send(Q, b"late")
        new = await group.leader()
        assert trio.current_time() - began < 0.2
        async with new.broker.connect() as client, client.subscribe(Q) as messages:
            assert (await messages.receive()).body == b"kept"


async def test_what_was_out_at_a_hand_over_comes_back_in_place_as_redelivered(autojump_clock: trio.abc.Clock) -> None:
    async with brokers() as group:
        leader = await group.settled()
        async with leader.broker.connect() as client:
            for number in range(6):
                await client.send(Q, b"%d" % number)
            async with client.subscribe(Q, prefetch=3) as messages:
                held = await messages.receive_batch(3)
                await held[1].ack()
                await leader.broker.hand_over()
                with pytest.raises(NotLeader):
                    await held[0].ack()
        new = await group.leader()
        async with new.broker.connect() as client, client.subscribe(Q) as messages:
            received = [await messages.receive() for _ in range(5)]
        assert [message.body for message in received] == [b"0", b"2", b"3", b"4", b"5"]
        assert [message.redelivered for message in received[:2]] == [True, True]
        assert not received[-1].redelivered


async def test_what_is_repeated_to_the_next_leader_is_stored_once(autojump_clock: trio.abc.Clock) -> None:
    """A producer that numbers its sends repeats all that it has sent, wherever its leader died."""
    outcomes: set[tuple[int, int]] = set()
    for steps in range(16):
        async with brokers() as group:
            leader = await group.settled()
            confirmed: set[int] = set()
            async with stomp_peer(leader.broker) as peer:
                await peer.do("SEND", "destination:/queue/q", *numbered(0), body=b"0")
                for number in range(1, 9):
                    await peer.send(
                        frame(
                            "SEND", "destination:/queue/q", *numbered(number), f"receipt:{number}", body=b"%d" % number
                        )
                    )
                    await trio.sleep(DELAY * (steps + 1) / 16)
                await leader.kill()
                with trio.move_on_after(1.0):  # it came while the leader lived
                    while True:
                        confirmed.add(int((await peer.expect("RECEIPT"))["receipt-id"]))
            await until(lambda: any(one is not leader for one in group.leading()), 1.0)  # noqa: B023
            (new,) = (one for one in group.leading() if one is not leader)
            async with stomp_peer(new.broker) as peer:
                for number in range(12):
                    repeat = ("producer-repeat:true",) if number < 9 else ()
                    await peer.do("SEND", "destination:/queue/q", *numbered(number), *repeat, body=b"%d" % number)
            repeats = new.broker.statistics().duplicates
            assert repeats > len(confirmed), "what was confirmed was stored, and the first one as well"
            outcomes.add((len(confirmed), repeats))
            async with new.broker.connect() as client, client.subscribe(Q) as messages:
                received = [await messages.receive() for _ in range(12)]
                with trio.move_on_after(1.0):
                    raise AssertionError(f"stored twice: {await messages.receive()}")
            assert sorted(int(message.body) for message in received) == list(range(12))
    assert len(outcomes) > 2, outcomes
    assert any(repeats > confirmed + 1 for confirmed, repeats in outcomes), "none was stored and not confirmed"
