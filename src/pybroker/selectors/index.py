"""Of many selectors those that a message may match, found by the values that they ask for, so that few need to be evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

from pybroker.message import Message
from pybroker.selectors.compiled import Selector, headers_of
from pybroker.selectors.evaluation import number_of

T = TypeVar("T")


class SelectorIndex(Generic[T]):
    """Owners of selectors, by what their selectors ask for. It doesn't change once it is made."""

    __slots__ = ("_by_value", "_numeric", "_others")

    def __init__(self, pairs: Iterable[tuple[Selector, T]]) -> None:
        self._others: list[tuple[Selector, T]] = []
        self._by_value: dict[str, dict[str | int | float, list[tuple[Selector, T]]]] = {}
        self._numeric: set[str] = set()  # headers that are asked to be equal to a number
        for selector, owner in pairs:
            if selector.equals is None:
                self._others.append((selector, owner))
                continue
            header, value = selector.equals
            self._by_value.setdefault(header, {}).setdefault(value, []).append((selector, owner))
            if value.__class__ is not str:
                self._numeric.add(header)

    def match(self, message: Message) -> list[T]:
        """The owners whose selectors are true for a message."""
        return [owner for selector, owner in self.candidates(message) if selector.matches(message)]

    def candidates(self, message: Message) -> Iterator[tuple[Selector, T]]:
        """The selectors that may be true for a message, with their owners: the others are not."""
        yield from self._others
        headers = headers_of(message)
        for header, by_value in self._by_value.items():
            text = headers.get(header)
            if text is None:
                continue
            yield from by_value.get(text, ())
            if header in self._numeric:
                number = number_of(text)
                if number is not None:
                    yield from by_value.get(number, ())
