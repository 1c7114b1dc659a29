"""One member of a set in a simulated network: a whole broker with native listeners, links and announcements.

Owns how a broker of the real code is put on the simulated wires: a server without sockets, links and datagrams by the
simulation's network, a store of its own for a broker that stands alone. What must be known of it is told to the checkers here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import trio

from pybroker import broker as broker_module
from pybroker import keeper as keeper_module
from pybroker import native_server, remote_lifeline
from pybroker.broker import Broker
from pybroker.cluster import announcer as announcer_module
from pybroker.cluster.datagrams import Datagrams
from pybroker.cluster.discovery import Discovery
from pybroker.cluster.native_urls import parse_native_url
from pybroker.core.links import Link, Links
from pybroker.engine import Engine
from pybroker.keeper import Alone, AloneTerm
from pybroker.link_connection import LinkConnection
from pybroker.native_server import NativeConnection
from pybroker.network_membership import Membership
from pybroker.remote_subscription import RemoteSubscription
from pybroker.replicated import Replicated
from pybroker.server import Server
from pybroker.store.store import Store
from tests.sim.member import Life, Member, note_delivery, watched
from tests.sim.network import SimNetwork
from tests.sim.schedule import PROCESS

if TYPE_CHECKING:
    from tests.sim.net_set import NetSet

PORT = 61620
NATIVE = "native"  # the service of a native listener


def url(name: str) -> str:
    return f"pybroker://{name}:{PORT}"


def native(name: str) -> str:
    """The address of a member's listener in the simulated network."""
    return f"{name}/{NATIVE}"


class Randomness:
    """Of links, from the seed of a run."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def nonce(self) -> bytes:
        return self._rng.randbytes(32)

    def random(self) -> float:
        return self._rng.random()


class NetLife(Life):
    """One process of a member."""

    member: NetMember

    def make_broker(self) -> None:
        member, net = self.member, self.member.net
        config = net.broker_config(member.name)
        membership = Membership(
            config,
            "simulated",
            dial=partial(self._dial, net.network),
            open_datagrams=self._open_datagrams,
            randomness=Randomness(self.rng),
        )
        if net.stands_alone:
            self.broker = Broker(config, Alone(config), membership)
        else:
            self.replica = self.make_replica()
            self.broker = Broker(config, Replicated(self.replica), membership)

    @property
    def settled(self) -> bool:
        return self.broker.role == "standalone" if self.member.net.stands_alone else super().settled

    async def _dial(self, network: SimNetwork, address: str) -> trio.abc.Stream:
        if self.dead:
            raise ConnectionResetError(address)
        return await network.dial(self.member.name, native(parse_native_url(address).host))

    def _open_datagrams(self, discovery: Discovery, *, listen: bool) -> Datagrams:
        place = self.member.net.segment.open_at(self.member.name)(discovery, listen=listen)
        return _Datagrams(self, place)

    async def open_store(self) -> Store:
        """Of a broker that stands alone."""
        store = await self.run_writing(self.copies.open)
        assert isinstance(store, Store)
        return store


class _Datagrams:
    """A place of a process: a dead one says no last words."""

    def __init__(self, life: NetLife, place: Datagrams) -> None:
        self._life = life
        self._place = place

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if not self._life.dead:
            await self._place.send(data)

    async def receive(self) -> bytes:
        return await self._place.receive()

    def close(self) -> None:
        self._place.close()


class NetMember(Member):
    """A machine with a member of a set, or a broker that stands alone."""

    def __init__(self, net: NetSet, name: str) -> None:
        super().__init__(net, name)
        self.net = net

    def new_life(self, number: int) -> NetLife:
        return NetLife(self, number)

    @property
    def leads(self) -> bool:
        life = self.life
        return life is not None and not life.paused and life.broker.role in ("leader", "standalone")

    @property
    def epoch(self) -> int:
        return self.life.broker._role[1] if self.life is not None else 0

    @property
    def engine(self) -> Engine | None:
        """While it serves."""
        return self.life.broker._engine if self.life is not None else None


# ---- what is replaced


def _life() -> NetLife:
    life = PROCESS.get()
    assert isinstance(life, NetLife)
    return life


class SimServer(Server):
    """Listeners without sockets."""

    _life: NetLife | None = None

    async def bind(self) -> None:
        self._life = life = _life()
        self.urls = (url(life.member.name),)

    async def run(self) -> None:
        life = self._life
        assert life is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_heartbeats)
            async with trio.open_nursery() as connections:
                with self._accepting:
                    await self._accept(life, connections)
            nursery.cancel_scope.cancel()

    async def _accept(self, life: NetLife, connections: trio.Nursery) -> None:
        with life.member.net.network.listening(native(life.member.name), connections, self._handle):
            await trio.sleep_forever()

    async def _handle(self, stream: trio.abc.Stream) -> None:
        await self.serve_stream(stream, native=True)

    def close_listeners(self) -> None:
        if self._life is not None and not self._life.dead:
            self._life.member.net.network.stop_listening(native(self._life.member.name))
        super().close_listeners()


class _Committer:
    """A disk that takes its time."""

    def __init__(self, life: NetLife, store: Store) -> None:
        self._life = life
        self._store = store

    async def commit(self, batch: Any) -> None:
        store = self._store
        prepared = store.prepare(batch.changes, batch.position)
        await self._life.run_writing(lambda: store.write(prepared, True))
        self._life.sim.trace(f"{self._life.name} commits {batch.position}")


class _AloneTerm(AloneTerm):
    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.committer = _Committer(_life(), store)  # type: ignore[assignment]


async def _close(store: Any) -> None:
    store.close()


_plain_deliver = NativeConnection.deliver
_plain_receive = Links.receive
_plain_receive_run = Links.receive_run


def _deliver(self: NativeConnection, consumer: Any, entry: Any) -> None:
    note_delivery(self._engine, consumer, entry)
    _plain_deliver(self, consumer, entry)


def _receive(self: Links, link: Link, namespace: str, sequence: int, message: Any) -> bool:
    """A forwarded message is taken."""
    passed = message.route.passed  # before the message is made one of this broker's
    new = _plain_receive(self, link, namespace, sequence, message)
    _note_forwarded(self, passed, message, new)
    return new


def _receive_run(self: Links, link: Link, namespace: str, messages: Any) -> int:
    """Several are taken."""
    passed = [message.route.passed for _, message in messages]
    count = _plain_receive_run(self, link, namespace, messages)
    for before, (_, message) in zip(passed[:count], messages, strict=False):
        _note_forwarded(self, before, message, True)
    return count


def _note_forwarded(links: Links, passed: Any, message: Any, new: bool) -> None:
    life = _life()
    if not life.dead:
        life.sim.trace(f"{life.name} {'takes' if new else 'had'} {message.body[:8]!r} by {' '.join(passed)}")
        life.member.net.account.forward(links.name, passed, message.body, new)


def _numbered(kind: type) -> Any:
    """Objects hash by their number, so that sets of them have an order that the seed decides."""
    numbers = count()

    def number(self: Any) -> int:
        found = self.__dict__.get("simulated_number")
        if found is None:
            found = self.simulated_number = next(numbers)
        assert isinstance(found, int)
        return found

    return mock.patch.object(kind, "__hash__", number)


@contextmanager
def watched_network(rng: random.Random) -> Iterator[None]:
    """While a run lasts: no socket, thread, clock or random number of this machine is used. `rng`: for what has none of its own."""

    def randbits(bits: int) -> int:
        return rng.getrandbits(bits)

    async def open_store(_: Any) -> Store:
        return await _life().open_store()

    replaced: list[tuple[Any, str, Any]] = [
        (broker_module, "Server", SimServer),
        (keeper_module, "open_store", open_store),
        (keeper_module, "close_store", _close),
        (keeper_module, "AloneTerm", _AloneTerm),
        (NativeConnection, "deliver", _deliver),
        (Links, "receive", _receive),
        (Links, "receive_run", _receive_run),
        (native_server, "secrets", SimpleNamespace(randbits=randbits)),
        (remote_lifeline, "new_producer", lambda: rng.randbytes(16).hex()),
        (announcer_module, "secrets", SimpleNamespace(token_bytes=rng.randbytes)),
    ]
    with ExitStack() as stack:
        stack.enter_context(watched())
        for owner, name, replacement in replaced:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        for kind in (NativeConnection, LinkConnection, Link, RemoteSubscription):
            stack.enter_context(_numbered(kind))
        yield
