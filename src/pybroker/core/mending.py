"""Whole values that came for bad ones: what of them is emitted, and which messages become ready. A part of `Core`.

DESIGN.md section 4. The values come from another copy of the store. A message's value never changes, and nobody can delete one that
could not be read; but what memory knows is newer than any copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pybroker.core.kinds import DELETED
from pybroker.core.queue import Queue
from pybroker.operations import SET_REFERENCES, Operation

if TYPE_CHECKING:
    from pybroker.core.broker import Core


def mend(core: Core, operation: Operation) -> None:
    """Emit what puts a whole value in the place of a bad one. Of a body's references memory knows the true count."""
    if operation[0] == SET_REFERENCES:
        body = core.shared.get(operation[1])
        if body is not None:
            if body.references <= 0:
                return
            operation = (SET_REFERENCES, body.body_id, body.references)
    core.operations.append(operation)


def messages_mended(core: Core, found: Iterable[tuple[int, int, Operation]]) -> None:
    """Whole values for messages that could not be read earlier, ``(queue id, order, operation)``: take these up.

    The values must be at least as new as a call of `shared.read_began` that has not ended yet.
    """
    first: dict[Queue, int] = {}
    for queue_id, order, operation in found:
        queue = core.queues.get(queue_id)
        if queue is not None and queue.kind != DELETED and order in queue.unread:
            core.mend(operation)
            first[queue] = min(order, first.get(queue, order))
    for queue, order in first.items():
        _read_again(queue, order)


def _read_again(queue: Queue, order: int) -> None:
    """What could not be read at `order` is whole now (with what was emitted before): take it up, in its place."""
    found = {each for each in queue.unread if each >= order}
    queue.unread -= found
    queue.counts.corrupt -= len(found)
    if queue.tail is None or order < queue.tail:
        queue.read_from(order)
    queue.dispatch()
