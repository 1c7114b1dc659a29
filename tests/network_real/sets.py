"""Replica sets that are one network of brokers: each member a process on a host of its own, found by multicast only.

Owns the sets, their hosts and what their masters say of the network. DESIGN.md section 6. Blocking; every wait has an end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.ensemble.namespaces import Namespaces
from tests.ensemble.replicas import ReplicaProcess, ReplicaSet

SITES = ("north", "south", "east")
MEMBERS = "abc"
HOSTS = tuple(f"{site}-{member}" for site in SITES for member in MEMBERS)
NATIVE_PORT = 61620  # every host has its own
MULTICAST = "multicast://239.255.2.3:6155"
SECRET = "shared by a test's network"
SESSION_TIMEOUT = 10.0  # seconds: no failover here waits for it
TABLES = f"""
[native]
heartbeat_interval = 0.25
heartbeat_timeout = 1.0
[network]
secret = "{SECRET}"
allow = ["plaintext"]
announce_interval = 0.2
heartbeat_interval = 0.25
heartbeat_timeout = 1.5
retry_interval_max = 1.0
"""


class Sets:
    """The sets that were started, by name. `close` it in a finally, before the hosts end."""

    def __init__(self, directory: Path, network: Namespaces, zookeeper: str) -> None:
        self.network = network
        self._directory = directory
        self._zookeeper = zookeeper
        self._sets: dict[str, ReplicaSet] = {}

    @property
    def names(self) -> list[str]:
        return list(self._sets)

    def __getitem__(self, site: str) -> ReplicaSet:
        return self._sets[site]

    def launch(self, *sites: str) -> None:
        """Start all members of new sets, without waiting for anything."""
        for site in sites:
            directory = self._directory / site
            directory.mkdir()
            self._sets[site] = ReplicaSet(
                directory,
                self._zookeeper,
                f"{site}-{self._directory.name}",
                session_timeout=SESSION_TIMEOUT,
                hosts=[(self.network.host(host), self.network.prefix(host)) for host in self.hosts(site)],
                tables=f'{TABLES}name = "{site}"\n',
                flags=self._flags,
            )
            for member in self._sets[site].members:
                member.start()

    @staticmethod
    def _flags(host: str) -> list[str]:
        listen = f"pybroker://{host}:{NATIVE_PORT}?allow=plaintext,anonymous"
        return ["--listen", listen, "--discovery", f"{MULTICAST}?interface={host}"]

    @staticmethod
    def hosts(site: str) -> list[str]:
        """The names of a set's hosts, in the order of its members."""
        return [f"{site}-{member}" for member in MEMBERS]

    def native_urls(self, site: str) -> list[str]:
        return [f"pybroker://{self.network.host(host)}:{NATIVE_PORT}" for host in self.hosts(site)]

    def stomp_addresses(self, site: str) -> list[tuple[str, int]]:
        return [member.address for member in self._sets[site].members]

    # ---- masters

    def master(self, site: str) -> ReplicaProcess:
        """Who leads a set that is whole; waits until it is."""
        return self._sets[site].wait_whole()

    def failed_over(self, site: str, old: ReplicaProcess) -> ReplicaProcess:
        """Wait for another master than `old`, which led last."""
        return self._sets[site].wait_leader(old.roles[-1][1], without=old)

    def view(self, site: str) -> dict[str, dict[str, Any]]:
        """What a set's master says of each peer, by name; nothing while there is no master."""
        leader = self._sets[site].leader()
        status = leader.status("network-status") if leader is not None else None
        return {peer["name"]: peer for peer in (status or {"peers": []})["peers"]}

    def is_joined(self) -> bool:
        """Whether every master is linked with all others, and has heard all that these told of their demand."""
        views = {site: self.view(site) for site in self._sets}
        return all(
            other in view and view[other]["state"] == "linked" and view[other]["demand_in"] == back["demand_out"]
            for site, view in views.items()
            for other in self._sets
            if other != site
            for back in [views[other].get(site, {"demand_out": None})]
        )

    def wait_joined(self) -> None:
        self.wait("every master is linked with all others, and knows their demand", self.is_joined)

    def is_empty(self) -> bool:
        """Whether nothing lies in any queue, nor is on its way."""
        for site, each in self._sets.items():
            leader = each.leader()
            status = leader.status() if leader is not None else None
            if status is None or any(row["depth"] for row in status["destinations"]):
                return False
            if any(peer["waiting"] for peer in self.view(site).values()):
                return False
        return True

    def wait(self, what: str, found: Any) -> None:
        """Wait until `found` says something true."""
        next(iter(self._sets.values())).wait(what, found)

    # ---- the end

    def wait_quiet(self) -> None:
        """Wait until in each set all members hold the same, and nothing changes any more."""
        for each in self._sets.values():
            each.wait_whole()
            each.wait_equal()

    def check_stores(self) -> None:
        """End all members by force, and look at what each has stored."""
        for each in self._sets.values():
            for member in each.members:
                member.kill()
            each.check_stores()

    def told(self) -> str:
        views = "\n".join(f"{site} sees {self.view(site)}" for site in self._sets)
        return "\n".join([views, *(each.told() for each in self._sets.values())])

    def close(self) -> None:
        for each in self._sets.values():
            each.close()
