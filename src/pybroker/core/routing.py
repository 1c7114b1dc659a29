"""Where a sent message goes beside its own destination: composites, virtual topics, mirrored queues. A part of `Core`. Pure.

All copies of one send are emitted in one turn, and so in one batch. They have one id, one body, and each its own destination; a
destination gets one copy, whatever ways lead to it, so forwarding in a circle ends. Copies that arrive from other brokers are not
routed again: the broker that took the send has made all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pybroker.config import CompositeEntry, RoutingConfig
from pybroker.core.advisories import is_advisory
from pybroker.core.queue import Queue
from pybroker.destination import QUEUE, TOPIC, Destination, matches, parse_composite, parse_destination
from pybroker.errors import InvalidDestination, LimitExceeded, shown
from pybroker.message import Message
from pybroker.selectors import compile_selector

if TYPE_CHECKING:
    from pybroker.core.broker import Core

COPY_WORK = 2  # a copy takes as long as so many messages
PLACES_MAX = 10_000  # names of which it is remembered what concerns them


class Rule(NamedTuple):
    """One entry of the configuration. `admits`: whether a message is forwarded; None = each is."""

    pattern: Destination
    forward_to: tuple[str, ...]
    forward_only: bool
    admits: Callable[[Message], bool] | None


class Place(NamedTuple):
    """What concerns one name that is sent to. `mirror`: the topic that gets a copy of each message, or None."""

    target: Destination
    rules: tuple[Rule, ...]
    mirror: str | None

    @property
    def spreads(self) -> bool:
        """Whether what is sent there may go elsewhere, too."""
        return bool(self.rules or self.mirror)


class Routing:
    """The rules of one core, and the queues that collect what is sent to virtual topics."""

    def __init__(self, core: Core, config: RoutingConfig, composites: Iterable[CompositeEntry]) -> None:
        self._core = core
        self._rules = [_rule(entry) for entry in composites]
        self._mirrored = [parse_destination(pattern) for pattern in config.mirrored_queues]
        self._mirror = f"/topic/{config.mirror_prefix}", config.mirror_suffix
        self._virtual = tuple(config.virtual_topics.split(".")) if config.virtual_topics else ()
        self._consumers = tuple(config.virtual_consumers.rstrip(".").split("."))
        self._collecting: dict[str, list[Queue]] = {}  # of each virtual topic
        self._places: dict[str, Place] = {}  # of names that were sent to

    # ---- which rules there are for a name

    def _rules_of(self, target: Destination) -> tuple[Rule, ...]:
        return tuple(
            rule
            for rule in self._rules
            if rule.pattern.kind == target.kind and matches(rule.pattern.parts, target.parts)
        )

    def _mirror_of(self, target: Destination) -> str | None:
        if target.kind == QUEUE and any(matches(pattern.parts, target.parts) for pattern in self._mirrored):
            prefix, suffix = self._mirror
            return f"{prefix}{target.name}{suffix}"
        return None

    def concerns(self, target: Destination) -> bool:
        """Whether what is sent to a name may go elsewhere, too."""
        return bool(self._rules_of(target) or self._mirror_of(target))

    def place(self, text: str) -> Place:
        """What concerns one name. Raises InvalidDestination where nothing can be sent to it, or a copy to its mirror."""
        place = self._places.get(text)
        if place is None:
            target = parse_destination(text)
            if target.is_pattern:
                raise InvalidDestination(f"{target} is a pattern: a message is sent to one name")
            if is_advisory(target):
                raise InvalidDestination(f"{target} is for the broker's own advisories: send to another topic")
            mirror = self._mirror_of(target)
            if mirror is not None:
                try:
                    self.place(mirror)
                except InvalidDestination as error:
                    raise InvalidDestination(f"{shown(text)} is mirrored, and its mirror can't be: {error}") from None
            if len(self._places) >= PLACES_MAX:
                self._places.clear()
            place = self._places[text] = Place(target, self._rules_of(target), mirror)
        return place

    def parse(self, text: str) -> list[str]:
        """The names that a send names. Raises InvalidDestination, LimitExceeded."""
        if "," not in text:
            self.place(text)
            return [text]
        names = [str(target) for target in parse_composite(text)]
        limit = self._core.limits.composite_destinations_max
        if len(names) > limit:
            raise LimitExceeded("limits.composite_destinations_max", limit, "too many destinations in a composite")
        for name in names:
            self.place(name)
        return names

    def check(self, text: str) -> None:
        """Raise what a send would raise for one of the names that it, or any rule, leads to."""
        self._spread(None, self.parse(text))

    def destinations(self, message: Message) -> list[str]:
        """The names that get a copy. Raises as `parse`."""
        queue = self._core.by_destination.get(message.destination)
        if queue is not None and not queue.spread:
            return [message.destination]
        return self._spread(message, self.parse(message.destination))

    def _spread(self, message: Message | None, names: Sequence[str]) -> list[str]:
        """The names that a message reaches by way of `names`; None: whatever filters may say of it."""
        pending = list(names)
        seen: set[str] = set()
        found = []
        for text in pending:  # grows meanwhile
            if text in seen:
                continue
            seen.add(text)
            place = self.place(text)
            rules = place.rules
            admitting = [rule for rule in rules if message is None or rule.admits is None or rule.admits(message)]
            for rule in admitting:
                pending += rule.forward_to
            if not any(rule.forward_only for rule in admitting):
                found.append(text)
            if place.mirror is not None:
                pending.append(place.mirror)
        return found or list(names)  # entries that only forward lead in a circle: it stays

    def make_queues(self, names: Iterable[str]) -> None:
        """Make those of the names that are queues and are not there: all of them, or (LimitExceeded) none.

        To be done before anything is sent there: meanwhile other queues may be made, of dead letters for one.
        """
        core = self._core
        limit = core.limits.destinations_max
        new = {name: None for name in names if name.startswith("/queue/") and name not in core.by_destination}
        if new and len(core.queues) + len(new) > limit:
            raise LimitExceeded("limits.destinations_max", limit, "too many queues and subscriptions")
        for name in new:
            core.add_named_queue(parse_destination(name))

    def places(self, message: Message) -> list[str]:
        """The names that get a copy, and those of the queues that collect what is sent to them. Raises as `parse`."""
        names = self.destinations(message)
        return names + self._collected(names)

    def _collected(self, names: Iterable[str]) -> list[str]:
        """The queues that get a copy by collecting what is sent to one of these."""
        if not self._collecting:
            return []
        topics = [name.removeprefix("/topic/") for name in names if name.startswith("/topic/")]
        return [f"/queue/{queue.name}" for topic in topics for queue in self._collecting.get(topic, ())]

    # ---- sending

    def send(self, message: Message) -> bool:
        """Give each destination its copy, or none any. Raises LimitExceeded. True when the store will keep one of them."""
        core = self._core
        texts = self.destinations(message)
        core.work += COPY_WORK * len(texts)
        expired = bool(message.expires) and message.expires <= core.now
        if not expired:
            self.make_queues(texts)
            collected = self._collected(texts)
            texts = [text for text in texts if text not in collected]  # they get their one copy by their topic
        stored = False
        for text in texts:
            copy = message if text == message.destination else message.moved_to(text, expires=message.expires)
            target = self.place(text).target
            if expired:
                stored = core.expire_on_arrival(copy) or stored
            elif target.kind == QUEUE:
                core.by_destination[text].accept(copy)
                stored = stored or copy.durable
            elif target.kind == TOPIC:
                stored = core.publish(copy, target) or stored
            else:
                core.temporaries.send(copy)
        return stored

    # ---- virtual topics

    def topic_of(self, target: Destination) -> str | None:
        """The virtual topic that a queue of that name collects from, None for other queues."""
        parts = target.parts
        count = len(self._consumers)
        if (
            self._virtual
            and target.kind == QUEUE
            and len(parts) > count
            and matches(self._consumers, parts[:count])
            and matches(self._virtual, parts[count:])
        ):
            return ".".join(parts[count:])
        return None

    def collecting(self, target: Destination) -> tuple[Queue, ...]:
        """The queues that get a copy of what is sent to a topic."""
        return tuple(self._collecting.get(target.name, ())) if target.kind == TOPIC else ()

    def added(self, queue: Queue, target: Destination) -> None:
        """There is a new queue, here or from the store."""
        queue.spread = self.concerns(target)
        topic = self.topic_of(target)
        if topic is not None:
            self._collecting.setdefault(topic, []).append(queue)
            self._core.forget_topics()

    def wanted(self, target: Destination) -> None:
        """Another broker has consumers of a queue; one that collects from a virtual topic collects here, too, from now on."""
        core = self._core
        if (
            str(target) not in core.by_destination
            and self.topic_of(target) is not None
            and len(core.queues) < core.limits.destinations_max
        ):
            core.queue(target)


def _rule(entry: CompositeEntry) -> Rule:
    admits = compile_selector(entry.filter).matches if entry.filter else None
    return Rule(parse_destination(entry.name), entry.forward_to, entry.forward_only, admits)
