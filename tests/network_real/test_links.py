"""Brokers on hosts of their own that link, or must not: TLS, secrets, groups, networks without multicast; and the commands.

Each broker is a process, ``pybroker serve`` with a file of its own. What the links carry under faults is in `test_faults.py`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from pybroker.control import ask
from pybroker.errors import BrokerError
from tests.ensemble.namespaces import Namespaces, namespaces
from tests.network_real.sets import MULTICAST, NATIVE_PORT, SECRET
from tests.network_real.trial import ROOT
from tests.support.serving import ServedBroker, run_pybroker

pytestmark = pytest.mark.slow

TIMEOUT = 20.0  # seconds for anything that brokers have to do; a loaded machine takes its time
APART = 2.0  # seconds for which brokers that must not link are watched: a broker says ten times that it is there
POLL = 0.02
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

    def start(self, name: str, *, found: bool = True, peers: str = "", tls: dict[str, Path] | None = None, **fields: str) -> None:
        """Start one. `found`: by multicast; `peers`: names of those that it knows, divided by blanks; `fields`: of its network."""
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
        self._running[name].start()

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

    def carry(self, source: str, target: str, *, tls: dict[str, Path] | None = None) -> None:
        """Send to one and consume at the other."""
        words = [self.url(source, tls is not None), self.url(target, tls is not None), "50"]
        words += [f"{tls['certificate']},{tls['key']},{tls['peer_ca']}"] if tls is not None else []
        command = [*self.network.prefix("out"), sys.executable, "-m", "tests.network_real.carry", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=2 * TIMEOUT)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}\n{self.told()}"

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
    for name in "ab":
        brokers.start(name, tls=issue(tmp_path, ours, name, host(name)))
    brokers.wait_linked("a", "b")
    client = issue(tmp_path, ours, "out", host("out"))
    brokers.carry("a", "b", tls=client)
    brokers.carry("b", "a", tls=client)
    brokers.start("c", tls=issue(tmp_path, theirs, "c", host("c")))
    brokers.wait("c's certificate is refused", lambda: "certificate" in brokers.peers("a").get("c", {"trouble": ""})["trouble"])
    assert brokers.linked("c") == set()
    assert brokers.linked("a") == {"b"}


def test_a_wrong_secret_is_refused(brokers: Brokers):
    """Over multicast it is not even heard; who dials an address is told what is wrong. Others are not disturbed."""
    brokers.start("a", found=False)
    brokers.start("b", found=False, peers="a")
    brokers.wait_linked("a", "b")
    brokers.start("c", found=False, peers="a b", secret="another one")
    brokers.wait("it is told", lambda: any("secret" in peer["trouble"] for peer in brokers.peers("c").values()))
    brokers.start("d", found=False, peers="a b", secret="")
    brokers.wait("it is told", lambda: any("secret" in peer["trouble"] for peer in brokers.peers("d").values()))
    brokers.stay_apart("c", "d")
    assert brokers.linked("a") == {"b"}
    brokers.carry("b", "a")


def test_announcements_with_a_wrong_secret_are_not_believed(brokers: Brokers):
    for name, secret in (("a", SECRET), ("b", "another one"), ("c", "")):
        brokers.start(name, secret=secret)
    brokers.stay_apart("a", "b", "c")
    assert all(not brokers.peers(name) for name in "abc"), brokers.told()
    assert "secret" in brokers["a"].log()


def test_two_groups_on_one_address_do_not_see_each_other(brokers: Brokers):
    for name, group in (("a", "wards"), ("c", "labs"), ("b", "wards"), ("d", "labs")):
        brokers.start(name, group=group)
    brokers.wait_linked("a", "b")
    brokers.wait_linked("c", "d")
    brokers.carry("a", "b")
    brokers.carry("d", "c")
    time.sleep(APART)  # they are heard all the time, and stay unknown
    seen = {name: set(brokers.peers(name)) for name in "abcd"}
    assert seen == {"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}}


def test_given_addresses_where_multicast_is_blocked(tmp_path: Path):
    """a and b look for each other in vain; c knows both, and is the way between them."""
    with namespaces("a", "b", "c", "out") as network:
        network.block_multicast()
        with contextlib.closing(Brokers(tmp_path, network)) as brokers:
            brokers.start("a")
            brokers.start("b")
            brokers.stay_apart("a", "b")
            brokers.start("c", found=False, peers="a b")
            brokers.wait_linked("a", "c")
            brokers.wait_linked("b", "c")
            assert brokers.linked("a") == {"c"}
            brokers.carry("a", "b")
            brokers.carry("b", "a")
            brokers["c"].kill()
            brokers["c"].start()
            brokers.wait_linked("a", "c")
            brokers.wait_linked("b", "c")
            brokers.carry("a", "b")


def test_the_commands_show_the_network_and_remove_a_dead_peer(brokers: Brokers):
    """What b had on its way, and will not come back for, is consumed elsewhere once b is removed; the status says so each time."""
    for name in "abc":
        brokers.start(name)
    brokers.wait_linked("a", "b", "c")
    shown = run_pybroker("network", "status", "--data", brokers.data_dir("a"))
    assert shown.returncode == 0
    for text in ("broker a, group default", "linked", "b", "c"):
        assert text in shown.stdout.decode()
    refused = run_pybroker("network", "remove", "b", "--data", brokers.data_dir("a"))
    assert refused.returncode == 1
    assert b"linked" in refused.stderr
    brokers.carry("a", "b")
    brokers.carry("a", "c")
    brokers["b"].kill()
    brokers.wait("b is gone", lambda: brokers.linked("a") == {"c"})
    removed = run_pybroker("network", "remove", "b", "--data", brokers.data_dir("a"))
    assert removed.returncode == 0, removed.stderr
    assert b"peer b is forgotten" in removed.stdout
    answer = json.loads(run_pybroker("network", "status", "--json", "--data", brokers.data_dir("a")).stdout)
    assert [peer["name"] for peer in answer["peers"] if peer["state"] == "linked"] == ["c"]
    brokers.carry("a", "c")
    brokers["b"].start()
    brokers.wait_linked("a", "b", "c")
    brokers.carry("a", "b")
    unknown = run_pybroker("network", "remove", "x", "--data", brokers.data_dir("a"))
    assert unknown.returncode == 1
    assert b"known are: b, c" in unknown.stderr
