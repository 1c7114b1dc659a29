"""Who gets which message of a queue, where not every consumer may take every message: selectors, groups, exclusive consumers,
consumer priority. Pure; owns what is passed over, and how far each consumer has come.

A queue is *choosy* while one of its consumers is, or a group of its messages has an owner. It is walked in order from the
lowest *mark* of those that may be given something. So each consumer is asked once about each message, and an acknowledgement
brings the next one from where its consumer has come to.

What nobody takes is *passed over* and stays in the window. When somebody is able and the window is full of such entries, they
are left to the store, and reading goes on behind the window: only what a consumer without credit wants is kept, up to half of a
window. Where something had to go that a consumer wants, his place says so (`missed`); when he has taken what was kept, the
queue is read from there again. So `tail` says how far the queue was read, and from `skipped` on messages below it may be in the
store only.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import TYPE_CHECKING

from pybroker.core.entry import Entry
from pybroker.core.groups import Groups, closes, group_of
from pybroker.core.sorted_window import SortedWindow
from pybroker.core.window import Window
from pybroker.selectors import compile_selector
from pybroker.selectors.index import SelectorIndex

if TYPE_CHECKING:
    from pybroker.core.consumer import Consumer
    from pybroker.core.queue import Queue
    from pybroker.message import Message


NARROW_FROM = 16  # so many are asked one by one; of more only those whose selectors may be true


class Place:
    """How far somebody has come through a queue.

    consumer  None = the other brokers of the network, which take what nobody here does
    mark      of the ready entries below it none is for him, apart from the queue's late ones
    missed    what is for him from here on, and below the queue's tail, may be in the store only; None = nothing. Never below `mark`
    turn      those who were served longest ago go first
    """

    __slots__ = ("consumer", "mark", "matches", "missed", "priority", "turn")

    def __init__(self, consumer: Consumer | None, missed: int | None, turn: int) -> None:
        self.consumer = consumer
        self.matches: Callable[[Message], bool] | None = None if consumer is None else consumer.matches
        self.priority = 0 if consumer is None else consumer.options.priority
        self.mark = 0
        self.missed = missed
        self.turn = turn

    def miss(self, order: int) -> None:
        """Something for him, or that may be, is in the store only."""
        self.mark = min(self.mark, order)
        self.missed = order if self.missed is None else min(self.missed, order)


def _mark(place: Place) -> int:
    return -place.mark


def _rank(place: Place) -> tuple[int, int]:
    return -place.priority, place.turn


def is_choosy(consumer: Consumer) -> bool:
    return consumer.matches is not None or consumer.options.exclusive


def joined(queue: Queue, consumer: Consumer) -> None:
    """A ``/queue/`` has got a consumer."""
    if queue.choosing is not None:
        queue.choosing.join(consumer)
        return
    other = next(iter(queue.consumers))  # they all have the same priority, or else the queue would be choosy
    if is_choosy(consumer) or other.options.priority != consumer.options.priority:
        Choosing(queue)


class Choosing:
    """The choice among the consumers of one queue; takes over the queue's window when it is made."""

    __slots__ = (
        "_again",
        "_busy",
        "_differ",
        "_idle",
        "_idle_mark",
        "_index",
        "_late",
        "_network",
        "_owner",
        "_places",
        "_top",
        "_turn",
        "_unpicky",
        "groups",
        "queue",
        "skipped",
        "window",
    )

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self.window = SortedWindow()
        for entry in queue.window:
            self.window.add(entry)
        queue.window = self.window
        queue.choosing = self
        self.groups = Groups(queue.core)
        self.skipped: int | None = None
        self._turn = 0
        self._top = 0  # no mark is higher
        self._late: list[int] = []  # entries of the window that came below a mark, ascending; some may be gone
        self._idle: list[Place] = []  # by rank: all that may be given something now, if all have come to `_idle_mark`
        self._index: SelectorIndex[Place] | None = None  # those with selectors, if most of all ask for one value
        self._unpicky: list[Place] | None = None  # those without; None = both are to be made anew
        self._idle_mark = 0  # goes before their own marks
        self._busy = False
        self._again = False
        self._network = Place(None, None, 0)
        self._places: dict[Consumer, Place] = {}  # in the order in which they subscribed
        self._owner: Consumer | None = None  # the exclusive consumer that gets everything
        self._differ = False  # not all consumers may take everything, or in the same order
        for consumer in queue.consumers:
            self._add(consumer)
        self._look()

    # ---- consumers come and go

    def join(self, consumer: Consumer) -> None:
        self._add(consumer)
        self._look()

    def _add(self, consumer: Consumer) -> None:
        self._turn += 1
        self._places[consumer] = Place(consumer, self.skipped, self._turn)

    def unlisted(self, consumer: Consumer) -> None:
        """A consumer may be given nothing for a while."""
        place = self._places.get(consumer)
        if place is not None and place in self._idle:
            self._idle.remove(place)
            self._pass(place, self._idle_mark)

    def leave(self, consumer: Consumer) -> None:
        """A consumer has left; what it holds has not come back yet."""
        self._part()
        place = self._places.pop(consumer)
        if self.groups.release(consumer):
            self._free(place.mark, place.missed)
        self._look()
        if not self._differ and not self.groups:
            self._end()
        else:
            self.rerouted()  # what had to stay while he was here may go on now

    def _look(self) -> None:
        """Others consume than before."""
        self._index = self._unpicky = None
        priorities = {each.options.priority for each in self._places}
        self._differ = len(priorities) > 1 or any(map(is_choosy, self._places))
        exclusive = [place for consumer, place in self._places.items() if consumer.options.exclusive]
        owner = max(exclusive, key=lambda place: place.priority).consumer if exclusive else None
        if owner is not self._owner:
            self._owner = owner
            self._free(0, self.skipped)

    def _free(self, mark: int, missed: int | None) -> None:
        """What somebody had a right to is anybody's now: entries from `mark` on, or from `missed` on in the store."""
        self._part()
        for place in (*self._places.values(), self._network):
            place.mark = min(place.mark, mark)
            if missed is not None:
                place.miss(missed)

    def _end(self) -> None:
        """Every consumer may take everything: a queue like others."""
        queue = self.queue
        if self.skipped is not None:
            self.queue.read_from(self.skipped)
        window: Window | SortedWindow = SortedWindow() if queue.trims else Window()
        for entry in self.window:
            window.add(entry)
        queue.window = window
        queue.choosing = None

    # ---- messages come, and are passed over

    def came(self, order: int) -> None:
        """A ready entry was put into the window, or left to the store behind it."""
        if order >= self._top:
            return
        if order not in self.window:
            self._free(order, None)
            return
        self._part()
        at = bisect_left(self._late, order)
        if at == len(self._late) or self._late[at] != order:
            self._late.insert(at, order)
            if len(self._late) > 2 * len(self.window) + 64:
                self._late = [each for each in self._late if each in self.window]

    def rerouted(self) -> None:
        """Other brokers of the network want the queue's messages, or want them no more."""
        self._network.mark = 0
        self._network.missed = self.skipped

    def cut(self, order: int) -> None:
        """The window ends at `order` now, and the queue is read again from there."""
        if self.skipped is not None and self.skipped >= order:
            self.skipped = None
        for place in (*self._places.values(), self._network):
            if place.missed is not None and place.missed >= order:
                place.missed = None
        at = bisect_left(self._late, order)
        if at < len(self._late):
            self._free(self._late[at], None)
            del self._late[at:]

    def passed_over(self, order: int) -> bool:
        """Whether something that may stand before an entry is still ready."""
        return self.window.first_order(order) < order or (self.skipped is not None and self.skipped < order)

    def shrink(self, count_keep: int, size_keep: int) -> bool:
        """Leave entries to the store, but not the end of the window, which somebody has passed; False when nobody has."""
        hungry = bool(self._hungry()) or self.queue.routes is not None
        if hungry:
            self._evict(count_keep, size_keep)
        return hungry

    def _evict(self, count_keep: int, size_keep: int) -> None:
        """Leave to the store what nobody wants, and of what somebody wants all but the first so many entries and bytes."""
        self._part()
        places = self._eligible()
        late = set(self._late)
        size = 0
        kept: list[Entry] = []
        leaving: list[Entry] = []
        for entry in self.window:
            order = entry.order
            is_late = order in late
            if len(kept) < count_keep and size + entry.message.size <= size_keep:
                if any((is_late or place.mark <= order) and self._takes(place, entry) for place in places):
                    kept.append(entry)
                    size += entry.message.size
                    continue
            else:
                for place in places:
                    if place.missed is not None and place.missed <= order:
                        continue
                    if (is_late or place.mark <= order) and self._takes(place, entry):
                        place.miss(order)
            if self.queue.routes is None:
                self._network.miss(order)
            leaving.append(entry)
        if leaving:
            self.window.keep(kept)
            self._late = [order for order in self._late if order in self.window]
            first = leaving[0].order
            self.skipped = first if self.skipped is None else min(self.skipped, first)
            for entry in leaving:
                self.queue.leave_to_store(entry)

    # ---- messages are given out

    def dispatch(self) -> None:
        """Give out what somebody may take, and read on while somebody could take more."""
        if self._busy:  # a message that left because of this has come to this queue
            self._again = True
            return
        self._busy = True
        self._again = True
        try:
            while self._again:
                self._again = False
                blocked = self._sweep()
        finally:
            self._busy = False
        queue = self.queue
        if queue.trims:  # before more is read, and the oldest ones are left to the store for it
            queue.core.trim(queue)
        limits = queue.core.limits
        hungry = self._idle or self._hungry()
        if queue.routes is not None and not blocked:
            hungry.append(self._network)
        if hungry:
            self._read_on(hungry)
        window = self.window
        if len(window) > limits.window_messages_max or (window.size > limits.window_bytes_max and len(window) > 1):
            if hungry:
                self._evict(limits.window_messages_max // 2, limits.window_bytes_max // 2)
            else:
                queue.shrink(limits.window_messages_max * 3 // 4, limits.window_bytes_max)
        if not self._differ and not self.groups and not window and queue.unloaded is None:
            self._end()

    def _read_on(self, hungry: list[Place]) -> None:
        queue = self.queue
        if hungry is not self._idle:
            missed = [place.missed for place in hungry if place.missed is not None]
            if missed:
                queue.read_from(min(missed))
        if queue.tail is None or queue.page is not None:
            return
        self._jump(hungry, queue.tail)
        limits = queue.core.limits
        if len(self.window) >= queue.core.page_below or self.window.size > limits.window_bytes_max // 2:
            self._evict(queue.core.page_below - 1, limits.window_bytes_max // 2)
        queue.request_page()

    def _jump(self, hungry: list[Place], tail: int) -> None:
        """Go on to read where those come to something new: what all of them have passed needs not be read again for them."""
        self._part()
        low = min(place.mark for place in hungry)
        if low <= tail:
            return
        for place in (*self._places.values(), self._network):
            if place.mark < low and place.missed is None:
                place.miss(max(place.mark, tail))
        self.skipped = tail if self.skipped is None else min(self.skipped, tail)
        self.queue.tail = low

    def _hungry(self) -> list[Place]:
        """The consumers that may be given something now."""
        if self._owner is not None:
            return [self._places[self._owner]] if self._owner.listed else []
        return [self._places[consumer] for consumer in self.queue.available]

    def _eligible(self) -> list[Place]:
        """All that may be given something at some time, as things stand."""
        places = [self._places[self._owner]] if self._owner is not None else list(self._places.values())
        return places if self.queue.routes is None else [*places, self._network]

    def _takes(self, place: Place, entry: Entry) -> bool:
        message = entry.message
        owner = self._owner_of(message)
        if owner is not None and owner is not place.consumer:
            return False
        return place.matches is None or place.matches(message)

    def _owner_of(self, message: Message) -> Consumer | None:
        """Who alone may have a message, because of its group."""
        if self._owner is not None:
            return self._owner
        return self.groups.owner(name) if self.groups and (name := group_of(message)) else None

    def _pass(self, place: Place, order: int) -> None:
        """Somebody has seen everything below `order`."""
        if order > place.mark:
            place.mark = order
            self._top = max(self._top, order)

    def _part(self) -> None:
        """Let each of the idle ones have a mark of its own again."""
        idle, self._idle = self._idle, []
        for place in idle:
            self._pass(place, self._idle_mark)

    def _all_idle(self) -> bool:
        """Whether all that may be given something now have come equally far, and only what is new needs be looked at."""
        idle = self._idle
        if not idle or self._late or self._owner is not None or self.queue.routes is not None:
            return False
        return len(idle) == len(self.queue.available)  # they are among these

    def _give_new(self) -> bool:
        """As `_sweep` where all are idle; False when they are not any more, and there may be something left."""
        idle = self._idle
        window = self.window
        now = self.queue.core.now
        while idle and (entry := window.after(self._idle_mark)) is not None:
            self._idle_mark = entry.order + 1
            self._top = max(self._top, self._idle_mark)
            if 0 < entry.message.expires <= now:
                window.discard(entry.order)
                self.queue.core.expire(entry)
                if not all(place.consumer.listed for place in idle if place.consumer is not None):
                    self._part()
            elif (chosen := self._choose(entry, name := self._group_of(entry), idle)) is not None:
                del idle[bisect_left(idle, _rank(chosen), key=_rank)]
                self._pass(chosen, self._idle_mark)
                if self._give(entry, name, chosen):
                    insort(idle, chosen, key=_rank)
            if self._idle is not idle:
                return False
        return True

    def _first_late(self, order: int) -> list[int]:
        """The first late entry of that order or a higher one, if there is one."""
        late = self._late
        at = bisect_left(late, order)
        while at < len(late) and late[at] not in self.window:
            del late[at]
        return late[at : at + 1]

    def _sweep(self) -> bool:
        """Give out from the window what can be; True when the network has no room for what it would get."""
        if self._all_idle() and self._give_new():
            return False
        self._part()
        queue = self.queue
        window = self.window
        now = queue.core.now
        joining = sorted(self._hungry(), key=_mark)  # those that have come further than this sweep, the nearest last
        active: list[Place] = []  # those that are asked about the next entry, in this order
        network = self._network if queue.routes is not None else None
        blocked = False
        at = 0
        while active or joining or network is not None:
            late = self._first_late(at)
            if not active:
                starts = [place.mark for place in (joining[-1] if joining else None, network) if place is not None]
                at = max(at, min(starts + late))
            entry = window.after(at)
            if entry is None:
                break
            order = entry.order
            at = order + 1
            is_late = late == [order]
            while joining and joining[-1].mark <= order:
                insort(active, joining.pop(), key=_rank)
            for place in [place for place in active if place.missed is not None and place.missed <= order]:
                active.remove(place)
                self._pass(place, place.missed or 0)
            if network is not None and network.missed is not None and network.missed <= order:
                self._pass(network, network.missed)
                network = None
            expires = entry.message.expires
            if expires and expires <= now:
                window.discard(order)
                queue.core.expire(entry)
                if queue.members:  # what came of it may have taken the credit of one
                    for place in [each for each in active if each.consumer is not None and not each.consumer.listed]:
                        active.remove(place)
                        self._pass(place, at)
                    joining = [each for each in joining if each.consumer is None or each.consumer.listed]
                continue
            asked = active
            if is_late:
                asked = [*active, *(place for place in joining if place.missed is None or order < place.missed)]
                asked.sort(key=_rank)
            name = self._group_of(entry)
            chosen = self._choose(entry, name, asked)
            if chosen is not None:
                taking = active if chosen in active else joining
                taking.remove(chosen)
                if not self._give(entry, name, chosen):
                    self._pass(chosen, at if taking is active else 0)
                elif taking is active:
                    insort(active, chosen, key=_rank)
                else:
                    joining.append(chosen)
                joining.sort(key=_mark)
                continue
            if network is not None and (is_late or network.mark <= order) and self._takes(network, entry):
                gone = queue.core.links.offer(queue, entry)
                if gone:
                    continue
                if gone is not None:
                    network.mark = min(network.mark, order)
                    network, blocked = None, True
            if is_late:
                self._late.remove(order)
                for place in self._eligible():
                    if place.mark > order and self._takes(place, entry) and place not in asked:
                        place.mark = order
        for place in active:
            self._pass(place, at)
        if network is not None:
            self._pass(network, at)
        self._note_idle(active, joining, at)
        return blocked

    def _note_idle(self, active: list[Place], joining: list[Place], at: int) -> None:
        """A sweep has come to the end, those of `active` with it, and those of `joining` further."""
        queue = self.queue
        if self._late or queue.routes is not None or self._owner is not None or (joining and queue.tail is not None):
            return
        idle = [place for place in (*active, *joining) if place.missed is None]
        if len(idle) == len(queue.available):
            idle.sort(key=_rank)
            self._idle = idle
            self._idle_mark = max([at, *(place.mark for place in joining)])
            self._top = max(self._top, self._idle_mark)

    def _group_of(self, entry: Entry) -> bytes:
        """The group that decides who gets an entry, empty = none does."""
        return group_of(entry.message) if self._owner is None else b""

    def _choose(self, entry: Entry, name: bytes, asked: list[Place]) -> Place | None:
        """Who of those gets an entry of a group: the first one that may take it; a new group goes to him who has the fewest."""
        message = entry.message
        owner = self.groups.owner(name) if name else None
        if owner is not None:
            asked = [place] if (place := self._places[owner]) in asked else []
        elif len(asked) > NARROW_FROM:
            asked = self._narrowed(message, asked)
        best: Place | None = None
        for place in asked:
            if best is not None and (not name or place.priority < best.priority):
                break
            if best is not None and self._groups_of(place) >= self._groups_of(best):
                continue
            if place.matches is None or place.matches(message):
                best = place
        return best

    def _narrowed(self, message: Message, asked: list[Place]) -> list[Place]:
        """Of those, which are in order of rank, all that may take a message."""
        if self._unpicky is None:
            places = self._places.values()
            self._unpicky = [place for place in places if place.matches is None]
            pairs = [
                (compile_selector(consumer.options.selector), place)
                for consumer, place in self._places.items()
                if place.matches is not None
            ]
            if 2 * sum(selector.equals is not None for selector, _ in pairs) > len(places):
                self._index = SelectorIndex(pairs)
        if self._index is None:
            return asked
        found = [*self._unpicky, *(place for _, place in self._index.candidates(message))]
        found.sort(key=_rank)
        ranks = [bisect_left(asked, _rank(place), key=_rank) for place in found]
        return [place for place, at in zip(found, ranks, strict=True) if at < len(asked) and asked[at] is place]

    def _groups_of(self, place: Place) -> int:
        return 0 if place.consumer is None else self.groups.count(place.consumer)

    def _give(self, entry: Entry, name: bytes, place: Place) -> bool:
        """Deliver an entry of the window, which is of a group of that name; True when the consumer may be given more."""
        consumer = place.consumer
        assert consumer is not None
        self.window.discard(entry.order)
        self.queue._deliver(entry, consumer)
        self._turn += 1
        place.turn = self._turn
        if name:
            if closes(entry.message):
                if self.groups.close(name):
                    self._free(entry.order + 1, place.missed)
            elif self.groups.owner(name) is None:
                self.groups.bind(name, consumer)
        return consumer.listed
