"""Which subscribers of a topic get a message, where some have selectors. DESIGN.md, section 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybroker.selectors.index import SelectorIndex

if TYPE_CHECKING:
    from pybroker.core.queue import Queue
    from pybroker.message import Message


class Choice:
    """The subscribers of one topic name: those without a selector get everything."""

    __slots__ = ("_all_of_it", "_index")

    def __init__(self, subscribers: list[Queue]) -> None:
        self._all_of_it = [queue for queue in subscribers if queue.selector is None]
        self._index = SelectorIndex((queue.selector, queue) for queue in subscribers if queue.selector is not None)

    def of(self, message: Message) -> list[Queue]:
        return [*self._all_of_it, *self._index.match(message)]


def choice_of(subscribers: list[Queue]) -> Choice | None:
    """None where nobody has a selector."""
    return Choice(subscribers) if any(queue.selector is not None for queue in subscribers) else None
