"""Case `replication`: what three replicas cost beside a single broker, and how one that was away catches up.

Three replicas and three ZooKeeper servers on this machine, ``quorum_disk``: a confirmed send is on two disks. Set and single
broker take turns under the same load, each round with new processes and new stores. Catching up is in `catchup`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import catchup
from benchmarks.processes import BROKER, cpu_seconds, run_child, serving
from benchmarks.replicas import ensemble, replica_set
from benchmarks.report import Rounds, Row
from benchmarks.settings import Settings
from benchmarks.throughput import SHAPES, WARM_MESSAGES, Shape

RATE_SHARE = 0.5  # of the single broker's rate; or
CPU_TIMES = 1.5  # as much of the leader's processor time for a message as the single broker takes, at most
LATENCY_RATE = 500  # messages per second
LATENCY_SECONDS = 10
LATENCY_P99_MS = 25.0
DURABLE = tuple(shape for shape in SHAPES if "--persistent" in shape.arguments)

Measure = Callable[[str, int, Sequence[int]], dict[str, Any]]  # URL, pid of who leads, pids of its followers


@dataclass(frozen=True, slots=True)
class Sides:
    """The same load on the set and on the single broker: their rounds."""

    ours: Rounds = field(default_factory=Rounds)
    single: Rounds = field(default_factory=Rounds)


def take_turns(settings: Settings, hosts: str, what: str, measure: Measure) -> Sides:
    """Measure the single broker and the set, in turns."""
    sides = Sides()
    for number in range(settings.rounds):
        settings.say(f"{what}: round {number + 1} of {settings.rounds}")
        with settings.store() as data, serving(BROKER, data) as server:
            sides.single.results.append(measure(server.url, server.pid, ()))
        with replica_set(settings, hosts) as members:
            leader = members.wait_whole()
            pids = [member.pid for member in members.followers()]
            sides.ours.results.append(measure(leader.url, leader.pid, pids))
            members.wait_level()
    return sides


def pump(settings: Settings, shape: Shape) -> Measure:
    """Messages through one queue as fast as they go."""

    def measure(url: str, pid: int, followers: Sequence[int]) -> dict[str, Any]:
        before = [cpu_seconds(follower) for follower in followers]
        common = ["--url", url, "--pid", str(pid), "--seconds", str(settings.seconds), "--warm", str(WARM_MESSAGES)]
        result = run_child("benchmarks.load", ["pump", *common, *shape.arguments])
        used = [cpu_seconds(follower) - start for follower, start in zip(followers, before, strict=True)]
        counted = result["messages"] + WARM_MESSAGES
        result["follower_cpu_us"] = statistics.mean(used) / counted * 1e6 if used else 0.0
        result["leader_cpu_us"] = result["server_cpu"] / result["messages"] * 1e6
        followed = f", {result['follower_cpu_us']:.1f} µs at each follower" if followers else ""
        settings.say(
            f"{'set' if followers else 'single'}, {shape.name}: {result['rate']:,.0f} msg/s, "
            f"{result['leader_cpu_us']:.1f} µs CPU{followed}"
        )
        return result

    return measure


def throughput_rows(shape: Shape, sides: Sides) -> Iterator[Row]:
    """The rate is judged; where it misses, processor time may make up for it: five processes share the cores."""
    rate, single = sides.ours.median("rate"), sides.single.median("rate")
    cpu, single_cpu = sides.ours.cpu_us, sides.single.cpu_us
    yield Row(
        case="replication",
        name=shape.name,
        figure=rate,
        unit="msg/s",
        low=min(sides.ours.values("rate")),
        high=max(sides.ours.values("rate")),
        beside="single broker",
        beside_figure=single,
        target=f">= {RATE_SHARE:.0%} of it, or {CPU_TIMES:g} times its CPU",
        met=rate >= RATE_SHARE * single or cpu <= CPU_TIMES * single_cpu,
        cpu_us=cpu,
        details={"set": sides.ours.results, "single": sides.single.results},
    )
    yield Row(
        case="replication",
        name="    CPU of the leader for a message",
        figure=cpu,
        unit="µs",
        low=min(sides.ours.values("leader_cpu_us")),
        high=max(sides.ours.values("leader_cpu_us")),
        beside="single broker",
        beside_figure=single_cpu,
    )
    yield Row(
        case="replication",
        name="    CPU of each follower for a message",
        figure=sides.ours.median("follower_cpu_us"),
        unit="µs",
        low=min(sides.ours.values("follower_cpu_us")),
        high=max(sides.ours.values("follower_cpu_us")),
        beside="single broker",
        beside_figure=single_cpu,
    )


def paced(settings: Settings) -> Measure:
    """Durable messages at a rate far below what the set can do."""

    def measure(url: str, _: int, followers: Sequence[int]) -> dict[str, Any]:
        seconds = 3 if settings.quick else LATENCY_SECONDS
        result = run_child("benchmarks.load_paced", ["--url", url, "--rate", LATENCY_RATE, "--seconds", seconds])
        settings.say(
            f"{'set' if followers else 'single'} at {LATENCY_RATE} msg/s: receipt p99 "
            f"{result['receipt']['p99_ms']:.2f} ms, delivery p99 {result['delivery']['p99_ms']:.2f} ms, "
            f"generator late by p99 {result['lateness']['p99_ms']:.2f} ms"
        )
        return result

    return measure


def latency_rows(sides: Sides) -> Iterator[Row]:
    """Median of the rounds; the 99th percentile is judged."""
    for what in ("receipt", "delivery"):
        for percentile in ("p50", "p99", "max"):
            figures = [result[what][f"{percentile}_ms"] for result in sides.ours.results]
            figure = statistics.median(figures)
            judged = percentile == "p99"
            yield Row(
                case="replication",
                name=f"durable send to {what} at {LATENCY_RATE} msg/s, {percentile}",
                figure=figure,
                unit="ms",
                low=min(figures),
                high=max(figures),
                beside="single broker",
                beside_figure=statistics.median(result[what][f"{percentile}_ms"] for result in sides.single.results),
                target=f"< {LATENCY_P99_MS:g}" if judged else "",
                met=figure < LATENCY_P99_MS if judged else None,
                details={"set": sides.ours.results, "single": sides.single.results} if judged else {},
            )


def run(settings: Settings) -> Iterator[Row]:
    """Throughput, latency, catching up; one ensemble for all of it."""
    with ensemble(3) as servers:
        hosts = servers.addresses
        for shape in DURABLE:
            yield from throughput_rows(shape, take_turns(settings, hosts, shape.name, pump(settings, shape)))
        yield from latency_rows(take_turns(settings, hosts, "latency", paced(settings)))
        yield from catchup.run_behind(settings, hosts)
        yield from catchup.run_difference(settings, hosts)
