"""Consumers of several queues: of a pattern (``/queue/orders.*``), of a composite (``/queue/a,/queue/b``). A part of `Core`. Pure.

Such a consumer, the *head*, has one *member* in each of its queues. The credit, the bytes, the tags and what is unacknowledged are
the head's, so all of its members may be given something, or none: while the head *rests* (it has no credit, or its connection is
paused) no member is listed. When there is credit again, the members whose queues may have something share it, in turn, so that a
deep queue does not starve another one.

Dead-letter queues are consumed by a pattern only if the pattern itself reads as the name of one (``/queue/DLQ.>``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from pybroker.consumer_options import ConsumerOptions
from pybroker.core.choosing import joined
from pybroker.core.consumer import JOIN_WORK, Connection, Consumer
from pybroker.core.kinds import QUEUE
from pybroker.destination import Destination, matches
from pybroker.errors import LimitExceeded, SubscriptionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pybroker.core.broker import Core
    from pybroker.core.entry import Entry
    from pybroker.core.queue import Queue
    from pybroker.message import Message


class Head(Consumer):
    """What a client knows as its consumer, and the run time, too. It has no queue of its own.

    members  in the order in which their queues came
    waiting  those that are not listed though their queues may have something for them, who is next first
    resting  no member is listed, apart from those that are being served
    """

    __slots__ = ("_served", "_serving", "members", "patterns", "resting", "started", "waiting")

    members: dict[Queue, Member]

    def __init__(
        self,
        connection: Connection,
        patterns: tuple[Destination, ...],
        ack_mode: str,
        prefetch: int,
        size_max: int,
        context: Any,
        options: ConsumerOptions,
    ) -> None:
        super().__init__(connection, cast("Queue", None), ack_mode, prefetch, size_max, context, options)
        self.patterns = patterns
        self.members = {}
        self.waiting: dict[Member, None] = {}
        self.resting = True
        self.started = False
        self._serving = False
        self._served: list[Member] = []

    @property
    def parts(self) -> Iterable[Consumer]:
        return self.members.values()

    def start(self) -> None:
        self.started = True
        self.go_on()

    def go_on(self) -> None:
        if self.resting and self.started and self.able and not self._serving:
            self._serve()

    def rest(self) -> None:
        listed = self._served if self.resting else list(self.members.values())
        self.resting = True
        for member in listed:
            member.queue.unlist_consumer(member)
            if member.may_have_more:
                self.waiting[member] = None
        self._served = []

    def spent(self, consumer: Consumer) -> None:
        """A member has used up what there was for it, and is not listed any more."""
        member = self.members[consumer.queue]
        if not self.able:
            self.rest()
        self.waiting.pop(member, None)
        if member.may_have_more:
            self.waiting[member] = None

    def wait(self, member: Member) -> None:
        """Something in the queue of a member may be for it."""
        if self.resting and not member.listed and member.share is None:
            self.waiting.setdefault(member)
            self.go_on()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Meanwhile no credit that has come back is given away."""
        self._serving = True
        try:
            yield
        finally:
            self._serving = False

    def _serve(self) -> None:
        """Let members that wait have equal shares of the credit, in turn; when none waits, list them all."""
        self._serving = True
        while self.waiting and self.able:
            equal = max(1, self.credit // len(self.waiting))
            for member in list(self.waiting):
                if not self.able:
                    break
                del self.waiting[member]
                self._served.append(member)
                member.share = equal
                member.queue.list_consumer(member)
                member.queue.dispatch()
                member.share = None
        self._serving = False
        if self.able:
            self.resting = False
            self._served = []
            for member in list(self.members.values()):
                if not member.listed:
                    member.queue.list_consumer(member)
                    if member.may_have_more:
                        member.queue.dispatch()
                        if self.resting:
                            return


class Member(Consumer):
    """A head in one of its queues. `share`: how many messages it may be given of the head's credit; None = what there is."""

    __slots__ = ("head", "share")

    head: Head

    def __init__(self, head: Head, queue: Queue, matches: Callable[[Message], bool] | None) -> None:
        self.head = head
        self.share: int | None = None
        self.connection = head.connection
        self.sink = head.sink
        self.queue = queue
        self.ack_mode = head.ack_mode
        self.options = head.options
        self.context = head.context
        self.unacked = head.unacked
        self.matches = matches
        self.listed = False

    @property
    def able(self) -> bool:
        head = self.head
        return head.able and (not head.resting or (self.share is not None and self.share > 0))

    @property
    def may_have_more(self) -> bool:
        """Whether something in its queue is ready, for whomever."""
        return bool(self.queue.window) or self.queue.unloaded is not None or bool(self.queue.stranded)

    @property
    def credit(self) -> int:
        return self.head.credit if self.share is None else min(self.head.credit, self.share)

    @credit.setter
    def credit(self, value: int) -> None:
        more = value - self.credit
        self.head.credit += more
        if self.share is not None:
            self.share += more

    @property
    def size(self) -> int:
        return self.head.size

    @size.setter
    def size(self, value: int) -> None:
        self.head.size = value

    @property
    def size_max(self) -> int:
        return self.head.size_max

    @size_max.setter
    def size_max(self, value: int) -> None:
        self.head.size_max = value

    @property
    def last_tag(self) -> int:
        return self.head.last_tag

    @last_tag.setter
    def last_tag(self, value: int) -> None:
        self.head.last_tag = value

    @property
    def holding(self) -> int:
        return self.head.holding

    @holding.setter
    def holding(self, value: int) -> None:
        self.head.holding = value


class Wildcards:
    """The heads of one core."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._heads: dict[Head, None] = {}

    def subscribe(self, head: Head, matches: Callable[[Message], bool] | None) -> None:
        """Let a new head consume what there is. Queues that it names are made, all or (LimitExceeded) none."""
        core = self._core
        others = sorted({each.kind for each in head.patterns if each.kind != QUEUE})
        if others:
            raise SubscriptionError(f"a subscription to several destinations is for queues, not for a {others[0]}")
        limit = core.limits.composite_destinations_max
        if len(head.patterns) > limit:
            raise LimitExceeded("limits.composite_destinations_max", limit, "too many destinations in a composite")
        named = [str(each) for each in head.patterns if not each.is_pattern]
        wanted = [text for text, queue in core.by_destination.items() if self._wants(head, queue)]
        if head.connection.members + len({*named, *wanted}) > core.limits.wildcard_queues_max:
            raise self._too_many()
        core.routing.make_queues(named)
        head.matches = matches
        head.connection.consumers[head] = None
        self._heads[head] = None
        for text in dict.fromkeys((*wanted, *named)):
            self._join(head, core.by_destination[text])

    def added(self, queue: Queue) -> None:
        """There is a new queue, with nothing in it."""
        for head in self._heads:
            if not self._wants(head, queue):
                continue
            if head.connection.members < self._core.limits.wildcard_queues_max:
                self._join(head, queue)
            else:  # it must not believe that it has all
                self._core.closing.append((head, self._too_many()))

    def _too_many(self) -> LimitExceeded:
        limit = self._core.limits.wildcard_queues_max
        return LimitExceeded(
            "limits.wildcard_queues_max", limit, "consumers of several queues have too many on one connection"
        )

    def _wants(self, head: Head, queue: Queue) -> bool:
        return queue.kind == QUEUE and any(self._consumes(pattern, queue) for pattern in head.patterns)

    def _join(self, head: Head, queue: Queue) -> None:
        core = self._core
        core.work += JOIN_WORK
        head.connection.members += 1
        member = head.members[queue] = Member(head, queue, head.matches)
        queue.consumers[member] = None
        queue.members = (*queue.members, member)
        joined(queue, member)
        core.links.joined(queue)
        if core.watched:
            core.advisories.consumer(member, True)
        if head.resting:
            head.waiting[member] = None
        else:
            queue.list_consumer(member)

    def _consumes(self, pattern: Destination, queue: Queue) -> bool:
        if not pattern.is_pattern:
            return pattern.name == queue.name
        if queue.is_dead_letter_queue and not self._core.policies.is_dead_letter_queue(pattern):
            return False
        return matches(pattern.parts, tuple(queue.name.split(".")))

    def leave(self, head: Head) -> None:
        """End a head: each of its unacknowledged messages returns to its own queue."""
        if self._heads.pop(head, self) is self:
            return
        core = self._core
        head.rest()
        head.started = False
        head.credit = 0
        head.connection.consumers.pop(head, None)
        returning: dict[Queue, list[Entry]] = {queue: [] for queue in head.members}
        for entry in head.unacked.values():
            returning[entry.queue].append(entry)
        head.unacked.clear()
        members, head.members = head.members, {}
        head.connection.members -= len(members)
        core.work += JOIN_WORK * len(members)
        head.waiting.clear()
        for queue, member in members.items():
            del queue.consumers[member]
            queue.members = tuple(each for each in queue.members if each is not member)
            if queue.choosing is not None:
                queue.choosing.leave(member)
            core.links.left(queue)
        for queue, entries in returning.items():
            queue.put_back(entries)
            queue.dispatch()
            if core.watched:
                core.advisories.consumer(members[queue], False)


def share(queue: Queue) -> None:
    """A queue with members may have something for them."""
    for member in queue.members:
        member.head.wait(member)


def reject(head: Consumer, entries: Iterable[Entry]) -> None:
    """A head can't use these deliveries."""
    assert isinstance(head, Head)
    queues: dict[Queue, list[Entry]] = {}
    for entry in entries:
        entry.queue.settle(entry)
        queues.setdefault(entry.queue, []).append(entry)
    with head.held():  # a dead letter among them must not let what stands behind the others out before them
        for queue, returning in queues.items():
            queue.put_back(returning)
    for queue in queues:
        queue.dispatch()
