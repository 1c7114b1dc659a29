"""The client over the network: the same as in process, over one connection after the other. Made by `pybroker.connect`.

Owns the operations as a program sees them; `remote_lifeline` is what they are done with.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from pybroker.browser import QueueBrowser
from pybroker.client import IN_FLIGHT_DEFAULT, Client, Confirmation, Headers
from pybroker.consumer_options import ConsumerOptions
from pybroker.core.browsing import Browsed, BrowsePage, Cursor
from pybroker.destination import parse_destination
from pybroker.errors import BrokerError
from pybroker.message import PRIORITY_DEFAULT
from pybroker.protocols.native_decoding import check_selector
from pybroker.protocols.native_frames import NUMBER_MAX
from pybroker.protocols.native_sends import row_size
from pybroker.remote_events import ClientStatistics, ConnectionEvents
from pybroker.remote_lifeline import Lifeline
from pybroker.remote_sending import RemotePublisher, RemoteTransaction, Sender
from pybroker.remote_subscription import RemoteSubscription, check_durable_name
from pybroker.remote_waiting import SendWaiter, Waiter
from pybroker.requests import Requests


class RemoteClient(Client):
    """A client of a broker, or of several, over the network.

    It connects again for ever while it is open. Subscriptions go on by themselves: what a lost connection had brought is delivered
    again, and settling it raises UnknownDelivery. Sends and transactions that were not confirmed are sent again under their own
    numbers, and stored once. What can't be known raises SendInDoubt; what was not sent for lack of a broker, BrokerUnavailable.

    Sends and acknowledgements are not ordered with each other: where one must not happen without the other, use a transaction.
    """

    def __init__(self, lifeline: Lifeline) -> None:
        self._lifeline = lifeline
        self._sender = Sender(lifeline)
        self._browsing = trio.Lock()
        self._requests = Requests(self)

    async def send(
        self,
        destination: str,
        body: bytes,
        headers: Headers = None,
        *,
        durable: bool = True,
        priority: int = PRIORITY_DEFAULT,
        expires: int = 0,
    ) -> Confirmation:
        sender, lifeline = self._sender, self._lifeline
        row = sender.row(destination, body, headers, durable, priority, expires)
        await sender.wait_room()
        sender.check_size(row)
        waiter = SendWaiter()
        submission = lifeline.submit([row], row_size(row), waiter)
        try:
            await waiter.wait()
        finally:
            lifeline.sends.withdraw(submission)  # cancelled; or answered, and then this does nothing
        return Confirmation(lifeline.sends.message_id(submission.first), waiter.durable)

    @asynccontextmanager
    async def publisher(self, max_in_flight: int = IN_FLIGHT_DEFAULT) -> AsyncIterator[RemotePublisher]:
        self._lifeline.check_open()
        publisher = RemotePublisher(self._sender, max_in_flight)
        yield publisher
        await publisher.wait_confirmed()

    def subscribe(
        self,
        destination: str,
        *,
        ack: str = "individual",
        prefetch: int | None = None,
        durable_name: str | None = None,
        selector: str = "",
        exclusive: bool = False,
        priority: int = 0,
        retroactive: bool = False,
    ) -> RemoteSubscription:
        return RemoteSubscription(
            self._lifeline,
            destination,
            ack,
            prefetch,
            durable_name,
            ConsumerOptions(selector, exclusive, priority, retroactive),
        )

    def browse(self, destination: str, *, selector: str = "", limit: int = 0) -> QueueBrowser:
        async def read(cursor: Cursor | None, count: int) -> BrowsePage:
            parse_destination(destination)
            check_selector(selector)
            async with self._browsing:  # one page at a time: there is a limit of a connection
                page = await self._lifeline.page(destination, selector, min(count, NUMBER_MAX), cursor)
            out = set(page.outstanding)
            rows = [Browsed(message, n, at in out) for at, (message, n) in enumerate(page.messages)]
            return BrowsePage(rows, Cursor(*page.cursor) if page.cursor is not None else None, page.unread)

        return QueueBrowser(read, limit)

    async def remove_subscription(self, durable_name: str) -> None:
        check_durable_name(durable_name)
        await self._lifeline.wait_connected()
        waiter = Waiter("deleting a durable subscription")
        self._lifeline.remove_durable(waiter, durable_name)
        await waiter.wait()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[RemoteTransaction]:
        self._lifeline.check_open()
        transaction = RemoteTransaction(self._sender)
        try:
            yield transaction
        except BaseException:
            transaction.abort()
            raise
        await transaction.commit()

    async def _open_temporary(self, kind: str, lost: Callable[[BrokerError | None], None] | None) -> str:
        return await self._lifeline.temporaries.open(kind, lost)

    def _close_temporary(self, name: str) -> None:
        for subscription in [each for each in self._lifeline.subscriptions if each.destination == name]:
            subscription._leave(None)
        self._lifeline.temporaries.close(name)

    def events(self) -> ConnectionEvents:
        """What happens to the connection, from what holds now: ``async for event in client.events()``. Ends with the client."""
        return self._lifeline.events()

    def statistics(self) -> ClientStatistics:
        """What there is at this moment."""
        return self._lifeline.statistics()
