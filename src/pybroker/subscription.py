"""Receiving in process: subscriptions and the messages that they bring. The other half of `client`.

Cancellation at any await loses nothing: a message that was received and not acknowledged is delivered again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from pybroker.core.consumer import AUTO, CUMULATIVE, Consumer
from pybroker.core.entry import SENT, Entry
from pybroker.errors import BrokerError, SubscriptionError

if TYPE_CHECKING:
    from pybroker.client import Client


class ReceivedMessage:
    """A message that was delivered, and the means to settle it."""

    __slots__ = ("_entry", "_subscription", "_tag")

    def __init__(self, subscription: Subscription, entry: Entry) -> None:
        self._subscription = subscription
        self._entry = entry
        self._tag = entry.tag

    @property
    def body(self) -> bytes:
        return self._entry.message.body

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The sender's headers in order, repeats included."""
        return self._entry.message.headers

    def header(self, name: str) -> str | None:
        """The first header of that name, or None."""
        return self._entry.message.header(name)

    @property
    def destination(self) -> str:
        return self._entry.message.destination

    @property
    def message_id(self) -> str:
        """The same on every redelivery."""
        return self._entry.message.message_id.decode()

    @property
    def priority(self) -> int:
        return self._entry.message.priority

    @property
    def durable(self) -> bool:
        return self._entry.message.durable

    @property
    def expires(self) -> int:
        """Milliseconds since the Unix epoch, 0 = never."""
        return self._entry.message.expires

    @property
    def timestamp(self) -> int:
        """When the broker accepted it, milliseconds since the Unix epoch."""
        return self._entry.message.timestamp

    @property
    def deliveries(self) -> int:
        """Deliveries of it before this one that ended without an acknowledgement."""
        return self._entry.deliveries

    @property
    def redelivered(self) -> bool:
        return self._entry.deliveries > 0

    async def ack(self) -> None:
        """Acknowledge; returns when that is committed. Raises UnknownDelivery when it was settled before."""
        await self._subscription.ack([self])

    async def nack(self) -> None:
        """Give it back: it is delivered again, or goes to the dead letters after the last try."""
        await self._subscription.nack([self])

    def __repr__(self) -> str:
        return f"<ReceivedMessage {self.message_id} from {self.destination}, {len(self.body)} bytes>"


class Subscription:
    """Messages of one destination. Used as an async context manager; leaving it returns what was not acknowledged."""

    def __init__(
        self, client: Client, destination: str, ack: str, prefetch: int | None, durable_name: str | None
    ) -> None:
        self.destination = destination
        self._client = client
        self._ack_mode = ack
        self._prefetch = prefetch
        self._durable_name = durable_name
        self._consumer: Consumer | None = None
        self._buffer: deque[Entry] = deque()
        self._arrived = trio.Event()
        self._error: BrokerError | None = None

    async def __aenter__(self) -> Subscription:
        if self._consumer is not None:
            raise SubscriptionError("this subscription was entered before: make another one")
        core = self._client._begin_turn()
        consumer = core.subscribe(
            self._client._running_connection,
            self.destination,
            self._ack_mode,
            prefetch=self._prefetch,
            durable_name=self._durable_name,
            context=self,
        )
        self._consumer = consumer
        self._client._subscriptions.add(self)
        try:
            await self._client._committed(core)  # a durable subscription is there when this returns
        except BaseException:
            self._leave()
            raise
        core = self._client._begin_turn()
        core.start(consumer)
        self._client._running.end_turn()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        client = self._client
        client._subscriptions.discard(self)
        if self._error is None:
            self._error = SubscriptionError("the subscription is closed")
            if client._error is None and client._running.error is None:
                client._begin_turn().unsubscribe(self._running)
                client._running.end_turn()
        self._buffer.clear()
        self._arrived.set()

    @property
    def _running(self) -> Consumer:
        if self._consumer is None:
            raise SubscriptionError("the subscription is not open: use `async with client.subscribe(...)`")
        return self._consumer

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> ReceivedMessage:
        return await self.receive()

    async def receive(self) -> ReceivedMessage:
        """The next message; waits for it. Raises what ended the subscription."""
        return (await self.receive_batch(1))[0]

    async def receive_batch(self, count_max: int) -> list[ReceivedMessage]:
        """What has arrived, at least one message and at most `count_max`, in order; waits for the first."""
        await trio.lowlevel.checkpoint()
        while True:
            buffer = self._buffer
            entries: list[Entry] = []
            while buffer and len(entries) < count_max:
                entry = buffer.popleft()
                if entry.state == SENT:
                    entries.append(entry)
            if entries:
                break
            if self._error is not None:
                raise self._client._present(self._error)
            self._arrived = trio.Event()
            await self._arrived.wait()
        received = [ReceivedMessage(self, entry) for entry in entries]
        if self._ack_mode == AUTO:
            # Nothing is awaited after this: the caller has them.
            self._client._begin_turn().taken(entries)
            self._client._running.end_turn()
        return received

    async def ack(self, messages: Sequence[ReceivedMessage], *, confirm: bool = True) -> None:
        """Acknowledge messages of this subscription (cumulative: the last one is enough); returns when that is committed.

        With ``confirm=False`` it returns at once, and the next message can be worked on while this is being committed; after a
        crash such a message may be delivered again. Raises UnknownDelivery for one that was settled before; those in
        front of it are acknowledged.
        """
        core = self._client._begin_turn()
        consumer = self._running
        if self._ack_mode == CUMULATIVE:
            messages = messages[-1:]
        try:
            for message in messages:
                core.acknowledge(consumer, message._tag)
        except BrokerError:
            self._client._running.end_turn()
            raise
        if confirm:
            await self._client._committed(core)
        else:
            self._client._running.end_turn()
            await trio.lowlevel.checkpoint()

    async def nack(self, messages: Sequence[ReceivedMessage]) -> None:
        """Give messages back; returns when that is committed."""
        core = self._client._begin_turn()
        try:
            for message in messages:
                core.reject(self._running, message._tag)
        except BrokerError:
            self._client._running.end_turn()
            raise
        await self._client._committed(core)

    def take(self, entry: Entry) -> None:
        """Client: a delivery."""
        self._buffer.append(entry)
        self._arrived.set()

    def fail(self, error: BrokerError) -> None:
        """Client: the broker or the client ended it; what was not handed out is the broker's again."""
        self._error = error
        self._buffer.clear()
        self._arrived.set()
