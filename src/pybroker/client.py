"""The face of sending, receiving and transactions for trio programs: what a client can do, wherever its broker is.

Owns the signatures, what they promise, and the checks of arguments. `local_client` is the one in the broker's own process (made
by `Broker.connect`), `remote_client` the one over the network (made by `pybroker.connect`). Cancellation at any await loses
nothing: what was sent may be stored, what was received and not acknowledged is delivered again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pybroker.browser import QueueBrowser
from pybroker.destination import TEMPORARY_QUEUE, TEMPORARY_TOPIC
from pybroker.errors import BrokerError, InvalidMessage
from pybroker.message import PRIORITY_DEFAULT, REPLY_TO, Message, encode_headers
from pybroker.requests import CORRELATION_ID, Requests
from pybroker.subscription import ReceivedMessage, Subscription

Headers = Mapping[str, str] | Iterable[tuple[str, str]] | None

IN_FLIGHT_DEFAULT = 1_000  # sends of a publisher that wait for their confirmation at a time


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What a send was confirmed as. `durable`: the store has it (in a topic, for the durable subscriptions)."""

    message_id: str
    durable: bool


def checked_body(body: object) -> bytes:
    """The body as bytes. Raises InvalidMessage for what is not bytes."""
    if isinstance(body, bytes):
        return body
    if not isinstance(body, bytearray | memoryview):
        raise InvalidMessage(f"a body must be bytes, not {type(body).__name__}: encode text first")
    return bytes(body)


def check_expires(expires: int) -> None:
    if expires < 0:
        raise InvalidMessage(f"expires must be milliseconds since the Unix epoch, or 0 for never, not {expires}")


def make_message(
    destination: str, body: bytes, headers: Headers, durable: bool, priority: int, expires: int
) -> Message:
    """A message as the core takes it. Raises InvalidMessage for what is not bytes, text or in range."""
    if not isinstance(body, bytes):
        body = checked_body(body)
    if expires:
        check_expires(expires)
    block = encode_headers(headers) if headers else b""
    return Message(destination, body, block, durable, priority, expires)


def check_in_flight(max_in_flight: int) -> None:
    if max_in_flight < 1:
        raise ValueError(f"max_in_flight must be at least 1, not {max_in_flight}")


class Client(ABC):
    """A client of a broker. Leaving the block that it is used in aborts open transactions and returns what was not acknowledged."""

    _requests: Requests  # of this client, made with it

    @abstractmethod
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
        """Send one message; returns when it is as safe as asked (durable: on disk).

        `priority` is 0 to 9, `expires` milliseconds since the Unix epoch (0 = never). Raises InvalidDestination,
        InvalidMessage, BrokerFull (refused: not stored), SendInDoubt (nobody knows), BrokerClosed; over the network also
        BrokerUnavailable (not sent).
        """

    @abstractmethod
    def publisher(self, max_in_flight: int = IN_FLIGHT_DEFAULT) -> AbstractAsyncContextManager[Publisher]:
        """Pipelined sending: up to `max_in_flight` sends wait for their confirmation at a time.

        Leaving the block waits until every send is confirmed. Raises SendInDoubt with how many were not.
        """

    @abstractmethod
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
    ) -> Subscription:
        """A subscription, to be used as an async context manager and then iterated.

        ack            ``"auto"``: acknowledged when handed to you; ``"cumulative"``: an ack is for all up to it;
                       ``"individual"``: each on its own
        prefetch       messages that may be with you unacknowledged
        durable_name   makes a durable subscription of a topic, which collects while you are away (needs a client id)
        selector       only messages that it is true for; "" = all
        exclusive      of the exclusive consumers of a queue one gets everything
        priority       -128 to 127: consumers with a higher one are served first, while they have credit
        retroactive    a new subscription of a topic gets first what the topic has kept, as the policy `recovery_messages` says
        """

    @abstractmethod
    def browse(self, destination: str, *, selector: str = "", limit: int = 0) -> QueueBrowser:
        """Look into a queue: ``async for message in client.browse(...)`` shows what is there, ready or with a consumer.

        Nothing is delivered, taken or marked by it. `selector`: only messages that it is true for; `limit`: so many at most,
        0 = no limit. Raises, when it is iterated, InvalidDestination (only queues can be looked into) and InvalidSelector.
        """

    @abstractmethod
    async def remove_subscription(self, durable_name: str) -> None:
        """Delete a durable subscription of this client id, and what it has collected."""

    @abstractmethod
    def transaction(self) -> AbstractAsyncContextManager[ClientTransaction]:
        """Sends and acknowledgements that happen together: committed at the end of the block, aborted by an exception.

        Acknowledged messages of an aborted transaction are delivered again. Cancelled while it waits for the commit, the
        transaction may be committed or not, but never in part. Raises TransactionError when nothing of it was done.
        """

    # ---- temporary destinations, requests and replies

    @asynccontextmanager
    async def temporary_queue(self) -> AsyncIterator[str]:
        """A queue that only this client consumes, and to which everybody may send: its name.

        It is gone at the end of the block, with what is in it; its messages are never stored. After a lost connection it is
        made again under the same name, without what was in it. Raises LimitExceeded.
        """
        name = await self._open_temporary(TEMPORARY_QUEUE, None)
        try:
            yield name
        finally:
            self._close_temporary(name)

    @asynccontextmanager
    async def temporary_topic(self) -> AsyncIterator[str]:
        """The same for a topic: each subscription of this client gets what is sent there."""
        name = await self._open_temporary(TEMPORARY_TOPIC, None)
        try:
            yield name
        finally:
            self._close_temporary(name)

    async def request(
        self,
        destination: str,
        body: bytes,
        headers: Headers = None,
        *,
        timeout: float,
        durable: bool = True,
        priority: int = PRIORITY_DEFAULT,
        expires: int = 0,
    ) -> ReceivedMessage:
        """Send a message with a ``reply-to`` and a ``correlation-id``, and return the reply to it.

        All requests of a client share one temporary queue, and may be made at the same time. `timeout`: seconds for all of it.

        Raises what `send` raises; RequestTimeout when no reply came in time; SendInDoubt when the connection was lost while the
        request was under way. In both cases it may have been carried out. A reply that comes later is dropped and counted
        (`late_replies`).
        """
        return await self._requests.request(
            destination, body, headers, timeout=timeout, durable=durable, priority=priority, expires=expires
        )

    async def reply(
        self,
        request: ReceivedMessage,
        body: bytes,
        headers: Headers = None,
        *,
        durable: bool = True,
        priority: int = PRIORITY_DEFAULT,
        expires: int = 0,
    ) -> Confirmation:
        """Send a reply to where a request asks for it. Raises InvalidMessage when it asks for none, and what `send` raises.

        A reply whose asker is gone is confirmed as well (not durable), and counted by the broker.
        """
        destination = request.header(REPLY_TO)
        if not destination:
            raise InvalidMessage(f"message {request.message_id} has no {REPLY_TO} header: its sender wants no reply")
        pairs = list(headers.items() if isinstance(headers, Mapping) else headers or ())
        pairs.append((CORRELATION_ID, request.header(CORRELATION_ID) or request.message_id))
        return await self.send(destination, body, pairs, durable=durable, priority=priority, expires=expires)

    @property
    def late_replies(self) -> int:
        """Replies to requests of this client that came when nobody waited for them any more."""
        return self._requests.late

    @abstractmethod
    async def _open_temporary(self, kind: str, lost: Callable[[BrokerError | None], None] | None) -> str:
        """Make a temporary destination (of `TEMPORARY_KINDS`); `lost` is called whenever a connection is lost."""

    @abstractmethod
    def _close_temporary(self, name: str) -> None:
        """Give it up, and end the subscriptions to it. Does not wait."""


class Publisher(ABC):
    """Sends in flight. Made by `Client.publisher`.

    in_flight   sends that are not confirmed
    confirmed   sends that are
    """

    in_flight: int
    confirmed: int

    @abstractmethod
    async def send(
        self,
        destination: str,
        body: bytes,
        headers: Headers = None,
        *,
        durable: bool = True,
        priority: int = PRIORITY_DEFAULT,
        expires: int = 0,
    ) -> str:
        """Send; waits only for room, and returns the message id. The confirmation comes later (`wait_confirmed`)."""

    @abstractmethod
    async def send_many(self, messages: Sequence[tuple[Any, ...]], *, durable: bool = True) -> None:
        """Send a list of ``(destination, body)`` or ``(destination, body, headers)``, in order.

        A wrong one raises, and those before it are sent. Much cheaper for each than `send`.
        """

    @abstractmethod
    async def wait_confirmed(self) -> None:
        """Wait until every send so far is confirmed. Raises SendInDoubt when some never will be."""


class ClientTransaction(ABC):
    """The inside of `Client.transaction`."""

    @abstractmethod
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
        """Send when the transaction is committed."""

    @abstractmethod
    async def ack(self, message: ReceivedMessage) -> None:
        """Acknowledge when the transaction is committed."""

    @abstractmethod
    async def nack(self, message: ReceivedMessage) -> None:
        """Give back when the transaction is committed."""
