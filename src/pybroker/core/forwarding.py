"""Forwarding: which message goes to which peer, how it gets onto a link and back. A part of `Links` (DESIGN.md section 6). Pure.

Queues: a message that no local consumer is ready for goes to a peer that wants it. It may come back to a broker that had it only
when that one has the consumers, and this one none: so nothing wanders between two that both have some, and nothing is stuck
where the consumers have left. At the hop limit it stays where it is, set apart, until somebody here consumes.

Topics: each copy says which brokers it is for; on the way it is parted by the next brokers, so that each gets it once.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

from pybroker.core.demand import hops
from pybroker.core.entry import STRANDED, Entry
from pybroker.core.queue import Queue
from pybroker.destination import QUEUE, TOPIC, Destination, parse_destination
from pybroker.errors import InvalidDestination
from pybroker.message import Message, Route

if TYPE_CHECKING:
    from pybroker.core.links import Links, Peer

ROUTES_REMEMBERED = 256
ROUTE_REMEMBERED = 16  # names in the longest one of these
STRANDED_MAX = 1_000  # messages of one queue that are set apart at the hop limit; from then on it forwards nothing more


def demands(queue: Queue) -> bool:
    """Whether a queue has a consumer for everything: others are asked for its messages because of such ones only."""
    return any(consumer.matches is None for consumer in queue.consumers)


def _passed(message: Message) -> tuple[str, ...]:
    return message.route.passed if message.route is not None else ()


def _choose(links: Links, queue: Queue, message: Message) -> Peer | None:
    """The peer that gets a message now: the nearest one with room, in turn; None when there is none."""
    routes = queue.routes
    assert routes is not None
    passed = _passed(message)
    if len(routes) == 1 and not passed:  # as most are
        for peer in routes:
            if links.has_room(peer):
                return peer
            if peer.link is not None:
                peer.blocked[queue] = None
        return None
    there = [(peer, length, bool(passed) and origins.issubset(passed)) for peer, (length, origins) in routes.items()]
    back = bool(passed) and not demands(queue) and all(had_it for peer, _, had_it in there if peer.link is not None)
    found: Peer | None = None
    nearest = 0
    for peer, length, had_it in there:
        if peer.link is None or (had_it and not back) or (found is not None and length >= nearest):
            continue
        if links.has_room(peer):
            found, nearest = peer, length
        else:
            peer.blocked[queue] = None
    if found is not None and len(routes) > 1:
        routes[found] = routes.pop(found)  # the next one's turn
    return found


def _copy(links: Links, message: Message, deliveries: int, targets: tuple[str, ...] = ()) -> Message:
    """A message as it goes onto a link."""
    route = _route(_passed(message), links.name, targets, deliveries, message.priority)
    return Message(
        message.destination,
        message.body,
        message.header_block,
        message.durable,
        message.priority,
        message.expires,
        message.message_id,
        message.timestamp,
        route,
    )


def _route(passed: tuple[str, ...], name: str, targets: tuple[str, ...], deliveries: int, priority: int) -> Route:
    """The route of a message that was at `passed`, and now leaves the broker of that name."""
    if len(passed) + len(targets) > ROUTE_REMEMBERED:
        return Route((*passed, name), targets, deliveries, priority)
    return _remembered(passed, name, targets, deliveries, priority)


@lru_cache(maxsize=ROUTES_REMEMBERED)
def _remembered(passed: tuple[str, ...], name: str, targets: tuple[str, ...], deliveries: int, priority: int) -> Route:
    """Many messages take the same one."""
    return Route((*passed, name), targets, deliveries, priority)


def original(message: Message) -> Message:
    """A message from the queue of a link, as it was before it was forwarded."""
    route = message.route
    assert route is not None
    passed = route.passed[:-1]
    before = Route(passed, (), route.deliveries, route.priority) if passed or route.deliveries else None
    return Message(
        message.destination,
        message.body,
        message.header_block,
        message.durable,
        route.priority,
        message.expires,
        message.message_id,
        message.timestamp,
        before,
    )


# ---- queues


def pass_on(links: Links, queue: Queue, message: Message) -> bool:
    """Forward a message that has just come, and that nothing is in front of; False when it has to stay."""
    route = message.route
    if route is not None and len(route.passed) >= links.config.hops_max:
        return False
    peer = _choose(links, queue, message)
    if peer is None:
        return False
    queue.counts.forwarded += 1
    # It has come just now: nobody else has this object.
    if route is None:
        message.route = links.first_routes[message.priority]
    else:
        message.route = _route(route.passed, links.name, (), route.deliveries, message.priority)
    (peer.lane or links.lane(peer)).accept(message)
    return True


def forward(links: Links, queue: Queue) -> None:
    """Forward what no local consumer is ready for, as far as peers want it and have room."""
    window = queue.window
    core = links.core
    while not queue.available:
        if not window:
            if queue.tail is not None:
                queue.request_page()
            return
        entry = window.first()
        message = entry.message
        if message.expires and message.expires <= core.now:
            core.expire(window.pop_first())
            continue
        if len(_passed(message)) >= links.config.hops_max:
            if len(queue.stranded) >= STRANDED_MAX:
                return
            _strand(queue, window.pop_first())
            continue
        peer = _choose(links, queue, message)
        if peer is None:
            return
        window.pop_first()
        _send_on(links, entry, peer)
        if queue.tail is not None and queue.page is None and len(window) < core.page_below:
            queue.request_page()


def offer(links: Links, queue: Queue, entry: Entry) -> bool | None:
    """Forward an entry of a choosy queue's window: True when it is gone, False while no peer has room, None when it has to stay."""
    message = entry.message
    if len(_passed(message)) >= links.config.hops_max:
        return None
    peer = _choose(links, queue, message)
    if peer is None:
        return False if any(queue in each.blocked for each in queue.routes or ()) else None
    queue.window.discard(entry.order)
    _send_on(links, entry, peer)
    return True


def _send_on(links: Links, entry: Entry, peer: Peer) -> None:
    """Move an entry that stands in no collection of its queue to a peer's."""
    queue = entry.queue
    queue.counts.forwarded += 1
    copy = _copy(links, entry.message, entry.deliveries)
    queue.forget(entry)
    links.lane(peer).accept(copy)


def _strand(queue: Queue, entry: Entry) -> None:
    entry.state = STRANDED
    queue.outstanding[entry.order] = entry
    queue.stranded.append(entry)


# ---- topics


def origins_of(links: Links, target: Destination) -> dict[str, Peer]:
    """The brokers that a topic's messages have to reach, and the next one on the way to each."""
    if not links.peers or not links.allowed(target):
        return {}
    found: dict[str, tuple[tuple[bool, int], Peer]] = {}
    for key in links.topics.match(target.parts):
        best = links.demand.best(key)
        assert best is not None
        name, path = best
        peer = links.peers[name]
        length = hops(path)
        rank = (peer.link is None or length < len(path), length)
        if key.origin not in found or rank < found[key.origin][0]:
            found[key.origin] = rank, peer
    return {origin: peer for origin, (_, peer) in found.items()}


def publish(links: Links, message: Message, origins: dict[str, Peer], targets: Iterable[str]) -> None:
    """Send a copy to each next broker on the way to `targets`."""
    by_peer: dict[Peer, list[str]] = {}
    for origin in targets:
        peer = origins.get(origin)
        if peer is None or len(_passed(message)) >= links.config.hops_max:
            links.dropped += 1  # nobody there wants it any more, or it went astray
        else:
            by_peer.setdefault(peer, []).append(origin)
    for peer, names in by_peer.items():
        links.lane(peer).accept(_copy(links, message, 0, tuple(names)))


# ---- from a link, and back from the queue of one


def take(links: Links, message: Message) -> None:
    """Take a message that a peer forwarded. Raises InvalidDestination, InvalidMessage, LimitExceeded."""
    core = links.core
    queue = core.by_destination.get(message.destination)
    if queue is not None and (not message.expires or message.expires > core.now):
        queue.accept(message)
        return
    target = parse_destination(message.destination)
    if target.is_pattern:
        raise InvalidDestination(f"{message.destination} is a pattern: a message is sent to one name")
    core.check(message)
    if message.expires and message.expires <= core.now:
        core.expire_on_arrival(message)
    elif target.kind == QUEUE:
        core.queue(target).accept(message)
    elif target.kind != TOPIC:
        core.temporaries.send(message)
    else:
        assert message.route is not None
        core.publish_for(message, message.route.targets)


def give_back(links: Links, queue: Queue, entry: Entry) -> None:
    """Return a message from the queue of a link that stands in no collection of it; it may have been delivered elsewhere."""
    core = links.core
    route = entry.message.route
    assert route is not None
    message = original(entry.message)
    queue.forget(entry)
    target = parse_destination(message.destination)
    if target.kind == QUEUE:
        message.route = Route(route.passed[:-1], (), route.deliveries + 1, route.priority)
        queue_there = core.by_destination.get(message.destination)
        if queue_there is None:  # whatever `destinations_max` says: it must not be lost
            queue_there = core.add_named_queue(target)
        queue_there.accept(message)
    elif target.kind != TOPIC:
        core.temporaries.send(message)
    else:
        publish(links, message, origins_of(links, target), route.targets)
