"""Brokers on hosts of their own that link, or must not: TLS, secrets, groups, networks without multicast; and the commands.

Each broker is a process, ``pybroker serve`` with a file of its own. What the links carry under faults is in `test_faults.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from pybroker.control import ask
from pybroker.errors import BrokerError
from tests.ensemble.namespaces import Namespaces, namespaces
from tests.network_real.sets import MULTICAST, NATIVE_PORT, SECRET
from tests.network_real.trial import ROOT
from tests.support.serving import ServedBroker, call_pybroker

pytestmark = pytest.mark.slow

TIMEOUT = 20.0  # seconds for anything that brokers have to do; a loaded machine takes its time
APART = 2.0  # seconds for which brokers that must not link are watched: a broker says ten times that it is there
POLL = 0.02
STRANDED = 20  # messages for a broker that does not come back
TIMES = "announce_interval = 0.2\nheartbeat_interval = 0.25\nheartbeat_timeout = 1.5\nretry_interval_max = 0.5\n"

Peers = dict[str, dict[str, Any]]


class Brokers:
    """Brokers by the name of their host, which is their own name, too."""

    def __init__(self, directory: Path, network: Namespaces) -> None:
        self.network = network
        self._directory = directory
        self._running: dict[str, ServedBroker] = {}

    def url(self, name: str, tls: bool = False) -> str:
        return f"pybroker{'+ssl' * tls}://{self.network.host(name)}:{NATIVE_PORT}"

    def launch(
        self, name: str, *, found: bool = True, peers: str = "", tls: dict[str, Path] | None = None, **fields: str
    ) -> None:
        """Start one, without waiting.

        `found`: by multicast; `peers`: names of those whose addresses it is given, divided by blanks; `fields`: of its network.
        """
        network = {"secret": SECRET, "allow": ["plaintext", "anonymous"]} | fields
        network |= {"discovery": f"{MULTICAST}?interface={self.network.host(name)}"} if found else {}
        network |= {"peers": [self.url(peer, tls is not None) for peer in peers.split()]}
        listen = f"{self.url(name)}?allow=plaintext,anonymous"
        if tls is not None:
            network |= {field: str(path) for field, path in tls.items()} | {"allow": []}
            words = f"cert={tls['certificate']}&key={tls['key']}&client_ca={tls['peer_ca']}&allow=anonymous"
            listen = f"{self.url(name, True)}?{words}"
        lines = "".join(f"{field} = {json.dumps(value)}\n" for field, value in network.items())
        config = self._directory / f"{name}.toml"
        config.write_text(f"[limits]\ndisk_free_bytes_min = 0\n[network]\n{lines}{TIMES}")
        self._running[name] = ServedBroker(
            self.data_dir(name), config, "--name", name, listen=[listen], prefix=self.network.prefix(name)
        )
        self._running[name].launch()

    def wait_listening(self) -> None:
        """Wait until all that were launched listen."""
        for broker in self._running.values():
            if not broker.urls:
                broker.wait_listening()

    def __getitem__(self, name: str) -> ServedBroker:
        return self._running[name]

    def data_dir(self, name: str) -> Path:
        return self._directory / name

    def peers(self, name: str) -> Peers:
        """What a broker says of its peers, by name (of those that have not answered: by address)."""
        peers = ask(self.data_dir(name), "network-status")["peers"]
        return {peer["name"] or peer["address"]: peer for peer in peers}

    def linked(self, name: str) -> set[str]:
        return {peer for peer, row in self.peers(name).items() if row["state"] == "linked"}

    def wait(self, what: str, found: Callable[[], Any]) -> None:
        until = time.monotonic() + TIMEOUT
        while not found():
            assert time.monotonic() < until, f"not within {TIMEOUT} s: {what}\n{self.told()}"
            time.sleep(POLL)

    def wait_linked(self, *names: str) -> None:
        """Wait until each of these is linked with all others of them."""
        self.wait(f"{names} are linked", lambda: all(set(names) - {name} <= self.linked(name) for name in names))

    def stay_apart(self, *names: str) -> None:
        """See that these have no links at all, for so long that they would have made some."""
        until = time.monotonic() + APART
        while time.monotonic() < until:
            assert all(not self.linked(name) for name in names), self.told()
            time.sleep(POLL)

    @contextmanager
    def outside(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A program of `tests.network_real.carry`, while the block runs."""
        command = [*self.network.prefix("out"), sys.executable, "-m", "tests.network_real.carry", *words]
        program = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True)
        try:
            yield program
        finally:
            program.kill()
            program.wait()

    def carry(self, source: str, target: str, *, tls: dict[str, Path] | None = None) -> None:
        """Send to one and consume at the other; in order, so not before the shortest way is known (others may be told of first)."""
        words = [self.url(source, tls is not None), self.url(target, tls is not None), "50"]
        words += [f"{tls['certificate']},{tls['key']},{tls['peer_ca']}"] if tls is not None else []
        with self.outside("carry", *words) as program:
            self.wait(f"{target}'s demand is known", lambda: self._asked_for(source, target))
            print("send", file=program.stdin, flush=True)
            assert program.wait(2 * TIMEOUT) == 0, self.told()

    def _asked_for(self, source: str, target: str) -> bool:
        """Whether a broker knows of demand: the other one's, if they are linked, or what it was told by those between them."""
        peers = {name: row for name, row in self.peers(source).items() if row["state"] == "linked"}
        asking = {name for name, row in peers.items() if row["demand_in"]}
        return target in asking if target in peers else bool(asking)

    def told(self) -> str:
        text = []
        for name, broker in self._running.items():
            with contextlib.suppress(BrokerError):
                text.append(f"{name} sees {self.peers(name)}")
            text.append(broker.log()[-3000:])
        return "\n".join(text)

    def close(self) -> None:
        for broker in self._running.values():
            broker.close()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Namespaces]:
    with namespaces("a", "b", "c", "d", "out") as network:
        yield network


@pytest.fixture
def brokers(tmp_path: Path, hosts: Namespaces) -> Iterator[Brokers]:
    found = Brokers(tmp_path, hosts)
    try:
        yield found
    finally:
        found.close()
        hosts.heal()


def issue(directory: Path, authority: trustme.CA, name: str, host: str) -> dict[str, Path]:
    """A certificate for a host, its key, and the authority's: PEM files by their field in the configuration."""
    files = {field: directory / f"{name}-{field}.pem" for field in ("certificate", "key", "peer_ca")}
    issued = authority.issue_cert(host)
    issued.cert_chain_pems[0].write_to_path(files["certificate"])
    issued.private_key_pem.write_to_path(files["key"])
    authority.cert_pem.write_to_path(files["peer_ca"])
    return files


def test_links_over_tls_between_brokers_that_hear_each_other(tmp_path: Path, brokers: Brokers):
    """Both ends show certificates; a broker with one of another authority is heard, and not let in."""
    ours, theirs = trustme.CA(), trustme.CA()
    host = brokers.network.host
    for name, authority in (("a", ours), ("b", ours), ("c", theirs)):
        brokers.launch(name, tls=issue(tmp_path, authority, name, host(name)))
    brokers.wait_listening()
    brokers.wait_linked("a", "b")
    client = issue(tmp_path, ours, "out", host("out"))
    brokers.carry("a", "b", tls=client)
    brokers.carry("b", "a", tls=client)
    brokers.wait(
        "c's certificate is refused", lambda: "certificate" in brokers.peers("a").get("c", {"trouble": ""})["trouble"]
    )
    assert brokers.linked("c") == set()
    assert brokers.linked("a") == {"b"}


def test_a_wrong_secret_is_refused(brokers: Brokers):
    """Over multicast it is not even heard; who dials an address is told what is wrong. Others are not disturbed."""
    brokers.launch("a")
    brokers.launch("b")
    brokers.launch("c", peers="a b", secret="another one")
    brokers.launch("d", peers="a b", secret="")
    brokers.wait_listening()
    brokers.wait_linked("a", "b")

    def is_told(name: str) -> bool:
        peers = brokers.peers(name)
        return len(peers) == 2 and all("secret" in row["trouble"] for row in peers.values())

    for name in "cd":
        brokers.wait(f"{name} is told", lambda name=name: is_told(name))
    brokers.stay_apart("c", "d")
    assert set(brokers.peers("a")) == {"b"}
    for text in ("has another secret", "is not signed, and a secret is set here"):
        assert text in brokers["a"].log()
    brokers.carry("b", "a")


def test_two_groups_on_one_address_do_not_see_each_other(brokers: Brokers):
    groups = {"a": "wards", "b": "wards", "c": "labs", "d": "labs"}
    for name, group in groups.items():
        brokers.launch(name, group=group)
    brokers.wait_listening()
    brokers.wait_linked("a", "b")
    brokers.wait_linked("c", "d")
    brokers.carry("a", "b")
    brokers.carry("d", "c")
    seen = {name: set(brokers.peers(name)) for name in groups}  # they have announced themselves all the time
    assert seen == {"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}}


def test_given_addresses_where_multicast_is_blocked(tmp_path: Path):
    """a and b look for each other in vain; c knows both, and is the way between them."""
    with namespaces("a", "b", "c", "out") as network:
        network.block_multicast()
        with contextlib.closing(Brokers(tmp_path, network)) as brokers:
            brokers.launch("a")
            brokers.launch("b")
            brokers.wait_listening()
            brokers.stay_apart("a", "b")
            brokers.launch("c", found=False, peers="a b")
            brokers.wait_listening()
            brokers.wait_linked("a", "c")
            brokers.wait_linked("b", "c")
            assert brokers.linked("a") == {"c"}
            brokers.carry("a", "b")
            brokers["c"].kill()
            brokers["c"].start()
            brokers.wait_linked("a", "c")
            brokers.wait_linked("b", "c")
            brokers.carry("b", "a")


def test_the_commands_show_the_network_and_remove_a_dead_peer(brokers: Brokers):
    """What was on its way to b, which will not come back, waits for it; removed, it is consumed elsewhere, marked."""
    for name in "abc":
        brokers.launch(name)
    brokers.wait_listening()
    brokers.wait_linked("a", "b", "c")
    data = brokers.data_dir("a")
    shown = call_pybroker("network", "status", "--data", data)
    assert shown.returncode == 0
    rows = [line.strip("│").split("│") for line in shown.stdout.decode().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[:2]] for row in rows] == [["b", "linked"], ["c", "linked"]]
    refused = call_pybroker("network", "remove", "b", "--data", data)
    assert refused.returncode == 1
    assert b"linked" in refused.stderr

    with brokers.outside("strand", brokers.url("a"), brokers.url("b"), str(STRANDED)) as program:
        brokers.wait("b's demand is known", lambda: brokers.peers("a")["b"]["demand_in"] == 1)
        os.kill(brokers["b"].pid, signal.SIGSTOP)
        print("send", file=program.stdin, flush=True)
        brokers.wait("all is on its way", lambda: brokers.peers("a")["b"]["waiting"] == STRANDED)
        brokers["b"].kill()
        brokers.wait("b is gone", lambda: brokers.linked("a") == {"c"})
        assert brokers.peers("a")["b"]["in_doubt"] == STRANDED
        removed = call_pybroker("network", "remove", "b", "--data", data)
    assert removed.returncode == 0, removed.stderr
    assert (
        f"peer b is forgotten; messages that were on their way to it and return to their queues: {STRANDED}\n".encode()
        in (removed.stdout)
    )
    answer = json.loads(call_pybroker("network", "status", "--json", "--data", data).stdout)
    assert [peer["name"] for peer in answer["peers"] if peer["state"] == "linked"] == ["c"]
    with brokers.outside("drain", brokers.url("c"), str(STRANDED)) as program:
        assert program.wait(2 * TIMEOUT) == 0
    brokers["b"].start()
    brokers.wait_linked("a", "b", "c")
    brokers.carry("a", "b")
    unknown = call_pybroker("network", "remove", "x", "--data", data)
    assert unknown.returncode == 1
    assert b"peer x is not known here" in unknown.stderr
