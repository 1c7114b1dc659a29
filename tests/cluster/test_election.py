"""The rules of the election, each one alone. All together: `test_election_walks`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from pybroker.cluster import election
from pybroker.cluster.coordinator import CreateNode, DeleteNode, Node, SetNode, Write
from pybroker.cluster.election import Blocked, Me, Proposal
from pybroker.cluster.registry import (
    LeaderRecord,
    Position,
    Slot,
    View,
    encode_config,
    encode_epoch,
    encode_leader,
    encode_roster,
    encode_slot,
    parse_view,
)
from pybroker.errors import ConfigurationError

SESSION = 7
RECORD = LeaderRecord(0, "a", "attempt", "a:1", ("stomp://a:2",))


class Nodes:
    """ZooKeeper's nodes. `aba`: a slot's version starts again whenever it is written."""

    def __init__(self, aba: bool = False) -> None:
        self.nodes: dict[str, Node] = {}
        self.aba = aba
        self._parsed: tuple[dict[str, Node], View] | None = None

    def transact(self, writes: Sequence[Write], session: int = SESSION) -> bool:
        after = dict(self.nodes)
        for write in writes:
            node = after.get(write.path)
            if isinstance(write, CreateNode):
                if node is not None:
                    return False
                after[write.path] = Node(write.data, 0, session if write.ephemeral else 0)
                continue
            if node is None or node.version != write.version:
                return False
            if isinstance(write, SetNode):
                again = self.aba and write.path.startswith("slots/")
                after[write.path] = Node(write.data, 0 if again else node.version + 1, node.owner)
            elif isinstance(write, DeleteNode):
                del after[write.path]
        self.nodes = after
        return True

    @property
    def view(self) -> View:
        if self._parsed is None or self._parsed[0] is not self.nodes:
            self._parsed = (self.nodes, parse_view(self.nodes))
        return self._parsed[1]


def me(name: str = "a", lsn: int = 0, epoch: int = 0, **options: Any) -> Me:
    values: dict[str, Any] = {"incarnation": f"{name}1", "starts": 1, "weight": 0} | options
    return Me(name, values["incarnation"], values["starts"], values["weight"], Position(epoch, lsn))


def made(epoch: int, roster: Mapping[str, str], slots: Mapping[str, Slot], leader: LeaderRecord | None = None) -> Nodes:
    nodes = Nodes()
    assert nodes.transact(
        [
            CreateNode("config", encode_config(3)),
            CreateNode("epoch", encode_epoch(epoch)),
            CreateNode("roster", encode_roster(roster)),
            *(CreateNode(f"slots/{name}", encode_slot(slot)) for name, slot in slots.items()),
            *([] if leader is None else [CreateNode("leader", encode_leader(leader), ephemeral=True)]),
        ]
    )
    return nodes


ROSTER = {"a": "a1", "b": "b1", "c": "c1"}


def standing(name: str, epoch: int, lsn: int, weight: int = 0, incarnation: str = "", starts: int = 1) -> Slot:
    return Slot(Position(epoch, lsn), incarnation or f"{name}1", weight, starts)


def proposed(nodes: Nodes, who: Me, **options: Any) -> Proposal:
    found = election.propose(nodes.view, who, 3, RECORD, **options)
    assert isinstance(found, Proposal)
    return found


# ---- each rule


def test_the_nodes_are_made_once_by_whoever_comes_first() -> None:
    nodes = Nodes()
    assert nodes.transact(election.missing_nodes(nodes.view, me("a"), 3))
    assert [write.path for write in election.missing_nodes(nodes.view, me("b"), 3)] == ["slots/b"]
    assert election.missing_nodes(nodes.view, me("a"), 3) == []
    assert election.is_virgin(nodes.view)
    assert election.counts(nodes.view, "b", "any")


def test_who_may_take_part() -> None:
    view = made(1, ROSTER, {}).view
    election.check_admission(view, me("a"), 3)
    with pytest.raises(ConfigurationError, match="all members must say the same"):
        election.check_admission(view, me("a"), 5)
    with pytest.raises(ConfigurationError, match="has no place"):
        election.check_admission(view, me("d"), 3)
    election.check_admission(made(1, {"a": "a1", "b": "b1"}, {}).view, me("d"), 3)


@pytest.mark.parametrize(
    ("slot_starts", "first", "restored"),
    [(1, True, False), (2, True, True), (2, False, False), (3, True, True), (3, False, True)],
)
def test_a_copy_of_an_earlier_life_is_told_by_the_start_counter(slot_starts: int, first: bool, restored: bool) -> None:
    view = made(1, ROSTER, {"a": Slot(None, "a1", 0, slot_starts)}).view
    assert election.is_restored(view, me("a", starts=2), first) is restored
    assert not election.is_restored(view, me("a", starts=2, incarnation="a2"), first)
    assert not election.is_restored(view, me("b", starts=2), first)


def test_standing_is_of_this_life_this_copy_and_this_position() -> None:
    view = made(1, ROSTER, {"a": standing("a", 1, 5, starts=2)}).view
    assert election.stands(view, me("a", 5, 1, starts=2))
    assert not election.stands(view, me("a", 6, 1, starts=2))
    assert not election.stands(view, me("a", 5, 1, starts=3))
    assert not election.stands(view, me("a", 5, 1, starts=2, incarnation="a2"))
    assert not election.stands(view, me("b", 5, 1))


def test_publishing_and_touching_name_the_slots_version() -> None:
    nodes = made(1, ROSTER, {"a": Slot(None, "a1")})
    old = nodes.view
    assert nodes.transact(election.touch(old, me("a")))
    assert not nodes.transact(election.publish(old, me("a", 5, 1)))
    assert nodes.transact(election.publish(nodes.view, me("a", 5, 1)))
    assert election.stands(nodes.view, me("a", 5, 1))


def test_giving_up_needs_the_epoch_of_the_view() -> None:
    nodes = made(1, ROSTER, {"a": standing("a", 1, 5)})
    old = nodes.view
    assert nodes.transact([SetNode("epoch", encode_epoch(2), 0)])
    assert not nodes.transact(election.give_up(old, me("a", 5, 1)))
    assert nodes.transact(election.give_up(nodes.view, me("a", 5, 1)))
    assert nodes.view.slots["a"][0].candidate is None
    assert election.has_given_up(nodes.view, me("a", 5, 1), 0)
    assert not election.has_given_up(nodes.view, me("a", 5, 1), 1)
    assert not election.has_given_up(nodes.view, me("a", 5, 1, starts=2), 0)


def test_the_leader_that_can_be_seen_is_that_of_the_present_epoch_and_another_one() -> None:
    leader = LeaderRecord(2, "a", "x", "a:1")
    assert election.visible_leader(made(2, ROSTER, {}, leader).view, me("b")) == leader
    assert election.visible_leader(made(3, ROSTER, {}, leader).view, me("b")) is None
    assert election.visible_leader(made(2, ROSTER, {}, leader).view, me("a")) is None


def test_the_best_is_by_epoch_then_number_then_weight_then_name() -> None:
    slots = {
        "a": standing("a", 1, 9),
        "b": standing("b", 2, 3),
        "c": standing("c", 2, 3, weight=1),
    }
    view = made(2, ROSTER, slots).view
    assert [name for name, _, _ in election.candidates(view)] == ["c", "b", "a"]
    assert election.rank(view, me("b")) == 1
    slots["d"] = standing("d", 9, 9)  # not on the roster
    slots["b"] = standing("b", 2, 3, incarnation="b2")  # nor is this copy
    assert [name for name, _, _ in election.candidates(made(2, ROSTER, slots).view)] == ["c", "a"]


def test_the_first_election_registers_those_it_stands_on() -> None:
    nodes = made(0, {}, {"a": standing("a", 0, 0), "b": standing("b", 0, 0), "c": Slot(None, "c1")})
    found = proposed(nodes, me("a"))
    assert (found.epoch, found.group, found.roster) == (1, ("a", "b"), {"a": "a1", "b": "b1"})
    assert nodes.transact(found.writes)
    view = nodes.view
    assert (view.epoch, view.roster) == (1, found.roster)
    assert view.slots["a"][0].candidate is None
    assert view.slots["b"][0].candidate is None
    assert view.leader == election.with_epoch(RECORD, 1)
    assert election.is_shown(view, election.with_epoch(RECORD, 1), SESSION)
    assert not election.is_shown(view, election.with_epoch(RECORD, 1), SESSION + 1)


def test_an_election_needs_a_quorum_of_which_the_proposer_is_the_best() -> None:
    nodes = made(2, ROSTER, {"a": standing("a", 2, 5), "b": standing("b", 2, 7), "c": Slot(None, "c1")})
    assert election.propose(nodes.view, me("a", 5, 2), 3, RECORD) is None
    assert proposed(nodes, me("b", 7, 2)).group == ("b", "a")
    three = made(2, ROSTER, {"a": standing("a", 2, 5), "b": standing("b", 2, 7), "c": standing("c", 2, 4)})
    assert proposed(three, me("a", 5, 2)).group == ("a", "c")  # the best one may be dead
    assert proposed(three, me("b", 7, 2)).roster == ROSTER


@pytest.mark.parametrize("path", ["epoch", "roster", "slots/a", "slots/b"])
def test_an_election_is_refused_when_something_that_it_stands_on_has_changed(path: str) -> None:
    nodes = made(2, ROSTER, {"a": standing("a", 2, 5), "b": standing("b", 2, 5)})
    found = proposed(nodes, me("a", 5, 2))
    assert nodes.transact([SetNode(path, nodes.nodes[path].data, 0)])
    assert not nodes.transact(found.writes)


def test_lost_data_of_zookeeper_need_all_the_copies_or_an_operator() -> None:
    two = made(0, {}, {"a": standing("a", 7, 5), "b": standing("b", 7, 9)})
    assert isinstance(election.propose(two.view, me("a", 5, 7), 3, RECORD), Blocked)
    assert election.may_stand(made(0, {"x": "x"}, {}).view, me("a", 5, 7), 3)
    there = replace(two.view, alive={"b": {}})
    asked = election.propose(there, me("a", 5, 7), 3, RECORD, forced=True)
    assert isinstance(asked, Blocked)
    assert "replica b has more" in asked.reason
    alone = election.propose(two.view, me("a", 5, 7), 3, RECORD, forced=True)  # b only stood once
    assert isinstance(alone, Proposal)
    assert (alone.group, dict(alone.roster)) == (("a",), {"a": "a1"})
    forced = election.propose(replace(two.view, alive={"a": {}}), me("b", 9, 7), 3, RECORD, forced=True)
    assert isinstance(forced, Proposal)
    assert (forced.epoch, forced.roster) == (7 + election.FORCED_STEP, {"a": "a1", "b": "b1"})
    three = made(0, {}, {name: standing(name, 7, 5) for name in "abc"})
    all_there = proposed(three, me("a", 5, 7))
    assert (all_there.epoch, all_there.roster) == (8, {"a": "a1", "b": "b1"})
    assert three.transact(all_there.writes)


def test_a_copy_that_was_wiped_before_zookeepers_data_were_lost_does_not_elect() -> None:
    """Only b has what b and c had confirmed: c is empty, a behind. Whoever leads next needs b."""
    slots = {"a": standing("a", 4, 14), "b": standing("b", 5, 16), "c": standing("c", 0, 0)}
    nodes = made(0, {}, slots)
    found = proposed(nodes, me("b", 16, 5))
    assert dict(found.roster) == {"b": "b1", "a": "a1"}
    assert nodes.transact(found.writes)
    for name in "ac":  # b is gone before it has brought anybody up to date
        nodes.nodes[f"slots/{name}"] = made(0, {}, {name: slots[name]}).nodes[f"slots/{name}"]
    assert election.propose(nodes.view, me("a", 14, 4), 3, RECORD) is None


def test_a_leader_shows_itself_again_only_in_its_epoch_and_takes_away_only_its_own_node() -> None:
    shown = LeaderRecord(2, "a", "x", "a:1")
    nodes = made(2, ROSTER, {}, shown)
    nodes.nodes = {path: node for path, node in nodes.nodes.items() if path != "leader"}
    old = nodes.view
    assert nodes.transact(election.show_again(old, shown))
    assert election.resign(nodes.view, LeaderRecord(2, "a", "other", "a:1")) == []
    moved = LeaderRecord(2, "a", "x", "a:9")
    assert nodes.transact(election.show_again(nodes.view, moved))
    assert nodes.transact(election.resign(nodes.view, moved))
    assert nodes.view.leader is None
    assert nodes.transact([SetNode("epoch", encode_epoch(3), 0)])
    assert not nodes.transact(election.show_again(old, shown))


def test_copies_are_registered_and_replaced_under_the_epoch() -> None:
    nodes = made(2, {"a": "a1", "b": "b1"}, {})
    old = nodes.view
    assert election.register(old, 1, 3, "c", "c1") is None
    assert nodes.transact(election.register(old, 2, 3, "c", "c1") or [])
    assert not nodes.transact(election.register(old, 2, 3, "c", "c2") or [])
    assert election.register(nodes.view, 2, 3, "d", "d1") is None
    assert nodes.transact(election.register(nodes.view, 2, 3, "b", "b2") or [])
    assert nodes.transact(election.replace(nodes.view, 3, "c", "d"))
    assert nodes.view.roster == {"a": "a1", "b": "b2", "d": ""}
    assert election.register(nodes.view, 2, 3, "c", "c1") is None  # the place is kept for d
    for old_name, new_name in (("x", "y"), ("a", "b"), ("a", "e")):
        with pytest.raises(ConfigurationError):
            election.replace(nodes.view, 3, old_name, new_name)
