"""Case `stomp`: messages end to end over loopback, beside the trial, and the trial beside bare plyvel.

Server and trial take turns (A B A B ...), each with a new process and a new store, so that a change in the machine's
pace meets both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.processes import TRIAL, Kind, run_child, serving
from benchmarks.report import Rounds, Row
from benchmarks.settings import Settings

TRIAL_SHARE = 0.6  # of the trial's rate, which meets the target as well as the absolute figure does
BARE_SHARE = 1 / 3  # of bare plyvel that the trial must reach, or it is no bar
WARM_MESSAGES = 5_000
BARE_MESSAGES = 400_000


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to load a queue."""

    name: str
    arguments: tuple[str, ...]
    target: int  # messages per second


SHAPES = (
    Shape("non-persistent, auto ack", (), 80_000),
    Shape("persistent, auto ack", ("--persistent",), 30_000),
    Shape("persistent, individual acks", ("--persistent", "--ack", "individual"), 25_000),
)


def bare_rate(settings: Settings) -> float:
    """Bare plyvel on this disk, now: puts and deletes per second."""
    messages = BARE_MESSAGES // 10 if settings.quick else BARE_MESSAGES
    with settings.store() as data:
        return float(run_child("benchmarks.bare", ["--data", data, "--messages", messages])["rate"])


def measure(settings: Settings, kind: Kind, shape: Shape, rounds: Rounds) -> None:
    """One round."""
    with settings.store() as data, serving(kind, data) as server:
        common = ["--url", server.url, "--pid", str(server.pid), "--seconds", str(settings.seconds)]
        extra = ("--warm", str(WARM_MESSAGES), *(("--distinct",) if settings.distinct else ()))
        result = run_child("benchmarks.load", ["pump", *common, *shape.arguments, *extra])
    rounds.results.append(result)
    cpu = result["server_cpu"] / result["messages"] * 1e6
    settings.say(
        f"{kind.name}, {shape.name}: {result['rate']:,.0f} msg/s, {cpu:.1f} µs CPU, "
        f"consumer up to {result['behind_max']:,} behind"
    )


def run(settings: Settings) -> Iterator[Row]:
    """All shapes; the trial sets a bar only if it passes its own, which is the last row."""
    bare = Rounds()
    measured: list[tuple[Shape, Rounds, Rounds]] = []
    for shape in SHAPES:
        ours, trial = Rounds(), Rounds()
        for _ in range(settings.rounds):
            bare.results.append({"rate": bare_rate(settings)})
            measure(settings, settings.server, shape, ours)
            measure(settings, TRIAL, shape, trial)
        measured.append((shape, ours, trial))
    trial_durable = next(trial for shape, _, trial in measured if shape.arguments == ("--persistent",))
    floor = bare.median("rate")
    trial_counts = trial_durable.median("rate") > BARE_SHARE * floor
    for shape, ours, trial in measured:
        rate, bar = ours.median("rate"), trial.median("rate")
        yield Row(
            case="stomp",
            name=shape.name,
            figure=rate,
            unit="msg/s",
            low=min(ours.values("rate")),
            high=max(ours.values("rate")),
            beside="trial",
            beside_figure=bar,
            target=f">= {shape.target:,} or {TRIAL_SHARE:.0%} of the trial",
            met=rate >= shape.target or (trial_counts and rate >= TRIAL_SHARE * bar),
            cpu_us=ours.cpu_us,
            details={"ours": ours.results, "trial": trial.results, "trial_cpu_us": trial.cpu_us},
        )
    yield Row(
        case="stomp",
        name="the trial itself, persistent, auto ack",
        figure=trial_durable.median("rate"),
        unit="msg/s",
        low=min(trial_durable.values("rate")),
        high=max(trial_durable.values("rate")),
        beside="bare plyvel",
        beside_figure=floor,
        target="> a third of bare plyvel",
        met=trial_counts,
        cpu_us=trial_durable.cpu_us,
        details={"bare": bare.values("rate")},
    )
