"""An alarm: waits for a time of the wall clock that may be moved meanwhile. Knows nothing of what is due then."""

from __future__ import annotations

from collections.abc import Callable

import trio

LOOK_AGAIN = 1.0  # seconds after which the wall clock is looked at again: it may have been set


class Alarm:
    """For one waiting task."""

    def __init__(self, clock_ms: Callable[[], int]) -> None:
        self._clock_ms = clock_ms
        self._due: int | None = None
        self._moved = trio.Event()

    def set(self, due: int | None) -> None:
        """Ring at `due` (milliseconds since the Unix epoch) and not before; None = never."""
        self._due = due
        self._moved.set()

    async def wait(self) -> None:
        """Wait until it is due. It rings once: then another time has to be set."""
        while True:
            self._moved = trio.Event()
            if self._due is None:
                await self._moved.wait()
                continue
            left = (self._due - self._clock_ms()) / 1000
            if left <= 0:
                self._due = None
                await trio.lowlevel.checkpoint()
                return
            with trio.move_on_after(min(left, LOOK_AGAIN)):
                await self._moved.wait()
