"""What an operator does with queues, by the broker's face and by command: look into them, purge, move, copy. Owns its steps.

Each step is one page, one turn and one batch; between two steps everybody else has their turn.
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pybroker.browser import BrowsedMessage
from pybroker.core.browsing import BrowsePage, Cursor
from pybroker.engine import Engine
from pybroker.errors import BrokerError, BrokerFull
from pybroker.queue_pages import cursor_of, move_page, read_page

STEP_SECONDS = 1.0  # how long one command works before it says how far it is

Progress = Callable[["Moved"], None]


@dataclass(frozen=True, slots=True)
class Moved:
    """What a purge, move or copy has done.

    count        messages
    outstanding  messages that it was to be done with, too, but that are with consumers or in transactions: they were left alone
    unread       messages whose values in the store are damaged: they were left alone
    """

    count: int = 0
    outstanding: int = 0
    unread: int = 0


async def move_all(
    find_engine: Callable[[], Engine],
    action: str,
    source: str,
    target: str,
    selector: str,
    limit: int,
    progress: Progress | None,
) -> Moved:
    """Carry out a purge, move or copy. Raises what `move_page` raises; BrokerFull says how many there were before."""
    moved, cursor = Moved(), None
    while True:
        page, moved = await _step(find_engine(), action, source, target, selector, limit, cursor, moved)
        if progress is not None:
            progress(moved)
        if page.cursor is None or (limit and moved.count >= limit):
            return moved
        if page.refused is not None:
            raise BrokerFull(f"{page.refused}; {moved.count} messages went before")
        cursor = page.cursor


async def _step(
    engine: Engine,
    action: str,
    source: str,
    target: str,
    selector: str,
    limit: int,
    cursor: Cursor | None,
    moved: Moved,
) -> tuple[BrowsePage, Moved]:
    left = limit - moved.count if limit else 0
    page = await move_page(engine, action, source, target, cursor, selector=selector, limit=left)
    done = Moved(moved.count + page.moved, moved.outstanding + page.outstanding, moved.unread + page.unread)
    return page, done


# ---- by command: a cursor goes to and fro, and nothing is kept here


async def browse_command(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    """One page: ``{"destination", "selector", "limit", "cursor", "headers_only"}``."""
    page = await read_page(
        engine,
        _text(request, "destination"),
        cursor_of(request, "cursor"),
        selector=_text(request, "selector"),
        limit=_number(request, "limit"),
    )
    bare = bool(request.get("headers_only", False))
    rows = [_row(BrowsedMessage(each), bare) for each in page.messages]
    return {"messages": rows, "cursor": page.cursor, "unread": page.unread}


def _row(message: BrowsedMessage, headers_only: bool) -> dict[str, Any]:
    row = {
        "message_id": message.message_id,
        "destination": message.destination,
        "durable": message.durable,
        "priority": message.priority,
        "expires": message.expires,
        "timestamp": message.timestamp,
        "deliveries": message.deliveries,
        "outstanding": message.outstanding,
        "size": len(message.body),
        "headers": message.headers,
    }
    if not headers_only:
        row["body"] = b64encode(message.body).decode()
    return row


async def move_command(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    """Steps for about `STEP_SECONDS`: ``{"action", "source", "target", "selector", "limit", "cursor"}``."""
    moved, cursor = Moved(), cursor_of(request, "cursor")
    limit = _number(request, "limit")
    ends = time.monotonic() + STEP_SECONDS
    while True:
        page, moved = await _step(
            engine,
            _text(request, "action"),
            _text(request, "source"),
            _text(request, "target"),
            _text(request, "selector"),
            limit,
            cursor,
            moved,
        )
        cursor = page.cursor
        over = cursor is None or page.refused is not None or (limit > 0 and moved.count >= limit)
        if over or time.monotonic() >= ends:
            break
    refused = str(page.refused) if page.refused is not None else ""
    return {**asdict(moved), "cursor": None if over else cursor, "refused": refused}


def _text(request: Mapping[str, Any], name: str) -> str:
    value = request.get(name, "")
    if not isinstance(value, str):
        raise BrokerError(f"{name} must be text")
    return value


def _number(request: Mapping[str, Any], name: str) -> int:
    value = request.get(name, 0)
    if value.__class__ is not int or value < 0:
        raise BrokerError(f"{name} must be a whole number from 0")
    return int(value)
