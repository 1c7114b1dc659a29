"""Receiving over the network. The other half of `remote_client`.

A subscription outlives its connections: it is made again on each, and iterating just goes on. What a lost connection had
brought belongs to the broker again, which delivers it once more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from pybroker.consumer_options import ConsumerOptions
from pybroker.destination import QUEUE, parse_composite
from pybroker.errors import (
    BrokerClosed,
    BrokerError,
    BrokerFull,
    SubscriptionError,
    UnknownDelivery,
)
from pybroker.message import Message
from pybroker.protocols.native_frames import TEXT_MAX, Deliver
from pybroker.remote_waiting import Waiter
from pybroker.subscription import ReceivedMessage, Subscription, foreign

if TYPE_CHECKING:
    from pybroker.remote_lifeline import Lifeline

AUTO, CUMULATIVE, INDIVIDUAL = "auto", "cumulative", "individual"
PREFETCH_MAX = 2**31 - 1  # the broker has a limit of its own below
PREFETCH_ASSUMED = 1_000  # the broker's default, as far as this side knows


class Attachment:
    """A subscription on one connection.

    number      the subscription's on it
    settled_to  the last tag below all that can be settled (cumulative: the last one that was)
    held        deliveries that open transactions have settled
    credited    as many more than the prefetch the broker was allowed to deliver, for these
    """

    __slots__ = ("credited", "held", "number", "settled_to")

    def __init__(self, number: int) -> None:
        self.number = number
        self.settled_to = 0
        self.held = 0
        self.credited = 0


class RemoteMessage(ReceivedMessage):
    """A message that came over a connection. Its tag is 0 when it was settled."""

    __slots__ = ("_attachment",)

    def __init__(
        self, subscription: RemoteSubscription, message: Message, tag: int, deliveries: int, attachment: Attachment
    ) -> None:
        self._subscription = subscription
        self._message = message
        self._tag = tag
        self._deliveries = deliveries
        self._attachment = attachment


class RemoteSubscription(Subscription):
    """Messages of one destination, over one connection after the other."""

    def __init__(
        self,
        lifeline: Lifeline,
        destination: str,
        ack: str,
        prefetch: int | None,
        durable_name: str | None,
        options: ConsumerOptions,
    ) -> None:
        self.destination = destination
        self.lifeline = lifeline
        self._ack_mode = ack
        self._prefetch = prefetch
        self._durable_name = durable_name
        self._options = options
        self._entered = False
        self._opened = trio.Event()
        self._attachment: Attachment | None = None
        self._buffer: deque[RemoteMessage] = deque()
        self._arrived = trio.Event()
        self._error: BrokerError | None = None
        self.refused_since = float("inf")  # trio's time from which on the broker refuses to restore it

    def _check(self) -> None:
        """What the broker would refuse."""
        modes = (AUTO, CUMULATIVE, INDIVIDUAL)
        if self._ack_mode not in modes:
            raise SubscriptionError(f"acknowledgement mode {self._ack_mode!r} is not one of {', '.join(modes)}")
        if self._prefetch is not None and self._prefetch < 1:
            raise SubscriptionError(f"prefetch must be at least 1, not {self._prefetch}")
        name = self._durable_name
        if parse_composite(self.destination)[0].kind == QUEUE and name is not None:
            raise SubscriptionError(
                f"a durable subscription is for a topic; {self.destination} keeps its messages anyway"
            )
        if name is not None:
            check_durable_name(name)
            if not self.lifeline.client_id:
                raise SubscriptionError(f"durable subscription {name!r} needs a client id: give one when you connect")

    async def __aenter__(self) -> RemoteSubscription:
        if self._entered:
            raise SubscriptionError("this subscription was entered before: make another one")
        self._check()
        lifeline = self.lifeline
        await lifeline.wait_connected()
        self._entered = True
        lifeline.subscriptions.add(self)
        try:
            self.attach()
            await self._opened.wait()
            if self._error is not None:
                raise self._error
        except BaseException:
            self._leave(None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        waiter = Waiter("leaving a subscription") if kind is None else None
        if self._leave(waiter) and waiter is not None:
            await waiter.event.wait()  # what was not acknowledged is the broker's again, whatever came of the answer

    def _leave(self, waiter: Waiter | None) -> bool:
        """End it; whether the broker was asked to, and so will answer."""
        self.lifeline.subscriptions.discard(self)
        attachment, self._attachment = self._attachment, None
        self._error = self._error or SubscriptionError("the subscription is closed")
        self._buffer.clear()
        self._arrived.set()
        return attachment is not None and self.lifeline.unsubscribe(waiter, attachment.number)

    # ---- connections

    def attach(self) -> None:
        """Make it on the present connection."""
        number = self.lifeline.ask_subscription(
            self,
            self.destination,
            self._ack_mode,
            min(self._prefetch or 0, PREFETCH_MAX),
            self._durable_name or "",
            self._options,
        )
        self._attachment = Attachment(number)

    def detach(self) -> None:
        """The connection is lost; what was not handed out goes with it."""
        self._attachment = None
        self._buffer.clear()

    def answered(self, error: BrokerError | None) -> None:
        """Client: the broker made it, or did not."""
        if self._attachment is None:
            return  # it was left, or the connection was lost, meanwhile
        if error is None:
            self.refused_since = float("inf")
            self._opened.set()
            return
        self.detach()
        if self._opened.is_set() and isinstance(error, SubscriptionError | BrokerClosed | BrokerFull):
            self.lifeline.restore_later(self, error)  # the broker may not know yet that the former connection is over
        else:
            self.fail(error)

    def lost(self, error: BrokerError | None) -> None:
        """Client: the connection was lost before there was an answer; it is asked for again on the next."""

    @property
    def opened(self) -> bool:
        """Whether it was made once."""
        return self._opened.is_set()

    @property
    def attachment(self) -> Attachment | None:
        """What it is on the present connection; None while it is not there."""
        return self._attachment

    @property
    def buffered(self) -> int:
        return len(self._buffer)

    # ---- receiving

    def take(self, frame: Deliver) -> None:
        """Client: deliveries."""
        attachment = self._attachment
        if attachment is None:
            return
        attachment.settled_to = attachment.settled_to or frame.first_tag - 1
        self._buffer.extend(
            [
                RemoteMessage(self, message, tag, deliveries, attachment)
                for tag, (message, deliveries) in enumerate(frame.messages, frame.first_tag)
            ]
        )
        self._arrived.set()

    async def receive_batch(self, count_max: int) -> list[ReceivedMessage]:
        await trio.lowlevel.checkpoint()
        while not self._buffer:
            if self._error is not None:
                raise self._error
            if not self._entered:
                raise SubscriptionError("the subscription is not open: use `async with client.subscribe(...)`")
            self._lend()
            self._arrived = trio.Event()
            await self._arrived.wait()
        buffer = self._buffer
        received: list[ReceivedMessage]
        if len(buffer) <= count_max:
            received = list(buffer)
            buffer.clear()
        else:
            received = [buffer.popleft() for _ in range(max(count_max, 1))]
        self.lifeline.received += len(received)
        if self._ack_mode == AUTO:
            attachment = self._attachment
            assert attachment is not None  # the buffer is cleared with it
            # Nothing is awaited after this: the caller has them.
            self.lifeline.settle(attachment.number, [message._tag for message in received], True, None)
        return received

    def _lend(self) -> None:
        """What open transactions have settled takes no part of the prefetch: or one of more than that would wait for ever."""
        attachment = self._attachment
        if attachment is None or attachment.held == attachment.credited:
            return
        if self._prefetch is None and attachment.held * 2 < PREFETCH_ASSUMED and not attachment.credited:
            return
        attachment.credited = attachment.held
        prefetch = min((self._prefetch or PREFETCH_ASSUMED) + attachment.held, PREFETCH_MAX)
        self.lifeline.credit(attachment.number, prefetch)

    # ---- settling

    @property
    def cumulative(self) -> bool:
        return self._ack_mode == CUMULATIVE

    def claim(self, message: ReceivedMessage) -> tuple[Attachment, int, int]:
        """Settle a delivery as far as this side goes. Raises UnknownDelivery.

        Its attachment, its tag, and (at most) how many deliveries that is for.
        """
        if message._subscription is not self or not isinstance(message, RemoteMessage):
            raise foreign(message)
        attachment, tag = message._attachment, message._tag
        if self._ack_mode == AUTO or not tag or tag <= attachment.settled_to:
            raise UnknownDelivery(f"message {message.message_id} was acknowledged or rejected before")
        if attachment is not self._attachment:
            raise UnknownDelivery(
                f"message {message.message_id} came over a connection that is over: it is delivered again, and can be settled then"
            )
        message._tag = 0
        if self._ack_mode != CUMULATIVE:
            return attachment, tag, 1
        outstanding = (self._prefetch or PREFETCH_ASSUMED) + attachment.credited
        count = min(tag - attachment.settled_to, outstanding)
        attachment.settled_to = tag
        return attachment, tag, count

    async def _settle(self, messages: Sequence[ReceivedMessage], done: bool, confirm: bool) -> None:
        lifeline = self.lifeline
        lifeline.check_open()
        if self._ack_mode == CUMULATIVE:
            messages = messages[-1:]
        tags: list[int] = []
        error: UnknownDelivery | None = None
        attachment: Attachment | None = None
        for message in messages:
            try:
                attachment, tag, _ = self.claim(message)
            except UnknownDelivery as fault:
                error = fault
                break
            tags.append(tag)
        waiter = Waiter("an acknowledgement") if confirm and error is None else None
        if attachment is not None and tags:
            lifeline.settle(attachment.number, tags, done, waiter)
        if error is not None:
            raise error
        if waiter is not None and tags:
            await waiter.wait()
        else:
            await trio.lowlevel.checkpoint()

    async def ack(self, messages: Sequence[ReceivedMessage], *, confirm: bool = True) -> None:
        await self._settle(messages, True, confirm)

    async def nack(self, messages: Sequence[ReceivedMessage]) -> None:
        await self._settle(messages, False, True)

    def release(self, attachment: Attachment, count: int) -> None:
        """A transaction is over that had settled so many deliveries."""
        attachment.held -= count
        if attachment is self._attachment and attachment.credited and not attachment.held:
            attachment.credited = 0
            self.lifeline.credit(attachment.number, min(self._prefetch or PREFETCH_ASSUMED, PREFETCH_MAX))

    def fail(self, error: BrokerError) -> None:
        """Client: the broker or the client ended it."""
        self.lifeline.subscriptions.discard(self)
        self.detach()
        self._error = self._error or error
        self._opened.set()
        self._arrived.set()


def check_durable_name(name: str) -> None:
    """Raise SubscriptionError for a name that can't travel."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise SubscriptionError(f"durable subscription {name!r} has a name that can't be written as UTF-8") from None
    if not name or len(name) > TEXT_MAX:
        raise SubscriptionError(f"a durable subscription's name has 1 to {TEXT_MAX} characters")
