"""All faults at random under load, for a minute; with ``--soak`` for PYBROKER_SOAK seconds, in rounds with an account each.

PYBROKER_SOAK_SEED repeats the choice of faults (not what the machine makes of their times); each round prints its own.
"""

from __future__ import annotations

import os
import random
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.ensemble import disks, namespaces
from tests.ensemble.chaos import MEMBERS, Chaos
from tests.ensemble.figures import note, note_gaps
from tests.ensemble.trial import trial
from tests.support.zookeeper import ensemble

ROUND = 30.0  # seconds of faults; start and account come on top
SOAK_DEFAULT = 600.0
SEED = int(os.environ.get("PYBROKER_SOAK_SEED", str(random.randrange(1 << 32))))
SESSION = 2.0  # seconds; faults last longer, and shorter


def run(directory: Path, seed: int, seconds: float) -> None:
    """One round, with whatever this machine lets us do."""
    rng = random.Random(seed)
    with ExitStack() as stack:
        options: dict[str, Any] = {}
        servers: dict[str, Any] = {}
        network = None
        small = {}
        if namespaces.missing():
            note(f"NO PARTITIONS in the soak: {namespaces.missing()}")
        else:
            network = stack.enter_context(namespaces.namespaces(*MEMBERS, "zookeeper", "out"))
            options["hosts"] = [(network.host(name), network.prefix(name)) for name in MEMBERS]
            options["prefix"] = network.prefix("out")
            servers["hosts"] = [network.host("zookeeper")] * 3
            servers["prefixes"] = [network.prefix("zookeeper")] * 3
        if disks.missing():
            note(f"NO FULL DISK in the soak: {disks.missing()}")
        else:
            small = {name: stack.enter_context(disks.small_disk(directory / name)) for name in MEMBERS}
            options["data_dirs"] = [disk / "data" for disk in small.values()]
        zookeeper = stack.enter_context(ensemble(3, **servers))
        load = stack.enter_context(trial(directory, zookeeper.addresses, session_timeout=SESSION, seed=seed, **options))
        began = time.monotonic()
        chaos = Chaos(load, zookeeper, rng, network=network, disks=small)
        chaos.run(began + seconds)
        note_gaps(f"{chaos.count} faults at random (PYBROKER_SOAK_SEED={seed})", [load.gap(began)])
        account = load.settle()
        for what in ("sent again", "redelivered"):
            assert account.counts[what] > 0, f"nothing {what}: the round shows nothing"


@pytest.mark.slow
def test_all_faults_at_random(tmp_path: Path, request: pytest.FixtureRequest):
    seconds = float(os.environ.get("PYBROKER_SOAK", SOAK_DEFAULT)) if request.config.getoption("--soak") else ROUND
    until = time.monotonic() + seconds
    number = 0
    while number == 0 or time.monotonic() < until:
        seed = SEED + number
        number += 1
        directory = tmp_path / str(number)
        directory.mkdir()
        print(f"PYBROKER_SOAK_SEED={seed}")
        try:
            run(directory, seed, min(ROUND, seconds))
        except BaseException:
            print(f"PYBROKER_SOAK_SEED={seed} failed")
            raise
