"""STOMP behind the face of `pybroker.Client`, as far as it goes: so that one suite can hold the protocols against each other.

One connection, no reconnecting. Errors are those of the broker's ERROR frame by its code; the connection ends with one. What
STOMP does not know is left out: publishers wait for each receipt.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any

import trio

from pybroker.broker import single
from pybroker.browser import QueueBrowser
from pybroker.client import Client, ClientTransaction, Confirmation, Headers, Publisher, make_message
from pybroker.consumer_options import PLAIN, ConsumerOptions
from pybroker.core.browsing import Browsed, BrowsePage, Cursor
from pybroker.destination import TEMPORARY_QUEUE
from pybroker.errors import BrokerClosed, BrokerError, UnknownDelivery
from pybroker.message import PRIORITY_DEFAULT, Message, encode_headers
from pybroker.protocols.native_errors import error_of
from pybroker.protocols.stomp_client import (
    Connected,
    ErrorReceived,
    MessageReceived,
    ReceiptReceived,
    StompClientSession,
)
from pybroker.protocols.stomp_send import TRANSPORT_HEADERS
from pybroker.requests import Requests
from pybroker.subscription import ReceivedMessage, Subscription

ACK = {"individual": "client-individual", "cumulative": "client", "auto": "auto"}
OURS = TRANSPORT_HEADERS | {"persistent", "priority", "expires", "redelivered", "delivery-count", "ack", "subscription"}


class StompFace(Client):
    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.session = StompClientSession()
        self._writing = trio.Lock()
        self._receipts: dict[str, trio.Event] = {}
        self._numbers = itertools.count(1)
        self._subscriptions: dict[str, StompSubscription] = {}
        self._connected = trio.Event()
        self._error: BrokerError | None = None
        self._requests = Requests(self)

    async def run(self) -> None:
        while True:
            data = await self._stream.receive_some(65_536)
            self.session.receive_data(bytes(data))
            while events := self.session.next_events(1_000):
                for event in events:
                    self._handle(event)
            if not data:
                self._end(BrokerClosed("the broker closed the connection"))
                return

    def _handle(self, event: object) -> None:
        if isinstance(event, Connected):
            self._connected.set()
        elif isinstance(event, ReceiptReceived):
            self._receipts.pop(event.receipt_id).set()
        elif isinstance(event, MessageReceived):
            self._subscriptions[event.header("subscription") or ""].take(event)
        elif isinstance(event, ErrorReceived):
            self._end(error_of(event.header("code") or "", event.message))

    def _end(self, error: BrokerError) -> None:
        self._error = self._error or error
        self._connected.set()
        for event in self._receipts.values():
            event.set()
        for subscription in self._subscriptions.values():
            subscription.arrived.set()

    async def open(self, client_id: str) -> None:
        self.session.connect(client_id=client_id or None)
        await self.flush()
        await self._connected.wait()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    async def flush(self) -> None:
        async with self._writing:
            data = self.session.data_to_send()
            if data:
                await self._stream.send_all(data)

    def receipt(self) -> str:
        self.check()
        name = f"r{next(self._numbers)}"
        self._receipts[name] = trio.Event()
        return name

    async def confirmed(self, receipt: str) -> None:
        event = self._receipts[receipt]
        await self.flush()
        await event.wait()
        self.check()

    @staticmethod
    def lines(headers: Headers, durable: bool, priority: int, expires: int) -> list[tuple[str, str]]:
        pairs = list(headers.items() if hasattr(headers, "items") else headers or ())
        return [
            ("persistent", "true" if durable else "false"),
            ("priority", str(priority)),
            ("expires", str(expires)),
            *pairs,
        ]

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
        message = make_message(destination, body, headers, durable, priority, expires)
        receipt = self.receipt()
        self.session.send(destination, message.body, self.lines(headers, durable, priority, expires), receipt=receipt)
        await self.confirmed(receipt)
        return Confirmation("", durable)

    @asynccontextmanager
    async def publisher(self, max_in_flight: int = 1_000) -> AsyncIterator[Publisher]:
        yield StompPublisher(self)

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
    ) -> StompSubscription:
        options = ConsumerOptions(selector, exclusive, priority, retroactive)
        return StompSubscription(self, destination, ack, prefetch, durable_name, options)

    def browse(self, destination: str, *, selector: str = "", limit: int = 0) -> QueueBrowser:
        async def read(cursor: Cursor | None, count: int) -> BrowsePage:
            subscription = StompSubscription(self, destination, "auto", None, None)
            subscription.browser = [("browser", "true"), *([("selector", selector)] if selector else [])]
            page = BrowsePage()
            async with subscription:
                while True:
                    message = await subscription.receive()
                    assert isinstance(message, StompMessage)
                    if message.frame.header("browser") == "end":
                        return page
                    page.messages.append(Browsed(message._message, message.deliveries, False))

        return QueueBrowser(read, limit)

    async def remove_subscription(self, durable_name: str) -> None:
        receipt = self.receipt()
        self.session.unsubscribe(
            "gone",
            [("durable-subscription-name", durable_name), ("activemq.subscriptionName", durable_name)],
            receipt=receipt,
        )
        await self.confirmed(receipt)

    async def _open_temporary(self, kind: str, lost: Callable[[BrokerError | None], None] | None) -> str:
        return f"{'/temp-queue/' if kind == TEMPORARY_QUEUE else '/temp-topic/'}n{next(self._numbers)}"

    def _close_temporary(self, name: str) -> None:
        """It goes with the connection."""

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[ClientTransaction]:
        name = f"t{next(self._numbers)}"
        self.check()
        self.session.begin(name)
        try:
            yield StompTransaction(self, name)
        except BaseException:
            if self._error is None:
                self.session.abort(name)
                with trio.CancelScope(shield=True):
                    await self.flush()
            raise
        receipt = self.receipt()
        self.session.commit(name, receipt=receipt)
        await self.confirmed(receipt)


class StompPublisher(Publisher):
    def __init__(self, client: StompFace) -> None:
        self._client = client
        self.in_flight = 0
        self.confirmed = 0

    async def send(self, destination: str, body: bytes, headers: Headers = None, **options: Any) -> str:
        confirmation = await self._client.send(destination, body, headers, **options)
        self.confirmed += 1
        return confirmation.message_id

    async def send_many(self, messages: Sequence[tuple[Any, ...]], *, durable: bool = True) -> None:
        for destination, body, *headers in messages:
            await self.send(destination, body, headers[0] if headers else None, durable=durable)

    async def wait_confirmed(self) -> None:
        await trio.lowlevel.checkpoint()


class StompTransaction(ClientTransaction):
    def __init__(self, client: StompFace, name: str) -> None:
        self._client = client
        self._name = name

    async def send(
        self,
        destination: str,
        body: bytes,
        headers: Headers = None,
        *,
        durable: bool = True,
        priority: int = PRIORITY_DEFAULT,
        expires: int = 0,
    ) -> None:
        self._client.check()
        lines = self._client.lines(headers, durable, priority, expires)
        self._client.session.send(destination, body, lines, transaction=self._name)
        await self._client.flush()

    async def ack(self, message: ReceivedMessage) -> None:
        self._client.session.ack(claimed(message), transaction=self._name)
        await self._client.flush()

    async def nack(self, message: ReceivedMessage) -> None:
        self._client.session.nack(claimed(message), transaction=self._name)
        await self._client.flush()


class StompMessage(ReceivedMessage):
    __slots__ = ("frame",)

    def __init__(self, subscription: StompSubscription, frame: MessageReceived, tag: int) -> None:
        redelivered = frame.header("redelivered") == "true"
        deliveries = int(frame.header("delivery-count") or "1") - 1 if redelivered else 0
        message = Message(
            frame.header("destination") or "",
            frame.body,
            encode_headers([pair for pair in frame.headers if pair[0] not in OURS]),
            frame.header("persistent") != "false",
            int(frame.header("priority") or PRIORITY_DEFAULT),
            int(frame.header("expires") or 0),
            (frame.header("message-id") or "").encode(),
            int(frame.header("timestamp") or 0),
        )
        super().__init__(subscription, message, tag, deliveries)
        self.frame = frame


def claimed(message: ReceivedMessage) -> MessageReceived:
    assert isinstance(message, StompMessage)
    assert isinstance(message._subscription, StompSubscription)
    if not message._tag or message._subscription.ack_mode == "auto":
        raise UnknownDelivery("it was settled before")
    message._tag = 0
    return message.frame


class StompSubscription(Subscription):
    def __init__(
        self,
        client: StompFace,
        destination: str,
        ack: str,
        prefetch: int | None,
        durable_name: str | None,
        options: ConsumerOptions = PLAIN,
    ) -> None:
        self.destination = destination
        self.ack_mode = ack
        self.arrived = trio.Event()
        self._client = client
        self._prefetch = prefetch
        self._durable_name = durable_name
        self._options = options
        self.browser: list[tuple[str, str]] = []  # the headers of a queue browser
        self._buffer: deque[StompMessage] = deque()
        self._tags = itertools.count(1)
        self._id = f"s{next(client._numbers)}"

    async def __aenter__(self) -> StompSubscription:
        headers = [("activemq.prefetchSize", str(self._prefetch))] if self._prefetch is not None else []
        if self._durable_name is not None:
            headers.append(("activemq.subscriptionName", self._durable_name))
        if self._options.selector:
            headers.append(("selector", self._options.selector))
        if self._options.exclusive:
            headers.append(("activemq.exclusive", "true"))
        if self._options.retroactive:
            headers.append(("activemq.retroactive", "true"))
        if self._options.priority:
            headers.append(("activemq.priority", str(self._options.priority)))
        headers += self.browser
        client = self._client
        client._subscriptions[self._id] = self
        receipt = client.receipt()
        client.session.subscribe(self.destination, self._id, ACK[self.ack_mode], headers, receipt=receipt)  # type: ignore[arg-type]
        await client.confirmed(receipt)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None and self._client._error is None:
            receipt = self._client.receipt()
            self._client.session.unsubscribe(self._id, receipt=receipt)
            await self._client.confirmed(receipt)

    def take(self, frame: MessageReceived) -> None:
        self._buffer.append(StompMessage(self, frame, next(self._tags)))
        self.arrived.set()

    async def receive_batch(self, count_max: int) -> list[ReceivedMessage]:
        await trio.lowlevel.checkpoint()
        while not self._buffer:
            self._client.check()
            self.arrived = trio.Event()
            await self.arrived.wait()
        return [self._buffer.popleft() for _ in range(min(count_max, len(self._buffer)))]

    async def _settle(self, messages: Sequence[ReceivedMessage], verb: str, confirm: bool) -> None:
        if self.ack_mode == "cumulative":
            messages = messages[-1:]
        receipt = None
        for number, message in enumerate(messages, 1):
            if message._subscription is not self:
                raise UnknownDelivery("another subscription's")
            receipt = self._client.receipt() if confirm and number == len(messages) else None
            getattr(self._client.session, verb)(claimed(message), receipt=receipt)
        if receipt is not None:
            await self._client.confirmed(receipt)
        else:
            await self._client.flush()

    async def ack(self, messages: Sequence[ReceivedMessage], *, confirm: bool = True) -> None:
        await self._settle(messages, "ack", confirm)

    async def nack(self, messages: Sequence[ReceivedMessage]) -> None:
        await self._settle(messages, "nack", True)


@asynccontextmanager
async def stomp_client(stream: trio.abc.Stream, client_id: str) -> AsyncIterator[StompFace]:
    """A client on a stream to a STOMP server."""
    face = StompFace(stream)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(face.run)
            await face.open(client_id)
            yield face
            if face._error is None:
                receipt = face.receipt()
                face.session.disconnect(receipt)
                await face.confirmed(receipt)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise single(group) from None
