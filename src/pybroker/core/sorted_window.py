"""The window of a queue that is choosy, or drops messages: the same entries as in `Window`, to be walked from any order on.

A sorted list beside the map: adding and removing move at most as many numbers as the window has, which is bounded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from pybroker.core.entry import Entry


class SortedWindow:
    """A sorted map from order to entry. See `Window` for the methods that have no text here."""

    __slots__ = ("_entries", "_orders", "size")

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._orders: list[int] = []  # ascending
        self.size = 0  # bytes of the messages

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, order: int) -> bool:
        return order in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return iter([self._entries[order] for order in self._orders])

    def get(self, order: int) -> Entry | None:
        return self._entries.get(order)

    def after(self, order: int) -> Entry | None:
        """The first entry of that order or a higher one; None when there is none."""
        at = bisect_left(self._orders, order)
        return self._entries[self._orders[at]] if at < len(self._orders) else None

    def add(self, entry: Entry) -> None:
        order = entry.order
        self._entries[order] = entry
        if not self._orders or order > self._orders[-1]:
            self._orders.append(order)
        else:
            insort(self._orders, order)
        self.size += entry.message.size

    def first(self) -> Entry:
        if not self._orders:
            raise KeyError("the window is empty")
        return self._entries[self._orders[0]]

    def last(self) -> Entry:
        if not self._orders:
            raise KeyError("the window is empty")
        return self._entries[self._orders[-1]]

    def pop_first(self) -> Entry:
        entry = self.first()
        self.discard(entry.order)
        return entry

    def discard(self, order: int) -> Entry | None:
        entry = self._entries.pop(order, None)
        if entry is not None:
            del self._orders[bisect_left(self._orders, order)]
            self.size -= entry.message.size
        return entry

    def first_order(self, default: int) -> int:
        return self._orders[0] if self._orders else default

    def keep(self, entries: list[Entry]) -> None:
        """Let go of all but these, which are in order."""
        self._entries = {entry.order: entry for entry in entries}
        self._orders = [entry.order for entry in entries]
        self.size = sum(entry.message.size for entry in entries)

    def cut(self, count_keep: int, size_keep: int) -> list[Entry]:
        out = []
        while len(self._orders) > max(count_keep, 1) or (self.size > size_keep and len(self._orders) > 1):
            entry = self._entries.pop(self._orders.pop())
            self.size -= entry.message.size
            out.append(entry)
        return out
