"""Case `network`: what a hop over a link costs, two brokers on one machine, demand in a mesh of 20, a broker that joins.

Brokers are processes, linked over loopback, found by multicast on loopback; the mesh is one process (`mesh`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import trio

from benchmarks.native import LISTEN, WARM_MESSAGES
from benchmarks.processes import Server, run_child, serving
from benchmarks.report import Rounds, Row
from benchmarks.settings import NotMeasurable, Settings

BEHIND_MAX = 6_000  # messages that are on their way: fewer than a link takes, so that none of them waits in front of it
CORE_SHARE = 0.9  # of what one broker carries in a second of its CPU time, that each of two must carry
MESH_BROKERS = 20
MESH_SECONDS = 1.0  # from a new consumer to all brokers' knowing it
JOIN_BROKERS = 3
JOIN_TIMES = 1.2  # the 99th percentile that others may see while one joins, of that without


@contextmanager
def brokers(settings: Settings, count: int) -> Iterator[tuple[list[Server], str]]:
    """So many brokers that find each other, and where."""
    discovery = f"multicast://239.255.2.3:6155?group=benchmark-{os.getpid()}&interface=127.0.0.1"
    with ExitStack() as stack:
        found = []
        for number in range(count):
            data = stack.enter_context(settings.store())
            options = ["--name", f"broker-{number}", "--discovery", discovery]
            found.append(stack.enter_context(serving(settings.server, data, LISTEN, options)))
        yield found, discovery


def load(settings: Settings, servers: Sequence[Server], *arguments: str) -> list[str | int]:
    """Arguments of the load generator: from the first server to the last."""
    pids: list[str | int] = [part for server in servers for part in ("--pid", server.pid)]
    ends = ["--url", servers[0].url, "--to", servers[-1].url, "--seconds", str(settings.seconds)]
    return [*ends, *pids, "--warm", WARM_MESSAGES, *arguments]


def cpu(result: dict[str, Any]) -> list[float]:
    """Microseconds of each broker for a message."""
    return [used / result["messages"] * 1e6 for used in result["each_cpu"]]


# ---- a hop


def hop_row(name: str, alone: Rounds, linked: Rounds, flat_out: Rounds, judged: bool) -> Row:
    """What two brokers take beyond one that does the same work: as many messages a second.

    A broker takes less for a message the more of them come at once. One that goes as fast as it can
    works in larger batches: its figure has a row of its own.
    """
    hop = linked.cpu_us - alone.cpu_us
    return Row(
        case="network",
        name=f"CPU of a hop for a message, {name}",
        figure=hop,
        unit="µs",
        beside="one broker at that rate",
        beside_figure=alone.cpu_us,
        target="< one broker's own" if judged else "",
        met=hop < alone.cpu_us if judged else None,
        details={"alone": alone.results, "linked": linked.results, "flat_out": flat_out.results},
    )


def hop_rows(settings: Settings, name: str, arguments: tuple[str, ...], judged: bool) -> Iterator[Row]:
    """From one broker to the next, beside one broker at the same rate, and one as fast as it goes, in turns."""
    alone, linked, flat_out = Rounds(), Rounds(), Rounds()
    flow = ("--behind", str(BEHIND_MAX), *arguments)
    for _ in range(settings.rounds):
        for count, rounds in ((2, linked), (1, alone), (1, flat_out)):
            pace = ("--rate", str(linked.results[-1]["rate"])) if rounds is alone else ()
            with brokers(settings, count) as (servers, _):
                rounds.results.append(run_child("benchmarks.load_native", load(settings, servers, *flow, *pace)))
            parts = " + ".join(f"{each:.1f}" for each in cpu(rounds.results[-1]))
            settings.say(f"{name}, {count} broker(s): {rounds.results[-1]['rate']:,.0f} msg/s, {parts} µs CPU")
    yield hop_row(name, alone, linked, flat_out, judged)
    yield Row(
        case="network",
        name=f"    the same beside a broker that goes as fast as it can, {name}",
        figure=linked.cpu_us - flat_out.cpu_us,
        unit="µs",
        beside="one broker flat out",
        beside_figure=flat_out.cpu_us,
    )
    yield Row(
        case="network",
        name=f"    messages from one broker to the next, {name}",
        figure=linked.median("rate"),
        unit="msg/s",
        low=min(linked.values("rate")),
        high=max(linked.values("rate")),
        beside="one broker flat out",
        beside_figure=flat_out.median("rate"),
        cpu_us=linked.cpu_us,
    )


# ---- two brokers


def side_by_side(settings: Settings, servers: Sequence[Server]) -> dict[str, Any]:
    """Each broker with clients of its own, all at once: messages and CPU time of all."""
    results: list[dict[str, Any]] = []

    async def run_one(number: int, server: Server) -> None:
        # Each a destination of its own, so that nothing crosses the link.
        arguments = load(settings, [server], "--destination", f"/queue/benchmark.{number}")
        results.append(await trio.to_thread.run_sync(run_child, "benchmarks.load_native", arguments))

    async def run_all() -> None:
        async with trio.open_nursery() as nursery:
            for number, server in enumerate(servers):
                nursery.start_soon(run_one, number, server)

    trio.run(run_all)
    return {
        "messages": sum(result["messages"] for result in results),
        "rate": sum(result["rate"] for result in results),
        "server_cpu": sum(result["server_cpu"] for result in results),
        "each": results,
    }


def side_rows(settings: Settings) -> Iterator[Row]:
    """What a second of CPU time carries: with two brokers, beside one."""
    one, two = Rounds(), Rounds()
    for _ in range(settings.rounds):
        for count, rounds in ((1, one), (2, two)):
            with brokers(settings, count) as (servers, _):
                rounds.results.append(side_by_side(settings, servers))
            settings.say(f"{count} broker(s): {rounds.results[-1]['rate']:,.0f} msg/s, {rounds.cpu_us:.1f} µs CPU")
    yield side_row(one, two)


def side_row(one: Rounds, two: Rounds) -> Row:
    """What each carries by the CPU time that it takes."""
    carried = [1e6 / rounds.cpu_us for rounds in (two, one)]
    return Row(
        case="network",
        name="durable messages per core used, two brokers at once",
        figure=carried[0],
        unit="msg/core s",
        beside="one broker",
        beside_figure=carried[1],
        target=f">= {CORE_SHARE:.0%} of it",
        met=carried[0] >= CORE_SHARE * carried[1],
        details={"one": one.results, "two": two.results},
    )


# ---- a mesh, and one that joins


def mesh_rows(settings: Settings) -> Iterator[Row]:
    """Twenty brokers in one process."""
    count, rounds = (5, 3) if settings.quick else (MESH_BROKERS, 10)
    result = run_child("benchmarks.mesh", ["--brokers", count, "--rounds", rounds])
    slowest = max(result["demand"])
    settings.say(f"{count} brokers: slowest demand {slowest:.2f} s, linked after {result['built']:.1f} s")
    yield Row(
        case="network",
        name=f"a consumer at one of {count} brokers gets from all, slowest",
        figure=slowest,
        unit="s",
        low=min(result["demand"]),
        high=slowest,
        target=f"< {MESH_SECONDS:g}",
        met=slowest < MESH_SECONDS,
        details=result,
    )
    yield Row(
        case="network", name=f"    one more broker, until it gets from all {count}", figure=result["joined"], unit="s"
    )


def join_rows(settings: Settings) -> Iterator[Row]:
    """A broker joins others that are under a steady load."""
    length = ["--seconds", 1, "--rounds", 1] if settings.quick else []
    with brokers(settings, JOIN_BROKERS) as (servers, discovery):
        urls = [part for server in servers for part in ("--url", server.url)]
        result = run_child("benchmarks.joining", [*urls, "--discovery", discovery, *length])
    quiet, joining = result["quiet_p99_ms"], result["joining_p99_ms"]
    settings.say(f"p99 of a durable send {quiet:.2f} ms, {joining:.2f} ms while a broker joins")
    yield Row(
        case="network",
        name="durable send to confirmation while another broker joins, p99",
        figure=joining,
        unit="ms",
        low=min(each["p99_ms"] for each in result["joining"]),
        high=max(each["p99_ms"] for each in result["joining"]),
        beside="nobody joins",
        beside_figure=quiet,
        target=f"<= {JOIN_TIMES:g} times it",
        met=joining <= JOIN_TIMES * quiet,
        details=result,
    )


def run(settings: Settings) -> Iterator[Row]:
    """All four."""
    if settings.server.name != "broker":
        raise NotMeasurable(f"`{settings.server.name}` knows no network")
    yield from hop_rows(settings, "durable", (), True)
    yield from hop_rows(settings, "not durable", ("--volatile",), False)
    yield from side_rows(settings)
    yield from mesh_rows(settings)
    yield from join_rows(settings)
