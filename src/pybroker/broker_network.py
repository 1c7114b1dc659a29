"""The network as one broker takes part in it, for one term: which links there are, and who is told of whom. Owns the links' lives.

DESIGN.md section 6. A peer that was heard is dialled by the lower of the two names (after a time of grace by the other one, too,
where the lower can't), addresses that were given are always dialled. Whoever it was: between two brokers one link stays (`admit`).
What crosses links is the core's affair, how it does is `link_connection`'s.
"""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from pybroker import network_status
from pybroker.cluster.announcer import Announcer
from pybroker.cluster.naming import network_group
from pybroker.cluster.native_urls import parse_native_url, parse_peer
from pybroker.cluster.peers import PeerTable
from pybroker.config import BrokerConfig
from pybroker.connections import say_last
from pybroker.engine import Engine
from pybroker.errors import BrokerError, ConfigurationError, LimitExceeded
from pybroker.link_connection import STOPPING, LinkConnection
from pybroker.link_dialling import Dialler
from pybroker.link_transport import Dial
from pybroker.protocols.link_handshake import (
    LINKED,
    NONCE_BYTES,
    OUTDATED,
    REPLACED,
    SECRET,
    Introduction,
    LinkRefused,
)
from pybroker.protocols.link_session import LinkSession
from pybroker.protocols.native_session import error_frame

log = logging.getLogger("pybroker.network")

TICK = 0.1  # seconds between two looks at the backlogs of queues that others send to
AFTER_ERROR = 5.0  # seconds until a task is run again that failed
NEEDS_SECRET = (
    "this broker lets nobody in without a login, and has no secret for links: set network.secret, the same at all brokers, or "
    'ask for links without one by name with network.allow = ["anonymous"]'
)
IN_DOUBT = (
    "{} of its messages can't be told from repeats, and wait there: stop this link, then `pybroker network remove {}` there gives "
    "them back to their queues"
)

Members = Mapping[str, tuple[str, ...]]  # name to native URLs


class Randomness(Protocol):
    """What is random in links."""

    def nonce(self) -> bytes: ...

    def random(self) -> float:
        """From 0 up to 1."""


class SystemRandomness:
    """From the operating system."""

    def nonce(self) -> bytes:
        return secrets.token_bytes(NONCE_BYTES)

    def random(self) -> float:
        return random.random()


class BrokerNetwork:
    """All links of a broker, while it serves.

    epoch     of this term
    urls      where others reach this broker
    peers     who is heard (kept up to date by somebody else); None: nobody listens
    announcer says that this broker is there; None: it is not to be found
    tell_members  is called with all brokers that are known, whenever that changes
    """

    def __init__(
        self,
        config: BrokerConfig,
        engine: Engine,
        *,
        epoch: int,
        urls: Sequence[str],
        software: str,
        dial: Dial,
        peers: PeerTable | None = None,
        announcer: Announcer | None = None,
        tell_members: Callable[[Members], None] = lambda members: None,
        randomness: Randomness | None = None,
    ) -> None:
        assert config.network is not None
        self.name = config.network_name
        self.group = network_group(config.network)
        self._config = config
        self._network = config.network
        self._secret = config.network.secret.encode() or None
        self._engine = engine
        self._epoch = epoch
        self._urls = tuple(urls)
        self._software = software
        self._dial_stream = dial
        self._peers = peers
        self._announcer = announcer
        self._tell = tell_members
        self._randomness = randomness or SystemRandomness()
        self._links: dict[str, LinkConnection] = {}  # up, by the peer's name
        self._connections: set[LinkConnection] = set()  # these, and those in their hand-shake
        self._diallers: list[Dialler] = []
        self._found: dict[str, Dialler] = {}  # those of peers that were heard
        self._changed = trio.Event()  # of `_links`
        self._stopping = False
        self._searching = trio.CancelScope()
        self._serving: trio.Nursery | None = None
        self._empty = trio.Event()

    # ---- life

    async def run(self) -> None:
        """Keep links until `stop` or cancelled. Announces `gone` at its end. Never raises but for cancellation."""
        try:
            async with trio.open_nursery() as self._serving:
                with self._searching:
                    async with trio.open_nursery() as searching:
                        self._tell_members()
                        for entry in self._network.peers:
                            urls = [address.url for address in parse_peer(entry)]
                            self._start(searching, Dialler(self, self._network, "", urls))
                        searching.start_soon(_fenced, self._run_ticks)
                        if self._announcer is not None:
                            searching.start_soon(_fenced, self._announcer.run)
                        if self._peers is not None:
                            searching.start_soon(_fenced, self._follow_peers, self._peers, searching)
                        await trio.sleep_forever()
        finally:
            self.stop()

    def stop(self) -> None:
        """Dial and accept nothing more, and end all links in good order: what was taken is committed and accepted."""
        self._stopping = True
        self._searching.cancel()
        for connection in list(self._connections):
            connection.end(None)

    async def wait_closed(self) -> None:
        """Wait until there is no connection of a link."""
        while self._connections:
            self._empty = trio.Event()
            await self._empty.wait()

    async def accept(self, stream: trio.abc.Stream, data: bytes) -> None:
        """Serve a link that another broker has dialled, until it ends; `data` was read of the stream already."""
        refusal: BrokerError | None = None
        if self._stopping:
            refusal = self._engine.error or STOPPING
        elif not self._config.anonymous and self._secret is None and "anonymous" not in self._network.allow:
            refusal = LinkRefused(SECRET, NEEDS_SECRET)
        if refusal is None:
            await self._serve(self._connection(stream, ""), data)
            return
        await say_last(stream, error_frame(refusal))

    def _connection(self, stream: trio.abc.Stream, address: str) -> LinkConnection:
        network = self._network
        own = Introduction(
            group=self.group,
            name=self.name,
            life=self._engine.core.links.life,
            epoch=self._epoch,
            nonce=self._randomness.nonce(),
            software=self._software,
            urls=self._urls,
            heartbeat=network.heartbeat_interval,
            frame_bytes_max=self._config.native.frame_bytes_max,
            messages_max=network.link_messages_max,
            bytes_max=network.link_bytes_max,
        )
        session = LinkSession(
            own, self._secret, dialled=bool(address), handshake_bytes_max=self._config.native.handshake_bytes_max
        )
        return LinkConnection(self, self._config, self._engine, stream, session, address)

    async def _serve(self, connection: LinkConnection, data: bytes = b"") -> None:
        self._connections.add(connection)
        if self._stopping:
            connection.end(None)
        try:
            await connection.run(data)
        finally:
            self._connections.discard(connection)
            if not self._connections:
                self._empty.set()

    # ---- which link stays (LinkOwner)

    def admit(self, connection: LinkConnection) -> None:
        """Let a link stand whose peer has proved who it is; the one that it replaces ends. Raises LinkRefused, LimitExceeded."""
        peer = connection.peer
        assert peer is not None
        before = self._links.get(peer.name)
        if before is not None:
            self._check_newer(before, connection, peer)
            before.end(LinkRefused(REPLACED, f"there is a newer link between {self.name} and {peer.name}"))
        known = self._engine.core.links.peers
        if peer.name not in known and len(known) >= self._network.peers_max:
            raise LimitExceeded(
                "network.peers_max",
                self._network.peers_max,
                f"broker {self.name} knows too many peers: `pybroker network remove` those that will not come back",
            )
        self._links[peer.name] = connection
        log.info("linked with %s (%s, %s)", peer.name, connection.address or "it has dialled", peer.software)
        self._links_changed()

    def _check_newer(self, before: LinkConnection, connection: LinkConnection, peer: Introduction) -> None:
        """Both ends decide alike: the dialler when it is welcomed, the other one when it has the dialler's proof."""
        known = before.peer
        assert known is not None
        if peer.life != known.life:
            if peer.epoch < known.epoch:
                text = (
                    f"{self.name} is linked with a later leader of {peer.name}: epoch {known.epoch}, not {peer.epoch}"
                )
                raise LinkRefused(OUTDATED, text)
            return
        dialled_by_lower = before.dialled == (self.name < peer.name)
        stays = dialled_by_lower if before.dialled != connection.dialled else before.dialled
        if stays:
            raise LinkRefused(LINKED, f"{self.name} and {peer.name} are linked already")

    def left(self, connection: LinkConnection) -> None:
        peer = connection.peer
        if peer is not None and self._links.get(peer.name) is connection:
            del self._links[peer.name]
            log.info("the link with %s has ended: %s", peer.name, connection.text)
            self._links_changed()

    def _links_changed(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
        self._tell_members()

    # ---- dialling (link_dialling.Owner)

    def random(self) -> float:
        return self._randomness.random()

    def missing(self, name: str, epoch: int) -> bool:
        """Whether there is no link with a peer, or only one with an earlier leader than that of an epoch."""
        link = self._links.get(name)
        return link is None or link.peer is None or link.peer.epoch < epoch

    async def wait_missing(self, name: str, epoch: int) -> None:
        while not self.missing(name, epoch):
            await self._changed.wait()

    async def dial(self, url: str) -> LinkConnection | str:
        """Dial, and let the link be served; or why there is no connection."""
        seconds = self._config.native.connect_timeout
        stream = None
        try:
            with trio.move_on_after(seconds):
                stream = await self._dial_stream(url)
        except (OSError, BrokerError) as error:
            return getattr(error, "strerror", None) or str(error) or type(error).__name__
        if stream is None:
            return f"no connection within {seconds:g} s"
        connection = self._connection(stream, url)
        assert self._serving is not None
        self._serving.start_soon(self._serve, connection)
        return connection

    def _start(self, nursery: trio.Nursery, dialler: Dialler) -> None:
        self._diallers.append(dialler)
        nursery.start_soon(self._keep, dialler)

    async def _keep(self, dialler: Dialler) -> None:
        try:
            await _fenced(dialler.run, bool(dialler.name) and dialler.name < self.name)
        finally:
            self._diallers.remove(dialler)

    async def _follow_peers(self, table: PeerTable, nursery: trio.Nursery) -> None:
        found = self._found
        snapshot = table.snapshot()
        while True:
            for name, peer in snapshot.peers.items():
                dialler = found.get(name)
                if dialler is not None and dialler in self._diallers:
                    dialler.update(peer.urls, peer.epoch)
                else:
                    found[name] = Dialler(self, self._network, name, peer.urls, peer.epoch)
                    self._start(nursery, found[name])
            for name in [name for name in found if name not in snapshot.peers]:
                found[name].give_up()
                if found[name] not in self._diallers:
                    del found[name]
            self._tell_members()
            snapshot = await table.wait_change(snapshot.version)

    # ---- demand by backlog

    async def _run_ticks(self) -> None:
        while self._engine.error is None:
            self._engine.begin_turn().links.tick()
            self._engine.end_turn()
            await trio.sleep(TICK)

    # ---- what others see

    def _tell_members(self) -> None:
        if self._stopping:
            return
        heard = {} if self._peers is None else {name: peer.urls for name, peer in self._peers.snapshot().peers.items()}
        linked = {name: _reachable(link.peer.urls) for name, link in self._links.items() if link.peer is not None}
        known = {**linked, **heard, self.name: self._urls}
        self._tell({name: known[name] for name in sorted(known) if known[name]})

    def status(self) -> dict[str, dict[str, Any]]:
        """By the peer's name (or, where nobody has answered yet, by the addresses): state, address, since, trouble."""
        now = trio.current_time()
        found: dict[str, dict[str, Any]] = {}
        for dialler in self._diallers:
            peer = dialler.link.peer if dialler.link is not None else None
            name = peer.name if peer is not None else dialler.name or ",".join(dialler.urls)
            found[name] = {
                "state": network_status.DIALLING if dialler.wanted else network_status.KEPT,
                "address": ",".join(dialler.urls),
                "seconds": None,
                "trouble": dialler.trouble,
            }
        for name, link in self._links.items():
            found[name] = {
                "state": network_status.LINKED,
                "address": link.address or "it has dialled",
                "seconds": now - link.since,
                "trouble": IN_DOUBT.format(link.in_doubt, self.name) if link.in_doubt else "",
            }
        return found


async def _fenced(task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """Run a task; an error in it is logged, and it is run again: a link must not stay away because of one."""
    while True:
        try:
            await task(*arguments)
            return
        except Exception:
            log.exception("an error in the network of this broker; it goes on in %g s", AFTER_ERROR)
            await trio.sleep(AFTER_ERROR)


def _reachable(urls: Sequence[str]) -> tuple[str, ...]:
    """Those of a peer's URLs that can be dialled."""
    found = []
    for url in urls:
        try:
            found.append(parse_native_url(url).url)
        except ConfigurationError as error:
            log.info("a peer says that it is reached where nobody can be: %s", error)
    return tuple(found)
