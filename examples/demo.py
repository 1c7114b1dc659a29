"""The demonstration that ``make demo`` runs: a broker is killed while it works, and nothing is lost.

Starts ``pybroker serve`` on a new LevelDB directory, a producer and a consumer (each a process of its own that talks
STOMP through stomp.py), kills the broker with SIGKILL in the middle, starts it again on the same directory and port,
and at the end empties the dead-letter queue. Then it compares what arrived with what must have arrived, which it
computes by itself. Exit status 0 only if every promise held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from demo_account import DEAD_LETTER_QUEUE, Account
from hl7_messages import make_messages

HERE = Path(__file__).resolve().parent
START_SECONDS_MAX = 20.0
STALL_SECONDS = 5.0  # what has not come when nothing came for this long will not come
QUIET_SECONDS = 1.0  # at the end it is watched for this long whether more comes than should


class DemoFailed(Exception):
    """The demonstration could not be carried out. The text says what did not happen."""


class Program:
    """A child process whose lines on stdout go to a queue; it is killed when the block is left."""

    def __init__(self, name: str, *command: str) -> None:
        self.name = name
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.rstrip("\n"))
        self.lines.put(None)

    def new_lines(self) -> Iterator[str]:
        """The lines that have come since the last call."""
        with contextlib.suppress(queue.Empty):
            while (line := self.lines.get_nowait()) is not None:
                yield line

    def end_input(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()

    def wait(self, seconds: float) -> None:
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise DemoFailed(f"the {self.name} did not end within {seconds:.0f} s of being asked to") from None
        if status:
            raise DemoFailed(f"the {self.name} ended with exit status {status}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def start_broker(data_dir: Path, port: int) -> tuple[Program, int]:
    """Start ``pybroker serve``; return it with the port that it listens on."""
    command = ("-m", "pybroker", "serve", "--name", "demo", "--data", str(data_dir))
    broker = Program("broker", *command, "--listen", f"stomp://127.0.0.1:{port}")
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline and broker.process.poll() is None:
        for line in broker.new_lines():
            if line.startswith("listening "):
                return broker, int(line.rpartition(":")[2])
        time.sleep(0.01)
    broker.kill()
    raise DemoFailed("the broker did not start (its log is above)")


class Demo:
    """One run. ``account`` holds what must arrive and what did."""

    def __init__(self, account: Account, seed: int, count: int, deadline: float, console: Console) -> None:
        self.account = account
        self.seed, self.count = seed, count
        self.deadline = deadline
        self.console = console
        self.started = time.monotonic()

    def run(self, data_dir: Path) -> None:
        with contextlib.ExitStack() as stack:
            self.broker, port = start_broker(data_dir, 0)
            stack.callback(lambda: self.broker.kill())  # whichever of the two is running then
            self.say(f"broker on port {port}, store in {data_dir}")
            address = ("--port", str(port))
            consumer = stack.enter_context(Program("consumer", str(HERE / "hl7_consumer.py"), *address))
            numbers = ("--seed", str(self.seed), "--count", str(self.count))
            producer = stack.enter_context(
                Program(
                    "producer", str(HERE / "hl7_producer.py"), *address, *numbers, "--deadline", f"{self.left():.0f}"
                )
            )
            self.follow(producer, consumer, until=lambda: self.account.confirmed_now >= self.count * 2 // 5)
            self.broker.kill()
            self.say(f"broker killed with SIGKILL after {self.account.confirmed_now} confirmations")
            killed = time.monotonic()
            self.broker, again = start_broker(data_dir, port)
            if again != port:
                raise DemoFailed(f"the broker came back on port {again}, not {port}")
            self.say(f"broker started again on the same store, {time.monotonic() - killed:.2f} s after its death")
            self.follow(producer, consumer, until=lambda: self.account.producer_done)
            self.say(f"producer: all {self.count} confirmed, after {self.account.connections} connections")
            self.follow(producer, consumer, until=lambda: not self.account.not_delivered(), quiet=STALL_SECONDS)
            self.say(f"consumer: {len(self.account.deliveries)} have been delivered; now the dead letters")
            drain = stack.enter_context(
                Program("drain", str(HERE / "hl7_consumer.py"), *address, "--queue", DEAD_LETTER_QUEUE)
            )
            self.follow(consumer, drain, until=lambda: not self.account.not_dead_lettered(), quiet=STALL_SECONDS)
            self.follow(consumer, drain, until=lambda: False, quiet=QUIET_SECONDS)
            for program in (consumer, drain):
                program.end_input()  # it disconnects and ends
                program.wait(10)
            self.broker.process.terminate()
            self.broker.wait(20)

    def follow(self, *programs: Program, until: Callable[[], bool], quiet: float = math.inf) -> None:
        """Take in what the programs say until a condition holds, or none has said anything for ``quiet`` seconds."""
        last_line = time.monotonic()
        while not until() and time.monotonic() < last_line + quiet:
            if self.left() <= 0:
                raise DemoFailed("the time is over before everything had arrived")
            if self.broker.process.poll() is not None:
                raise DemoFailed(f"the broker ended by itself, with exit status {self.broker.process.returncode}")
            for program in programs:
                for line in program.new_lines():
                    self.account.take(json.loads(line))
                    last_line = time.monotonic()
                if program.process.poll():
                    raise DemoFailed(f"the {program.name} ended with exit status {program.process.returncode}")
            time.sleep(0.01)

    def left(self) -> float:
        return self.started + self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self.started:6.2f} s  {text}", highlight=False, soft_wrap=True)


def show(account: Account, console: Console) -> None:
    rows = account.rows()
    table = Table(title="What was promised, and what came")
    table.add_column("messages")
    for name, _ in rows:
        table.add_column(name.removeprefix("/queue/"), justify="right")
    for measure in rows[0][1]:
        table.add_row(measure.replace("_", " "), *(str(row[measure]) for _, row in rows))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2_000, help="messages")
    parser.add_argument("--deadline", type=float, default=58.0, help="seconds for everything")
    # not the system's place for temporary files: that is often kept in memory, and survives nothing
    parser.add_argument("--directory", type=Path, default=HERE.parent / "build", help="where the store is made")
    arguments = parser.parse_args()
    console = Console()
    account = Account(list(make_messages(arguments.seed, arguments.count)))
    demo = Demo(account, arguments.seed, arguments.count, arguments.deadline, console)
    failure = None
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pybroker-demo-", dir=arguments.directory) as directory:
        try:
            demo.run(Path(directory) / "data")
        except DemoFailed as error:
            failure = str(error)
    show(account, console)
    faults = ([failure] if failure else []) + account.faults()
    for fault in faults:
        console.print(f"[red]broken:[/red] {fault}", highlight=False, soft_wrap=True)
    if not faults:
        console.print("[green]every promise held[/green]: nothing lost, nothing corrupted, nothing unexpected")
    console.print(f"{time.monotonic() - demo.started:.1f} seconds", highlight=False)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
