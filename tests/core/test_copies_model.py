"""Where copies of a send are, by random programs: features that meet in one batch, with crashes in the middle.

``PYBROKER_SOAK=SECONDS`` runs fresh programs for so long.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.core.copies_machine import CopiesMachine
from tests.core.test_model import CHUNK, SETTINGS, SOAK_SECONDS


@pytest.mark.slow
def test_each_destination_has_its_copy_and_no_other() -> None:
    run_state_machine_as_test(CopiesMachine, settings=settings(SETTINGS, max_examples=80, stateful_step_count=30))


@pytest.mark.soak
@pytest.mark.skipif(not SOAK_SECONDS, reason="PYBROKER_SOAK=SECONDS says how long")
def test_each_destination_has_its_copy_for_long() -> None:
    ends = time.monotonic() + SOAK_SECONDS
    while time.monotonic() < ends:
        run_state_machine_as_test(
            CopiesMachine, settings=settings(SETTINGS, max_examples=CHUNK, derandomize=False, database=None)
        )
