"""The native load counts exactly, through one broker and over a link; what cases `native` and `network` make of figures."""

import os
import socket
from contextlib import ExitStack

import pytest
import trio
from benchmarks.native import LISTEN, SHAPES, row
from benchmarks.network import cpu
from benchmarks.processes import BROKER, ServerFailed, run_child, serving
from benchmarks.report import Rounds
from benchmarks.wire import LoadError

import pybroker
from benchmarks import bare_wire, network

LOAD = "benchmarks.load_native"


@pytest.fixture
def servers(tmp_path):
    """Two brokers, of which the first dials the second."""
    with ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            nobody = f"pybroker://127.0.0.1:{free.getsockname()[1]}"
        second = stack.enter_context(
            serving(BROKER, tmp_path / "second", LISTEN, ["--name", "second", "--peer", nobody])
        )
        first = stack.enter_context(
            serving(BROKER, tmp_path / "first", LISTEN, ["--name", "first", "--peer", second.url])
        )
        yield first, second


@pytest.mark.parametrize("flags", [[], ["--volatile"], ["--behind", 300]], ids=["durable", "volatile", "bounded"])
def test_through_one_broker(tmp_path, flags):
    with serving(BROKER, tmp_path / "data", LISTEN) as server:
        common = ["--url", server.url, "--pid", server.pid, "--messages", 7_000, "--warm", 500]
        result = run_child(LOAD, [*common, *flags])
    assert result["messages"] == 7_000
    assert result["rate"] == pytest.approx(7_000 / result["seconds"])
    assert result["server_cpu"] == sum(result["each_cpu"]) > 0
    assert 0 < result["behind_max"] <= (400 if "--behind" in flags else 8_000)


def test_by_time_everything_that_was_sent_is_received(tmp_path):
    with serving(BROKER, tmp_path / "data", LISTEN) as server:
        result = run_child(LOAD, ["--url", server.url, "--seconds", 0.2, "--warm", 0])
    assert result["messages"] > 0
    assert result["messages"] % 100 == 0
    assert result["each_cpu"] == []


def test_from_one_broker_to_the_next(servers):
    first, second = servers
    pids = ["--pid", first.pid, "--pid", second.pid]
    result = run_child(LOAD, ["--url", first.url, "--to", second.url, *pids, "--messages", 3_000, "--warm", 200])
    assert result["messages"] == 3_000
    assert len(cpu(result)) == 2
    assert min(result["each_cpu"]) > 0


def test_a_message_that_nobody_sent_is_an_error(tmp_path):
    async def send_another(url):
        async with pybroker.connect(url) as client:
            await client.send("/queue/benchmark", b"another")

    def load(data):
        with serving(BROKER, data, LISTEN) as server:
            trio.run(send_another, server.url)
            run_child(LOAD, ["--url", server.url, "--messages", 100, "--warm", 0])

    with pytest.raises(ServerFailed, match="is not what was sent at its place"):
        load(tmp_path / "data")


def test_the_bare_loop_moves_what_it_counts(monkeypatch):
    assert bare_wire.measure(1_000, 64) > 0
    monkeypatch.setattr(bare_wire, "received_bodies", lambda _: iter([[b"wrong"] * 100]))
    with pytest.raises(LoadError):
        bare_wire.measure(100, 64)


@pytest.mark.parametrize(
    ("rate", "floor", "met"),
    [(85_000, 10_000_000, True), (60_000, 100_000, True), (59_000, 100_000, False)],
    ids=["by its own", "by its floor's", "neither"],
)
def test_a_rate_is_met_by_either_target(rate, floor, met):
    ours = Rounds([{"rate": rate, "server_cpu": 1.0, "messages": 100_000, "load_cpu": 1.0}])
    found = row(SHAPES[0], ours, [floor, floor])
    assert (found.met, found.beside_figure, found.cpu_us) == (met, floor, 10.0)


def rounds(*each):
    """One round in which brokers took so many microseconds for each of a thousand messages."""
    used = [us / 1_000 for us in each]
    return Rounds([{"rate": 1.0, "messages": 1_000, "server_cpu": sum(used), "each_cpu": used}])


@pytest.mark.parametrize(("each", "met"), [((10.0, 9.0), True), ((10.0, 11.0), False)])
def test_a_hop_costs_what_two_brokers_take_beyond_one(each, met):
    found = network.hop_row("durable", rounds(10.0), rounds(*each), rounds(5.0), judged=True)
    assert found.figure == pytest.approx(sum(each) - 10.0)
    assert found.beside_figure == pytest.approx(10.0)
    assert found.met is met
    assert network.hop_row("durable", rounds(10.0), rounds(*each), rounds(5.0), judged=False).met is None


@pytest.mark.parametrize(("two", "met"), [(11.0, True), (11.2, False)])
def test_two_brokers_carry_by_the_cpu_that_they_take(two, met):
    found = network.side_row(rounds(10.0), rounds(two))
    assert found.beside_figure == pytest.approx(100_000)
    assert found.met is met


def test_a_small_mesh():
    result = run_child("benchmarks.mesh", ["--brokers", 3, "--rounds", 4])
    assert len(result["demand"]) == 4
    assert 0 < max(result["demand"]) < 60
    assert result["joined"] > 0


def test_a_broker_that_joins(tmp_path):
    group = f"multicast://239.255.2.3:6155?group=test-{os.getpid()}&interface=127.0.0.1"
    options = ["--name", "first", "--discovery", group]
    with serving(BROKER, tmp_path / "data", LISTEN, options) as server:
        arguments = ["--url", server.url, "--discovery", group, "--seconds", 0.5, "--rounds", 2, "--rate", 50]
        result = run_child("benchmarks.joining", arguments)
    assert len(result["quiet"]) == len(result["joining"]) == 2
    assert 0 < result["joining_p99_ms"] <= max(each["p99_ms"] for each in result["joining"])
