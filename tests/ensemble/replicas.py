"""Three brokers that are one set, each a process of its own: ``python -m pybroker serve``. Owns their processes and addresses.

Blocking; every wait has an end, and a wait that ends so says what the brokers said. A broker's role is the last
``role ROLE epoch N`` line that it printed; one that was killed has none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pybroker.control import ask
from pybroker.errors import BrokerError
from pybroker.store.check import verify
from pybroker.store.format import END, META_KEY
from pybroker.store.layout import current_name
from pybroker.store.leveldb import LevelDBBackend
from tests.support.zookeeper import free_ports

WAIT_TIMEOUT = 30.0  # seconds for anything that a set has to do; a loaded machine takes its time
STOP_TIMEOUT = 20.0
POLL = 0.01
CONFIG = """
[replica_set]
name = "{set}"
zookeeper = "{zookeeper}"
allow = ["plaintext"]
secret = "shared by the members of a test's set"
zookeeper_auth = "pybroker:of a test"
{more}
[stomp]
heartbeat_min_ms = 200
[limits]
disk_free_bytes_min = 0
[delivery]
expiry_interval = 0.2
"""


class ReplicaProcess:
    """One member: its process, when it runs, and its directory, which outlives the process.

    host, prefix  where it runs (see `tests.ensemble.namespaces`)
    lines         what it printed in this life, each with the time at which it was read
    """

    def __init__(
        self, name: str, data_dir: Path, host: str, prefix: Sequence[str], arguments: Sequence[str], changed: Any
    ) -> None:
        self.name = name
        self.data_dir = data_dir
        self.host = host
        self.port, self.replication_port = free_ports(2)
        self.lines: list[tuple[float, str]] = []
        self.is_paused = False
        self.log = data_dir.parent / f"{name}.log"
        self._prefix = tuple(prefix)
        self._arguments = tuple(arguments)
        self._changed: threading.Condition = changed
        self._process: subprocess.Popen[str] | None = None
        self._is_ending = False  # it was told to
        self._reader: threading.Thread | None = None

    def start(self) -> None:
        """Start the process, without waiting for anything."""
        assert not self.running
        command = [*self._prefix, sys.executable, "-m", "pybroker", "serve", "--name", self.name]
        command += ["--data", str(self.data_dir)]
        command += ["--listen", f"stomp://{self.host}:{self.port}?allow=plaintext,anonymous"]
        command += ["--replication", f"{self.host}:{self.replication_port}", *self._arguments]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        self.is_paused = self._is_ending = False
        self.lines = []
        self._reader = threading.Thread(target=self._read, args=(self._process, self.lines), daemon=True)
        self._reader.start()

    def _read(self, process: subprocess.Popen[str], lines: list[tuple[float, str]]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with self._changed:
                lines.append((time.monotonic(), line.rstrip()))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.port

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def has_failed(self) -> bool:
        """Whether it ended by itself."""
        return not self._is_ending and self._process is not None and self._process.poll() is not None

    @property
    def roles(self) -> list[tuple[str, int]]:
        """All roles of this life, with their epochs."""
        words = [line.split() for _, line in self.lines if line.startswith("role ")]
        return [(role, int(epoch)) for _, role, _, epoch in words]

    @property
    def role(self) -> tuple[str, int]:
        """The last one; "" when it does not run."""
        roles = self.roles
        return roles[-1] if roles and self.running else ("", 0)

    def status(self, command: str = "status") -> Any:
        """What its control socket says; None when it does not answer."""
        try:
            return ask(self.data_dir, command)
        except BrokerError:
            return None

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def terminate(self) -> int:
        """SIGTERM; its exit status."""
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        """SIGSTOP: its connections stay open, and nobody answers."""
        assert self._process is not None
        self.is_paused = True
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        """SIGCONT."""
        if self.is_paused and self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self.is_paused = False

    def wipe(self) -> None:
        """Remove all that it has stored. Only when it does not run."""
        assert not self.running
        shutil.rmtree(self.data_dir)

    def close(self) -> None:
        """Nothing is left running."""
        if self.running:
            self.kill()

    def _end(self, number: signal.Signals) -> int:
        assert self._process is not None
        assert self._reader is not None
        self._is_ending = True
        self._process.send_signal(number)
        try:
            status = self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"{self.name} did not end in {STOP_TIMEOUT} s:\n{self.told()}") from None
        finally:
            self.is_paused = False
        self._reader.join(STOP_TIMEOUT)
        return status

    def told(self) -> str:
        """The end of its output and log, for whoever has to find out."""
        log = self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""
        return f"--- {self.name} ({'running' if self.running else 'ended'}): {self.roles[-8:]}\n{log}"


class ReplicaSet:
    """The members of one set. `start` them, and `close` the set in a finally."""

    def __init__(
        self,
        directory: Path,
        zookeeper: str,
        set_name: str,
        *,
        session_timeout: float = 10.0,
        hosts: Sequence[tuple[str, Sequence[str]]] = (("127.0.0.1", ()),) * 3,
        data_dirs: Sequence[Path] = (),
        more: str = "",
        tables: str = "",
        flags: Callable[[str], Sequence[str]] = lambda host: (),
    ) -> None:
        """`more`: further lines of the table replica_set; `tables`: further ones; `flags`: those of the member on a host."""
        self.changed = threading.Condition()
        arguments = ["--zookeeper", zookeeper, "--set", set_name, "--replicas", str(len(hosts))]
        arguments += ["--sync", "quorum_disk", "--session-timeout", str(session_timeout)]
        config = directory / "broker.toml"  # of all members: what differs are flags
        config.write_text(CONFIG.format(set=set_name, zookeeper=zookeeper, more=more) + tables)
        directories = data_dirs or [directory / name for name in "abc"]
        self.members = []
        for name, data_dir, (host, prefix) in zip("abc", directories, hosts, strict=True):
            words = [*arguments, *flags(host), str(config)]
            self.members.append(ReplicaProcess(name, data_dir, host, prefix, words, self.changed))

    def __getitem__(self, name: str) -> ReplicaProcess:
        return next(member for member in self.members if member.name == name)

    def replace(self, old: ReplicaProcess, name: str) -> ReplicaProcess:
        """A member of another name, with a directory of its own, in the list in the place of one that has ended."""
        assert not old.running
        directory = old.data_dir.parent / name
        new = ReplicaProcess(name, directory, old.host, old._prefix, old._arguments, self.changed)
        self.members[self.members.index(old)] = new
        return new

    def start(self) -> ReplicaProcess:
        """Start all members, and return the one that leads when the others follow it."""
        for member in self.members:
            member.start()
        return self.wait_whole()

    def wait(self, what: str, found: Callable[[], Any], timeout: float = WAIT_TIMEOUT) -> Any:
        """Wait until `found` says something true, asked at each line that a member prints, and now and then."""
        until = time.monotonic() + timeout
        with self.changed:
            while not (answer := found()):
                for member in self.members:
                    assert not member.has_failed, f"{member.name} ended while waiting for: {what}\n{self.told()}"
                assert time.monotonic() < until, f"not within {timeout} s: {what}\n{self.told()}"
                self.changed.wait(POLL)
        return answer

    def leader(self, after: int = 0) -> ReplicaProcess | None:
        """The member that leads in the highest epoch, if that is above `after`. (One that is paused may believe that it leads.)"""
        leading = [
            member
            for member in self.members
            if member.role[0] == "leader" and member.role[1] > after and not member.is_paused
        ]
        return max(leading, key=lambda member: member.role[1], default=None)

    def wait_leader(self, after: int = 0, *, without: ReplicaProcess | None = None) -> ReplicaProcess:
        def found() -> ReplicaProcess | None:
            member = self.leader(after)
            return None if member is without else member

        leader: ReplicaProcess = self.wait(f"a leader above epoch {after}", found)
        return leader

    def followers(self) -> list[ReplicaProcess]:
        """The members that follow the leader."""
        leader = self.leader()
        return [member for member in self.members if leader and member.role == ("follower", leader.role[1])]

    def is_whole(self) -> bool:
        """Whether one leads, all others follow it, and all copies count: a new one follows before it does."""
        leader = self.leader()
        if leader is None or len(self.followers()) < len(self.members) - 1:
            return False
        rows = (leader.status("replica-status") or {"members": []})["members"]
        return len(rows) == len(self.members) and all(row["counted"] and row["lag"] is not None for row in rows)

    def wait_whole(self) -> ReplicaProcess:
        """Wait until the set is whole; its leader."""
        leader: ReplicaProcess | None = None
        while leader is None:  # it may have lost its role since
            self.wait("one leader, all others its followers, and all count", self.is_whole)
            leader = self.leader()
        return leader

    def wait_equal(self) -> None:
        """Wait until all members hold the same position, one leads and nothing changes any more."""

        def positions() -> list[Any]:
            rows = [member.status("replica-status") or {} for member in self.members]
            return [row.get("position") for row in rows]

        until = time.monotonic() + WAIT_TIMEOUT
        before: list[Any] = []
        while True:
            now = positions()
            if None not in now and now.count(now[0]) == len(now) and now == before:
                return
            before = now
            assert time.monotonic() < until, f"the members do not become equal: {now}\n{self.told()}"
            time.sleep(0.1)

    def check_stores(self) -> None:
        """After all have ended: each store is whole, and all hold the same, byte for byte, but for what says which copy it is."""
        contents: list[dict[bytes, bytes]] = []
        for member in self.members:
            assert not member.running
            report = verify(member.data_dir)
            assert report.ok, (member.name, report.problems)
            backend = LevelDBBackend(member.data_dir / current_name(member.data_dir))
            try:
                entries = backend.iterate(b"\0", bytes((END,)))
                contents.append({key: value for key, value in entries if key != META_KEY})
            finally:
                backend.close()
        first, *others = contents
        for member, content in zip(self.members[1:], others, strict=True):
            differ = [key for key in first.keys() | content.keys() if first.get(key) != content.get(key)]
            assert not differ, (
                f"{len(differ)} keys differ between {self.members[0].name} and {member.name}: {differ[:5]}"
            )

    def close(self) -> None:
        for member in self.members:
            with contextlib.suppress(OSError):
                member.close()

    def told(self) -> str:
        return "\n".join(member.told() for member in self.members)
