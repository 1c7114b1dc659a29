"""Bugs that are put into the real code of networks: the checkers find each of them, and nothing on the same ways without it."""

from __future__ import annotations

import pytest

from tests.sim.net_plants import PLANTS, Plant


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    runs, violation = plant.search()
    assert violation is not None, f"not found in {runs} runs"


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_nothing_is_wrong_on_the_way_to_a_bug_without_it(plant: Plant) -> None:
    plant.run(f"{plant.name} 0")
