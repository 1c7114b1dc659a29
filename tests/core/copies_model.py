"""A naive model of where the copies of a send are: routing, limits, message keys, expiry and transactions together.

Written from docs/activemq.md: dictionaries and lists, which know no window, page, batch or shared body. It is told what
happens (it is the driver's observer), says what must happen, and raises AssertionError where the two differ. How often
something is delivered is the subject of `model`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pybroker.core.consumer import Connection, Consumer
from pybroker.core.entry import Entry
from pybroker.core.queue import Queue
from pybroker.core.temporary import TemporaryQueue
from pybroker.destination import TEMPORARY_QUEUE, temporary_destination
from pybroker.errors import BrokerError
from pybroker.message import Message, decode_headers
from pybroker.operations import order_of
from tests.core import model
from tests.core.driver import Driver

DLQ = "/queue/DLQ"
SECRET = "5" * 32
TEMPORARY = str(temporary_destination(TEMPORARY_QUEUE, SECRET))
KEY_WINDOW_MS = 3_000
FILTERS: dict[str, Callable[[bytes], bool]] = {  # selectors, and which header blocks they are for
    "": lambda block: True,
    "s = '1'": lambda block: b"\ns:1\n" in b"\n" + block,
    "s IS NULL": lambda block: b"\ns:" not in b"\n" + block,
}


@dataclass(frozen=True)
class Rule:
    """A composite destination."""

    name: str
    forward_to: tuple[str, ...]
    forward_only: bool = True
    filter: str = ""


RULES = (
    Rule("/queue/c", ("/queue/a", "/topic/VirtualTopic.v")),
    Rule("/queue/f", ("/queue/small",), True, "s = '1'"),
    Rule("/queue/f", ("/queue/drop",), False, "s IS NULL"),
    Rule("/topic/t", ("/queue/m", "/topic/VirtualTopic.v"), False),
    Rule("/queue/r1", ("/queue/r2",)),
    Rule("/queue/r2", ("/queue/r1",)),
)
MIRRORS = {"/queue/m": "/topic/VirtualTopic.Mirror.m", "/queue/c": "/topic/VirtualTopic.Mirror.c"}
MESSAGES_MAX = {"/queue/small": 2, "/queue/drop": 3, "/queue/Consumer.y.VirtualTopic.v": 3, DLQ: 3}
DROPPING = "/queue/drop"
BYTES_MAX = {"/queue/b": 30}
EXPIRED_ARE_DEAD_LETTERS = ("/queue/a", "/queue/drop", "/queue/Consumer.y.VirtualTopic.v")


@dataclass(frozen=True)
class Sent(model.Sent):
    """A message as its producer gave it, with what its headers ask for."""

    key: str
    delay: int = 0  # milliseconds for which it is scheduled


@dataclass(eq=False)
class Copy:
    """One message in one place."""

    sent: Sent
    destination: str
    block: bytes
    expires: int
    order: int
    age: int
    durable: bool
    holder: Consumer | None = None
    visible: bool = False  # the holder has seen it
    settled: bool = False  # in a transaction
    was_out: bool = False  # some consumer had it at some time

    @property
    def size(self) -> int:
        return len(self.sent.body) + len(self.block)


@dataclass
class State:
    """All that there is."""

    places: dict[str, dict[int, Copy]] = field(default_factory=dict)  # by order
    collecting: set[str] = field(default_factory=set)  # queues of virtual topics' consumers
    subscriptions: dict[str, tuple[str, str]] = field(default_factory=dict)  # durable: place: topic's pattern, selector
    keys: dict[tuple[str, str], tuple[int, bool]] = field(default_factory=dict)  # until when; whether stored
    schedules: list[tuple[int, int, Sent]] = field(
        default_factory=list
    )  # when due, and in the order in which they came
    drops_max: int = 0  # how many may have been dropped since the last look

    def durable(self) -> State:
        """What a crash leaves of it."""
        return State(
            {
                place: {
                    order: replace(
                        each, holder=None, visible=False, settled=False, was_out=each.was_out or bool(each.holder)
                    )
                    for order, each in copies.items()
                    if each.durable
                }
                for place, copies in self.places.items()
            },
            set(self.collecting),
            dict(self.subscriptions),
            {key: (until, stored) for key, (until, stored) in self.keys.items() if stored},
            [each for each in self.schedules if each[2].durable],
            self.drops_max,
        )


@dataclass
class Pending:
    """A transaction."""

    sent: list[Sent] = field(default_factory=list)
    settled: list[tuple[str, Copy, bool]] = field(default_factory=list)  # and whether by an acknowledgement


def fits(pattern: str, topic: str) -> bool:
    """Of the patterns that the machine uses."""
    return pattern == topic or (pattern.endswith(">") and topic.startswith(pattern[:-1]))


def place_of(queue: Queue) -> str:
    if isinstance(queue, TemporaryQueue):
        return str(queue.destination)
    if queue.kind == "queue":
        return f"/queue/{queue.name}"
    assert queue.kind == "subscription", queue
    return f"{queue.client_id}/{queue.subscription}"


class CopiesModel:
    def __init__(self) -> None:
        self.driver: Driver  # set by whoever makes both
        self.state = State()
        self.stored = State()
        self.owner: Connection | None = None  # of the temporary queue, which is there as long as that is
        self.members: dict[Consumer, tuple[str, str, int]] = {}  # place, selector, prefetch
        self.leaving: set[Consumer] = (
            set()
        )  # one after the other in the call under way: each may be given what others return
        self.pending: dict[tuple[Connection, str], Pending] = {}
        self.sents: dict[int, Sent] = {}
        self.ids: dict[int, bytes] = {}
        self.expected: Counter[tuple[str, int]] = Counter()  # arrivals that the call under way must bring
        self.letters: Counter[tuple[str, int]] = Counter()  # dead letters of it, by the place that they name
        self.spare = 0  # so many more are in the queue that drops: it was to drop them when the process died
        self.age = 0

    @property
    def now(self) -> int:
        return self.driver.now

    @property
    def drops_max(self) -> int:
        """How many the queue that drops may have dropped since the last look."""
        return max(self.state.drops_max, self.spare)

    def copies(self, place: str) -> dict[int, Copy]:
        return self.state.places.setdefault(place, {})

    def expired(self, each: Sent | Copy) -> bool:
        return bool(each.expires) and each.expires <= self.now

    # ---- where a message goes

    def names(self, sent: Sent) -> list[str]:
        """The destinations that get a copy."""
        first, *others = sent.destination.split(",")
        kind = first[: first.index("/", 1) + 1]
        given = [first] + [other if other.startswith("/") else kind + other for other in others]
        reached: list[str] = []
        kept: list[str] = []
        todo = list(given)
        while todo:
            name = todo.pop(0)
            if name in reached:
                continue
            reached.append(name)
            rules = [rule for rule in RULES if rule.name == name and FILTERS[rule.filter](sent.block)]
            for rule in rules:
                todo.extend(rule.forward_to)
            if not any(rule.forward_only for rule in rules):
                kept.append(name)
            if name in MIRRORS:
                todo.append(MIRRORS[name])
        return kept or given

    def targets(self, sent: Sent) -> dict[str, str]:
        """Queues and durable subscriptions that get a copy, with the destination that it has there."""
        found: dict[str, str] = {}
        for name in self.names(sent):
            if name.startswith("/queue/") or (name == TEMPORARY and self.owner is not None):
                found[name] = name
            if not name.startswith("/topic/"):
                continue
            topic = name.removeprefix("/topic/")
            for queue in self.state.collecting:
                if queue.split(".", 2)[2] == topic:
                    found[queue] = queue
        return found

    def subscribed(self, sent: Sent) -> Counter[str]:
        """Durable subscriptions, which get a copy from each topic."""
        found: Counter[str] = Counter()
        for name in self.names(sent):
            for place, (pattern, selector) in self.state.subscriptions.items():
                if name.startswith("/topic/") and fits(pattern, name) and FILTERS[selector](sent.block):
                    found[place] += 1
        return found

    def full(self, sent: Sent) -> bool:
        """Whether one of the destinations has no room."""
        for place in self.targets(sent):
            copies = [each for each in self.copies(place).values() if each.holder is not None or not self.expired(each)]
            if place != DROPPING and len(copies) >= MESSAGES_MAX.get(place, 1_000):
                return True
            if sum(each.size for each in copies) >= BYTES_MAX.get(place, 100_000):
                return True
        return False

    # ---- what tests do

    def make(
        self, destination: str, block: bytes, durable: bool, priority: int, expires: int, key: str, delay: int
    ) -> Sent:
        number = len(self.sents) + 1
        if key:
            block += b"message-key:%b\n" % key.encode()
        sent = Sent(number, destination, b"%d:xxxxx" % number, block, durable, priority, expires, key, delay)
        self.sents[number] = sent
        return sent

    def repeats(self, sent: Sent) -> bool:
        until, stored = self.state.keys.get((sent.destination, sent.key), (0, False))
        return bool(sent.key) and until > self.now and (stored or not sent.durable)

    def expect(self, sent: Sent) -> None:
        """The call under way sends this message."""
        if self.repeats(sent):
            return
        if self.expired(sent):
            for name in self.names(sent):
                if name in EXPIRED_ARE_DEAD_LETTERS:
                    self.letters[name, sent.number] += 1
            return
        if sent.key and sent.destination not in BYTES_MAX:
            self.state.keys[sent.destination, sent.key] = (self.now + KEY_WINDOW_MS, sent.durable)
        if sent.delay:
            self.age += 1
            self.state.schedules.append((self.now + sent.delay, self.age, sent))
            return
        self._expect_copies(sent)

    def _expect_copies(self, sent: Sent) -> None:
        self.make_queues([sent])
        for place in self.targets(sent):
            self.expected[place, sent.number] += 1
        for place, count in self.subscribed(sent).items():
            self.expected[place, sent.number] += count

    def make_queues(self, sents: list[Sent]) -> None:
        """Queues are there before anything is sent to them: one of a virtual topic's consumer gets all that a transaction sends."""
        for sent in sents:
            self.state.collecting.update(name for name in self.names(sent) if name.startswith("/queue/Consumer."))

    def held_by(self, consumer: Consumer) -> list[Copy]:
        """What a consumer could settle, or will be able to."""
        place = self.members[consumer][0]
        return [each for each in self.copies(place).values() if each.holder is consumer and not each.settled]

    def give_back(self, each: Copy) -> None:
        each.holder = None
        each.visible = each.settled = False

    def leave(self, consumer: Consumer) -> None:
        for each in self.held_by(consumer):
            self.give_back(each)
        del self.members[consumer]
        self.leaving.add(consumer)

    def disconnect(self, connection: Connection) -> None:
        """The call under way ends a connection."""
        for _, each, _ in self.pending.pop((connection, "x"), Pending()).settled:
            self.give_back(each)
        for consumer in [each for each in self.members if each.connection is connection]:
            self.leave(consumer)
        if self.owner is connection:
            self.owner = None
            self.state.places.pop(TEMPORARY, None)

    def forget(self, place: str, each: Copy) -> None:
        del self.state.places[place][each.order]

    def end_call(self) -> None:
        assert not +self.expected, f"never arrived: {+self.expected}"
        assert not +self.letters, f"no dead letters: {+self.letters}"
        self.leaving.clear()

    def nobody_gets(self, sent: Sent) -> bool:
        return not self.targets(sent) and not self.subscribed(sent)

    def _released(self, sent: Sent) -> None:
        """A scheduled message is sent: its first copy arrives."""
        job = next(each for each in self.state.schedules if each[2] is sent)
        assert job[0] <= self.now, f"{job} is sent too early"
        assert not self.full(sent), f"{job} is sent where there is no room"
        for each in sorted(self.state.schedules):
            if each < job and (each[2].destination, each[2].durable) == (sent.destination, sent.durable):
                assert self.nobody_gets(each[2]), f"{job} is sent before {each}"
                self.state.schedules.remove(each)
        self.state.schedules.remove(job)
        self._expect_copies(sent)

    def schedules_at_rest(self, count_max: int) -> int:
        """What is due is sent, if there is room; where so many wait, others need not be looked at. How many are left."""
        self.state.schedules = [
            each
            for each in self.state.schedules
            if each[0] > self.now or not self.nobody_gets(each[2]) or self.full(each[2])
        ]
        due = [each for each in sorted(self.state.schedules) if each[0] <= self.now]
        first = {each[2].destination: each for each in reversed(due)}
        if len(due) < count_max:
            for each in first.values():
                assert self.full(each[2]), f"{each} is not sent"
        return len(self.state.schedules)

    def at_rest(self) -> None:
        """What has expired is gone."""
        for place, copies in self.state.places.items():
            for each in list(copies.values()):
                if each.holder is None and self.expired(each):
                    assert place not in EXPIRED_ARE_DEAD_LETTERS, f"{each} is no dead letter"
                    self.forget(place, each)

    def dropped(self, left: set[int]) -> int:
        """What is left in the queue that drops, by order; how many it has dropped. Raises where it must not have dropped one."""
        copies = self.copies(DROPPING)
        assert left <= copies.keys(), left - copies.keys()
        gone = [each for order, each in copies.items() if order not in left]
        kept = [each for order, each in copies.items() if order in left and not each.was_out]
        assert all(each.holder is None for each in gone), f"dropped from its consumer: {gone}"
        assert len(gone) <= self.drops_max, f"{gone}, not only {self.drops_max}"
        for each in gone:
            older = [other for other in kept if other.sent.priority == each.sent.priority and other.age < each.age]
            assert not older, f"{each} is not the oldest: {older}"  # of all priorities: of what is in memory
            self.forget(DROPPING, each)
        full = len(copies) > MESSAGES_MAX[DROPPING] + self.spare
        assert not full or any(each.was_out for each in copies.values()), copies
        self.state.drops_max = 0
        self.spare = min(self.spare, max(0, len(copies) - MESSAGES_MAX[DROPPING]))
        return len(gone)

    # ---- Observer: what the broker does

    def accepted(self, queue: Queue, message: Message) -> None:
        place = place_of(queue)
        number = int(message.body.partition(b":")[0])
        sent = self.sents[number]
        durable = sent.durable and place != TEMPORARY
        assert (message.body, message.priority, message.durable) == (sent.body, sent.priority, durable), message
        if any(each is sent for *_, each in self.state.schedules):
            self._released(sent)
            self.ids.pop(number, None)  # of a sending that a crash took back
        assert self.ids.setdefault(number, message.message_id) == message.message_id, "copies have one id"
        if self.expected[place, number] > 0:
            self.expected[place, number] -= 1
            assert message.expires == sent.expires, message
            job = message.header_block.removesuffix(sent.block)
            assert re.fullmatch(rb"scheduledJobId:\d+\n" if sent.delay else b"", job), message
            assert message.header_block.endswith(sent.block), message
            if place.startswith("/"):
                assert message.destination == place, message
            else:
                assert message.destination in self.names(sent), message
        else:
            assert place == DLQ, f"{message} was not sent to {place}"
            self._letter(message, sent)
        self.age += 1
        order = order_of(message.priority, queue.next_sequence)
        copies = self.copies(place)
        copies[order] = Copy(
            sent, message.destination, message.header_block, message.expires, order, self.age, message.durable
        )
        if place == DROPPING:
            self.state.drops_max = max(self.state.drops_max, len(copies) - MESSAGES_MAX[DROPPING])
            self.spare = 0

    def _letter(self, letter: Message, sent: Sent) -> None:
        headers = dict(reversed(decode_headers(letter.header_block)))
        origin = headers["dead-letter-origin"]
        assert headers["dead-letter-reason"] == "expired", letter
        assert int(headers["dead-letter-expires"]) == sent.expires, letter
        assert (letter.destination, letter.expires) == (DLQ, 0), letter
        assert letter.header_block.endswith(sent.block), letter
        if self.letters[origin, sent.number] > 0:
            self.letters[origin, sent.number] -= 1
            return
        assert origin in EXPIRED_ARE_DEAD_LETTERS, letter
        for each in list(self.copies(origin).values()):
            if each.sent is sent and self.expired(each) and each.holder is None:
                self.forget(origin, each)
                return
        raise AssertionError(f"{letter} was not there")

    def dispatched(self, queue: Queue, consumer: Consumer, entry: Entry) -> None:
        if consumer in self.leaving:
            if place_of(queue) != TEMPORARY:
                self.copies(place_of(queue))[entry.order].was_out = True
            return
        place, selector, _ = self.members[consumer]
        each = self.copies(place)[entry.order]
        assert place == place_of(queue), place
        assert each.holder is None, f"{each} is another's"
        assert FILTERS[selector](each.block) or place.startswith("client/"), each
        assert not self.expired(each), each
        assert (entry.message.body, entry.message.header_block) == (each.sent.body, each.block), each
        each.holder = consumer
        each.was_out = True

    def shown(self, consumer: Consumer, entry: Entry) -> None:
        each = self.copies(self.members[consumer][0])[entry.order]
        assert each.holder is consumer, each
        if each.durable:
            kept = self.stored.places.get(self.members[consumer][0], {})
            assert each.order in kept, f"{each} was shown before its commit"
        each.visible = True

    def confirmed(self, token: Sent) -> None:
        """The receipt of a durable message with a key."""
        assert (token.destination, token.key) in self.stored.keys, f"{token} is confirmed, and its key is not stored"

    def closing(self, consumer: Consumer, error: BrokerError) -> None:
        raise AssertionError(f"{consumer} is closed: {error}")

    def sealed(self) -> State:
        return self.state.durable()

    def written(self, snapshot: State) -> None:
        self.stored = snapshot

    def crashed(self) -> None:
        """All that was in memory only is gone."""
        self.state = self.stored.durable()
        self.spare = max(0, len(self.copies(DROPPING)) - MESSAGES_MAX[DROPPING])
        self.members.clear()
        self.pending.clear()
        self.owner = None
