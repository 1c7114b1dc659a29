"""One native connection: moves bytes between a stream and the session, and frames between the session and the core.

Owns the connection's life and its end, its subscriptions and requests; what it sends is in `native_sending`, what it is told in
`native_outbox`; protocol rules are in `pybroker.protocols`, messaging rules in `pybroker.core`. One task reads, one writes, one
works off sends that wait for room. What is confirmed goes out in the order in which it was asked for, the last frame last.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import trio

from pybroker.connections import RECEIVE_BYTES, linger
from pybroker.core.broker import Core
from pybroker.core.browsing import BrowsePage, Cursor
from pybroker.core.consumer import CUMULATIVE, INDIVIDUAL, Consumer
from pybroker.core.entry import Entry
from pybroker.engine import Engine
from pybroker.errors import BrokerError, LimitExceeded, ProtocolError, SubscriptionError
from pybroker.native_outbox import Outbox, Receiver
from pybroker.native_sending import Sending, Sent
from pybroker.protocols.native_frames import (
    Ack,
    Browse,
    Bye,
    Commit,
    Create,
    Credit,
    Delete,
    Error,
    Nack,
    Remove,
    Send,
    Subscribe,
    Unsubscribe,
    encode_beat,
    encode_bye,
    encode_done,
    encode_ended,
    encode_failed,
    encode_members,
    encode_page,
    unpack_options,
)
from pybroker.protocols.native_session import Event, LinkOpening, NativeSession, Opening, Violation
from pybroker.queue_pages import matcher

if TYPE_CHECKING:
    from pybroker.server import Server

log = logging.getLogger("pybroker.native")

AUTO = "auto"  # the broker sees it as INDIVIDUAL: the client acknowledges what it hands out
ACK_MODES = {"individual": INDIVIDUAL, "cumulative": CUMULATIVE, AUTO: INDIVIDUAL}
SILENT_INTERVALS = 3.0  # intervals of its own heart-beats for which a client may be silent
REQUEST_WORK = 4  # a request, refused or not, takes as long as so many messages
# The tags of a connection begin at a random multiple of this, so that those of a lost connection mean nothing on the next one.
TAGS_PER_CONNECTION = 2**32


class _Last(NamedTuple):
    """A token: the last bytes of a connection."""

    data: bytes


class _Started(NamedTuple):
    """A token: a request is done, and the consumer may be given messages."""

    request: int
    consumer: Consumer


class _Welcome(NamedTuple):
    """A token: the client may be let in. `producer_known`: whether its producer was known before."""

    producer_known: bool


class NativeConnection:
    """A connection, from its first byte to its close. `anonymous`: whether its listener lets in who gives no login."""

    def __init__(self, server: Server, engine: Engine, stream: trio.abc.Stream, number: int, anonymous: bool) -> None:
        config = server.config
        self._server = server
        self._engine = engine
        self._stream = stream
        self._number = number
        self._anonymous = anonymous
        self._session = NativeSession(config.native, config.limits.transaction_messages_max)
        self._connection = engine.core.connect(self)
        self._sending = Sending(self, engine, config, self._find)
        self._consumers: dict[int, Consumer] = {}
        self._last_tag = (secrets.randbits(30) + 1) * TAGS_PER_CONNECTION
        self._pages: dict[BrowsePage, int] = {}  # that are being read, and by which request
        self._outbox = Outbox()
        self._outbox_max = config.limits.outbox_bytes_max
        self._starting: list[Consumer] = []  # those whose requests are answered by what is in the outbox
        self._parting = False  # the client has said BYE: it is given nothing new
        self._ended = False  # nothing is read any more; the last bytes are known, or held with a batch
        self._ending = False  # everything before the last bytes is in the outbox
        self._last = b""
        self._welcomed: trio.Event | None = None  # set when the client is let in; None before its HELLO
        self._link = b""  # what was read of a link with another broker
        self._work = trio.Event()
        self._drained: trio.Event | None = None
        self._reading = trio.CancelScope()
        self._listening = False  # the reader waits for the peer, not for room
        self._silence_max = math.inf  # seconds
        self.touched = False
        self.last_received = trio.current_time()
        self.last_sent = self.last_received

    # ---- life

    async def run(self) -> None:
        """Serve the connection until it ends. Never raises but for cancellation."""
        native = self._server.config.native
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                nursery.start_soon(self._sending.run)
                self._reading.deadline = trio.current_time() + native.connect_timeout
                with self._reading:
                    await self._read()
                if self._link:
                    nursery.cancel_scope.cancel()
                elif not self._ended:
                    limit = f"limit native.connect_timeout is {native.connect_timeout:g} seconds"
                    self._end_with(ProtocolError(f"no HELLO frame came in time: {limit}"))
                nursery.cancel_scope.deadline = trio.current_time() + native.write_timeout
            if self._link:
                await self._run_link()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("connection %d was broken", self._number)
        except* Exception:
            log.exception("connection %d failed; it is closed, its unacknowledged messages return", self._number)
        finally:
            self._leave()
            await trio.aclose_forcefully(self._stream)

    async def _run_link(self) -> None:
        """Hand the stream to who serves links, and ends them in good order."""
        accept = self._server.accept_link
        self._leave()
        if accept is not None:
            await accept(self._stream, self._link)

    def _leave(self) -> None:
        engine = self._engine
        if engine.error is None:
            engine.begin_turn().disconnect(self._connection)
            engine.end_turn()
        self._outbox.clear()

    def close(self, error: BrokerError) -> None:
        """Read nothing more; say ERROR behind all that is being committed, and end. (A link is ended by who serves it.)"""
        if not self._ended and not self._link:
            self._end_with(error)
            self._reading.cancel()

    def _end_with(self, error: BrokerError) -> None:
        self._session.error(error)
        self._end_after(self._session.data_to_send())

    def _end_after(self, data: bytes) -> None:
        """End the connection with these bytes, behind what earlier frames have still to be told. What waits is given up."""
        self._ended = True
        self._sending.drop()
        engine = self._engine
        if engine.error is not None:
            self.confirm(_Last(data))
            self.flush()
            return
        engine.core.confirm((self, _Last(data)))
        engine.end_turn()

    # ---- reading

    async def _read(self) -> None:
        session = self._session
        turn_max = self._server.config.limits.turn_messages_max
        while True:
            self._listening = True
            data = await self._stream.receive_some(RECEIVE_BYTES)
            self._listening = False
            self.last_received = trio.current_time()
            session.receive_data(data)
            while events := session.next_events(turn_max):
                if not await self._handle(events):
                    return
                await self._wait_turn()
            if not data:
                # The peer says no more, and what it holds returns now: it may have gone for good.
                if self._engine.error is None:
                    self._engine.begin_turn().disconnect(self._connection)
                self._end_after(b"")
                return

    async def _wait_turn(self) -> None:
        """Let others have their turn, and slow down a peer that is faster than its own reading."""
        while self._outbox.size > self._outbox_max and not self._ended:
            self._drained = trio.Event()
            await self._drained.wait()
        await trio.lowlevel.checkpoint()

    async def _handle(self, events: list[Event]) -> bool:
        """Do what the events ask for, in one turn; False when no more are to be read."""
        engine = self._engine
        last: Event | None = None
        try:
            core = engine.begin_turn()
            work_max = core.limits.turn_messages_max
            for event in events:
                kind = event.__class__
                if kind is Send or kind is Commit:
                    if core.watched:
                        self._note_producers(core, event)  # type: ignore[arg-type]
                    self._sending.take(core, event)  # type: ignore[arg-type]
                elif kind is Ack or kind is Nack:
                    self._settle(core, event)  # type: ignore[arg-type]
                elif isinstance(event, Credit):
                    self._set_prefetch(core, event)
                elif isinstance(event, Subscribe | Browse):
                    if event.selector if isinstance(event, Browse) else event.options:
                        core = await engine.next_turn()  # reading a selector takes as long as many messages
                        if self._ended:
                            return False
                    if isinstance(event, Browse):
                        self._browse(core, event)
                    else:
                        self._answer(core, event.request, self._subscribe, event)
                elif isinstance(event, Unsubscribe):
                    self._answer(core, event.request, self._unsubscribe, event)
                elif isinstance(event, Remove):
                    self._answer(core, event.request, self._remove, event)
                elif isinstance(event, Create):
                    self._answer(core, event.request, self._create, event)
                elif isinstance(event, Delete):
                    self._answer(core, event.request, self._delete, event)
                else:
                    last = event  # nothing comes behind it (or not before it is answered)
                if core.work > work_max:
                    core = await engine.next_turn()
                    if self._ended:
                        return False
            if isinstance(last, Violation):
                raise last.error
        except BrokerError as error:
            self._end_with(error)
            return False
        finally:
            if engine.error is None:
                engine.end_turn()
        if isinstance(last, Opening):
            return await self._open(last)
        if isinstance(last, LinkOpening):
            return self._open_link(last)
        if isinstance(last, Bye):
            await self._say_bye()
            return False
        if isinstance(last, Error):
            log.info("connection %d was ended by the client: %s (%s)", self._number, last.text, last.code)
            self._end_after(b"")
            return False
        return True

    def _note_producers(self, core: Core, frame: Send | Commit) -> None:
        core.advisories.producers(self._connection, [message.destination for message in frame.messages])

    # ---- opening and parting

    async def _open(self, opening: Opening) -> bool:
        try:
            await self._server.authenticate(opening.login or None, opening.passcode or None, self._anonymous)
            if self._ended:
                return False  # the broker stops, and a check in a thread can't be cancelled
            self._reading.deadline = math.inf  # a commit may take as long as it takes
            core = self._engine.begin_turn()
        except BrokerError as error:
            if not self._ended:
                self._end_with(error)
            return False
        self._connection.client_id = opening.client_id
        if opening.heartbeat:
            least = self._server.config.native.heartbeat_timeout
            self._silence_max = max(opening.heartbeat * SILENT_INTERVALS, least)
        self._welcomed = trio.Event()
        known = False
        if opening.producer:
            self._sending.use_producer(opening.producer)
            known = core.producers.find(opening.producer) is not None
            if known or opening.producer_new:
                # One that is not known, and not new, is made by its next send: a client whose answer got lost is to be told again.
                core.producers.open(opening.producer)
        core.announce(self._connection, self._session_id)
        core.confirm((self, _Welcome(known)))
        self._engine.end_turn()
        await self._welcomed.wait()
        return True

    @property
    def _session_id(self) -> str:
        store = self._engine.store
        return f"{store.store_id}-{store.starts:x}-{self._number:x}"

    def _welcome(self, producer_known: bool) -> None:
        server = self._server
        native = server.config.native
        assert self._welcomed is not None
        self._session.accept(
            {
                "software": server.software,
                "broker": server.config.name,
                "session": self._session_id,
                "heartbeat": native.heartbeat_interval,
                "body_bytes_max": server.config.stomp.body_bytes_max,
                "frame_bytes_max": native.frame_bytes_max,
                "send_messages_max": native.send_messages_max,
                "send_bytes_max": native.send_bytes_max,
                "transaction_messages_max": server.config.limits.transaction_messages_max,
                "transaction_bytes_max": server.config.limits.transaction_bytes_max,
                "producer_known": producer_known,
                "members": dict(server.members),
            }
        )
        self._outbox.put(self._session.data_to_send())
        self._welcomed.set()
        server.beating.add(self)

    def _open_link(self, opening: LinkOpening) -> bool:
        if self._server.accept_link is None:
            self._end_with(ProtocolError("this broker is in no network: give it one, or take it off the list of peers"))
        else:
            self._link = opening.data
        return False

    async def _say_bye(self) -> None:
        """The client sends nothing more: it is told what it still waits for, and given nothing new."""
        self._parting = True
        if self._engine.error is None:
            self._engine.begin_turn().pause(self._connection, slow=False)
            self._engine.end_turn()
        await self._sending.wait_empty()
        if not self._ended:
            self._end_after(encode_bye())

    def tell_members(self) -> None:
        """Server: the network has other members now."""
        if self._welcomed is not None and self._welcomed.is_set() and not self._ended:
            self.say(encode_members(self._server.members))

    # ---- subscriptions and settlements

    def _find(self, subscription: int) -> Consumer | None:
        return self._consumers.get(subscription)

    def _known(self, subscription: int) -> Consumer:
        consumer = self._consumers.get(subscription)
        if consumer is None:
            raise SubscriptionError(f"there is no subscription {subscription} on this connection")
        return consumer

    def _answer(self, core: Core, request: int, action: Callable[[Core, Any], Any], event: Any) -> None:
        """Do what a request asks for; its answer comes when that is committed, or at once when it fails."""
        core.work += REQUEST_WORK
        try:
            token = action(core, event)
        except BrokerError as error:
            self.say(encode_failed(request, error.code, str(error)))
        else:
            core.confirm((self, request if token is None else token))

    def _subscribe(self, core: Core, event: Subscribe) -> _Started | None:
        number = event.subscription
        if number in self._consumers:
            raise SubscriptionError(
                f"subscription {number} is in use on this connection: end it first, or use another number"
            )
        mode = ACK_MODES.get(event.ack)
        if mode is None:
            raise SubscriptionError(f"acknowledgement mode {event.ack!r} is not one of {', '.join(ACK_MODES)}")
        prefetch = event.prefetch or (core.limits.prefetch_auto_default if event.ack == AUTO else None)
        receiver = Receiver(number)
        consumer = receiver.consumer = core.subscribe(
            self._connection,
            event.destination,
            mode,
            prefetch=prefetch,
            durable_name=event.durable or None,
            options=unpack_options(event.options),
            context=receiver,
        )
        consumer.last_tag = self._last_tag
        self._consumers[number] = consumer
        if event.durable:
            return _Started(event.request, consumer)  # nothing is shown of what is perhaps not there after a crash
        core.start(consumer)
        return None

    def _unsubscribe(self, core: Core, event: Unsubscribe) -> None:
        consumer = self._known(event.subscription)
        self._forget(consumer)
        core.unsubscribe(consumer)

    def _forget(self, consumer: Consumer) -> None:
        """Its number may come again: the tags go on rising. (What the socket has not taken is void: the outbox leaves it out.)"""
        del self._consumers[consumer.context.number]
        self._last_tag = max(self._last_tag, consumer.last_tag)

    def _remove(self, core: Core, event: Remove) -> None:
        core.remove_subscription(self._connection.client_id, event.durable)

    def _create(self, core: Core, event: Create) -> None:
        core.temporaries.create(self._connection, event.kind, event.secret)

    def _delete(self, core: Core, event: Delete) -> None:
        core.temporaries.delete(self._connection, event.destination)

    def _browse(self, core: Core, event: Browse) -> None:
        """The answer comes with the page."""
        try:
            limit = core.limits.browse_pages_max
            if len(self._pages) >= limit:
                raise LimitExceeded("limits.browse_pages_max", limit, "too many pages are asked for at a time")
            cursor = Cursor(*event.cursor) if event.cursor is not None else None
            matches = matcher(self._engine, event.selector)
            page = core.browse(event.destination, self, cursor=cursor, matches=matches, limit=event.limit)
            self._pages[page] = event.request
        except BrokerError as error:
            self.say(encode_failed(event.request, error.code, str(error)))

    def _show(self, page: BrowsePage) -> None:
        messages = [(each.message, each.deliveries) for each in page.messages]
        outstanding = [at for at, each in enumerate(page.messages) if each.outstanding]
        self._outbox.put(encode_page(self._pages.pop(page), messages, outstanding, page.cursor, page.unread))

    def _settle(self, core: Core, event: Ack | Nack) -> None:
        settle = core.acknowledge_ranges if event.__class__ is Ack else core.reject_ranges
        try:
            settle(self._known(event.subscription), event.ranges)
        except BrokerError as error:
            if event.request:  # or else it may be that the broker has ended the subscription, or the client did
                self.say(encode_failed(event.request, error.code, str(error)))
        else:
            if event.request:
                core.confirm((self, event.request))

    def _set_prefetch(self, core: Core, event: Credit) -> None:
        consumer = self._find(event.subscription)
        if consumer is not None:  # or else it has ended meanwhile
            core.set_prefetch(consumer, event.prefetch)

    # ---- writing

    async def _write(self, scope: trio.CancelScope) -> None:
        outbox = self._outbox
        while True:
            if not outbox.size:
                if self._ending:
                    # First the leaving, then the word of it: who has it may take up a durable subscription at once.
                    self._leave()
                    if self._last:
                        await self._stream.send_all(self._last)
                    break
                self._work = trio.Event()
                await self._work.wait()
                continue
            size = outbox.size
            frames = outbox.take()
            starting, self._starting = self._starting, []
            if frames:
                data = frames[0] if len(frames) == 1 else b"".join(frames)
                del frames
                await self._stream.send_all(data)
                del data
                self.last_sent = trio.current_time()
            outbox.size -= size
            if starting or self._connection.paused:
                self._go_on(starting)
            if self._drained is not None and outbox.size <= self._outbox_max:
                self._drained.set()
        self._reading.cancel()
        await linger(self._stream)
        scope.cancel()

    def _go_on(self, starting: list[Consumer]) -> None:
        """The socket took some: start new consumers, and those that paused."""
        engine = self._engine
        if engine.error is not None or self._ended or self._parting:
            return
        core = engine.begin_turn()
        for consumer in starting:
            core.start(consumer)
        if self._connection.paused and self._outbox.size <= self._outbox_max // 2:
            core.resume(self._connection)
        engine.end_turn()

    def say(self, frame: bytes) -> None:
        """Put a frame into the outbox."""
        if not self._ending:
            self._outbox.put(frame)
            self._work.set()

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Engine: a delivery."""
        if self._ending:
            return  # it returns to its place when the connection leaves
        outbox = self._outbox
        outbox.deliver(consumer.context, entry)
        if outbox.size > self._outbox_max:
            self._engine.core.pause(self._connection)

    def confirm(self, token: Any) -> None:
        """Engine: everything before the token is committed."""
        kind = token.__class__
        if kind is Sent:
            self._sending.confirmed(token)
            if not self._ending:
                self._outbox.confirm(token.results)
        elif self._ending:
            return
        elif kind is int:
            self._outbox.put(encode_done(token))
        elif kind is _Started:
            self._outbox.put(encode_done(token.request))
            self._starting.append(token.consumer)
        elif kind is BrowsePage:
            self._show(token)
        elif kind is _Welcome:
            if not self._ended:
                self._welcome(token.producer_known)
        else:
            self._last = token.data
            self._ending = True

    def flush(self) -> None:
        """Engine: the turn is over."""
        self._work.set()

    def fail(self, error: BrokerError) -> None:
        """Engine: the journal failed."""
        self.close(error)

    def fail_consumer(self, consumer: Consumer, error: BrokerError) -> None:
        """Engine: the broker ended one subscription."""
        if self._consumers.get(consumer.context.number) is consumer:
            self._forget(consumer)
            self.say(encode_ended(consumer.context.number, error.code, str(error)))

    # ---- heart-beats

    def beat(self, now: float) -> None:
        """Server, every now and then: say that this side is there when it said nothing else; end a client that is silent."""
        if self._ended:
            return
        if not self._listening:
            self.last_received = now  # its heart-beats wait unread: it can't be told whether it is silent
        silence = now - self.last_received
        if silence > self._silence_max:
            text = f"nothing came for {silence:.1f} s: a client says BEAT when it has nothing else to say"
            self.close(ProtocolError(f"{text} (limit native.heartbeat_timeout, or three of its own intervals)"))
            return
        interval = self._server.config.native.heartbeat_interval
        if interval and now - self.last_sent >= interval * 0.75 and not self._outbox.size:
            self.last_sent = now
            self.say(encode_beat())
