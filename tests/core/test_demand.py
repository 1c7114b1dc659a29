"""The table of demand, alone: many of them joined by links that bring news late and in order, or are cut (DESIGN.md section 6).

What each broker must know is worked out anew from the graph of links that are up, by a breadth-first search.
"""

from __future__ import annotations

from collections import deque
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from pybroker.core import demand
from pybroker.core.demand import DemandTable, Key, hops
from pybroker.errors import LimitExceeded

NAMES = "abcdefgh"
DESTINATIONS = ("/queue/q", "/queue/r", "/topic/t.*", "/topic/u")


class Net:
    """Tables, and the links between them: for each direction of a link that is up the news that are on their way."""

    def __init__(self, count: int, hops_max: int) -> None:
        self.hops_max = hops_max
        self.tables = {name: DemandTable(name, hops_max) for name in NAMES[:count]}
        self.pairs = [tuple(pair) for pair in combinations(self.tables, 2)]
        self.ways: dict[tuple[str, str], deque[Any]] = {}
        self.own: dict[str, set[tuple[str, bool]]] = {name: set() for name in self.tables}
        self.ever: set[Key] = set()
        self.told: dict[tuple[str, str], dict[Key, tuple[str, ...]]] = {}  # what the hearer was told on this link
        self.best: dict[str, dict[Key, Any]] = {name: {} for name in self.tables}
        self.known: dict[str, set[Key]] = {name: set() for name in self.tables}

    def up(self, one: str, other: str) -> None:
        for here, there in ((one, other), (other, one)):
            self.ways[here, there] = deque()
            self.told[here, there] = {}
            self._changed(here, self.tables[here].up(there), [])

    def down(self, one: str, other: str) -> None:
        for here, there in ((one, other), (other, one)):
            del self.ways[here, there]
            heard = list(self.tables[here].heard(there))
            self._changed(here, self.tables[here].down(there), heard)

    def set_own(self, name: str, destination: str, durable: bool, there: bool) -> None:
        (self.own[name].add if there else self.own[name].discard)((destination, durable))
        self.ever.add(Key(destination, durable, name))
        self.tables[name].set_own(destination, durable, there)

    def write(self, here: str, there: str) -> bool:
        """Put a table's news on their way; whether there were any."""
        table = self.tables[here]
        news = table.news(there)
        assert not table.has_news(there)
        assert table.news(there) is None, "it was told already"
        if news is None:
            return False
        whole, adds, drops = news
        told = self.told[here, there]
        if whole:
            assert not told, "all was told before"
        else:
            assert adds or drops
        for destination, durable, origin, path in adds:
            key = Key(destination, durable, origin)
            assert told.get(key) != path, "told twice"
            assert there not in path, "a way through the hearer"
            assert path[0] == here
            assert path[-1] == origin
            self._check_path(path, durable)
            told[key] = path
        for drop in drops:
            assert told.pop(Key(*drop), None) is not None, "dropped, and never told"
        self.ways[here, there].append(news)
        return True

    def read(self, here: str, there: str) -> bool:
        """Let `there` hear what `here` told first; whether there was anything."""
        way = self.ways[here, there]
        if not way:
            return False
        whole, adds, drops = way.popleft()
        touched = [Key(*drop) for drop in drops] + [Key(*add[:3]) for add in adds]
        touched += list(self.tables[there].heard(here)) if whole else []
        self._changed(there, self.tables[there].hear(here, whole, adds, drops), touched)
        return True

    def _changed(self, name: str, changed: list[Key], may: list[Key]) -> None:
        """What was said to have changed is all that has, of what may have."""
        table = self.tables[name]
        for key in {*may, *changed}:
            best = table.best(key)
            assert (best != self.best[name].get(key)) <= (key in changed), (key, best)
            self.best[name][key] = best
            if best is not None:
                peer, path = best
                assert path[0] == peer
                assert path[-1] == key.origin
                assert name not in path
                self._check_path(path, key.durable)
                self.known[name].add(key)

    def _check_path(self, path: tuple[str, ...], durable: bool) -> None:
        brokers = list(dict.fromkeys(path))
        assert hops(path) == len(brokers) <= self.hops_max
        again = [one for one, other in pairwise(path) if one == other]
        assert sorted(path) == sorted([*brokers, *again]), "a loop"
        assert durable or not again, "a cut way of what is not durable"

    def settle(self) -> None:
        for _ in range(5_000):
            moved = [self.write(*way) for way in self.ways] + [self.read(*way) for way in self.ways]
            if not any(moved):
                return
        raise AssertionError("the news never end")

    def distances(self, start: str) -> dict[str, int]:
        found = {start: 0}
        queue = deque([start])
        while queue:
            here = queue.popleft()
            for one, other in self.ways:
                if one == here and other not in found:
                    found[other] = found[here] + 1
                    queue.append(other)
        return found

    def check(self) -> None:
        """At rest: everybody knows what he has to, by the shortest way."""
        for name, table in self.tables.items():
            distances = self.distances(name)
            for key in self.ever:
                best = table.best(key)
                there = (key.destination, key.durable) in self.own[key.origin]
                distance = distances.get(key.origin, 1_000)
                near = key.origin != name and distance <= self.hops_max
                if key.origin == name:
                    assert best is None, "a way to oneself"
                elif not key.durable:
                    assert (best is not None) == (there and near), (name, key, best)
                    assert best is None or len(best[1]) == distance, (name, key, best)
                    assert best is None or (name, best[0]) in self.ways
                elif there and near:
                    assert best is not None, (name, key)
                    assert best[0] in table._up, "there is a whole way"
                    assert len(best[1]) == distance, (name, key, best)

    def check_healed(self) -> None:
        """At rest, with every link of this network up again: durable demand, too, is what it is, by the shortest way."""
        for name, table in self.tables.items():
            distances = self.distances(name)
            for key in self.ever:
                best = table.best(key)
                there = (key.destination, key.durable) in self.own[key.origin]
                distance = distances.get(key.origin, 1_000)
                assert (best is not None) == (there and 0 < distance <= self.hops_max), (name, key, best)
                assert best is None or len(best[1]) == distance, (name, key, best)


steps = st.lists(
    st.tuples(
        st.sampled_from(("own", "own", "link", "write", "write", "read", "read", "read", "settle")),
        st.integers(0, 999),
        st.integers(0, 999),
    ),
    min_size=20,
    max_size=80,
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink a program that never ends takes minutes
)
@given(
    count=st.integers(2, 8),
    hops_max=st.sampled_from((1, 2, 3, 16)),
    density=st.integers(1, 4),
    linked_first=st.booleans(),
    program=steps,
)
def test_brokers_know_the_demand_of_all_that_they_can_reach(
    count: int, hops_max: int, density: int, linked_first: bool, program: list[tuple[str, int, int]]
) -> None:
    net = Net(count, hops_max)
    used = [pair for at, pair in enumerate(net.pairs) if at * 7919 % 4 < density]
    assume(used)
    if linked_first:
        for pair in used:
            net.up(*pair)
    for kind, first, second in program:
        if kind == "own":
            name = NAMES[first % count]
            destination = DESTINATIONS[second % 4]
            durable = destination.startswith("/topic") and second % 8 >= 4
            net.set_own(name, destination, durable, (destination, durable) not in net.own[name])
        elif kind == "link":
            pair = used[first % len(used)]
            (net.down if pair in net.ways else net.up)(*pair)
        elif net.ways and kind in ("write", "read"):
            way = list(net.ways)[first % len(net.ways)]
            (net.write if kind == "write" else net.read)(*way)
        elif kind == "settle":
            net.settle()
            net.check()
    net.settle()
    net.check()
    for pair in used:
        if pair not in net.ways:
            net.up(*pair)
    net.settle()
    net.check()
    net.check_healed()


def linked(*names: str, hops_max: int = 16) -> dict[str, DemandTable]:
    """Tables in a chain, all of whose links are up."""
    tables = {name: DemandTable(name, hops_max) for name in names}
    for one, other in pairwise(names):
        tables[one].up(other)
        tables[other].up(one)
    return tables


def talk(tables: dict[str, DemandTable]) -> int:
    """Let all tables tell all that they have; how many times one spoke."""
    spoken = 0
    while True:
        said = 0
        for name, table in tables.items():
            for peer in list(table._up):
                if peer in tables and table.has_news(peer) and (news := table.news(peer)) is not None:
                    tables[peer].hear(name, *news)
                    said += 1
        if not said:
            return spoken
        spoken += said


def test_a_demand_goes_along_a_chain_and_ends_everywhere() -> None:
    tables = linked("a", "b", "c", "d")
    talk(tables)
    tables["d"].set_own("/queue/q", False, True)
    talk(tables)
    key = Key("/queue/q", False, "d")
    assert tables["a"].best(key) == ("b", ("b", "c", "d"))
    tables["d"].set_own("/queue/q", False, False)
    assert talk(tables) == 3
    assert [tables[name].best(key) for name in "abc"] == [None] * 3


def test_at_the_hop_limit_a_demand_is_told_no_further() -> None:
    tables = linked("a", "b", "c", "d", hops_max=2)
    tables["d"].set_own("/queue/q", False, True)
    talk(tables)
    key = Key("/queue/q", False, "d")
    assert tables["b"].best(key) == ("c", ("c", "d"))
    assert tables["a"].best(key) is None


def test_a_cut_ends_plain_demand_and_keeps_what_is_durable() -> None:
    tables = linked("a", "b", "c")
    tables["c"].set_own("/topic/t", False, True)
    tables["c"].set_own("/topic/t", True, True)
    talk(tables)
    for one, other in (("b", "c"), ("c", "b")):
        tables[one].down(other)
    talk(tables)
    assert tables["a"].best(Key("/topic/t", False, "c")) is None
    assert tables["a"].best(Key("/topic/t", True, "c")) == ("b", ("b", "b", "c"))
    assert tables["b"].best(Key("/topic/t", True, "c")) == ("c", ("c",))


def test_a_way_that_is_up_goes_before_a_shorter_one_that_is_cut() -> None:
    tables = linked("a", "b", "c")
    tables["a"].up("c")
    tables["c"].up("a")
    tables["c"].set_own("/topic/t", True, True)
    talk(tables)
    key = Key("/topic/t", True, "c")
    assert tables["a"].best(key) == ("c", ("c",))
    tables["a"].down("c")
    tables["c"].down("a")
    talk(tables)
    assert tables["a"].best(key) == ("b", ("b", "c"))
    assert tables["a"].up("c") == [key]
    assert tables["a"].best(key) == ("c", ("c",))


def test_another_path_by_the_same_peer_is_a_change() -> None:
    """Who chooses the nearest of several has to look again."""
    table = DemandTable("a", 16)
    table.up("b")
    key = Key("/queue/q", False, "d")
    assert table.hear("b", True, [(*key, ("b", "c", "d"))], ()) == [key]
    assert table.hear("b", False, [(*key, ("b", "d"))], ()) == [key]
    assert table.hear("b", False, [(*key, ("b", "d"))], ()) == []


@pytest.mark.parametrize(
    ("origin", "path"),
    [
        ("c", ()),
        ("c", ("c",)),
        ("c", ("b", "d")),
        ("c", ("b", "a", "c")),
        ("a", ("b", "a")),
        ("c", ("b", "d", "e", "f", "c")),
    ],
)
def test_a_path_that_can_not_be_is_passed_over(origin: str, path: tuple[str, ...]) -> None:
    table = DemandTable("a", 4)
    table.up("b")
    table.hear("b", True, [("/queue/q", False, origin, path)], ())
    assert table.best(Key("/queue/q", False, origin)) is None
    assert not table.heard("b")


def test_a_path_that_can_not_be_ends_the_one_that_was_told_before() -> None:
    table = DemandTable("a", 4)
    table.up("b")
    table.hear("b", True, [("/queue/q", False, "c", ("b", "c"))], ())
    assert table.hear("b", False, [("/queue/q", False, "c", ("b", "a", "c"))], ()) == [Key("/queue/q", False, "c")]


def test_nothing_that_a_peer_drops_and_never_told_does_harm() -> None:
    table = DemandTable("a", 4)
    table.up("b")
    table.set_own("/queue/q", False, True)
    assert table.hear("b", False, (), [("/queue/q", False, "a"), ("/queue/r", False, "c")]) == []
    assert table.news("b") == (True, [("/queue/q", False, "a", ("a",))], [])


def test_one_peer_can_not_tell_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demand, "HEARD_MAX", 3)
    table = DemandTable("a", 4)
    table.up("b")
    wanted = [(f"/queue/{at}", False, "b", ("b",)) for at in range(4)]
    table.hear("b", True, wanted[:3], ())
    for whole in (False, True):
        with pytest.raises(LimitExceeded, match="peer b demands too many"):
            table.hear("b", whole, wanted if whole else wanted[3:], ())
        assert len(table.heard("b")) == 3, "nothing of what was refused has been heard"
    table.hear("b", False, wanted[:3], ())  # what is known may be told again
    table.hear("b", False, wanted[3:], [wanted[0][:3]])  # or another one in the place of one that ends
    assert {key.destination for key in table.heard("b")} == {"/queue/1", "/queue/2", "/queue/3"}
    assert len(table.down("b")) == 3
    assert table.best(Key("/queue/1", False, "b")) is None


def test_what_is_not_written_down_is_told_when_it_is() -> None:
    table = DemandTable("a", 16)
    held, other = Key("/topic/t", True, "c"), Key("/topic/u", True, "c")
    for peer in "bc":
        table.up(peer)
    table.hear("c", True, [(*held, ("c",)), (*other, ("c",))], ())
    table.hold([held])
    table.hold([held])
    assert table.news("b") == (True, [(*other, ("a", "c"))], [])
    for _ in range(2):
        assert not table.has_news("b")
        assert table.news("b") is None
        table.written([held])
    assert table.has_news("b")
    assert table.news("b") == (False, [(*held, ("a", "c"))], [])
    assert not table.has_news("b")


def test_a_peer_that_is_taken_out_is_forgotten_whole() -> None:
    tables = linked("a", "b")
    tables["b"].set_own("/topic/t", True, True)
    talk(tables)
    tables["a"].down("b")
    key = Key("/topic/t", True, "b")
    assert tables["a"].best(key) is not None
    assert tables["a"].forget_peer("b") == [key]
    assert tables["a"].best(key) is None
    assert not tables["a"].heard("b")


def test_two_that_are_both_cut_from_a_third_come_to_an_agreement() -> None:
    """Not: each thinks that the other has a way, says no more of its own, hears that the other one says so, and begins again."""
    tables = linked("a", "b")
    key = Key("/topic/t", True, "c")
    for name in "ab":
        tables[name].up("c")
        tables[name].hear("c", True, [(*key, ("c",))], ())
    talk(tables)
    for name in "ab":
        tables[name].down("c")
    for _ in range(10):
        said = {name: tables[name].news(other) for name, other in ("ab", "ba")}
        for name, other in ("ab", "ba"):
            if said[name] is not None:
                tables[other].hear(name, *said[name])
    assert said == {"a": None, "b": None}
    assert [tables[name].best(key) for name in "ab"] == [("c", ("c",))] * 2
    assert tables["a"].up("c") == []
    assert tables["a"].news("b") == (False, [(*key, ("a", "c"))], [])
    assert tables["b"].hear("a", False, [(*key, ("a", "c"))], ()) == [key]
    assert tables["b"].best(key) == ("a", ("a", "c"))
