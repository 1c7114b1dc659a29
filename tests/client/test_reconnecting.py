"""Connections that are lost, refused, silent or elsewhere: what a client does then, on virtual time, with puppets for brokers."""

from __future__ import annotations

import math

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from pybroker.connect_options import ConnectOptions
from pybroker.errors import (
    AuthenticationFailed,
    BrokerUnavailable,
    ProtocolError,
    SendInDoubt,
)
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_frames import Hello, Send
from tests.client.puppet import Peer, Puppet, obliging
from tests.client.support import wires

A, B, C = "pybroker://a:1", "pybroker://b:2", "pybroker://c:3"
BOTH = f"failover:({A},{B})?spread=first"
Q = "/queue/q"


async def refusing(peer: Peer, code: str, text: str = "no", **details: object) -> None:
    await peer.expect(Hello)
    await peer.say(wire.encode_error(code, text, details))
    await peer.wait_cut()


# ---- the first connection


async def test_nobody_is_there(autojump_clock: MockClock) -> None:
    async with wires() as net:
        began = trio.current_time()
        with pytest.raises(BrokerUnavailable, match=r"within 7 s.*refused"):
            async with net.client(A, options=ConnectOptions(deadline=7)):
                pass
        assert trio.current_time() - began == pytest.approx(7)
        gaps = [after - before for (_, before), (_, after) in zip(net.dialled, net.dialled[1:], strict=False)]
        assert len(gaps) >= 5
        for number, gap in enumerate(gaps):
            delay = min(0.05 * 2**number, 5.0)
            assert delay * 0.5 <= gap <= delay, gaps


async def test_a_broker_that_never_answers_is_left_for_the_next(autojump_clock: MockClock) -> None:
    async with wires() as net:
        net.held.add(A)
        net.serve(B, Puppet(obliging).serve)
        began = trio.current_time()
        async with net.client(BOTH, options=ConnectOptions(connect_timeout=3)) as client:
            assert trio.current_time() - began == pytest.approx(3)
            assert client.statistics().url == B


async def test_a_final_refusal_is_raised_at_once(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def refuse(peer: Peer) -> None:
            await refusing(peer, "authentication", "wrong user or password")

        net.serve(A, Puppet(refuse).serve)
        with pytest.raises(AuthenticationFailed, match="wrong user"):
            async with net.client(A, options=ConnectOptions(deadline=math.inf)):
                pass
        assert len(net.dialled) == 1


async def test_others_are_tried_before_a_final_refusal_is_raised(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def refuse(peer: Peer) -> None:
            await refusing(peer, "protocol", "no common version")

        net.serve(A, Puppet(refuse).serve)
        net.serve(B, Puppet(obliging).serve)
        async with net.client(BOTH) as client:
            assert client.statistics().url == B
        net.close(B)
        net.serve(B, Puppet(refuse).serve)
        with pytest.raises(ProtocolError, match="no common version"):
            async with net.client(BOTH):
                pass


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\0\0\0\3xyz", b"\0\0\0\2\x91\x05", b"\0\0\0\1\x90"]
)
async def test_something_else_answers(autojump_clock: MockClock, data: bytes) -> None:
    async with wires() as net:

        async def something(peer: Peer) -> None:
            await peer.say(data)
            await peer.wait_cut()

        net.serve(A, Puppet(something).serve)
        with pytest.raises(ProtocolError):
            async with net.client(A):
                pass


async def test_cancelled_while_it_connects(autojump_clock: MockClock) -> None:
    async with wires() as net:
        net.held.add(A)
        with trio.move_on_after(1) as scope:
            async with net.client(A):
                pytest.fail("there is nobody")
        assert scope.cancelled_caught


# ---- the leader is elsewhere


async def test_a_leader_that_is_named_is_tried_at_once(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def follower(peer: Peer) -> None:
            await refusing(peer, "not-leader", "c leads", leader="c", urls=["stomp://c:4", C, 5])

        net.serve(A, Puppet(follower).serve)
        net.serve(C, Puppet(obliging).serve)
        began = trio.current_time()
        async with net.client(A) as client:
            assert trio.current_time() == began
            assert client.statistics().url == C
        assert [url for url, _ in net.dialled] == [A, C]


async def test_two_that_name_each_other_are_not_tried_for_ever(autojump_clock: MockClock) -> None:
    async with wires() as net:
        for mine, other in ((A, B), (B, A)):

            async def follower(peer: Peer, other: str = other) -> None:
                await refusing(peer, "not-leader", "the other one leads", leader="x", urls=[other])

            net.serve(mine, Puppet(follower).serve)
        with pytest.raises(BrokerUnavailable, match="the other one leads"):
            async with net.client(A, options=ConnectOptions(deadline=10)):
                pass
        assert len(net.dialled) < 40


async def test_a_leader_that_moves_is_followed_at_once(autojump_clock: MockClock) -> None:
    async with wires() as net:
        moved = trio.Event()

        async def leader(peer: Peer) -> None:
            await peer.welcome()
            send = await peer.expect(Send)
            await moved.wait()
            await peer.say(wire.encode_error("not-leader", "b leads", {"leader": "b", "urls": [B]}))
            assert send.first == 1

        async def next_leader(peer: Peer) -> None:
            hello = await peer.welcome()
            assert not hello.options["producer_new"]
            assert (await peer.expect(Send)).first == 1, "what was not confirmed comes first"
            await peer.confirm(1)
            await peer.confirm_all()

        puppet = Puppet(next_leader)
        net.serve(A, Puppet(leader).serve)
        net.serve(B, puppet.serve)
        async with net.client(A) as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.send, Q, b"x")
                await trio.sleep(5)
                began = trio.current_time()
                moved.set()
            assert trio.current_time() == began
        puppet.check()


# ---- lost connections


async def test_sends_are_repeated_in_order_before_new_ones(autojump_clock: MockClock) -> None:
    async with wires() as net:
        got: list[list[bytes]] = []

        async def first(peer: Peer) -> None:
            hello = await peer.welcome()
            assert hello.options["producer_new"]
            bodies: list[bytes] = []
            while len(bodies) < 6:
                bodies += [message.body for message in (await peer.expect(Send)).messages]
            await peer.confirm(2, 3)
            got.append(bodies)
            await peer.cut()

        async def second(peer: Peer) -> None:
            await peer.welcome(known=True)
            sequences: list[int] = []
            bodies: list[bytes] = []
            while len(bodies) < 5:
                send = await peer.expect(Send)
                sequences += range(send.first, send.first + len(send.messages))
                bodies += [message.body for message in send.messages]
            assert sequences == [1, 4, 5, 6, 7]
            got.append(bodies)
            await peer.confirm(1)
            await peer.confirm(4, 7)
            await peer.confirm_all()

        puppet = Puppet(first, second)
        net.serve(A, puppet.serve)
        async with net.client(A) as client:
            async with client.publisher() as publisher:
                await publisher.send_many([(Q, b"%d" % number) for number in range(6)])
                events = client.events()
                while (await events.__anext__()).kind != "disconnected":
                    pass
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(client.send, Q, b"new")
            assert publisher.confirmed == 6
            statistics = client.statistics()
            assert (statistics.repeated, statistics.confirmed, statistics.unconfirmed) == (4, 7, 0)
        puppet.check()
        assert got == [[b"0", b"1", b"2", b"3", b"4", b"5"], [b"0", b"3", b"4", b"5", b"new"]]


async def test_another_broker_makes_sends_doubtful(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def first(peer: Peer) -> None:
            await peer.welcome()
            await peer.expect(Send)
            await peer.cut()
            net.close(A)

        producers: list[tuple[str, bool]] = []

        async def other(peer: Peer) -> None:
            hello = await peer.welcome(known=False)
            producers.append((peer.producer, hello.options["producer_new"]))
            await peer.confirm_all()

        net.serve(A, Puppet(first).serve)
        net.serve(B, Puppet(other).serve)
        async with net.client(BOTH) as client:
            with pytest.raises(SendInDoubt, match="does not know whether it is stored"):
                await client.send(Q, b"x")
            confirmation = await client.send(Q, b"y")
            (asked, new), (now, new_now) = producers
            assert (new, new_now) == (False, True)
            assert asked != now
            assert confirmation.message_id == f"{now}-1"
            assert client.statistics().in_doubt == 1


async def test_sends_can_be_repeated_at_another_broker(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def first(peer: Peer) -> None:
            await peer.welcome()
            await peer.expect(Send)
            await peer.confirm(1)
            await peer.expect(Send)
            await peer.cut()
            net.close(A)

        hellos: list[tuple[str, bool]] = []

        async def other(peer: Peer) -> None:
            hello = await peer.welcome(known=False)
            hellos.append((peer.producer, hello.options["producer_new"]))
            await peer.confirm_all()

        net.serve(A, Puppet(first).serve)
        net.serve(B, Puppet(other).serve)
        async with net.client(BOTH, options=ConnectOptions(elsewhere="repeat")) as client:
            await client.send(Q, b"x")
            confirmation = await client.send(Q, b"y")
            assert [new for _, new in hellos] == [False, True]
            assert len({producer for producer, _ in hellos}) == 1
            assert confirmation.message_id == f"{hellos[0][0]}-2", "whoever consumes it can tell that it is a repeat"


async def test_what_was_never_written_goes_to_the_other_broker(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def first(peer: Peer) -> None:
            await peer.welcome(send_messages_max=2)
            await peer.expect(Send)
            await peer.expect(Send)
            await peer.cut()
            net.close(A)

        async def other(peer: Peer) -> None:
            await peer.welcome(known=False)
            await peer.confirm_all()

        net.serve(A, Puppet(first).serve)
        net.serve(B, Puppet(other).serve)
        results: dict[int, str] = {}
        async with net.client(BOTH) as client:

            async def send(number: int) -> None:
                try:
                    await client.send(Q, b"%d" % number)
                    results[number] = "confirmed"
                except SendInDoubt:
                    results[number] = "doubt"

            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(send, number)
                    await wait_all_tasks_blocked()
        assert results == {0: "doubt", 1: "doubt", 2: "confirmed", 3: "confirmed"}


async def test_without_a_broker_the_deadline_ends_what_waits(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def first(peer: Peer) -> None:
            await peer.welcome(heartbeat=0)
            await peer.expect(Send)
            await trio.sleep(100)
            await peer.cut()

        net.serve(A, Puppet(first).serve)
        async with net.client(A, options=ConnectOptions(deadline=10)) as client:
            ended: dict[str, tuple[str, float]] = {}

            async def run(name: str, call: object, *arguments: object) -> None:
                try:
                    await call(*arguments)  # type: ignore[operator]
                    ended[name] = ("done", trio.current_time())
                except (SendInDoubt, BrokerUnavailable) as error:
                    ended[name] = (error.code, trio.current_time())

            async def subscribe() -> None:
                async with client.subscribe(Q):
                    pass

            async def publish() -> None:
                async with client.publisher() as publisher:
                    await publisher.send(Q, b"p")

            async with trio.open_nursery() as nursery:
                nursery.start_soon(run, "sent", client.send, Q, b"x")
                await trio.sleep(50)
                assert ended == {}, "a broker is there"
                net.close(A)
                await trio.sleep(52)
                nursery.start_soon(run, "later", client.send, Q, b"y")
                nursery.start_soon(run, "subscribe", subscribe)
                nursery.start_soon(run, "publish", publish)
                nursery.start_soon(run, "remove", client.remove_subscription, "d")
        assert ended["sent"] == ("in-doubt", pytest.approx(110))
        for name in ("later", "subscribe", "publish", "remove"):
            assert ended[name] == ("unavailable", pytest.approx(112)), name


async def test_a_cancelled_send_is_not_sent_later(autojump_clock: MockClock) -> None:
    async with wires() as net:
        bodies: list[bytes] = []

        async def first(peer: Peer) -> None:
            await peer.welcome()
            await peer.cut()

        async def second(peer: Peer) -> None:
            await peer.welcome()
            while (frame := await peer.next()) is not None:
                if isinstance(frame, Send):
                    bodies.extend(message.body for message in frame.messages)
                    await peer.confirm(frame.first, frame.first + len(frame.messages) - 1)
                else:
                    await peer.say(wire.encode_bye())

        net.serve(A, Puppet(first, second).serve)
        async with net.client(A) as client:
            net.close(A)
            await trio.sleep(1)
            with trio.move_on_after(5) as scope:
                await client.send(Q, b"cancelled")
            assert scope.cancelled_caught
            net.serve(A, Puppet(second).serve)
            await client.send(Q, b"after")
        assert bodies == [b"after"]


async def test_a_cancelled_send_is_not_repeated(autojump_clock: MockClock) -> None:
    async with wires() as net:
        bodies: list[bytes] = []

        async def first(peer: Peer) -> None:
            await peer.welcome()
            bodies.extend(message.body for message in (await peer.expect(Send)).messages)
            await trio.sleep(2)
            await peer.cut()

        async def second(peer: Peer) -> None:
            await peer.welcome()
            send = await peer.expect(Send)
            bodies.extend(message.body for message in send.messages)
            await peer.confirm(send.first)
            await peer.confirm_all()

        net.serve(A, Puppet(first, second).serve)
        async with net.client(A) as client:
            with trio.move_on_after(1) as scope:
                await client.send(Q, b"cancelled")
            assert scope.cancelled_caught
            await trio.sleep(3)
            await client.send(Q, b"after")
        assert bodies == [b"cancelled", b"after"]
