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
from typing import Any

from pybroker.config import DeliveryPolicy, Limits
from pybroker.core.consumer import ACK_MODES, AUTO, CUMULATIVE, Connection, Consumer, Transaction
from pybroker.core.entry import ENTRY_BYTES, SENT, SETTLING, Entry
from pybroker.core.expiries import Expiries
from pybroker.core.queue import BACKLOG, DELETED, QUEUE, SUBSCRIPTION, Queue
from pybroker.core.reads import DueRequest, PageRequest
from pybroker.core.shared import SharedBodies
from pybroker.core.topics import SubscriptionTree
from pybroker.destination import Destination, parse_destination
from pybroker.errors import (
    BrokerError,
    BrokerFull,
    InvalidDestination,
    InvalidMessage,
    LimitExceeded,
    SlowConsumer,
    SubscriptionError,
    TransactionError,
    UnknownDelivery,
)
from pybroker.message import PRIORITY_MAX, Message, encode_headers
from pybroker.operations import (
    DELETE_MESSAGE,
    DELETE_QUEUE,
    PUT_BODY,
    PUT_MESSAGE,
    PUT_QUEUE,
    DueEntry,
    Operation,
    QueueRecord,
    StoredEntry,
)

DUE_ROWS_MAX = 1_000  # rows of the expiry index that one sweep reads at a time
ROUTES_MAX = 10_000  # topic names whose subscribers are remembered


class Topic:
    """The subscribers that one topic name has at present."""

    __slots__ = ("durable", "subscribers")

    def __init__(self, subscribers: list[Queue]) -> None:
        self.subscribers = subscribers
        self.durable = sum(queue.kind == SUBSCRIPTION for queue in subscribers)


class Core:
    """The state machine. `incarnation` is a number that no earlier life of the store has had (ids are made of it)."""

    def __init__(
        self,
        limits: Limits,
        delivery: DeliveryPolicy,
        *,
        incarnation: int,
        id_prefix: str,
        records: Iterable[QueueRecord] = (),
        now: int = 0,
    ) -> None:
        self.limits = limits
        self.delivery = delivery
        self.now = now  # milliseconds since the Unix epoch, set by the caller before each turn
        self.operations: list[Operation] = []
        self.spool_operations: list[Operation] = []
        self.held: list[Any] = []
        self.instant: list[Entry] = []
        self.closing: list[tuple[Consumer, BrokerError]] = []
        self.freed = False  # room was made since the caller last looked
        self.memory_bytes = 0  # messages and entries in memory
        self.stored_bytes = 0  # messages in the store
        self.spooled_bytes = 0  # messages in the spool
        self.spooled = 0  # how many these are
        self.disk_full = ""  # why the disk has no room, as the caller found it; "" when it has
        self.page_below = max(limits.window_messages_max // 2, 1)  # a window below this asks for its next page
        self.expiries = Expiries()
        self.shared = SharedBodies()
        self.due_removed: set[tuple[int, int]] | None = None  # (queue id, order) that went while the index is read
        self.connections: set[Connection] = set()
        self.queues: dict[int, Queue] = {}
        self.unrouted = 0  # messages to topics that nobody subscribes to
        self.expired_on_arrival = 0
        self._incarnation = incarnation
        self._id_prefix = id_prefix.encode()
        self._last_message = 0
        self._last_id = incarnation << 32
        self._dirty: list[Queue] = []
        self._by_destination: dict[str, Queue] = {}
        self._subscriptions: dict[tuple[str, str], Queue] = {}
        self._topics: dict[str, Topic] = {}
        self._tree: SubscriptionTree[Queue] = SubscriptionTree()
        self._shrink_next: list[int] = []
        self._dead_letters = parse_destination(delivery.dead_letter_queue)
        if self._dead_letters.kind != QUEUE or self._dead_letters.is_pattern:
            raise InvalidDestination(f"dead_letter_queue {delivery.dead_letter_queue!r} must be one /queue/NAME")
        for record in records:
            self._restore(record)

    def _restore(self, record: QueueRecord) -> None:
        queue = Queue(self, record)
        self.queues[queue.queue_id] = queue
        self.stored_bytes += queue.size
        if queue.kind == QUEUE:
            self._by_destination[f"/queue/{queue.name}"] = queue
        elif queue.kind == SUBSCRIPTION:
            self._subscriptions[queue.client_id, queue.subscription] = queue
            self._tree.add(tuple(queue.name.split(".")), queue)
        else:
            queue.empty()

    # ---- what the caller takes

    def seal(self) -> list[Operation]:
        """The descriptors that changed since the last call: to be asked when a batch is closed, and to go into it."""
        operations: list[Operation] = []
        for queue in self._dirty:
            queue.dirty = False
            operations.append((PUT_QUEUE, queue.record()))
        self._dirty.clear()
        return operations

    def touch(self, queue: Queue) -> None:
        """Note that a queue's descriptor must be written with the open batch."""
        queue.dirty = True
        self._dirty.append(queue)

    # ---- connections and consumers

    def connect(self, sink: Any, client_id: str = "") -> Connection:
        connection = Connection(sink, client_id)
        self.connections.add(connection)
        return connection

    def disconnect(self, connection: Connection) -> None:
        """End a connection: transactions are aborted, and unacknowledged messages return to their places."""
        if connection.closed:
            return
        connection.closed = True
        self.connections.discard(connection)
        for name in list(connection.transactions):
            self.abort(connection, name)
        for consumer in list(connection.consumers):
            self.unsubscribe(consumer)

    def subscribe(
        self,
        connection: Connection,
        destination: str,
        ack_mode: str,
        *,
        prefetch: int | None = None,
        durable_name: str | None = None,
        client_id: str | None = None,
        context: Any = None,
    ) -> Consumer:
        """Make a consumer of a queue or topic; what is ready is dispatched by `start`.

        `durable_name` (with a client id) makes a durable subscription of a topic, or takes up the one that is there.
        Raises SubscriptionError, InvalidDestination, LimitExceeded.
        """
        limits = self.limits
        if len(connection.consumers) >= limits.subscriptions_max:
            raise LimitExceeded("limits.subscriptions_max", limits.subscriptions_max, "too many subscriptions")
        if ack_mode not in ACK_MODES:
            raise SubscriptionError(f"acknowledgement mode {ack_mode!r} is not one of {', '.join(ACK_MODES)}")
        if prefetch is None:
            prefetch = limits.prefetch_default
        elif prefetch < 1:
            raise SubscriptionError(f"prefetch must be at least 1, not {prefetch}")
        prefetch = min(prefetch, limits.prefetch_max)
        target = parse_destination(destination)
        if target.kind == QUEUE:
            if durable_name is not None:
                raise SubscriptionError(
                    f"a durable subscription is for a topic; {destination} keeps its messages anyway"
                )
            if target.is_pattern:
                raise InvalidDestination(f"{destination} is a pattern: only topics can be subscribed to by pattern")
            queue = self.queue(target)
        elif durable_name is not None:
            queue = self._durable_subscription(target, client_id or connection.client_id, durable_name)
        else:
            queue = self._new_queue(BACKLOG, target.name)
            self._route(queue)
        consumer = Consumer(connection, queue, ack_mode, prefetch, limits.prefetch_bytes_max, context)
        connection.consumers.add(consumer)
        queue.consumers.add(consumer)
        return consumer

    def start(self, consumer: Consumer) -> None:
        """Let a new consumer take part in the dispatch (apart from `subscribe`, so that the caller can prepare for it)."""
        consumer.queue.list_consumer(consumer)
        consumer.queue.dispatch()

    def _durable_subscription(self, target: Destination, client_id: str, name: str) -> Queue:
        if not client_id:
            raise SubscriptionError(f"durable subscription {name!r} needs a client id: give one when you connect")
        queue = self._subscriptions.get((client_id, name))
        if queue is None:
            queue = self._new_queue(SUBSCRIPTION, target.name, client_id, name)
            self._subscriptions[client_id, name] = queue
            self._route(queue)
            self.touch(queue)
        elif queue.name != target.name:
            raise SubscriptionError(
                f"durable subscription {name!r} of client {client_id!r} is for /topic/{queue.name}: "
                "unsubscribe it first, or use another name"
            )
        elif queue.consumers:
            raise SubscriptionError(f"durable subscription {name!r} of client {client_id!r} is in use")
        return queue

    def unsubscribe(self, consumer: Consumer) -> None:
        """End a consumer: its unacknowledged messages return. A durable subscription goes on collecting."""
        queue = consumer.queue
        if consumer not in queue.consumers:
            return
        queue.unlist_consumer(consumer)
        queue.consumers.discard(consumer)
        consumer.connection.consumers.discard(consumer)
        entries = list(consumer.unacked.values())
        consumer.unacked.clear()
        consumer.credit = 0
        if queue.kind == BACKLOG:
            self._drop_backlog(queue, entries)
        else:
            queue.put_back(entries)
            queue.dispatch()

    def remove_subscription(self, client_id: str, name: str) -> None:
        """Delete a durable subscription and what it has collected. Its consumer must have left."""
        queue = self._subscriptions.get((client_id, name))
        if queue is None:
            raise SubscriptionError(f"there is no durable subscription {name!r} of client {client_id!r}")
        if queue.consumers:
            raise SubscriptionError(f"durable subscription {name!r} of client {client_id!r} is in use")
        del self._subscriptions[client_id, name]
        self._unroute(queue)
        queue.kind = DELETED
        self.touch(queue)
        queue.empty()

    def deleted(self, queue: Queue) -> None:
        """The last message of a deleted subscription is gone."""
        if self.queues.pop(queue.queue_id, None) is not None:
            if queue.dirty:
                self._dirty.remove(queue)
            queue.dirty = True  # never again
            self.operations.append((DELETE_QUEUE, queue.queue_id))

    def _drop_backlog(self, queue: Queue, entries: list[Entry]) -> None:
        self._unroute(queue)
        for entry in [*entries, *queue.window, *(queue.page.added.values() if queue.page else ())]:
            queue.outstanding.pop(entry.order, None)
            queue.forget(entry)
        del self.queues[queue.queue_id]
        if queue.spooled:
            self._count_spooled(queue, -queue.spooled, -queue.spooled_size)
            self.spool_operations.append((DELETE_QUEUE, queue.queue_id))

    def pause(self, connection: Connection) -> None:
        """Give nothing more to a connection whose outbox is full."""
        if not connection.paused:
            connection.paused = True
            for consumer in connection.consumers:
                consumer.queue.unlist_consumer(consumer)

    def resume(self, connection: Connection) -> None:
        if connection.paused:
            connection.paused = False
            for consumer in list(connection.consumers):
                consumer.queue.list_consumer(consumer)
                consumer.queue.dispatch()

    # ---- queues and topics

    def queue(self, target: Destination) -> Queue:
        """The queue of that name, made when there is none."""
        queue = self._by_destination.get(str(target))
        if queue is None:
            queue = self._new_queue(QUEUE, target.name)
            self._by_destination[str(target)] = queue
        return queue

    def _new_queue(self, kind: str, name: str, client_id: str = "", subscription: str = "") -> Queue:
        limit = self.limits.destinations_max
        if len(self.queues) >= limit:
            raise LimitExceeded("limits.destinations_max", limit, "too many queues and subscriptions")
        return self._add_queue(kind, name, client_id, subscription)

    def _add_queue(self, kind: str, name: str, client_id: str, subscription: str) -> Queue:
        queue = Queue(self, QueueRecord(self._new_id(), kind, name, client_id, subscription))
        self.queues[queue.queue_id] = queue
        return queue

    def _new_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _route(self, queue: Queue) -> None:
        self._tree.add(tuple(queue.name.split(".")), queue)
        self._topics.clear()

    def _unroute(self, queue: Queue) -> None:
        self._tree.remove(tuple(queue.name.split(".")), queue)
        self._topics.clear()

    def _target(self, text: str) -> Queue | Topic:
        target = parse_destination(text)
        if target.is_pattern:
            raise InvalidDestination(f"{text} is a pattern: a message is sent to one name")
        if target.kind == QUEUE:
            return self.queue(target)
        if len(self._topics) >= ROUTES_MAX:
            self._topics.clear()
        topic = self._topics[text] = Topic(self._tree.match(target.parts))
        return topic

    # ---- sending

    def check(self, message: Message) -> None:
        """Raise what `send` would raise, and make nothing (transactions check before they collect)."""
        if not 0 <= message.priority <= PRIORITY_MAX:
            raise InvalidMessage(f"priority must be 0 to {PRIORITY_MAX}, not {message.priority}")
        if message.destination not in self._by_destination:
            target = parse_destination(message.destination)
            if target.is_pattern:
                raise InvalidDestination(f"{message.destination} is a pattern: a message is sent to one name")

    def send(self, message: Message) -> bool:
        """Take a new message; True when the store will keep it. Raises InvalidDestination, InvalidMessage, LimitExceeded."""
        if not 0 <= message.priority <= PRIORITY_MAX:
            raise InvalidMessage(f"priority must be 0 to {PRIORITY_MAX}, not {message.priority}")
        text = message.destination
        target = self._by_destination.get(text) or self._topics.get(text) or self._target(text)
        self._last_message += 1
        message.message_id = b"%b%x" % (self._id_prefix, self._last_message)
        message.timestamp = self.now
        expires = message.expires
        if expires and expires <= self.now:
            self.expired_on_arrival += 1
            return False
        if target.__class__ is Queue:
            target.accept(message)
            return message.durable
        assert isinstance(target, Topic)
        return self._publish(message, target)

    def _publish(self, message: Message, topic: Topic) -> bool:
        subscribers = topic.subscribers
        if not subscribers:
            self.unrouted += 1
            return False
        shared = None
        if topic.durable > 1 and message.durable:
            shared = self.shared.create(self._new_id(), topic.durable)
            self.shared.hold(shared)
            self.operations.append((PUT_BODY, shared.body_id, message, topic.durable))
        for queue in subscribers:
            if queue.kind == SUBSCRIPTION:
                queue.accept(message, shared if message.durable else None)
            else:
                queue.accept(message)
                if queue.transient > self.limits.backlog_messages_max:
                    self._overrun(queue)
        if shared is not None:
            self.shared.let_go(shared)
        return message.durable and topic.durable > 0

    def _overrun(self, queue: Queue) -> None:
        """A plain subscriber of a topic is too far behind: it is told so and closed, rather than silently losing some."""
        limit = self.limits.backlog_messages_max
        for consumer in queue.consumers:
            text = f"subscription to /topic/{queue.name} is {limit} messages behind (limit limits.backlog_messages_max)"
            self.closing.append((consumer, SlowConsumer(text + ": read faster, or make it durable")))

    def full(self, message: Message) -> BrokerFull | None:
        """Why there is no room for the message now, or None when there is. Makes room where it can."""
        limits = self.limits
        if self.disk_full:
            return BrokerFull(self.disk_full)
        if self.memory_bytes > limits.memory_bytes_max:
            self.shrink()
            if self.memory_bytes > limits.memory_bytes_max:
                return _full("limits.memory_bytes_max", limits.memory_bytes_max)
        if limits.store_bytes_max and self.stored_bytes + self.spooled_bytes > limits.store_bytes_max:
            return _full("limits.store_bytes_max", limits.store_bytes_max)
        if limits.queue_messages_max:
            queue = self._by_destination.get(message.destination)
            if queue is not None and queue.depth >= limits.queue_messages_max:
                return _full("limits.queue_messages_max", limits.queue_messages_max)
        return None

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

    def _up_to(self, consumer: Consumer, entry: Entry) -> list[Entry]:
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
            self._settle_later(consumer, self._up_to(consumer, entry), transaction, True)
            return
        queue = entry.queue
        for each in self._up_to(consumer, entry) if consumer.ack_mode == CUMULATIVE else (entry,):
            queue.settle(each)
            queue.remove(each)
            queue.counts.acknowledged += 1
        if queue.available:
            queue.dispatch()

    def reject(self, consumer: Consumer, tag: int, transaction: str | None = None) -> None:
        """The consumer can't use a delivery: it goes back to its place, or to the dead letters after the last try."""
        entry = self.delivery_of(consumer, tag)
        entries = self._up_to(consumer, entry)
        if transaction is not None:
            self._settle_later(consumer, entries, transaction, False)
            return
        queue = entry.queue
        for each in entries:
            queue.settle(each)
        queue.put_back(entries)
        queue.dispatch()

    def taken(self, entries: list[Entry]) -> None:
        """The transport took deliveries of AUTO consumers: they are acknowledged."""
        queues: dict[Queue, None] = {}
        for entry in entries:
            if entry.state == SENT:
                queue = entry.queue
                queue.settle(entry)
                queue.remove(entry)
                queue.counts.acknowledged += 1
                queues[queue] = None
        for queue in queues:
            if queue.available:
                queue.dispatch()

    # ---- transactions

    def begin(self, connection: Connection, name: str) -> None:
        limits = self.limits
        if name in connection.transactions:
            raise TransactionError(f"transaction {name!r} is open already")
        if len(connection.transactions) >= limits.transactions_max:
            raise LimitExceeded("limits.transactions_max", limits.transactions_max, "too many open transactions")
        connection.transactions[name] = Transaction()

    def _transaction(self, connection: Connection, name: str) -> Transaction:
        try:
            return connection.transactions[name]
        except KeyError:
            raise TransactionError(f"transaction {name!r} is not open: BEGIN it first") from None

    def _check_transaction(self, transaction: Transaction, count: int, size: int) -> None:
        limits = self.limits
        if transaction.count + count > limits.transaction_messages_max:
            raise LimitExceeded(
                "limits.transaction_messages_max", limits.transaction_messages_max, "too many messages in a transaction"
            )
        if transaction.size + size > limits.transaction_bytes_max:
            raise LimitExceeded(
                "limits.transaction_bytes_max", limits.transaction_bytes_max, "too many bytes in a transaction"
            )

    def send_later(self, connection: Connection, message: Message, name: str) -> None:
        """Send within a transaction."""
        transaction = self._transaction(connection, name)
        self.check(message)
        self._check_transaction(transaction, 1, message.size)
        transaction.messages.append(message)
        transaction.size += message.size
        self.memory_bytes += message.size

    def _settle_later(self, consumer: Consumer, entries: list[Entry], name: str, done: bool) -> None:
        transaction = self._transaction(consumer.connection, name)
        self._check_transaction(transaction, len(entries), sum(entry.message.size for entry in entries))
        queue = consumer.queue
        for entry in entries:
            queue.settle(entry)
            entry.state = SETTLING
            transaction.settled.append((entry, done))
            transaction.size += entry.message.size
        if queue.available:
            queue.dispatch()

    def commit(self, connection: Connection, name: str) -> None:
        """Do all that the transaction collected, in one turn and so in one batch. Raises TransactionError, BrokerFull."""
        transaction = self._transaction(connection, name)
        del connection.transactions[name]
        messages = transaction.messages
        self.memory_bytes -= sum(message.size for message in messages)
        new = {message.destination for message in messages} - self._by_destination.keys()
        if len(self.queues) + len(new) > self.limits.destinations_max and any(
            text.startswith("/queue/") for text in new
        ):
            self._give_back(transaction)
            limit = self.limits.destinations_max
            raise LimitExceeded("limits.destinations_max", limit, "too many queues; the transaction was aborted")
        queues: dict[Queue, list[Entry]] = {}
        for entry, done in transaction.settled:
            returning = queues.setdefault(entry.queue, [])
            if done:
                entry.queue.remove(entry)
                entry.queue.counts.acknowledged += 1
            else:
                returning.append(entry)
        for message in messages:
            self.send(message)
        self._return(queues)

    def abort(self, connection: Connection, name: str) -> None:
        """Forget the sends; acknowledged and rejected messages return to their places, marked as redelivered."""
        transaction = self._transaction(connection, name)
        del connection.transactions[name]
        self.memory_bytes -= sum(message.size for message in transaction.messages)
        self._give_back(transaction)

    def _give_back(self, transaction: Transaction) -> None:
        queues: dict[Queue, list[Entry]] = {}
        for entry, _ in transaction.settled:
            queues.setdefault(entry.queue, []).append(entry)
        self._return(queues)

    def _return(self, queues: dict[Queue, list[Entry]]) -> None:
        for queue, entries in queues.items():
            if queue.queue_id not in self.queues:  # a plain subscription that went with its consumer
                for entry in entries:
                    del queue.outstanding[entry.order]
                    queue.forget(entry)
                continue
            queue.put_back(entries)
            if queue.kind == DELETED:
                queue.empty()
            else:
                queue.dispatch()

    # ---- dead letters and expiry

    def dead_letter_due(self, entry: Entry) -> bool:
        limit = self.delivery.deliveries_max
        if not limit or entry.deliveries < limit:
            return False
        queue = entry.queue
        return not (queue.kind == QUEUE and queue.name == self._dead_letters.name)

    def dead_letter(self, entry: Entry, reason: str) -> None:
        """Move an entry, that stands in no collection of its queue, to the dead-letter queue."""
        queue = entry.queue
        queue.counts.dead_lettered += 1
        origin = [("dead-letter-origin", entry.message.destination)]
        if queue.kind == SUBSCRIPTION:
            origin.append(("dead-letter-subscription", f"{queue.client_id}/{queue.subscription}"))
        notes = [("dead-letter-reason", reason), ("dead-letter-deliveries", str(entry.deliveries))]
        letter = entry.message.moved_to(str(self._dead_letters), encode_headers([*origin, *notes]))
        queue.forget(entry)
        target = self._by_destination.get(letter.destination)
        if target is None:  # whatever `destinations_max` says: a dead letter must not be lost
            target = self._by_destination[letter.destination] = self._add_queue(QUEUE, self._dead_letters.name, "", "")
        target.accept(letter)

    def expire(self, entry: Entry) -> None:
        """Remove an expired entry that stands in no collection of its queue."""
        entry.queue.counts.expired += 1
        entry.queue.forget(entry)

    def sweep(self) -> None:
        """Remove what has expired by `now`; what the store's index knows is asked for."""
        for entry in self.expiries.due(self.now):
            self._expire_ready(entry.queue, entry.order)
        if self.due_removed is None:
            self.due_removed = set()
            self.shared.read_began()
            self.held.append(DueRequest(self.now, DUE_ROWS_MAX))

    def _expire_ready(self, queue: Queue, order: int) -> bool:
        """Expire a ready entry if memory has it; an outstanding one is looked at when it comes back."""
        entry = queue.window.discard(order)
        if entry is None and queue.page is not None:
            entry = queue.page.added.pop(order, None)
            if entry is not None:
                queue.page.added_size -= entry.message.size
        if entry is None:
            return order in queue.outstanding
        self.expire(entry)
        return True

    def due_loaded(self, request: DueRequest, rows: list[DueEntry], transient: list[DueEntry]) -> None:
        """Take what was read of the expiry index of the store and of the spool; ask for more where there is more."""
        removed = self.due_removed or set()
        self.due_removed = None
        for stored, found in ((True, rows), (False, transient)):
            for row in found:
                queue = self.queues.get(row.queue_id)
                if queue is None or (row.queue_id, row.order) in removed or self._expire_ready(queue, row.order):
                    continue
                if queue.tail is not None and row.order >= queue.tail:
                    self._expire_unloaded(queue, row, stored)
        self.shared.read_ended()
        if max(len(rows), len(transient)) >= request.count_max:
            # Behind the last row of the index that ended first: the other one's rows are met again, which does no harm.
            ends = [found[-1] for found in (rows, transient) if len(found) >= request.count_max]
            last = min((row.expires, row.queue_id, row.order) for row in ends)
            self.due_removed = set()
            self.shared.read_began()
            self.held.append(DueRequest(request.now, request.count_max, last))

    def _expire_unloaded(self, queue: Queue, row: DueEntry, stored: bool) -> None:
        queue.counts.expired += 1
        operation = (DELETE_MESSAGE, queue.queue_id, row.order, row.expires, True)
        if stored:
            self.operations.append(operation)
            queue.removed_stored(row.order, row.size, row.expires)
            if row.body_id:
                body = self.shared.loaded_from_store(row.body_id, row.references)
                self.shared.hold(body)
                self.operations.append(self.shared.release(body))
                self.shared.let_go(body)
        else:
            self.spool_operations.append(operation)
            queue.transient -= 1
            self._count_spooled(queue, -1, -row.size)
        if queue.page is not None and row.order >= queue.page.start:
            queue.page.removed.add(row.order)
        self.freed = True

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
        self._count_spooled(entry.queue, 1, entry.message.size)
        self.spool_operations.append((PUT_MESSAGE, entry.queue.queue_id, entry.order, entry.message))

    def _count_spooled(self, queue: Queue, count: int, size: int) -> None:
        queue.spooled += count
        queue.spooled_size += size
        self.spooled += count
        self.spooled_bytes += size

    def unspool(self, entry: Entry) -> None:
        """Remove an entry from the spool."""
        self._count_spooled(entry.queue, -1, -entry.message.size)
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
        corrupt: int,
    ) -> None:
        """Take what was read for a request: all ready messages from its start on and below `bound` (None = to the end)."""
        queue = page.queue
        if queue.queue_id in self.queues:
            queue.counts.corrupt += corrupt
            queue.page_loaded(stored, transient, bound)
        self.shared.read_ended()

    def confirm(self, token: Any) -> None:
        """Let the caller know, by `token` in the held effects, when everything emitted so far is committed."""
        self.held.append(token)


def _full(limit: str, value: int) -> BrokerFull:
    return BrokerFull(f"the broker has no room: {limit} is {value}; consume messages, or raise the limit")
