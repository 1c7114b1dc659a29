"""The subscription tree: what it matches, against brute force, and what a look-up costs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.core import topics
from pybroker.core.topics import SubscriptionTree
from pybroker.destination import matches

part = st.sampled_from(("a", "b", "c"))
names = st.lists(part, min_size=1, max_size=4).map(tuple)
patterns = st.tuples(
    st.lists(st.sampled_from(("a", "b", "c", "*")), max_size=3).map(tuple), st.sampled_from(((), (">",), ("a",)))
).map(lambda pair: pair[0] + pair[1] or ("*",))


@settings(max_examples=300, deadline=None)
@given(st.lists(patterns, max_size=12), st.lists(names, min_size=1, max_size=5), st.data())
def test_the_tree_finds_what_brute_force_finds(subscribed: list[Any], wanted: list[Any], data: st.DataObject):
    tree: SubscriptionTree[int] = SubscriptionTree()
    for number, pattern in enumerate(subscribed):
        tree.add(pattern, number)
    left = dict(enumerate(subscribed))
    while True:
        assert len(tree) == len(left)
        for name in wanted:
            assert sorted(tree.match(name)) == [number for number, pattern in left.items() if matches(pattern, name)]
        if not left:
            break
        number = data.draw(st.sampled_from(sorted(left)))
        tree.remove(left.pop(number), number)
    assert not tree._root.children  # empty branches go away
    assert not tree._root.here
    assert not tree._root.rest


def test_matching_subscribers_come_in_the_order_of_their_subscriptions():
    tree: SubscriptionTree[str] = SubscriptionTree()
    for name in ("z", "m", "a"):
        tree.add(("t",), name)
    assert tree.match(("t",)) == ["z", "m", "a"]


def test_removing_what_is_not_there_is_an_error():
    tree: SubscriptionTree[str] = SubscriptionTree()
    tree.add(("a", "b"), "one")
    with pytest.raises(KeyError):
        tree.remove(("a", "c"), "one")
    with pytest.raises(KeyError):
        tree.remove(("a", "b"), "two")
    assert tree.match(("a", "b")) == ["one"]


@pytest.mark.parametrize("others", [10, 10_000])
def test_a_look_up_visits_what_matches_however_many_subscriptions_there_are(others: int, monkeypatch):
    visited = 0

    class Children(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            nonlocal visited
            visited += 1
            return super().get(key, default)

    class Node(topics._Node[Any]):
        __slots__ = ()

        def __init__(self) -> None:
            super().__init__()
            self.children = Children()

    monkeypatch.setattr(topics, "_Node", Node)
    tree: SubscriptionTree[int] = SubscriptionTree()
    for number in range(others):
        tree.add(("ward", str(number), "result"), number)
        tree.add(("other", str(number), ">"), number)
    tree.add(("ward", "*", "result"), -1)
    tree.add(("ward", ">"), -2)
    visited = 0
    assert sorted(tree.match(("ward", "7", "result"))) == [-2, -1, 7]
    assert visited <= 10
