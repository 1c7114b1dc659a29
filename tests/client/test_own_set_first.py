"""A client whose leader is lost while another set of its network answers: the repeat goes to who may know it (virtual time)."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pybroker.connect_options import ConnectOptions
from pybroker.errors import SendInDoubt
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_frames import Send
from tests.client.puppet import Peer, Puppet
from tests.client.support import wires

LEADER, NEXT, OTHER = "pybroker://a:1", "pybroker://a:2", "pybroker://b:3"
MEMBERS = {"a": (LEADER, NEXT), "b": (OTHER,)}
ANY = f"failover:({LEADER},{NEXT},{OTHER})?spread=first"
Q = "/queue/q"


async def lost(peer: Peer) -> None:
    """The leader: takes a send, and is gone before it confirms."""
    await peer.welcome()
    await peer.say(wire.encode_members(MEMBERS))
    await peer.expect(Send)
    await peer.cut()


class Broker(Puppet):
    """Knows the producers that it is told of, and keeps what is sent to it."""

    def __init__(self, known: bool) -> None:
        super().__init__(self._play)
        self._known = known
        self.sent: list[bytes] = []

    async def _play(self, peer: Peer) -> None:
        hello = await peer.welcome(known=self._known)
        self._known = self._known or bool(hello.options["producer_new"])
        while (frame := await peer.next()) is not None:
            if isinstance(frame, Send):
                self.sent += [message.body for message in frame.messages]
                await peer.confirm(frame.first, frame.first + len(frame.messages) - 1)


async def send_while_the_leader_changes(first: float, back_after: float) -> tuple[list[bytes], list[bytes], str]:
    """What the own set and the other one were sent, and how the send ended."""
    outcome = "confirmed"
    async with wires() as net, trio.open_nursery() as nursery:
        own, other = Broker(known=True), Broker(known=False)
        net.serve(LEADER, Puppet(lost).serve)
        net.serve(OTHER, other.serve)

        async def elect() -> None:
            await trio.sleep(back_after)
            net.serve(NEXT, own.serve)

        options = ConnectOptions(deadline=60, own_set_first=first, reconnect_delay_max=0.2)
        async with net.client(ANY, options=options) as client:
            await trio.sleep(0.1)  # it has heard of the members
            net.close(LEADER)
            nursery.start_soon(elect)
            try:
                await client.send(Q, b"referral")
            except SendInDoubt:
                outcome = "in doubt"
            await client.send(Q, b"next")
        own.check()
        other.check()
        return own.sent, other.sent, outcome


async def test_it_waits_for_the_next_leader_of_its_set(autojump_clock: MockClock) -> None:
    own, other, outcome = await send_while_the_leader_changes(first=2.0, back_after=1.5)
    assert (own, other, outcome) == ([b"referral", b"next"], [], "confirmed")


async def test_not_for_ever(autojump_clock: MockClock) -> None:
    own, other, outcome = await send_while_the_leader_changes(first=2.0, back_after=30.0)
    assert (own, other, outcome) == ([], [b"next"], "in doubt")


async def test_not_at_all_where_that_is_asked_for(autojump_clock: MockClock) -> None:
    own, other, outcome = await send_while_the_leader_changes(first=0.0, back_after=0.5)
    assert (own, other, outcome) == ([], [b"next"], "in doubt")


@pytest.mark.parametrize("first", [0.0, 2.0])
async def test_with_nothing_unconfirmed_whoever_answers_is_taken(autojump_clock: MockClock, first: float) -> None:
    async with wires() as net:

        async def leave(peer: Peer) -> None:
            await peer.welcome()
            await peer.say(wire.encode_members(MEMBERS))
            await trio.sleep(1)
            await peer.cut()

        other = Broker(known=False)
        net.serve(LEADER, Puppet(leave).serve)
        net.serve(OTHER, other.serve)
        async with net.client(ANY, options=ConnectOptions(own_set_first=first)) as client:
            await trio.sleep(0.5)
            net.close(LEADER)
            await trio.sleep(1)
            assert client.statistics().url == OTHER
            await client.send(Q, b"x")
        assert other.sent == [b"x"]
