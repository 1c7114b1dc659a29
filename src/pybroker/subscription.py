"""The face of receiving: subscriptions and the messages that they bring. The other half of `client`.

Owns the signatures and what they promise. Cancellation at any await loses nothing: a message that was received and not
acknowledged is delivered again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType

from pybroker.errors import BrokerError, UnknownDelivery
from pybroker.message import Message
from pybroker.message_view import MessageView


class ReceivedMessage(MessageView):
    """A message that was delivered, and the means to settle it."""

    __slots__ = ("_subscription", "_tag")

    def __init__(self, subscription: Subscription, message: Message, tag: int, deliveries: int) -> None:
        self._message = message  # as `MessageView` has them: one call less for each message
        self._deliveries = deliveries
        self._subscription = subscription
        self._tag = tag

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
    _error: BrokerError | None = None

    @property
    def ended(self) -> bool:
        """Whether it was left, or something ended it: nothing new comes."""
        return self._error is not None

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
