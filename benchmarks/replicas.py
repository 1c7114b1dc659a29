"""A replica set as processes, with a real ZooKeeper ensemble: started, killed, stopped and paused, and always ended.

Owns the members' processes, their addresses, and what each printed and when. Every wait has an end, and one that ends in
vain carries the members' last words. Times are `time.monotonic`, which all processes of one machine share; those of log
lines are brought to it.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.support import zookeeper

from benchmarks.processes import ROOT, STOP_DEADLINE, ServerFailed
from benchmarks.settings import NotMeasurable, Settings
from pybroker.control import ask
from pybroker.errors import BrokerError

NAMES = ("a", "b", "c")
SESSION_TIMEOUT = 10.0  # seconds; no failover may wait for it
WAIT_DEADLINE = 60.0  # seconds for anything that a set has to do
POLL = 0.02  # seconds between two looks at what nobody prints
LAST_WORDS = 3_000  # bytes of each member's log that an error carries
STAMP = "%Y-%m-%d %H:%M:%S,%f"  # of a log line


class Member:
    """One replica: its process, when it runs, and its directory, which outlives the process.

    prefix     words before its command, such as those that enter a network namespace
    arguments  of ``pybroker serve``, but for what is its own
    lines      what it printed in all its lives, each with the time at which it was read
    """

    def __init__(
        self, name: str, data: Path, host: str, prefix: Sequence[str], arguments: Sequence[str | Path], changed: Any
    ) -> None:
        self.name = name
        self.data = data
        self.host = host
        self.port, self.replication_port = zookeeper.free_ports(2)
        self.lines: list[tuple[float, str]] = []
        self.log = data.with_name(f"{name}.log")
        own = ["--name", name, "--data", data, "--listen", f"{self.url}?allow=plaintext,anonymous"]
        own += ["--replication", f"{host}:{self.replication_port}"]
        program = (sys.executable, "-m", "pybroker", "serve")
        self._command = [str(word) for word in (*prefix, *program, *own, *arguments)]
        self._changed: threading.Condition = changed
        self._role = ("", 0)
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._may_end = True

    @property
    def url(self) -> str:
        """Where clients reach it when it leads."""
        return f"stomp://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def failed(self) -> bool:
        """Whether it ended by itself."""
        return not self._may_end and not self.running

    @property
    def role(self) -> tuple[str, int]:
        """The role and epoch that it printed last; ``("", 0)`` when it does not run."""
        return self._role if self.running else ("", 0)

    def start(self) -> None:
        """Start the process, without waiting for anything."""
        assert not self.running
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT, text=True)
        self._role = ("", 0)
        self._may_end = False
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.take_line(line.rstrip(), time.monotonic())

    def take_line(self, line: str, now: float) -> None:
        """It has printed a line."""
        with self._changed:
            self.lines.append((now, line))
            words = line.split()
            if len(words) == 4 and words[0] == "role":
                self._role = (words[1], int(words[3]))
            self._changed.notify_all()

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, and wait for the end. Raises ServerFailed unless it exits with 0 in time."""
        if self._end(signal.SIGTERM) != 0:
            raise ServerFailed(f"replica {self.name} did not end well on SIGTERM\n{self.last_words()}")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal and wait for nothing. After SIGTERM and SIGKILL it may end."""
        assert self._process is not None
        self._may_end = self._may_end or number in (signal.SIGTERM, signal.SIGKILL)
        self._process.send_signal(number)

    def wait_ended(self) -> int:
        """Wait for the end of a process that was told to; its exit status."""
        assert self._process is not None
        assert self._reader is not None
        try:
            status = self._process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise ServerFailed(f"replica {self.name} did not end within {STOP_DEADLINE} s") from None
        self._reader.join(STOP_DEADLINE)
        return status

    def _end(self, number: signal.Signals) -> int:
        self._may_end = True
        if self.running:
            self.send_signal(signal.SIGCONT)  # a paused one takes no other signal than SIGKILL
            self.send_signal(number)
        return self.wait_ended() if self._process is not None else 0

    def status(self) -> dict[str, Any]:
        """What ``pybroker replica status`` says. Raises BrokerError when nobody answers."""
        answer: dict[str, Any] = ask(self.data, "replica-status")
        return answer

    def disk_bytes(self) -> int:
        """What its directory takes on the disk; a file with two names counts once."""
        files: dict[int, int] = {}
        for path in self.data.rglob("*"):
            with suppress(OSError):  # LevelDB removes tables as it likes
                about = path.lstat()
                files[about.st_ino] = about.st_blocks * 512
        return sum(files.values())

    def log_size(self) -> int:
        """Where the next line of its log will begin."""
        return self.log.stat().st_size if self.log.exists() else 0

    def log_lines(self, start: int = 0) -> list[tuple[float, str]]:
        """The lines of its log from byte `start` on, each with its time (to the millisecond)."""
        offset = time.monotonic() - time.time()
        found = []
        for line in self.log.read_bytes()[start:].decode(errors="replace").splitlines():
            date, _, rest = line.partition(" ")
            clock, _, text = rest.partition(" ")
            with suppress(ValueError):
                found.append((datetime.strptime(f"{date} {clock}", STAMP).timestamp() + offset, text))
        return found

    def last_words(self) -> str:
        """The end of its log."""
        words = self.log.read_bytes()[-LAST_WORDS:].decode(errors="replace") if self.log.exists() else ""
        return f"--- replica {self.name}, {self._role}:\n{words or '(empty)'}"


class Members:
    """The members of one set; their directories, and whatever belongs to it, are in `directory`."""

    def __init__(self, directory: Path, members: Sequence[Member], changed: threading.Condition) -> None:
        self.directory = directory
        self.members = list(members)
        self._changed = changed

    def __iter__(self) -> Iterator[Member]:
        return iter(self.members)

    @property
    def urls(self) -> list[str]:
        """Where clients look for the leader."""
        return [member.url for member in self.members]

    def wait(self, what: str, found: Callable[[], Any], deadline: float = WAIT_DEADLINE) -> Any:
        """Wait until `found` says something true: asked at each line that a member prints, and now and then."""
        ends = time.monotonic() + deadline
        while True:
            with self._changed:
                answer = found()
                if answer:
                    return answer
                failed = [member for member in self.members if member.failed]
                if failed or time.monotonic() > ends:
                    why = f"replica {failed[0].name} ended" if failed else f"not within {deadline:g} s"
                    words = "\n".join(member.last_words() for member in self.members)
                    raise ServerFailed(f"{why}, waiting for: {what}\n{words}")
                self._changed.wait(POLL)

    def leader(self, above: int = 0) -> Member | None:
        """Who leads in the highest epoch, if that is above `above`."""
        leading = [member for member in self.members if member.role[0] == "leader" and member.role[1] > above]
        return max(leading, key=lambda member: member.role[1], default=None)

    def wait_leader(self, above: int = 0) -> Member:
        """Wait for a leader of an epoch above that."""
        found: Member = self.wait(f"a leader above epoch {above}", lambda: self.leader(above))
        return found

    def followers(self) -> list[Member]:
        """Those that follow the leader."""
        leader = self.leader()
        return [member for member in self.members if leader and member.role == ("follower", leader.role[1])]

    def wait_whole(self) -> Member:
        """Wait until one leads and all others that run follow it; the leader."""
        others = sum(member.running for member in self.members) - 1
        self.wait("one leader, all others following it", lambda: len(self.followers()) == others)
        return self.wait_leader()

    def position(self) -> int:
        """The number of the leader's last batch."""
        leader = self.leader()
        assert leader is not None
        return number_of(leader.status())

    def wait_level(self, members: Sequence[Member] | None = None, deadline: float = WAIT_DEADLINE) -> float:
        """Wait until these (default: all) hold the leader's last batch; when that was seen."""
        chosen = self.members if members is None else members

        def found() -> float:
            with suppress(BrokerError):
                last = self.position()
                if all(number_of(member.status()) >= last for member in chosen):
                    return time.monotonic()
            return 0.0

        seen: float = self.wait("all members hold the leader's last batch", found, deadline)
        return seen


def number_of(status: dict[str, Any]) -> int:
    """The number of the last batch that a replica's store holds, by its own status; -1 while it has none."""
    return int(status["position"][1]) if status["position"] else -1


def require_zookeeper() -> None:
    """Raise NotMeasurable where ZooKeeper can't run."""
    if zookeeper.missing():
        raise NotMeasurable(f"no ZooKeeper: {zookeeper.missing()}")


@contextmanager
def ensemble(count: int = 3, **options: Any) -> Iterator[zookeeper.Ensemble]:
    """ZooKeeper servers that serve, for the length of the block. Raises NotMeasurable where they can't run."""
    require_zookeeper()
    with zookeeper.ensemble(count, **options) as servers:
        yield servers


def set_arguments(directory: Path, hosts: str, table: Sequence[str] = ()) -> list[str | Path]:
    """What all members of a new set are started with; files that this names are made in `directory`."""
    secret = directory / "secret"
    secret.write_text(f"{secrets.token_hex(16)}\n")
    secret.chmod(0o600)
    arguments: list[str | Path] = ["--zookeeper", hosts, "--set", f"benchmark-{secrets.token_hex(4)}"]
    arguments += ["--replicas", str(len(NAMES)), "--sync", "quorum_disk"]
    arguments += ["--session-timeout", f"{SESSION_TIMEOUT:g}", "--secret-file", secret]
    if table:
        file = directory / "set.toml"
        file.write_text("\n".join(("[replica_set]", *table, "")))
        arguments.append(file)
    return arguments


@contextmanager
def replica_set(
    settings: Settings,
    hosts: str,
    *,
    table: Sequence[str] = (),
    places: Sequence[tuple[str, Sequence[str]]] = (("127.0.0.1", ()),) * len(NAMES),
) -> Iterator[Members]:
    """Three members of a new set, that all run, one of them leading. All are ended in any case.

    hosts   of ZooKeeper
    table   lines of the table ``replica_set`` for what no flag says
    places  host and words before the command, for each
    """
    changed = threading.Condition()
    with settings.store() as data:
        parent = data.parent
        arguments = set_arguments(parent, hosts, table)
        members = Members(
            parent,
            [
                Member(own, parent / own, host, prefix, arguments, changed)
                for own, (host, prefix) in zip(NAMES, places, strict=True)
            ],
            changed,
        )
        try:
            for member in members:
                member.start()
            members.wait_whole()
            yield members
        except ServerFailed:
            raise
        except Exception as error:
            words = "\n".join(member.last_words() for member in members)
            raise ServerFailed(f"a replica set was running when this failed: {error}\n{words}") from error
        finally:
            for member in members:
                if member.running:
                    os.kill(member.pid, signal.SIGKILL)
                    member.wait_ended()
