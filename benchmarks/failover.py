"""Case `failover`: how long no send is confirmed when the leader is killed, falls silent, or hands over.

Three replicas and three ZooKeeper servers on this machine, with a session timeout of ten seconds. A producer that knows the
three addresses sends every 3 ms and finds the leader by itself (`load_failover`). The *gap* is the longest time between two
receipts around the event. Where the time goes is read from what the replicas print and log.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.ensemble import namespaces

from benchmarks.load_failover import CONFIRMED, CONNECTED, RECORD
from benchmarks.processes import ROOT, ServerFailed
from benchmarks.replicas import SESSION_TIMEOUT, Member, Members, ensemble, replica_set
from benchmarks.report import Row
from benchmarks.settings import Settings

KILLS, SILENCES, CUTS, HANDOVERS = 20, 5, 5, 10
KILL_MEDIAN_MS, KILL_WORST_MS = 150.0, 500.0
HEARTBEAT_TIMEOUT = 1.0  # seconds, the configuration's default
SILENT_WORST_MS = HEARTBEAT_TIMEOUT * 1000 + 200.0
HANDOVER_WORST_MS = 100.0
SEND_INTERVAL = 0.003  # seconds between two sends
STEADY = 0.5  # seconds of confirmed sends before each event and after it
STEADY_GAP = 0.1  # seconds: with a longer gap in these the set is not at rest yet
DEADLINE = 60.0  # seconds for sends to be confirmed again

# Where the time goes: what a log says of each step; the steps of the one that is elected next, but `found`.
STEPS = ("death seen", "elected", "follower attached", "listening", "producer there", "first receipt")


class Load:
    """The running producer, and what it has noted so far."""

    def __init__(self, process: subprocess.Popen[bytes], times: Path) -> None:
        self._process = process
        self._times = times

    def records(self, since: float) -> list[tuple[float, int]]:
        """What happened from that time on."""
        data = self._times.read_bytes()
        whole = memoryview(data)[: len(data) - len(data) % RECORD.size]
        return [(at, what) for at, what in RECORD.iter_unpack(whole) if at >= since]

    def receipts(self, since: float) -> list[float]:
        """The times of receipts."""
        return [at for at, what in self.records(since) if what == CONFIRMED]

    def first(self, what: int, since: float) -> float | None:
        """When that happened first after `since`."""
        return next((at for at, found in self.records(since) if found == what), None)

    def wait_steady(self, connected_after: float = 0.0) -> None:
        """Wait until sends were confirmed for a while without a pause, over a connection made after that. Raises ServerFailed."""
        ends = time.monotonic() + DEADLINE
        while time.monotonic() < ends:
            if self._process.poll() is not None:
                raise ServerFailed("the producer ended")
            connected = self.first(CONNECTED, connected_after)
            since = time.monotonic() - STEADY
            if connected is not None and connected < since:
                times = [since, *self.receipts(since), time.monotonic()]
                if longest_gap(times) < STEADY_GAP:
                    return
            time.sleep(STEADY / 10)
        raise ServerFailed(f"no steady sends within {DEADLINE:g} s")

    def gap(self, event: float) -> float:
        """The longest time between two receipts from shortly before the event until now."""
        return longest_gap(self.receipts(event - STEADY))


def longest_gap(times: Sequence[float]) -> float:
    """The longest time between two neighbours; times rise."""
    return max((later - earlier for earlier, later in pairwise(times)), default=0.0)


@contextmanager
def producing(
    urls: Sequence[str], times: Path, prefix: Sequence[str] = (), interval: float = SEND_INTERVAL
) -> Iterator[Load]:
    """A producer that runs while the block does, and sends so often."""
    command = [*prefix, sys.executable, "-m", "benchmarks.load_failover", "--times", str(times)]
    command += ["--interval", str(interval)]
    for url in urls:
        command += ["--url", url]
    times.touch()
    with times.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log)
    try:
        yield Load(process, times)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens to a leader: `strike` it, and `mend` what is broken once another one leads."""

    name: str
    strike: Callable[[Member], None]
    mend: Callable[[Member], None]


def strike(load: Load, members: Members, event: Event) -> dict[str, Any]:
    """Let it happen once, wait until the set is whole again, and say how long it took; milliseconds."""
    leader = members.wait_whole()
    load.wait_steady()
    epoch = leader.role[1]
    marks = {member.name: member.log_size() for member in members}
    at = time.monotonic()
    event.strike(leader)
    following = members.wait_leader(epoch)
    load.wait_steady(at)
    gap = load.gap(at)
    result = {"gap_ms": gap * 1000, "leader": leader.name, "next": following.name}
    result["steps_ms"] = breakdown(load, members, following, at, marks)
    result["trace"] = trace(members, at, marks)
    event.mend(leader)
    members.wait_whole()
    return result


def breakdown(load: Load, members: Members, following: Member, at: float, marks: dict[str, int]) -> dict[str, float]:
    """When each of the steps was done, in milliseconds after the event; those that left a trace."""
    log = following.log_lines(marks[following.name])
    found = {
        "death seen": _logged(log, at, "no longer follows"),
        "elected": _logged(log, at, ": leader (epoch "),
        "follower attached": _logged(log, at, " attached at "),
        "listening": next((when for when, line in following.lines if when > at and line.startswith("listening")), None),
        "producer there": load.first(CONNECTED, at),
        "first receipt": load.first(CONFIRMED, load.first(CONNECTED, at) or at),
    }
    return {step: (when - at) * 1000 for step, when in found.items() if when is not None}


def trace(members: Members, at: float, marks: dict[str, int]) -> list[str]:
    """What all members printed and logged since the event, in order: milliseconds after it, name, text."""
    found = [
        (when, f"{member.name} log   {text}")
        for member in members
        for when, text in member.log_lines(marks[member.name])
    ]
    found += [(when, f"{member.name} print {text}") for member in members for when, text in member.lines]
    return [f"{(when - at) * 1000:7.1f} {text}" for when, text in sorted(found) if when > at - 0.01]


def _logged(log: Sequence[tuple[float, str]], at: float, words: str) -> float | None:
    return next((when for when, text in log if when > at - 0.002 and words in text), None)


def measure(settings: Settings, load: Load, members: Members, event: Event, times: int) -> list[dict[str, Any]]:
    """Let it happen so often."""
    results = []
    for number in range(times):
        result = strike(load, members, event)
        results.append(result)
        steps = ", ".join(f"{step} {ms:.0f}" for step, ms in result["steps_ms"].items())
        settings.say(f"{event.name} {number + 1} of {times}: gap {result['gap_ms']:.0f} ms ({steps})")
    return results


def rows(event: Event, results: list[dict[str, Any]], median_ms: float | None, worst_ms: float) -> Iterator[Row]:
    """Median and worst with their targets, then where the time went."""
    gaps = [result["gap_ms"] for result in results]
    median = statistics.median(gaps)
    yield Row(
        case="failover",
        name=f"{event.name}, median of {len(gaps)}",
        figure=median,
        unit="ms",
        low=min(gaps),
        high=max(gaps),
        target=f"< {median_ms:g}" if median_ms else "",
        met=median < median_ms if median_ms else None,
        details={"results": results},
    )
    yield Row(
        case="failover",
        name=f"{event.name}, worst of {len(gaps)}",
        figure=max(gaps),
        unit="ms",
        target=f"< {worst_ms:g}",
        met=max(gaps) < worst_ms,
    )
    for step in STEPS:
        at = [result["steps_ms"][step] for result in results if step in result["steps_ms"]]
        if at:
            yield Row(
                case="failover",
                name=f"    of it until: {step}",
                figure=statistics.median(at),
                unit="ms",
                low=min(at),
                high=max(at),
            )


def kill(member: Member) -> None:
    member.send_signal(signal.SIGKILL)


def hand_over(member: Member) -> None:
    member.send_signal(signal.SIGTERM)


def start_again(member: Member) -> None:
    status = member.wait_ended()
    if status not in (0, -signal.SIGKILL):
        raise ServerFailed(f"replica {member.name} ended with {status}\n{member.last_words()}")
    member.start()


def run(settings: Settings) -> Iterator[Row]:
    """Kill, silence and hand over on loopback; then cut links, where network namespaces can be made."""
    killed = Event("gap after kill -9 of the leader", kill, start_again)
    silent = Event(
        "gap after the leader stands still (SIGSTOP)",
        lambda member: member.send_signal(signal.SIGSTOP),
        lambda member: member.send_signal(signal.SIGCONT),
    )
    handed = Event("gap of a hand-over (SIGTERM)", hand_over, start_again)
    settings.say(f"starting ZooKeeper and three replicas, session timeout {SESSION_TIMEOUT:g} s")
    with (
        ensemble(3) as servers,
        replica_set(settings, servers.addresses) as members,
        producing(members.urls, members.directory / "times") as load,
    ):
        few = 2 if settings.quick else 0
        yield from rows(killed, measure(settings, load, members, killed, few or KILLS), KILL_MEDIAN_MS, KILL_WORST_MS)
        yield from rows(silent, measure(settings, load, members, silent, few or SILENCES), None, SILENT_WORST_MS)
        yield from rows(handed, measure(settings, load, members, handed, few or HANDOVERS), None, HANDOVER_WORST_MS)
    yield from run_cut(settings)


def run_cut(settings: Settings) -> Iterator[Row]:
    """A leader that nobody hears, and that hears nobody: each replica, the ensemble and the producer on a host of their own."""
    if namespaces.missing():
        settings.say(f"cut links are not measured: {namespaces.missing()}")
        return
    hosts = ("a", "b", "c", "zookeeper", "producer")
    with ExitStack() as stack:
        spaces = stack.enter_context(namespaces.namespaces(*hosts))
        servers = stack.enter_context(
            ensemble(3, hosts=[spaces.host("zookeeper")] * 3, prefixes=[spaces.prefix("zookeeper")] * 3)
        )
        places = [(spaces.host(name), spaces.prefix(name)) for name in hosts[:3]]
        members = stack.enter_context(
            replica_set(settings, servers.addresses, table=['allow = ["plaintext"]'], places=places)
        )
        load = stack.enter_context(producing(members.urls, members.directory / "times", spaces.prefix("producer")))
        cut = Event(
            "gap after the leader was cut off, silently",
            lambda member: spaces.cut([member.name], [name for name in hosts if name != member.name]),
            lambda _: spaces.heal(),
        )
        yield from rows(
            cut, measure(settings, load, members, cut, 2 if settings.quick else CUTS), None, SILENT_WORST_MS
        )
