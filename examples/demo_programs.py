"""Programs that the demonstration starts, listens to, kills and stops: each a process of its own. Owns nothing else.

What a program prints on stdout is read as it comes; its log (stderr) goes to a file, or where the demonstration's own goes.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOG_LINES_SHOWN = 15


class DemoFailed(Exception):
    """The demonstration could not be carried out. The text says what did not happen."""


class Program:
    """A child process of this Python whose lines on stdout go to a queue; it is killed when the block is left."""

    def __init__(self, name: str, *command: str, log: Path | None = None) -> None:
        self.name = name
        self.log = log
        self.lines: queue.SimpleQueue[tuple[float, str]] = queue.SimpleQueue()
        with log.open("ab") if log is not None else contextlib.nullcontext() as stderr:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                encoding="utf-8",
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put((time.monotonic(), line.rstrip("\n")))

    def new_lines(self) -> Iterator[tuple[float, str]]:
        """The lines that have come since the last call, each with the time at which it came."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self.lines.get_nowait()

    def check_running(self) -> None:
        """Raise when it has ended, and nobody had asked it to."""
        if self.process.poll() is not None:
            raise DemoFailed(
                f"the {self.name} ended by itself, with exit status {self.process.returncode}{self.told()}"
            )

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def terminate(self) -> None:
        """Ask it to stop, without waiting."""
        self.process.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        """Wait until it has ended as it was asked to. Raises when it does not, or says that something was wrong."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the {self.name} did not end within {seconds:.0f} s of being asked to") from None
        if status:
            raise DemoFailed(f"the {self.name} ended with exit status {status}{self.told()}")

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()
        self._reader.join()

    def told(self) -> str:
        """The end of its log, for an error."""
        if self.log is None:
            return ""
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return "".join(f"\n    {line}" for line in lines)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
