"""A real broker in a process of its own: ``python -m pybroker serve``. Owns its start, its kill and its end."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

START_TIMEOUT = 30.0  # seconds
STOP_TIMEOUT = 20.0


class BrokerProcess:
    """One life of a broker on a data directory. `prefix`: a command that runs it (strace)."""

    def __init__(self, directory: Path, config: Path | None = None, prefix: tuple[str, ...] = ()) -> None:
        self.log = directory.parent / f"{directory.name}.log"
        command = [*prefix, sys.executable, "-m", "pybroker", "serve"]
        command += ["--data", str(directory), "--listen", "stomp://127.0.0.1:0"]
        if config is not None:
            command.append(str(config))
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        self._traced = bool(prefix)

    def port(self, timeout: float = START_TIMEOUT) -> int | None:
        """The port it listens on, once it does; None when that took longer than `timeout`."""
        output = self._process.stdout
        assert output is not None
        if not select.select([output], [], [], timeout)[0]:
            return None
        line = output.readline().decode()
        assert line.startswith("listening stomp://"), f"the broker did not start: {line!r}, see {self.log}"
        return int(line.rpartition(":")[2])

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self._process.kill()
        self._process.communicate()

    def stop(self) -> int:
        """SIGTERM; its exit status. (Under strace the signal goes to the broker itself.)"""
        pid = self._process.pid
        if self._traced:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(pid, signal.SIGTERM)
        self._process.communicate(timeout=STOP_TIMEOUT)
        return self._process.returncode

    def end(self) -> None:
        """Make sure that nothing is left of it."""
        if self.running:
            if self._traced:
                self.stop()
            else:
                self.kill()
