"""What every run of a simulator has: the trace, the counts, what was found wrong, and the schedule that a seed decides."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import trio

from tests.sim import schedule
from tests.sim.checkers import Findings, Violation
from tests.sim.member import WALL_CLOCK, watched

END = 1_000.0  # seconds after which no run goes on


@dataclass
class Result:
    """What happened. `digest` is of the whole trace."""

    counts: Counter[str]
    digest: str
    trace: list[str]
    seconds: float


class Run(ABC):
    """One run of one seed. `say` is given each line of the trace, and of the log, as it comes."""

    def __init__(self, seed: str, say: Any) -> None:
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.traced: list[str] = []
        self.say = say
        self.errors: list[BaseException] = []
        self.clients = trio.CancelScope()
        self.over = trio.CancelScope()
        self.findings = Findings(self.over.cancel)

    @abstractmethod
    async def main(self) -> float:
        """The whole of it; returns how many seconds it took."""

    @abstractmethod
    def sum_up(self) -> None:
        """Add to `counts` what others have counted."""

    @abstractmethod
    def describe(self) -> str:
        """How things stand, for a finding's text."""

    def watched(self) -> AbstractContextManager[None]:
        """What of the real code is replaced while the run lasts."""
        return watched()

    def count(self, what: str) -> None:
        self.counts[what] += 1

    def trace(self, text: str) -> None:
        line = f"{trio.current_time():9.4f} {text}"
        self.traced.append(line)
        if self.say is not None:
            self.say(line)

    def wall_clock_ms(self) -> int:
        return WALL_CLOCK + int(trio.current_time() * 1000)

    def run(self) -> Result:
        """Run to the end; raises Violation with what was found first."""
        log = logging.getLogger("pybroker")
        handler = _Listener(self)
        before = (log.level, log.propagate)
        log.setLevel(logging.INFO if self.say is not None else logging.ERROR)
        log.propagate = False
        log.addHandler(handler)
        try:
            with self.watched():
                seconds = schedule.run(self.seed, self.main, self.findings.add)
        finally:
            log.removeHandler(handler)
            log.setLevel(before[0])
            log.propagate = before[1]
        if self.findings.texts:
            raise Violation("; ".join(self.findings.texts)) from (self.errors[0] if self.errors else None)
        self.sum_up()
        digest = hashlib.sha256("\n".join(self.traced).encode()).hexdigest()
        return Result(self.counts, digest, self.traced, seconds)

    async def until(self, condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
        """Wait until something is so; it is a violation if that takes too long."""
        with trio.move_on_after(seconds) as late:
            while not condition():  # noqa: ASYNC110
                await trio.sleep(0.02)
        if late.cancelled_caught:
            self.findings.add(f"{otherwise} after {seconds:g} s: {self.describe()}")
            await trio.sleep_forever()


class _Listener(logging.Handler):
    """What the program logs: a fault of the program is a violation."""

    def __init__(self, sim: Run) -> None:
        super().__init__(logging.INFO)
        self.sim = sim

    def emit(self, record: logging.LogRecord) -> None:
        process = schedule.PROCESS.get()
        if process is not None and process.dead:
            return
        if self.sim.say is not None:
            self.sim.say(f"{trio.current_time():9.4f}   log: {record.getMessage()}")
        if record.exc_info is not None and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self.sim.findings.add(f"{record.getMessage()}: {error!r}")
            self.sim.errors.append(error)
