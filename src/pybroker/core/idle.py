"""Idle queues: those that a policy lets go when nobody has used them for a time (`idle_after`). A part of `Core`. Pure.

A queue that is looked at and has a use begins anew; one that has none since `idle_after` is removed, with its record. Each sweep
looks at some of all queues only. Nothing is known of the time before this life of the core, so a restart begins anew, too.
Never removed is a queue with a message of any sort, and one that collects from a virtual topic: it would miss what comes later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybroker.core.kinds import QUEUE
from pybroker.core.queue import Queue
from pybroker.destination import Destination

if TYPE_CHECKING:
    from pybroker.core.broker import Core


class Idle:
    """What is known of unused queues."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._on = any(core.policies.all_of("idle_after"))
        self._since: dict[int, tuple[int, int]] = {}  # by id: unused since (ms), and what it had taken in by then
        self._next: list[int] = []  # ids of queues that this round has still to look at

    def used(self, queue: Queue) -> None:
        """Somebody had a use for it just now."""
        self._since.pop(queue.queue_id, None)

    def sweep(self) -> None:
        """Look at the next queues, `delivery.idle_looks_max` at most, and remove those that have been idle for long enough."""
        if not self._on:
            return
        queues = self._core.queues
        if not self._next:
            self._next = list(queues)
        looks_max = self._core.delivery.idle_looks_max
        looks, self._next = self._next[-looks_max:], self._next[:-looks_max]
        for queue_id in looks:
            queue = queues.get(queue_id)
            if queue is not None and queue.kind == QUEUE and queue.policy.idle_after:
                self._look(queue)

    def _look(self, queue: Queue) -> None:
        if self._in_use(queue):
            self.used(queue)
            if not queue.depth and queue.tail is not None:
                queue.request_page()  # shows that nothing is behind the window, either
            return
        now, enqueued = self._core.now, queue.counts.enqueued
        since, before = self._since.get(queue.queue_id, (now, -1))
        if before != enqueued or since > now:  # it was written to, or the clock was put back
            self._since[queue.queue_id] = now, enqueued
        elif now - since >= queue.policy.idle_after * 1_000:
            self._remove(queue)

    def _in_use(self, queue: Queue) -> bool:
        """Whether something is in it, or somebody holds to it."""
        return bool(
            queue.depth
            or queue.unread
            or queue.spooled
            or queue.window
            or queue.outstanding
            or queue.tail is not None
            or queue.page is not None
            or queue.removals is not None
            or queue.consumers
            or queue.choosing is not None
            or queue.stalled is not None
            or queue.routes is not None
            or self._core.routing.topic_of(Destination(QUEUE, queue.name)) is not None
        )

    def _remove(self, queue: Queue) -> None:
        core = self._core
        self.used(queue)

        del core.by_destination[f"/queue/{queue.name}"]
        core.expiring.discard(queue.queue_id)
        for peer in core.links.peers.values():
            peer.blocked.pop(queue, None)
        core.deleted(queue)
