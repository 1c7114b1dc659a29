"""``pybroker replica`` and the replica set's flags of ``serve``, as somebody types them. The replicas are played here."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from pybroker import cli
from pybroker.config import BrokerConfig, ReplicaSetConfig
from pybroker.control import Handler
from pybroker.errors import BrokerError, NotLeader
from tests.cli.fake_control import answering
from tests.support.serving import call_pybroker, served


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: the address of a control socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pb-") as name:
        yield Path(name)


def run(*arguments: str | Path, stdin: bytes = b"", status: int = 0) -> str:
    """Run a command that must end with this status; return what it printed (and said, when it must fail)."""
    done = call_pybroker(*arguments, stdin=stdin)
    assert done.returncode == status, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    return (done.stdout if status == 0 else done.stdout + done.stderr).decode()


def member(name: str, role: str, **fields: Any) -> dict[str, Any]:
    known = {"counted": True, "position": [3, 41], "lag": 0, "state": "", "address": f"[::1]:70{ord(name):02}"}
    return {"name": name, "role": role, "incarnation": f"{name}1", **known, **fields}


def status_of(**fields: Any) -> dict[str, Any]:
    """What a leader says of its set."""
    return {
        "set": "ward",
        "name": "a",
        "role": "leader",
        "epoch": 3,
        "leader": "a",
        "clients": ["stomp://[::1]:61613"],
        "zookeeper": "connected",
        "blocked": "",
        "position": [3, 41],
        "sync": "quorum_disk",
        "members": [
            member("a", "leader", lag=None, state="leads"),
            member("b", "follower", position=[3, 40], lag=1_001, state="follows [red]slowly"),
            member("c", "none", counted=False, position=None, lag=None, state="absent"),
        ],
        **fields,
    }


class Played:
    """A replica that answers what it is told to, and notes what it was asked."""

    def __init__(self, status: dict[str, Any], after: dict[str, Any] | BrokerError | None = None) -> None:
        self.asked: list[Mapping[str, Any]] = []
        self._status = status
        self._after = after

    async def _answer_status(self, _: Mapping[str, Any]) -> Any:
        return self._status

    async def _act(self, request: Mapping[str, Any]) -> Any:
        self.asked.append(request)
        if isinstance(self._after, BrokerError):
            raise self._after
        return self._after

    @property
    def handlers(self) -> dict[str, Handler]:
        acts: list[str] = ["replica-handover", "replica-replace", "replica-force-start"]
        return {"replica-status": self._answer_status, **dict.fromkeys(acts, self._act)}


# ---- status


def test_status(directory: Path):
    with answering(directory, Played(status_of()).handlers):
        text = run("replica", "status", "--data", directory)
        assert json.loads(run("replica", "status", "--json", "--data", directory)) == status_of()
    lines = text.splitlines()
    for line in (
        "set: ward",
        "name: a",
        "role: leader",
        "epoch: 3",
        "position: 3:41",
        "leader: a (clients at stomp://[::1]:61613)",
        "sync: quorum_disk",
        "zookeeper: connected",
    ):
        assert line in lines
    assert "blocked" not in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert rows == [
        ["a", "leader", "yes", "3:41", "-", "leads", "[::1]:7097"],
        ["b", "follower", "yes", "3:40", "1,001", "follows [red]slowly", "[::1]:7098"],
        ["c", "none", "no", "-", "-", "absent", "[::1]:7099"],
    ]


def test_status_of_a_set_that_is_blocked(directory: Path):
    blocked = "ZooKeeper's data is older than the stores: `pybroker replica force-start` [starts] it"
    status = status_of(role="candidate", leader=None, clients=[], position=None, blocked=blocked, members=[])
    with answering(directory, Played(status).handlers):
        text = run("replica", "status", "--data", directory)
    assert f"blocked: {blocked}" in text.splitlines()
    assert "leader: none known" in text.splitlines()
    assert "position: -" in text.splitlines()


@pytest.mark.parametrize("missing", ["sync", "lag"])
def test_a_replica_of_another_version_is_told_so(directory: Path, missing: str):
    status = {**status_of(), "members": [member("a", "leader")]}
    del (status if missing in status else status["members"][0])[missing]
    with answering(directory, Played(status).handlers):
        text = run("replica", "status", "--data", directory, status=1)
    assert text == f"pybroker: the replica at {directory} says nothing of its {missing}: is it of another version?\n"


# ---- what changes something


def test_handover(directory: Path):
    replica = Played(status_of(), status_of(role="follower", epoch=4, leader="b"))
    with answering(directory, replica.handlers):
        text = run("replica", "handover", "--data", directory)
    assert text == "replica a has handed set ward over to b (epoch 4)\n"
    assert replica.asked == [{"command": "replica-handover"}]


@pytest.mark.parametrize(("leader", "words"), [("b", "replica b does: ask there"), (None, "no leader is known")])
def test_handover_where_another_one_leads(directory: Path, leader: str | None, words: str):
    replica = Played(status_of(role="follower", leader=leader))
    with answering(directory, replica.handlers):
        text = run("replica", "handover", "--data", directory, status=1)
    assert text == f"pybroker: replica a does not lead set ward, {words}\n"
    assert replica.asked == []


def test_handover_to_nobody(directory: Path):
    with answering(directory, Played(status_of(), status_of(epoch=5)).handlers):
        text = run("replica", "handover", "--data", directory, status=1)
    assert text == "pybroker: no other replica of set ward has taken over: a leads (epoch 5)\n"


def test_replace(directory: Path):
    replica = Played(status_of(), status_of())
    with answering(directory, replica.handlers):
        text = run("replica", "replace", "c", "d", "--data", directory)
    assert text == "replica d takes the place of c in set ward: it counts once it holds everything\n"
    assert replica.asked == [{"command": "replica-replace", "old": "c", "new": "d"}]


def test_what_the_replica_refuses_is_one_line(directory: Path):
    with answering(directory, Played(status_of(), NotLeader("replica a does not lead: b does")).handlers):
        text = run("replica", "replace", "c", "d", "--data", directory, status=1)
    assert text == "pybroker: replica a does not lead: b does\n"


BLOCKED = status_of(
    role="candidate",
    leader=None,
    blocked="ZooKeeper's data is gone",
    members=[member("a", "candidate"), member("b", "candidate"), member("c", "none")],
)


@pytest.mark.parametrize(("options", "answer"), [((), b"y\n"), (("--yes",), b"")])
def test_a_forced_start_says_what_it_means(directory: Path, options: tuple[str, ...], answer: bytes):
    replica = Played(BLOCKED, status_of(epoch=2**32 + 1))
    with answering(directory, replica.handlers):
        text = run("replica", "force-start", "--data", directory, *options, stdin=answer)
    for words in (
        "set ward has no leader: ZooKeeper's data is gone",
        "standing for election: a, b",
        "absent: c",
        "What only the absent replicas have is lost for good",
        "replica a leads set ward (epoch 4294967297)",
    ):
        assert words in text
    assert ("Start set ward with what is there?" in text) == (not options)
    assert replica.asked == [{"command": "replica-force-start"}]


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b""])
def test_a_forced_start_that_is_not_confirmed(directory: Path, answer: bytes):
    replica = Played(BLOCKED)
    with answering(directory, replica.handlers):
        run("replica", "force-start", "--data", directory, stdin=answer, status=1)
    assert replica.asked == []


def test_a_set_with_a_leader_is_not_forced(directory: Path):
    replica = Played(status_of())
    with answering(directory, replica.handlers):
        text = run("replica", "force-start", "--data", directory, "--yes", status=1)
    assert "set ward has a leader, a: there is nothing to force" in text
    assert replica.asked == []


@pytest.mark.parametrize("command", [("status",), ("handover",), ("replace", "a", "b"), ("force-start", "--yes")])
def test_a_broker_on_its_own_is_no_replica(directory: Path, command: tuple[str, ...]):
    with served(directory / "data") if command == ("status",) else answering(directory / "data", {}):
        text = run("replica", *command, "--data", directory / "data", status=1)
    assert text == f"pybroker: the broker that runs on {directory / 'data'} is not a member of a replica set\n"


@pytest.fixture(autouse=True)
def _data(directory: Path) -> None:
    (directory / "data").mkdir()


def test_nothing_runs_there(directory: Path):
    text = run("replica", "status", "--data", directory, status=1)
    assert "no broker answers" in text
    assert len(text.splitlines()) == 1


# ---- serve: its flags


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[BrokerConfig]:
    """The configurations with which ``serve`` would run a broker."""
    seen: list[BrokerConfig] = []

    async def serve(config: BrokerConfig) -> None:
        seen.append(config)

    monkeypatch.setattr(cli, "_serve", serve)
    return seen


def test_each_flag_is_a_field(directory: Path, chosen: list[BrokerConfig]):
    (directory / "secret").write_text("  hunter2\n")
    flags = "--name a --zookeeper z1:2181,z2:2181/x --set ward --replicas 5 --replication 127.0.0.1:7000 "
    flags += "--advertise 127.0.0.1:7001 --sync local_mem --session-timeout 4 --weight -2 --client-url stomp://a:1 "
    flags += f"--client-url stomp://a:2 --secret-file {directory}/secret --data {directory}/data"
    run("serve", *flags.split())
    (config,) = chosen
    assert config.replica_set == ReplicaSetConfig(
        name="ward",
        zookeeper="z1:2181,z2:2181/x",
        replicas=5,
        bind="127.0.0.1:7000",
        advertise="127.0.0.1:7001",
        sync="local_mem",
        session_timeout=4.0,
        weight=-2,
        clients=("stomp://a:1", "stomp://a:2"),
        secret="hunter2",
    )
    assert config.listen == (cli.DEFAULT_URL,)


def test_without_the_flags_a_broker_is_on_its_own(chosen: list[BrokerConfig]):
    run("serve")
    assert chosen[0].replica_set is None


def test_flags_go_over_the_fields_of_the_file(directory: Path, chosen: list[BrokerConfig]):
    file = directory / "a.toml"
    file.write_text(
        'name = "a"\ndata_dir = "data"\n[replica_set]\nname = "ward"\nzookeeper = "z:2181"\nweight = 3\nlease = 5\n'
    )
    run("serve", file, "--weight", "0", "--set", "other")
    run("serve", file)
    expected = ReplicaSetConfig(name="ward", zookeeper="z:2181", weight=3, lease=5.0)
    assert chosen[1].replica_set == expected
    assert chosen[0].replica_set == ReplicaSetConfig(name="other", zookeeper="z:2181", weight=0, lease=5.0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--zookeeper z:1", "--zookeeper is for a member of a replica set, which needs --set (replica_set.name) too"),
        ("--set ward", "--set is for a member of a replica set, which needs --zookeeper (replica_set.zookeeper) too"),
        ("--weight 0", "which needs --zookeeper (replica_set.zookeeper) and --set (replica_set.name) too"),
        ("--zookeeper z:1 --set ward --name a", "data_dir: expected a directory where replica_set is given"),
        ("--zookeeper z:1 --set ward --data d", "name: expected this replica's own name"),
        ("--zookeeper z:1 --set a/b --data d --name a", "replica_set.name: expected 1 to 64 letters"),
        ("--zookeeper z:1 --set w --data d --name a --replication 0.0.0.0:7", "can be reached from beyond loopback"),
        (
            "--zookeeper z:1 --set w --secret-file /none/secret",
            "--secret-file /none/secret can't be read: No such file",
        ),
        ("--zookeeper z:1 --set w --secret-file /dev/null", "--secret-file /dev/null is empty"),
    ],
)
def test_flags_that_make_no_set(chosen: list[BrokerConfig], flags: str, words: str):
    assert words in run("serve", *flags.split(), status=1)
    assert chosen == []


def test_a_sync_mode_that_is_none(chosen: list[BrokerConfig]):
    assert "quorum_disk" in run("serve", "--sync", "disk", status=2)


# ---- serve: what it prints


class PlayedBroker:
    """Goes through roles; listens while it leads, on another port each time."""

    def __init__(self, roles: list[tuple[str, int]]) -> None:
        self._roles = roles
        self.listeners: tuple[str, ...] = ()

    async def roles(self) -> AsyncIterator[tuple[str, int]]:
        for role, epoch in self._roles:
            leads = role in ("leader", "standalone")
            self.listeners = (f"stomp://h:{epoch}", f"stomp://h:{epoch}1") if leads else ()
            await trio.lowlevel.checkpoint()
            yield role, epoch
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep_forever()


@pytest.mark.parametrize("of_a_set", [True, False])
def test_listeners_are_printed_each_time_that_it_leads(
    of_a_set: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    roles = (
        [("none", 0), ("leader", 4), ("none", 4), ("follower", 5), ("leader", 6)] if of_a_set else [("standalone", 0)]
    )
    broker = PlayedBroker(roles)
    ended = []

    @asynccontextmanager
    async def open_broker(_: BrokerConfig) -> AsyncIterator[PlayedBroker]:
        broker.listeners = () if of_a_set else ("stomp://h:0", "stomp://h:01")
        yield broker
        ended.append("in good order")

    monkeypatch.setattr(cli, "open_broker", open_broker)
    chosen = ReplicaSetConfig(name="ward", zookeeper="z:1") if of_a_set else None
    trio.run(cli._serve, BrokerConfig(replica_set=chosen))
    lines = capsys.readouterr().out.splitlines()
    if of_a_set:
        assert lines == [
            "role none epoch 0",
            "role leader epoch 4",
            "listening stomp://h:4",
            "listening stomp://h:41",
            "role none epoch 4",
            "role follower epoch 5",
            "role leader epoch 6",
            "listening stomp://h:6",
            "listening stomp://h:61",
        ]
    else:
        assert lines == ["listening stomp://h:0", "listening stomp://h:01", "role standalone epoch 0"]
    assert ended == ["in good order"]
