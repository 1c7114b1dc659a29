"""One set of a simulated network: three replicas with a ZooKeeper of their own, or a broker that stands alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pybroker.cluster.memory import MemoryZooKeeper
from pybroker.config import BrokerConfig, NativeLimits, NetworkConfig, ReplicaSetConfig
from tests.sim.checkers import Positions
from tests.sim.net_member import NetMember, url
from tests.sim.one_set import Options, SimSet

if TYPE_CHECKING:
    from tests.sim.net_simulation import NetSimulation

DISCOVERY = "multicast://239.255.2.3:6155?interface=127.0.0.1"
SECRET = "of the network"
NATIVE = NativeLimits(connect_timeout=2.0, heartbeat_interval=0.5, heartbeat_timeout=2.0, write_timeout=2.0)


class NetSet(SimSet):
    """A set, of which the names of members are its own and a number."""

    def __init__(self, world: NetSimulation, name: str, size: int) -> None:
        self.world = world
        self.name = name
        self.seed = f"{world.seed} {name}"
        self.options = replace(Options(), names="123"[:size], heartbeat_interval=0.4)
        self.limits = world.options.limits
        self.counts = world.counts
        self.errors = world.errors
        self.findings = world.findings
        self.count = world.count
        self.trace = world.trace
        self.positions = Positions(world.findings)
        self.account = world.account
        self.network = world.network
        self.segment = world.segment
        self.zookeeper = MemoryZooKeeper(
            session_timeout=self.options.session_timeout, request_timeout=self.options.request_timeout
        )
        rng = random.Random(f"{self.seed} zookeeper")
        self.zookeeper.delay = lambda: rng.uniform(0.0005, 0.003)
        self.names = [f"{name}{number}" for number in self.options.names]
        self.members: dict[str, Any] = {}
        self.absent = False  # nobody starts it: it is not there yet, or never again

    @property
    def stands_alone(self) -> bool:
        return len(self.names) == 1

    def fill(self) -> None:
        """Make the members, once the run has begun."""
        self.nursery = self.world.nursery
        for name in self.names:
            self.members[name] = NetMember(self, name)

    def set_config(self, name: str) -> ReplicaSetConfig:
        options = self.options
        return ReplicaSetConfig(
            name=self.name,
            zookeeper="simulated",
            replicas=len(self.names),
            bind=name,
            sync="quorum_disk",
            secret="between us",
            session_timeout=options.session_timeout,
            heartbeat_interval=options.heartbeat_interval,
        )

    def broker_config(self, name: str) -> BrokerConfig:
        return BrokerConfig(
            name=name,
            limits=self.limits,
            native=NATIVE,
            delivery=self.world.options.delivery,
            network=self.network_config(),
        )

    def network_config(self) -> NetworkConfig:
        options = self.world.options
        peers = [
            ",".join(url(member) for member in other.names)
            for other in self.world.sets.values()
            if frozenset((self.name, other.name)) in options.pairs
        ]
        return NetworkConfig(
            name=self.name,
            discovery="" if options.pairs else DISCOVERY,
            peers=tuple(peers),
            secret=SECRET if options.secret else "",
            link_messages_max=options.link_messages_max,
            demand_backlog_max=options.demand_backlog_max,
            heartbeat_interval=0.4,
            heartbeat_timeout=1.5,
            retry_interval_max=1.0,
        )

    def serving(self) -> NetMember | None:
        """Who serves: of several that think so, the latest leader."""
        leaders = [member for member in self.members.values() if member.leads]
        return max(leaders, key=lambda member: member.epoch, default=None)

    def is_whole(self) -> bool:
        if self.absent:
            return True
        if self.stands_alone:
            return self.serving() is not None
        return super().is_whole()

    def describe(self) -> str:
        parts = [f"{name} {member.role} {member.refused}".strip() for name, member in self.members.items()]
        return f"{self.name}: {', '.join(parts)}"
