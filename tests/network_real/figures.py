"""What the trials of networks measured. Owns the lines that `conftest.py` prints at the end, also when nothing failed."""

from __future__ import annotations

from collections.abc import Sequence

LINES: list[str] = []


def note(line: str) -> None:
    print(line)
    LINES.append(line)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies; 0.0 of none."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)] if values else 0.0
