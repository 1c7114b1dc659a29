"""A term: one leadership, as the broker that uses it sees it. Owns the hand-over of the store between the two."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from pybroker.cluster.leader import Leader, LeadershipLost
from pybroker.store.committer import Batch, Committer
from pybroker.store.store import Store

log = logging.getLogger("pybroker.replica")


class Term:
    """One leadership, as its user sees it, and its `Committer`. The store is the user's until `release`.

    handover  set when this replica is asked to let another one lead: the user stops taking work, and releases the term
    doubtful  whether a commit has ended so that the store may hold what it does not show: it must be opened again
    """

    def __init__(self, epoch: int, store: Store, leader: Leader) -> None:
        self.epoch = epoch
        self.store = store
        self.handover = trio.Event()
        self.doubtful = False
        self.lost = trio.Event()  # the leadership is over: nothing more may be shown or confirmed
        self.reason = ""
        self._leader = leader
        self._released = trio.Event()

    @property
    def valid(self) -> bool:
        """Whether effects may be shown now: asked at each turn."""
        return not self.lost.is_set() and self._leader.lease_valid

    @property
    def committer(self) -> Committer:
        return self

    async def commit(self, batch: Batch) -> None:
        try:
            await self._leader.commit(batch)
        except LeadershipLost:
            raise  # it waited for the others: nothing was written here
        except BaseException:
            self.doubtful = True
            raise

    async def fetch(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Whole values for bad ones that were found in the store, as the other copies have them; see `Leader.fetch`."""
        return await self._leader.fetch(keys)

    async def watch_store(self, interval: float) -> None:
        """Ask for a hand-over once the store is suspect: but only while a quorum of other copies can do without this one."""
        while not (self.store.suspect and self._leader.others_hold()):  # noqa: ASYNC110
            await trio.sleep(interval)
        log.error("this leader's store is to be compared with another one's, which shall lead: %s", self.store.suspect)
        self.handover.set()

    @property
    def released(self) -> bool:
        return self._released.is_set()

    def release(self) -> None:
        """The user does not touch the store any more."""
        self._released.set()

    async def wait_released(self) -> None:
        await self._released.wait()

    def end(self, reason: str) -> None:
        if not self.lost.is_set():
            self.reason = reason
            self.lost.set()
