"""What an operator does with dead letters, by the broker's face and by command: look at them, send them back, drop them.

Owns the walk over all queues of dead letters, page by page. Each step is one turn and one batch: a crash neither loses a message
nor leaves two. Nothing is kept between two steps but the place where the next one goes on; what becomes a dead letter after the
first step of a queue is not met any more, so that what fails again at once is not sent back again and again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pybroker.committing import Commit
from pybroker.core import dead_letters
from pybroker.core.broker import Core
from pybroker.core.browsing import Cursor, Moving
from pybroker.core.queue import Queue
from pybroker.destination import QUEUE, Destination, matches, parse_destination
from pybroker.engine import Engine
from pybroker.errors import BrokerError, BrokerFull, InvalidDestination
from pybroker.message import Message, decode_headers
from pybroker.queue_pages import cursor_of, wait_moved, wait_shown
from pybroker.selectors import compile_selector

LIST, RETRY, DROP = "list", "retry", "drop"
STEP_SECONDS = 1.0  # how long one command works before it says how far it is


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterFilter:
    """Which dead letters are meant: those for which all of this is so. What is empty, or 0, says nothing.

    queue       they are in this queue; without it they are looked for in all queues that policies name
    origin      they were sent there; may be a pattern (``/queue/a.>``)
    reason      ``deliveries``, ``expired``
    message_id  the message's id
    headers     (name, value) of headers that the message has
    older_than, newer_than  seconds since they became dead letters
    selector    a selector that is true for them
    """

    queue: str = ""
    origin: str = ""
    reason: str = ""
    message_id: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    older_than: float = 0.0
    newer_than: float = 0.0
    selector: str = ""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter as it stands in its queue. Times in milliseconds since the Unix epoch; `size` in bytes."""

    queue: str
    message_id: str
    origin: str
    subscription: str
    reason: str
    deliveries: int
    time: int
    size: int
    durable: bool
    priority: int
    headers: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class DeadLettersDone:
    """What a retry or a drop has done.

    count        dead letters that are gone from their queues
    stayed       those that can't go back: their durable subscription is gone, or they do not say where they were
    outstanding  those that are with consumers, or in transactions
    unread       those whose values in the store are damaged
    """

    count: int = 0
    stayed: int = 0
    outstanding: int = 0
    unread: int = 0


class DeadLetters:
    """The dead letters of a running broker: `Broker.dead_letters`. Filters are the fields of `DeadLetterFilter`."""

    def __init__(self, find_engine: Callable[[], Engine]) -> None:
        self._find_engine = find_engine

    async def list(self, *, limit: int = 0, **wanted: Any) -> AsyncIterator[DeadLetter]:
        """The dead letters, queue by queue, in the order in which they would be delivered; at most `limit` (0 = all)."""
        place, found = None, 0
        chosen = DeadLetterFilter(**wanted)
        while True:
            step = await take_step(self._find_engine(), LIST, chosen, place, limit - found if limit else 0)
            for letter in step.letters:
                yield letter
            found += len(step.letters)
            place = step.place
            if place is None or (limit and found >= limit):
                return

    async def retry(self, *, limit: int = 0, **wanted: Any) -> DeadLettersDone:
        """Send dead letters back to where they came from, without the headers of dead letters, and with their deliveries at 0.

        Raises BrokerFull where one of the destinations takes no more; what was done before stays done.
        """
        return await self._all(RETRY, limit, DeadLetterFilter(**wanted))

    async def drop(self, *, limit: int = 0, **wanted: Any) -> DeadLettersDone:
        """Delete dead letters for good."""
        return await self._all(DROP, limit, DeadLetterFilter(**wanted))

    async def _all(self, action: str, limit: int, wanted: DeadLetterFilter) -> DeadLettersDone:
        place, done = None, DeadLettersDone()
        while True:
            step = await take_step(self._find_engine(), action, wanted, place, limit - done.count if limit else 0)
            done = added(done, step.done)
            if step.refused is not None:
                raise BrokerFull(f"{step.refused}; {done.count} dead letters went before")
            place = step.place
            if place is None or (limit and done.count >= limit):
                return done


@dataclass(frozen=True, slots=True)
class Step:
    """What one step brought. `place`: where the next one goes on, None at the end."""

    letters: tuple[DeadLetter, ...]
    done: DeadLettersDone
    place: Cursor | None
    refused: BrokerFull | None


def added(first: DeadLettersDone, second: DeadLettersDone) -> DeadLettersDone:
    """Both together."""
    names = [each.name for each in fields(DeadLettersDone)]
    return DeadLettersDone(**{name: getattr(first, name) + getattr(second, name) for name in names})


async def take_step(engine: Engine, action: str, wanted: DeadLetterFilter, place: Cursor | None, limit: int) -> Step:
    """One page of one queue. Raises InvalidDestination, InvalidSelector, SendInDoubt."""
    if engine.batch_full:
        await engine.journal.wait_room(engine.config.limits.batch_bytes_max)
    core = engine.begin_turn()
    fits = matcher(core, wanted)
    queue = _queue_at(core, wanted.queue, place)
    if queue is None:
        return Step((), DeadLettersDone(), None, None)
    if place is None or place.queue_id != queue.queue_id:
        place = Cursor(queue.queue_id, 0, queue.next_sequence)
    ways = {
        LIST: None,
        RETRY: Moving(None, way=lambda letter: dead_letters.way_back(core, letter)),
        DROP: Moving(None),
    }
    waiter = Commit()
    page = core.browse(str(queue.destination), waiter, cursor=place, matches=fits, limit=limit, moving=ways[action])
    engine.end_turn()
    await (wait_shown if action == LIST else wait_moved)(engine, waiter)
    letters = tuple(_shown(str(queue.destination), each.message) for each in page.messages)
    done = DeadLettersDone(page.moved, page.stayed, page.outstanding, page.unread)
    return Step(letters, done, page.cursor or _behind(core, wanted, queue), page.refused)


def _queue_at(core: Core, name: str, place: Cursor | None) -> Queue | None:
    """The queue that a step is about: the one of its place, or the first one behind it."""
    if name:
        target = parse_destination(name)
        queue = core.by_destination.get(name)
        if target.is_pattern or str(target) != name or target.kind != QUEUE:
            raise InvalidDestination(f"{name} is no queue of dead letters: name one, as /queue/NAME")
        return queue
    at = place.queue_id if place is not None else 0
    ids = [each.queue_id for each in core.by_destination.values() if each.is_dead_letter_queue and each.queue_id >= at]
    return core.queues[min(ids)] if ids else None


def _behind(core: Core, wanted: DeadLetterFilter, queue: Queue) -> Cursor | None:
    """The start of the next queue of dead letters."""
    if wanted.queue:
        return None
    place = Cursor(queue.queue_id + 1, 0, 0)
    following = _queue_at(core, "", place)
    return Cursor(following.queue_id, 0, following.next_sequence) if following is not None else None


def matcher(core: Core, wanted: DeadLetterFilter) -> Callable[[Message], bool]:
    """Whether a message is a dead letter that is meant. Raises InvalidDestination, InvalidSelector."""
    origin = parse_destination(wanted.origin) if wanted.origin else None
    now = core.now
    selector = None
    if wanted.selector:
        selector = compile_selector(wanted.selector, core.limits.selector_bytes_max).matches

    def fits(message: Message) -> bool:
        found = dead_letters.read(message)
        if found is None:
            return False
        death = found[0]
        age = (now - death.time) / 1_000
        headers = message.headers if wanted.headers else []
        return (
            (origin is None or _fits(origin, death.origin))
            and wanted.reason in ("", death.reason)
            and wanted.message_id in ("", message.message_id.decode("latin-1"))
            and (not wanted.older_than or age >= wanted.older_than)
            and (not wanted.newer_than or age <= wanted.newer_than)
            and all(each in headers for each in wanted.headers)
            and (selector is None or selector(message))
        )

    return fits


def _fits(pattern: Destination, origin: str) -> bool:
    prefix = f"/{pattern.kind}/"
    return origin.startswith(prefix) and matches(pattern.parts, tuple(origin.removeprefix(prefix).split(".")))


def _shown(queue: str, message: Message) -> DeadLetter:
    found = dead_letters.read(message)
    assert found is not None
    death, block = found
    return DeadLetter(
        queue=queue,
        message_id=message.message_id.decode("latin-1"),
        origin=death.origin,
        subscription=death.subscription,
        reason=death.reason,
        deliveries=death.deliveries,
        time=death.time,
        size=len(message.body),
        durable=message.durable,
        priority=message.priority,
        headers=tuple(decode_headers(block)),
    )


# ---- by command: the place goes to and fro, and nothing is kept here


async def dead_letter_command(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
    """Steps for about `STEP_SECONDS`: ``{"action", "filter", "limit", "place"}``; a list is one page."""
    action, limit = request.get("action"), request.get("limit", 0)
    if action not in (LIST, RETRY, DROP):
        raise BrokerError(f"action must be {LIST}, {RETRY} or {DROP}, not {action!r}")
    if limit.__class__ is not int or limit < 0:
        raise BrokerError("limit must be a whole number from 0")
    wanted, place = _filter(request.get("filter", {})), cursor_of(request, "place")
    done = DeadLettersDone()
    letters: list[dict[str, Any]] = []
    ends = time.monotonic() + STEP_SECONDS
    while True:
        count = done.count + len(letters)
        step = await take_step(engine, action, wanted, place, limit - count if limit else 0)
        done, place = added(done, step.done), step.place
        letters += [asdict(each) for each in step.letters]
        over = place is None or step.refused is not None or (limit > 0 and done.count + len(letters) >= limit)
        if over or letters or time.monotonic() >= ends:
            break
    refused = str(step.refused) if step.refused is not None else ""
    return {"letters": letters, "done": asdict(done), "place": None if over else place, "refused": refused}


def _filter(given: object) -> DeadLetterFilter:
    wanted = DeadLetterFilter()
    if not isinstance(given, Mapping):
        raise BrokerError("a filter is a mapping of its fields")
    for name, value in given.items():
        default = getattr(wanted, name, None) if name in {each.name for each in fields(DeadLetterFilter)} else None
        if isinstance(default, tuple) and isinstance(value, list):
            value = tuple(tuple(each) if isinstance(each, list) else each for each in value)
        elif isinstance(default, float) and value.__class__ is int:
            value = float(value)
        if default is None or value.__class__ is not default.__class__:
            raise BrokerError(f"filter {name} is not known, or not of its type")
        wanted = replace(wanted, **{name: value})
    return wanted
