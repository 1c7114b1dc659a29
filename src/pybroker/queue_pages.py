"""One page of a queue at a time, for who has no connection: browsers in process, the command line, purges and moves.

Owns the waiting. What a page is, and what happens to its messages, is in `pybroker.core.browsing`.
"""

from __future__ import annotations

from typing import Any

import trio

from pybroker.core.browsing import BrowsePage, Cursor, Matches
from pybroker.core.consumer import Consumer
from pybroker.core.entry import Entry
from pybroker.engine import Engine
from pybroker.errors import BrokerError, InvalidMessage
from pybroker.selectors import compile_selector

PURGE, MOVE, COPY = "purge", "move", "copy"


class _Reader:
    """A sink that waits for one page."""

    def __init__(self) -> None:
        self.touched = False
        self.event = trio.Event()
        self.error: BrokerError | None = None

    def confirm(self, token: Any) -> None:
        """Engine: the page is here."""
        self.event.set()

    def flush(self) -> None:
        """Engine: the turn is over."""

    def fail(self, error: BrokerError) -> None:
        """Engine: it has ended."""
        if not self.event.is_set():
            self.error = error
            self.event.set()

    def fail_consumer(self, consumer: Consumer, error: BrokerError) -> None:
        """It has no consumers."""

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """It has no consumers."""


def matcher(engine: Engine, selector: str) -> Matches | None:
    """What a selector is true for; "" = everything. Raises InvalidSelector."""
    return compile_selector(selector, engine.config.limits.selector_bytes_max).matches if selector else None


async def read_page(
    engine: Engine,
    destination: str,
    cursor: Cursor | None,
    *,
    selector: str = "",
    limit: int = 0,
) -> BrowsePage:
    """A page of a queue, with at most `limit` messages (0 = as many as a page has). Raises InvalidDestination, InvalidSelector."""
    reader = _Reader()
    core = engine.begin_turn()
    page = core.browse(destination, reader, cursor=cursor, matches=matcher(engine, selector), limit=limit)
    await _wait(engine, reader)
    return page


async def move_page(
    engine: Engine,
    action: str,
    source: str,
    target: str,
    cursor: Cursor | None,
    *,
    selector: str = "",
    limit: int = 0,
) -> BrowsePage:
    """Purge, move or copy what is ready in a page of a queue; returns when it is committed.

    `limit`: messages, at most; 0 = no limit. Raises InvalidDestination, InvalidSelector, LimitExceeded.
    """
    if action not in (PURGE, MOVE, COPY):
        raise InvalidMessage(f"{action!r} is not one of {PURGE}, {MOVE}, {COPY}")
    if engine.batch_full:
        await engine.journal.wait_room(engine.config.limits.batch_bytes_max)
    reader = _Reader()
    core = engine.begin_turn()
    matches = matcher(engine, selector)
    moving = core.moving(source, None if action == PURGE else target, keep=action == COPY)
    page = core.browse(source, reader, cursor=cursor, matches=matches, limit=limit, moving=moving)
    await _wait(engine, reader)
    return page


async def _wait(engine: Engine, reader: _Reader) -> None:
    engine.readers.add(reader)
    engine.end_turn()
    try:
        await reader.event.wait()
    finally:
        engine.readers.discard(reader)
    await trio.lowlevel.checkpoint()
    if reader.error is not None:
        raise reader.error
