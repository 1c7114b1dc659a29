"""A temporary destination whose making is cancelled is not left behind."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from tests.engine.support import Disk, broker_on


async def test_a_cancelled_one_takes_no_room(autojump_clock: MockClock) -> None:
    async with broker_on(Disk(), limits={"temporary_destinations_max": 1}) as broker, broker.connect() as client:
        for _ in range(3):
            with trio.CancelScope() as scope:
                scope.cancel()
                async with client.temporary_queue():
                    raise AssertionError
        assert broker.statistics().destinations == ()
        async with client.temporary_queue() as name:
            assert name.startswith("/remote-temp-queue/")
