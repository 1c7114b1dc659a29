"""The core and the store against the naive model, by random programs.

A short run is for CI: about half a minute, the same programs each time where ``CI`` is set. ``PYBROKER_SOAK=SECONDS``
runs fresh programs for so long; a failing one is printed, and can be run again from what Hypothesis says.
"""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.core.machine import CoreMachine

SOAK_SECONDS = float(os.environ.get("PYBROKER_SOAK", "0"))
CHUNK = 300  # programs of one run of Hypothesis, which remembers them all
SETTINGS = settings(
    max_examples=500,
    stateful_step_count=60,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
def test_the_core_keeps_its_promises() -> None:
    run_state_machine_as_test(CoreMachine, settings=SETTINGS)


@pytest.mark.soak
@pytest.mark.skipif(not SOAK_SECONDS, reason="PYBROKER_SOAK=SECONDS says how long")
def test_the_core_keeps_its_promises_for_long() -> None:
    ends = time.monotonic() + SOAK_SECONDS
    programs = 0
    while time.monotonic() < ends:
        run_state_machine_as_test(
            CoreMachine, settings=settings(SETTINGS, max_examples=CHUNK, derandomize=False, database=None)
        )
        programs += CHUNK
    print(f"{programs} programs")
