"""A broker's membership in its network, over all its terms: hears who is there, and takes part in each term in which it serves.

Owns the table of peers and how others are reached; what happens in one term is `broker_network`'s.
"""

from __future__ import annotations

import logging

from pybroker.broker_network import BrokerNetwork, Randomness
from pybroker.cluster.announcer import Announcer, listen_for_peers
from pybroker.cluster.datagrams import Open
from pybroker.cluster.multicast import Multicast
from pybroker.cluster.naming import network_discovery, network_group
from pybroker.cluster.native_urls import SCHEMES
from pybroker.cluster.peers import PeerTable
from pybroker.committing import end_turn_committed
from pybroker.config import BrokerConfig
from pybroker.engine import Engine
from pybroker.errors import ConfigurationError, SendInDoubt
from pybroker.link_transport import Dial, make_dial
from pybroker.network_status import NetworkStatus, network_status
from pybroker.server import Server

log = logging.getLogger("pybroker.network")


class Membership:
    """One broker in its network. Without `BrokerConfig.network` there is nothing to do but to tell what an earlier one has left.

    dial, open_datagrams, randomness  TCP, UDP and the system's; others in tests
    """

    def __init__(
        self,
        config: BrokerConfig,
        software: str,
        *,
        dial: Dial | None = None,
        open_datagrams: Open = Multicast,
        randomness: Randomness | None = None,
    ) -> None:
        """Raises ConfigurationError for a certificate, key or authority that can't be used."""
        network = config.network
        self.peers: PeerTable | None = None
        self._config = config
        self._software = software
        self._open = open_datagrams
        self._randomness = randomness
        self._boots: set[bytes] = set()  # of all announcers of this process
        self._running: BrokerNetwork | None = None
        self._discovery = None
        if network is not None:
            self._dial = dial or make_dial(network)
            self._discovery = network_discovery(network)
            if self._discovery is not None:
                self.peers = PeerTable(
                    network.peer_timeout_intervals * network.announce_interval, network.peers_max, config.network_name
                )

    async def listen(self) -> None:
        """Hear who is there, until cancelled: also while another replica leads, so that this one knows where to go when it does."""
        network = self._config.network
        if network is not None and self._discovery is not None and self.peers is not None:
            await listen_for_peers(
                self._discovery,
                self.peers,
                group=network_group(network),
                secret=network.secret,
                own_boots=self._boots,
                open_datagrams=self._open,
            )

    async def serve(self, engine: Engine, server: Server, epoch: int) -> None:
        """Take part in one term: links come in by `server`, whose listeners are open. Until `stop`, or cancelled."""
        network = self._config.network
        if network is None:
            return
        urls = network.advertise or tuple(url for url in server.urls if url.partition("://")[0] in SCHEMES)
        running = BrokerNetwork(
            self._config,
            engine,
            epoch=epoch,
            urls=urls,
            software=self._software,
            dial=self._dial,
            peers=self.peers,
            announcer=self._announcer(urls, epoch),
            tell_members=server.set_members,
            randomness=self._randomness,
        )
        self._running = running
        server.accept_link = running.accept
        try:
            await running.run()
        finally:
            if self._running is running:
                self._running = None
            if server.accept_link == running.accept:
                server.accept_link = None

    def _announcer(self, urls: tuple[str, ...], epoch: int) -> Announcer | None:
        network = self._config.network
        if network is None or self._discovery is None:
            return None
        try:
            announcer = Announcer(
                self._discovery,
                name=self._config.network_name,
                node=self._config.name,
                epoch=epoch,
                urls=urls,
                group=network_group(network),
                secret=network.secret,
                interval=network.announce_interval,
                open_datagrams=self._open,
            )
        except ConfigurationError as error:
            log.error("this broker is not announced, and others do not find it: %s", error)
            return None
        self._boots.add(announcer.boot)
        return announcer

    def stop(self) -> None:
        """End all links of this term in good order."""
        if self._running is not None:
            self._running.stop()

    async def wait_closed(self) -> None:
        """Wait until there is no link."""
        if self._running is not None:
            await self._running.wait_closed()

    def status(self, engine: Engine) -> NetworkStatus:
        """The network at this moment."""
        network = self._config.network
        seen = self._running.status() if self._running is not None else {}
        name, group = (self._config.network_name, network_group(network)) if network is not None else ("", "")
        return network_status(engine.core.links, name, group, seen)


async def remove_peer(engine: Engine, name: str) -> int:
    """Forget a peer that will not come back; what was on its way to it returns to its queues, marked as redelivered.

    Returns how many messages that are, once it is committed. Raises BrokerError for a peer that is not known, or linked.
    """
    core = engine.begin_turn()
    count = core.links.remove(name)
    if not await end_turn_committed(engine):
        raise SendInDoubt(f"it is not known whether peer {name} was removed: the broker's store failed, or it stopped")
    return count
