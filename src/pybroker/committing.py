"""Waiting until what the core has emitted is committed, for who is no client. Owns no rule."""

from __future__ import annotations

import trio

from pybroker.core.consumer import Consumer
from pybroker.core.entry import Entry
from pybroker.engine import Engine
from pybroker.errors import BrokerError


async def end_turn_committed(engine: Engine) -> bool:
    """End the turn, and wait until what it emitted is committed. False when the engine ended first: then nobody knows."""
    waiter = Commit()
    engine.core.confirm((waiter, None))
    engine.end_turn()
    return await wait_or_ended(engine, waiter.done)


async def wait_or_ended(engine: Engine, event: trio.Event) -> bool:
    """Wait for an event that comes out of the engine. False when the engine ended first."""
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await engine.wait_ended()
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        await event.wait()
        nursery.cancel_scope.cancel()
    return event.is_set()


class Commit:
    """A sink that only waits for its token: that what was asked for is committed, or read."""

    def __init__(self) -> None:
        self.touched = False
        self.done = trio.Event()

    def confirm(self, token: object) -> None:
        self.done.set()

    def deliver(self, consumer: Consumer, entry: Entry) -> None: ...

    def flush(self) -> None: ...

    def fail(self, error: BrokerError) -> None: ...

    def fail_consumer(self, consumer: Consumer, error: BrokerError) -> None: ...
