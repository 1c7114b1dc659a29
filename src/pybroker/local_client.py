"""The client in process: no socket, no copy. Owns sending and transactions of trio programs in the broker's own event loop.

Everything goes through the same core and the same checks as over the wire.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from pybroker.browser import QueueBrowser
from pybroker.client import (
    IN_FLIGHT_DEFAULT,
    Client,
    ClientTransaction,
    Confirmation,
    Headers,
    Publisher,
    check_in_flight,
    make_message,
)
from pybroker.consumer_options import ConsumerOptions
from pybroker.core.broker import Core
from pybroker.core.browsing import BrowsePage, Cursor
from pybroker.core.consumer import Connection, Consumer
from pybroker.core.entry import Entry
from pybroker.engine import Engine
from pybroker.errors import BrokerClosed, BrokerError, LimitExceeded, NotLeader, SendInDoubt, UnknownDelivery
from pybroker.local_subscription import LocalSubscription
from pybroker.message import PRIORITY_DEFAULT, Message
from pybroker.queue_pages import read_page
from pybroker.requests import Requests
from pybroker.subscription import ReceivedMessage

_numbers = itertools.count(1)  # of the clients of this process


class _Waiter:
    """One caller who waits until everything emitted before is committed."""

    __slots__ = ("error", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.error: BrokerError | None = None

    async def wait(self) -> None:
        await self.event.wait()
        if self.error is not None:
            raise self.error


class LocalClient(Client):
    """A connection to the broker of this process. Made by `Broker.connect`; used as an async context manager.

    Leaving it aborts open transactions and returns what was not acknowledged.
    """

    def __init__(self, engine: Callable[[], Engine], client_id: str = "") -> None:
        self._find_engine = engine
        self._client_id = client_id
        self._engine: Engine | None = None
        self._connection: Connection | None = None
        self._waiting: set[_Waiter] = set()
        self._publishers: set[LocalPublisher] = set()
        self._subscriptions: set[LocalSubscription] = set()
        self._transactions = 0
        self._requests = Requests(self)
        self._error: BrokerError | None = None
        self.touched = False

    async def __aenter__(self) -> LocalClient:
        if self._connection is not None:
            raise BrokerError("this client is connected already: make another one with broker.connect()")
        await trio.lowlevel.checkpoint()  # first: nobody would end the connection if this were cancelled behind it
        self._engine = self._find_engine()
        core = self._engine.begin_turn()
        self._connection = core.connect(self, self._client_id)
        store = self._engine.store
        core.announce(self._connection, f"{store.store_id}-{store.starts:x}-local-{next(_numbers):x}")
        self._engine.end_turn()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close(BrokerClosed("the client is closed"))

    def _close(self, error: BrokerError) -> None:
        if self._error is None:
            self._error = error
            if self._engine is not None and self._engine.error is None and self._connection is not None:
                self._engine.begin_turn().disconnect(self._connection)
                self._engine.end_turn()
            for subscription in self._subscriptions:  # other tasks may wait in them
                subscription.fail(error)

    # ---- sending

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
        await self._wait_room(message)
        core = self._begin_turn()
        if core.watched:
            self._note_producers(core, [message])
        stored = core.send(message)
        await self._committed(core)
        return Confirmation(message.message_id.decode(), stored)

    @asynccontextmanager
    async def publisher(self, max_in_flight: int = IN_FLIGHT_DEFAULT) -> AsyncIterator[LocalPublisher]:
        publisher = LocalPublisher(self, max_in_flight)
        self._publishers.add(publisher)
        try:
            yield publisher
            await publisher.wait_confirmed()
        finally:
            self._publishers.discard(publisher)

    # ---- receiving

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
    ) -> LocalSubscription:
        return LocalSubscription(
            self, destination, ack, prefetch, durable_name, ConsumerOptions(selector, exclusive, priority, retroactive)
        )

    def browse(self, destination: str, *, selector: str = "", limit: int = 0) -> QueueBrowser:
        def read(cursor: Cursor | None, count: int) -> Awaitable[BrowsePage]:
            self._begin_turn()  # raises where this client is over
            return read_page(self._running, destination, cursor, selector=selector, limit=count)

        return QueueBrowser(read, limit)

    async def remove_subscription(self, durable_name: str) -> None:
        core = self._begin_turn()
        core.remove_subscription(self._client_id, durable_name)
        await self._committed(core)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[LocalTransaction]:
        self._transactions += 1
        name = f"client-{self._transactions}"
        core = self._begin_turn()
        core.begin(self._running_connection, name)
        try:
            yield LocalTransaction(self, name)
            await self._wait_batch()
        except BaseException:
            if self._error is None and self._running.error is None:
                core = self._begin_turn()
                core.abort(self._running_connection, name)
                self._running.end_turn()
            raise
        core = self._begin_turn()
        core.commit(self._running_connection, name)
        await self._committed(core)

    async def _open_temporary(self, kind: str, lost: Callable[[BrokerError | None], None] | None) -> str:
        # `lost` is of no use: who waits is told by what it waits for, and the client is over.
        await trio.lowlevel.checkpoint()  # first: nobody would delete it if this were cancelled behind it
        core = self._begin_turn()
        name = core.temporaries.create(self._running_connection, kind, secrets.token_hex(16))
        self._running.end_turn()
        return name

    def _close_temporary(self, name: str) -> None:
        for subscription in [each for each in self._subscriptions if each.destination == name]:
            subscription._leave()
        if self._error is None and self._running.error is None:
            self._begin_turn().temporaries.delete(self._running_connection, name)
            self._running.end_turn()

    # ---- the engine's side

    @property
    def _running(self) -> Engine:
        if self._engine is None:
            raise BrokerClosed("the client is not connected: use `async with broker.connect() as client`")
        return self._engine

    @property
    def _running_connection(self) -> Connection:
        assert self._connection is not None
        return self._connection

    def _begin_turn(self) -> Core:
        if self._error is not None:
            raise self._present(self._error)
        return self._running.begin_turn()

    def _present(self, error: BrokerError) -> BrokerError:
        """What ended this client, said anew: where the leader is now may have become known since."""
        if not isinstance(error, NotLeader):
            return error
        try:
            self._find_engine()
        except BrokerError as now:
            return now
        return NotLeader("this client's leadership has ended, and a new one has begun here: make another client")

    def _note_producers(self, core: Core, messages: Sequence[Message]) -> None:
        core.advisories.producers(self._running_connection, [message.destination for message in messages])

    async def _wait_room(self, message: Message) -> None:
        engine = self._running
        limit = engine.config.stomp.body_bytes_max
        if len(message.body) > limit:  # no smaller than what comes over the wire: a batch has a largest size
            raise LimitExceeded("stomp.body_bytes_max", limit, f"the body has {len(message.body)} bytes")
        limit = engine.config.stomp.header_block_bytes_max
        if len(message.header_block) > limit:  # or it could not be delivered over the wire
            what = f"the headers have {len(message.header_block)} bytes"
            raise LimitExceeded("stomp.header_block_bytes_max", limit, what)
        await self._wait_batch()
        if engine.core.full(message) is not None:
            await engine.wait_room(message)

    async def _wait_batch(self) -> None:
        """Wait until the open batch has room: one caller at a time fills it."""
        engine = self._running
        if engine.batch_full:
            await engine.journal.wait_room(engine.config.limits.batch_bytes_max)

    async def _committed(self, core: Core) -> None:
        """End the turn, and wait until what it emitted is committed."""
        waiter = _Waiter()
        self._waiting.add(waiter)
        core.confirm((self, waiter))
        self._running.end_turn()
        try:
            await waiter.wait()
        finally:
            self._waiting.discard(waiter)

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Engine: a delivery."""
        consumer.context.take(entry)

    def confirm(self, token: _Waiter) -> None:
        """Engine: everything before is committed."""
        token.event.set()

    def flush(self) -> None:
        """Engine: the turn is over."""

    def refuse(self, error: BrokerError) -> None:
        """Broker: it is stopping, and has ended the connection. What is in flight is still confirmed, nothing new taken."""
        self._error = self._error or error

    def fail(self, error: BrokerError) -> None:
        """Engine: the journal failed; nothing in flight will ever be confirmed."""
        self._error = error
        doubt = SendInDoubt(
            f"{error}; what was in flight may be stored or not: send it again where a repeat does no harm"
        )
        for waiter in self._waiting:
            if not waiter.event.is_set():  # set: confirmed, and its task has only not run since
                waiter.error = doubt
                waiter.event.set()
        for publisher in self._publishers:
            publisher.fail(doubt)
        for subscription in self._subscriptions:
            subscription.fail(error)

    def fail_consumer(self, consumer: Consumer, error: BrokerError) -> None:
        """Engine: one subscription was ended by the broker."""
        consumer.context.fail(error)


class LocalPublisher(Publisher):
    """Sends in flight. Made by `Client.publisher`."""

    def __init__(self, client: LocalClient, max_in_flight: int) -> None:
        check_in_flight(max_in_flight)
        self._client = client
        self._max = max_in_flight
        self._changed = trio.Event()
        self._error: BrokerError | None = None
        self.in_flight = 0  # sends that are not confirmed
        self.confirmed = 0
        self.touched = False

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
        message = make_message(destination, body, headers, durable, priority, expires)
        await self._wait_below(self._max)
        await self._client._wait_room(message)
        core = self._client._begin_turn()
        if core.watched:
            self._client._note_producers(core, [message])
        core.send(message)
        self._sent(core, 1)
        return message.message_id.decode()

    async def send_many(self, messages: Sequence[tuple[Any, ...]], *, durable: bool = True) -> None:
        made: list[Message] = []
        wrong: BrokerError | None = None
        try:
            for item in messages:
                headers = item[2] if len(item) > 2 else None
                made.append(make_message(item[0], item[1], headers, durable, PRIORITY_DEFAULT, 0))
        except BrokerError as error:
            wrong = error
        at = 0
        engine = self._client._running
        while at < len(made):
            await self._wait_below(self._max)
            await self._client._wait_room(made[at])
            core = self._client._begin_turn()
            stop = min(at + self._max - self.in_flight, at + engine.config.limits.turn_messages_max, len(made))
            if core.watched:
                self._client._note_producers(core, made[at:stop])
            start = at
            crowded = core.crowded
            room = engine.config.limits.batch_bytes_max
            try:
                while at < stop and room > 0:
                    room -= len(made[at].body)
                    if crowded and at > start and core.full(made[at]) is not None:
                        break
                    core.send(made[at])
                    at += 1
            finally:
                self._sent(core, at - start)
        if wrong is not None:
            raise wrong

    def _sent(self, core: Core, count: int) -> None:
        self.in_flight += count
        core.confirm((self, count))
        self._client._running.end_turn()

    async def _wait_below(self, count: int) -> None:
        await trio.lowlevel.checkpoint()
        while self._error is None and self.in_flight >= count:
            await self._changed.wait()
        if self._error is not None:
            raise self._error

    async def wait_confirmed(self) -> None:
        await self._wait_below(1)

    def confirm(self, count: int) -> None:
        """Engine: so many are committed."""
        self.in_flight -= count
        self.confirmed += count

    def flush(self) -> None:
        """Engine: the turn is over."""
        self._changed.set()
        self._changed = trio.Event()

    def fail(self, error: BrokerError) -> None:
        """Client: the journal failed."""
        if self.in_flight:
            error = SendInDoubt(f"{self.in_flight} sends were not confirmed: {error}")
        self._error = error
        self._changed.set()


class LocalTransaction(ClientTransaction):
    """The inside of `Client.transaction`."""

    def __init__(self, client: LocalClient, name: str) -> None:
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
        message = make_message(destination, body, headers, durable, priority, expires)
        await self._client._wait_room(message)
        core = self._client._begin_turn()
        if core.watched:
            self._client._note_producers(core, [message])
        core.send_later(self._client._running_connection, message, self._name)
        await trio.lowlevel.checkpoint()

    async def ack(self, message: ReceivedMessage) -> None:
        core = self._client._begin_turn()
        core.acknowledge(self._consumer_of(message), message._tag, self._name)
        self._client._running.end_turn()
        await trio.lowlevel.checkpoint()

    async def nack(self, message: ReceivedMessage) -> None:
        core = self._client._begin_turn()
        core.reject(self._consumer_of(message), message._tag, self._name)
        self._client._running.end_turn()
        await trio.lowlevel.checkpoint()

    def _consumer_of(self, message: ReceivedMessage) -> Consumer:
        subscription = message._subscription
        if not isinstance(subscription, LocalSubscription) or subscription._client is not self._client:
            raise UnknownDelivery(f"message {message.message_id} was not delivered to the client of this transaction")
        return subscription._running
