"""A network of sets under load, watched from outside: programs on a host of their own, and the account at the end.

Owns the programs and the time table of a trial. Native programs (`programs.py`) know one set by its addresses, or find whoever
is there by discovery; STOMP programs (`tests.ensemble.outside`) are beside them. Every subscription is known in the whole
network before the first message is sent; at the end all that is in a queue is consumed, wherever it lies.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.crash.account import DLQ, Account
from tests.ensemble.namespaces import Namespaces
from tests.ensemble.replicas import POLL
from tests.network_real.account import settle
from tests.network_real.sets import MULTICAST, SECRET, Sets

ROOT = Path(__file__).parent.parent.parent
OUTSIDE_TIMEOUT = 60.0  # seconds for anything that the programs outside have to do
PACE = 60.0  # messages a second of each producer
NATIVE, STOMP = "tests.network_real.programs", "tests.ensemble.outside"
PRODUCERS, CONSUMERS, STOMPERS = "producers", "consumers", "stompers"
FOUND = "found"  # a program that takes whatever broker it finds

Spec = dict[str, Any]


class Trial:
    """Two sets, "north" and "south", with their programs outside; more join with `add`.

    ordered   whether the account looks at the order, too: a network of two sets has only one way from one to the other, but with a
              third one messages go round a link that is cut while others wait for it
    """

    def __init__(
        self, directory: Path, network: Namespaces, zookeeper: str, *, ordered: bool, seed: int | None
    ) -> None:
        self.seed = random.randrange(1 << 32) if seed is None else seed
        self.sets = Sets(directory, network, zookeeper)
        self.network = network
        self.began = time.monotonic()
        self._ordered = ordered
        self._directory = directory / "outside"
        self._directory.mkdir()
        self._specs: dict[str, list[Spec]] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    # ---- programs

    def url(self, site: str) -> str:
        """Where a native program goes: to one set and no other, or to whoever is found."""
        if site == FOUND:
            return f"discovery:({MULTICAST}?interface={self.network.host('out')})"
        return f"failover:({','.join(self.sets.native_urls(site))})?learn=false"

    def native(self, role: str, name: str, site: str, **more: Any) -> Spec:
        spec = {"role": role, "name": name, "url": self.url(site), "secret": SECRET, "seed": self.seed}
        spec["wanders"] = site == FOUND
        spec |= {"pace": PACE, "window": 40} if role != "Consumer" else {"prefetch": 60}
        return spec | more

    def consumer(self, name: str, site: str, *destinations: str, **more: Any) -> Spec:
        return self.native("Consumer", name, site, destinations=destinations, **more)

    def stomp(self, name: str, site: str, *destinations: str, **more: Any) -> Spec:
        spec = {
            "role": "Consumer",
            "name": name,
            "destinations": destinations,
            "ack": "client-individual",
            "prefetch": 100,
        }
        return spec | {"seed": self.seed, "first": 0, "pause": 0.0, "addresses": self.sets.stomp_addresses(site)} | more

    def launch(self, process: str, module: str, *specs: Spec) -> None:
        """Start a process of programs; they begin when they are told ``PROCESS.go``."""
        (self._directory / f"{process}.json").write_text(json.dumps(specs))
        command = [*self.network.prefix("out"), sys.executable, "-m", module, str(self._directory), process]
        self._specs[process] = list(specs)
        self._processes[process] = subprocess.Popen(command, cwd=ROOT)

    def tell(self, what: str) -> None:
        (self._directory / what).touch()

    def go(self, *processes: str) -> None:
        """Let programs begin, and wait until each has done something; but those that come later by themselves."""
        for process in processes:
            self.tell(f"{process}.go")
        names = [spec["name"] for process in processes for spec in self._specs[process] if "after" not in spec]
        self.wait(f"{names} begin", lambda: all((self._directory / f"{name}.ready").exists() for name in names))

    # ---- start

    def start(self) -> None:
        """Start the sets and their load; returns once messages are confirmed to every producer."""
        self.sets.launch("north", "south")
        alone = {"alone": True} if self._ordered else {}
        self.launch(
            PRODUCERS,
            NATIVE,
            self.native("Producer", "p-pulse", "north", destination="/queue/pulse", window=1, pace=200.0),
            self.native("Producer", "p-one", "north", destination="/queue/one"),
            self.native("Producer", "p-two", "south", destination="/queue/two"),
            self.native("Producer", "p-found", FOUND, destination="/queue/found"),
            self.native("Producer", "p-topic", "north", destination="/topic/t"),
            self.native("Producer", "p-kept", "north", destination="/queue/kept", pace=20.0),
            self.native("Transactor", "p-tx", "south", destinations=["/queue/tx1", "/queue/tx2"], pace=40.0),
        )
        self.launch(
            CONSUMERS,
            NATIVE,
            self.consumer("c-pulse", "south", "/queue/pulse", **alone),
            self.consumer("c-one", "south", "/queue/one", **alone),
            self.consumer("c-two", "north", "/queue/two", **alone),
            self.consumer("c-found", FOUND, "/queue/found"),
            self.consumer("c-tx", "north", "/queue/tx1", "/queue/tx2", **alone),
            self.consumer("c-topic-native", "south", "/topic/t", client_id="t-native", **alone),
            self.consumer("c-kept", "south", "/queue/kept", after="finish", **alone),
        )
        self.launch(
            STOMPERS,
            STOMP,
            self.stomp("c-found-north", "north", "/queue/found"),
            self.stomp("c-found-south", "south", "/queue/found", ack="client"),
            self.stomp("c-topic-stomp", "south", "/topic/t", client_id="t", **alone),
            self.stomp("c-dead", "north", DLQ),
        )
        self.sets.master("north")
        self.sets.master("south")
        self.go(CONSUMERS, STOMPERS)
        self.sets.wait_joined()
        self.go(PRODUCERS)

    def add(self, site: str) -> None:
        """One more set joins, and has programs of its own (`add_programs`)."""
        self.sets.launch(site)
        self.add_programs(site)

    def add_programs(self, site: str) -> None:
        """Programs for a set that was launched: what they send is consumed elsewhere, and they consume what others send."""
        process = f"of-{site}"
        self.launch(
            process,
            NATIVE,
            self.native("Producer", f"p-{site}", site, destination="/queue/two"),
            self.consumer(f"c-{site}", site, "/queue/found", "/queue/one"),
        )
        self.sets.master(site)
        self.sets.wait_joined()
        self.go(process)

    # ---- what the programs saw

    def _count(self, name: str) -> int:
        path = self._directory / f"{name}.times"
        return path.stat().st_size // 8 if path.exists() else 0

    def times(self, name: str = "p-pulse") -> list[float]:
        """When a producer got its confirmations."""
        data = (self._directory / f"{name}.times").read_bytes()
        return [time for (time,) in struct.iter_unpack("d", data[: len(data) // 8 * 8])]

    def wait_confirming(self, *names: str, count: int = 50) -> None:
        """Wait until so many more sends of each of these producers were confirmed."""
        names = names or ("p-pulse", "p-two", "p-found")
        wanted = {name: self._count(name) + count for name in names}
        self.wait(
            f"{count} more sends of {names} are confirmed",
            lambda: all(self._count(name) >= wanted[name] for name in names),
        )

    def wait_received(self, site: str, peer: str, count: int = 20) -> None:
        """Wait until so many more messages have come to a set's master over its link with a peer."""

        def received() -> int:
            found: int = self.sets.view(site).get(peer, {"received": 0})["received"]
            return found

        lowest = received()

        def more() -> bool:
            nonlocal lowest
            now = received()
            lowest = min(lowest, now)  # another master counts from nothing
            return now >= lowest + count

        self.wait(f"{site} gets more from {peer}", more)

    def hold(self, seconds: float) -> None:
        """Let that time pass under load, served or not."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.check()
            time.sleep(POLL)

    def gap(self, since: float, name: str = "p-pulse") -> float:
        """The longest time between two confirmations of a producer, in seconds, from `since` to now."""
        times = self.times(name)
        before = [time for time in times if time < since][-1:]
        inside = before + [time for time in times if time >= since]
        return max((after - before for before, after in itertools.pairwise(inside)), default=0.0)

    def wait(self, what: str, found: Callable[[], bool], timeout: float = OUTSIDE_TIMEOUT) -> None:
        until = time.monotonic() + timeout
        while not found():
            self.check()
            assert time.monotonic() < until, f"not within {timeout} s: {what}\n{self.sets.told()}"
            time.sleep(POLL)

    def check(self) -> None:
        failed = [path.read_text() for path in self._directory.glob("*.failed")]
        assert not failed, "\n".join(failed)

    # ---- the end

    def settle(self) -> Account:
        """Consume all that is there, end everything, look at every store, and check every promise."""
        self.sets.wait_joined()
        self.tell("finish")
        self._wait_ended(PRODUCERS)
        self.wait("all queues are empty", self.sets.is_empty)
        self.tell("drained")
        for process in self._processes:
            self._wait_ended(process)
        self.sets.wait_quiet()
        views = {site: self.sets.view(site) for site in self.sets.names}
        self.sets.check_stores()
        ledgers = self.ledgers()
        account = settle(ledgers)
        account.counts["seconds"] = round(time.monotonic() - self.began)
        errors = sum((Counter(ledger["errors"]) for ledger in ledgers), Counter())
        print(account, *(f"{count} times: {text}" for text, count in errors.items()), sep="\n  ")
        for site, view in views.items():
            print(
                f"  {site}:",
                *(f"from {name} {peer['received']}, repeats {peer['repeats']};" for name, peer in view.items()),
            )
        assert not account.faults, f"seed {self.seed}\n{account}\n{self.sets.told()}"
        for what in ("confirmed", "acknowledged", "transactions"):
            assert account.counts[what] > 0, f"nothing {what}: the trial shows nothing"
        return account

    def _wait_ended(self, name: str) -> None:
        self.wait(f"the {name} end", lambda: self._processes[name].poll() is not None)
        self.check()
        assert self._processes[name].returncode == 0, name

    def ledgers(self) -> list[dict[str, Any]]:
        """What the programs wrote down. Only when they have ended."""
        found = []
        for name, specs in self._specs.items():
            ledgers = json.loads((self._directory / f"{name}.ledger").read_text())
            for ledger, spec in zip(ledgers, specs, strict=True):
                found.append({key: spec[key] for key in ("destinations", "alone", "wanders") if key in spec} | ledger)
        return found

    def close(self) -> None:
        self.sets.close()
        for process in self._processes.values():
            process.kill()
            process.wait()


@contextmanager
def trial(
    directory: Path, network: Namespaces, zookeeper: str, *, ordered: bool = True, seed: int | None = None
) -> Iterator[Trial]:
    """A `Trial` under load for the length of the block; all ways are open again after it."""
    found = Trial(directory, network, zookeeper, ordered=ordered, seed=seed)
    try:
        found.start()
        yield found
    finally:
        found.close()
        network.heal()
