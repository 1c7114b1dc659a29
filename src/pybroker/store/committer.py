"""The seam where a batch is made durable. Owns its shape only.

The journal fills batches and hands them to a `Committer`: one that writes to this process's store, or one that sends them to
the followers of a replica set first. Neither the core nor the engine knows which.
"""

from __future__ import annotations

from typing import Protocol

from pybroker.store.backend import Change


class Batch:
    """Changes that become durable together, and the position `(epoch, lsn)` that they bring the store to."""

    __slots__ = ("changes", "position")

    def __init__(self, changes: list[Change], position: tuple[int, int]) -> None:
        self.changes = changes
        self.position = position


class Committer(Protocol):
    """Makes batches durable, one at a time, in order of their positions."""

    async def commit(self, batch: Batch) -> None:
        """Return when the batch is as safe as it was asked to be. Any error means: nobody knows whether it is stored."""
        ...
