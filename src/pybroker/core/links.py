"""Links: what the core knows of the other brokers of its network, and how messages cross to them (DESIGN.md section 6). Pure.

What is on its way to a peer stands in a queue of kind LINK: being forwarded *is* being moved there, in one batch, under a sequence
that is never used again. So it is durable before it is sent; after a break or a crash it is sent again under the same sequence, to
that peer and nobody else; and it is gone when the peer has it. The peer remembers the sequences as those of a
producer (`producers.py`), in the batch that stores the message.

Each life of the core begins queues of its own, each in a *namespace* of its own: a sequence of a non-durable message, of a store
that was put back from a backup, or of a time before the peer was removed, is then never taken for another message's. Earlier
lives' queues are emptied first.

What goes to whom is in `forwarding.py`, what is consumed where in `demand.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from pybroker.config import NetworkConfig
from pybroker.core import forwarding, producers
from pybroker.core.consumer import INDIVIDUAL, Connection, Consumer
from pybroker.core.demand import Added, DemandTable, Dropped, Key, News
from pybroker.core.kinds import BACKLOG, LINK, SUBSCRIPTION, TEMPORARY
from pybroker.core.queue import Queue
from pybroker.core.topics import SubscriptionTree
from pybroker.destination import QUEUE, TEMPORARY_KINDS, TOPIC, Destination, matches, parse_destination
from pybroker.errors import BrokerError, InvalidDestination, SendInDoubt, UnknownDelivery
from pybroker.message import PRIORITY_MAX, Message, Route
from pybroker.operations import DELETE_PEER, PUT_PEER, PeerRecord

if TYPE_CHECKING:
    from pybroker.core.broker import Core

TOPIC_PREFIX = "/topic/"


class Lane(NamedTuple):
    """One queue of a link, as both ends name it while the link lasts. `namespace`: sequences in it are never used again."""

    number: int
    namespace: str


class Peer:
    """Another broker, linked now or not.

    queues     what is on its way to it, those of earlier lives first
    lane       the last of these, if it is of this life
    blocked    local queues that have something for it, and wait for room on the link
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.link: Link | None = None
        self.queues: list[Queue] = []
        self.lane: Queue | None = None
        self.blocked: dict[Queue, None] = {}
        self.forwarded = 0  # accepted by it
        self.received = 0
        self.repeats = 0  # received before
        self.rejected = 0  # refused by it for good

    @property
    def waiting(self) -> int:
        """Messages on their way to it."""
        return sum(queue.depth for queue in self.queues)


class Link:
    """A connection to a peer, which takes so much that it has not accepted. `lanes`: consumers of its queues by their numbers."""

    def __init__(self, peer: Peer, connection: Connection, messages_max: int, bytes_max: int) -> None:
        self.peer = peer
        self.connection = connection
        self.messages_max = messages_max
        self.bytes_max = bytes_max
        self.lanes: dict[int, Consumer] = {}
        self._last = 0

    @property
    def sink(self) -> Any:
        return self.connection.sink

    def next_number(self) -> int:
        self._last += 1
        return self._last


class Links:
    """All peers of one core. Without a network it only keeps what an earlier one has left."""

    def __init__(self, core: Core, name: str, config: NetworkConfig | None, life: str) -> None:
        self.core = core
        self.name = name
        self.config = config or NetworkConfig()
        self.life = life
        self.peers: dict[str, Peer] = {}
        self.changed: dict[Link, None] = {}  # links whose peer has to be told something, in order
        self.releasing: set[Queue] = set()  # of peers that were removed
        self.dropped = 0  # copies for brokers that can't be reached any more, or at the hop limit
        self.first_routes = [Route((name,), (), 0, priority) for priority in range(PRIORITY_MAX + 1)]  # from here on
        self.demand = DemandTable(name, self.config.hops_max)
        self.topics: SubscriptionTree[Key] = SubscriptionTree()  # demand for topics that has a way
        self._wanted: dict[str, set[Key]] = {}  # demand for queues that has a way, by destination
        self._routed: set[Key] = set()
        self._plain: Counter[str] = Counter()  # own subscriptions by topic
        self._durable: Counter[str] = Counter()
        self._consumed: dict[Queue, None] = {}  # queues with consumers of this broker that take everything
        self._withheld: set[Queue] = set()  # of these: so much is waiting here that no more is asked for
        self._include = [parse_destination(pattern) for pattern in self.config.include]
        self._exclude = [parse_destination(pattern) for pattern in self.config.exclude]

    # ---- from the store

    def restore(self, records: Iterable[PeerRecord]) -> None:
        """Take up the peers of an earlier life; the queues were restored before."""
        for record in records:
            self.peers[record.name] = Peer(record.name)
            adds = [(TOPIC_PREFIX + pattern, True, origin, path) for pattern, origin, path in record.demand]
            self._reroute(self.demand.hear(record.name, True, adds, ()))
        for queue in list(self.core.queues.values()):
            if queue.kind == SUBSCRIPTION:
                self.subscribed(queue)
            elif queue.kind == LINK:
                peer = self.peers.get(queue.name)
                if peer is None:  # its peer was removed, and not all of it was given back
                    self.release(queue)
                else:
                    peer.queues.append(queue)

    def _save(self, peer: Peer) -> None:
        demand = sorted(
            (key.destination.removeprefix(TOPIC_PREFIX), key.origin, self.demand.path(peer.name, key))
            for key in self.demand.heard(peer.name)
            if key.durable
        )
        self.core.operations.append((PUT_PEER, PeerRecord(peer.name, tuple(demand))))

    # ---- what this broker's own clients consume

    def allowed(self, target: Destination) -> bool:
        """Whether messages of a destination cross links. Temporary ones do: a reply goes where the request came from."""
        if target.kind in TEMPORARY_KINDS:
            return True

        def fits(pattern: Destination) -> bool:
            return pattern.kind == target.kind and matches(pattern.parts, target.parts)

        return not any(map(fits, self._exclude)) and (not self._include or any(map(fits, self._include)))

    def joined(self, queue: Queue) -> None:
        """A queue, or a plain subscription of a topic, has got a consumer."""
        if queue.kind == QUEUE:
            if forwarding.demands(queue):
                self._consumed[queue] = None
            self._tell_own(queue)
        elif queue.kind == BACKLOG:
            self._plain[queue.name] += 1
            if self._plain[queue.name] == 1:
                self.demand.set_own(TOPIC_PREFIX + queue.name, False, True)
                self._note()

    def left(self, queue: Queue) -> None:
        """... has lost one."""
        if queue.kind == QUEUE:
            if not forwarding.demands(queue):
                self._consumed.pop(queue, None)
                self._withheld.discard(queue)
            self._tell_own(queue)
        elif queue.kind == BACKLOG:
            self._plain[queue.name] -= 1
            if not self._plain[queue.name]:
                del self._plain[queue.name]
                self.demand.set_own(TOPIC_PREFIX + queue.name, False, False)
                self._note()

    def plain_subscribers(self, name: str) -> int:
        """How many plain subscriptions of a topic or pattern there are at this broker."""
        return self._plain[name]

    def subscribed(self, queue: Queue) -> None:
        """There is a durable subscription."""
        self._durable[queue.name] += 1
        if self._durable[queue.name] == 1:
            self.demand.set_own(TOPIC_PREFIX + queue.name, True, True)
            self._note()

    def unsubscribed(self, queue: Queue) -> None:
        """A durable subscription was removed."""
        self._durable[queue.name] -= 1
        if not self._durable[queue.name]:
            del self._durable[queue.name]
            self.demand.set_own(TOPIC_PREFIX + queue.name, True, False)
            self._note()

    def _tell_own(self, queue: Queue) -> None:
        there = queue in self._consumed and queue not in self._withheld
        target = Destination(QUEUE, queue.name)
        if self.allowed(target):
            self.demand.set_own(str(target), False, there)
            self._note()

    def tick(self) -> None:
        """Every now and then: ask others for no more of a queue of which much is waiting here, and again when it isn't.

        And let go on what waited for messages that expired on their way.
        """
        for peer in self.peers.values():
            if peer.link is not None:
                self._go_on(peer)
        limit = self.config.demand_backlog_max
        for queue in self._consumed:
            ready = queue.depth - len(queue.outstanding)
            if queue in self._withheld:
                if ready <= limit // 2:
                    self._withheld.discard(queue)
                    self._tell_own(queue)
            elif ready >= limit:
                self._withheld.add(queue)
                self._tell_own(queue)

    def temporary(self, destination: str, there: bool) -> None:
        """There is a temporary destination of a client of this broker, or there is not any more."""
        self.demand.set_own(destination, False, there)
        self._note()

    def wanted(self, destination: str) -> bool:
        """Whether a queue, or a temporary destination, is consumed by another broker that can be reached."""
        return destination in self._wanted

    # ---- what others consume

    def hear(self, link: Link, whole: bool, adds: Sequence[Added], drops: Sequence[Dropped]) -> None:
        """The peer of a link tells its demand. Raises InvalidDestination, LimitExceeded."""
        for destination, durable, _, _ in adds:
            target = parse_destination(destination)
            if target.kind != TOPIC and (target.is_pattern or durable):
                raise InvalidDestination(f"{destination} can't be demanded so: a queue is demanded by its name")
        durable_before = {key for key in self.demand.heard(link.peer.name) if key.durable}
        touched = self.demand.hear(link.peer.name, whole, adds, drops)
        durable_now = {key for key in self.demand.heard(link.peer.name) if key.durable}
        if durable_before != durable_now or any(key.durable for key in touched):
            self._save(link.peer)
        if fresh := durable_now - durable_before:
            self.demand.hold(fresh)
            self.core.held.append((self, fresh))
        self._reroute(touched)

    # A sink of its own: what is confirmed to it is durable demand that is written down, and may be told on.

    touched = False

    def confirm(self, keys: set[Key]) -> None:
        self.demand.written(keys)
        self._note()

    def flush(self) -> None:
        for link in self.changed:
            link.sink.flush()

    def news(self, link: Link) -> News | None:
        """What the peer has to be told since the last time; the first time everything."""
        self.changed.pop(link, None)
        return self.demand.news(link.peer.name)

    def _note(self) -> None:
        for peer in self.peers.values():
            if peer.link is not None and self.demand.has_news(peer.name):
                self.changed[peer.link] = None

    def _reroute(self, keys: Iterable[Key]) -> None:
        """The ways to these origins may have changed."""
        queues: dict[str, None] = {}
        for key in keys:
            target = parse_destination(key.destination)
            there = self.demand.best(key) is not None
            if target.kind != TOPIC:
                wanted = self._wanted.setdefault(key.destination, set())
                if there:
                    wanted.add(key)
                else:
                    wanted.discard(key)
                if not wanted:
                    del self._wanted[key.destination]
                queues[key.destination] = None
                if there:
                    self.core.routing.wanted(target)
                continue
            if there and key not in self._routed:
                self._routed.add(key)
                self.topics.add(target.parts, key)
            elif not there and key in self._routed:
                self._routed.discard(key)
                self.topics.remove(target.parts, key)
            self.core.forget_topics()
        for destination in queues:
            queue = self.core.by_destination.get(destination)
            if queue is not None:
                self.route(queue)
                queue.dispatch()
                if queue.kind == TEMPORARY:
                    self.core.temporaries.rerouted(queue)
        self._note()

    def route(self, queue: Queue) -> None:
        """Let a queue know which peers want its messages: of each the shortest way, and the origins by that peer."""
        destination = str(queue.destination)
        routes: dict[Peer, tuple[int, frozenset[str]]] = {}
        if destination in self._wanted and self.allowed(queue.destination):
            for key in sorted(self._wanted[destination]):
                best = self.demand.best(key)
                assert best is not None
                name, path = best
                peer = self.peers[name]
                length, origins = routes.get(peer, (len(path), frozenset()))
                routes[peer] = min(length, len(path)), origins | {key.origin}
        queue.routes = routes or None
        if queue.choosing is not None:
            queue.choosing.rerouted()

    # ---- links come and go

    def up(self, name: str, sink: Any, messages_max: int | None = None, bytes_max: int | None = None) -> Link:
        """A link to a peer: its demand is to come; what waits for it is given to `sink`. Raises BrokerError if there is one.

        messages_max, bytes_max  what the peer takes that it has not accepted (one message always); None: as this broker
        """
        peer = self.peers.get(name)
        if peer is None:
            peer = self.peers[name] = Peer(name)
            self._save(peer)
        if peer.link is not None:
            raise BrokerError(f"there is a link to {name} already")
        config = self.config
        link = peer.link = Link(
            peer,
            self.core.connect(sink),
            min(messages_max or config.link_messages_max, config.link_messages_max),
            min(bytes_max or config.link_bytes_max, config.link_bytes_max),
        )
        self._reroute(self.demand.up(name))
        self._start_lanes(peer)
        return link

    def down(self, link: Link) -> None:
        """The link is gone. What was sent and not accepted waits for this peer."""
        peer = link.peer
        if peer.link is not link:
            return
        peer.link = None
        peer.blocked.clear()
        self.changed.pop(link, None)
        self.core.disconnect(link.connection)
        self._reroute(self.demand.down(peer.name))

    def _start_lanes(self, peer: Peer) -> None:
        """One queue after the other: of earlier lives first, so that the order stays."""
        while len(peer.queues) > 1 and not peer.queues[0].depth:
            queue = peer.queues.pop(0)
            for consumer in list(queue.consumers):
                self.core.unsubscribe(consumer)
            self.core.deleted(queue)
        link = peer.link
        if link is None or not peer.queues:
            return
        # What the store can't give back whole holds up nobody: it goes when it is mended.
        queue = next((each for each in peer.queues if each.depth > len(each.unread)), peer.queues[-1])
        if queue.consumers:
            return
        lane = Lane(link.next_number(), queue.client_id)
        consumer = Consumer(link.connection, queue, INDIVIDUAL, link.messages_max, link.bytes_max, lane)
        link.connection.consumers[consumer] = None
        link.lanes[lane.number] = consumer
        queue.consumers[consumer] = None
        self.core.start(consumer)

    def lane(self, peer: Peer) -> Queue:
        """The queue of this life for what goes to a peer."""
        queue = peer.lane
        if queue is None:
            queue = peer.lane = self.core.add_queue(LINK, peer.name, "", "")
            # Not the life alone: a peer that was removed may come back in the same one.
            queue.client_id = f"{self.life}-{queue.queue_id:x}"
            self.core.touch(queue)
            peer.queues.append(queue)
            self._start_lanes(peer)
        return queue

    def has_room(self, peer: Peer) -> bool:
        """Whether a queue may forward one more message to a peer."""
        if peer.link is None:
            return False
        if not peer.queues:
            return True
        config = self.config
        queue = peer.queues[-1]
        waiting = queue.count + queue.transient if len(peer.queues) == 1 else peer.waiting
        if waiting >= config.link_messages_max or queue.size >= config.link_bytes_max:
            return False
        if not queue.transient:
            return True
        size = queue.window.size + sum(consumer.size for consumer in queue.consumers)
        return size < config.link_bytes_max

    # ---- what becomes of what was sent

    def accepted(self, link: Link, lane: int, ranges: Sequence[tuple[int, int]]) -> None:
        """The peer has these deliveries as durably as they were here. Raises UnknownDelivery."""
        consumer = self._lane_of(link, lane)
        counts = consumer.queue.counts
        before = counts.acknowledged
        try:
            self.core.acknowledge_ranges(consumer, ranges)
        finally:
            link.peer.forwarded += counts.acknowledged - before
            self._moved_on(link.peer, consumer.queue)

    def rejected(self, link: Link, lane: int, tag: int, code: str, text: str) -> None:
        """The peer will never take this one: it is a dead letter here, with the reason. Raises UnknownDelivery."""
        consumer = self._lane_of(link, lane)
        entry = self.core.delivery_of(consumer, tag)
        queue = consumer.queue
        queue.settle(entry)
        del queue.outstanding[entry.order]
        link.peer.rejected += 1
        self.core.dead_letter(entry, f"refused by {link.peer.name}: {code}: {text}"[:1_000])
        self._moved_on(link.peer, queue)

    def _lane_of(self, link: Link, lane: int) -> Consumer:
        try:
            return link.lanes[lane]
        except KeyError:
            raise UnknownDelivery(f"there is no lane {lane} on this link") from None

    def _moved_on(self, peer: Peer, queue: Queue) -> None:
        if queue.available:
            queue.dispatch()
        self._go_on(peer)

    def _go_on(self, peer: Peer) -> None:
        """Fewer may be waiting for a peer than before."""
        if len(peer.queues) > 1:
            self._start_lanes(peer)
        if peer.blocked and peer.waiting <= self.config.link_messages_max * 3 // 4 and self.has_room(peer):
            blocked, peer.blocked = peer.blocked, {}
            for each in blocked:
                each.dispatch()

    def receive(self, link: Link, namespace: str, sequence: int, message: Message) -> bool:
        """Take what the peer forwards; False for a repeat. Raises SendInDoubt: it is not known any more whether it is one.

        `message.route.passed` ends with the peer. Raises what else makes it impossible to take it, ever: InvalidDestination,
        InvalidMessage, LimitExceeded.
        """
        core = self.core
        peer = link.peer
        producer = core.producers.open(f"link {peer.name} {namespace}", sequence)
        known = producer.look(sequence)
        if known == producers.STORED:
            peer.repeats += 1
            return False
        if known == producers.IN_DOUBT:
            raise SendInDoubt(f"it is not known any more whether {peer.name} forwarded {namespace} {sequence} before")
        forwarding.take(self, message)
        producer.stored(sequence, sequence)
        peer.received += 1
        return True

    def receive_run(self, link: Link, namespace: str, messages: Sequence[tuple[int, Message]]) -> int:
        """As `receive`, for the first of these that are plainly new, and for queues that are there: how many it took.

        The next one, if there is one, has to be looked at by `receive`.
        """
        core = self.core
        first = sequence = messages[0][0]
        producer = core.producers.open(f"link {link.peer.name} {namespace}", first)
        if first <= producer.highest:
            return 0
        try:
            for given, message in messages:
                queue = core.by_destination.get(message.destination)
                if queue is None or given != sequence or (message.expires and message.expires <= core.now):
                    break
                queue.accept(message)
                sequence += 1
        finally:
            if sequence > first:
                producer.stored(first, sequence - 1)
                link.peer.received += sequence - first
        return sequence - first

    # ---- a peer that will not come back

    def remove(self, name: str) -> int:
        """Forget a peer; what waits for it returns to its queues, marked as redelivered. Returns how much that is.

        Raises BrokerError for one that is not known, or linked.
        """
        peer = self.peers.get(name)
        if peer is None:
            known = ", ".join(sorted(self.peers)) or "none"
            raise BrokerError(f"peer {name} is not known here; known are: {known}")
        if peer.link is not None:
            raise BrokerError(f"peer {name} is linked: stop it first, or take it out of the peers of this broker")
        del self.peers[name]
        waiting = peer.waiting
        touched = self.demand.forget_peer(name)
        self.core.operations.append((DELETE_PEER, name))
        self._reroute(touched)
        for queue in peer.queues:
            self.release(queue)
        return waiting

    def release(self, queue: Queue) -> None:
        """Give back what is in the queue of a link whose peer was removed, page by page; then the queue goes."""
        self.releasing.add(queue)
        while queue.window:
            forwarding.give_back(self, queue, queue.window.pop_first())
        if queue.tail is not None:
            queue.request_page()
        elif not queue.outstanding:
            self.releasing.discard(queue)
            self.core.deleted(queue)

    # ---- the hot path and topics: see forwarding.py

    pass_on = forwarding.pass_on
    forward = forwarding.forward
    offer = forwarding.offer
    publish = forwarding.publish
    origins_of = forwarding.origins_of
