"""All faults at random, on three sets under load: with ``--soak`` for PYBROKER_SOAK seconds, in rounds with an account each.

PYBROKER_SOAK_SEED repeats the choice of faults (not what the machine makes of their times); each round prints its own.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from tests.network_real.chaos import Chaos
from tests.network_real.conftest import Begin, Ground
from tests.network_real.figures import note

pytestmark = [pytest.mark.slow, pytest.mark.soak]

ROUND = 50.0  # seconds of faults; start and account come on top
SOAK_DEFAULT = 600.0
SEED = int(os.environ.get("PYBROKER_SOAK_SEED", str(random.randrange(1 << 32))))


def test_all_faults_at_random(tmp_path: Path, ground: Ground, begin: Begin, request: pytest.FixtureRequest):
    if not request.config.getoption("--soak"):
        pytest.skip("a long run: --soak, for PYBROKER_SOAK seconds")
    seconds = float(os.environ.get("PYBROKER_SOAK", SOAK_DEFAULT))
    until = time.monotonic() + seconds
    number = 0
    while number == 0 or time.monotonic() < until:
        seed = SEED + number
        number += 1
        directory = tmp_path / str(number)
        directory.mkdir()
        print(f"PYBROKER_SOAK_SEED={seed}")
        try:
            with begin(directory, ordered=False, seed=seed) as running:
                running.add("east")
                began = time.monotonic()
                chaos = Chaos(running, ground.zookeeper, random.Random(seed))
                chaos.run(began + min(ROUND, seconds))
                note(
                    f"{chaos.count} faults at random on three sets (PYBROKER_SOAK_SEED={seed}): "
                    f"longest gap in confirmed sends {running.gap(began) * 1000:.0f} ms"
                )
                running.settle()
        except BaseException:
            print(f"PYBROKER_SOAK_SEED={seed} failed")
            raise
