"""Destinations: ``/queue/NAME``, ``/topic/NAME`` and temporary ones. Owns parsing and matching of names; keeps no state.

A temporary destination is ``/remote-temp-queue/ID`` or ``/remote-temp-topic/ID`` (ActiveMQ's words over STOMP) wherever it is
named, with an id that nobody guesses and that is the same in the whole network. ``/temp-queue/NAME`` and ``/temp-topic/NAME``
are names of one STOMP connection for its own.

A name is made of parts divided by dots. In a pattern ``*`` stands for exactly one part and a last ``>`` for the
rest, none included (as ActiveMQ has it: ``a.>`` matches ``a``, ``a.b`` and ``a.b.c``). Any other character stands
for itself, ``/`` too.
"""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple

from pybroker.errors import InvalidDestination, shown

QUEUE = "queue"
TOPIC = "topic"
TEMPORARY_QUEUE = "remote-temp-queue"
TEMPORARY_TOPIC = "remote-temp-topic"
TEMPORARY_KINDS = (TEMPORARY_QUEUE, TEMPORARY_TOPIC)
LOCAL_PREFIXES = {"/temp-queue/": TEMPORARY_QUEUE, "/temp-topic/": TEMPORARY_TOPIC}  # of a connection's own names
TEMPORARY_ID_CHARACTERS = 32
NAME_BYTES_MAX = 1024  # a name longer than this, in UTF-8, is refused
PARTS_MAX = 64  # bounds the depth of the subscription tree


class Destination(NamedTuple):
    """A parsed destination. ``kind`` is the word of its prefix (``"queue"``, ``"topic"``, ...), ``name`` what follows."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"/{self.kind}/{self.name}"

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(self.name.split("."))

    @property
    def is_pattern(self) -> bool:
        return any(part in ("*", ">") for part in self.parts)


def parse_destination(text: str) -> Destination:
    """Parse ``/queue/NAME``, ``/topic/NAME`` or a temporary one; raise `InvalidDestination` with what was expected."""
    for kind in (QUEUE, TOPIC, *TEMPORARY_KINDS):
        prefix = f"/{kind}/"
        if text.startswith(prefix):
            target = _checked(Destination(kind, text[len(prefix) :]), text)
            if target.is_pattern and kind in TEMPORARY_KINDS:
                raise InvalidDestination(f"destination {shown(text)} is a pattern: temporary ones have none")
            return target
    if text.startswith(tuple(LOCAL_PREFIXES)):
        raise InvalidDestination(
            f"destination {shown(text)} is a STOMP connection's own name of a temporary one: "
            "elsewhere it is known as /remote-temp-queue/ID or /remote-temp-topic/ID, as its reply-to header says"
        )
    raise InvalidDestination(f"destination {shown(text)} is not known: it must start with /queue/ or /topic/")


def temporary_destination(kind: str, secret: str) -> Destination:
    """The temporary destination of who knows a secret: its name tells nothing of that. `kind` is one of `TEMPORARY_KINDS`."""
    return Destination(kind, sha256(f"{kind} {secret}".encode()).hexdigest()[:TEMPORARY_ID_CHARACTERS])


def local_kind(text: str) -> str | None:
    """What a connection's own name (``/temp-queue/NAME``) stands for: one of `TEMPORARY_KINDS`; None if it is no such name.

    Raises InvalidDestination for a name that a destination can't have.
    """
    for prefix, kind in LOCAL_PREFIXES.items():
        if text.startswith(prefix):
            if _checked(Destination(kind, text[len(prefix) :]), text).is_pattern:
                raise InvalidDestination(f"destination {shown(text)} is a pattern: temporary ones have none")
            return kind
    return None


def parse_composite(text: str) -> tuple[Destination, ...]:
    """Parse names divided by commas, as ActiveMQ takes them, each once; a name alone is a composite of one.

    The first is ``/queue/NAME`` or ``/topic/NAME``; the others may be ``queue://NAME`` or ``topic://NAME``, too, or NAME
    alone for one of the first one's kind.

    >>> [str(each) for each in parse_composite("/queue/A,B,topic://C")]
    ['/queue/A', '/queue/B', '/topic/C']
    """
    first, *others = (part.strip() for part in text.split(","))
    found = {parse_destination(first): None}
    for part in others:
        for kind in (QUEUE, TOPIC):
            if part.startswith(f"{kind}://"):
                part = f"/{kind}/" + part.removeprefix(f"{kind}://")
        if not part.startswith("/"):
            part = f"/{next(iter(found)).kind}/{part}"
        found[parse_destination(part)] = None
    return tuple(found)


def check_sendable(text: str) -> None:
    """Raise `InvalidDestination` for what no message can be sent to."""
    for target in parse_composite(text):
        if target.is_pattern:
            raise InvalidDestination(f"{target} is a pattern: a message is sent to one name")


def _checked(destination: Destination, text: str) -> Destination:
    name = destination.name
    if not name:
        raise InvalidDestination(f"destination {shown(text)} has an empty name")
    if len(name.encode("utf-8", "surrogatepass")) > NAME_BYTES_MAX:
        raise InvalidDestination(f"destination {shown(text)} has a name longer than {NAME_BYTES_MAX} bytes")
    if not name.isprintable():
        raise InvalidDestination(f"destination {shown(text)} has a character that can't be printed")
    if "," in name:
        raise InvalidDestination(f"destination {shown(text)} has a comma, which divides the parts of a composite")
    parts = destination.parts
    if len(parts) > PARTS_MAX:
        raise InvalidDestination(f"destination {shown(text)} has more than {PARTS_MAX} parts")
    if "" in parts:
        raise InvalidDestination(f"destination {shown(text)} has an empty part (two dots, or a dot at an end)")
    if ">" in parts[:-1]:
        raise InvalidDestination(f"destination {shown(text)} has '>' before its last part")
    return destination


def matches(pattern: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    """Say whether the parts of a name fit the parts of a pattern.

    >>> matches(("a", "*"), ("a", "b")), matches(("a", ">"), ("a",)), matches(("*",), ("a", "b"))
    (True, True, False)
    """
    for index, part in enumerate(pattern):
        if part == ">":
            return True
        if index >= len(parts) or part not in ("*", parts[index]):
            return False
    return len(pattern) == len(parts)
