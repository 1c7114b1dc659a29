"""Case `latency`: durable messages at a steady 1,000 a second, well below what the server can do."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.processes import TRIAL, Kind, run_child, serving
from benchmarks.report import Row
from benchmarks.settings import Settings

RATE = 1_000  # messages per second
SECONDS = 10
TARGET_MS = 3.0  # 99th percentile


def measure(settings: Settings, kind: Kind) -> dict[str, Any]:
    """One run."""
    with settings.store() as data, serving(kind, data) as server:
        seconds = 3 if settings.quick else SECONDS
        result = run_child("benchmarks.load_paced", ["--url", server.url, "--rate", RATE, "--seconds", seconds])
    settings.say(
        f"{kind.name}: receipt p99 {result['receipt']['p99_ms']:.2f} ms, "
        f"delivery p99 {result['delivery']['p99_ms']:.2f} ms, generator late by p99 {result['lateness']['p99_ms']:.2f} ms"
    )
    return result


def run(settings: Settings) -> Iterator[Row]:
    """Server and trial in turns under the same load; the median of the rounds counts."""
    ours, trial = [], []
    for _ in range(settings.rounds):
        ours.append(measure(settings, settings.server))
        trial.append(measure(settings, TRIAL))
    for what in ("receipt", "delivery"):
        for percentile in ("p50", "p99", "max"):
            figures = [result[what][f"{percentile}_ms"] for result in ours]
            figure = statistics.median(figures)
            judged = percentile == "p99"
            yield Row(
                case="latency",
                name=f"durable send to {what}, {percentile}",
                figure=figure,
                unit="ms",
                low=min(figures),
                high=max(figures),
                beside="trial",
                beside_figure=statistics.median(result[what][f"{percentile}_ms"] for result in trial),
                target=f"< {TARGET_MS:g}" if judged else "",
                met=figure < TARGET_MS if judged else None,
                details={"ours": ours, "trial": trial} if judged else {},
            )
