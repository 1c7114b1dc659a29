"""The demonstration as its users run it, and that it fails where a promise is broken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.zookeeper import require_zookeeper

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import demo
from demo_account import Account
from demo_programs import DemoFailed
from demo_replicas import ReplicaSet
from demo_set import Failover, SetRun
from demo_stage import Gap, Stage
from demo_tables import show_set
from hl7_messages import make_messages

EXAMPLES = Path(demo.__file__).parent
RUN_SECONDS_MAX = 120.0
HELD = "every promise held"


def run_demo(directory: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(EXAMPLES / "demo.py"),
        "--directory",
        str(directory),
        "--deadline",
        "100",
        *arguments,
    ]
    environment = {**os.environ, "PATH": path, "COLUMNS": "80"}
    return subprocess.run(
        command, env=environment, capture_output=True, encoding="utf-8", timeout=RUN_SECONDS_MAX, check=False
    )


@pytest.mark.slow
def test_a_set_goes_on_when_its_leader_is_killed_and_when_the_next_one_is_stopped(tmp_path: Path):
    require_zookeeper()
    done = run_demo(tmp_path, "--count", "1200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert HELD in done.stdout
    assert re.search(r"leader . killed \(kill -9\) after \d+ confirmations", done.stdout)
    assert len(re.findall(r"started again on the same store", done.stdout)) == 2
    assert len(re.findall(r"follows .* after its start, and has all that", done.stdout)) == 2
    rows = re.findall(r"│ (killed|asked to stop) \(.*?│ (\w) +│ (\w) +│ (\d+) -> (\d+) +│", done.stdout)
    assert [row[0] for row in rows] == ["killed", "asked to stop"]
    for _, before, after, epoch, next_epoch in rows:
        assert before != after
        assert int(epoch) < int(next_epoch)
    assert "the three copies are at the same position" in done.stdout
    shown = re.findall(r"│ ([abc]) +│ (leader|follower) +│ yes +│ (\d+:\d+) +│ 0 +│", done.stdout)
    assert [row[0] for row in shown] == ["a", "b", "c"]
    assert len({row[2] for row in shown}) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_one_broker_is_shown_when_asked_for(tmp_path: Path):
    done = run_demo(tmp_path, "--single", "--count", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    assert HELD in done.stdout
    assert "broker killed with SIGKILL" in done.stdout
    assert "ZooKeeper" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_where_zookeeper_can_not_run_it_is_said_and_one_broker_shown(tmp_path: Path):
    without_java = tmp_path / "bin"
    without_java.mkdir()
    done = run_demo(tmp_path, "--count", "100", path=str(without_java))
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith("no replica set can be shown: ")
    assert "Debian package" in first
    assert "one broker" in second
    assert "broker killed with SIGKILL" in done.stdout
    assert HELD in done.stdout


def test_a_run_without_result_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: object) -> None:
        raise DemoFailed("it [could] not be done")

    monkeypatch.setattr(demo, "run_single", fail)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--single", "--count", "3", "--directory", str(tmp_path)])
    assert demo.main() == 1
    told = capsys.readouterr().out
    assert "broken: it [could] not be done" in told
    assert "broken: 3 messages not confirmed" in told
    assert HELD not in told


@pytest.fixture
def run(tmp_path: Path) -> SetRun:
    """A run that has not begun."""
    account = Account(list(make_messages(1, 3)))
    stage = Stage(account, 1, 10.0, Console(width=100), started=100.0)
    return SetRun(stage, ReplicaSet(tmp_path, "127.0.0.1:1", [1, 2, 3]))


def test_a_set_of_which_nothing_is_known_has_no_faults_of_its_own(run: SetRun):
    assert run.faults() == []


def test_copies_that_are_not_equal_are_a_fault(run: SetRun):
    a, b, c = run.replicas.members
    run.copies = [(a, (3, 17)), (b, (3, 17)), (c, (3, 16))]
    assert run.faults() == ["the copies are not equal at the end: a at (3, 17), b at (3, 17), c at (3, 16)"]


def test_a_leader_that_had_ended_and_leads_is_a_fault(run: SetRun):
    run.failovers = [Failover("killed (kill -9)", "a", "a", 1, 2, None)]
    assert run.faults() == ["a was killed (kill -9), and leads in epoch 2"]


def test_the_tables_of_a_set(run: SetRun, capsys: pytest.CaptureFixture[str]):
    run.replicas.time_line = [
        (101.0, "a", "leader, epoch 1"),
        (101.01, "b", "follower, epoch 1"),
        (101.01, "c", "candidate, epoch 0"),
        (102.5, "a", "killed"),
    ]
    run.failovers = [Failover("killed (kill -9)", "a", "b", 1, 2, Gap(123.4, 2, 5))]
    run.status = "set: [demo]"
    run.stage.console = Console(width=100)
    show_set(run, run.stage.console)
    lines = [re.sub(r"[│┃ ]+", " ", line).strip() for line in capsys.readouterr().out.splitlines()]
    assert "1.00 leader, epoch 1 follower, epoch 1" in lines
    assert "2.50 killed" in lines
    assert not any("candidate" in line for line in lines)
    assert "killed (kill -9) a b 1 -> 2 123 ms 5" in lines
    assert "set: [demo]" in lines
