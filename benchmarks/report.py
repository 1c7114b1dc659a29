"""Rows of figures, the table that shows them and the JSON that keeps them. Measures nothing."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure.

    case, name     which case group measured it, and what it is
    figure, unit   the median where there were rounds
    low, high      the spread over the rounds; None for a single measurement
    beside         what it was measured beside in the same run, e.g. ``trial``
    beside_figure  that one's figure in the same unit; None when there is none
    target         in words; empty when the row only informs
    met            whether the target is met; None without a target
    cpu_us         CPU time of the measured process per message, microseconds; None where it says nothing
    details        every single measurement behind the figure
    """

    case: str
    name: str
    figure: float
    unit: str
    low: float | None = None
    high: float | None = None
    beside: str = ""
    beside_figure: float | None = None
    target: str = ""
    met: bool | None = None
    cpu_us: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The figure by what was measured beside it."""
        return self.figure / self.beside_figure if self.beside_figure else None


@dataclass(frozen=True, slots=True)
class Rounds:
    """Repeated measurements of one thing: every result of the load generator, in order."""

    results: list[dict[str, Any]] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """One field of all results."""
        return [float(result[name]) for result in self.results]

    def median(self, name: str) -> float:
        """The median of a field."""
        return statistics.median(self.values(name))

    @property
    def cpu_us(self) -> float:
        """Median CPU time of the server per message, microseconds."""
        return statistics.median(float(result["server_cpu"] / result["messages"]) * 1e6 for result in self.results)


def number(value: float | None) -> str:
    """A figure with as many digits as it is worth."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"


def show(rows: Sequence[Row], machine: dict[str, Any], console: Console) -> None:
    """Print the table."""
    sync = machine["sync"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    table = Table(
        title=f"{machine['processor']}, {machine['cores']} cores, {machine['python']} "
        f"({machine['interpreter_ns']:.0f} ns for a step of an empty loop), {libraries}; "
        f"{machine['file_system']}, fdatasync {sync['p50_ms']:.2f} ms (p99 {sync['p99_ms']:.2f}); {machine['date']}",
        title_justify="left",
        title_style="",
    )
    for column in ("case", "figure of", "measured", "spread", "unit", "beside", "its figure", "ratio", "target", ""):
        right = column in ("measured", "spread", "its figure", "ratio")
        table.add_column(column, justify="right" if right else "left")
    table.add_column("CPU µs/message", justify="right")
    former = ""
    for row in rows:
        if former and former != row.case:
            table.add_section()
        former = row.case
        verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[row.met]
        spread = f"{number(row.low)} - {number(row.high)}" if row.low is not None else ""
        table.add_row(
            row.case,
            row.name,
            number(row.figure),
            spread,
            row.unit,
            row.beside,
            number(row.beside_figure),
            f"{row.ratio:.2f}" if row.ratio is not None else "",
            row.target,
            verdict,
            number(row.cpu_us),
        )
    console.print(table)


def write_json(path: Path, rows: Sequence[Row], machine: dict[str, Any], command: Sequence[str], failures: Any) -> None:
    """Keep everything: machine, command line, rows with their single measurements, cases that failed."""
    document = {
        "machine": machine,
        "command": list(command),
        "figures": [asdict(row) | {"ratio": row.ratio} for row in rows],
        "failures": failures,
    }
    path.write_text(json.dumps(document, indent=2, default=str) + "\n")
