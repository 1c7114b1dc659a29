"""The face of receiving: subscriptions and the messages that they bring. The other half of `client`.

Owns the signatures and what they promise. Cancellation at any await loses nothing: a message that was received and not
acknowledged is delivered again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType

from pybroker.errors import UnknownDelivery
from pybroker.message import Message


class ReceivedMessage:
    """A message that was delivered, and the means to settle it."""

    __slots__ = ("_deliveries", "_message", "_subscription", "_tag")

    def __init__(self, subscription: Subscription, message: Message, tag: int, deliveries: int) -> None:
        self._subscription = subscription
        self._message = message
        self._tag = tag
        self._deliveries = deliveries

    @property
    def body(self) -> bytes:
        return self._message.body

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The sender's headers in order, repeats included."""
        return self._message.headers

    def header(self, name: str) -> str | None:
        """The first header of that name, or None."""
        return self._message.header(name)

    @property
    def destination(self) -> str:
        return self._message.destination

    @property
    def message_id(self) -> str:
        """The same on every redelivery."""
        return self._message.message_id.decode()

    @property
    def priority(self) -> int:
        return self._message.priority

    @property
    def durable(self) -> bool:
        return self._message.durable

    @property
    def expires(self) -> int:
        """Milliseconds since the Unix epoch, 0 = never."""
        return self._message.expires

    @property
    def timestamp(self) -> int:
        """When the broker accepted it, milliseconds since the Unix epoch."""
        return self._message.timestamp

    @property
    def deliveries(self) -> int:
        """Deliveries of it before this one that ended without an acknowledgement."""
        return self._deliveries

    @property
    def redelivered(self) -> bool:
        return self._deliveries > 0

    async def ack(self) -> None:
        """Acknowledge; returns when that is committed. Raises UnknownDelivery when it was settled before."""
        await self._subscription.ack([self])

    async def nack(self) -> None:
        """Give it back: it is delivered again, or goes to the dead letters after the last try."""
        await self._subscription.nack([self])

    def __repr__(self) -> str:
        return f"<ReceivedMessage {self.message_id} from {self.destination}, {len(self.body)} bytes>"


def foreign(message: ReceivedMessage) -> UnknownDelivery:
    """The error for a message that another subscription brought: its tag means something else here."""
    return UnknownDelivery(f"message {message.message_id} was not delivered to this subscription: settle it by its own")


class Subscription(ABC):
    """Messages of one destination. Used as an async context manager; leaving it returns what was not acknowledged."""

    destination: str

    @abstractmethod
    async def __aenter__(self) -> Subscription: ...

    @abstractmethod
    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> ReceivedMessage:
        return (await self.receive_batch(1))[0]

    async def receive(self) -> ReceivedMessage:
        """The next message; waits for it. Raises what ended the subscription."""
        return (await self.receive_batch(1))[0]

    @abstractmethod
    async def receive_batch(self, count_max: int) -> list[ReceivedMessage]:
        """What has arrived, at least one message and at most `count_max`, in order; waits for the first."""

    @abstractmethod
    async def ack(self, messages: Sequence[ReceivedMessage], *, confirm: bool = True) -> None:
        """Acknowledge messages of this subscription (cumulative: the last one is enough); returns when that is committed.

        With ``confirm=False`` it returns at once, and the next message can be worked on while this is being committed; after a
        crash such a message may be delivered again. Raises UnknownDelivery for one that was settled before (or whose connection
        was lost: it is delivered again); those in front of it are acknowledged.
        """

    @abstractmethod
    async def nack(self, messages: Sequence[ReceivedMessage]) -> None:
        """Give messages back; returns when that is committed."""
