"""Dead letters: how one is written, read, and sent back to where it came from. A part of `Core`. Pure.

A dead letter is the message, with its body, headers, id, priority and durability, in another queue; in front of its own headers
stand those that say where it was and why it left. It never expires. In a queue of dead letters a message is a dead letter no
further time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pybroker.core.advisories import is_advisory
from pybroker.destination import QUEUE, TOPIC, Destination, matches, parse_destination
from pybroker.errors import InvalidDestination
from pybroker.message import Message, decode_headers, encode_headers
from pybroker.policies import NAME, DestinationPolicy

if TYPE_CHECKING:
    from pybroker.core.broker import Core

DELIVERIES = "deliveries"  # reasons
EXPIRED = "expired"
PREFIX = "dead-letter-"
SLASHES_MAX = 64  # of an owner's text that are looked at
FIELDS = ("origin", "subscription", "expires", "reason", "deliveries", "time")  # in this order; some may be missing


class Death(NamedTuple):
    """What a dead letter's headers say.

    origin        where it was sent
    subscription  `owner_text` of the durable subscription that it was in, else ""
    reason        ``deliveries``, ``expired``, or in words why a peer of the network did not take it
    deliveries    deliveries of it that had ended without an acknowledgement
    time          milliseconds since the Unix epoch when it became a dead letter; 0 = not known
    expires       when the message was to expire, 0 = never
    """

    origin: str
    subscription: str = ""
    reason: str = ""
    deliveries: int = 0
    time: int = 0
    expires: int = 0


def letter(
    core: Core, message: Message, policy: DestinationPolicy, reason: str, deliveries: int, subscription: str
) -> Message | None:
    """The dead letter of a message; None where the policy has none for it."""
    if not policy.dead_letter_queue or not (message.durable or policy.dead_letter_transient):
        return None
    headers = [("origin", message.destination), ("subscription", subscription), ("expires", str(message.expires or ""))]
    headers += [("reason", reason), ("deliveries", str(deliveries)), ("time", str(core.now))]
    block = encode_headers([(PREFIX + name, value) for name, value in headers if value])
    return message.moved_to(str(_queue_for(core, policy, message)), block)


def owner_text(client_id: str, name: str) -> str:
    """``CLIENT/NAME`` of a durable subscription; in each of the two ``%`` is ``%25`` and ``/`` is ``%2F``."""
    return "/".join(part.replace("%", "%25").replace("/", "%2F") for part in (client_id, name))


def _owners(text: str) -> set[tuple[str, str]]:
    """Whom an owner's text may mean: as `owner_text` writes it, and also as it was written before, with nothing escaped."""
    count = text.count("/")
    if count > SLASHES_MAX:
        return set()
    found = set()
    at = -1
    for _ in range(count):
        at = text.index("/", at + 1)
        found.add((text[:at], text[at + 1 :]))
    if count == 1:
        client_id, name = (part.replace("%2F", "/").replace("%25", "%") for part in text.split("/"))
        found.add((client_id, name))
    return found


def _queue_for(core: Core, policy: DestinationPolicy, message: Message) -> Destination:
    """Where a dead letter goes. Raises nothing: a client chose the name that it is made of, and nobody could mend it."""
    try:
        name = parse_destination(message.destination).name
        target = parse_destination(policy.dead_letter_queue.replace(NAME, name))
    except InvalidDestination:
        return core.dead_letters  # a name that can't be: the queue of all others
    return core.dead_letters if target.is_pattern else target


def deliver(core: Core, letter: Message) -> None:
    """Put a dead letter into its queue, whatever `destinations_max` and other limits say: it must not be lost."""
    target = core.by_destination.get(letter.destination)
    if target is None:
        target = core.add_named_queue(parse_destination(letter.destination))
    target.accept(letter)


def read(letter: Message) -> tuple[Death, bytes] | None:
    """What a dead letter's headers say, and its own header block without them; None for a message that is none."""
    block = letter.header_block
    found: dict[str, str] = {}
    for name in FIELDS:
        if block.startswith(f"{PREFIX}{name}:".encode()):
            line, _, block = block.partition(b"\n")
            found[name] = decode_headers(line + b"\n")[0][1]
    if "origin" not in found or "reason" not in found:
        return None
    numbers = {name: _number(found.get(name, "")) for name in ("deliveries", "time", "expires")}
    return Death(found["origin"], found.get("subscription", ""), found["reason"], **numbers), block


def way_back(core: Core, letter: Message) -> tuple[Message, Callable[[Message], object]] | None:
    """The message of a dead letter as it goes back to where it came from, and what puts it there; None where there is no way.

    What was in a durable subscription goes to that one only, if it is still there, and if it is clear which one that is; other
    messages of a topic are published anew, if anybody gets them.
    """
    found = read(letter)
    if found is None:
        return None
    death, block = found
    try:
        target = parse_destination(death.origin)
    except InvalidDestination:
        return None
    if (
        target.is_pattern
        or is_advisory(target)
        or target.kind not in (QUEUE, TOPIC)
        or death.origin == letter.destination
    ):
        return None
    expires = death.expires if death.expires > core.now else 0  # once more, it would be expired
    back = Message(
        death.origin,
        letter.body,
        block,
        letter.durable,
        letter.priority,
        expires,
        letter.message_id,
        letter.timestamp,
    )
    if target.kind == QUEUE:
        queue = core.by_destination.get(death.origin)
        return back, (core.add_named_queue(target) if queue is None else queue).accept
    if not death.subscription:
        return (back, lambda message: core.publish(message, target)) if _wanted(core, back, target) else None
    owners = [core.subscriptions[owner] for owner in _owners(death.subscription) if owner in core.subscriptions]
    fitting = [queue for queue in owners if matches(tuple(queue.name.split(".")), target.parts)]
    return (back, fitting[0].accept) if len(fitting) == 1 else None


def _wanted(core: Core, message: Message, target: Destination) -> bool:
    """Whether anybody would get a topic's message."""
    topic = core.topic(target)
    chosen = topic.subscribers if topic.choice is None else topic.choice.of(message)
    return bool(chosen or topic.origins or topic.queues)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
