"""The attackers of case `hostile` go on, and what the case makes of figures."""

import pytest
from benchmarks.attacks import ATTACKS
from benchmarks.hostile import NEIGHBOUR, PAIRS, attacking, rows
from benchmarks.processes import BROKER, ServerFailed, run_child, serving
from benchmarks.report import Rounds


def test_a_pair_beside_a_neighbour(tmp_path):
    pair = PAIRS[1]
    with (
        serving(BROKER, tmp_path / "data", f"{pair.scheme}://127.0.0.1:0") as server,
        attacking(NEIGHBOUR, server.url, tmp_path / "log"),
    ):
        flags = ["--url", server.url, "--messages", 300, "--warm", 100]
        assert run_child(pair.module, [*pair.arguments, *flags])["messages"] == 300


def test_an_attacker_that_can_not_begin_is_an_error(tmp_path):
    with (
        pytest.raises(ServerFailed, match="no such attack"),
        attacking("no such attack", "stomp://127.0.0.1:1", tmp_path / "log"),
    ):
        pass


@pytest.mark.parametrize("scheme", ATTACKS)
def test_each_attack_has_something_to_send(scheme):
    for name, attack in ATTACKS[scheme].items():
        piece = next(piece for piece in attack.pieces(0) if isinstance(piece, bytes))
        assert piece, name


def test_an_attack_is_judged_by_the_neighbour():
    measured = {name: Rounds([{"rate": rate, "server_cpu": 1.0, "messages": 1_000}]) for name, rate in
                (("", 200.0), (NEIGHBOUR, 100.0), ("mild", 51.0), ("hard", 49.0))}  # fmt: skip
    assert [row.met for row in rows(PAIRS[0], measured)] == [None, None, True, False]
