"""The replication figures without a set: what is judged and how, what is read from logs and from the kernel, the spread load."""

import argparse
import json
import os
import shutil
import socket
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.catchup import (
    CaughtUp,
    attachments,
    behind_rows,
    difference_row,
    disk_row,
    socket_bytes,
    wire_bytes,
)
from benchmarks.leveldb import open_database
from benchmarks.load_spread import chunk
from benchmarks.processes import TRIAL, run_child, serving
from benchmarks.replication import DURABLE, Sides, latency_rows, run, throughput_rows
from benchmarks.report import Rounds, write_json
from benchmarks.settings import NotMeasurable
from benchmarks.throughput import SHAPES
from tests.support import zookeeper

from benchmarks import catchup

SHAPE = SHAPES[1]


def pumped(rate: float, cpu_us: float) -> dict[str, Any]:
    """One result of the load generator."""
    return {
        "rate": rate,
        "messages": 1_000,
        "server_cpu": cpu_us / 1000,
        "leader_cpu_us": cpu_us,
        "follower_cpu_us": cpu_us / 2,
    }


def sides(ours: list[tuple[float, float]], single: list[tuple[float, float]]) -> Sides:
    return Sides(Rounds([pumped(*pair) for pair in ours]), Rounds([pumped(*pair) for pair in single]))


# ---- throughput and latency


def test_all_durable_shapes_are_measured():
    assert [shape.name for shape in DURABLE] == ["persistent, auto ack", "persistent, individual acks"]


@pytest.mark.parametrize(
    ("rate", "cpu_us", "met"),
    [(50_000, 20.0, True), (20_000, 14.9, True), (20_000, 15.1, False)],
    ids=["by the rate", "by processor time", "by neither"],
)
def test_a_set_is_judged_by_its_rate_or_by_its_processor_time(rate, cpu_us, met):
    judged, cpu, follower = throughput_rows(SHAPE, sides([(rate, cpu_us)], [(100_000, 10.0)]))
    assert judged.met is met
    assert (judged.figure, judged.beside_figure, judged.cpu_us) == (rate, 100_000, pytest.approx(cpu_us))
    assert (cpu.figure, cpu.beside_figure, cpu.met) == (pytest.approx(cpu_us), pytest.approx(10.0), None)
    assert follower.figure == pytest.approx(cpu_us / 2)


def test_medians_of_the_rounds_count():
    judged, *_ = throughput_rows(SHAPE, sides([(1, 9), (60, 9), (55, 9)], [(100, 1), (10, 1), (900, 1)]))
    assert (judged.figure, judged.low, judged.high, judged.beside_figure) == (55, 1, 60, 100)
    assert judged.met is True


def paced(p99: float) -> dict[str, Any]:
    return {what: {"p50_ms": 1.0, "p99_ms": p99, "max_ms": 99.0} for what in ("receipt", "delivery")}


@pytest.mark.parametrize(("p99", "met"), [(24.9, True), (25.0, False)])
def test_only_the_99th_percentile_of_the_latency_is_judged(p99, met):
    found = list(latency_rows(Sides(Rounds([paced(p99)]), Rounds([paced(2.0)]))))
    assert len(found) == 6
    assert {row.name.rpartition(", ")[2]: row.met for row in found} == {"p50": None, "p99": met, "max": None}
    assert [row.beside_figure for row in found if "p99" in row.name] == [2.0, 2.0]


# ---- catching up


def caught(seconds: float = 10.0, moved: int = 1_000) -> CaughtUp:
    return CaughtUp(99.0, 100.0, 100.0 + seconds, 1, ("difference",), moved)


@pytest.mark.parametrize(
    ("seconds", "receipts", "met"),
    [(20.0, [101.0, 102.0], True), (20.1, [101.0, 102.0], False), (10.0, [], False)],
    ids=["fast enough", "too slow", "the leader did not serve"],
)
def test_a_follower_must_catch_up_fast_while_the_leader_serves(seconds, receipts, met):
    judged, confirmed, gap = behind_rows(1_000_000, 20_000, caught(seconds), receipts)
    assert judged.met is met
    assert judged.figure == pytest.approx(1_000_000 / seconds)
    assert confirmed.figure == pytest.approx(len(receipts) / seconds)
    assert gap.figure == pytest.approx((seconds - 2 if receipts else seconds) * 1000)  # to the end of it, too


@pytest.mark.parametrize(("moved", "met"), [(12_700_000, True), (12_800_000, False), (0, False)])
def test_what_is_moved_is_judged_by_the_bodies(moved, met):
    row = difference_row(1_000, 1_000_000, caught(moved=moved))
    assert row.figure == pytest.approx(moved / 256e6 * 100)
    assert row.met is met


def test_the_worst_directory_is_judged():
    full = {"a": 400, "b": 400, "c": 400}
    row = disk_row(1_000, full, {"a": 40, "b": 99, "c": 40})
    assert (row.figure, row.low, row.high, row.met) == (24.75, 10, 24.75, True)
    assert disk_row(1_000, full, {"a": 40, "b": 100, "c": 40}).met is False


def test_rows_of_catching_up_can_be_kept(tmp_path):
    write_json(tmp_path / "figures.json", [difference_row(10, 100, caught())], {}, [], {})
    (figure,) = json.loads((tmp_path / "figures.json").read_text())["figures"]
    assert figure["details"]["caught_up"]["ways"] == ["difference"]


def test_links_are_read_from_the_leaders_log():
    log = [
        (1.0, "INFO pybroker.cluster: replica b (copy 12ab) attached at (1, 5), batches"),
        (2.0, "INFO pybroker.cluster: replica c (copy 34cd) attached at (0, 0), difference"),
        (3.0, "INFO pybroker.cluster: replica b (copy 12ab) detached: too slow: it was attached at noon, batches"),
        (4.0, "INFO pybroker.cluster: replica b (copy 12ab) attached at (1, 9), difference"),
    ]
    assert attachments(log, "b") == [(1.0, "batches"), (4.0, "difference")]
    assert attachments(log, "x") == []


LISTING = """\
ESTAB 0 0 127.0.0.1:48230 127.0.0.1:20357 users:(("python",pid=117,fd=31),("python",pid=200,fd=3))
\t cubic wscale:10,10 rto:204 bytes_sent:558 bytes_retrans:7 bytes_acked:551 bytes_received:221 segs_out:9
ESTAB 0 0 127.0.0.1:48231 127.0.0.1:20357 users:(("python",pid=1170,fd=31))
\t cubic bytes_sent:10000 bytes_received:10000
ESTAB 0 0 127.0.0.1:48232 127.0.0.1:20357 users:(("python",pid=117,fd=32))
\t cubic bytes_received:1000
CLOSE-WAIT 1 0 127.0.0.1:48233 127.0.0.1:20357
"""


def test_the_kernel_says_what_went_over_a_link():
    assert socket_bytes(LISTING, 117) == 558 + 221 + 1000
    assert socket_bytes(LISTING, 17) == 0
    assert socket_bytes("", 117) == 0


def test_without_the_kernels_word_nothing_is_said(monkeypatch):
    def missing(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("ss")

    monkeypatch.setattr(catchup.subprocess, "run", missing)
    member: Any = SimpleNamespace(pid=1, replication_port=1)
    with pytest.raises(NotMeasurable, match="iproute2"):
        wire_bytes(member, member)


def test_bytes_of_a_real_connection_are_counted():
    if shutil.which("ss") is None:
        pytest.skip("NO ss COMMAND (Debian package iproute2)")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, server.accept()[0] as other:
            client.sendall(b"x" * 1_000)
            other.recv(1_000, socket.MSG_WAITALL)
            other.sendall(b"y" * 234)
            client.recv(234, socket.MSG_WAITALL)
            member: Any = SimpleNamespace(pid=os.getpid())
            leader: Any = SimpleNamespace(replication_port=port)
            assert wire_bytes(member, leader) == 1_234


def test_without_zookeeper_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(zookeeper, "missing", lambda: "it is not installed")
    settings: Any = SimpleNamespace(say=lambda _: None)
    with pytest.raises(NotMeasurable, match="no ZooKeeper: it is not installed"):
        list(run(settings))


# ---- the load over many queues


def test_queues_are_filled_in_turn():
    options = argparse.Namespace(prefix="/queue/x.", each=3, size=8)
    frames = chunk(options, 4, 8).split(b"\0")[:-1]
    assert [frame.split(b"\n")[1] for frame in frames] == [
        b"destination:/queue/x.1",
        b"destination:/queue/x.1",
        b"destination:/queue/x.2",
        b"destination:/queue/x.2",
    ]
    assert [b"receipt:r8" in frame for frame in frames] == [False, False, False, True]


@pytest.mark.parametrize(("queues", "each"), [(7, 150), (130, 1)])
def test_spread_against_the_trial(tmp_path, queues, each):
    with serving(TRIAL, tmp_path / "data") as server:
        arguments = ["--url", server.url, "--queues", queues, "--each", each]
        result = run_child("benchmarks.load_spread", arguments)
    assert result["messages"] == queues * each
    assert result["rate"] > 0
    database = open_database(tmp_path / "data")
    assert len(list(database)) == queues * each
    database.close()
