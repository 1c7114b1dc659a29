"""What the trials measured. Owns the lines that `conftest.py` prints at the end of the run, also when nothing failed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

LINES: list[str] = []


def note(line: str) -> None:
    print(line)
    LINES.append(line)


def note_gaps(what: str, gaps: Sequence[float]) -> None:
    """The longest times between two confirmed sends of one producer, in seconds, of as many trials."""
    text = f"{statistics.median(gaps) * 1000:.0f} ms"
    if len(gaps) > 1:
        text = f"median {text}, worst {max(gaps) * 1000:.0f} ms of {len(gaps)}"
    note(f"{what}: longest gap in confirmed sends {text}")
