"""Whole values for bad ones that a reader of pages meets, where there are other copies of the store. Owns what is still bad.

DESIGN.md section 4: a bad value is never delivered. A page is handed to the core only when its bad values have been asked for: so
a message that can be mended is delivered in its place, and its value is written with the batch before that. What nobody has
whole now is asked for again later. Between the engine and `Term.fetch`; a broker on its own has no other copy, and none of this.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence

import trio

from pybroker.core.broker import Core
from pybroker.core.reads import PageRequest
from pybroker.operations import PUT_VALUE, SET_REFERENCES, Operation
from pybroker.store import format as fmt
from pybroker.store.pages import Page

log = logging.getLogger("pybroker.engine")

RETRY_INTERVAL = 30.0  # seconds between two tries for messages that could not be mended
ASK_MAX = 256  # values that are asked for at a time
LEFT_MAX = 10_000  # values that are asked for again

Fetch = Callable[
    [Sequence[bytes]], Awaitable[Mapping[bytes, bytes]]
]  # whole values, as new as the store is at the call
Pages = tuple[Page, Page | None]  # of the store, of the spool


class Mender:
    """What one engine knows of bad values. `mended` counts those that were put right since it began."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._left: dict[bytes, tuple[int, int]] = {}  # key -> the queue and order that it keeps from being read
        self.mended = 0

    @property
    def left(self) -> int:
        """Values that nobody had whole."""
        return len(self._left)

    async def read(
        self, request: PageRequest, read: Callable[[Mapping[bytes, bytes]], Awaitable[Pages]]
    ) -> tuple[Pages, list[tuple[int, Operation]]]:
        """A page, read with whole values in the place of its bad ones as far as there are any; and what mends the store."""
        values: dict[bytes, bytes] = {}
        orders: dict[bytes, int] = {}
        pages = await read(values)
        while bad := {key: order for order, key in pages[0].bad if key not in values}:
            got = await self._fetch(list(bad)[:ASK_MAX])
            if not got:
                break
            values.update(got)
            orders.update(bad)
            pages = await read(values)
        mended = [(orders[key], _operation(key, value)) for key, value in values.items()]
        self.mended += len(mended)
        unread = set(pages[0].unread)
        for order, key in pages[0].bad:
            if order in unread and len(self._left) < LEFT_MAX:
                self._left[key] = request.queue.queue_id, order
        for key in values:
            self._left.pop(key, None)
            log.warning("queue %s: record %s was bad, and is whole again", request.queue.name, key.hex())
        return pages, mended

    async def run(self, begin_turn: Callable[[], Core], end_turn: Callable[[], None]) -> None:
        """Ask again from time to time."""
        while True:
            await trio.sleep(RETRY_INTERVAL)
            if self._left:
                await self._retry(begin_turn, end_turn)

    async def _retry(self, begin_turn: Callable[[], Core], end_turn: Callable[[], None]) -> None:
        shared = begin_turn().shared
        shared.read_began()  # a count of references that comes must not be older than what memory forgets
        try:
            keys = list(self._left)[:ASK_MAX]
            got = await self._fetch(keys)
            core = begin_turn()
            found = [(*self._left.pop(key), _operation(key, value)) for key, value in got.items() if key in self._left]
            for key in keys:
                if key in self._left:  # behind the others, for the next time
                    self._left[key] = self._left.pop(key)
            core.messages_mended(found)
            self.mended += len(found)
            end_turn()
        finally:
            shared.read_ended()


def _operation(key: bytes, value: bytes) -> Operation:
    """What writes a whole value."""
    if key[0] == fmt.REFERENCES:
        return (SET_REFERENCES, fmt.parse_key(key)[1], fmt.decode_number(key, value))
    return (PUT_VALUE, key, value)
