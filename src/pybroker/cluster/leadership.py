"""One leadership of a replica: from an election won to its end. Owns the user's term, and the leader's writes to ZooKeeper.

DESIGN.md section 5, rules 5, 8, 10 and 12. The user (a broker) gets the term once the epoch's first batch is on a quorum and the
lease is valid; the store is the user's until it releases the term, and nothing closes it before that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import trio

from pybroker.cluster import election
from pybroker.cluster.catchup import RunBlocking
from pybroker.cluster.coordinator import CoordinatorLost, Outcome
from pybroker.cluster.frames import FOLLOWING
from pybroker.cluster.leader import Leader, LeadershipLost
from pybroker.cluster.registry import LeaderRecord, View
from pybroker.cluster.set_nodes import SetNodes
from pybroker.cluster.term import Term
from pybroker.config import ReplicaSetConfig
from pybroker.errors import ConfigurationError, NotLeader, StoreError
from pybroker.store.committer import Batch
from pybroker.store.store import Store

log = logging.getLogger("pybroker.replica")

REMINDER = 10.0  # seconds between two complaints about a user that does not release its term


class Leadership:
    """`run` is its life. `given`: the term is there for its user; `taken`: its user has it, and must release it.

    record        how the leader is shown; `shown` is asked for its present form, with the addresses for clients
    make_leader   makes the leader, given what puts a copy on the roster
    changed       is called when `given` or `record` have changed
    """

    def __init__(
        self,
        config: ReplicaSetConfig,
        record: LeaderRecord,
        store: Store,
        nodes: SetNodes,
        *,
        make_leader: Callable[..., Leader],
        shown: Callable[[LeaderRecord], LeaderRecord],
        changed: Callable[[], None],
        run_blocking: RunBlocking,
    ) -> None:
        self.record = record
        self.leader = make_leader(epoch=record.epoch, store=store, register=self._register)
        self.term = Term(record.epoch, store, self.leader)
        self.given = False
        self.taken = False
        self.resigned = False
        self._config = config
        self._store = store
        self._nodes = nodes
        self._shown = shown
        self._changed = changed
        self._run_blocking = run_blocking
        self._addresses = trio.Event()
        self._roster_version = -1  # of the roster that the leader knows

    def show_addresses(self) -> None:
        """The addresses for clients have changed."""
        self._addresses.set()

    async def run(self) -> None:
        """Lead until that is over. Raises StoreError when the store must be opened again; or else it is as it was published.

        However it ends, the user has released the term when it returns or raises.
        """
        record, store, leader, term = self.record, self._store, self.leader, self.term
        reason = "the replica has stopped"
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leader.run)
                nursery.start_soon(self._watch)
                nursery.start_soon(term.watch_store, self._config.heartbeat_timeout)
                await self._run_blocking(store.reload)  # a follower writes past what `open` has read
                first = store.position[1] + 1
                await term.commit(Batch([store.history_change(record.epoch, first)], (record.epoch, first)))
                await leader.wait_reach(first)
                await leader.wait_lease()
                await self._run_blocking(store.reload)
                self.given = True
                self._changed()
                await term.wait_released()
                reason = "handed over"
                await self._resign()
                nursery.cancel_scope.cancel()
        except* LeadershipLost as lost:
            reason = str(first_of(lost))
        except* (StoreError, OSError) as failed:
            failure = first_of(failed)
            reason = str(failure)
        finally:
            term.end(reason)
            if self.taken:
                with trio.CancelScope(shield=True):  # the user releases it as soon as `lost` is set, whatever happens
                    await self._wait_released()
            log.info("replica %s leads no more (epoch %d): %s", record.name, record.epoch, reason)
        if failure is not None:
            raise StoreError(reason) from failure
        if term.doubtful:
            raise StoreError(
                f"a batch was under way when the leadership ended ({reason}): what is on the disk must be read"
            )
        await leader.sync()  # in the modes that do not wait for its own disk: what it publishes next must be there
        await self._run_blocking(store.reload)

    async def _wait_released(self) -> None:
        waited = 0.0
        while True:
            with trio.move_on_after(REMINDER):
                await self.term.wait_released()
                return
            waited += REMINDER
            log.error(
                "replica %s can't go on: who used the store while it led has not let go of it for %.0f s",
                self.record.name,
                waited,
            )

    async def _resign(self) -> None:
        """Rule 12: let the best follower catch up, then let go of all of them, and take the leader's node away meanwhile."""
        with trio.move_on_after(self._config.handover_timeout):
            await self.leader.wait_caught_up()
        self.resigned = True
        self.leader.step_down("handed over")
        with trio.move_on_after(
            self._config.handover_timeout, shield=True
        ):  # from the end of the leadership, which has begun
            try:
                view = self._nodes.view  # the others wait: what was read last will do if it was the last
                while writes := election.resign(view, self.record):
                    if await self._nodes.coordinator.transact(writes) is not Outcome.REFUSED:
                        break
                    view, _ = await self._nodes.look()
            except CoordinatorLost:
                pass

    # ---- ZooKeeper

    async def _watch(self) -> None:
        """See whether another epoch has begun, or the roster is another one; show the leader again when its node is gone.

        ZooKeeper may be away.
        """
        nodes = self._nodes
        while True:
            seen = nodes.coordinator.changes
            self._addresses = trio.Event()
            try:
                view, seen = await nodes.look()
                if view.epoch > self.record.epoch:
                    raise LeadershipLost(f"epoch {view.epoch} has begun", view.epoch)
                self.record = self._shown(self.record)
                self._changed()
                if view.epoch == self.record.epoch:
                    self._take_roster(view)
                    if not election.is_shown(view, self.record, nodes.coordinator.session):
                        await nodes.coordinator.transact(election.show_again(view, self.record))
                        continue
            except CoordinatorLost:
                pass
            except ConfigurationError as error:
                log.error("replica %s goes on leading, though: %s", self.record.name, error)
            await nodes.wait_change_or(self._addresses, seen)

    def _take_roster(self, view: View) -> None:
        """The leader goes by the newest roster of its epoch that was read, and by no older one."""
        if view.roster_version is not None and view.roster_version > self._roster_version:
            self._roster_version = view.roster_version
            self.leader.set_roster(view.roster)

    async def _register(self, name: str, incarnation: str) -> bool:
        """Put a learner on the roster: asked by the leader when the copy is durable up to its position.

        The roster that it is written into is the leader's from then on: a copy that is not on it does not count beside this one.
        """
        while not self.leader.places.is_barred(name):
            try:
                view, _ = await self._nodes.look()
                if view.epoch != self.record.epoch:
                    return False
                self._take_roster(view)
                if view.roster.get(name) == incarnation:
                    return True
                writes = election.register(view, self.record.epoch, self._config.replicas, name, incarnation)
                if writes is None:
                    return False
                if await self._nodes.coordinator.transact(writes) is Outcome.DONE:
                    assert view.roster_version is not None
                    self._roster_version = max(self._roster_version, view.roster_version + 1)
                    return True
            except CoordinatorLost:
                return False
        return False

    # ---- an operator's changes

    async def replace(self, old: str, new: str) -> None:
        """Rule 10: stop counting the copy of `old`, then give its place to `new`."""
        if old == self.record.name:
            raise ConfigurationError(f"replica {old!r} leads: let another one lead first (`pybroker replica handover`)")
        try:
            view = await self._nodes.replace(self._config.replicas, old, new, partial(self._before_replacing, old, new))
            if old in view.roster:  # what it was made on
                assert view.roster_version is not None
                view = election.replaced(view, old, new)
            self._take_roster(view)
        finally:
            self.leader.places.allow(old)
        log.warning("replica %s has given the place of %s to %s", self.record.name, old, new)

    def _before_replacing(self, old: str, new: str, view: View) -> None:
        leader = self.leader
        if view.epoch != self.record.epoch:
            raise NotLeader(f"replica {self.record.name} does not lead any more")
        self._take_roster(view)
        election.replace(view, self._config.replicas, old, new)  # nothing is done for what can't be
        others = [one.name for one in leader.members() if one.counted and one.state == FOLLOWING and one.name != old]
        if len(others) < election.quorum(self._config.replicas) - 1:
            raise ConfigurationError(
                f"without {old!r} the leader would have too few copies to confirm anything: "
                f"only {', '.join([self.record.name, *others])} would be there"
            )
        leader.stop_counting(old)


def first_of(error: BaseException) -> Exception:
    """The first error in (nested) groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error
