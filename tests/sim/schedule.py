"""One thread in which a seed decides everything: the order of tasks, the time, and which process stands still.

Owns trio's scheduler for the length of a run. A *process* is all tasks that were started in a context whose `PROCESS` is it;
a paused one has no task that runs, though deadlines pass and what it waits for arrives: as after SIGSTOP. With SIGCONT its tasks
go on with whatever came first.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from types import SimpleNamespace
from typing import Any
from unittest import mock

import trio
from trio._core import _run as scheduler

_plain_reschedule = scheduler.Runner.reschedule
_NO_SEND = scheduler._NO_SEND


DEADLOCK_WAITS = 100
STEPS_MAX = 20_000  # steps of tasks without time going by
ALL_STEPS_MAX = 400_000  # ... of a whole run: a usual one has some 20,000


class Deadlock(Exception):
    """Every task waits for another one."""


class Runaway(Exception):
    """Tasks go on and on though the run was told to end."""


class _Dice(random.Random):
    """trio's own random choices: it shuffles each batch of tasks."""

    clock: JumpingClock
    steps = 0
    all_steps = 0
    ending = False
    runs_away: Callable[[str], None]
    since = 0.0

    def shuffle(self, batch: Any) -> None:
        if self.clock.now != self.since:
            self.since = self.clock.now
            self.steps = 0
        self.steps += 1
        self.all_steps += 1
        if self.steps > STEPS_MAX or self.all_steps > ALL_STEPS_MAX:
            if self.ending:
                raise Runaway(f"at {self.since:.4f}: {batch}")
            self.ending = True
            self.steps = self.all_steps = 0
            self.runs_away(f"tasks go on and on, at last at {self.since:.4f}: {[task.name for task in batch]}")
        super().shuffle(batch)


class JumpingClock(trio.abc.Clock):
    """Begins at 0, stands still while anything runs, and jumps to the next deadline when all tasks wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self._waits = 0

    def start_clock(self) -> None:
        pass

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """trio asks when there is nothing to run."""
        if deadline == float("inf"):  # at its end trio waits for its own wake-up socket
            self._waits += 1
            if self._waits > DEADLOCK_WAITS:
                raise Deadlock
            return 0.01
        self._waits = 0
        self.now = max(self.now, deadline)
        return 0.0


class Process:
    """Tasks that can be stopped together. `dead`: what they still do to end reaches nothing any more."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dead = False
        self.resumed: trio.Event | None = None
        self._held: list[trio.lowlevel.Task] = []

    @property
    def paused(self) -> bool:
        return self.resumed is not None

    def start_soon(self, nursery: trio.Nursery, function: Callable[..., Awaitable[Any]], *arguments: Any) -> None:
        """Start a task that belongs to this process, and so do all that it starts."""
        context = copy_context()
        context.run(PROCESS.set, self)
        context.run(nursery.start_soon, function, *arguments)

    def pause(self) -> None:
        if self.resumed is None:
            self.resumed = trio.Event()
            queue = scheduler.GLOBAL_RUN_CONTEXT.runner.runq
            self._held = [task for task in queue if task.context.get(PROCESS) is self]
            for task in self._held:
                queue.remove(task)

    def resume(self) -> None:
        if self.resumed is not None:
            resumed, self.resumed = self.resumed, None
            scheduler.GLOBAL_RUN_CONTEXT.runner.runq.extend(self._held)
            self._held = []
            resumed.set()

    async def awake(self) -> None:
        """For others: wait while this process stands still."""
        while self.resumed is not None:
            await self.resumed.wait()


PROCESS: ContextVar[Process | None] = ContextVar("PROCESS", default=None)


def _reschedule(self: Any, task: Any, next_send: Any = _NO_SEND) -> None:
    _plain_reschedule(self, task, next_send)
    process = task.context.get(PROCESS)
    if process is not None and process.resumed is not None:
        self.runq.pop()
        process._held.append(task)


def run(seed: str, main: Callable[[], Awaitable[Any]], runs_away: Callable[[str], None]) -> Any:
    """Run to the end on virtual time, which begins at 0 and jumps whenever nothing can go on.

    `runs_away` is told when it does not come to an end, and must end it.
    """
    dice = _Dice(seed)
    dice.runs_away = runs_away
    dice.clock = JumpingClock()
    ids = random.Random(f"ids {seed}")
    with (
        mock.patch.object(scheduler, "_ALLOW_DETERMINISTIC_SCHEDULING", True),
        mock.patch.object(scheduler, "_r", dice),
        mock.patch.object(scheduler.Runner, "reschedule", _reschedule),
        mock.patch("pybroker.store.store.os", SimpleNamespace(urandom=ids.randbytes)),
    ):
        return trio.run(main, clock=dice.clock)
