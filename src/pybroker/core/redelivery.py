"""Redelivery with a delay: rejected entries wait here until they are due. A part of `Core`. Pure.

An entry that waits is *delayed*: outstanding in its queue, with nobody. When it is due it returns to its place, so before what
came after it; that was given out meanwhile. Only a consumer that stays and did not acknowledge (a rejection, an aborted
transaction) delays a message: what comes back because its consumer has left is for another one, at once. A delay is not stored:
after a crash, as at any start, a delayed message is redelivered at once, with its deliveries counted.

What waits is in memory. A queue in which as much waits as its policy allows (`redelivery_waiting_max`, and the bytes of a
window) is *stalled*: nothing of it is given out until some of that is due.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING
from zlib import crc32

from pybroker.core.entry import DELAYED, READY, Entry

if TYPE_CHECKING:
    from pybroker.core.broker import Core
    from pybroker.core.consumer import Consumer
    from pybroker.core.queue import Queue
    from pybroker.policies import DestinationPolicy


def delay_ms(policy: DestinationPolicy, message_id: bytes, deliveries: int) -> int:
    """Milliseconds before the next delivery of a message that had so many: the same for the same message and number."""
    delay = policy.redelivery_delay
    longest = policy.redelivery_delay_max
    if delay <= 0:
        return 0
    for _ in range(deliveries - 1):
        if delay >= longest or policy.redelivery_backoff <= 1:
            break
        delay *= policy.redelivery_backoff
    chance = crc32(b"%d %b" % (deliveries, message_id)) / 0xFFFFFFFF
    delay = min(delay, longest) * (1 + policy.redelivery_jitter * (2 * chance - 1))
    return int(min(delay, longest) * 1000)


class Redeliveries:
    """The entries that wait for their redelivery. `moved`: `next_due` has changed since the caller last looked."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._heap: list[tuple[int, int, Entry]] = []  # (due, number, entry)
        self._number = 0
        self._seen = 0  # the time when this was last called
        self.moved = False

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next_due(self) -> int | None:
        """When the next one is due, in milliseconds since the Unix epoch; None when nothing waits."""
        return self._heap[0][0] if self._heap else None

    def delays(self, queue: Queue, holder: Consumer | None) -> bool:
        """Whether what this consumer gives back has to wait."""
        if not queue.policy.redelivery_delay or holder is None:
            return False
        return holder in queue.consumers and not holder.connection.closed

    def hold(self, entry: Entry) -> None:
        """Let an entry wait that stands in no collection of its queue."""
        self._look_at_clock()
        queue = entry.queue
        policy = queue.policy
        due = self._core.now + delay_ms(policy, entry.message.message_id, entry.deliveries)
        if entry.message.expires:
            due = min(due, entry.message.expires)
        entry.state = DELAYED
        queue.outstanding[entry.order] = entry
        queue.delayed[entry.order] = entry
        queue.delayed_size += entry.message.size
        self._number += 1
        heappush(self._heap, (due, self._number, entry))
        self.moved = self.moved or self._heap[0][2] is entry
        if queue.stalled is None and self._full(queue):
            queue.stalled = {}
            for consumer in list(queue.available):
                queue.unlist_consumer(consumer)
                queue.stalled[consumer] = None

    def _full(self, queue: Queue) -> bool:
        count = len(queue.delayed)
        size_max = self._core.limits.window_bytes_max
        return count >= queue.policy.redelivery_waiting_max or queue.delayed_size >= size_max

    def release_due(self) -> None:
        """Return what is due to its place, and give it out."""
        self._look_at_clock()
        queues: dict[Queue, None] = {}
        while self._heap and self._heap[0][0] <= self._core.now:
            entry = heappop(self._heap)[2]
            self._return(entry)
            queues[entry.queue] = None
            self.moved = True
        for queue in queues:
            self._go_on(queue)

    def _look_at_clock(self) -> None:
        """When the clock was put back, what waits has still as long to wait as before, and no longer than its policy says."""
        now = self._core.now
        back = self._seen - now
        self._seen = now
        if back > 0 and self._heap:
            self._heap = [
                (min(due - back, now + int(entry.queue.policy.redelivery_delay_max * 1000)), number, entry)
                for due, number, entry in self._heap
            ]
            heapify(self._heap)
            self.moved = True

    def release(self, queue: Queue) -> None:
        """Return all that waits in a queue to its place; the caller sees to the rest."""
        if queue.delayed:
            for entry in list(queue.delayed.values()):
                self._return(entry)
            self._heap = [each for each in self._heap if each[2].queue is not queue]
            heapify(self._heap)
            self.moved = True

    def _return(self, entry: Entry) -> None:
        queue = entry.queue
        del queue.outstanding[entry.order]
        del queue.delayed[entry.order]
        queue.delayed_size -= entry.message.size
        entry.state = READY
        if entry.message.expires and entry.message.expires <= self._core.now:
            self._core.expire(entry)
        else:
            queue.insert(entry)

    def _go_on(self, queue: Queue) -> None:
        if queue.stalled is not None and not self._full(queue):
            waiting, queue.stalled = queue.stalled, None
            for consumer in waiting:
                if consumer in queue.consumers:
                    queue.list_consumer(consumer)
        queue.dispatch()
