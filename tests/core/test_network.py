"""Networks of whole brokers in random stories, and the bugs that these must find. See `network_story`; a failing one says its seed.

``PYBROKER_SOAK=SECONDS`` tells fresh stories for so long.
"""

from __future__ import annotations

import os
import random
import time

import pytest

from tests.core.network_plants import PLANTS, Plant
from tests.core.network_story import Kind, Teller

SOAK_SECONDS = float(os.environ.get("PYBROKER_SOAK", "0"))
KINDS = {
    "whole": Kind(),
    "calm": Kind(faults=0.0, expiring=False),
    "failing": Kind(faults=3.0, expiring=False, steps=350),
    "queues": Kind(topics=False, hops=(16, 3, 2)),
    "choosy": Kind(queues=("/queue/a", "/queue/only"), topics=False, choosy=True, hops=(16, 16, 3)),
    "choosy and failing": Kind(faults=3.0, choosy=True),
    "removals": Kind(faults=2.0, removals=0.5),
}
STORIES = 60 if SOAK_SECONDS else 36  # of each kind, in twelve parts


@pytest.mark.slow
@pytest.mark.parametrize("part", range(12))
@pytest.mark.parametrize("name", KINDS)
def test_a_network_keeps_its_promises(name: str, part: int) -> None:
    for number in range(part, STORIES, 12):
        Teller(f"{name} {number}", KINDS[name]).run()


def test_a_story_is_told_the_same_way_again() -> None:
    first = Teller("again", KINDS["failing"]).run()
    second = Teller("again", KINDS["failing"]).run()
    assert first.log == second.log


@pytest.mark.slow
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_bug_is_found(plant: Plant) -> None:
    stories, broken = plant.search()
    assert broken is not None, f"{plant.broken.__doc__} Nobody has noticed it in {stories} stories."


@pytest.mark.soak
@pytest.mark.skipif(not SOAK_SECONDS, reason="PYBROKER_SOAK=SECONDS says how long")
def test_a_network_keeps_its_promises_for_long() -> None:
    ends = time.monotonic() + SOAK_SECONDS
    stories = 0
    while time.monotonic() < ends:
        name = random.choice(list(KINDS))
        Teller(f"{name} {random.getrandbits(64):x}", KINDS[name]).run()
        stories += 1
    print(f"{stories} stories")
