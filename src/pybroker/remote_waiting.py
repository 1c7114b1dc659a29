"""Callers of a remote client who wait for an answer of the broker. Owns how they are told."""

from __future__ import annotations

import trio

from pybroker.errors import BrokerError, ProtocolError
from pybroker.protocols.native_client import lost
from pybroker.protocols.native_frames import Page


class Waiter:
    """One caller who waits for the answer to one request. `what` it was, for an error's text."""

    __slots__ = ("error", "event", "what")

    def __init__(self, what: str) -> None:
        self.event = trio.Event()
        self.error: BrokerError | None = None
        self.what = what

    async def wait(self) -> None:
        await self.event.wait()
        if self.error is not None:
            raise self.error

    def answered(self, error: BrokerError | None) -> None:
        """Client: the broker answered."""
        self.error = error
        self.event.set()

    def lost(self, error: BrokerError | None) -> None:
        """Client: the connection was lost, and the request with it."""
        self.answered(lost(self.what, error))


class PageWaiter(Waiter):
    """One caller who waits for a page of a queue, over as many connections as it takes: nothing is in doubt when one is lost."""

    __slots__ = ("page",)

    def __init__(self) -> None:
        super().__init__("looking into a queue")
        self.page: Page | None = None

    def shown(self, page: Page) -> None:
        """Client: it is here."""
        self.page = page
        self.event.set()

    def lost(self, error: BrokerError | None) -> None:
        """Client: the connection was lost, and the request with it. It is asked for again, unless that was why."""
        self.answered(error if isinstance(error, ProtocolError) else None)

    def renew(self) -> None:
        """It is about to be asked for, perhaps again. Raises what it was told meanwhile."""
        if self.error is not None:
            raise self.error
        self.event = trio.Event()


class SendWaiter:
    """One caller who waits until one message, or one transaction, is answered."""

    __slots__ = ("durable", "error", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.error: BrokerError | None = None
        self.durable = False

    async def wait(self) -> None:
        await self.event.wait()
        if self.error is not None:
            raise self.error

    def take_confirmation(self, count: int, stored: bool) -> None:
        """Client: it is as safe as asked."""
        self.durable = stored
        self.event.set()

    def take_refusal(self, count: int, error: BrokerError) -> None:
        """Client: it was refused, or nobody will ever know."""
        self.error = error
        self.event.set()
