"""One page of a queue at a time, for who has no connection: browsers in process, the command line, purges and moves.

Owns the waiting. What a page is, and what happens to its messages, is in `pybroker.core.browsing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pybroker.committing import Commit, wait_or_ended
from pybroker.core.browsing import BrowsePage, Cursor, Matches
from pybroker.engine import Engine
from pybroker.errors import BrokerError, InvalidMessage, SendInDoubt
from pybroker.selectors import compile_selector

PURGE, MOVE, COPY = "purge", "move", "copy"


NUMBER_MAX = 2**63 - 1  # the store's keys have no room for more


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
    reader = Commit()
    core = engine.begin_turn()
    page = core.browse(destination, reader, cursor=cursor, matches=matcher(engine, selector), limit=limit)
    engine.end_turn()
    await wait_shown(engine, reader)
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

    `limit`: messages, at most; 0 = no limit. Raises InvalidDestination, InvalidSelector, LimitExceeded, SendInDoubt.
    """
    if action not in (PURGE, MOVE, COPY):
        raise InvalidMessage(f"{action!r} is not one of {PURGE}, {MOVE}, {COPY}")
    if engine.batch_full:
        await engine.journal.wait_room(engine.config.limits.batch_bytes_max)
    reader = Commit()
    core = engine.begin_turn()
    matches = matcher(engine, selector)
    moving = core.moving(source, None if action == PURGE else target, keep=action == COPY)
    page = core.browse(source, reader, cursor=cursor, matches=matches, limit=limit, moving=moving)
    engine.end_turn()
    await wait_moved(engine, reader)
    return page


async def wait_shown(engine: Engine, reader: Commit) -> None:
    """Wait for a page that is only read. Raises what ended the engine before."""
    if not await wait_or_ended(engine, reader.done):
        assert engine.error is not None
        raise engine.error


async def wait_moved(engine: Engine, reader: Commit) -> None:
    """Wait until what happens to the messages of a page is committed. Raises SendInDoubt when the engine ended before."""
    if not await wait_or_ended(engine, reader.done):
        raise SendInDoubt(
            f"it is not known whether messages were moved or deleted: {engine.error}; look into the queues before you try again"
        )


def cursor_of(request: Mapping[str, Any], name: str) -> Cursor | None:
    """The place that a command goes on from, as JSON has it; None where it begins. Raises BrokerError."""
    value = request.get(name)
    if value is None:
        return None
    if (
        not isinstance(value, list)
        or len(value) != 3
        or any(each.__class__ is not int or not 0 <= each <= NUMBER_MAX for each in value)
    ):
        raise BrokerError(f"a {name} is three numbers, as the last answer gave them")
    return Cursor(*value)
