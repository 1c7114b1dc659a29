"""Bugs that are put into the real code: the checkers find each of them, and nothing on the same ways without it."""

from __future__ import annotations

import pytest

from tests.sim import ways
from tests.sim.one_set import Options
from tests.sim.plants import PLANTS, Plant
from tests.sim.simulation import Simulation

ELECTION = {"moving", "stale", "aba", "longest", "minority", "oldcommit", "wiped", "nofence", "early"}
REPLICATION = {"unsynced", "swapped", "unswapped", "replaced"}


def test_every_bug_of_the_model_and_of_replication_is_planted() -> None:
    assert {plant.name for plant in PLANTS} == ELECTION | REPLICATION


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_planted_bug_is_found(plant: Plant) -> None:
    runs, violation = plant.search()
    assert violation is not None, f"not found in {runs} runs"


@pytest.mark.parametrize("plant", [plant for plant in PLANTS if plant.way is not None], ids=lambda plant: plant.name)
def test_nothing_is_wrong_on_the_way_to_a_bug_without_it(plant: Plant) -> None:
    plant.run("unplanted")


def test_a_replica_that_is_asked_to_stop_while_it_is_elected_ends() -> None:
    Simulation("stopped", ways.stopped_while_elected).run()


def test_a_copy_restored_from_a_backup_does_not_vote_however_often_it_was_started() -> None:
    Simulation("restored", ways.restored).run()


def test_a_copy_brought_up_by_difference_has_no_record_older_than_its_position() -> None:
    Simulation("bent", ways.bent_descriptor, Options(ring_bytes_max=0)).run()


def test_a_copy_whose_meta_record_is_bad_is_filled_anew() -> None:
    Simulation("bent", ways.bent_meta).run()
