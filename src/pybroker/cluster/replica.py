"""One member of a replica set: the life of its roles. Owns the loop that reads ZooKeeper, stands, follows and leads.

DESIGN.md section 5. What may be written when is decided by the pure rules in `election`; how batches travel is in `leader` and
`follower`; this file only puts them in order, one role at a time:

    none -> candidate -> leader        elected: the batches that it holds are committed with its own first one
    none or candidate -> joining -> follower   its slot is given up under the leader's epoch before any frame is taken
    any -> none                        link lost, lease over, store failed, handed over; never the end of the process
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from pybroker.cluster import election, status
from pybroker.cluster.catchup import RunBlocking
from pybroker.cluster.coordinator import Coordinator, CoordinatorLost, Outcome, Write
from pybroker.cluster.election import Blocked, Me, Proposal
from pybroker.cluster.follower import Follower, FollowingEnded, Greeting
from pybroker.cluster.leader import Leader
from pybroker.cluster.leadership import Leadership, first_of
from pybroker.cluster.lease_clock import seconds_asleep
from pybroker.cluster.network import Network
from pybroker.cluster.registry import LeaderRecord, Position, View, check_name
from pybroker.cluster.ring import Ring
from pybroker.cluster.scrub import Scrubber
from pybroker.cluster.set_nodes import SetNodes
from pybroker.cluster.term import Term
from pybroker.config import ReplicaSetConfig
from pybroker.errors import BrokerError, ConfigurationError, NotLeader, StoreDamaged, StoreError
from pybroker.store.copies import Copies
from pybroker.store.store import Store

log = logging.getLogger("pybroker.replica")

GREETING = 0.2  # seconds for which a replica that could stand for election waits for a leader's first word
REOPEN_DELAY_MAX = 10.0  # seconds between two tries to open a store that has failed
FAILURES_APART = 60.0  # seconds between two failures of a store from which on the second counts as the first
STANDING_BACK = 1 << 32  # less weight for one that lets others go first

NONE, CANDIDATE, JOINING, FOLLOWER, LEADER = "none", "candidate", "joining", "follower", "leader"


class Replica:
    """A member. `run` is its life; `next_term` waits until it leads.

    clients      gives the addresses that a leader shows to clients
    run_blocking runs a function that may block (store, files) away from the event loop, one at a time
    run_reading  the same for long reads, beside those; None = `run_blocking`
    asleep       for how many seconds the machine has been suspended
    """

    def __init__(
        self,
        config: ReplicaSetConfig,
        name: str,
        copies: Copies,
        coordinator: Coordinator,
        network: Network,
        *,
        run_blocking: RunBlocking,
        rng: random.Random,
        run_reading: RunBlocking | None = None,
        clients: Callable[[], tuple[str, ...]] = tuple,
        asleep: Callable[[], float] = seconds_asleep,
    ) -> None:
        self.config = config
        self.name = name
        self.role = NONE
        self.epoch = 0
        self.leader: LeaderRecord | None = None  # whom it follows, or itself
        self.blocked = ""  # why no leader can be elected, if something is wrong
        self.address = ""  # where the others reach it
        self.forced = False  # an operator asked for a start with what is there
        self._copies = copies
        self._nodes = SetNodes(coordinator)
        self._network = network
        self._run_blocking = run_blocking
        self._run_reading = run_reading if run_reading is not None else run_blocking
        self._scrubber = Scrubber(config, self._run_reading, run_blocking)
        self._rng = rng
        self.clients = clients
        self._store: Store | None = None
        self._ring = Ring(config.ring_bytes_max)
        self._leading: Leadership | None = None
        self._following: Follower | None = None
        self._asleep = asleep
        self._changed = trio.Event()
        self._forced = trio.Event()
        self._better = ""  # a start can be forced, but by that replica
        self._unreachable: dict[str, float] = {}  # attempt of a leader that did not answer -> until when it isn't tried
        self._resigned_until = 0.0  # others may go first until then
        self._failures = 0  # of the store, one soon after the other
        self._failed_at = -FAILURES_APART
        self._first = True  # this life has not written its slot yet
        self._counted = False  # this life's number is on the disk
        self._proposing = False  # an election that this replica tries is under way
        self._hurry = False  # a link has just ended: clients may be waiting for a leader

    # ---- for the owner

    async def next_term(self) -> Term:
        """Wait until this replica leads."""
        while True:
            leading = self._leading
            if leading is not None and leading.given:
                term = leading.term
                if not term.lost.is_set() and not term.released:
                    leading.taken = True
                    return term
            await self._changed.wait()

    async def wait_role_change(self, seen: tuple[str, int]) -> tuple[str, int]:
        """Wait until the role or its epoch is another one than `seen`."""
        while (self.role, self.epoch) == seen:
            await self._changed.wait()
        return self.role, self.epoch

    def hand_over(self) -> None:
        """Ask a leader to resign in good order once its user has released the term. Does nothing elsewhere."""
        if self._leading is not None:
            self._leading.term.handover.set()

    def show_clients(self) -> None:
        """The addresses for clients have changed: a leader shows the new ones."""
        if self._leading is not None:
            self._leading.show_addresses()

    async def replace(self, old: str, new: str) -> None:
        """An operator gives the place of the name `old` to `new`, whose copy then comes as a learner.

        Only the leader does it (NotLeader elsewhere); or, while ZooKeeper shows none, whoever is asked. Raises
        ConfigurationError when that can't be, CoordinatorLost while there is no ZooKeeper.
        """
        check_name(new, "replica")
        if self._leading is not None:
            await self._leading.replace(old, new)
            return
        await self._nodes.replace(self.config.replicas, old, new, self._expect_no_leader)
        log.warning("replica %s has given the place of %s to %s; there is no leader now", self.name, old, new)

    def _expect_no_leader(self, view: View) -> None:
        leader = self.leader
        if leader is None and view.leader is not None and view.leader.epoch == view.epoch:
            leader = view.leader
        if leader is not None:
            raise NotLeader(
                f"replica {self.name} does not lead: ask replica {leader.name}, which does", leader.name, leader.clients
            )

    def force_start(self) -> None:
        """An operator asks for a start with the copies that are there, whatever is missing. What only absent ones have is lost.

        Raises BrokerError when there is a leader, as far as this replica can know.
        """
        if self.role in (LEADER, FOLLOWER, JOINING):
            raise BrokerError(f"replica {self.name} is {self.role}: the set has started")
        shown = self._nodes.view.leader
        if shown is not None and shown.epoch == self._nodes.view.epoch and shown.name != self.name:
            raise BrokerError(
                f"ZooKeeper shows replica {shown.name} as the leader: stop it; when its session has ended, force the start"
            )
        self.forced = True
        self._better = ""
        self._forced.set()

    async def wait_forced(self) -> None:
        """Wait until the forced start has led to a leader. Raises BrokerError, and forces nothing, when another has more."""
        while self.role not in (LEADER, FOLLOWER):
            if self._better:
                self.forced = False
                raise BrokerError(self.blocked)
            await self._changed.wait()

    @property
    def store(self) -> Store | None:
        """The present one, to be looked at; None while there is none."""
        return self._following.store if self._following is not None else self._store

    @property
    def position(self) -> Position | None:
        """That of the store; None while it can't be opened."""
        if self._following is not None:
            return self._following.position
        return Position(*self._store.position) if self._store is not None else None

    def status(self) -> dict[str, Any]:
        """What it is and sees, and the whole set as far as it knows, for operators."""
        leader = self.leader
        me = self._me() if self._store is not None else None
        if me is not None and self.position is not None:
            me = replace(me, position=self.position)
        if self._leading is not None:
            table = self._leading.leader.members()
        else:
            table = self._following.statistics().members if self._following is not None else ()
        return {
            "set": self.config.name,
            "name": self.name,
            "role": self.role,
            "epoch": self.epoch,
            "leader": leader.name if leader is not None else None,
            "clients": list(leader.clients) if leader is not None else [],
            "zookeeper": "connected" if self._nodes.connected else "not connected",
            "blocked": self.blocked,
            "position": list(me.position) if me is not None else None,
            "sync": self.config.sync,
            "members": status.members(self._nodes.view, self.name, self.role, me, self.address, leader, table),
        }

    def _become(self, role: str, epoch: int | None = None, leader: LeaderRecord | None = None) -> None:
        if epoch is not None:
            self.epoch = epoch
        if (role, leader) != (self.role, self.leader):
            log.info("replica %s of set %s: %s (epoch %d)", self.name, self.config.name, role, self.epoch)
        self.role = role
        self.leader = leader
        if role in (FOLLOWER, LEADER):
            self.blocked = ""
            self.forced = False
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled. Raises ConfigurationError when this member must not be in the set, StoreError at start."""
        try:
            async with trio.open_nursery() as nursery:
                bound = await nursery.start(self._network.serve, self.config.bind, self._accept)
                self.address = self.config.advertise or bound
                self._store = await self._open()
                nursery.start_soon(self._nodes.run_alive, self.name, self.address, self.config.session_timeout / 4)
                task_status.started()
                while True:
                    try:
                        await self._live()
                    except CoordinatorLost:
                        await self._nodes.wait_connected()
                    except (StoreError, OSError) as error:
                        await self._reopen(error)
        except BaseExceptionGroup as group:
            told, rest = group.split((ConfigurationError, StoreError))
            if told is None or rest is not None:
                raise
            raise first_of(told) from None
        finally:
            with trio.CancelScope(shield=True):  # a store must not be closed while anything uses it: files only
                await self._run_blocking(self._copies.close)

    async def _open(self) -> Store:
        """The current copy; an empty one, which counts no more, if it is damaged."""
        self._first = True
        self._counted = False
        try:
            store: Store = await self._run_blocking(self._copies.open)
        except StoreDamaged as error:
            log.error("replica %s: its store is damaged, and is filled anew by a leader: %s", self.name, error)
            store = await self._run_blocking(self._copies.start_anew)
        return store

    async def _reopen(self, failure: Exception) -> None:
        log.error("replica %s: its store is opened again: %s", self.name, failure)
        now = trio.current_time()
        self._failures = 1 + (self._failures if now - self._failed_at < FAILURES_APART else 0)
        self._failed_at = now
        # Meanwhile the others elect one of them, if they can: a disk that takes no writes is not elected again and again.
        delay = min(self.config.retry_interval * 2 ** min(self._failures - 1, 10), REOPEN_DELAY_MAX)
        self._become(NONE)
        damaged = isinstance(failure, StoreDamaged) or (self._store is not None and self._store.unreadable)
        while True:
            await trio.sleep(delay)
            try:
                self._store = None
                self._ring.clear()
                self._store = await self._open()
                if damaged:  # though it opens: as it is, it would fail again
                    self._store.distrust(str(failure), unreadable=True)
                return
            except StoreError as error:
                delay = min(2 * delay, REOPEN_DELAY_MAX)
                log.error("replica %s: its store can't be opened, next try in %.1f s: %s", self.name, delay, error)

    async def _accept(self, stream: trio.abc.Stream) -> None:
        try:
            with trio.move_on_after(self.config.heartbeat_timeout):
                while self._proposing:  # the others may see that this replica was elected before it hears so itself
                    await self._changed.wait()
            leading = self._leading
            if leading is not None:
                await leading.leader.serve(stream)
        except Exception:
            log.exception("replica %s: a replication link failed", self.name)
        finally:
            await trio.aclose_forcefully(stream)

    # ---- reading and writing ZooKeeper

    def _me(self) -> Me:
        store = self._store
        assert store is not None
        identity = self._copies.identity
        position = Position(*store.position)
        weight = self.config.weight
        if trio.current_time() < self._resigned_until:
            weight -= STANDING_BACK  # or the others would wait for this one, where it is as good as they are
        starts = identity.starts if self._counted else identity.starts + 1  # this life's number
        return Me(self.name, identity.incarnation, starts, weight, position)

    async def _count_start(self) -> None:
        """This life is about to write its slot, which was seen to be of no later one: its number must be on the disk first."""
        if not self._counted:
            await self._run_blocking(self._copies.count_start)
            self._counted = True

    async def _settled(self, writes: Sequence[Write], happened: Callable[[View], bool]) -> Outcome:
        return await self._nodes.settle(writes, self._me, happened, self._has_written)

    def _has_written(self) -> None:
        self._first = False

    # ---- none and candidate

    async def _live(self) -> None:
        """One step: read, and do what the rules say; returns when there is something new to read."""
        self._forced = trio.Event()
        if self._hurry:  # what was read last will do: what is written names its versions
            self._hurry = False
            view, seen = self._nodes.view, self._nodes.seen
        else:
            view, seen = await self._nodes.look()
        me = self._me()
        election.check_admission(view, me, self.config.replicas)
        if election.is_restored(view, me, self._first):
            log.warning(
                "replica %s: this copy is of an earlier life of the store; it takes part as a new copy", self.name
            )
            await self._run_blocking(self._copies.renew)
            self._first = True
            return
        missing = election.missing_nodes(view, me, self.config.replicas)
        if missing:
            await self._nodes.coordinator.transact(missing)
            return
        leader = election.visible_leader(view, me)
        if leader is not None and not self._may_try(leader):
            leader = None
        stands = election.stands(view, me)
        if leader is not None and not (self.role == CANDIDATE and stands):
            # Look first whether it is really there: nothing is given up for a leader that does not speak. But not for long:
            # if it is dead, the others need this replica to stand.
            greeting = await self._greet(leader, min(GREETING, self.config.heartbeat_timeout))
            if greeting is not None:
                await self._join(view, me, leader, greeting)
                return
            leader = None
        if not (self.forced or election.may_stand(view, me, self.config.replicas)):
            await self._wait(seen, view, me, leader, None)
            return
        if not stands:
            await self._count_start()
            written = await self._settled(election.publish(view, me), lambda seen: election.stands(seen, me))
            if written is not Outcome.REFUSED:
                self._first = False
                self._become(CANDIDATE)
            return
        if self.role != CANDIDATE:
            self._become(CANDIDATE)
        await self._stand(seen, view, me, leader)

    async def _stand(self, seen: int, view: View, me: Me, leader: LeaderRecord | None) -> None:
        attempt = f"{self._rng.getrandbits(64):016x}"
        record = LeaderRecord(0, self.name, attempt, self.address, self.clients())
        now = trio.current_time()
        proposal = election.propose(view, me, self.config.replicas, record, forced=self.forced)
        self.blocked, self._better = (proposal.reason, proposal.better) if isinstance(proposal, Blocked) else ("", "")
        self._notify()
        delay = None
        if isinstance(proposal, Proposal):
            delay = election.rank(view, me) * self.config.election_step + max(0.0, self._resigned_until - now)
        if (delay is None or delay > 0) and await self._wait(seen, view, me, leader, delay):
            return
        assert isinstance(proposal, Proposal)
        session = self._nodes.coordinator.session
        shown = election.with_epoch(record, proposal.epoch)
        self._proposing = True
        try:
            outcome = await self._settled(
                proposal.writes, lambda seen: seen.epoch == proposal.epoch and election.is_shown(seen, shown, session)
            )
            if outcome is not Outcome.REFUSED:
                self.forced = False
                await self._lead(shown, proposal.roster)
        finally:
            self._proposing = False
            self._notify()

    async def _wait(self, seen: int, view: View, me: Me, leader: LeaderRecord | None, delay: float | None) -> bool:
        """Wait for a change, at most `delay`; meanwhile see whether the leader can be reached again.

        False: the delay is over and nothing has changed.
        """
        if delay is None:
            delay = float("inf")
            shown = election.visible_leader(view, me)
            if shown is not None:  # until it may be tried again
                now = trio.current_time()
                delay = max(0.0, self._unreachable.get(shown.attempt, now + self.config.retry_interval) - now)
            changed = True
        else:
            changed = False
        found: list[Greeting] = []

        async def look_for_leader(scope: trio.CancelScope, record: LeaderRecord) -> None:
            greeting = await self._greet(record, self.config.heartbeat_timeout)
            if greeting is not None:
                found.append(greeting)
                scope.cancel()

        async with trio.open_nursery() as nursery:
            if leader is not None:
                nursery.start_soon(look_for_leader, nursery.cancel_scope, leader)
            with trio.move_on_after(delay):
                await self._nodes.wait_change_or(self._forced, seen)
                changed = True
            nursery.cancel_scope.cancel()
        if found:
            assert leader is not None
            await self._join(view, me, leader, found[0])
            return True
        return changed

    # ---- joining and following

    def _may_try(self, leader: LeaderRecord) -> bool:
        now = trio.current_time()
        self._unreachable = {attempt: until for attempt, until in self._unreachable.items() if until > now}
        return leader.attempt not in self._unreachable

    async def _greet(self, leader: LeaderRecord, patience: float) -> Greeting | None:
        """Connect to a leader and hear it speak; None (and a pause before the next try) when it does not."""
        with trio.move_on_after(patience):
            try:
                greeting = await Follower.greet(self._network, leader.replication)
                if (greeting.challenge.name, greeting.challenge.epoch) == (leader.name, leader.epoch):
                    return greeting
                await trio.aclose_forcefully(greeting.stream)
                log.debug("replica %s: another one is at the address of leader %s", self.name, leader.name)
            except (OSError, ValueError, trio.BrokenResourceError, trio.ClosedResourceError, FollowingEnded) as error:
                log.debug("replica %s: leader %s does not answer: %s", self.name, leader.name, error)
        self._unreachable[leader.attempt] = trio.current_time() + self.config.retry_interval
        return None

    async def _join(self, view: View, me: Me, leader: LeaderRecord, greeting: Greeting) -> None:
        """Give up the slot under the leader's epoch, then take its frames until the link ends."""
        store = self._store
        assert store is not None
        if store.position[0] == 0 and store.position[1] > 0:
            raise ConfigurationError(
                f"replica {self.name!r} brings messages of a time outside of any set, which following {leader.name!r} would "
                "overwrite: move its data_dir away (or bring them over as a client), and start it with an empty one"
            )
        try:
            self._become(JOINING, leader.epoch, leader)
            await self._count_start()
            version = view.slots[me.name][1]
            outcome = await self._settled(
                election.give_up(view, me), lambda seen: election.has_given_up(seen, me, version)
            )
            if outcome is not Outcome.REFUSED:
                self._first = False
            if outcome is not Outcome.DONE:  # seeing an empty slot is no leave: an election may have emptied it
                return
            follower = Follower(
                self.config,
                self.name,
                self._copies,
                store,
                self._ring,
                run_blocking=self._run_blocking,
                run_reading=self._run_reading,
                rng=self._rng,
                scrubber=self._scrubber,
            )
            self._following = follower
            failure: Exception | None = None

            def welcomed() -> None:
                self._resigned_until = 0.0  # another one has led since
                self._become(FOLLOWER, leader.epoch, leader)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_leader, leader)
                try:
                    await follower.follow(greeting, leader.epoch, welcomed)
                except FollowingEnded as ended:
                    log.info("replica %s no longer follows %s: %s", self.name, leader.name, ended)
                except Exception as error:  # not from within the nursery, which would wrap it
                    failure = error
                finally:
                    self._store = follower.store
                    self._following = None
                nursery.cancel_scope.cancel()
            if failure is not None:
                raise failure
            self._unreachable[leader.attempt] = trio.current_time() + self.config.election_step
            self._hurry = True
        finally:
            self._become(NONE)
            await trio.aclose_forcefully(greeting.stream)

    async def _watch_leader(self, followed: LeaderRecord) -> None:
        """The leader that is followed shows its addresses for clients once it has them: for those who ask here."""
        while True:
            seen = self._nodes.coordinator.changes
            try:
                view, seen = await self._nodes.look()
                shown = view.leader
                if shown is not None and shown.attempt == followed.attempt and self.leader is not None:
                    self.leader = shown
            except (CoordinatorLost, ConfigurationError):
                pass
            await self._nodes.coordinator.wait_change(seen)

    # ---- leading

    async def _lead(self, record: LeaderRecord, roster: Mapping[str, str]) -> None:
        store = self._store
        assert store is not None
        make_leader = partial(
            Leader,
            self.config,
            self.name,
            ring=self._ring,
            counted=roster,
            run_blocking=self._run_blocking,
            run_reading=self._run_reading,
            rng=self._rng,
            scrubber=self._scrubber,
            asleep=self._asleep,
        )
        leading = Leadership(
            self.config,
            record,
            store,
            self._nodes,
            make_leader=make_leader,
            shown=lambda shown: replace(shown, replication=self.address, clients=self.clients()),
            changed=self._leading_changed,
            run_blocking=self._run_blocking,
        )
        self._leading = leading
        self._proposing = False
        self._become(LEADER, record.epoch, record)
        try:
            await leading.run()
        finally:
            if leading.resigned:
                self._resigned_until = trio.current_time() + self.config.handover_timeout
            self._leading = None
            self._become(NONE)

    def _leading_changed(self) -> None:
        if self._leading is not None:
            self.leader = self._leading.record
        self._notify()


def check_replica_set(config: ReplicaSetConfig) -> None:
    """Raise ConfigurationError for a set that can't be: one line per fault."""
    faults = []
    interval, timeout, lease = config.heartbeat_interval, config.heartbeat_timeout, config.lease
    if config.replicas % 2 == 0 or config.replicas < 1:
        faults.append(f"replica_set.replicas: expected an odd number, got {config.replicas}: a half is no majority")
    if interval * 2 > timeout:
        faults.append(
            f"replica_set.heartbeat_timeout: expected at least twice replica_set.heartbeat_interval ({interval}), "
            f"got {timeout}"
        )
    if timeout > lease:
        faults.append(f"replica_set.lease: expected at least replica_set.heartbeat_timeout ({timeout}), got {lease}")
    if faults:
        raise ConfigurationError("\n".join(faults))
