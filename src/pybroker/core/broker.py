"""The core: the whole broker as one synchronous, deterministic state machine (DESIGN.md sections 2-4 and 7).

Owns queues, topics, connections, consumers and transactions. Knows no clock, disk, socket or task: the caller sets
`now`, calls methods, and takes what they decided out of these lists:

    operations        what the store must keep; all of one turn go into one batch
    held              what may happen only when these (and all earlier ones) are committed, in order: deliveries (entries),
                      read requests, and whatever the caller added (`confirm`)
    instant           deliveries that wait for nothing
    spool_operations  the same as `operations`, for the spool of non-durable messages
    closing           consumers that must be closed, with the reason

Memory changes at once; nothing of `held` is shown before its commit. The journal's failure ends this object: a new one is
made from the store.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, tzinfo
from typing import Any

from pybroker.config import CompositeEntry, DeliveryPolicy, Limits, NetworkConfig, PolicyEntry, RoutingConfig
from pybroker.core import (
    browsing,
    mending,
    producers,
    publishing,
    retiring,
    room,
    schedules,
    settling,
    subscriptions,
    transactions,
    wildcard,
)
from pybroker.core.advisories import Advisories, announce_client, is_advisory
from pybroker.core.consumer import AUTO, CUMULATIVE, Connection, Consumer
from pybroker.core.entry import ENTRY_BYTES, SENT, Entry
from pybroker.core.expiries import Expiries
from pybroker.core.idle import Idle
from pybroker.core.kinds import DELETED, QUEUE, SUBSCRIPTION
from pybroker.core.links import Links
from pybroker.core.message_keys import MARK, MessageKeys
from pybroker.core.message_keys import PREFIX as KEY
from pybroker.core.producers import Producer, Producers
from pybroker.core.publishing import Topic
from pybroker.core.queue import Queue
from pybroker.core.reads import PageRequest
from pybroker.core.recovery import Recovery
from pybroker.core.redelivery import Redeliveries
from pybroker.core.routing import Routing
from pybroker.core.schedule_headers import PREFIX
from pybroker.core.schedules import Schedules
from pybroker.core.shared import SharedBodies
from pybroker.core.temporary import Temporaries
from pybroker.core.topics import SubscriptionTree
from pybroker.core.wildcard import Wildcards
from pybroker.destination import TEMPORARY_KINDS, Destination, parse_destination
from pybroker.errors import (
    BrokerError,
    InvalidDestination,
    InvalidMessage,
    LimitExceeded,
    UnknownDelivery,
)
from pybroker.message import PRIORITY_MAX, Message, mentions
from pybroker.operations import (
    DELETE_MESSAGE,
    PUT_MESSAGE,
    PUT_PRODUCER,
    PUT_QUEUE,
    PUT_SCHEDULING,
    Operation,
    PeerRecord,
    ProducerRecord,
    QueueRecord,
    SchedulingRecord,
    StoredEntry,
)
from pybroker.policies import Policies

ROUTES_MAX = 10_000  # topic names whose subscribers are remembered


class Core:
    """The state machine. Ids of queues and bodies from `first_id` on were never used in the store, in no life of it."""

    def __init__(
        self,
        limits: Limits,
        delivery: DeliveryPolicy,
        *,
        first_id: int,
        id_prefix: str,
        records: Iterable[QueueRecord] = (),
        producers: Iterable[ProducerRecord] = (),
        peers: Iterable[PeerRecord] = (),
        now: int = 0,
        network: NetworkConfig | None = None,
        network_name: str = "",
        life: str = "",
        policies: Iterable[PolicyEntry] = (),
        scheduling: SchedulingRecord = SchedulingRecord(),  # noqa: B008  (frozen)
        zone: tzinfo = UTC,
        routing: RoutingConfig | None = None,
        composites: Iterable[CompositeEntry] = (),
    ) -> None:
        self.limits = limits
        self.delivery = delivery
        self.policies = Policies(policies, limits, delivery)
        self.recovery = Recovery(self)
        self.limits_destinations = room.limits_destinations(self.policies)
        self.blocks_topics = room.blocks_topics(self.policies)
        self.now = now  # milliseconds since the Unix epoch, set by the caller before each turn
        self.operations: list[Operation] = []
        self.spool_operations: list[Operation] = []
        self.held: list[Any] = []
        self.instant: list[Entry] = []
        self.closing: list[tuple[Consumer, BrokerError]] = []
        # what this turn has taken beyond one for each message or request, in messages; reset by the caller
        self.work = 0
        self.freed = False  # room was made since the caller last looked
        self.memory_bytes = 0  # messages and entries in memory
        self.stored_bytes = 0  # messages in the store
        self.spooled_bytes = 0  # messages in the spool
        self.spooled = 0  # how many these are
        self.disk_full = ""  # why the disk has no room, as the caller found it; "" when it has
        self.page_below = max(limits.window_messages_max // 2, 1)  # a window below this asks for its next page
        self.expiries = Expiries()
        self.redeliveries = Redeliveries(self)
        self.shared = SharedBodies()
        self.due_removed: set[tuple[int, int]] | None = None  # (queue id, order) that went while the index is read
        self.connections: dict[Connection, None] = {}
        self.queues: dict[int, Queue] = {}
        self.expiring: set[int] = set()  # ids of queues whose expired messages are dead letters
        self.unrouted = 0  # messages to topics that nobody subscribes to
        self.expired_on_arrival = 0
        self._id_prefix = id_prefix.encode()
        self._last_message = 0
        self._quiet = False  # nothing is handed out any more
        self._last_id = first_id - 1
        self.dirty: list[Queue | Producer | Schedules] = []  # those whose record in the store is out of date
        self.group_names = 0  # message groups that have an owner, by name
        self.duplicates = 0  # sends that were stored before, and were not stored again
        producers = list(producers)
        self.producers = Producers(self, (each for each in producers if not each.producer_id.startswith(KEY)))
        self.message_keys = MessageKeys(self, (each for each in producers if each.producer_id.startswith(KEY)))
        self.by_destination: dict[str, Queue] = {}
        self.subscriptions: dict[tuple[str, str], Queue] = {}
        self._topics: dict[str, Topic] = {}
        self._tree: SubscriptionTree[Queue] = SubscriptionTree()
        self.temporaries = Temporaries(self)
        self.wildcards = Wildcards(self)
        self.advisories = Advisories(self, id_prefix)
        self.watched = False  # somebody subscribes to advisories
        self._shrink_next: list[int] = []
        self.dead_letters = parse_destination(delivery.dead_letter_queue)
        if self.dead_letters.kind != QUEUE or self.dead_letters.is_pattern:
            raise InvalidDestination(f"dead_letter_queue {delivery.dead_letter_queue!r} must be one /queue/NAME")
        self.routing = Routing(self, routing or RoutingConfig(), composites)
        self.links = Links(self, network_name, network, life)
        for record in records:
            self._restore(record)
        self.links.restore(peers)
        self.schedules = Schedules(self, scheduling, zone)
        self.idle = Idle(self)

    def _restore(self, record: QueueRecord) -> None:
        queue = Queue(self, record)
        self.queues[queue.queue_id] = queue
        self.stored_bytes += queue.size
        if queue.kind == QUEUE:
            self.by_destination[f"/queue/{queue.name}"] = queue
            self.routing.added(queue, Destination(QUEUE, queue.name))
        elif queue.kind == SUBSCRIPTION:
            self.subscriptions[queue.client_id, queue.subscription] = queue
            self.route(queue)
        elif queue.kind == DELETED:
            queue.empty()

    # ---- what the caller takes

    def seal(self) -> list[Operation]:
        """The records that changed since the last call: to be asked when a batch is closed, and to go into it."""
        operations: list[Operation] = []
        for each in self.dirty:
            each.dirty = False
            operations.append((_RECORDS[each.__class__], each.record()))
        self.dirty.clear()
        return operations

    def touch(self, queue: Queue) -> None:
        """Note that a queue's descriptor must be written with the open batch."""
        queue.dirty = True
        self.dirty.append(queue)

    # ---- connections and consumers

    def connect(self, sink: Any, client_id: str = "") -> Connection:
        connection = Connection(sink, client_id)
        self.connections[connection] = None
        return connection

    def disconnect(self, connection: Connection) -> None:
        """End a connection: transactions are aborted, and unacknowledged messages return to their places."""
        if connection.closed:
            return
        connection.closed = True
        self.connections.pop(connection, None)
        for name in list(connection.transactions):
            self.abort(connection, name)
        for consumer in list(connection.consumers):
            self.unsubscribe(consumer)
        if connection.temporaries:
            self.temporaries.disconnected(connection)
        if self.watched:
            self.advisories.gone(connection)

    announce = announce_client

    # consumers: see subscriptions.py

    subscribe = subscriptions.subscribe
    start = subscriptions.start
    unsubscribe = subscriptions.unsubscribe
    remove_subscription = subscriptions.remove_subscription
    deleted = subscriptions.deleted

    def pause(self, connection: Connection, slow: bool = True) -> None:
        """Give nothing more to a connection: its outbox is full (or, with `slow` False, it is given nothing for another reason)."""
        if not connection.paused:
            connection.paused = True
            for consumer in connection.consumers:
                consumer.rest()
            if self.watched and slow:
                for consumer in connection.consumers:
                    for part in consumer.parts:
                        self.advisories.slow_consumer(part)

    def pause_all(self) -> None:
        """Hand out nothing more, for good: what is out stays out, and comes back as redelivered where the store goes on."""
        self._quiet = True
        for connection in self.connections:
            self.pause(connection, slow=False)

    def resume(self, connection: Connection) -> None:
        if connection.paused and not self._quiet:
            connection.paused = False
            for consumer in list(connection.consumers):
                consumer.go_on()

    # ---- queues and topics

    def queue(self, target: Destination) -> Queue:
        """The queue of that name, made when there is none."""
        queue = self.by_destination.get(str(target))
        if queue is None:
            self.check_destinations()
            queue = self.add_named_queue(target)
        return queue

    def add_named_queue(self, target: Destination) -> Queue:
        """The queue of that name, which is not there, whatever `destinations_max` says."""
        queue = self.by_destination[str(target)] = self.add_queue(QUEUE, target.name, "", "")
        self.links.route(queue)
        self.routing.added(queue, target)
        if self.routing.topic_of(target) is not None:  # it collects from now on: also after a crash, while it is empty
            self.touch(queue)
        self.wildcards.added(queue)
        return queue

    def new_queue(self, kind: str, name: str, client_id: str = "", subscription: str = "", selector: str = "") -> Queue:
        self.check_destinations()
        return self.add_queue(kind, name, client_id, subscription, selector)

    def check_destinations(self) -> None:
        """Raise LimitExceeded when no more queues may be made."""
        limit = self.limits.destinations_max
        if len(self.queues) >= limit:
            raise LimitExceeded("limits.destinations_max", limit, "too many queues and subscriptions")

    def add_queue(self, kind: str, name: str, client_id: str, subscription: str, selector: str = "") -> Queue:
        queue = Queue(self, QueueRecord(self.new_id(), kind, name, client_id, subscription, selector=selector))
        self.queues[queue.queue_id] = queue
        return queue

    def new_id(self) -> int:
        """A number for a queue or body that was never used."""
        self._last_id += 1
        return self._last_id

    def forget_topics(self) -> None:
        """The subscribers of topics have changed, here or elsewhere."""
        self._topics.clear()

    def route(self, queue: Queue) -> None:
        self._tree.add(tuple(queue.name.split(".")), queue)
        self._topics.clear()
        self.advisories.route(queue)

    def unroute(self, queue: Queue) -> None:
        self._tree.remove(tuple(queue.name.split(".")), queue)
        self._topics.clear()
        self.advisories.unroute(queue)

    def _target(self, text: str) -> Queue | Topic | Temporaries | None:
        """Where a message goes; None for one that goes by `Routing.send`."""
        if "," in text:
            return None
        place = self.routing.place(text)
        target = place.target
        if target.kind == QUEUE:
            return None if place.spreads else self.queue(target)
        if target.kind in TEMPORARY_KINDS:
            return self.temporaries
        return self.topic(target)

    def topic(self, target: Destination) -> Topic:
        text = str(target)
        topic = self._topics.get(text)
        if topic is None:
            if len(self._topics) >= ROUTES_MAX:
                self._topics.clear()
            routing = self.routing
            topic = Topic(
                self._tree.match(target.parts),
                self.links.origins_of(target),
                routing.collecting(target),
                routing.concerns(target),
                self.recovery.policy_of(target),
            )
            if not is_advisory(target):  # `send` takes what is remembered for a name that may be sent to
                self._topics[text] = topic
        return topic

    # ---- sending

    def check(self, message: Message) -> None:
        """Raise what `send` would raise, and make nothing (transactions check before they collect)."""
        if not 0 <= message.priority <= PRIORITY_MAX:
            raise InvalidMessage(f"priority must be 0 to {PRIORITY_MAX}, not {message.priority}")
        self.check_destination(message.destination)
        if mentions(message.header_block, PREFIX):
            self.schedules.check(message)

    def check_destination(self, text: str) -> None:
        """Raise what sending to it would raise, `LimitExceeded` apart."""
        queue = self.by_destination.get(text)
        if queue is None or queue.spread:
            self.routing.check(text)

    def send(self, message: Message) -> bool:
        """Take a new message; True when the store will keep it. Raises InvalidDestination, InvalidMessage, LimitExceeded."""
        if not 0 <= message.priority <= PRIORITY_MAX:
            raise InvalidMessage(f"priority must be 0 to {PRIORITY_MAX}, not {message.priority}")
        block = message.header_block
        if block:
            if mentions(block, MARK) and (stored := self.message_keys.take(message)) is not None:
                return stored
            if mentions(block, PREFIX) and (stored := self.schedules.take(message)) is not None:
                return stored
        text = message.destination
        target = self.by_destination.get(text) or self._topics.get(text) or self._target(text)
        if not message.message_id:  # a producer may have given it one
            self._last_message += 1  # `new_message_id` without its call
            message.message_id = b"%b%x" % (self._id_prefix, self._last_message)
        message.timestamp = self.now
        if target is None or target.spread:
            return self.routing.send(message)
        expires = message.expires
        if expires and expires <= self.now:
            return self.expire_on_arrival(message)
        if target.__class__ is Queue:
            target.accept(message)
            return message.durable
        if target.__class__ is Topic:
            return self.publish_to(message, target)
        self.temporaries.send(message)
        return False

    def new_message_id(self) -> bytes:
        self._last_message += 1
        return b"%b%x" % (self._id_prefix, self._last_message)

    # ---- topics: see publishing.py

    publish = publishing.publish
    publish_for = publishing.publish_for
    publish_to = publishing.publish_to

    send_once = producers.send_once

    # ---- room: see room.py

    crowded = property(room.crowded)
    full = room.full
    full_broker = room.full_broker
    full_destinations = room.full_destinations
    trim = staticmethod(room.trim)
    trims = staticmethod(room.trims)

    def shrink(self) -> None:
        """Leave windows to the store and the spool until memory is a tenth below its limit; nobody's order changes."""
        goal = self.limits.memory_bytes_max * 9 // 10
        for _ in range(len(self.queues)):
            if self.memory_bytes <= goal:
                return
            if not self._shrink_next:
                self._shrink_next = list(self.queues)
            queue = self.queues.get(self._shrink_next.pop())
            if queue is not None and len(queue.window) > 1:
                queue.shrink(1, 0)

    # ---- settling

    def delivery_of(self, consumer: Consumer, tag: int) -> Entry:
        """The delivery with that tag; UnknownDelivery when it is not outstanding."""
        entry = consumer.unacked.get(tag)
        if entry is None or entry.state != SENT or consumer.ack_mode == AUTO:
            raise UnknownDelivery(
                f"no delivery {tag} is outstanding on this subscription: it was acknowledged or rejected before, or never made"
            )
        return entry

    def up_to(self, consumer: Consumer, entry: Entry) -> list[Entry]:
        """The deliveries that one settlement is for."""
        if consumer.ack_mode != CUMULATIVE:
            return [entry]
        found = []
        for tag, other in consumer.unacked.items():
            if tag > entry.tag:
                break
            found.append(other)
        return found

    def acknowledge(self, consumer: Consumer, tag: int, transaction: str | None = None) -> None:
        """The consumer is done with a delivery (CUMULATIVE: and all before it). Raises UnknownDelivery, TransactionError."""
        entry = self.delivery_of(consumer, tag)
        if transaction is not None:
            self.settle_later(consumer, self.up_to(consumer, entry), transaction, True)
            return
        if consumer.members is not None:
            settling.acknowledge_each(self.up_to(consumer, entry))
            return
        queue = entry.queue
        if consumer.ack_mode == CUMULATIVE:
            for each in self.up_to(consumer, entry):
                queue.settle(each)
                queue.remove(each)
                queue.counts.acknowledged += 1
        else:
            queue.settle(entry)
            queue.remove(entry)
            queue.counts.acknowledged += 1
        if queue.available:
            queue.dispatch()

    def reject(self, consumer: Consumer, tag: int, transaction: str | None = None) -> None:
        """The consumer can't use a delivery: it goes back to its place, or to the dead letters after the last try."""
        entry = self.delivery_of(consumer, tag)
        entries = self.up_to(consumer, entry)
        if transaction is not None:
            self.settle_later(consumer, entries, transaction, False)
            return
        if consumer.members is not None:
            wildcard.reject(consumer, entries)
            return
        queue = entry.queue
        for each in entries:
            queue.settle(each)
        queue.put_back(entries)
        queue.dispatch()

    def taken(self, entries: list[Entry]) -> None:
        """The transport took deliveries of AUTO consumers: they are acknowledged."""
        settling.acknowledge_each([entry for entry in entries if entry.state == SENT])

    # ---- transactions: see transactions.py

    begin = transactions.begin
    send_later = transactions.send_later
    settle_later = transactions.settle_later
    commit = transactions.commit
    transact = transactions.transact
    abort = transactions.abort

    # ---- many settlements at a time: see settling.py

    acknowledge_ranges = settling.acknowledge_ranges
    reject_ranges = settling.reject_ranges
    outstanding = settling.outstanding
    set_prefetch = settling.set_prefetch

    # ---- dead letters and expiry: see retiring.py

    dead_letter_due = retiring.dead_letter_due
    dead_letter = retiring.dead_letter
    expire = retiring.expire
    expire_on_arrival = retiring.expire_on_arrival
    expire_held = retiring.expire_held
    sweep = retiring.sweep
    due_loaded = retiring.due_loaded

    # ---- looking into queues, and moving what is there: see browsing.py

    browse = browsing.browse
    moving = browsing.moving
    browse_loaded = browsing.browse_loaded

    # ---- messages that are sent later: see schedules.py

    release_due = schedules.release_due

    # ---- whole values for bad ones: see mending.py

    mend = mending.mend
    messages_mended = mending.messages_mended

    # ---- memory, spool, pages (called by queues)

    def hold(self, entry: Entry) -> None:
        """Count an entry that memory has now."""
        message = entry.message
        if not message.holders:
            self.memory_bytes += message.size
        message.holders += 1
        self.memory_bytes += ENTRY_BYTES
        if entry.shared is not None:
            self.shared.hold(entry.shared)

    def let_go(self, entry: Entry) -> None:
        """Uncount an entry that leaves memory."""
        message = entry.message
        message.holders -= 1
        if not message.holders:
            self.memory_bytes -= message.size
        self.memory_bytes -= ENTRY_BYTES
        if entry.shared is not None:
            self.shared.let_go(entry.shared)

    def spool(self, entry: Entry) -> None:
        """Write a non-durable entry to the spool."""
        entry.spooled = True
        self.count_spooled(entry.queue, 1, entry.message.size)
        self.spool_operations.append((PUT_MESSAGE, entry.queue.queue_id, entry.order, entry.message))

    def count_spooled(self, queue: Queue, count: int, size: int) -> None:
        queue.spooled += count
        queue.spooled_size += size
        self.spooled += count
        self.spooled_bytes += size

    def unspool(self, entry: Entry) -> None:
        """Remove an entry from the spool."""
        self.count_spooled(entry.queue, -1, -entry.message.size)
        operation = (DELETE_MESSAGE, entry.queue.queue_id, entry.order, entry.message.expires, entry.recorded)
        self.spool_operations.append(operation)

    def read_page(self, page: PageRequest) -> None:
        self.shared.read_began()
        self.held.append(page)

    def page_loaded(
        self,
        page: PageRequest,
        stored: list[StoredEntry],
        transient: list[StoredEntry],
        bound: int | None,
        unread: Iterable[int] = (),
        mended: Iterable[tuple[int, Operation]] = (),
    ) -> None:
        """Take what was read for a request: all ready messages from its start on and below `bound` (None = to the end).

        See `Queue.page_loaded` for orders that could not be read, and for operations that mend the store.
        """
        queue = page.queue
        if queue.queue_id in self.queues:
            queue.page_loaded(stored, transient, bound, unread, mended)
        self.shared.read_ended()

    def confirm(self, token: Any) -> None:
        """Let the caller know, by `token` in the held effects, when everything emitted so far is committed."""
        self.held.append(token)


_RECORDS = {Queue: PUT_QUEUE, Producer: PUT_PRODUCER, Schedules: PUT_SCHEDULING}  # what is written for each of `dirty`
