"""kill -9 at random points under load, again and again: nothing confirmed is lost, nothing unexpected comes.

The broker is a real process on a real directory; producers and consumers are processes outside that reconnect and go on
(`outside.py`), and their ledgers are laid side by side at the end (`account.py`). DESIGN.md section 7, P1-P4.

With automatic acknowledgement a message counts as delivered when the broker's kernel took its bytes. On Linux what that
kernel took still reaches a consumer on the same machine after the broker's death, if the consumer reads to the end of
the stream and left nothing unread on the other side: so these consumers, too, must miss nothing.

PYBROKER_CRASH_RESTARTS and PYBROKER_CRASH_SEED change the number of restarts of each run and the seed; a failing run prints it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pybroker.control import ask
from pybroker.store.check import verify
from tests.crash.account import DLQ, Account, settle
from tests.crash.process import BrokerProcess
from tests.crash.wire import Connection

ROOT = Path(__file__).parent.parent.parent
RESTARTS = int(os.environ.get("PYBROKER_CRASH_RESTARTS", "26"))
SOAK_RESTARTS = 1_000
SEED = int(os.environ.get("PYBROKER_CRASH_SEED", str(random.randrange(1 << 32))))
LIFE = (0.02, 0.45)  # seconds from listening to the kill
EARLY = 0.15  # so many are killed before they listen
DRAIN_TIMEOUT = 60.0  # seconds until everything must have been consumed
CONFIG = """
[limits]
window_messages_max = {window}
[delivery]
deliveries_max = {deliveries}
expiry_interval = 0.2
"""


def roles(seed: int, backlog: int) -> dict[str, list[dict[str, Any]]]:
    """Who runs in which process."""
    pause = 0.002 if backlog else 0.0

    def producer(name: str, destination: str, resend: float = 0.7) -> dict[str, Any]:
        return {"role": "Producer", "name": name, "destination": destination, "window": 60, "resend": resend}

    def consumer(name: str, *destinations: str, ack: str = "client-individual", **more: Any) -> dict[str, Any]:
        return {"role": "Consumer", "name": name, "destinations": destinations, "ack": ack, "prefetch": 20} | more

    producers = [
        producer("p-single-a", "/queue/single"),
        producer("p-single-b", "/queue/single"),
        producer("p-shared", "/queue/shared"),
        producer("p-auto", "/queue/auto"),
        producer("p-in", "/queue/in", resend=0.0),
        producer("p-topic", "/topic/t"),
        {"role": "Transactor", "name": "p-tx", "destinations": ["/queue/tx1", "/queue/tx2"]},
    ]
    first = [
        consumer("c-single", "/queue/single", alone=True),
        consumer("c-shared-a", "/queue/shared"),
        consumer("c-auto", "/queue/auto", ack="auto", alone=True),
        consumer("c-tx", "/queue/tx1", "/queue/tx2", alone=True),
        consumer("c-dead", DLQ),
    ]
    second = [
        consumer("c-shared-b", "/queue/shared", ack="client"),
        consumer("c-mover", "/queue/in", role="Mover", to="/queue/out", moves=("/queue/in", "/queue/out")),
        consumer("c-out", "/queue/out", ack="client"),
        consumer("c-topic-a", "/topic/t", client_id="a", alone=True),
        consumer("c-topic-b", "/topic/t", client_id="b", ack="auto", alone=True),
    ]
    for role in (*producers, *first, *second):
        role |= {"seed": seed, "first": backlog, "pace": 120.0, "pause": pause if role in first + second else 0.01}
    return {"producers": producers, "consumers-1": first, "consumers-2": second}


class Outside:
    """The processes outside."""

    def __init__(self, directory: Path, specs: dict[str, list[dict[str, Any]]]) -> None:
        self._directory = directory
        self._specs = specs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        directory.mkdir()

    def start(self, *names: str) -> None:
        for name in names:
            (self._directory / f"{name}.json").write_text(json.dumps(self._specs[name]))
            command = [sys.executable, "-m", "tests.crash.outside", str(self._directory), name]
            self._processes[name] = subprocess.Popen(command, cwd=ROOT)

    def address(self, life: int, port: int) -> None:
        temporary = self._directory / "address.new"
        temporary.write_text(f"{life} {port}")
        temporary.replace(self._directory / "address")

    def tell(self, what: str) -> None:
        (self._directory / what).touch()

    def wait_ready(self, *names: str) -> None:
        """Wait until the roles have done their first part."""
        until = time.monotonic() + DRAIN_TIMEOUT
        while not all((self._directory / f"{name}.ready").exists() for name in names):
            self.check()
            assert time.monotonic() < until, f"not ready: {names}"
            time.sleep(0.01)

    def check(self) -> None:
        failed = [path.read_text() for path in self._directory.glob("*.failed")]
        assert not failed, "\n".join(failed)

    def wait_ended(self, *names: str) -> None:
        for name in names:
            try:
                status = self._processes[name].wait(DRAIN_TIMEOUT)
            finally:
                self.check()
            assert status == 0, (name, status)

    def ledgers(self) -> list[dict[str, Any]]:
        found = []
        for name, specs in self._specs.items():
            ledgers = json.loads((self._directory / f"{name}.ledger").read_text())
            for ledger, spec in zip(ledgers, specs, strict=True):
                found.append({key: spec[key] for key in ("destinations", "alone", "moves") if key in spec} | ledger)
        return found

    def end(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


def names(specs: list[dict[str, Any]]) -> list[str]:
    return [spec["name"] for spec in specs]


def run(directory: Path, seed: int, restarts: int, backlog: int) -> Account:
    """One run: `restarts` kills under load, then everything is consumed and accounted for."""
    rng = random.Random(seed)
    specs = roles(seed, backlog)
    outside = Outside(directory / "outside", specs)
    config = directory / "broker.toml"
    config.write_text(CONFIG.format(window=64 if backlog else 2_048, deliveries=6))
    data = directory / "data"
    broker = BrokerProcess(data, config)
    life = 1
    try:
        port = broker.port()
        assert port is not None
        outside.address(life, port)
        if backlog:
            topics = [spec for spec in specs["consumers-2"] if "client_id" in spec]
            make_subscriptions(port, topics)
            outside.start("producers")
            outside.wait_ready(*names(specs["producers"]))
            outside.start("consumers-1", "consumers-2")
        else:
            outside.start("consumers-1", "consumers-2")
            outside.wait_ready(*names(specs["consumers-1"] + specs["consumers-2"]))
            outside.start("producers")
            outside.wait_ready(*names(specs["producers"]))
        early = 0
        while life <= restarts:
            life += 1
            time.sleep(rng.uniform(*LIFE))
            broker.kill()
            outside.check()
            broker = BrokerProcess(data, config)
            if rng.random() < EARLY:
                port = broker.port(rng.uniform(0.0, 0.6))
                if port is None:
                    early += 1
                    continue
            else:
                port = broker.port()
            assert port is not None
            outside.address(life, port)
        if (port := port or broker.port()) is not None:
            outside.address(life, port)
        outside.tell("finish")
        outside.wait_ended("producers")
        wait_empty(data, outside)
        outside.tell("drained")
        outside.wait_ended("consumers-1", "consumers-2")
        assert broker.stop() == 0
    finally:
        broker.end()
        outside.end()
    report = verify(data)
    assert report.ok, report.problems
    account = settle(outside.ledgers())
    account.counts["restarts"] = life - 1
    account.counts["killed before they listened"] = early
    return account


def make_subscriptions(port: int, specs: list[dict[str, Any]]) -> None:
    """Durable subscriptions must be there before the first message is sent."""
    for spec in specs:
        connection = Connection(port, spec["client_id"])
        head = ("id", "1"), ("destination", spec["destinations"][0]), ("ack", "client")
        connection.send("SUBSCRIBE", *head, ("activemq.subscriptionName", spec["name"]), ("receipt", "r"))
        connection.receipt("r")
        connection.close()


def wait_empty(data: Path, outside: Outside) -> None:
    until = time.monotonic() + DRAIN_TIMEOUT
    while True:
        rows = [row for row in ask(data, "status")["destinations"] if row["depth"]]
        if not rows:
            return
        outside.check()
        assert time.monotonic() < until, f"not consumed: {rows}"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("backlog", [0, 600])
def test_killed_again_and_again(tmp_path: Path, backlog: int, request: pytest.FixtureRequest) -> None:
    soak = request.config.getoption("--soak", default=False)
    restarts = SOAK_RESTARTS if soak else RESTARTS
    print(f"PYBROKER_CRASH_SEED={SEED} restarts {restarts} backlog {backlog}")
    began = time.monotonic()
    account = run(tmp_path, SEED, restarts, backlog)
    print(account, f"in {time.monotonic() - began:.1f} s")
    assert not account.faults, f"PYBROKER_CRASH_SEED={SEED}\n{account}"
    counts = account.counts
    assert counts["restarts"] >= restarts
    for what in ("sent again", "redelivered", "acknowledged", "transactions", "moved"):
        assert counts[what] > 0, f"nothing {what}: the run shows nothing"
