"""One trial: a set under the load of programs outside, whatever a test does to it, and the account at the end.

Owns the programs outside and the order of things: consumers subscribe before the first message is sent; at the end all that is
in a queue is consumed, all members must hold the same, and the ledgers are laid side by side.
"""

from __future__ import annotations

import itertools
import json
import random
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.crash.account import DLQ, Account
from tests.ensemble.account import settle
from tests.ensemble.replicas import POLL, ReplicaProcess, ReplicaSet

ROOT = Path(__file__).parent.parent.parent
OUTSIDE_TIMEOUT = 60.0  # seconds for anything that the programs outside have to do
SERVICE_TIMEOUT = 15.0  # seconds in which a set that can serve must confirm something
PACE = 40.0  # messages a second of each producer
PULSE_PACE = 250.0  # of the one that the gaps are measured with
_serial = itertools.count(1)


def roles(seed: int, addresses: Sequence[tuple[str, int]], pace: float) -> dict[str, list[dict[str, Any]]]:
    """Who runs in which process."""

    def producer(name: str, destination: str, resend: float = 1.0, **more: Any) -> dict[str, Any]:
        head = {"role": "Producer", "name": name, "destination": destination, "window": 60, "resend": resend}
        return head | {"pace": pace} | more

    def consumer(name: str, *destinations: str, ack: str = "client-individual", **more: Any) -> dict[str, Any]:
        return {"role": "Consumer", "name": name, "destinations": destinations, "ack": ack, "prefetch": 20} | more

    producers = [
        producer("p-pulse", "/queue/single", pace=PULSE_PACE),
        producer("p-single", "/queue/single", resend=0.7),
        producer("p-shared", "/queue/shared"),
        producer("p-in", "/queue/in", resend=0.0),
        producer("p-topic", "/topic/t"),
        producer("p-kept", "/queue/kept"),
        {"role": "Transactor", "name": "p-tx", "destinations": ["/queue/tx1", "/queue/tx2"]},
    ]
    consumers = [
        consumer("c-single", "/queue/single", alone=True, prefetch=100),
        consumer("c-shared-a", "/queue/shared"),
        consumer("c-shared-b", "/queue/shared", ack="client"),
        consumer("c-tx", "/queue/tx1", "/queue/tx2", alone=True),
        consumer("c-mover", "/queue/in", role="Mover", to="/queue/out", moves=("/queue/in", "/queue/out")),
        consumer("c-out", "/queue/out", ack="client"),
        consumer("c-topic", "/topic/t", client_id="t", alone=True),
        consumer(
            "c-kept", "/queue/kept", alone=True, after="finish", prefetch=100
        ),  # all of it lies in the stores until then
        consumer("c-dead", DLQ),
    ]
    for role in (*producers, *consumers):
        role |= {"seed": seed, "first": 0, "pause": 0.02 if role in producers else 0.0, "addresses": addresses}
    return {"producers": producers, "consumers": consumers}


class Trial:
    """A set with its programs outside.

    prefix  where the programs outside run (see `tests.ensemble.namespaces`)
    """

    def __init__(
        self,
        directory: Path,
        zookeeper: str,
        *,
        prefix: Sequence[str] = (),
        seed: int | None = None,
        pace: float = PACE,
        **options: Any,
    ) -> None:
        self.seed = random.randrange(1 << 32) if seed is None else seed
        self.set = ReplicaSet(directory, zookeeper, f"set-{next(_serial)}", **options)
        self._directory = directory / "outside"
        self._prefix = tuple(prefix)
        self._specs = roles(self.seed, [member.address for member in self.set.members], pace)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._directory.mkdir()
        self.began = time.monotonic()

    # ---- start

    def start(self) -> ReplicaProcess:
        """Start the set and its load; returns the leader once messages are confirmed to every producer."""
        for name, specs in self._specs.items():
            (self._directory / f"{name}.json").write_text(json.dumps(specs))
            command = [*self._prefix, sys.executable, "-m", "tests.ensemble.outside", str(self._directory), name]
            self._processes[name] = subprocess.Popen(command, cwd=ROOT)
        leader = self.set.start()
        self.tell("consumers.go")
        self._wait("every consumer subscribes", lambda: self._are_ready("consumers"))
        self.tell("producers.go")
        self._wait("every producer gets something confirmed", lambda: all(map(self._count, self._producers)))
        return leader

    @property
    def _producers(self) -> list[str]:
        return [spec["name"] for spec in self._specs["producers"]]

    def _are_ready(self, process: str) -> bool:
        names = [spec["name"] for spec in self._specs[process] if "after" not in spec]
        return all((self._directory / f"{name}.ready").exists() for name in names)

    def tell(self, what: str) -> None:
        (self._directory / what).touch()

    # ---- what the producers saw

    def _count(self, name: str) -> int:
        path = self._directory / f"{name}.times"
        return path.stat().st_size // 8 if path.exists() else 0

    def times(self, name: str = "p-pulse") -> list[float]:
        """When a producer got its receipts."""
        data = (self._directory / f"{name}.times").read_bytes()
        return [time for (time,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]

    def wait_confirming(self, count: int = 50, timeout: float = SERVICE_TIMEOUT) -> float:
        """Wait until so many more sends of the pulse were confirmed; the seconds that it took."""
        began = time.monotonic()
        wanted = self._count("p-pulse") + count
        self._wait(f"{count} more sends are confirmed", lambda: self._count("p-pulse") >= wanted, timeout)
        return time.monotonic() - began

    def serve_until(self, end: float) -> None:
        """See messages confirmed again and again until the time `end`."""
        while time.monotonic() < end:
            self.wait_confirming(10)

    def hold(self, seconds: float) -> None:
        """Let that time pass under load, served or not."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check()
            time.sleep(POLL)

    def gap(self, since: float) -> float:
        """The longest time between two receipts of the pulse, in seconds, from `since` to now."""
        times = self.times()
        before = [time for time in times if time < since][-1:]
        inside = before + [time for time in times if time >= since]
        return max((after - before for before, after in itertools.pairwise(inside)), default=0.0)

    def _wait(self, what: str, found: Callable[[], bool], timeout: float = OUTSIDE_TIMEOUT) -> None:
        until = time.monotonic() + timeout
        while not found():
            self.check()
            assert time.monotonic() < until, f"not within {timeout} s: {what}\n{self.set.told()}"
            time.sleep(POLL)

    def check(self) -> None:
        failed = [path.read_text() for path in self._directory.glob("*.failed")]
        assert not failed, "\n".join(failed)

    # ---- the end

    def settle(self) -> Account:
        """Consume all that is there, end everything, compare the members, and check every promise."""
        self.set.wait_whole()
        self.tell("finish")
        self._wait_ended("producers")
        self._wait("all queues are empty", self._is_empty)
        self.tell("drained")
        self._wait_ended("consumers")
        self.set.wait_equal()
        for member in self.set.members:
            member.kill()
        self.set.check_stores()
        ledgers = self._ledgers()
        account = settle(ledgers)
        account.counts["seconds"] = round(time.monotonic() - self.began)
        errors = sum((Counter(ledger["errors"]) for ledger in ledgers), Counter())
        print(account, "connections ended", *(f"{count} times: {text}" for text, count in errors.items()), sep="\n  ")
        assert not account.faults, f"seed {self.seed}\n{account}\n{self.set.told()}"
        for what in ("confirmed", "acknowledged", "transactions", "moved"):
            assert account.counts[what] > 0, f"nothing {what}: the trial shows nothing"
        return account

    def _is_empty(self) -> bool:
        leader = self.set.leader()
        status = leader.status() if leader is not None else None
        return status is not None and not any(row["depth"] for row in status["destinations"])

    def _wait_ended(self, name: str) -> None:
        self._wait(f"the {name} end", lambda: self._processes[name].poll() is not None)
        self.check()
        assert self._processes[name].returncode == 0, name

    def _ledgers(self) -> list[dict[str, Any]]:
        found = []
        for name, specs in self._specs.items():
            ledgers = json.loads((self._directory / f"{name}.ledger").read_text())
            for ledger, spec in zip(ledgers, specs, strict=True):
                found.append({key: spec[key] for key in ("destinations", "alone", "moves") if key in spec} | ledger)
        return found

    def close(self) -> None:
        self.set.close()
        for process in self._processes.values():
            process.kill()
            process.wait()


@contextmanager
def trial(directory: Path, zookeeper: str, **options: Any) -> Iterator[Trial]:
    """A `Trial` that runs for the length of the block."""
    found = Trial(directory, zookeeper, **options)
    try:
        found.start()
        yield found
    finally:
        found.close()
