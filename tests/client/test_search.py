"""Which broker is tried next; what the network tells; who is chosen of several; events."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from pybroker.addresses import parse_target
from pybroker.cluster.native_urls import parse_native_url
from pybroker.connect_options import ConnectOptions
from pybroker.errors import BrokerUnavailable, SendInDoubt
from pybroker.protocols import native_frames as wire
from pybroker.remote_events import EVENTS_MAX, ConnectionEvent, ConnectionEvents
from pybroker.remote_search import Search
from tests.client.puppet import Peer, Puppet, obliging
from tests.client.support import wires

A, B, C, D = (f"pybroker://{name}:1" for name in "abcd")


def search(url: str, tls_only: bool = False, seed: int = 0) -> Search:
    return Search(parse_target(url), None, tls_only, random.Random(seed))


def round_of(one: Search) -> list[str]:
    return [address.url for address in one.round()]


def test_first_is_the_order_given() -> None:
    one = search(f"failover:({A},{B},{C})?spread=first")
    assert round_of(one) == [A, B, C]


def test_random_spreads() -> None:
    url = f"failover:({A},{B},{C})"
    firsts = Counter(round_of(search(url, seed=seed))[0] for seed in range(300))
    assert all(70 < firsts[each] < 130 for each in (A, B, C))
    assert all(sorted(round_of(search(url, seed=seed))) == [A, B, C] for seed in range(20))


def test_the_last_one_and_its_set_come_first_again() -> None:
    for seed in range(20):
        one = search(f"failover:({A},{B},{C})", seed=seed)
        one.learn({"x": (B, D), "y": (A, C)})
        one.connected(parse_native_url(D))
        assert round_of(one)[:2] == [D, B]
        one.fell_silent()
        assert round_of(one)[0] == B
        assert round_of(one)[-1] == D, "it may take all its time to fail"


def test_hints_come_at_once_and_only_once() -> None:
    one = search(f"failover:({A},{B})?spread=first")
    found = []
    for address in one.round():
        found.append(address.url)
        if address.url == A:
            one.hint((D, "stomp://x:1", A))
        if address.url == D:
            one.hint((A, D))
    assert found == [A, D, B]


def test_what_is_learned_is_bounded_and_replaced() -> None:
    one = search(f"failover:({A})?addresses_max=3")
    one.learn({"x": tuple(f"pybroker://x:{port}" for port in range(1, 9)), "y": (B,)})
    assert one.count == 4
    one.learn({"y": (B,)})
    assert sorted(round_of(one)) == [A, B]


def test_a_plain_url_does_not_learn() -> None:
    one = search(A)
    one.learn({"y": (B,)})
    assert round_of(one) == [A]


def test_no_plaintext_is_learned_where_tls_was_asked_for() -> None:
    one = search("failover:(pybroker+ssl://a:1)", tls_only=True)
    one.learn({"x": (B, "pybroker+ssl://b:2")})
    one.hint((C,))
    assert sorted(round_of(one)) == ["pybroker+ssl://a:1", "pybroker+ssl://b:2"]


class Told:
    """A source of addresses in a test's hands."""

    def __init__(self) -> None:
        self.known: list[tuple[str, tuple[str, ...]]] = []
        self._change = trio.Event()

    def addresses(self) -> Sequence[tuple[str, tuple[str, ...]]]:
        return self.known

    async def wait_change(self) -> None:
        await self._change.wait()

    def tell(self, **known: str) -> None:
        self.known = [(name, (url,)) for name, url in known.items()]
        self._change.set()
        self._change = trio.Event()


DISCOVERY = "discovery:(multicast://239.255.2.3:6155)"


async def test_a_broker_that_appears_is_used_at_once(autojump_clock: MockClock) -> None:
    async with wires() as net, trio.open_nursery() as nursery:
        source = Told()

        async def appear() -> None:
            await trio.sleep(7)
            net.serve(A, Puppet(obliging).serve)
            source.tell(a=A)

        nursery.start_soon(appear)
        async with net.client(DISCOVERY, source=source) as client:
            assert trio.current_time() == 7
            assert len(net.dialled) == 1
            net.close(A)
            net.cut(A)
            await trio.sleep(3.3)
            net.serve(B, Puppet(obliging).serve)
            source.tell(b=B)
            await client.send("/queue/q", b"x")
            assert trio.current_time() == pytest.approx(10.3), "no back-off for one that is new"


async def test_nobody_appears(autojump_clock: MockClock) -> None:
    async with wires() as net:
        with pytest.raises(BrokerUnavailable):
            async with net.client(DISCOVERY, source=Told(), options=ConnectOptions(deadline=4)):
                pass
        assert (trio.current_time(), net.dialled) == (4, [])


async def test_members_of_the_network_are_told_and_used(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def first(peer: Peer) -> None:
            await peer.welcome(members={"a": [A]})
            await trio.sleep(1)
            await peer.say(wire.encode_members({"a": [A], "d": [D, "stomp://d:2"]}))
            await trio.sleep(1)
            net.close(A)
            await peer.cut()

        net.serve(A, Puppet(first).serve)
        net.serve(D, Puppet(obliging).serve)
        async with net.client(f"failover:({A})") as client:
            events = client.events()
            seen: list[ConnectionEvent] = []
            while not seen or seen[-1].url != D:
                seen.append(await events.__anext__())
            told = [(event.kind, event.url) for event in seen]
            assert told[:3] == [("connected", A), ("members", A), ("disconnected", A)]
            assert told[-1] == ("connected", D)
            assert seen[0].broker == "puppet"
            assert seen[1].members == {"a": (A,), "d": (D, "stomp://d:2")}
            assert all(event.error is not None for event in seen if event.kind in ("failed", "disconnected"))
            assert client.statistics().addresses == 2


async def test_events_are_bounded_and_the_newest_are_kept() -> None:
    events = ConnectionEvents(None, over=False)
    for number in range(EVENTS_MAX + 50):
        events.put(ConnectionEvent("failed", str(number)))
    events.end()
    assert [event.url async for event in events] == [str(number) for number in range(50, EVENTS_MAX + 50)]


async def test_a_broker_that_always_ends_the_connection_is_not_tried_in_a_hot_loop(autojump_clock: MockClock) -> None:
    async with wires() as net:

        async def moody(peer: Peer) -> None:
            await peer.welcome()
            await peer.cut()

        net.serve(A, Puppet(moody).serve)
        async with net.client(A):
            await trio.sleep(60)
        assert 10 < len(net.dialled) < 40


async def test_what_breaks_every_connection_is_given_up(autojump_clock: MockClock) -> None:
    """A send that the broker answers by ending the connection is not repeated for ever."""
    async with wires() as net:

        async def strict(peer: Peer) -> None:
            await peer.welcome()
            frame = await peer.next()
            if isinstance(frame, wire.Send) and frame.messages[0].body == b"poison":
                await peer.say(wire.encode_error("limit", "the headers have 99 bytes: limit stomp.header_line is 5"))
                await peer.wait_cut()
            elif isinstance(frame, wire.Send):
                await peer.confirm(frame.first)
                await peer.confirm_all()

        net.serve(A, Puppet(strict).serve)
        async with net.client(A) as client:
            with pytest.raises(SendInDoubt, match="again and again with: the headers"):
                await client.send("/queue/q", b"poison")
            assert 3 <= len(net.dialled) <= 5
            await client.send("/queue/q", b"fine")


async def test_a_broker_that_never_answers_anything_is_as_none(autojump_clock: MockClock) -> None:
    """Connections that break before anything came of them don't begin the deadline anew."""
    async with wires() as net:

        async def moody(peer: Peer) -> None:
            await peer.welcome()
            await peer.next()
            await peer.cut()

        net.serve(A, Puppet(moody).serve)
        async with net.client(A, options=ConnectOptions(deadline=20)) as client:
            with pytest.raises(SendInDoubt, match="deadline"):
                await client.send("/queue/q", b"x")
            assert 20 <= trio.current_time() < 30


def test_while_something_is_not_confirmed_only_the_own_set_is_tried():
    found = search("failover:(pybroker://a1:1,pybroker://a2:2,pybroker://b1:3)")
    found.connected(parse_native_url("pybroker://a1:1"))
    found.learn({"a": ("pybroker://a1:1",), "b": ("pybroker://b1:3", "pybroker://b2:4")})
    own = {each.url for each in found.round(own_only=True)}
    assert own == {"pybroker://a1:1", "pybroker://a2:2"}  # of a2 nobody knows whose it is
    assert {each.url for each in found.round()} == own | {"pybroker://b1:3", "pybroker://b2:4"}
    found.connected(parse_native_url("pybroker://b2:4"))
    assert {each.url for each in found.round(own_only=True)} >= {"pybroker://b1:3", "pybroker://b2:4"}
    assert "pybroker://a1:1" not in {each.url for each in found.round(own_only=True)}


def test_where_the_own_set_is_not_known_all_are_tried():
    found = search("failover:(pybroker://a1:1,pybroker://b1:3)")
    found.connected(parse_native_url("pybroker://a1:1"))
    assert len(list(found.round(own_only=True))) == 2
