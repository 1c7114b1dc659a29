"""The face of looking into queues: messages are shown, and stay where they are. Owns the walk from page to page.

``async for message in client.browse("/queue/x")``. A browser is over behind the last message that was there when it began; what
came later is not shown, what went meanwhile may be. It holds one page of a queue at most, and the broker nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

from pybroker.core.browsing import Browsed, BrowsePage, Cursor
from pybroker.errors import SubscriptionError
from pybroker.message_view import MessageView

ReadPage = Callable[[Cursor | None, int], Awaitable[BrowsePage]]  # from where, and how many at most (0 = a page)


class BrowsedMessage(MessageView):
    """A message as it stands in its queue. `outstanding`: it is with a consumer or in a transaction, or waits for another try."""

    __slots__ = ("outstanding",)

    def __init__(self, browsed: Browsed) -> None:
        super().__init__(browsed.message, browsed.deliveries)
        self.outstanding = browsed.outstanding

    def __repr__(self) -> str:
        return f"<BrowsedMessage {self.message_id} in {self.destination}, {len(self.body)} bytes>"


class QueueBrowser:
    """The messages of a queue, in order of delivery. Made by `Client.browse` and `Broker.browse`; iterated once.

    `unread`: messages that were passed over, because their values in the store are damaged.
    """

    def __init__(self, read: ReadPage, limit: int) -> None:
        if limit < 0:
            raise SubscriptionError(f"a browser's limit must be 0 (none) or more, not {limit}")
        self.unread = 0
        self._read = read
        self._left = limit or None
        self._cursor: Cursor | None = None
        self._over = False
        self._buffer: deque[Browsed] = deque()

    def __aiter__(self) -> QueueBrowser:
        return self

    async def __anext__(self) -> BrowsedMessage:
        while not self._buffer:
            if self._over or self._left == 0:
                raise StopAsyncIteration
            page = await self._read(self._cursor, self._left or 0)
            self.unread += page.unread
            self._cursor = page.cursor
            self._over = page.cursor is None
            self._buffer.extend(page.messages)
        if self._left is not None:
            self._left -= 1
        found = BrowsedMessage(self._buffer.popleft())
        if self._left == 0:
            self._buffer.clear()
        return found
