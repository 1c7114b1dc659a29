"""The clock that a lease is measured with: it goes on while the machine is suspended. Owns that difference to trio's clock.

DESIGN.md section 5, rule 7. trio's clock stands still while a laptop or a virtual machine is suspended; the others' clocks do
not, and they may have elected another leader meanwhile. Linux counts the time asleep (CLOCK_BOOTTIME less CLOCK_MONOTONIC);
where a system does not tell it, the clock is trio's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import trio

STEP = 0.1  # seconds: less is the noise of reading two clocks, one after the other

_BOOTTIME: int | None = getattr(time, "CLOCK_BOOTTIME", None)


def seconds_asleep() -> float:
    """For how long this machine has been suspended since it was started, about; 0.0 where that is not known."""
    if _BOOTTIME is None:
        return 0.0
    # In this order: a pause between the two makes the answer smaller, and the next one right; never too large.
    boot = time.clock_gettime(_BOOTTIME)
    return boot - time.clock_gettime(time.CLOCK_MONOTONIC)


class LeaseClock:
    """Seconds that never stand still. `asleep` tells how long the machine was suspended so far."""

    def __init__(self, asleep: Callable[[], float] = seconds_asleep) -> None:
        self._read_asleep = asleep
        self._seen = asleep()
        self._slept = 0.0

    def now(self) -> float:
        asleep = self._read_asleep()
        if asleep - self._seen > STEP:
            self._slept += asleep - self._seen
            self._seen = asleep
        return trio.current_time() + self._slept
