"""Destination policies: what holds for a destination, and which entry of the configuration says so. Owns the table of values.

An entry ``[[policy]]`` has a pattern (``match``) and some values. For a destination each *value* comes from the most specific
entry that matches and sets it; what no entry sets has its default. Specific is, from the left, part by part: the end of the name
before a literal part before ``*`` before ``>``. So of all patterns that match one name, one goes first.

A value is one field of `DestinationPolicy`: add one there, and it is read, checked, resolved and shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple

from pybroker.config import DeliveryPolicy, Limits, PolicyEntry
from pybroker.destination import QUEUE, Destination, matches, parse_destination
from pybroker.errors import InvalidDestination

DELIVERY = DeliveryPolicy()
LIMITS = Limits()
BLOCK, DROP_OLDEST, DROP_LOWEST_PRIORITY, DISCONNECT = "block", "drop_oldest", "drop_lowest_priority", "disconnect"
NAME = "{name}"  # stands in a dead-letter queue for the name of where the message was
REMEMBERED_MAX = 10_000  # destinations whose policy is remembered
NUMBER_MAX = 2**53  # what a number may be at most: beyond it JSON and TOML readers disagree


def value(
    default: Any,
    unit: str,
    doc: str,
    *,
    inherits: str = "",
    low: float = 0,
    high: float = NUMBER_MAX,
    choices: tuple[str, ...] = (),
    check: Callable[[str], str] | None = None,
) -> Any:
    """A value of the policy: its default, unit and meaning.

    `inherits`: the field of the configuration that is the default where it is given. `low`, `high`: what a number may be at least
    and at most. `choices`: what a text may be; `check`: says what it should be where it is wrong, else "".
    """
    facts = {
        "unit": unit,
        "doc": doc,
        "inherits": inherits,
        "low": low,
        "high": high,
        "choices": choices,
        "check": check,
    }
    return field(default=default, metadata=facts)


def dead_letter_fault(template: str) -> str:
    """What a dead-letter queue should be, "" where `template` is one."""
    try:
        target = parse_destination(template.replace(NAME, "x")) if template else None
    except InvalidDestination as error:
        return f"'', or /queue/NAME, which may have {NAME} in it ({error})"
    one = template.count(NAME) <= 1 and template != f"/queue/{NAME}"
    if target is None or (one and target.kind == QUEUE and not target.is_pattern):
        return ""
    return f"'', or /queue/NAME without wildcards, which may have {NAME} in it once, and something beside it"


@dataclass(frozen=True, slots=True, kw_only=True)
class DestinationPolicy:
    """What holds for one destination."""

    deliveries_max: int = value(
        DELIVERY.deliveries_max,
        "deliveries",
        "deliveries before a message is a dead letter; 0 = no limit",
        inherits="delivery.deliveries_max",
        high=2**31 - 1,
    )
    redelivery_delay: float = value(
        0.0, "seconds", "time before a rejected message is delivered again; 0 = at once", high=31_536_000
    )
    redelivery_backoff: float = value(
        1.0, "times", "each further redelivery waits so many times as long as the one before", low=1, high=1_000
    )
    redelivery_delay_max: float = value(3_600.0, "seconds", "no redelivery waits longer", high=31_536_000)
    redelivery_jitter: float = value(
        0.0, "of the delay", "how much shorter or longer a delay may be, differently for each message", high=1
    )
    redelivery_waiting_max: int = value(
        10_000, "messages", "with so many waiting for their redelivery nothing more of a queue is given out", low=1
    )
    dead_letter_queue: str = value(
        DELIVERY.dead_letter_queue,
        "queue",
        "where dead letters go; {name} is where they were; '' = they are dropped",
        inherits="delivery.dead_letter_queue",
        check=dead_letter_fault,
    )
    dead_letter_expired: bool = value(False, "yes or no", "whether a message that expires is a dead letter, too")
    message_key_window: float = value(
        3_600.0,
        "seconds",
        "a send whose `message-key` was seen within this time is not stored again; 0 = it is",
        high=31_536_000,
    )
    messages_max: int = value(
        LIMITS.queue_messages_max,
        "messages",
        "messages in a queue, those with consumers included; 0 = no limit",
        inherits="limits.queue_messages_max",
    )
    bytes_max: int = value(0, "bytes", "bytes of the messages in a queue that are on disk; 0 = no limit")
    full_policy: str = value(
        LIMITS.full_policy,
        "word",
        "what a send to a full queue meets: it waits, it is refused, or the oldest messages are dropped for it",
        inherits="limits.full_policy",
        choices=(BLOCK, "refuse", DROP_OLDEST),
    )
    pending_messages_max: int = value(
        LIMITS.backlog_messages_max,
        "messages",
        "messages that wait for one plain subscriber of a topic",
        inherits="limits.backlog_messages_max",
        low=1,
    )
    slow_consumer: str = value(
        DISCONNECT,
        "word",
        "what happens to a plain subscriber for which more wait",
        choices=(DISCONNECT, DROP_OLDEST, DROP_LOWEST_PRIORITY, BLOCK),
    )
    dead_letter_transient: bool = value(True, "yes or no", "whether a dead letter that is not durable is kept")
    idle_after: float = value(
        0.0,
        "seconds",
        "a queue that is empty, and that nobody used for so long, is removed; 0 = never",
        high=31_536_000,
    )
    recovery_messages: int = value(
        0,
        "messages",
        "a topic keeps so many of its last ones for late subscribers; 0 = no limit with recovery_seconds, else none",
    )
    recovery_seconds: float = value(
        0.0, "seconds", "a topic keeps those of its last seconds for late subscribers; 0 = of any age", high=31_536_000
    )
    recovery_bytes: int = value(
        6_553_600, "bytes", "of what a topic keeps, with 512 more for each; its last one it keeps in any case", low=1
    )
    recovery_always: bool = value(
        False, "yes or no", "whether every late subscriber gets them, or who asks (retroactive)"
    )


VALUES: Mapping[str, Field[Any]] = MappingProxyType({each.name: each for each in fields(DestinationPolicy)})


class Explained(NamedTuple):
    """One value of a destination's policy. `source`: the pattern of an entry, a field of the configuration, or ``default``."""

    name: str
    value: Any
    unit: str
    source: str
    doc: str


def specificity(pattern: tuple[str, ...]) -> tuple[tuple[int, str], ...]:
    """A key by which the patterns that match a name are in order, the most specific one first.

    >>> sorted([("a", ">"), (">",), ("a", "*"), ("a", "b"), ("a",)], key=specificity)
    [('a',), ('a', 'b'), ('a', '*'), ('a', '>'), ('>',)]
    """
    ranks = {"*": 2, ">": 3}
    return (*((ranks.get(part, 1), part) for part in pattern), (0, ""))


class Policies:
    """The entries of a configuration. Resolves each destination once, and remembers a bounded number of them."""

    def __init__(self, entries: Iterable[PolicyEntry], limits: Limits, delivery: DeliveryPolicy) -> None:
        found = [(parse_destination(entry.match), entry) for entry in entries]
        found.sort(key=lambda each: specificity(each[0].parts))
        self._entries = tuple(found)
        given = {"limits": limits, "delivery": delivery}
        self._inherited: dict[str, Any] = {}
        for name, each in VALUES.items():
            table, _, field_name = each.metadata["inherits"].partition(".")
            if table:
                self._inherited[name] = getattr(given[table], field_name)
        self.base = DestinationPolicy(**self._inherited)
        self._resolved: dict[Destination, DestinationPolicy] = {}
        templates = sorted(self.all_of("dead_letter_queue") - {""})
        self._dead_letters = [template.removeprefix("/queue/").partition(NAME) for template in templates]

    def of(self, destination: Destination) -> DestinationPolicy:
        """What holds for a destination. (A durable subscription of a topic's pattern has what holds for the pattern as a name.)"""
        if not self._entries:
            return self.base
        policy = self._resolved.get(destination)
        if policy is None:
            if len(self._resolved) >= REMEMBERED_MAX:
                self._resolved.clear()
            chosen = {name: entry.values[name] for name, entry in self._sources(destination).items()}
            policy = self._resolved[destination] = DestinationPolicy(**{**self._inherited, **chosen})
        return policy

    def all_of(self, name: str) -> set[Any]:
        """Every value of that name that can hold somewhere."""
        return {getattr(self.base, name)} | {entry.values[name] for _, entry in self._entries if name in entry.values}

    def is_dead_letter_queue(self, destination: Destination) -> bool:
        """Whether dead letters of some destination may go there: then what is there is a dead letter no further time."""
        if destination.kind != QUEUE:
            return False
        name = destination.name
        for start, mark, end in self._dead_letters:
            if not mark:
                if name == start:
                    return True
            elif len(name) > len(start + end) and name.startswith(start) and name.endswith(end):
                return True
        return False

    def _sources(self, destination: Destination) -> dict[str, PolicyEntry]:
        """The entry that each value comes from, for those that one sets."""
        sources: dict[str, PolicyEntry] = {}
        for pattern, entry in self._entries:
            if pattern.kind == destination.kind and matches(pattern.parts, destination.parts):
                for name in entry.values:
                    sources.setdefault(name, entry)
        return sources

    def explain(self, destination: Destination) -> list[Explained]:
        """Each value that holds for a destination, with its source."""
        policy = self.of(destination)
        sources = self._sources(destination)
        found = []
        for name, each in VALUES.items():
            facts = each.metadata
            source = sources[name].match if name in sources else facts["inherits"] or "default"
            found.append(Explained(name, getattr(policy, name), facts["unit"], source, facts["doc"]))
        return found


def fault_of(name: str, given: Any) -> str:
    """What is wrong with a value of an entry, "" when it can be taken: what is expected."""
    each = VALUES[name]
    facts = each.metadata
    kind: Any = type(each.default)
    if kind is bool:
        return "" if isinstance(given, bool) else "true or false"
    if kind is str:
        choices = facts["choices"]
        if isinstance(given, str) and (not choices or given in choices):
            return facts["check"](given) if facts["check"] is not None else ""
        return "one of " + ", ".join(map(repr, choices)) if choices else "text"
    whole = isinstance(given, int) and not isinstance(given, bool)
    if (whole or (kind is float and isinstance(given, float))) and facts["low"] <= given <= facts["high"]:
        return ""
    return f"a {'whole ' if kind is int else ''}number of {facts['unit']}, {facts['low']:g} to {facts['high']:,}"
