"""Brokers to test from outside: ``python -m pybroker serve`` as a real process, and one in this process on port 0.

Owns starting, killing, ending and restarting them. Every wait has an end: a broker that hangs fails its test.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pybroker
from pybroker.broker import Broker
from pybroker.cli import main
from pybroker.control import ask

START_TIMEOUT = 20.0  # seconds for a process to say where it listens; a loaded machine takes its time
STOP_TIMEOUT = 20.0
ANY_PORT = "stomp://127.0.0.1:0"


def run_pybroker(
    *arguments: str | Path, stdin: bytes = b"", timeout: float = 30.0
) -> subprocess.CompletedProcess[bytes]:
    """Run one command of ``pybroker`` to its end."""
    command = [sys.executable, "-m", "pybroker", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=timeout, check=False)


def call_pybroker(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The same within this process, through the command's entry point: a tenth of the time, for commands that end soon."""
    streams = [io.TextIOWrapper(io.BytesIO(data), "utf-8") for data in (stdin, b"", b"")]
    before = sys.argv, sys.stdin, sys.stdout, sys.stderr
    thresholds = gc.get_threshold()
    status = 0
    try:
        sys.argv = ["pybroker", *map(str, arguments)]
        sys.stdin, sys.stdout, sys.stderr = streams
        main()
    except SystemExit as error:  # as the interpreter does with it
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.argv, sys.stdin, sys.stdout, sys.stderr = before
        gc.set_threshold(*thresholds)
    outputs = []
    for stream in streams[1:]:
        stream.flush()
        outputs.append(stream.buffer.getvalue())  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, status, *outputs)


class ServedBroker:
    """A broker in a process of its own. `start` it, and `close` it in a finally (or use `served`)."""

    def __init__(
        self,
        data_dir: Path | None,
        *arguments: str | Path,
        listen: Sequence[str] = (ANY_PORT,),
        prefix: Sequence[str] = (),
    ) -> None:
        """`prefix`: words before the command, for a process on a host of its own (`tests.ensemble.namespaces`)."""
        self.data_dir = data_dir
        self.arguments = arguments
        self.listen = tuple(listen)
        self.prefix = tuple(prefix)
        self.urls: tuple[str, ...] = ()
        self.output: list[str] = []  # all lines of its standard output so far
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the object; of all its processes

    def start(self) -> ServedBroker:
        """Start the process, and return when it listens on everything it was asked to."""
        self.launch()
        return self.wait_listening()

    def launch(self) -> None:
        """Start the process, without waiting for anything."""
        command: list[str] = [*self.prefix, sys.executable, "-m", "pybroker", "serve"]
        command += map(str, self.arguments)
        if self.data_dir is not None:
            command += ["--data", str(self.data_dir)]
        for url in self.listen:
            command += ["--listen", url]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log)
        self.output.clear()

    def wait_listening(self) -> ServedBroker:
        """Return when a process that was launched listens."""
        urls: list[str] = []
        deadline = time.monotonic() + START_TIMEOUT
        while len(urls) < max(len(self.listen), 1):
            line = self._read_line(deadline)
            if line.startswith("listening "):
                urls.append(line.split()[1])
        self.urls = tuple(urls)
        return self

    def _read_line(self, deadline: float) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"the broker said nothing in time; its log:\n{self.log()}")
                byte = os.read(descriptor, 1)
                if not byte:
                    raise AssertionError(f"the broker ended with {self._process.wait(5)}; its log:\n{self.log()}")
                line += byte
        text = line.decode().rstrip("\n")
        self.output.append(text)
        return text

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def ports(self) -> list[int]:
        return [urlsplit(url).port or 0 for url in self.urls]

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def log(self) -> str:
        """What the processes wrote on standard error."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def status(self) -> dict[str, Any]:
        assert self.data_dir is not None
        answer = ask(self.data_dir, "status")
        assert isinstance(answer, dict)
        return answer

    def queue_status(self, name: str) -> dict[str, Any]:
        """The row of one queue (its name without ``/queue/``) in the status."""
        for row in self.status()["destinations"]:
            if row["kind"] == "queue" and row["name"] == name:
                assert isinstance(row, dict)
                return row
        raise AssertionError(f"there is no queue {name}")

    def kill(self) -> None:
        """End the process at once (SIGKILL)."""
        self._signal(signal.SIGKILL)
        self._wait()

    def terminate(self) -> int:
        """Ask the process to stop (SIGTERM); return its exit status."""
        self._signal(signal.SIGTERM)
        return self._wait()

    def restart(self, *, same_port: bool = False) -> None:
        """Start again on the same data directory; by default on a new port."""
        if same_port:
            self.listen = self.urls
        self.start()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _wait(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        try:
            rest, _ = self._process.communicate(timeout=STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise AssertionError(f"the broker did not end in {STOP_TIMEOUT} s; its log:\n{self.log()}") from None
        self.output += rest.decode().splitlines()
        return self._process.returncode


@contextmanager
def served(
    data_dir: Path | None, *arguments: str | Path, listen: Sequence[str] = (ANY_PORT,)
) -> Iterator[ServedBroker]:
    """A broker process while the block runs."""
    broker = ServedBroker(data_dir, *arguments, listen=listen)
    try:
        yield broker.start()
    finally:
        broker.close()


@asynccontextmanager
async def embedded(**overrides: Any) -> AsyncIterator[tuple[Broker, int]]:
    """A broker in this process, in memory unless ``data_dir`` is given; gives it and its port."""
    overrides.setdefault("listen", [ANY_PORT])
    overrides.setdefault("stop_timeout", 3.0)
    async with pybroker.open_broker(**overrides) as broker:
        yield broker, urlsplit(broker.listeners[0]).port or 0
