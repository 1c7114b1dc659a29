"""One STOMP connection: moves bytes between a stream and the session, and events between the session and the core.

Owns the connection's outbox and its end; protocol rules are in `pybroker.protocols`, messaging rules in `pybroker.core`.
One task reads, one writes. What is confirmed goes out in the order in which it was asked for, an ERROR last.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import trio

from pybroker.connections import RECEIVE_BYTES, linger
from pybroker.core.broker import Core
from pybroker.core.browsing import BrowsePage
from pybroker.core.consumer import AUTO, CUMULATIVE, INDIVIDUAL, Consumer
from pybroker.core.entry import Entry
from pybroker.engine import Engine
from pybroker.errors import BrokerError, LimitExceeded, ProtocolError, SubscriptionError, UnknownDelivery
from pybroker.protocols.stomp_events import (
    Abort,
    Ack,
    Begin,
    Commit,
    Connect,
    Disconnect,
    Event,
    Failed,
    Nack,
    Send,
    Subscribe,
    Unsubscribe,
)
from pybroker.protocols.stomp_headers import HEARTBEAT, shown
from pybroker.protocols.stomp_send import LocalDestination
from pybroker.protocols.stomp_session import StompSession
from pybroker.queue_pages import matcher
from pybroker.stomp_browsing import StompBrowsers
from pybroker.stomp_temporary import LocalNames

if TYPE_CHECKING:
    from pybroker.server import Server

log = logging.getLogger("pybroker.stomp")

ACK_MODES = {"auto": AUTO, "client": CUMULATIVE, "client-individual": INDIVIDUAL}
ANY_CLIENT = "*"  # owner of durable subscriptions made without a client id (RabbitMQ's convention)


class _Subscription:
    """What a connection knows of one of its consumers."""

    __slots__ = ("head", "key", "local", "name", "repeats", "tags")

    def __init__(self, key: str, name: bytes, head: bytes, tags: dict[bytes, int] | None, local: str = "") -> None:
        self.key = key
        self.name = name  # the first part of its acknowledgement ids
        self.head = head  # the start of its MESSAGE frames
        self.tags = tags  # message id to delivery tag, where acknowledgements name messages (before 1.2)
        self.local = local  # the connection's own name of its destination; "" where that is no temporary one
        self.repeats = False  # some id came twice: dead letters of one message from several subscriptions


class _Last:
    """A token: the last bytes of a connection."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class StompConnection:
    """A connection, from its first byte to its close. `anonymous`: whether its listener lets in who gives no login."""

    def __init__(self, server: Server, engine: Engine, stream: trio.abc.Stream, number: int, anonymous: bool) -> None:
        config = server.config
        self._server = server
        self._engine = engine
        self._stream = stream
        self._number = number
        self._anonymous = anonymous
        self._session = StompSession(
            config.stomp, durable_default=config.delivery.durable_default, server=server.software, memo=server.memo
        )
        self._connection = engine.core.connect(self)
        self._local_names = LocalNames(self._connection)
        self._browsers = StompBrowsers(self, self._session, self._put, config.limits.browse_pages_max)
        self._by_key: dict[str, Consumer] = {}
        self._by_name: dict[bytes, Consumer] = {}
        self._last_name = 0
        self._chunks: list[bytes] = []
        self._taken: list[Entry] = []  # deliveries of AUTO consumers in the outbox
        self._outbox_bytes = 0  # handed to the outbox and not yet taken by the kernel
        self._outbox_max = config.limits.outbox_bytes_max
        self._ended = False  # nothing is read any more; the last bytes are known, or held with a batch
        self._ending = False  # everything before the last bytes is in the outbox
        self._last = b""  # an ERROR, or the receipt of a DISCONNECT
        self._work = trio.Event()
        self._drained: trio.Event | None = None
        self._taken_some: trio.Event | None = None
        self._reading = trio.CancelScope()
        self._listening = False  # the reader waits for the peer, not for room
        self.touched = False
        self.last_received = trio.current_time()
        self.last_sent = self.last_received

    # ---- life

    async def run(self) -> None:
        """Serve the connection until it ends. Never raises but for cancellation."""
        config = self._server.config
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, nursery.cancel_scope)
                self._reading.deadline = trio.current_time() + config.stomp.connect_timeout
                with self._reading:
                    await self._read()
                if self._reading.cancelled_caught and self._session.version is None and not self._ended:
                    limit = f"limit stomp.connect_timeout is {config.stomp.connect_timeout:g} seconds"
                    self._end_with(ProtocolError(f"no CONNECT frame came in time: {limit}"))
                nursery.cancel_scope.deadline = trio.current_time() + config.stomp.write_timeout
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("connection %d was broken", self._number)
        except* Exception:
            log.exception("connection %d failed; it is closed, its unacknowledged messages return", self._number)
        finally:
            self._leave()
            await trio.aclose_forcefully(self._stream)

    def _leave(self) -> None:
        engine = self._engine
        if engine.error is None:
            engine.begin_turn().disconnect(self._connection)
            engine.end_turn()
        self._chunks.clear()
        self._taken.clear()

    def close(self, error: BrokerError) -> None:
        """Read nothing more; say ERROR behind all that is being committed, and end."""
        if not self._ended:
            self._end_with(error)
            self._reading.cancel()

    def _end_with(self, error: BrokerError, receipt: bytes | None = None) -> None:
        self._session.error(error, receipt)
        self._end_after(self._session.data_to_send())

    def _end_after(self, data: bytes) -> None:
        """End the connection with these bytes, behind what earlier frames have still to be told."""
        self._ended = True
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
        engine = self._engine
        turn_max = self._server.config.limits.turn_messages_max
        while True:
            self._listening = True
            data = await self._stream.receive_some(RECEIVE_BYTES)
            self._listening = False
            self.last_received = trio.current_time()
            session.receive_data(bytes(data))
            while events := session.next_events(turn_max):
                if engine.batch_full:  # before the turn: however many connections wait, one at a time fills the batch
                    await engine.journal.wait_room(self._server.config.limits.batch_bytes_max)
                try:
                    going_on = await self._handle(events)
                except BrokerError as error:
                    self._end_with(error)
                    return
                if not going_on:
                    return
                await self._wait_turn(len(events))
            if not data:
                # The peer says no more, but may wait for receipts. What it holds returns now: it may have gone for good,
                # and the kernel would still take messages for it.
                if self._engine.error is None:
                    self._engine.begin_turn().disconnect(self._connection)
                self._end_after(b"")
                return

    async def _wait_turn(self, count: int) -> None:
        """Let others have their turn, and slow down a peer that is faster than its own reading."""
        while self._outbox_bytes > self._outbox_max and not self._ended:
            self._drained = trio.Event()
            await self._drained.wait()
        if count > 1:
            await trio.lowlevel.checkpoint()

    async def _handle(self, events: list[Event]) -> bool:
        """Do what the events ask for, in one turn where nothing has to wait; False when no more are to be read."""
        engine = self._engine
        core = engine.begin_turn()
        crowded = core.crowded
        watched = core.watched
        work_max = core.limits.turn_messages_max
        receipt: bytes | None = None
        try:
            for event in events:
                kind = event.__class__
                if kind is Send:
                    message = event.message  # type: ignore[attr-defined]
                    receipt = event.receipt  # type: ignore[attr-defined]
                    numbered = event.numbered  # type: ignore[attr-defined]
                    if message.destination.__class__ is LocalDestination:
                        self._local_names.translate(core, message)
                    repeat = numbered is not None and core.producers.has(numbered.producer, numbered.sequence)
                    if crowded and not repeat and core.full(message) is not None:
                        engine.end_turn()
                        await engine.wait_room(message)
                        core = engine.begin_turn()
                    if watched:
                        core.advisories.producers(self._connection, (message.destination,))
                    transaction = event.transaction  # type: ignore[attr-defined]
                    if transaction is not None:
                        core.send_later(self._connection, message, transaction, numbered)
                    elif numbered is None:
                        core.send(message)
                    else:
                        core.send_once(message, numbered)
                elif kind is Ack or kind is Nack:
                    receipt = event.receipt  # type: ignore[attr-defined]
                    self._settle(core, event)  # type: ignore[arg-type]
                elif isinstance(event, Failed):
                    self._end_after(self._session.data_to_send())
                    return False
                elif isinstance(event, Connect):
                    await self._connect(event)
                    core = engine.begin_turn()
                else:
                    receipt = event.receipt  # type: ignore[attr-defined]
                    if kind is Unsubscribe and self._stop_giving(event):  # type: ignore[arg-type]
                        engine.end_turn()
                        await self._wait_taken(event)  # type: ignore[arg-type]
                        core = engine.begin_turn()
                    elif kind is Subscribe and event.options.selector:  # type: ignore[attr-defined]
                        core = await engine.next_turn()  # reading a selector takes as long as many messages
                        if self._ended:
                            return False
                        crowded = core.crowded
                    self._command(core, event)
                if kind is Disconnect:
                    self._end_after(self._session.receipt_frame(receipt) if receipt is not None else b"")
                    return False
                if receipt is not None:
                    core.confirm((self, receipt))
                    receipt = None
                if core.work > work_max:
                    core = await engine.next_turn()
                    if self._ended:
                        return False
                    crowded = core.crowded  # others may have filled the broker meanwhile
        except BrokerError as error:
            self._end_with(error, receipt)
            return False
        finally:
            if engine.error is None:
                engine.end_turn()
        return True

    async def _connect(self, event: Connect) -> None:
        await self._server.authenticate(event.login, event.passcode, self._anonymous)
        if self._ended:
            return  # the broker stops, and a check in a thread can't be cancelled
        session_id = f"{self._engine.store.store_id}-{self._engine.store.starts:x}-{self._number:x}"
        self._session.accept(session_id)
        self._connection.client_id = event.client_id or ""
        self._engine.begin_turn().announce(self._connection, session_id)
        self._engine.end_turn()
        self._reading.deadline = math.inf
        self._put(self._session.data_to_send())
        self.flush()
        if self._session.heartbeat_send_ms or self._session.heartbeat_receive_ms:
            self._server.beating.add(self)

    def _command(self, core: Core, event: Event) -> None:
        if isinstance(event, Subscribe):
            self._subscribe(core, event)
        elif isinstance(event, Unsubscribe):
            self._unsubscribe(core, event)
        elif isinstance(event, Begin):
            core.begin(self._connection, event.transaction)
        elif isinstance(event, Commit):
            core.commit(self._connection, event.transaction, event.numbered)
        elif isinstance(event, Abort):
            core.abort(self._connection, event.transaction)

    def _subscribe(self, core: Core, event: Subscribe) -> None:
        key = event.id if event.id is not None else event.destination
        if key in self._by_key or key in self._browsers:
            raise SubscriptionError(
                f"subscription id {key!r} is in use on this connection: UNSUBSCRIBE it, or use another"
            )
        self._last_name += 1
        name = b"%x" % self._last_name
        by_message = event.ack != "auto" and self._session.version != "1.2"
        head = self._session.message_head(event.id)
        if event.browser:
            self._start_browser(core, key, head, event)
            return
        destination = self._local_names.resolve(core, event.destination)
        consumer = core.subscribe(
            self._connection,
            destination,
            ACK_MODES[event.ack],
            prefetch=event.prefetch,
            durable_name=event.durable_name,
            client_id=event.client_id or ANY_CLIENT,
            options=event.options,
            context=_Subscription(
                key,
                name,
                head,
                {} if by_message else None,
                event.destination if destination != event.destination else "",
            ),
        )
        self._by_key[key] = consumer
        self._by_name[name] = consumer
        core.start(consumer)

    def _start_browser(self, core: Core, key: str, head: bytes, event: Subscribe) -> None:
        limit = core.limits.subscriptions_max
        if len(self._browsers) >= limit:
            raise LimitExceeded("limits.subscriptions_max", limit, "too many queue browsers")
        if event.durable_name is not None:
            raise SubscriptionError("a queue browser is no durable subscription: leave its name out")
        matches = matcher(self._engine, event.options.selector)
        self._browsers.start(core, key, event.destination, head, matches)
        self._work.set()

    def _stop_giving(self, event: Unsubscribe) -> bool:
        """Give an AUTO consumer nothing more; True when some of what it was given has yet to go out."""
        consumer = self._by_key.get(_key(event) or "")
        if consumer is None or consumer.ack_mode != AUTO:
            return False
        consumer.size_max = 0
        consumer.rest()
        return bool(consumer.unacked)

    async def _wait_taken(self, event: Unsubscribe) -> None:
        """Wait until what an AUTO consumer was given is out: put back before, it would come to somebody else as well."""
        consumer = self._by_key[_key(event) or ""]
        while consumer.unacked and not self._ended:
            self._taken_some = trio.Event()
            await self._taken_some.wait()

    def _unsubscribe(self, core: Core, event: Unsubscribe) -> None:
        key = _key(event)
        if key is not None and key in self._browsers:
            self._browsers.stop(key)
            return
        consumer = self._by_key.pop(key, None) if key is not None else None
        if consumer is not None:
            del self._by_name[consumer.context.name]
            core.unsubscribe(consumer)
        elif event.durable_name is None:
            raise SubscriptionError(f"subscription {key!r} is not known on this connection")
        if event.durable_name is not None:
            core.remove_subscription(event.client_id or ANY_CLIENT, event.durable_name)

    def _settle(self, core: Core, event: Ack) -> None:
        if event.ack_id is not None:
            name, _, digits = event.ack_id.partition(b"-")
            consumer = self._by_name.get(name)
            if consumer is None or not digits.isdigit() or len(digits) > 20:
                raise UnknownDelivery(f"no delivery {shown(event.ack_id)} is outstanding on this connection")
            tag = int(digits)
        else:
            consumer, tag = self._find(event)
        if event.__class__ is Ack:
            core.acknowledge(consumer, tag, event.transaction)
        else:
            core.reject(consumer, tag, event.transaction)

    def _find(self, event: Ack) -> tuple[Consumer, int]:
        """The delivery of a message id (STOMP 1.0 and 1.1)."""
        message_id = event.message_id or b""
        if event.subscription is not None:
            one = self._by_key.get(event.subscription)
            consumers = [one] if one is not None else []
        else:
            consumers = list(self._by_key.values())
        for consumer in consumers:
            tags = consumer.context.tags
            tag = tags.get(message_id) if tags is not None else None
            if tag is None:
                continue
            if consumer.ack_mode == CUMULATIVE:
                for key in [key for key, other in tags.items() if other <= tag]:
                    del tags[key]
            else:
                del tags[message_id]
            if consumer.context.repeats:  # the earlier one goes first, then its id stands for the next
                for other, entry in consumer.unacked.items():
                    if other > tag:
                        tags.setdefault(entry.message.message_id, other)
            return consumer, tag
        raise UnknownDelivery(f"message {shown(message_id)} is not outstanding on this connection")

    # ---- writing

    async def _write(self, scope: trio.CancelScope) -> None:
        engine = self._engine
        stream = self._stream
        while True:
            if self._browsers.waiting and self._outbox_bytes <= self._outbox_max // 2 and engine.error is None:
                self._browsers.go_on(engine.begin_turn())
                engine.end_turn()
            if not self._chunks:
                if self._ending:
                    # First the leaving, then the word of it: who has it may take up a durable subscription at once.
                    self._leave()
                    await stream.send_all(self._last)
                    break
                self._work = trio.Event()
                await self._work.wait()
                continue
            chunks, self._chunks = self._chunks, []
            taken, self._taken = self._taken, []
            data = b"".join(chunks)
            del chunks
            await stream.send_all(data)
            self.last_sent = trio.current_time()
            self._outbox_bytes -= len(data)
            if engine.error is None:
                core = engine.begin_turn()
                if taken:
                    core.taken(taken)
                    if self._taken_some is not None:
                        self._taken_some.set()
                if self._connection.paused and self._outbox_bytes <= self._outbox_max // 2:
                    core.resume(self._connection)
                engine.end_turn()
            if self._drained is not None and self._outbox_bytes <= self._outbox_max:
                self._drained.set()
        self._reading.cancel()
        await linger(self._stream)
        scope.cancel()

    def _put(self, data: bytes) -> None:
        self._chunks.append(data)
        self._outbox_bytes += len(data)

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Engine: a delivery."""
        if self._ending:
            return  # it returns to its place when the connection leaves
        subscription = consumer.context
        deliveries = entry.deliveries
        if consumer.ack_mode == AUTO:
            ack_id = None
            self._taken.append(entry)
        else:
            ack_id = b"%b-%d" % (subscription.name, entry.tag)
            tags = subscription.tags
            if tags is not None and tags.setdefault(entry.message.message_id, entry.tag) != entry.tag:
                subscription.repeats = True
        message = entry.message
        if subscription.local:
            message = message.moved_to(subscription.local, expires=message.expires)
        frame = self._session.message_frame(subscription.head, message, deliveries > 0, deliveries + 1, ack_id)
        self._chunks.append(frame)
        self._outbox_bytes += len(frame)
        if self._outbox_bytes > self._outbox_max:
            self._engine.core.pause(self._connection)

    def confirm(self, token: Any) -> None:
        """Engine: everything before the token is committed."""
        if self._ending:
            return
        if token.__class__ is BrowsePage:
            self._browsers.show(token)
        elif isinstance(token, _Last):
            self._last = token.data
            self._ending = True
        else:
            self._put(self._session.receipt_frame(token))

    def flush(self) -> None:
        """Engine: the turn is over."""
        self._work.set()

    def fail(self, error: BrokerError) -> None:
        """Engine: the journal failed."""
        self.close(error)

    def fail_consumer(self, consumer: Consumer, error: BrokerError) -> None:
        """Engine: the broker ends one subscription; STOMP has no frame for that, so the connection ends."""
        self.close(error)

    # ---- heart-beats

    def beat(self, now: float) -> None:
        """Server, every now and then: send a heart-beat when one is due; end a connection that has gone silent."""
        session = self._session
        tolerance = self._server.config.stomp.heartbeat_tolerance
        if self._ended:
            return
        if not self._listening:
            self.last_received = now  # its heart-beats wait unread: it can't be told whether it is silent
        if session.heartbeat_receive_ms and now - self.last_received > session.heartbeat_receive_ms / 1000 * tolerance:
            silence = (
                f"no heart-beat for {now - self.last_received:.1f} s, {session.heartbeat_receive_ms} ms were agreed"
            )
            self.close(ProtocolError(silence))
            return
        due = session.heartbeat_send_ms and now - self.last_sent >= session.heartbeat_send_ms / 1000 * 0.5
        if due and not self._outbox_bytes:
            self._put(HEARTBEAT)
            self.last_sent = now
            self.flush()


def _key(event: Unsubscribe) -> str | None:
    """What names a subscription on its connection."""
    return event.id if event.id is not None else event.destination
