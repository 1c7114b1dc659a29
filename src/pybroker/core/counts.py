"""What is counted of a queue while the broker runs. Owns names only."""

from __future__ import annotations


class QueueCounts:
    """Counters of one queue since the broker started."""

    __slots__ = (
        "acknowledged",
        "corrupt",
        "dead_lettered",
        "dropped",
        "enqueued",
        "expired",
        "forwarded",
        "redelivered",
        "removed",
    )

    def __init__(self) -> None:
        self.enqueued = 0
        self.acknowledged = 0
        self.redelivered = 0
        self.dead_lettered = 0
        self.dropped = 0  # by a policy: for others, of a slow subscriber, or instead of making them dead letters
        self.expired = 0
        self.forwarded = 0
        self.removed = 0  # purged, or moved elsewhere
        self.corrupt = 0
