"""What goes on over lost connections: subscriptions and transactions; silence, and leaving. On virtual time, with puppets."""

# ruff: noqa: PT012, SIM117 (blocks that nest are what is tested)
from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from pybroker.connect_options import ConnectOptions
from pybroker.errors import (
    BrokerClosed,
    SendInDoubt,
    SubscriptionError,
    TransactionError,
    UnknownDelivery,
)
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_frames import Ack, Commit
from tests.client.puppet import Peer, Puppet, obliging
from tests.client.support import wires

A, B, C = "pybroker://a:1", "pybroker://b:2", "pybroker://c:3"
BOTH = f"failover:({A},{B})?spread=first"
Q = "/queue/q"


async def test_subscriptions_go_on(autojump_clock: MockClock) -> None:
    async with wires() as net:
        numbers: list[int] = []

        async def first(peer: Peer) -> None:
            await peer.welcome()
            frame = await peer.open_subscription()
            numbers.append(frame.subscription)
            assert (frame.destination, frame.ack, frame.prefetch) == (Q, "individual", 7)
            await peer.deliver(frame.subscription, 1, b"a", b"b", b"c")
            ack = await peer.expect(Ack)
            assert ack.ranges == [(1, 1)]
            await peer.say(wire.encode_done(ack.request))
            await trio.sleep(1)
            await peer.cut()

        async def second(peer: Peer) -> None:
            await peer.welcome()
            frame = await peer.open_subscription()
            numbers.append(frame.subscription)
            assert (frame.destination, frame.ack, frame.prefetch) == (Q, "individual", 7)
            await peer.deliver(frame.subscription, 1, b"b", b"c", deliveries=1)
            ack = await peer.expect(Ack)
            assert ack.ranges == [(1, 2)]
            await peer.say(wire.encode_done(ack.request))
            await peer.confirm_all()

        puppet = Puppet(first, second)
        net.serve(A, puppet.serve)
        async with net.client(A) as client, client.subscribe(Q, prefetch=7) as messages:
            got = [await messages.receive(), await messages.receive()]
            await got[0].ack()
            await trio.sleep(3)
            with pytest.raises(UnknownDelivery, match="delivered again"):
                await got[1].ack()
            again = [await messages.receive(), await messages.receive()]
            assert [(each.body, each.deliveries) for each in again] == [(b"b", 1), (b"c", 1)]
            await messages.ack(again)
            puppet.check()
        assert len(set(numbers)) == 2, "a number that was used names nothing else"


async def test_an_acknowledgement_without_an_answer_is_in_doubt(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def first(peer: Peer) -> None:
            await peer.welcome()
            frame = await peer.open_subscription()
            await peer.deliver(frame.subscription, 1, b"a")
            await peer.expect(Ack)
            await peer.cut()

        net.serve(A, Puppet(first, obliging).serve)
        async with net.client(A) as client, client.subscribe(Q) as messages:
            with pytest.raises(SendInDoubt, match="an acknowledgement was under way"):
                await (await messages.receive()).ack()


async def test_a_subscription_that_is_refused_for_a_while_is_restored(autojump_clock: MockClock) -> None:
    """The broker may not have noticed yet that the connection is over which a durable subscription was used by."""
    async with wires() as net:
        tries = 0

        async def first(peer: Peer) -> None:
            await peer.welcome()
            await peer.open_subscription()
            await trio.sleep(1)
            await peer.cut()

        async def second(peer: Peer) -> None:
            nonlocal tries
            await peer.welcome()
            for _ in range(4):
                frame = await peer.expect(wire.Subscribe)
                tries += 1
                await peer.say(wire.encode_failed(frame.request, "subscription", "it is in use"))
            frame = await peer.open_subscription()
            await peer.deliver(frame.subscription, 1, b"a")
            await peer.confirm_all()

        net.serve(A, Puppet(first, second).serve)
        async with net.client(A, "me") as client, client.subscribe("/topic/t", durable_name="d") as messages:
            assert (await messages.receive()).body == b"a"
            assert tries == 4


async def test_a_subscription_that_is_refused_for_good_ends(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def first(peer: Peer) -> None:
            await peer.welcome()
            await peer.open_subscription()
            await trio.sleep(1)
            await peer.cut()

        async def second(peer: Peer) -> None:
            await peer.welcome()
            while (frame := await peer.next()) is not None:
                if isinstance(frame, wire.Subscribe):
                    await peer.say(wire.encode_failed(frame.request, "subscription", "it is in use"))
                elif isinstance(frame, wire.Bye):
                    await peer.say(wire.encode_bye())

        net.serve(A, Puppet(first, second).serve)
        options = ConnectOptions(deadline=10)
        async with net.client(A, "me", options) as client, client.subscribe("/topic/t", durable_name="d") as messages:
            with pytest.raises(SubscriptionError, match="in use"):
                await messages.receive()
            assert 9 < trio.current_time() < 20
            assert client.statistics().subscriptions == 0


# ---- transactions


async def test_a_transaction_is_repeated(autojump_clock: MockClock) -> None:
    async with wires() as net:
        commits: list[Commit] = []

        async def first(peer: Peer) -> None:
            await peer.welcome()
            commits.append(await peer.expect(Commit))
            await peer.cut()

        async def second(peer: Peer) -> None:
            await peer.welcome()
            commits.append(await peer.expect(Commit))
            await peer.confirm(1)
            await peer.confirm_all()

        net.serve(A, Puppet(first, second).serve)
        async with net.client(A) as client:
            async with client.transaction() as transaction:
                await transaction.send(Q, b"x")
                await transaction.send(Q, b"y")
        assert [each.sequence for each in commits] == [1, 1]
        assert [[message.body for message in each.messages] for each in commits] == [[b"x", b"y"]] * 2


@pytest.mark.parametrize("stored", [True, False])
async def test_a_transaction_that_acknowledges_is_resolved(autojump_clock: MockClock, stored: bool) -> None:
    async with wires() as net:

        async def first(peer: Peer) -> None:
            await peer.welcome()
            frame = await peer.open_subscription()
            await peer.deliver(frame.subscription, 1, b"a")
            commit = await peer.expect(Commit)
            assert commit.acks == {frame.subscription: [(1, 1)]}
            await peer.cut()

        async def second(peer: Peer) -> None:
            await peer.welcome()
            frames = [await peer.next(), await peer.next()]
            (commit,) = [each for each in frames if isinstance(each, Commit)]
            (subscribe,) = [each for each in frames if isinstance(each, wire.Subscribe)]
            assert subscribe.subscription not in commit.acks, "its tags mean nothing here"
            if stored:
                await peer.confirm(commit.sequence)
            else:
                await peer.say(wire.encode_refused(commit.sequence, "transaction", "not stored"))
            await peer.confirm_all()

        puppet = Puppet(first, second)
        net.serve(A, puppet.serve)
        async with net.client(A) as client, client.subscribe(Q) as messages:
            message = await messages.receive()
            try:
                async with client.transaction() as transaction:
                    await transaction.send(Q, b"x")
                    await transaction.ack(message)
                committed = True
            except TransactionError:
                committed = False
        puppet.check()
        assert committed == stored


async def test_a_transaction_whose_connection_is_lost_before_its_end(autojump_clock: MockClock) -> None:
    async with wires() as net:
        lost = trio.Event()

        async def first(peer: Peer) -> None:
            await peer.welcome()
            frame = await peer.open_subscription()
            await peer.deliver(frame.subscription, 1, b"a")
            await lost.wait()
            await peer.cut()

        net.serve(A, Puppet(first, obliging).serve)
        async with net.client(A) as client, client.subscribe(Q) as messages:
            message = await messages.receive()
            with pytest.raises(TransactionError, match="nothing of it was done"):
                async with client.transaction() as transaction:
                    await transaction.ack(message)
                    lost.set()
                    await trio.sleep(1)
            async with client.transaction() as transaction:
                await transaction.send(Q, b"x")


# ---- silence, and leaving


async def test_a_silent_broker_is_left(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def silent(peer: Peer) -> None:
            await peer.welcome(heartbeat=2.0)
            await peer.wait_cut()

        net.serve(A, Puppet(silent).serve)
        net.serve(B, Puppet(obliging).serve)
        async with net.client(
            f"failover:({A},{B})?spread=first", options=ConnectOptions(heartbeat_interval=1)
        ) as client:
            events = client.events()
            assert (await events.__anext__()).url == A
            event = await events.__anext__()
            assert (event.kind, str(event.error)) == ("disconnected", "the broker was silent for 6 s")
            assert trio.current_time() == pytest.approx(6)
            assert (await events.__anext__()).url == B, "the other one is tried first then"


async def test_a_client_says_that_it_is_there(autojump_clock: MockClock) -> None:
    async with wires() as net:
        heard: list[float] = []

        async def listen(peer: Peer) -> None:
            hello = await peer.welcome(heartbeat=0)
            assert hello.options["heartbeat"] == 2.0
            while (frame := await peer.next(beats=True)) is not None:
                heard.append(trio.current_time())
                if isinstance(frame, wire.Bye):
                    await peer.say(wire.encode_bye())

        net.serve(A, Puppet(listen).serve)
        async with net.client(A, options=ConnectOptions(heartbeat_interval=2)):
            await trio.sleep(9)
        assert heard[:4] == [pytest.approx(number) for number in (2, 4, 6, 8)]


async def test_leaving_waits_for_what_is_owed_and_no_longer(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def slow(peer: Peer) -> None:
            await peer.welcome()
            frame = await peer.open_subscription()
            await peer.deliver(frame.subscription, 1, b"a", b"b")
            ack = await peer.expect(Ack)
            assert ack.ranges == [(1, 2)]
            while not isinstance(await peer.next(), wire.Bye | None):
                pass
            await trio.sleep(1)
            await peer.say(wire.encode_bye())

        puppet = Puppet(slow)
        net.serve(A, puppet.serve)
        async with net.client(A) as client:
            messages = client.subscribe(Q, ack="auto")
            await messages.__aenter__()
            await messages.receive_batch(2)
            began = trio.current_time()
        assert trio.current_time() - began == pytest.approx(1)
        puppet.check()


async def test_a_broker_that_does_not_answer_goodbye(autojump_clock: MockClock) -> None:
    async with wires() as net, trio.open_nursery() as nursery:

        async def deaf(peer: Peer) -> None:
            await peer.welcome()
            await peer.wait_cut()

        net.serve(A, Puppet(deaf).serve)
        async with net.client(A, options=ConnectOptions(close_timeout=3)) as client:

            async def send() -> None:
                with pytest.raises(SendInDoubt, match="closed"):
                    await client.send(Q, b"x")

            nursery.start_soon(send)
            await wait_all_tasks_blocked()
            began = trio.current_time()
        assert trio.current_time() - began == pytest.approx(3)


async def test_a_client_that_was_left(autojump_clock: MockClock) -> None:
    async with wires() as net:
        net.serve(A, Puppet(obliging).serve)
        async with net.client(A) as client:
            events = client.events()
        assert [event.kind async for event in events] == ["connected", "disconnected"]
        assert [event.kind async for event in client.events()] == ["disconnected"]
        with pytest.raises(BrokerClosed):
            await client.send(Q, b"x")
        assert not client.statistics().connected
