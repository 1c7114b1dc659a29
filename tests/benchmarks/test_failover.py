"""The failover figures without a set: gaps by the producer's notes, steps by what members print and log, the producer itself."""

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks.failover import Event, Load, breakdown, longest_gap, producing, rows, run, trace
from benchmarks.load_failover import CONFIRMED, CONNECTED, LOST, RECORD
from benchmarks.processes import ROOT, TRIAL, ServerFailed, serving
from benchmarks.replicas import STAMP, Member, Members, number_of, set_arguments
from benchmarks.settings import NotMeasurable
from tests.support import zookeeper


@pytest.fixture
def changed() -> threading.Condition:
    return threading.Condition()


@pytest.fixture
def members(tmp_path: Path, changed: threading.Condition) -> Members:
    """Three that never run."""
    names = ("a", "b", "c")
    return Members(tmp_path, [Member(name, tmp_path / name, "127.0.0.1", (), (), changed) for name in names], changed)


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    """Members that are said to run."""
    monkeypatch.setattr(Member, "running", property(lambda member: not member._may_end))


def ended(code: int | None = None) -> Any:
    """A producer's process that runs, or has ended with `code`."""
    return SimpleNamespace(poll=lambda: code)


def noted(path: Path, *records: tuple[float, int]) -> Load:
    path.write_bytes(b"".join(RECORD.pack(*record) for record in records))
    return Load(ended(), path)


# ---- gaps


@pytest.mark.parametrize(("times", "gap"), [([], 0.0), ([5.0], 0.0), ([1.0, 1.5, 4.0, 4.25], 2.5)])
def test_the_longest_gap(times, gap):
    assert longest_gap(times) == gap


def test_a_gap_begins_with_the_last_receipt_before_the_event(tmp_path):
    load = noted(
        tmp_path / "times",
        (1.0, CONFIRMED),  # a gap of a second, long before
        (9.0, CONFIRMED),
        (9.99, CONFIRMED),
        (10.02, LOST),
        (10.11, CONNECTED),
        (10.14, CONFIRMED),
        (10.15, CONFIRMED),
    )
    assert load.gap(10.0) == pytest.approx(0.15)
    assert load.receipts(10.0) == [10.14, 10.15]
    assert load.first(CONNECTED, 10.0) == 10.11
    assert load.first(CONNECTED, 10.2) is None


def test_a_record_that_is_half_written_is_not_read(tmp_path):
    load = noted(tmp_path / "times", (1.0, CONFIRMED), (2.0, CONFIRMED))
    data = (tmp_path / "times").read_bytes()
    (tmp_path / "times").write_bytes(data[:-3])
    assert load.receipts(0.0) == [1.0]


def test_a_producer_that_has_ended_is_not_waited_for(tmp_path):
    (tmp_path / "times").touch()
    with pytest.raises(ServerFailed, match="the producer ended"):
        Load(ended(1), tmp_path / "times").wait_steady()


# ---- what members print and log


def test_roles_are_read_from_what_a_member_prints(members, running):
    a, b, c = members
    for member in members:
        member._may_end = False
    a.take_line("role leader epoch 3", 1.0)
    a.take_line("listening stomp://127.0.0.1:1", 1.1)
    b.take_line("role follower epoch 3", 1.2)
    c.take_line("role follower epoch 2", 1.2)
    assert members.leader() is a
    assert members.leader(above=3) is None
    assert members.followers() == [b]
    b.take_line("role leader epoch 4", 2.0)  # the old one does not know yet
    assert members.leader() is b
    b._may_end = True
    assert b.role == ("", 0)
    assert a.lines[1] == (1.1, "listening stomp://127.0.0.1:1")
    c.take_line("role leader said an operator", 3.0)
    assert c.role == ("follower", 2)


def test_waiting_tells_the_last_words_of_a_member_that_ended(members):
    a = members.members[0]
    a.log.write_text("the disk is on fire\n")
    a._may_end = False  # and it does not run
    with pytest.raises(
        ServerFailed, match=r"(?s)replica a ended, waiting for: a leader above epoch 0.*disk is on fire"
    ):
        members.wait_leader()


def test_log_lines_carry_the_clock_of_the_receipts(members):
    a = members.members[0]
    at = time.time() - 5
    stamp = datetime.fromtimestamp(at).strftime(STAMP)[:-3]
    a.log.write_text("earlier\n")
    mark = a.log_size()
    with a.log.open("a") as log:
        log.write(f"Traceback (most recent call last):\n{stamp} INFO pybroker.cluster: elected\n")
    ((found, text),) = a.log_lines(mark)
    assert found == pytest.approx(time.monotonic() - 5, abs=0.5)
    assert text == "INFO pybroker.cluster: elected"


def test_steps_are_those_of_the_member_that_leads_next(members, tmp_path, monkeypatch):
    _, b, c = members
    said = {
        "a": [(9.9, "replica a of set s: leader (epoch 1)"), (10.3, "replica a of set s: follower (epoch 2)")],
        "b": [
            (9.0, "replica b no longer follows z: link broken"),
            (10.004, "replica b no longer follows a: link broken"),
            (10.05, "replica b of set s: leader (epoch 2)"),
            (10.07, "replica c (copy x) attached at (1, 5), batches"),
        ],
        "c": [(10.003, "replica c no longer follows a: link broken")],
    }
    monkeypatch.setattr(Member, "log_lines", lambda member, _=0: said[member.name])
    b.lines = [(1.0, "listening stomp://early"), (10.09, "listening stomp://127.0.0.1:2")]
    load = noted(tmp_path / "times", (10.001, CONFIRMED), (10.1, CONNECTED), (10.12, CONFIRMED))
    marks = dict.fromkeys("abc", 0)
    assert breakdown(load, members, b, 10.0, marks) == {
        "death seen": pytest.approx(4),
        "elected": pytest.approx(50),
        "follower attached": pytest.approx(70),
        "listening": pytest.approx(90),
        "producer there": pytest.approx(100),
        "first receipt": pytest.approx(120),
    }
    assert set(breakdown(load, members, c, 10.0, marks)) == {"death seen", "producer there", "first receipt"}
    told = trace(members, 10.0, marks)
    assert [line.split()[:3] for line in told] == [
        ["3.0", "c", "log"],
        ["4.0", "b", "log"],
        ["50.0", "b", "log"],
        ["70.0", "b", "log"],
        ["90.0", "b", "print"],
        ["300.0", "a", "log"],
    ]


def test_members_are_started_with_flags_and_a_file_only_for_what_has_none(tmp_path, changed):
    plain = set_arguments(tmp_path, "h:1,h:2")
    assert plain[plain.index("--zookeeper") + 1] == "h:1,h:2"
    assert (tmp_path / "secret").stat().st_mode & 0o077 == 0
    assert not (tmp_path / "set.toml").exists()
    table = set_arguments(tmp_path, "h:1", ['allow = ["plaintext"]'])
    assert table[-1] == tmp_path / "set.toml"
    assert (tmp_path / "set.toml").read_text() == '[replica_set]\nallow = ["plaintext"]\n'
    assert plain[plain.index("--set") + 1] != table[table.index("--set") + 1]
    command = Member("a", tmp_path / "a", "127.0.0.1", ("ip", "netns"), plain, changed)._command
    assert command[:2] == ["ip", "netns"]
    assert command[-len(plain) :] == list(map(str, plain))


def test_a_replica_without_a_store_is_nowhere():
    assert number_of({"position": [3, 17]}) == 17
    assert number_of({"position": None}) == -1


def test_the_disk_use_counts_a_file_of_two_names_once(members):
    a = members.members[0]
    (a.data / "copy-1").mkdir(parents=True)
    (a.data / "copy-1" / "table").write_bytes(b"x" * 100_000)
    once = a.disk_bytes()
    (a.data / "copy-2").mkdir()
    (a.data / "copy-2" / "table").hardlink_to(a.data / "copy-1" / "table")
    assert 100_000 <= once <= a.disk_bytes() < 2 * once


# ---- rows


def result(gap_ms: float, **steps: float) -> dict[str, Any]:
    return {"gap_ms": gap_ms, "steps_ms": steps}


EVENT = Event("gap", lambda _: None, lambda _: None)


def test_median_and_worst_are_judged_apart():
    results = [result(100, elected=50), result(140, elected=70), result(600)]
    median, worst, *steps = rows(EVENT, results, 150, 500)
    assert (median.figure, median.low, median.high, median.target, median.met) == (140, 100, 600, "< 150", True)
    assert (worst.figure, worst.target, worst.met) == (600, "< 500", False)
    assert [(step.name.split()[-1], step.figure, step.met) for step in steps] == [("elected", 60, None)]
    assert median.details == {"results": results}


def test_a_median_without_a_target_informs():
    median, worst = rows(EVENT, [result(90)], None, 100)
    assert (median.target, median.met) == ("", None)
    assert worst.met is True


def test_without_zookeeper_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(zookeeper, "missing", lambda: "it is not installed (Debian package x)")
    settings: Any = SimpleNamespace(say=lambda _: None)
    with pytest.raises(NotMeasurable, match=r"no ZooKeeper: it is not installed \(Debian package x\)"):
        list(run(settings))


# ---- the producer


def wait_for(found: Callable[[], object]) -> None:
    ends = time.monotonic() + 20
    while not found():
        assert time.monotonic() < ends
        time.sleep(0.01)


@contextmanager
def trial(data: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The trial at that port, which may be killed meanwhile."""
    command = [*TRIAL.command, "--data", str(data), "--listen", f"stomp://127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_producer_finds_the_server_that_answers_and_finds_it_again(tmp_path):
    """Three addresses, one of them served; then another one, when that server has been killed."""
    nobody, *ports = zookeeper.free_ports(3)
    urls = [f"stomp://127.0.0.1:{port}" for port in (nobody, *ports)]
    with producing(urls, tmp_path / "times", interval=0.001) as load:
        lost = 0.0
        for number, port in enumerate(ports):
            with trial(tmp_path / str(number), port):
                wait_for(lambda since=lost: len(load.receipts(since)) > 20)
                killed = time.monotonic()
            wait_for(lambda since=killed: load.first(LOST, since))
            lost = time.monotonic()
    records = load.records(0.0)
    assert records[0][1] == CONNECTED
    assert [what for _, what in records if what != CONFIRMED] == [CONNECTED, LOST] * 2
    assert records == sorted(records, key=lambda record: record[0])


def test_the_producer_gives_up_a_server_that_falls_silent(tmp_path):
    """One that stands still breaks no connection: its clients have to give it up by themselves."""
    with serving(TRIAL, tmp_path / "data") as server, producing([server.url], tmp_path / "times") as load:
        wait_for(lambda: len(load.receipts(0.0)) > 20)
        stopped = time.monotonic()
        server.process.send_signal(signal.SIGSTOP)
        try:
            wait_for(lambda: load.first(LOST, stopped))
        finally:
            server.process.send_signal(signal.SIGCONT)
        again = load.first(LOST, stopped)
        assert again is not None
        assert again - stopped > 0.2  # its patience
        wait_for(lambda: len(load.receipts(again)) > 20)
        wait_for(lambda: load.gap(stopped) > 0.2)
