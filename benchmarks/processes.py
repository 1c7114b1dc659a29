"""Servers and load generators as processes: started, read through /proc, always stopped. Knows no STOMP.

Linux only: memory and CPU time come from /proc (proc(5)).
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
LISTENING_DEADLINE = 120.0  # seconds a server may take until its `listening` line
STOP_DEADLINE = 60.0  # seconds a server may take to stop after SIGTERM; then it is killed
LOAD_DEADLINE = 900.0  # seconds one run of the load generator may take


class ServerFailed(Exception):
    """A server or a load generator did not start, died, or reported an error. The text holds its last words."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory in bytes: all of it (VmRSS), its anonymous part (RssAnon), the highest so far (VmHWM)."""

    resident: int
    anonymous: int
    peak: int


def memory(pid: int) -> Memory:
    """Resident memory of a process, now."""
    fields: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "VmHWM"):
            fields[name] = int(value.split()[0]) * 1024
    return Memory(fields["VmRSS"], fields["RssAnon"], fields["VmHWM"])


def cpu_seconds(pid: int) -> float:
    """User and system time of all threads of a process so far, in seconds (granularity: a clock tick, 10 ms)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def raise_file_limit(wanted: int) -> int:
    """Raise RLIMIT_NOFILE of this process, and of those it starts, to `wanted` if allowed. Returns what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft if soft != resource.RLIM_INFINITY else wanted


@dataclass(frozen=True, slots=True)
class Kind:
    """A server that can be measured: its name in tables, and the command that precedes ``--data DIR --listen URL``."""

    name: str
    command: tuple[str, ...]


BROKER = Kind("broker", (sys.executable, "-m", "pybroker", "serve"))
TRIAL = Kind("trial", (sys.executable, "-m", "benchmarks.trial"))
KINDS = {kind.name: kind for kind in (BROKER, TRIAL)}


class Server:
    """A running server. Made by `serving`."""

    def __init__(self, kind: Kind, data: Path, listen: str, options: Sequence[str]) -> None:
        self.kind = kind
        self.url = ""
        self._scheme = listen.partition(":")[0]
        self._log = data.with_name(data.name + ".log")
        command = [*kind.command, "--data", str(data), "--listen", listen, *options]
        with self._log.open("ab") as log:
            self.started_at = time.monotonic()
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, cwd=ROOT)
        self.listening_at = 0.0

    @property
    def pid(self) -> int:
        """Process id."""
        return self.process.pid

    def wait_listening(self) -> None:
        """Wait for the line ``listening URL``. Raises ServerFailed if it does not come in time."""
        assert self.process.stdout is not None
        pipe = self.process.stdout.fileno()
        text = b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not self.url:
                remaining = self.started_at + LISTENING_DEADLINE - time.monotonic()
                if remaining < 0 or not selector.select(remaining):
                    raise self.failure(f"said no `listening` line within {LISTENING_DEADLINE} s")
                data = os.read(pipe, 4096)
                if not data:
                    raise self.failure("ended before it was listening")
                text += data
                for line in text.split(b"\n")[:-1]:
                    if line.startswith(b"listening %b://" % self._scheme.encode()):
                        self.listening_at = time.monotonic()
                        self.url = line.split()[1].decode()

    def failure(self, what: str) -> ServerFailed:
        """An error that carries the end of the server's log."""
        tail = self._log.read_bytes()[-3000:].decode(errors="replace")
        return ServerFailed(f"{self.kind.name} {what}\nend of its log:\n{tail or '(empty)'}".rstrip())

    def stop(self) -> None:
        """SIGTERM, then SIGKILL when that does not help in time. Raises ServerFailed unless it exited with 0."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        code = self._wait()
        if code != 0:
            raise self.failure(f"exited with {code}")

    def kill(self) -> None:
        """End it at once, whatever state it is in."""
        if self.process.poll() is None:
            self.process.kill()
        self._wait()

    def _wait(self) -> int:
        try:
            code = self.process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise self.failure(f"did not stop within {STOP_DEADLINE} s of SIGTERM") from None
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
        return code


@contextmanager
def serving(
    kind: Kind, data: Path, listen: str = "stomp://127.0.0.1:0", options: Sequence[str] = ()
) -> Iterator[Server]:
    """A server on a free loopback port with its data in `data`; stopped in any case at the end. `options` are its own flags."""
    server = Server(kind, data, listen, options)
    try:
        server.wait_listening()
        yield server
    except ServerFailed as error:
        server.kill()
        raise server.failure(f"was running when this failed: {error}") from error
    except BaseException:
        server.kill()
        raise
    server.stop()


def run_child(module: str, arguments: Sequence[str | int | Path]) -> dict[str, Any]:
    """Run ``python -m MODULE ARGUMENTS`` to its end; its stdout is one JSON object. Raises ServerFailed otherwise."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=LOAD_DEADLINE, check=False)
    if done.returncode != 0:
        raise ServerFailed(f"{module} exited with {done.returncode}\n{done.stderr.decode(errors='replace')[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
