"""Requests and their replies, for any client: one temporary queue takes all replies, and a correlation id says whose each one is.

Owns who waits for what. There is no task of its own: of the callers that wait, one reads for all of them. A reply that nobody
waits for any more is dropped and counted (`late`).
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING

import trio

from pybroker.destination import TEMPORARY_QUEUE
from pybroker.errors import BrokerClosed, BrokerError, InvalidMessage, RequestTimeout, SendInDoubt, SubscriptionError
from pybroker.message import REPLY_TO
from pybroker.subscription import ReceivedMessage, Subscription

if TYPE_CHECKING:
    from pybroker.client import Client, Headers

CORRELATION_ID = "correlation-id"
READ_MAX = 100  # replies that are read at a time


class _Pending:
    """One request that waits for its reply. `turn`: set when it has something to do, None while it does not wait for others."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()
        self.turn: trio.Event | None = None
        self.reply: ReceivedMessage | None = None
        self.error: BrokerError | None = None

    def wake(self) -> None:
        if self.turn is not None:
            self.turn.set()


class Requests:
    """The requests of one client. `late`: replies that came when nobody waited for them any more."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._opening = trio.Lock()
        self._name = ""
        self._subscription: Subscription | None = None
        self._pending: dict[str, _Pending] = {}
        self._reading = False
        self._prefix = secrets.token_hex(8)
        self._last = 0
        self.late = 0

    async def request(
        self,
        destination: str,
        body: bytes,
        headers: Headers,
        *,
        timeout: float,
        durable: bool,
        priority: int,
        expires: int,
    ) -> ReceivedMessage:
        """See `Client.request`."""
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers or ())
        if any(name in (REPLY_TO, CORRELATION_ID) for name, _ in pairs):
            raise InvalidMessage(f"a request's {REPLY_TO} and {CORRELATION_ID} are set for it: leave them out")
        with trio.move_on_after(timeout):
            await self._open()
            self._last += 1
            correlation = f"{self._prefix}-{self._last:x}"
            pairs += [(REPLY_TO, self._name), (CORRELATION_ID, correlation)]
            pending = self._pending[correlation] = _Pending()
            try:
                with pending.scope:
                    await self._client.send(
                        destination, body, pairs, durable=durable, priority=priority, expires=expires
                    )
                    await self._wait(pending)
            finally:
                del self._pending[correlation]
                self._pass_on()
            if pending.reply is not None:
                return pending.reply
            assert pending.error is not None
            raise pending.error
        raise RequestTimeout(
            f"no reply to the request to {destination} came within {timeout:g} s: it may have been carried out, or may be yet"
        )

    async def _open(self) -> None:
        """Make the queue for replies, the first time and after it was lost."""
        async with self._opening:
            if self._subscription is not None and not self._subscription.ended:
                return
            self._forget(SubscriptionError("nothing reads it any more"))
            name = await self._client._open_temporary(TEMPORARY_QUEUE, self._lost)
            try:
                subscription = self._client.subscribe(name, ack="auto")
                await subscription.__aenter__()
            except BaseException:
                self._client._close_temporary(name)
                raise
            self._name = name
            self._subscription = subscription

    async def _wait(self, pending: _Pending) -> None:
        """Wait until the request is answered; read for all while nobody else does."""
        while pending.reply is None and pending.error is None:
            if self._reading or self._subscription is None:
                pending.turn = trio.Event()
                await pending.turn.wait()
                pending.turn = None
                continue
            self._reading = True
            try:
                for message in await self._subscription.receive_batch(READ_MAX):
                    self._take(message)
            except BrokerError as error:
                self._forget(error)
            finally:
                self._reading = False

    def _forget(self, error: BrokerError) -> None:
        """The subscription has ended, and with it the way of all replies that have not come; the next request makes another."""
        if self._subscription is not None:
            self._subscription = None
            self._client._close_temporary(self._name)
            if not isinstance(error, BrokerClosed):  # which says it of everything
                what = "the request may have been carried out; its reply is dropped"
                error = SendInDoubt(f"the queue for replies is lost ({error}): {what}")
            self._fail(error)

    def _take(self, message: ReceivedMessage) -> None:
        pending = self._pending.get(message.header(CORRELATION_ID) or "")
        if pending is None or pending.reply is not None:
            self.late += 1
        else:
            pending.reply = message
            pending.wake()

    def _pass_on(self) -> None:
        """Whoever read is done: another one's turn."""
        if not self._reading:
            for pending in self._pending.values():
                if pending.turn is not None and pending.reply is None:
                    pending.wake()
                    return

    def _lost(self, error: BrokerError | None) -> None:
        """Client: the connection is lost, and replies that were on their way to it."""
        self._fail(
            SendInDoubt(
                f"the connection was lost ({error}) before the reply came: the request may have been carried out; its reply "
                "is dropped"
            )
        )

    def _fail(self, error: BrokerError) -> None:
        for pending in self._pending.values():
            if pending.reply is None:
                pending.error = error
                pending.scope.cancel()
