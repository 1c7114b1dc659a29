"""The core and the store against the naive model, by random programs on a queue whose consumers differ."""

from __future__ import annotations

import time

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.core.choosy_machine import ChoosyMachine
from tests.core.test_model import CHUNK, SETTINGS, SOAK_SECONDS


@pytest.mark.slow
def test_everybody_gets_what_he_may_and_nobody_starves() -> None:
    run_state_machine_as_test(ChoosyMachine, settings=settings(SETTINGS, max_examples=200))


@pytest.mark.soak
@pytest.mark.skipif(not SOAK_SECONDS, reason="PYBROKER_SOAK=SECONDS says how long")
def test_everybody_gets_what_he_may_for_long() -> None:
    ends = time.monotonic() + SOAK_SECONDS
    while time.monotonic() < ends:
        run_state_machine_as_test(
            ChoosyMachine, settings=settings(SETTINGS, max_examples=CHUNK, derandomize=False, database=None)
        )
