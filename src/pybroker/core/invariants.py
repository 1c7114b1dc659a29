"""What holds in the core after every call: checked by tests (and cheap enough for simulations), never on the hot path."""

from __future__ import annotations

from itertools import pairwise

from pybroker.core.broker import Core
from pybroker.core.choosing import Choosing
from pybroker.core.demand import Key
from pybroker.core.entry import DELAYED, ENTRY_BYTES, GONE, HELD, READY, SENT, SETTLING, STRANDED
from pybroker.core.forwarding import demands
from pybroker.core.kinds import BACKLOG, CONSUMED, LINK, QUEUE, SUBSCRIPTION, TEMPORARY
from pybroker.core.links import TOPIC_PREFIX, Links, Peer
from pybroker.core.queue import Queue
from pybroker.core.schedules import Schedules
from pybroker.core.temporary import TemporaryQueue
from pybroker.core.wildcard import Head
from pybroker.destination import QUEUE as QUEUE_KIND
from pybroker.destination import Destination
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
        assert connection.members == sum(len(each.members or ()) for each in connection.consumers), connection
        for consumer in connection.consumers:
            if isinstance(consumer, Head):
                _check_head(consumer)
            for part in consumer.parts:
                assert part in part.queue.consumers, part
    memory += _check_schedules(core.schedules)
    assert core.memory_bytes == memory, (core.memory_bytes, memory)
    stored = sum(queue.size for queue in core.queues.values()) + core.schedules.size
    assert core.stored_bytes == stored, (core.stored_bytes, stored)
    assert core.spooled_bytes >= 0, core.spooled_bytes
    assert len(core.redeliveries) == sum(len(queue.delayed) for queue in core.queues.values()), len(core.redeliveries)
    _check_producers(core)
    _check_temporaries(core)


def _check_head(head: Head) -> None:
    """All of its members may be given something, or none; and none is forgotten while there is something for it."""
    assert not head.resting or not head.able or not head.started, head
    assert head.resting or (head.able and not head.waiting), head
    assert head.size == sum(entry.message.size for entry in head.unacked.values()), head
    for queue, member in head.members.items():
        assert member.queue is queue, queue
        assert member in queue.members, queue
        assert member.share is None, queue
        if head.resting:
            assert not member.listed, queue
            known = member in head.waiting or queue.stalled is not None
            assert known or not member.may_have_more, (queue, "what is there is forgotten")
        else:
            assert member.listed or (queue.stalled is not None and member in queue.stalled), queue
    for entry in head.unacked.values():
        assert entry.consumer is head.members[entry.queue], entry


def _check_temporaries(core: Core) -> None:
    owned = {text: queue for connection in core.connections for text, queue in connection.temporaries.items()}
    there = {text: queue for text, queue in core.by_destination.items() if isinstance(queue, TemporaryQueue)}
    hubs = set(there.values())
    for text, queue in there.items():
        assert core.queues[queue.queue_id] is queue, queue
        assert str(queue.destination) == text, (queue, text)
        assert (queue.owner is None) == (text not in owned), (queue, "of somebody who does not know it")
        assert queue.owner is not None or queue.routes is not None, (queue, "neither here nor elsewhere")
        assert owned.get(text, queue) is queue, queue
        assert all(consumer.connection is queue.owner for consumer in queue.consumers) or core.closing, queue
    for each in core.queues.values():
        if isinstance(each, TemporaryQueue) and each.hub is not None:
            assert each.hub in hubs, each
            assert each in each.hub.subscribers, each
            assert len(each.consumers) == 1, each
    assert owned.keys() <= there.keys(), owned.keys() - there.keys()


def _check_producers(core: Core) -> None:
    producers = core.producers.all()
    assert len(producers) == len(core.producers), producers
    for producer in producers:
        ranges = producer.ranges
        assert len(ranges) <= 2 * max(core.limits.producer_ranges_max, 1), ranges
        for at, (first, second) in enumerate(pairwise(ranges)):
            assert first + 1 < second if at % 2 else first <= second, ranges
        assert core.producers.find(producer.producer_id) is producer, producer.producer_id
        assert producer.dirty == (producer in core.dirty), producer.producer_id
    assert all(isinstance(each, Queue | Schedules) or each in producers for each in core.dirty), core.dirty
    _check_links(core.links)


def _check_schedules(schedules: Schedules) -> int:
    """Returns what they count in memory."""
    keys, loaded = schedules._keys, schedules._loaded
    assert keys == sorted(set(keys)), keys
    waiting = [schedule for queue in schedules.waiting.values() for schedule in queue]
    assert schedules.held_up == len(waiting), (schedules.held_up, waiting)
    assert schedules.held_size == sum(schedule.message.size for schedule in waiting), (schedules.held_size, waiting)
    assert all(schedules.waiting.values()), schedules.waiting
    transient = {key[1] for key in schedules._transient} & loaded.keys()
    parts = [{number for _, number in keys}, transient, {schedule.number for schedule in waiting}]
    assert sum(map(len, parts)) == len(loaded), (parts, loaded)
    assert set().union(*parts) == loaded.keys(), (parts, loaded)
    page = schedules.page
    added = [] if page is None else list(page.added.values())
    stored = [schedule for schedule in (*loaded.values(), *added) if schedule.message.durable]
    assert schedules.transient == len(loaded) + len(added) - len(stored), schedules.transient
    assert len(stored) <= schedules.count, (stored, schedules.count)
    assert sum(schedule.message.size for schedule in stored) <= schedules.size, (stored, schedules.size)
    assert len(keys) <= schedules._count_max, keys
    assert schedules._bytes == sum(loaded[number].message.size for _, number in keys), schedules._bytes
    for schedule in stored:
        assert schedule.due >= schedules.record().head, (schedule, schedules.record())
    for due in (*schedules._bad.values(), *(key[0] for key in schedules.places)):
        assert due >= schedules.record().head, (due, schedules.record(), "what was mended would not be found")
    if schedules.tail is None:
        missing = schedules.count - len(stored) - schedules.corrupt
        assert missing >= 0 if schedules.places else missing == 0, (stored, schedules.corrupt, schedules.count)
        assert page is None, page
    else:
        assert not keys or keys[-1] < schedules.tail, (keys, schedules.tail)
        assert page is not None or keys, "none in memory, and no more are asked for"
    return sum(schedule.message.size + ENTRY_BYTES for schedule in (*loaded.values(), *added))


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
        assert entry.state in (HELD, SENT, SETTLING, STRANDED, DELAYED), entry
        assert (entry.state == STRANDED) == (entry in queue.stranded), entry
        if entry.state in (HELD, SENT):
            assert entry.consumer is not None, entry
            assert entry.consumer.unacked[entry.tag] is entry, entry
    delayed = {order: entry for order, entry in queue.outstanding.items() if entry.state == DELAYED}
    assert queue.delayed == delayed, (queue, queue.delayed, delayed)
    assert queue.delayed_size == sum(entry.message.size for entry in delayed.values()), queue
    assert queue.stalled is None or (delayed and not queue.available), (queue, queue.stalled)
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
    if queue.unloaded is None and not queue.counts.corrupt:
        assert stored == queue.count, (stored, queue.count)
        assert len(loaded) - stored == queue.transient, (len(loaded), stored, queue.transient)
    for consumer in queue.consumers:
        assert consumer.size == sum(entry.message.size for entry in consumer.unacked.values()), consumer
        assert consumer.listed == (consumer in queue.available), consumer
        assert not consumer.listed or consumer.able, consumer
    assert len(queue.stranded) == sum(entry.state == STRANDED for entry in outstanding), queue
    assert not queue.available or not queue.stranded, (queue, "a consumer could take what can't be forwarded")
    if queue.choosing is not None:
        _check_choosing(queue.choosing)
    elif queue.available and queue.page is None:
        assert not window, (queue, "ready messages while a consumer could take them")
        assert queue.tail is None, (queue, "messages behind the window while a consumer waits, and no page asked for")
    if queue.kind in (BACKLOG, TEMPORARY):
        assert not queue.count, queue
    if queue.kind == QUEUE:
        assert not queue.subscription, queue
    return ENTRY_BYTES * len(loaded)


def _check_choosing(choosing: Choosing) -> None:
    """Nobody is able and has something left to take, and nobody's mark is above something for him."""
    queue = choosing.queue
    assert queue.kind in CONSUMED, queue
    assert queue.window is choosing.window, queue
    assert list(choosing._places) == list(queue.consumers), queue
    assert choosing.skipped is None or queue.tail is None or choosing.skipped < queue.tail, (
        choosing.skipped,
        queue.tail,
    )
    late = set(choosing._late)
    for place in choosing._eligible():
        network = place.consumer is None
        mark = max(place.mark, choosing._idle_mark) if place in choosing._idle else place.mark
        assert place.missed is None or mark <= place.missed, (mark, place.missed)
        assert place.missed is None or queue.unloaded is not None, place.missed
        assert mark <= choosing._top, (mark, choosing._top)
        for entry in choosing.window:
            if entry.order < mark and entry.order not in late:
                stays = network and not _takers(queue, entry.message)
                assert stays or not choosing._takes(place, entry), (entry, mark, "passed over for good")
    for place in choosing._hungry():
        assert place.missed is None, (place.missed, "something in the store for somebody who is able")
        assert queue.tail is None or queue.page is not None, (queue, "nobody reads on for somebody who is able")
        for entry in choosing.window:
            assert not choosing._takes(place, entry), (entry, "ready while somebody who is able could take it")


def _check_links(links: Links) -> None:
    core = links.core
    for name, peer in links.peers.items():
        assert peer.name == name, peer
        for at, queue in enumerate(peer.queues):
            assert core.queues[queue.queue_id] is queue, queue
            assert queue.kind == LINK, queue
            assert queue.name == name, queue
            assert len(queue.consumers) <= (peer.link is not None), queue
            waits = any(each.depth > len(each.unread) for each in peer.queues[:at])
            assert not queue.consumers or not waits, (queue, "one lane after the other")
            for entry in [*queue.window, *queue.outstanding.values()]:
                route = entry.message.route
                assert route is not None, entry
                assert route.passed[-1] == links.name, (entry, route)
                assert len(route.passed) <= links.config.hops_max, (entry, route)
        assert peer.link is None or not peer.queues or any(queue.consumers for queue in peer.queues), peer.name
        namespaces = [queue.client_id for queue in peer.queues]
        assert len(set(namespaces)) == len(namespaces), (peer.name, namespaces)
    of_links = {queue for peer in links.peers.values() for queue in peer.queues} | links.releasing
    for queue in core.queues.values():
        assert (queue.kind == LINK) == (queue in of_links), queue
        if queue.kind in (QUEUE, TEMPORARY) and core.by_destination.get(str(queue.destination)) is queue:
            _check_routes(links, queue)
        else:
            assert queue.kind != QUEUE, queue
            assert queue.routes is None, queue
    _check_demand(links)


def _check_routes(links: Links, queue: Queue) -> None:
    """A queue knows who wants its messages; who may have the first one has got it, or will be asked when he has room. So in a
    choosy queue the first one that nobody here alone may have, and that has not to stay."""
    destination = queue.destination
    wanted: dict[Peer, tuple[int, frozenset[str]]] = {}
    for key in _heard(links):
        if key.destination == str(destination) and links.allowed(destination):
            best = links.demand.best(key)
            assert best is not None, key
            peer = links.peers[best[0]]
            assert peer.link is not None, (key, "plain demand by a link that is down")
            length, origins = wanted.get(peer, (len(best[1]), frozenset()))
            wanted[peer] = min(length, len(best[1])), origins | {key.origin}
    assert (queue.routes or {}) == wanted, (queue, queue.routes, wanted)
    if not wanted:
        return
    waiting = list(queue.window)
    if (choosing := queue.choosing) is not None:
        network = choosing._network
        waiting = [each for each in waiting if choosing._takes(network, each) and _takers(queue, each.message)]
        if not waiting and not any(queue in peer.blocked for peer in wanted):
            assert network.missed is None, (queue, network.missed, "something in the store for those who have room")
            assert queue.tail is None or queue.page is not None, (queue, "nobody reads on for those who have room")
    elif queue.available:
        return
    for entry in waiting[:1]:
        if not entry.message.expires or entry.message.expires > links.core.now:
            for peer in _takers(queue, entry.message):
                assert queue in peer.blocked, (queue, entry, f"nobody remembers that it waits for {peer.name}")


def _takers(queue: Queue, message: Message) -> set[Peer]:
    """The peers that a message of a queue may be forwarded to when they have room; empty when it has to stay."""
    routes = queue.routes or {}
    passed = set(message.route.passed) if message.route is not None else set()
    if message.route is not None and len(message.route.passed) >= queue.core.links.config.hops_max:
        return set()
    new = {peer for peer, (_, origins) in routes.items() if origins - passed}
    return new or (set() if demands(queue) else set(routes))


def _check_demand(links: Links) -> None:
    """What is told to the peers is what clients consume, and every demand that has a way is known where it is used."""
    core = links.core
    own: set[Key] = set()
    for queue in core.queues.values():
        if queue.kind == QUEUE:
            target = Destination(QUEUE_KIND, queue.name)
            if demands(queue) and queue not in links._withheld and links.allowed(target):
                own.add(Key(str(target), False, links.name))
        elif isinstance(queue, TemporaryQueue):
            if queue.owner is not None:
                own.add(Key(str(queue.destination), False, links.name))
        elif queue.kind in (SUBSCRIPTION, BACKLOG):
            own.add(Key(TOPIC_PREFIX + queue.name, queue.kind == SUBSCRIPTION, links.name))
    assert links.demand._own.keys() == own, (links.demand._own, own)
    ways = {key for key in _heard(links) if key.destination.startswith(TOPIC_PREFIX)}
    assert links._routed == ways, (links._routed, ways)
    assert len(links.topics) == len(ways), (len(links.topics), ways)


def _heard(links: Links) -> set[Key]:
    return {key for name in links.peers for key in links.demand.heard(name)}
