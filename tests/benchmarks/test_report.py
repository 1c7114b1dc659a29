"""Rows, the table and the file that keeps them."""

import io
import json

import pytest
from benchmarks.processes import Memory
from benchmarks.report import Rounds, Row
from rich.console import Console

from benchmarks import machine, report

ROWS = [
    Row(case="stomp", name="fast", figure=90_000.0, unit="msg/s", low=80_000.0, high=95_000.0, beside="trial",
        beside_figure=180_000.0, target=">= 80,000", met=True, cpu_us=11.25, details={"memory": Memory(1, 2, 3)}),
    Row(case="stomp", name="slow", figure=1.5, unit="msg/s", target=">= 2", met=False),
    Row(case="idle", name="only told", figure=12.34, unit="KB"),
]  # fmt: skip


def test_rows_know_their_ratio():
    assert [row.ratio for row in ROWS] == [0.5, None, None]


@pytest.mark.parametrize(("value", "shown"), [(12_345.6, "12,346"), (12.34, "12.3"), (1.234, "1.23"), (None, "")])
def test_figures_have_the_digits_that_they_are_worth(value, shown):
    assert report.number(value) == shown


def test_rounds_give_medians():
    rounds = Rounds([{"rate": rate, "messages": 1_000, "server_cpu": 0.01 * rate} for rate in (1, 3, 2)])
    assert rounds.median("rate") == 2
    assert rounds.cpu_us == pytest.approx(20.0)


def test_the_table_says_what_was_met_and_the_file_keeps_all(tmp_path):
    about = machine.describe(tmp_path)
    out = io.StringIO()
    report.show(ROWS, about, Console(file=out, width=220))
    text = out.getvalue()
    assert "90,000" in text
    assert "80,000 - 95,000" in text
    assert text.count("met") == 1
    assert text.count("missed") == 1
    report.write_json(tmp_path / "figures.json", ROWS, about, ["benchmarks", "stomp"], {"deep": "went wrong"})
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert kept["command"] == ["benchmarks", "stomp"]
    assert kept["failures"] == {"deep": "went wrong"}
    assert kept["figures"][0]["ratio"] == 0.5
    assert kept["figures"][0]["details"]["memory"] == {"resident": 1, "anonymous": 2, "peak": 3}
    assert {"processor", "cores", "python", "libraries", "date", "sync", "file_system", "interpreter_ns"} <= kept[
        "machine"
    ].keys()


def test_file_systems_are_told_apart(tmp_path):
    assert machine.file_system(tmp_path) != "unknown"
    assert machine.file_system(machine.Path("/proc")) == "proc"
