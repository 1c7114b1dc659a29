"""The named stories of networks: stuck messages, dead bridges, killed leaders, newcomers, sets that are removed."""

from __future__ import annotations

import pytest

from tests.sim import net_ways as ways
from tests.sim.net_simulation import NetSimulation


def test_messages_follow_a_consumer_that_moves_and_none_is_stuck() -> None:
    NetSimulation("stuck", ways.stuck, ways.STUCK).run()


def test_a_link_that_dies_silently_at_any_step_of_its_hand_shake_is_made_again() -> None:
    result = NetSimulation("silent", ways.silent_bridge, ways.SILENT).run()
    assert result.counts["connections choked"] >= 40


@pytest.mark.parametrize("seed", range(5))
def test_leaders_at_both_ends_are_killed_while_messages_are_forwarded(seed: int) -> None:
    result = NetSimulation(f"killed {seed}", ways.killed_leaders, ways.FAILOVER).run()
    assert result.counts["kills"] >= 6
    assert result.counts["messages forwarded"] >= 50


def test_a_broker_joins_under_load_and_nobody_is_disturbed() -> None:
    NetSimulation("joining", ways.joining, ways.JOINING).run()


@pytest.mark.parametrize("seed", range(3))
def test_what_was_on_its_way_to_a_set_that_is_removed_goes_to_others(seed: int) -> None:
    NetSimulation(f"removed {seed}", ways.removed, ways.REMOVED).run()


@pytest.mark.parametrize("seed", range(3))
def test_what_one_broker_may_have_is_not_repeated_to_another_that_let_the_client_in_before(seed: int) -> None:
    NetSimulation(f"offered {seed}", ways.offered_twice, ways.OFFERED).run()
