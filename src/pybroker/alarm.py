"""An alarm: waits for a time of the wall clock that may be moved meanwhile. Knows nothing of what is due then."""

from __future__ import annotations

from collections.abc import Callable

import trio


class Alarm:
    """For one waiting task. `look_again`: seconds after which the wall clock is looked at again, as it may have been set."""

    def __init__(self, clock_ms: Callable[[], int], look_again: float) -> None:
        self._clock_ms = clock_ms
        self._look_again = look_again
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
            with trio.move_on_after(min(left, self._look_again)):
                await self._moved.wait()
