"""A hundred and twenty seeds of whole networks under every fault; a failing one is printed with the command that replays it."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.sim.checkers import Violation
from tests.sim.net_faults import simulate

ROOT = Path(__file__).parent.parent.parent
SEEDS = 120
CHUNK = 10  # seeds of one test
SOAK_SECONDS = float(os.environ.get("PYBROKER_SOAK", "0"))

# What must have happened in all runs together, or the simulator simulates nothing
HAPPENED = {
    "sends confirmed": 7_000,
    "acknowledgements confirmed": 7_000,
    "deliveries repeated": 1_500,
    "messages forwarded": 7_000,
    "moves confirmed": 400,
    "elections": 120,
    "kills": 500,
    "pauses": 30,
    "stops": 20,
    "links cut": 200,
    "links reset": 80,
    "connections choked": 100,
    "connections made again": 150,
    "sends repeated by clients": 20,
    "clients were told SendInDoubt": 40,
    "announcements lost": 150,
    "announcements repeated or late": 150,
    "announcements forged": 8,
    "old announcements said again": 10,
    "writes failed": 60,
}

happened: dict[int, Counter[str]] = {}


def run(seed: str) -> Counter[str]:
    try:
        return simulate(seed).counts
    except Violation as violation:
        pytest.fail(f"seed {seed}: {violation}\nreplay it: python -m tests.sim --network {seed}", pytrace=False)
    except BaseException:
        print(f"seed {seed} failed; replay it: python -m tests.sim --network {seed}")
        raise


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(SEEDS // CHUNK))
def test_promises_hold_in_networks(chunk: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        counts.update(run(str(seed)))
    happened[chunk] = counts


@pytest.mark.slow
def test_much_has_happened_in_these_runs() -> None:
    if len(happened) < SEEDS // CHUNK:
        pytest.skip("only some of the seeds were run, or some have failed")
    total = sum(happened.values(), Counter())
    missing = {what: (total[what], least) for what, least in HAPPENED.items() if total[what] < least}
    assert missing == {}


@pytest.mark.parametrize("seed", ["3", "7", "11"])
def test_a_seed_gives_the_whole_run(seed: str) -> None:
    first, second = simulate(seed), simulate(seed)
    assert first.trace == second.trace
    assert first.digest == second.digest


def test_a_seed_gives_the_whole_run_in_another_process() -> None:
    seeds = ["1", "2", "3", "4", "5", "6"]
    here = [simulate(seed).digest for seed in seeds]
    for hash_seed in ("1", "4711"):
        there = subprocess.run(
            [sys.executable, "-m", "tests.sim", "--network", "--digest", *seeds],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        )
        assert there.stdout.split() == here


@pytest.mark.soak
@pytest.mark.skipif(not SOAK_SECONDS, reason="PYBROKER_SOAK=SECONDS says how long")
def test_promises_hold_in_networks_for_long() -> None:
    ends = time.monotonic() + SOAK_SECONDS
    runs = 0
    while time.monotonic() < ends:
        run(f"soak-{random.getrandbits(48):x}")
        runs += 1
    print(f"{runs} runs")
