"""What holds in the core after every call: checked by tests (and cheap enough for simulations), never on the hot path."""

from __future__ import annotations

from pybroker.core.broker import Core
from pybroker.core.entry import ENTRY_BYTES, GONE, HELD, READY, SENT, SETTLING
from pybroker.core.queue import BACKLOG, QUEUE, Queue
from pybroker.message import Message


def check_invariants(core: Core) -> None:
    """Raise AssertionError, with the values, when the core contradicts itself."""
    memory = 0
    messages: set[Message] = set()
    for queue in core.queues.values():
        memory += _check_queue(queue, messages)
    for connection in core.connections:
        for transaction in connection.transactions.values():
            for entry, _ in transaction.settled:
                if entry.queue.queue_id not in core.queues:  # a plain subscription that left before the commit
                    messages.add(entry.message)
                    memory += ENTRY_BYTES
    memory += sum(message.size for message in messages)
    for connection in core.connections:
        for transaction in connection.transactions.values():
            memory += sum(message.size for message in transaction.messages)
            size = sum(m.size for m in transaction.messages) + sum(e.message.size for e, _ in transaction.settled)
            assert transaction.size == size, (transaction.size, size)
            for entry, _ in transaction.settled:
                assert entry.state == SETTLING, entry
        for consumer in connection.consumers:
            assert consumer in consumer.queue.consumers, consumer
    assert core.memory_bytes == memory, (core.memory_bytes, memory)
    stored = sum(queue.size for queue in core.queues.values())
    assert core.stored_bytes == stored, (core.stored_bytes, stored)
    assert core.spooled_bytes >= 0, core.spooled_bytes


def _check_queue(queue: Queue, messages: set[Message]) -> int:
    window = list(queue.window)
    orders = [entry.order for entry in window]
    assert orders == sorted(set(orders)), orders
    assert queue.window.size == sum(entry.message.size for entry in window), queue
    assert queue.count >= 0, queue
    assert queue.transient >= 0, queue
    for entry in window:
        assert entry.state == READY, entry
        assert queue.tail is None or entry.order < queue.tail, (entry, queue.tail)
        assert entry.order not in queue.outstanding, entry
    added = [] if queue.page is None else list(queue.page.added.values())
    outstanding = list(queue.outstanding.values())
    for order, entry in queue.outstanding.items():
        assert entry.order == order, entry
        assert entry.state in (HELD, SENT, SETTLING), entry
        if entry.state != SETTLING:
            assert entry.consumer is not None, entry
            assert entry.consumer.unacked[entry.tag] is entry, entry
    loaded = [*window, *added, *outstanding]
    for entry in loaded:
        assert entry.state != GONE, entry
        assert entry.queue is queue, entry
        messages.add(entry.message)
        if entry.stored:
            assert entry.order >= queue.head, (entry, queue.head)
        assert (entry.order & ((1 << 56) - 1)) < queue.next_sequence, entry
    for order in queue.unread:
        assert order >= queue.head, (order, queue.head)
    stored = sum(entry.stored for entry in loaded)
    assert stored <= queue.count, (stored, queue.count)
    assert len(loaded) - stored <= queue.transient, (len(loaded), stored, queue.transient)
    if queue.tail is None and not queue.counts.corrupt:
        assert stored == queue.count, (stored, queue.count)
        assert len(loaded) - stored == queue.transient, (len(loaded), stored, queue.transient)
    for consumer in queue.consumers:
        assert consumer.size == sum(entry.message.size for entry in consumer.unacked.values()), consumer
        assert consumer.listed == (consumer in queue.available), consumer
        assert not consumer.listed or consumer.able, consumer
    if queue.available and queue.page is None:
        assert not window, (queue, "ready messages while a consumer could take them")
        assert queue.tail is None, (queue, "messages behind the window while a consumer waits, and no page asked for")
    if queue.kind == BACKLOG:
        assert not queue.count, queue
    if queue.kind == QUEUE:
        assert not queue.subscription, queue
    return ENTRY_BYTES * len(loaded)
