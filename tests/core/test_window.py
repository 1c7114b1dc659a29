"""The window: a sorted map against a plain sorted list, and its size in bytes."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.core.entry import Entry
from pybroker.core.window import Window
from pybroker.message import Message

PLACES = st.integers(0, 30)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PLACES),
        st.tuples(st.just("pop"), st.just(0)),
        st.tuples(st.just("discard"), PLACES),
        st.tuples(st.just("cut"), st.tuples(st.integers(0, 6), st.integers(0, 40))),
    ),
    max_size=60,
)


def entry(order: int) -> Entry:
    queue: Any = None
    return Entry(Message("/queue/a", b"x" * (order % 7)), order, queue, False)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_a_window_is_a_sorted_map(steps: list[tuple[str, Any]]):
    window = Window()
    model: dict[int, Entry] = {}
    for what, argument in steps:
        if what == "add" and argument not in model:
            model[argument] = entry(argument)
            window.add(model[argument])
        elif what == "pop" and model:
            first = model.pop(min(model))
            assert window.pop_first() is first
        elif what == "discard":
            assert window.discard(argument) is model.pop(argument, None)
        elif what == "cut" and model:
            count, size = argument
            gone = []
            while len(model) > 1 and (len(model) > count or sum(e.message.size for e in model.values()) > size):
                gone.append(model.pop(max(model)))
            assert window.cut(count, size) == gone
        assert [e.order for e in window] == sorted(model)
        assert len(window) == len(model)
        assert window.size == sum(e.message.size for e in model.values())
        assert window.first_order(99) == min(model, default=99)
        for order in range(31):
            assert (order in window) == (order in model)
            assert window.get(order) is model.get(order)


def test_the_notes_of_early_entries_do_not_pile_up():
    window = Window()
    window.add(entry(1_000_000))
    for order in range(1_000):
        window.add(entry(order))
        window.discard(order)
    assert len(window._heap) == 0
