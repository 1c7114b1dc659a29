"""Random stories, seed by seed: whatever befalls a set, its promises hold, and it serves again when all is well.

``python -m tests.sim SEED`` replays one with what happened printed.
"""

from __future__ import annotations

import pytest

from tests.sim.faults import simulate

SEEDS, CHUNK = 300, 25


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_random_stories(first: int) -> None:
    total = 0
    for seed in range(first, first + CHUNK):
        try:
            total += simulate(str(seed)).counts["elections"]
        except BaseException as error:
            error.add_note(f"replay it with: python -m tests.sim {seed}")
            raise
    assert total > CHUNK  # or nothing would have been tried
