"""The consumers of case `choosing` get what is theirs, in every layout, and anything else is an error."""

import pytest
import trio
from benchmarks.choosing import GROUPS, LAYOUTS, Consumption, Layout, Shape, measure, rows
from benchmarks.report import Rounds


@pytest.mark.parametrize("name", ["queues", "value-waiting", "order", "groups"])
def test_a_small_run(tmp_path, name):
    result = trio.run(measure, tmp_path / "data", LAYOUTS[name], 400)
    assert result["messages"] == 400
    assert result["rate"] == pytest.approx(400 / result["seconds"])


def test_strangers_stay(tmp_path):
    layout = Layout(20, "ward = '{}'", strangers=300)
    assert trio.run(measure, tmp_path / "data", layout, 200)["messages"] == 200


@pytest.mark.parametrize(
    ("layout", "taken"),
    [
        (LAYOUTS["value"], [(1, 1), (1, 1)]),
        (LAYOUTS["value"], [(1, 2)]),
        (LAYOUTS["groups"], [(0, 7), (1, GROUPS + 7)]),
        (LAYOUTS["groups"], [(0, GROUPS + 7), (0, 7)]),
    ],
    ids=["twice", "for another", "a group of two", "out of order"],
)
def test_what_must_not_come(layout, taken):
    consumption = Consumption(layout)

    def take():
        for consumer, at in taken:
            consumption.take(consumer, b"%d x" % at)

    with pytest.raises(AssertionError, match="came"):
        take()


def test_rows():
    ours = Rounds([{"rate": 40.0, "server_cpu": 1.0, "messages": 1_000, "memory": 5_000_000}])
    beside = Rounds([{"rate": 100.0, "server_cpu": 0.5, "messages": 1_000, "memory": 4_000_000}])
    rate, memory = rows(Shape("a", "value", "queues", "queues"), ours, beside)
    assert (rate.met, rate.ratio, rate.cpu_us) == (False, 0.4, 1_000.0)
    assert (memory.figure, memory.beside_figure, memory.met) == (5.0, 4.0, None)
