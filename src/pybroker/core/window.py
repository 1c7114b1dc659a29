"""The window: the ready entries of a queue that are in memory, in delivery order. Knows nothing of consumers or the store.

New messages come in ascending order, so that most entries stand in one sorted run; what comes early (a higher priority, a
returned message) stands beside it in a heap. Taking the first one, adding and removing by order cost O(1) or O(log n).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from heapq import heappop, heappush

from pybroker.core.entry import Entry


class Window:
    """A sorted map from order to entry, fast at its two ends."""

    __slots__ = ("_early", "_heap", "_last", "_run", "size")

    def __init__(self) -> None:
        self._run: OrderedDict[int, Entry] = OrderedDict()  # ascending
        self._last = -1  # the highest order in the run
        self._early: dict[int, Entry] = {}
        self._heap: list[int] = []  # orders of `_early`; may hold some that are gone
        self.size = 0  # bytes of the messages

    def __len__(self) -> int:
        return len(self._run) + len(self._early)

    def __contains__(self, order: int) -> bool:
        return order in self._run or order in self._early

    def __iter__(self) -> Iterator[Entry]:
        """All entries, in delivery order; for inspection, costs a sort."""
        return iter(sorted([*self._run.values(), *self._early.values()], key=lambda entry: entry.order))

    def get(self, order: int) -> Entry | None:
        return self._run.get(order) or self._early.get(order)

    def add(self, entry: Entry) -> None:
        order = entry.order
        run = self._run
        if not run or order > self._last:
            run[order] = entry
            self._last = order
        else:
            self._early[order] = entry
            heappush(self._heap, order)
        self.size += entry.message.size

    def first(self) -> Entry:
        """The entry with the lowest order; it stays. KeyError when there is none."""
        if self._early:
            heap = self._heap
            while heap[0] not in self._early:
                heappop(heap)
            if not self._run or heap[0] < next(iter(self._run)):
                return self._early[heap[0]]
        for entry in self._run.values():
            return entry
        raise KeyError("the window is empty")

    def last(self) -> Entry:
        """The entry with the highest order; it stays. KeyError when there is none."""
        if not self:
            raise KeyError("the window is empty")
        orders = [
            *(() if not self._run else (next(reversed(self._run)),)),
            *((max(self._early),) if self._early else ()),
        ]
        found = self.get(max(orders))
        assert found is not None
        return found

    def pop_first(self) -> Entry:
        """Take the entry with the lowest order; KeyError when there is none."""
        if self._early:
            heap = self._heap
            while heap[0] not in self._early:
                heappop(heap)
            if not self._run or heap[0] < next(iter(self._run)):
                entry = self._early.pop(heappop(heap))
                self.size -= entry.message.size
                return entry
        entry = self._run.popitem(last=False)[1]
        self.size -= entry.message.size
        return entry

    def discard(self, order: int) -> Entry | None:
        """Take out the entry of that order, if it is here."""
        entry = self._run.pop(order, None) or self._early.pop(order, None)
        if entry is not None:
            self.size -= entry.message.size
            if not self._early:
                self._heap.clear()
        return entry

    def first_order(self, default: int) -> int:
        """The lowest order here, `default` when empty."""
        first = next(iter(self._run), default)
        return min(first, min(self._early)) if self._early else first

    def cut(self, count_keep: int, size_keep: int) -> list[Entry]:
        """Take out entries from the end until at most so many, and so many bytes, are left. At least the first stays.

        Returned in descending order.
        """
        if self._early:  # one sorted run again
            merged = list(self)
            self._run = OrderedDict((entry.order, entry) for entry in merged)
            self._last = merged[-1].order
            self._early.clear()
            self._heap.clear()
        out = []
        run = self._run
        while len(run) > max(count_keep, 1) or (self.size > size_keep and len(run) > 1):
            entry = run.popitem(last=True)[1]
            self.size -= entry.message.size
            out.append(entry)
        if run:
            self._last = next(reversed(run))
        return out
