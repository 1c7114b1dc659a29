"""Case `hostile`: a producer and a consumer beside somebody who means harm, beside a busy neighbour who means none, and alone.

The attacker is a process of its own (`attacks.py`). It takes CPU time itself, which on two cores the others lack; so does the
neighbour, a producer of the same protocol that sends as fast as it can. So what an attack does to others is judged by their rate
beside the neighbour; how it compares with the rate alone is shown as well. Each measurement has a new server and store.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import ROOT, ServerFailed, cpu_seconds, memory, run_child, serving
from benchmarks.report import Rounds, Row
from benchmarks.settings import NotMeasurable, Settings

NEIGHBOUR = "neighbour"
SHARE = 0.5  # of the rate beside a neighbour
SECONDS_MAX = 2.0  # of one measurement
WARM_MESSAGES = 2_000
BEHIND_MAX = 4_000
ATTACKING_DEADLINE = 30.0


@dataclass(frozen=True, slots=True)
class Pair:
    """The well-behaved producer and consumer of one protocol."""

    scheme: str
    module: str
    arguments: tuple[str, ...]


PAIRS = (
    Pair("stomp", "benchmarks.load", ("pump", "--persistent", "--ack", "individual")),
    Pair("pybroker", "benchmarks.load_native", ("--behind", str(BEHIND_MAX))),
)


@contextmanager
def attacking(name: str, url: str, log: Path) -> Iterator[int]:
    """The attacker (or the neighbour) while the block runs; its process id."""
    command = [sys.executable, "-m", "benchmarks.attacks", name, "--url", url]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT)
    try:
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            ready = selector.select(ATTACKING_DEADLINE) and os.read(process.stdout.fileno(), 100)
        if not ready:
            raise ServerFailed(f"`{name}` did not begin: {log.read_bytes()[-3000:].decode(errors='replace')}")
        yield process.pid
        if process.poll() is not None:
            raise ServerFailed(f"`{name}` has ended: {log.read_bytes()[-3000:].decode(errors='replace')}")
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def measure(settings: Settings, pair: Pair, name: str, rounds: Rounds) -> None:
    """One measurement; without a name the pair is alone."""
    with settings.store() as data, serving(settings.server, data, f"{pair.scheme}://127.0.0.1:0") as server:
        beside = attacking(name, server.url, data.with_name("attack.log")) if name else nullcontext(0)
        with beside as attacker:
            before = cpu_seconds(attacker) if attacker else 0.0
            seconds = min(settings.seconds, SECONDS_MAX)
            flags = ["--url", server.url, "--pid", server.pid, "--seconds", seconds, "--warm", WARM_MESSAGES]
            result = run_child(pair.module, [*pair.arguments, *map(str, flags)])
            result["attacker_cpu"] = cpu_seconds(attacker) - before if attacker else 0.0
            result["server_memory"] = memory(server.pid).peak
    rounds.results.append(result)


def run(settings: Settings) -> Iterator[Row]:
    """For each protocol: alone, beside the neighbour, beside each attack, in turns."""
    if settings.server.name != "broker":
        raise NotMeasurable(f"`{settings.server.name}` is no broker that could be attacked")
    from benchmarks.attacks import ATTACKS  # here: it needs what the tests need

    for pair in PAIRS:
        names = ["", *ATTACKS[pair.scheme]]
        measured = {name: Rounds() for name in names}
        for _ in range(settings.rounds):
            for name in names:
                measure(settings, pair, name, measured[name])
                result, alone = measured[name].results[-1], measured[""].results[-1]
                settings.say(
                    f"{pair.scheme}, {name or 'alone'}: {result['rate']:,.0f} msg/s, "
                    f"{result['rate'] / alone['rate']:.2f} of alone; the server {result['server_memory'] / 1e6:,.0f} MB"
                )
        yield from rows(pair, measured)


def rows(pair: Pair, measured: dict[str, Rounds]) -> Iterator[Row]:
    """The figures of one protocol."""
    alone, neighbour = measured[""].median("rate"), measured[NEIGHBOUR].median("rate")
    for name, rounds in measured.items():
        rate = rounds.median("rate")
        attack = name not in ("", NEIGHBOUR)
        share = f" ({rate / alone:.0%} of alone)" if name else ""
        yield Row(
            case="hostile",
            name=f"{pair.scheme}, {name or 'alone'}{share}",
            figure=rate,
            unit="msg/s",
            low=min(rounds.values("rate")),
            high=max(rounds.values("rate")),
            beside="neighbour" if attack else "",
            beside_figure=neighbour if attack else None,
            target=f">= {SHARE:.0%} of it" if attack else "",
            met=rate >= SHARE * neighbour if attack else None,
            cpu_us=None if name else rounds.cpu_us,
            details={"ours": rounds.results},
        )
