"""Destinations: ``/queue/NAME`` and ``/topic/NAME``. Owns parsing and matching of names; keeps no state.

A name is made of parts divided by dots. In a pattern ``*`` stands for exactly one part and a last ``>`` for the
rest, none included (as ActiveMQ has it: ``a.>`` matches ``a``, ``a.b`` and ``a.b.c``). Any other character stands
for itself, ``/`` too.
"""

from __future__ import annotations

from typing import NamedTuple

from pybroker.errors import InvalidDestination

QUEUE = "queue"
TOPIC = "topic"
NAME_BYTES_MAX = 1024  # a name longer than this, in UTF-8, is refused
PARTS_MAX = 64  # bounds the depth of the subscription tree


class Destination(NamedTuple):
    """A parsed destination. ``kind`` is ``"queue"`` or ``"topic"``, ``name`` what follows the prefix."""

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
    """Parse ``/queue/NAME`` or ``/topic/NAME``; raise `InvalidDestination` with what was expected."""
    for kind in (QUEUE, TOPIC):
        prefix = f"/{kind}/"
        if text.startswith(prefix):
            return _checked(Destination(kind, text[len(prefix) :]), text)
    raise InvalidDestination(f"destination {_shown(text)} is not known: it must start with /queue/ or /topic/")


def _checked(destination: Destination, text: str) -> Destination:
    name = destination.name
    if not name:
        raise InvalidDestination(f"destination {_shown(text)} has an empty name")
    if len(name.encode("utf-8", "surrogatepass")) > NAME_BYTES_MAX:
        raise InvalidDestination(f"destination {_shown(text)} has a name longer than {NAME_BYTES_MAX} bytes")
    if not name.isprintable():
        raise InvalidDestination(f"destination {_shown(text)} has a character that can't be printed")
    if "," in name:
        raise InvalidDestination(f"destination {_shown(text)} has a comma, which divides the parts of a composite")
    parts = destination.parts
    if len(parts) > PARTS_MAX:
        raise InvalidDestination(f"destination {_shown(text)} has more than {PARTS_MAX} parts")
    if "" in parts:
        raise InvalidDestination(f"destination {_shown(text)} has an empty part (two dots, or a dot at an end)")
    if ">" in parts[:-1]:
        raise InvalidDestination(f"destination {_shown(text)} has '>' before its last part")
    return destination


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


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
