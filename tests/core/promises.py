"""What must hold between the core, its store and the model: looked at after every step of the state machine."""

from __future__ import annotations

from pybroker.core.invariants import check_invariants
from pybroker.store import format as fmt
from pybroker.store.store import Store
from tests.core.driver import Driver
from tests.core.model import Key, Model, Snapshot


def check_memory(driver: Driver, model: Model) -> None:
    """The core agrees with itself and with the model, and keeps to its limits."""
    core = driver.core
    check_invariants(core)
    for queue in core.queues.values():
        assert len(queue.window) <= driver.limits.window_messages_max, queue
        if queue.page is not None:
            assert len(queue.page.added) <= driver.limits.window_messages_max, queue
        if queue.kind == "deleted":
            continue
        copies = model.queues.get(model.key_of(queue), {}).values()
        gone = [copy for copy in copies if copy.ready and model.expired(copy)]
        assert len(copies) - len(gone) <= queue.depth <= len(copies), (queue, list(copies))
        stored = sum(copy.stored for copy in copies)
        assert stored - len(gone) <= queue.count <= stored, (queue.count, stored)
    for consumer in model.members:
        held = [copy.order for copy in model.held_by(consumer)]
        assert held == [entry.order for entry in consumer.unacked.values()], consumer


def check_store(driver: Driver, model: Model) -> None:
    """What the store holds is what the model held when the last batch was closed."""
    report = driver.verify()
    assert report.ok, report.problems
    durable: Snapshot = model.durable
    found = stored_messages(driver.store)
    for key in found.keys() | durable.queues.keys():
        wanted = durable.queues.get(key, {})
        rows = found.get(key, {})
        assert not rows.keys() - wanted.keys(), f"{key}: {rows.keys() - wanted.keys()} should be gone"
        for order, copy in wanted.items():
            if order not in rows:
                assert copy.expires, f"{copy} is not in the store"
                assert copy.expires <= durable.now, f"{copy} is not in the store"
                continue
            body, deliveries = rows[order]
            assert body == copy.sent.body, copy
            assert copy.low + (copy.holder is not None and copy.visible) <= deliveries, (deliveries, copy)
            assert deliveries <= copy.high + copy.begun, (deliveries, copy)


def check_nobody_starves(driver: Driver, model: Model) -> None:
    """At rest, nothing is ready that somebody could take."""
    core = driver.core
    for consumer, member in model.members.items():
        if not member.started or member.connection.paused:
            continue
        held = model.held_by(consumer)
        size = sum(len(copy.sent.body) + len(copy.block) for copy in held)
        if len(held) < member.prefetch and size < driver.limits.prefetch_bytes_max:
            if model.stalled(member.key):
                continue
            copies = model.in_queue(member.key).values()
            waiting = [copy for copy in copies if copy.ready and not model.expired(copy) and not model.waits(copy)]
            waiting = [copy for copy in waiting if model.may_take(consumer, copy)]
            assert not waiting, (consumer, waiting, core.queues)


def stored_messages(store: Store) -> dict[Key, dict[int, tuple[bytes, int]]]:
    """Queue, order: body and deliveries as a new life of the store would find them."""
    store = Store(store.backend, store.store_id, store.starts)  # a look from outside
    found: dict[Key, dict[int, tuple[bytes, int]]] = {}
    for record in store.records:
        if record.kind == "deleted":
            continue
        key = (
            ("queue", record.name)
            if record.kind == "queue"
            else ("subscription", record.client_id, record.subscription)
        )
        page = store.read_page(record.queue_id, record.head, 1_000, 1 << 20)
        assert not page.corrupt, page.corrupt
        rows = found.setdefault(key, {})
        for entry in page.entries:
            deliveries = entry.deliveries
            if deliveries is None:
                level, sequence = entry.order >> 56, entry.order & (1 << 56) - 1
                deliveries = int(sequence < record.dispatched[level])
            rows[entry.order] = (entry.message.body, deliveries)
    return found


def leftovers(store: Store, also: set[int] = frozenset()) -> list[bytes]:  # type: ignore[assignment]
    """Keys that an empty store of queues wouldn't have."""
    keys = []
    for key, _ in store.backend.iterate(b"\0", bytes((fmt.END,))):
        tag, *numbers = fmt.parse_key(key)
        fence = tag in (fmt.MESSAGE, fmt.DELIVERIES) and numbers[1] == fmt.FENCE_ORDER
        if not fence and tag in {fmt.MESSAGE, fmt.DELIVERIES, fmt.EXPIRY, fmt.BODY, fmt.REFERENCES, *also}:
            keys.append(key)
    return keys
