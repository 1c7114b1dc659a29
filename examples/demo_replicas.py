"""Three brokers that are one set: ``pybroker serve`` three times. Owns their processes, and who had which role when.

A replica tells its role by lines on stdout. What it holds is asked as ``pybroker replica status`` does it, under load
without the time that starting a program takes.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo_programs import DemoFailed, Program
from pybroker.control import ask
from pybroker.errors import BrokerError

NAMES = ("a", "b", "c")
SET = "demo"
STATUS_SECONDS_MAX = 20.0
ENDED = "ended"

Position = tuple[int, int]  # epoch, and the number of the batch


class Replica:
    """One member: its process, when it runs, and its directory, which outlives the process."""

    def __init__(self, name: str, port: int, directory: Path, arguments: Sequence[str]) -> None:
        self.name = name
        self.port = port
        self.data_dir = directory / name
        self.role = ""
        self.epoch = 0
        self.program: Program | None = None
        self._log = directory / f"{name}.log"
        self._arguments = ("--name", name, "--listen", f"stomp://127.0.0.1:{port}", *arguments)

    def start(self) -> None:
        """Start the process, without waiting for anything."""
        command = ("-m", "pybroker", "serve", "--data", str(self.data_dir), *self._arguments)
        self.role = ""
        self.program = Program(f"replica {self.name}", *command, log=self._log)

    @property
    def is_leading(self) -> bool:
        return self.role == "leader"

    def status(self) -> str:
        """What ``pybroker replica status`` prints of it and its set. Raises DemoFailed when it does not answer."""
        command = [sys.executable, "-m", "pybroker", "replica", "status", "--data", str(self.data_dir)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=STATUS_SECONDS_MAX, check=False)
        if done.returncode:
            raise DemoFailed(f"pybroker replica status says of {self.name}: {done.stderr.strip()}")
        return done.stdout.rstrip("\n")

    def position(self) -> Position:
        """Of the last batch that it holds. Raises DemoFailed when it does not answer."""
        try:
            answer = ask(self.data_dir, "replica-status")
        except BrokerError as error:
            raise DemoFailed(f"replica {self.name} does not say its position: {error}") from None
        epoch, batch = answer["position"] or (0, 0)
        return epoch, batch


class ReplicaSet:
    """The members of the set, and the time line of their roles: (time, name, what it was from then on)."""

    def __init__(self, directory: Path, zookeeper: str, ports: Sequence[int]) -> None:
        secret_file = directory / "secret"  # each replica proves to the others that it knows what is in it
        secret_file.write_text(secrets.token_hex(16))
        secret_file.chmod(0o600)
        arguments = ["--zookeeper", zookeeper, "--set", SET, "--replicas", str(len(NAMES))]
        arguments += ["--replication", "127.0.0.1:0", "--secret-file", str(secret_file)]
        self.members = [Replica(name, port, directory, arguments) for name, port in zip(NAMES, ports, strict=True)]
        self.time_line: list[tuple[float, str, str]] = []

    def take_lines(self) -> None:
        """Take in what the replicas said. Raises DemoFailed when one has ended that was not told to."""
        for replica in self.members:
            if replica.program is None:
                continue
            for when, line in replica.program.new_lines():
                if line.startswith("role "):
                    _, replica.role, _, epoch = line.split()
                    replica.epoch = int(epoch)
                    self.time_line.append((when, replica.name, f"{replica.role}, epoch {epoch}"))
            if replica.role != ENDED:
                replica.program.check_running()

    def leader(self, after_epoch: int = 0) -> Replica | None:
        """Who leads in the highest epoch, if that is above ``after_epoch``."""
        leading = [replica for replica in self.members if replica.is_leading and replica.epoch > after_epoch]
        return max(leading, key=lambda replica: replica.epoch, default=None)

    def is_whole(self) -> bool:
        """Whether one leads and all others follow it."""
        leader = self.leader()
        return leader is not None and all(self.follows(replica) for replica in self.members if replica is not leader)

    def follows(self, replica: Replica) -> bool:
        leader = self.leader()
        return leader is not None and (replica.role, replica.epoch) == ("follower", leader.epoch)

    def kill(self, replica: Replica) -> None:
        """kill -9."""
        self.take_lines()
        self._ends(replica, "killed")
        assert replica.program is not None
        replica.program.kill()

    def terminate(self, replica: Replica) -> None:
        """SIGTERM, without waiting."""
        self.take_lines()
        self._ends(replica, "asked to stop")
        assert replica.program is not None
        replica.program.terminate()

    def _ends(self, replica: Replica, how: str) -> None:
        replica.role = ENDED
        self.time_line.append((time.monotonic(), replica.name, how))

    def start(self, replica: Replica) -> None:
        self.time_line.append((time.monotonic(), replica.name, "started"))
        replica.start()

    def seconds_to_role(self, replica: Replica) -> float:
        """From the last start of a replica to the role that it has now."""
        times = {what: when for when, name, what in self.time_line if name == replica.name}
        return times[f"{replica.role}, epoch {replica.epoch}"] - times["started"]

    def close(self) -> None:
        for replica in self.members:
            if replica.program is not None:
                replica.program.kill()
