"""A client's way to some broker, over one connection after the other. Owns what outlives a connection.

That is: what is sent and not confirmed (`protocols.native_sends`), the subscriptions, and who waits for a connection or for
room. `remote_search` says which broker is tried, `remote_connection` moves bytes, `protocols.native_client` knows the protocol.
Nothing is reported confirmed that no broker confirmed; what is not known is reported as in doubt.
"""

from __future__ import annotations

import logging
import secrets
import weakref
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import trio

from pybroker.cluster.native_urls import NativeAddress
from pybroker.connect_options import ConnectOptions
from pybroker.consumer_options import ConsumerOptions
from pybroker.core.browsing import Cursor
from pybroker.errors import (
    AuthenticationFailed,
    BrokerClosed,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    LimitExceeded,
    NotLeader,
    ProtocolError,
    SendInDoubt,
)
from pybroker.protocols.native_client import (
    OPEN,
    Answered,
    Confirmed,
    Event,
    NativeClientSession,
    Numbers,
    Opened,
    Rejected,
    Shown,
)
from pybroker.protocols.native_errors import error_of
from pybroker.protocols.native_frames import Deliver, Ended, Members, Page
from pybroker.protocols.native_sends import Row, Sends, Submission
from pybroker.remote_connection import Dial, RemoteConnection, open_connection
from pybroker.remote_events import ClientStatistics, ConnectionEvent, ConnectionEvents
from pybroker.remote_search import Search
from pybroker.remote_temporary import RemoteTemporaries, RemoteTemporary
from pybroker.remote_waiting import PageWaiter, Waiter

if TYPE_CHECKING:
    from pybroker.remote_subscription import RemoteSubscription

log = logging.getLogger("pybroker.client")

COMPLAINTS_MAX = (
    3  # connections in a row that a broken rule ended, after which what is unconfirmed is not sent once more
)
STEADY = 1.0  # seconds after which a connection was a good one, whatever came of it


def new_producer() -> str:
    """An id that nobody has, and nobody guesses."""
    return secrets.token_hex(16)


class Lifeline:
    """What a client has of the network. `run` must run while it is used; it returns after `close`."""

    def __init__(self, options: ConnectOptions, search: Search, dial: Dial, hello: dict[str, str]) -> None:
        self.options = options
        self.client_id = hello.get("client_id", "")
        self.sends = Sends(new_producer())
        self.subscriptions: set[RemoteSubscription] = set()
        self.temporaries = RemoteTemporaries(self)
        self.received = 0
        self._offered: NativeAddress | None = None  # who was told last of the present producer's id
        self._search = search
        self._dial = dial
        self._hello = {"software": f"pybroker/{version('pybroker')}", **hello}
        self._numbers = Numbers()
        self._connection: RemoteConnection | None = None
        self._looking: set[PageWaiter] = set()  # who waits for a page of a queue
        self._attached: dict[int, RemoteSubscription] = {}  # by their number on the present connection
        self._changed = trio.Event()
        self._room_wanted = False
        self._down_since = trio.current_time()
        self._made_at = self._lost_at = self._down_since
        self._fruitful = False  # the present connection brought an answer
        self._complaints = 0  # connections in a row that a broken rule ended before anything came of them
        self._last_error: BrokerError | None = None
        self._closed: BrokerError | None = None
        self._nursery: trio.Nursery | None = None
        self._events: weakref.WeakSet[ConnectionEvents] = weakref.WeakSet()
        self._latest: ConnectionEvent | None = None
        self._connections = self._failures = self._sent = self._confirmed = self._refused = self._in_doubt = 0

    # ---- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be connected, for ever; started when it is for the first time. Raises what all brokers say then, if it is final."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._watch_deadline)
            delay = 0.0
            while self._closed is None:
                connection = await self._connect(delay)
                task_status.started()
                task_status = trio.TASK_STATUS_IGNORED
                began = trio.current_time()
                await self._serve(connection)
                # One that broke as soon as it was made is no reason to try again at once.
                flapping = trio.current_time() - began < max(delay, self.options.reconnect_delay)
                delay = min(max(delay * 2, self.options.reconnect_delay), self.options.reconnect_delay_max)
                delay = delay if flapping else 0.0
            self._nursery.cancel_scope.cancel()

    async def _connect(self, delay: float) -> RemoteConnection:
        """Try the brokers that are known, round after round, until one lets this client in. `delay`: before the first round."""
        options = self.options
        while True:
            if delay:
                await self._search.wait(delay)
            final: list[BrokerError] = []
            tries = 0
            waited = trio.current_time() - self._lost_at
            for address in self._search.round(own_only=bool(self.sends.pending) and waited < options.own_set_first):
                tries += 1
                try:
                    return await self._try(address)
                except NotLeader as error:
                    self._failed(address, error)
                    self._search.hint(error.urls)
                except BrokerError as error:
                    self._failed(address, error)
                    if isinstance(error, AuthenticationFailed | ConfigurationError | ProtocolError):
                        final.append(error)
            if tries and len(final) == tries and not self._connections:
                raise final[0]
            delay = min(max(delay * 2, options.reconnect_delay), options.reconnect_delay_max)

    async def _try(self, address: NativeAddress) -> RemoteConnection:
        """One broker; twice if it must be told another producer."""
        options = self.options

        async def dial(target: NativeAddress) -> trio.abc.Stream:
            stream = await self._dial(target)
            self._offered = target
            return stream

        while True:
            new = not self.sends.known
            if new and self._offered not in (None, address):
                # It may have been made there, though no answer came: two brokers must not know one id, or what is sent to
                # one of them would be repeated to the other.
                self._go_elsewhere(address)
            hello: dict[str, Any] = {
                **self._hello,
                "heartbeat": options.heartbeat_interval,
                "producer": self.sends.producer,
                "producer_new": new,
            }
            session = NativeClientSession(self.sends, self._numbers, hello)
            connection = await open_connection(
                dial, address, session, options.connect_timeout, options.heartbeat_interval
            )
            if new or connection.opened.producer_known:
                return connection
            await connection.drop()
            self._go_elsewhere(address)

    def _go_elsewhere(self, address: NativeAddress) -> None:
        """The broker at that address does not know this producer."""
        self._offered = None
        repeat = self.options.elsewhere == "repeat"
        for submission in self.sends.elsewhere(self.sends.producer if repeat else new_producer()):
            self._reject(
                submission,
                SendInDoubt(
                    f"the connection was lost before the broker confirmed it, and {address.url}, which answers now, does not know "
                    "whether it is stored: send it again where a repeat does no harm"
                )
                if submission.tried
                else BrokerUnavailable(
                    f"it was not sent: the client has moved to {address.url}, where its id is not good"
                ),
            )

    async def _serve(self, connection: RemoteConnection) -> None:
        error: BrokerError | None = None
        self._made(connection)
        try:
            error = await connection.run(self._handle)
        finally:
            self._lost(connection, error)

    def _made(self, connection: RemoteConnection) -> None:
        opened = connection.opened
        self._connection = connection
        self._connections += 1
        self._fruitful = False
        self._made_at = trio.current_time()
        large = self.sends.connected(
            opened.send_messages_max, opened.send_bytes_max, opened.frame_bytes_max, opened.body_bytes_max
        )
        for submission in large:
            limit = LimitExceeded("native.frame_bytes_max", opened.frame_bytes_max, "it is too large for this broker")
            self._reject(submission, SendInDoubt(str(limit)) if submission.tried else limit)
        self._search.connected(connection.address)
        self._tell("connected", connection.address.url, opened.broker)
        self._learn(opened.members)
        self.temporaries.attach()
        for subscription in self.subscriptions:
            subscription.attach()
        self._signal()

    def _lost(self, connection: RemoteConnection, error: BrokerError | None) -> None:
        now = trio.current_time()
        self._last_error = error or BrokerClosed("the client is closed")
        self._connection = None
        self._lost_at = now
        if self._fruitful or now - self._made_at >= STEADY:  # or else it counts as if it had not been
            self._down_since = now
        self.sends.disconnected()
        self._attached = {}
        for subscription in self.subscriptions:
            subscription.detach()
        for context in connection.session.orphans():
            if context is not None:
                context.lost(self._last_error)
        self.temporaries.detach(self._last_error)
        self._complaints = self._complaints + 1 if isinstance(error, ProtocolError) and not self._fruitful else 0
        if self._complaints >= COMPLAINTS_MAX:  # it may be what is sent, again and again
            self._complaints = 0
            self._give_up(BrokerUnavailable(f"the connection ended again and again with: {error}"))
        if isinstance(error, NotLeader):
            self._search.hint(error.urls)
        if connection.silent:
            self._search.fell_silent()
        self._tell("disconnected", connection.address.url, connection.opened.broker, error)
        self._signal()

    def _failed(self, address: NativeAddress, error: BrokerError) -> None:
        self._failures += 1
        self._last_error = error
        self._tell("failed", address.url, "", error)

    async def _watch_deadline(self) -> None:
        """Whoever waits for an answer is told, when no broker was there for too long, that none will come."""
        while True:
            if self._connection is None:
                with trio.move_on_at(self._down_since + self.options.deadline) as scope:
                    await self._changed.wait()
                if not scope.cancelled_caught:
                    continue
                self._give_up(self.unavailable())
            await self._changed.wait()

    def _give_up(self, error: BrokerUnavailable) -> None:
        for submission in self.sends.abandon():
            self._reject(submission, SendInDoubt(f"{error}: it may be stored or not") if submission.tried else error)
        for subscription in [each for each in self.subscriptions if not each.opened]:
            subscription.fail(error)
        for waiter in self._looking:
            waiter.answered(error)

    async def close(self) -> None:
        """Take nothing more, wait for what is owed, for `close_timeout` seconds; then there is no connection any more."""
        self._closed = BrokerClosed("the client is closed")
        for subscription in list(self.subscriptions):
            subscription.fail(self._closed)
        self._signal()
        with trio.move_on_after(self.options.close_timeout):
            connection = self._connection
            if connection is not None:
                connection.session.bye()
                connection.wake()
                while self._connection is connection:
                    await self._changed.wait()

    def end(self) -> None:
        """It is over: nobody waits for anything any more."""
        error = BrokerClosed("the client is closed")
        self._closed = error
        for submission in self.sends.abandon():
            self._reject(submission, SendInDoubt(f"{error}: it may be stored or not") if submission.tried else error)
        for reader in self._events:
            reader.end()
        self._signal()

    # ---- what a connection brings

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            kind = event.__class__
            if kind is Deliver:
                assert isinstance(event, Deliver)
                subscription = self._attached.get(event.subscription)
                if subscription is not None:  # or it was left: they return to their places
                    subscription.take(event)
            elif kind is Confirmed:
                assert isinstance(event, Confirmed)
                self._fruitful = True
                submission = event.submission
                self._confirmed += event.messages if submission.acks is None else max(len(submission.rows), 1)
                context = submission.context
                if context is not None:
                    context.take_confirmation(event.messages, event.stored)
            elif isinstance(event, Rejected):
                self._fruitful = True
                self._reject(event.submission, event.error, 1)
            elif isinstance(event, Answered):
                self._fruitful = True
                for context in event.contexts:
                    if context is not None:
                        context.answered(event.error)
            elif isinstance(event, Shown):
                self._fruitful = True
                event.context.shown(event.page)
            elif isinstance(event, Ended):
                subscription = self._attached.pop(event.subscription, None)
                if subscription is not None:
                    self.subscriptions.discard(subscription)
                    subscription.fail(error_of(event.code, event.text))
            elif isinstance(event, Members):
                self._learn(event.members)
        if self._room_wanted and self.sends.has_room:
            self._room_wanted = False
            self._signal()
        if self._connection is not None and self.sends.writable:
            self._connection.wake()

    def _reject(self, submission: Submission, error: BrokerError, count: int = 0) -> None:
        """All that was left of a submission, or `count` messages of it, will not be confirmed."""
        count = count or submission.dropped
        if submission.acks is not None:
            count = max(len(submission.rows), 1)
        if isinstance(error, SendInDoubt):
            self._in_doubt += count
        else:
            self._refused += count
        if submission.context is not None:
            submission.context.take_refusal(count, error)

    def _learn(self, members: Any) -> None:
        if members and self._connection is not None:
            self._search.learn(members)
            self._tell("members", self._connection.address.url, self._connection.opened.broker, members=members)

    # ---- waiting

    def _signal(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def check_open(self) -> None:
        """Raise what ended the client."""
        if self._closed is not None:
            raise self._closed

    def unavailable(self) -> BrokerUnavailable:
        """The error for what could not be sent."""
        why = f" ({self._last_error})" if self._last_error is not None else ""
        return BrokerUnavailable(f"no broker could be reached within {self.options.deadline:g} s, option deadline{why}")

    @property
    def connected(self) -> bool:
        return self._live is not None

    @property
    def _live(self) -> RemoteConnection | None:
        connection = self._connection
        return connection if connection is not None and connection.session.state == OPEN else None

    async def _wait_change(self, since: float) -> None:
        """Wait for a change; without a connection not longer than the deadline lets one who has waited since then."""
        if self._connection is not None:
            await self._changed.wait()
            return
        with trio.move_on_at(max(since, self._down_since) + self.options.deadline) as scope:
            await self._changed.wait()
        if scope.cancelled_caught:
            raise self.unavailable()

    async def wait_connected(self) -> None:
        """Wait for a connection. Raises BrokerUnavailable, BrokerClosed."""
        await trio.lowlevel.checkpoint()
        since = trio.current_time()
        self.check_open()
        while self._live is None:
            await self._wait_change(since)
            self.check_open()

    async def wait_room(self, since: float) -> None:
        """Wait until something may be sent: for a connection, and for its send window. One caller at a time.

        `since`: trio's time from which on the caller waits. Raises BrokerUnavailable, BrokerClosed.
        """
        self.check_open()
        while not self.sends.has_room:
            self._room_wanted = True
            await self._wait_change(since)
            self.check_open()

    # ---- asking

    def submit(self, rows: list[Row], size: int, context: Any) -> Submission:
        """Send messages, in order, for which there is room."""
        self._sent += len(rows)
        submission = self.sends.submit(rows, size, context)
        if self._connection is not None:
            self._connection.wake()
        return submission

    def submit_transaction(self, rows: list[Row], size: int, acks: Any, nacks: Any, context: Any) -> Submission:
        self._sent += max(len(rows), 1)
        submission = self.sends.submit_transaction(rows, size, acks, nacks, context)
        if self._connection is not None:
            self._connection.wake()
        return submission

    def settle(self, number: int, tags: list[int], done: bool, waiter: Waiter | None) -> None:
        """Acknowledge deliveries, or give them back; without a waiter nobody wants to know."""
        connection = self._live
        if connection is not None:
            connection.session.settle(number, tags, done, waiter)
            connection.wake()
        elif waiter is not None:
            waiter.lost(self._last_error)

    def credit(self, number: int, prefetch: int) -> None:
        connection = self._live
        if connection is not None:
            connection.session.credit(number, prefetch)
            connection.wake()

    def ask_subscription(
        self,
        subscription: RemoteSubscription,
        destination: str,
        ack: str,
        prefetch: int,
        durable: str,
        options: ConsumerOptions,
    ) -> int:
        """The subscription's number on this connection."""
        connection = self._live
        if connection is None:
            return 0  # it is over already; the next one asks again
        number = connection.session.subscribe(subscription, destination, ack, prefetch, durable, options)
        self._attached[number] = subscription
        connection.wake()
        return number

    def unsubscribe(self, waiter: Waiter | None, number: int) -> bool:
        """Whether the broker was asked to."""
        connection = self._live
        if connection is None or self._attached.pop(number, None) is None:
            return False
        connection.session.unsubscribe(waiter, number)
        connection.wake()
        return True

    def remove_durable(self, waiter: Waiter, name: str) -> None:
        connection = self._live
        if connection is None:
            waiter.lost(self._last_error)
        else:
            connection.session.remove(waiter, name)
            connection.wake()

    def create_temporary(self, waiter: Waiter | RemoteTemporary, kind: str, secret: str) -> None:
        connection = self._live
        if connection is None:
            waiter.lost(self._last_error)
        else:
            connection.session.create(waiter, kind, secret)
            connection.wake()

    def delete_temporary(self, destination: str) -> None:
        """Nobody waits for the answer."""
        connection = self._live
        if connection is not None:
            connection.session.delete(None, destination)
            connection.wake()

    async def page(self, destination: str, selector: str, limit: int, cursor: Cursor | None) -> Page:
        """A page of a queue, from whatever broker answers: a cursor is good on another connection, too."""
        waiter = PageWaiter()
        self._looking.add(waiter)
        try:
            while True:
                await self.wait_connected()
                waiter.renew()
                connection = self._live
                assert connection is not None
                connection.session.browse(waiter, destination, selector, limit, cursor)
                connection.wake()
                await waiter.wait()
                if waiter.page is not None:
                    return waiter.page
        finally:
            self._looking.discard(waiter)

    def restore_later(self, subscription: RemoteSubscription, error: BrokerError) -> None:
        """The broker refuses to restore it, perhaps only for now."""
        now = trio.current_time()
        subscription.refused_since = min(subscription.refused_since, now)
        if now - subscription.refused_since >= self.options.deadline or self._nursery is None:
            self.subscriptions.discard(subscription)
            subscription.fail(error)
        else:
            self._nursery.start_soon(self._restore_again, subscription, self._connection)

    async def _restore_again(self, subscription: RemoteSubscription, connection: RemoteConnection | None) -> None:
        age = trio.current_time() - subscription.refused_since
        await trio.sleep(min(max(age, self.options.reconnect_delay), self.options.reconnect_delay_max))
        if subscription in self.subscriptions and self._live is connection and subscription.attachment is None:
            subscription.attach()

    # ---- telling

    def _tell(
        self,
        kind: Literal["connected", "disconnected", "failed", "members"],
        url: str,
        broker: str,
        error: BrokerError | None = None,
        members: Any = None,
    ) -> None:
        event = ConnectionEvent(kind, url, broker, error, members or {})
        log.log(logging.DEBUG if kind == "members" else logging.INFO, "%s %s %s", kind, url, error or broker)
        if kind in ("connected", "disconnected"):
            self._latest = event
        for reader in self._events:
            reader.put(event)

    def events(self) -> ConnectionEvents:
        reader = ConnectionEvents(self._latest, self._closed is not None)
        self._events.add(reader)
        return reader

    @property
    def opened(self) -> Opened:
        """What the present broker said when it let this client in; whoever has room can rely on there being one."""
        assert self._connection is not None
        return self._connection.opened

    def statistics(self) -> ClientStatistics:
        connection = self._live
        return ClientStatistics(
            connected=connection is not None,
            url=connection.address.url if connection is not None else "",
            broker=connection.opened.broker if connection is not None else "",
            connections=self._connections,
            failures=self._failures,
            sent=self._sent,
            confirmed=self._confirmed,
            refused=self._refused,
            in_doubt=self._in_doubt,
            repeated=self.sends.repeated,
            unconfirmed=self.sends.messages,
            unconfirmed_bytes=self.sends.bytes,
            received=self.received,
            buffered=sum(each.buffered for each in self.subscriptions),
            subscriptions=len(self.subscriptions),
            addresses=self._search.count,
        )
