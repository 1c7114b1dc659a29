"""Queue browsers over the native protocol, and what becomes of them when something is wrong with it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from pybroker.connect_options import ConnectOptions
from pybroker.errors import (
    BrokerClosed,
    BrokerError,
    BrokerUnavailable,
    InvalidDestination,
    InvalidSelector,
    NotLeader,
    ProtocolError,
)
from pybroker.message import Message
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_session import error_frame
from pybroker.remote_client import RemoteClient
from tests.client.conftest import World
from tests.client.puppet import Peer, Puppet
from tests.client.support import fill, wires

A = "pybroker://a:1"
Q = "/queue/q"


@pytest.mark.parametrize(
    ("to", "selector", "error"),
    [
        ("/queue/" + "x" * 5_000, "", InvalidDestination),
        ("/queue/\ud800", "", InvalidDestination),
        (Q, "a = '" + "x" * 70_000 + "'", InvalidSelector),
        (Q, "a = '\ud800'", InvalidSelector),
    ],
)
async def test_what_can_not_be_asked_is_refused_and_the_connection_stays(
    autojump_clock: MockClock, world: World, to: str, selector: str, error: type[BrokerError]
) -> None:
    if world.kind == "stomp":
        pytest.skip("the client here is another's")
    async with world.client() as client:
        await fill(client, 1)
        with pytest.raises(error):
            await anext(client.browse(to, selector=selector))
        assert [message.body async for message in client.browse(Q)] == [b"0"]
        if isinstance(client, RemoteClient):
            assert client.statistics().failures == 0
            assert client._lifeline._connections == 1


@pytest.mark.parametrize("limit", [2**63, 2**64 + 5])
async def test_a_limit_beyond_all_numbers_is_none(autojump_clock: MockClock, world: World, limit: int) -> None:
    if world.kind == "stomp":
        pytest.skip("the client here is another's")
    async with world.client() as client:
        await fill(client, 3)
        assert len([message async for message in client.browse(Q, limit=limit)]) == 3


async def until_browse(peer: Peer) -> wire.Browse:
    await peer.welcome()
    while not isinstance(frame := await peer.next(), wire.Browse):
        assert frame is not None
    return frame


def plays(ends: list[Callable[[Peer], Awaitable[None]]]) -> Callable[[Peer], Awaitable[None]]:
    """Connections that end so one after the other, behind a request for a page; then one that answers."""

    async def play(peer: Peer) -> None:
        frame = await until_browse(peer)
        if ends:
            await ends.pop(0)(peer)
            return
        row = (Message(Q, b"here", b"", message_id=b"m", timestamp=1), 0)
        await peer.say(wire.encode_page(frame.request, [row], [], None, 0))
        await peer.confirm_all()

    return play


def with_error(error: BrokerError) -> Callable[[Peer], Awaitable[None]]:
    async def end(peer: Peer) -> None:
        await peer.say(error_frame(error))
        await peer.cut()

    return end


@pytest.mark.parametrize("error", [BrokerClosed("it stops"), NotLeader("the leadership has ended")])
async def test_a_page_is_asked_for_again_at_the_next_broker(autojump_clock: MockClock, error: BrokerError) -> None:
    async with wires() as net:
        net.serve(A, Puppet(plays([with_error(error)])).serve)
        async with net.client(A) as client:
            with trio.fail_after(20):
                assert [message.body async for message in client.browse(Q)] == [b"here"]


async def test_a_broken_rule_is_no_reason_to_ask_again(autojump_clock: MockClock) -> None:
    async with wires() as net:
        net.serve(A, Puppet(plays([with_error(ProtocolError("this is wrong"))])).serve)
        async with net.client(A) as client:
            with trio.fail_after(20), pytest.raises(ProtocolError, match="this is wrong"):
                await anext(client.browse(Q))


async def test_a_client_that_is_closed_asks_no_more(autojump_clock: MockClock) -> None:
    asked = trio.Event()

    async def play(peer: Peer) -> None:
        await until_browse(peer)
        asked.set()
        await peer.confirm_all()

    async with wires() as net:
        net.serve(A, Puppet(play).serve)
        async with trio.open_nursery() as nursery:

            async def look(client: RemoteClient) -> None:
                with pytest.raises(BrokerClosed):
                    await anext(client.browse(Q))

            async with net.client(A) as client:
                nursery.start_soon(look, client)
                await asked.wait()


async def test_where_no_answer_ever_comes_a_page_is_given_up(autojump_clock: MockClock) -> None:
    async def play(peer: Peer) -> None:
        await until_browse(peer)
        await peer.cut()

    async with wires() as net:
        net.serve(A, Puppet(play).serve)
        async with net.client(A, options=ConnectOptions(deadline=10)) as client:
            with trio.fail_after(60), pytest.raises(BrokerUnavailable):
                await anext(client.browse(Q))
