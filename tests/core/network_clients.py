"""The clients of a world of brokers, and the book in which all is written that they sent and saw: promises are checked by it.

Knows nothing of windows, lanes or demand: a message has a number (its body), whoever is shown it is looked up, and what must not
be raises `Broken`. What a crash leaves open (was the send, was the acknowledgement stored?) is written down as open.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from pybroker.consumer_options import ConsumerOptions
from pybroker.core.broker import Core
from pybroker.core.consumer import Connection, Consumer
from pybroker.core.entry import Entry
from pybroker.core.kinds import LINK, QUEUE, SUBSCRIPTION
from pybroker.core.queue import Queue
from pybroker.message import Message
from tests.core.network import Broker, World

OPEN = "open"  # shown, and not settled
ACKED = "acknowledged"  # not confirmed yet
DONE = "done"  # acknowledged, and confirmed
BACK = "back"  # rejected, or its consumer has left
LOST = "lost"  # open when its broker crashed
MAYBE = "maybe"  # acknowledged when its broker crashed, unconfirmed

Receiver = tuple[str, ...]  # of a queue's message ("queue",): anybody; of a topic's each subscriber on its own


class Broken(AssertionError):
    """A promise was broken."""


@dataclass(eq=False)
class Sent:
    """A message as its producer gave it. `must`: subscribers of its topic that may not miss it."""

    number: int
    producer: str
    broker: Broker
    destination: str
    body: bytes
    block: bytes
    durable: bool
    priority: int
    expires: int
    message_id: bytes = b""
    timestamp: int = 0
    stored: bool = False  # the send was confirmed
    open: bool = False  # its broker crashed before that
    released: bool = False  # a peer was removed for which it may have waited: it may be there twice
    must: set[Receiver] = field(default_factory=set)
    showings: dict[Receiver, list[Showing]] = field(default_factory=lambda: defaultdict(list))

    @property
    def queue(self) -> bool:
        return self.destination.startswith("/queue/")

    def committed(self) -> None:
        self.stored = True

    def __repr__(self) -> str:
        kind = "durable" if self.durable else "transient"
        return f"<{self.number} {kind} {self.producer}@{self.broker.name} -> {self.destination}>"


@dataclass(eq=False)
class Member:
    """A consumer, from its coming to its leaving."""

    number: int
    broker: Broker
    destination: str
    durable_name: str
    connection: Connection = field(repr=False)
    consumer: Consumer = field(repr=False)
    wants: bytes = b""  # the header line that its selector asks for, empty = no selector
    settled: int = 0  # the last message that was sent before everything had come to rest, 0 = it has not since it came
    alive: bool = True
    last: dict[tuple[str, int], Sent] = field(default_factory=dict, repr=False)

    @property
    def receiver(self) -> Receiver:
        if self.destination.startswith("/queue/"):
            return ("queue",)
        return (self.broker.name, self.durable_name or f"plain {self.number}")


@dataclass(eq=False)
class Showing:
    """One delivery, as a consumer has seen it."""

    sent: Sent
    member: Member
    tag: int
    deliveries: int
    state: str = OPEN

    def committed(self) -> None:
        if self.state == ACKED:
            self.state = DONE


class ClientWorld(World):
    """A world with clients."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.book: dict[int, Sent] = {}
        self.members: list[Member] = []
        self.durables: dict[Receiver, str] = {}  # durable subscriptions: their patterns
        self.settled_durables: set[Receiver] = set()  # there when everything had come to rest
        self.shared: set[str] = set()  # queues that had more than one consumer, or one that left or rejected
        self.gone: set[str] = set()  # brokers that were taken out for good
        super().__init__(*arguments, **options)
        self.one_way = len(self.pairs) == len(self.brokers) - 1  # between two brokers, whatever is cut
        self.reaching = options["network"].hops_max >= len(self.brokers)  # nobody is too far away

    # ---- what clients do

    def send(
        self,
        broker: Broker,
        destination: str,
        *,
        producer: str = "p",
        durable: bool = True,
        priority: int = 4,
        expires: int = 0,
        block: bytes = b"",
    ) -> Sent:
        number = len(self.book) + 1
        body = f"{number}:".encode() + b"x" * (number % 5)
        sent = Sent(number, producer, broker, destination, body, block, durable, priority, expires)
        self.book[number] = sent
        self.note("send", sent, *(["lasts"] if expires else []))
        message = Message(destination, body, block, durable, priority, expires)
        if not sent.queue and durable and self.reaching:
            sent.must = {who for who in self.settled_durables if fits(self.durables[who], destination)}
        if not sent.queue and self.reaching and not (self.cuts or self.stops or self.removals):
            sent.must |= {
                each.receiver
                for each in self.alive()
                if each.settled and not each.durable_name and fits(each.destination, destination)
            }

        def act(core: Core) -> None:
            core.send(message)
            sent.message_id, sent.timestamp = message.message_id, message.timestamp
            core.confirm((None, sent))

        broker.run(act)
        return sent

    def join(
        self, broker: Broker, destination: str, *, durable_name: str = "", prefetch: int = 2, wants: bytes = b""
    ) -> Member:
        """A consumer comes. `wants`: the header line, ``name:number``, that its selector asks for."""
        options = ConsumerOptions(wants.decode().replace(":", " = ").strip())
        durable = {"client_id": "client", "durable_name": durable_name} if durable_name else {}

        def act(core: Core) -> Member:
            connection = core.connect(None)
            consumer = core.subscribe(
                connection, destination, "individual", prefetch=prefetch, options=options, **durable
            )
            member = Member(len(self.members), broker, destination, durable_name, connection, consumer, wants)
            consumer.context = member
            if any(each.destination == destination for each in self.members):
                self.shared.add(destination)
            self.members.append(member)
            if durable_name:
                self.durables[member.receiver] = destination
            core.start(consumer)
            return member

        self.note("join", broker.name, destination, durable_name, *([wants] if wants else []))
        self.changes += 1
        member: Member = broker.run(act)
        return member

    def leave(self, member: Member) -> None:
        """The consumer vanishes, with what it holds."""
        self.note("leave", member.broker.name, member.number, member.destination)
        self._end(member, BACK, ACKED)
        member.broker.run(lambda core: core.disconnect(member.connection))

    def unsubscribe(self, who: Receiver) -> None:
        """Remove a durable subscription whose consumer has left."""
        self.note("unsubscribe", *who)
        self._forget_durable(who)
        self.brokers[who[0]].run(lambda core: core.remove_subscription("client", who[1]))

    def began(self, broker: Broker) -> None:
        stored = {(broker.name, name): f"/topic/{queue.name}" for (_, name), queue in broker.core.subscriptions.items()}
        for who, pattern in list(self.durables.items()):
            if who[0] == broker.name and stored.get(who) != pattern:
                if who in self.settled_durables:
                    raise Broken(f"the durable subscription {who} is lost")
                self._forget_durable(who)
        self.durables |= stored  # also one whose removal was not committed

    def _forget_durable(self, who: Receiver) -> None:
        del self.durables[who]
        self.settled_durables.discard(who)
        for sent in self.book.values():
            sent.must.discard(who)

    def _end(self, member: Member, opened: str, acknowledged: str) -> None:
        member.alive = False
        self.changes += 1
        if not member.durable_name:
            for sent in self.book.values():
                sent.must.discard(member.receiver)
        for showing in self.showings(member):
            if showing.state == OPEN:
                showing.state = opened
            elif showing.state == ACKED:
                showing.state = acknowledged
        self.shared.add(member.destination)

    def crashed(self, broker: Broker, clean: bool) -> None:
        for member in self.alive():
            if member.broker is broker:
                if clean:
                    self.leave(member)
                else:
                    self._end(member, LOST, MAYBE)
        if not clean:
            for sent in self.book.values():
                if sent.broker is broker and not sent.stored:
                    sent.open = True
                for showings in sent.showings.values():
                    for showing in showings:
                        if showing.member.broker is broker and showing.state == ACKED:
                            showing.state = MAYBE

    def acknowledge(self, showing: Showing) -> None:
        self.note("ack", showing.sent, showing.member.number)
        showing.state = ACKED

        def act(core: Core) -> None:
            core.acknowledge(showing.member.consumer, showing.tag)
            core.confirm((None, showing))

        showing.member.broker.run(act)

    def reject(self, showing: Showing) -> None:
        self.note("nack", showing.sent, showing.member.number)
        showing.state = BACK
        self.shared.add(showing.member.destination)
        showing.member.broker.run(lambda core: core.reject(showing.member.consumer, showing.tag))

    def remove_peer(self, broker: Broker, peer: str) -> int:
        """`network remove`: what waits for the peer is released."""
        self.note("remove", broker.name, peer)
        self.removals += 1
        for sent in self.book.values():
            sent.released = True
            sent.must.clear()
        self.settled_durables.clear()  # what the peer wanted is forgotten, until it comes back
        count: int = broker.run(lambda core: core.links.remove(peer))
        return count

    # ---- looking

    def alive(self) -> list[Member]:
        return [member for member in self.members if member.alive]

    def showings(self, member: Member) -> Iterator[Showing]:
        for sent in self.book.values():
            for showing in sent.showings.get(member.receiver, ()):
                if showing.member is member:
                    yield showing

    def opened(self) -> list[Showing]:
        """What living consumers hold."""
        return [
            showing
            for sent in self.book.values()
            for showings in sent.showings.values()
            for showing in showings
            if showing.state == OPEN and showing.member.alive
        ]

    def acknowledge_all(self) -> bool:
        """Everybody is done with what he has; whether there was anything."""
        opened = self.opened()
        for showing in opened:
            self.acknowledge(showing)
        return bool(opened)

    # ---- what must hold at each delivery, and at each hop

    def arrived(self, message: Message) -> None:
        """A message wanders no more than there are reasons for."""
        route = message.route
        assert route is not None
        if len(route.passed) > len(self.brokers) * (1 + self.changes):
            raise Broken(f"{message.body!r} has gone round: {route.passed}")

    def show(self, broker: Broker, consumer: Consumer, entry: Entry) -> None:
        member: Member = consumer.context
        message = entry.message
        self.note("show", broker.name, member.number, message.body, entry.deliveries)
        sent = self.book.get(int(message.body.split(b":")[0]))
        if sent is None:
            raise Broken(f"{message!r} was never sent")
        if member.wants not in message.header_block:
            raise Broken(f"{sent} is not for {member}")
        self._check_content(sent, message)
        self._check_reason(sent, member, entry)
        self._check_order(sent, member, entry)
        showing = Showing(sent, member, entry.tag, entry.deliveries)
        sent.showings[member.receiver].append(showing)

    def _check_content(self, sent: Sent, message: Message) -> None:
        found = (message.body, message.header_block, message.priority, message.durable, message.destination)
        wanted = (sent.body, sent.block, sent.priority, sent.durable, sent.destination)
        if found != wanted:
            raise Broken(f"{sent} was changed: {wanted} is now {found}")
        if (message.message_id, message.timestamp, message.expires) != (sent.message_id, sent.timestamp, sent.expires):
            raise Broken(f"{sent} has another id or time: {message.message_id!r} {message.timestamp} {message.expires}")

    def _check_reason(self, sent: Sent, member: Member, entry: Entry) -> None:
        earlier = sent.showings[member.receiver]
        if not earlier:
            if entry.deliveries and not (self.stops or self.removals):
                raise Broken(f"{sent} is marked as redelivered, and nobody has seen it")
            return
        last = earlier[-1]
        if sent.released or (self.crashes and not sent.durable):  # a crash may lose that it was passed on, too
            return
        if last.state == OPEN:
            raise Broken(f"{sent} is shown to {member}, and {last.member} still has it")
        if last.state in (ACKED, DONE):
            raise Broken(f"{sent} is shown again after it was acknowledged")
        if not entry.deliveries:
            raise Broken(f"{sent} is shown again, and not marked as redelivered")

    def _check_order(self, sent: Sent, member: Member, entry: Entry) -> None:
        """One producer, one priority, one consumer anywhere, no redelivery."""
        if not sent.queue or member.destination in self.shared or entry.deliveries or self.removals:
            return
        if not self.one_way and (self.cuts or self.stops or not 0 < member.settled < sent.number):
            return  # messages that go two ways may overtake each other
        key = (sent.producer, sent.priority)
        last = member.last.get(key)
        if last is not None and last.number > sent.number:
            raise Broken(f"{sent} is shown behind {last}")
        member.last[key] = sent

    # ---- what must hold at rest

    def settled(self) -> None:
        """Everything has come to rest with all links up: whoever is there now is known everywhere."""
        for member in self.alive():
            member.settled = len(self.book) or 1
        self.settled_durables = set(self.durables)

    def waiting(self, broker: Broker, queue: Queue) -> list[Message]:
        """What is ready in a queue; of transient messages those in the window."""
        stored = broker.store.read_page(queue.queue_id, 0, 100_000, 1 << 30).entries
        messages = {row.order: row.message for row in stored if row.order not in queue.outstanding}
        return list((messages | {entry.order: entry.message for entry in queue.window}).values())

    def census(self) -> Counter[int]:
        """How many copies of each queue's message there are in the stores, and in no other place."""
        found: Counter[int] = Counter()
        for broker in self.brokers.values():
            assert not broker.batch.work, "there is something to commit"
            for queue in broker.core.queues.values():
                if queue.kind not in (QUEUE, LINK):
                    continue
                page = broker.store.read_page(queue.queue_id, 0, 100_000, 1 << 30)
                assert not page.corrupt
                assert len(page.entries) == queue.count, queue
                for row in page.entries:
                    sent = self.book[int(row.message.body.split(b":")[0])]
                    found[sent.number] += sent.queue
        return found

    def check_census(self) -> None:
        """Each confirmed durable message of a queue was consumed, or stands in exactly one place of the network."""
        found = self.census()
        for sent in self.book.values():
            if not sent.queue or not sent.durable:
                continue
            states = {showing.state for showing in sent.showings[("queue",)]}
            copies = found[sent.number]
            if sent.expires and sent.expires <= self.now:
                if copies > 1 and not sent.released:
                    raise Broken(f"{sent} has expired, and is stored {copies} times")
                continue
            if copies > 1 and not sent.released:
                raise Broken(f"{sent} is stored {copies} times")
            if DONE in states and copies and not sent.released:
                raise Broken(f"{sent} was consumed, and is still stored")
            if not copies and sent.stored and not states & {DONE, MAYBE}:
                raise Broken(f"{sent} is lost: {states}")

    def check_topics(self) -> None:
        """Nobody has missed what he had to get, and nobody got it twice."""
        for sent in self.book.values():
            if sent.queue:
                continue
            if sent.expires and sent.expires <= self.now:
                continue
            for who in sent.must:
                if (sent.stored or not sent.open) and not sent.showings[who]:
                    raise Broken(f"{sent} never came to {who}")
        for broker in self.brokers.values():
            for queue in broker.core.queues.values():
                assert queue.kind != SUBSCRIPTION or not queue.depth, f"{queue} was not emptied"

    def check_stores(self) -> None:
        for broker in self.brokers.values():
            report = broker.verify()
            assert report.ok, (broker, report.problems)


def fits(pattern: str, destination: str) -> bool:
    """Whether a topic pattern takes a destination; of patterns only a last ``*`` or ``>``, which here mean the same."""
    if pattern[-1] in "*>":
        return destination.startswith(pattern[:-1])
    return pattern == destination
