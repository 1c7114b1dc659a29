"""Receiving in process. The other half of `local_client`."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from pybroker.consumer_options import ConsumerOptions
from pybroker.core.consumer import AUTO, CUMULATIVE, Consumer
from pybroker.core.entry import SENT, Entry
from pybroker.errors import BrokerError, SubscriptionError
from pybroker.subscription import ReceivedMessage, Subscription, foreign

if TYPE_CHECKING:
    from pybroker.local_client import LocalClient


class LocalSubscription(Subscription):
    """Messages of one destination. Used as an async context manager; leaving it returns what was not acknowledged."""

    def __init__(
        self,
        client: LocalClient,
        destination: str,
        ack: str,
        prefetch: int | None,
        durable_name: str | None,
        options: ConsumerOptions,
    ) -> None:
        self.destination = destination
        self._client = client
        self._ack_mode = ack
        self._prefetch = prefetch
        self._durable_name = durable_name
        self._options = options
        self._consumer: Consumer | None = None
        self._buffer: deque[Entry] = deque()
        self._arrived = trio.Event()
        self._error: BrokerError | None = None

    async def __aenter__(self) -> LocalSubscription:
        if self._consumer is not None:
            raise SubscriptionError("this subscription was entered before: make another one")
        core = self._client._begin_turn()
        consumer = core.subscribe(
            self._client._running_connection,
            self.destination,
            self._ack_mode,
            prefetch=self._prefetch,
            durable_name=self._durable_name,
            options=self._options,
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

    async def receive_batch(self, count_max: int) -> list[ReceivedMessage]:
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
        received = [ReceivedMessage(self, entry.message, entry.tag, entry.deliveries) for entry in entries]
        if self._ack_mode == AUTO:
            # Nothing is awaited after this: the caller has them.
            self._client._begin_turn().taken(entries)
            self._client._running.end_turn()
        return received

    async def ack(self, messages: Sequence[ReceivedMessage], *, confirm: bool = True) -> None:
        core = self._client._begin_turn()
        consumer = self._running
        if self._ack_mode == CUMULATIVE:
            messages = messages[-1:]
        try:
            for message in messages:
                if message._subscription is not self:
                    raise foreign(message)
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
        core = self._client._begin_turn()
        try:
            for message in messages:
                if message._subscription is not self:
                    raise foreign(message)
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
