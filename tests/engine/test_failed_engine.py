"""An engine that was failed from outside ends; its own tasks, which may be about to do a turn just then, raise nothing."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from pybroker.config import BrokerConfig, DeliveryPolicy
from pybroker.core.reads import DueRequest
from pybroker.engine import Engine
from pybroker.errors import NotLeader, StoreError
from pybroker.keeper import make_spool
from pybroker.store.memory import MemoryBackend
from pybroker.store.store import Store

CONFIG = BrokerConfig(delivery=DeliveryPolicy(expiry_interval=1.0))
ERROR = NotLeader("another replica leads")


def make_engine() -> Engine:
    return Engine(CONFIG, Store.open(MemoryBackend()), make_spool(CONFIG))


async def test_a_sweep_that_is_due_when_the_engine_fails(autojump_clock: trio.abc.Clock) -> None:
    engine = make_engine()
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        engine.fail(ERROR)
        await trio.sleep(2 * CONFIG.delivery.expiry_interval)
        nursery.cancel_scope.cancel()
    assert engine.error is ERROR


async def test_a_read_that_is_under_way_when_the_engine_fails(autojump_clock: trio.abc.Clock) -> None:
    engine = make_engine()
    reading, go_on = trio.Event(), trio.Event()

    async def slow(read: object) -> tuple[list[object], list[object]]:
        reading.set()
        await go_on.wait()
        return [], []

    engine._in_reader = slow  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        engine._reads_send.send_nowait(DueRequest(now=0, count_max=1))
        await reading.wait()
        engine.fail(ERROR)
        go_on.set()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert engine.error is ERROR


async def test_an_error_of_their_own_is_raised(autojump_clock: trio.abc.Clock) -> None:
    engine = make_engine()

    async def broken(read: object) -> None:
        raise StoreError("the disk is away")

    engine._in_reader = broken  # type: ignore[method-assign]
    with pytest.RaisesGroup(StoreError, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            engine._reads_send.send_nowait(DueRequest(now=0, count_max=1))
