"""Case `native`: messages end to end over the native protocol, beside bare plyvel, and beside a bare loop over loopback.

The broker and its floor take turns, each in a new process, so that a change in the machine's pace meets both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.processes import Kind, run_child, serving
from benchmarks.report import Rounds, Row
from benchmarks.settings import NotMeasurable, Settings
from benchmarks.throughput import bare_rate

LISTEN = "pybroker://127.0.0.1:0"
WARM_MESSAGES = 5_000
WIRE_MESSAGES = 1_000_000


def wire_rate(settings: Settings) -> float:
    """Messages that a bare loop packs, sends, receives and unpacks in a second, now."""
    messages = WIRE_MESSAGES // 10 if settings.quick else WIRE_MESSAGES
    return float(run_child("benchmarks.bare_wire", ["--messages", messages])["rate"])


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to load a queue, and what it has to reach: so many messages per second, or that share of its floor."""

    name: str
    arguments: tuple[str, ...]
    target: int
    floor: Callable[[Settings], float]
    floor_name: str
    share: float


SHAPES = (
    Shape("durable, batches of 100, acks in batches", (), 85_000, bare_rate, "bare plyvel", 0.6),
    Shape("not durable, batches of 100, acks in batches", ("--volatile",), 250_000, wire_rate, "bare loop", 0.4),
)


def measure(settings: Settings, kind: Kind, shape: Shape, rounds: Rounds) -> None:
    """One round."""
    with settings.store() as data, serving(kind, data, LISTEN) as server:
        common = ["--url", server.url, "--pid", server.pid, "--seconds", settings.seconds, "--warm", WARM_MESSAGES]
        rounds.results.append(run_child("benchmarks.load_native", [*common, *shape.arguments]))
    result = rounds.results[-1]
    settings.say(
        f"{shape.name}: {result['rate']:,.0f} msg/s, {result['server_cpu'] / result['messages'] * 1e6:.1f} µs CPU "
        f"(the load {result['load_cpu'] / result['messages'] * 1e6:.1f}), consumer up to {result['behind_max']:,} behind"
    )


def row(shape: Shape, ours: Rounds, floors: list[float]) -> Row:
    """The figure of one shape."""
    rate, floor = ours.median("rate"), Rounds([{"rate": each} for each in floors]).median("rate")
    return Row(
        case="native",
        name=shape.name,
        figure=rate,
        unit="msg/s",
        low=min(ours.values("rate")),
        high=max(ours.values("rate")),
        beside=shape.floor_name,
        beside_figure=floor,
        target=f">= {shape.target:,} or {shape.share:.0%} of it",
        met=rate >= shape.target or rate >= shape.share * floor,
        cpu_us=ours.cpu_us,
        details={"ours": ours.results, "floor": floors},
    )


def run(settings: Settings) -> Iterator[Row]:
    """Both shapes."""
    if settings.server.name != "broker":
        raise NotMeasurable(f"`{settings.server.name}` does not speak the native protocol")
    for shape in SHAPES:
        ours = Rounds()
        floors = []
        for _ in range(settings.rounds):
            floors.append(shape.floor(settings))
            measure(settings, settings.server, shape, ours)
        yield row(shape, ours, floors)
