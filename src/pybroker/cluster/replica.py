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
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import trio

from pybroker.cluster import election
from pybroker.cluster.catchup import RunBlocking
from pybroker.cluster.coordinator import Coordinator, CoordinatorLost, CreateNode, Outcome, Write
from pybroker.cluster.election import Blocked, Me, Proposal
from pybroker.cluster.follower import Follower, FollowingEnded, Greeting
from pybroker.cluster.leader import Leader, LeadershipLost
from pybroker.cluster.network import Network
from pybroker.cluster.registry import LeaderRecord, Position, View, encode, parse_view
from pybroker.cluster.ring import Ring
from pybroker.cluster.term import Term
from pybroker.config import ReplicaSetConfig
from pybroker.errors import ConfigurationError, StoreDamaged, StoreError
from pybroker.store.committer import Batch
from pybroker.store.copies import Copies
from pybroker.store.store import Store

log = logging.getLogger("pybroker.replica")

NONE, CANDIDATE, JOINING, FOLLOWER, LEADER = "none", "candidate", "joining", "follower", "leader"


class Replica:
    """A member. `run` is its life; `next_term` waits until it leads.

    clients      gives the addresses that a leader shows to clients
    run_blocking runs a function that may block (store, files) away from the event loop
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
        clients: Callable[[], tuple[str, ...]] = tuple,
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
        self._coordinator = coordinator
        self._network = network
        self._run_blocking = run_blocking
        self._rng = rng
        self.clients = clients
        self._store: Store | None = None
        self._ring = Ring(config.ring_bytes_max)
        self._leading: Leader | None = None
        self._following: Follower | None = None
        self._term: Term | None = None
        self._changed = trio.Event()
        self._unreachable: dict[str, float] = {}  # attempt of a leader that did not answer -> until when it isn't tried
        self._resigned_until = 0.0
        self._first = True  # this life has not written its slot yet
        self._proposing = False  # an election that this replica tries is under way
        self._addresses = trio.Event()  # those shown to clients may have changed

    # ---- for the owner

    async def next_term(self) -> Term:
        """Wait until this replica leads."""
        while self._term is None or self._term.lost.is_set() or self._term._released.is_set():
            await self._changed.wait()
        return self._term

    async def changes(self) -> AsyncIterator[tuple[str, int]]:
        """The role and its epoch, now and at each change."""
        shown: tuple[str, int] | None = None
        while True:
            changed = self._changed
            now = (self.role, self.epoch)
            if now != shown:
                shown = now
                yield now
            else:
                await changed.wait()

    async def wait_role_change(self, seen: tuple[str, int]) -> tuple[str, int]:
        """Wait until the role or its epoch is another one than `seen`."""
        while (self.role, self.epoch) == seen:
            await self._changed.wait()
        return self.role, self.epoch

    def hand_over(self) -> None:
        """Ask a leader to resign in good order once its user has released the term. Does nothing elsewhere."""
        if self._term is not None:
            self._term.handover.set()

    def show_clients(self) -> None:
        """The addresses for clients have changed: a leader shows the new ones."""
        self._addresses.set()

    @property
    def position(self) -> Position | None:
        """That of the store; None while it can't be opened."""
        if self._following is not None:
            return self._following.position
        return Position(*self._store.position) if self._store is not None else None

    def status(self) -> dict[str, Any]:
        """What it is and sees, for operators."""
        position = self.position
        following = self._following
        return {
            "set": self.config.name,
            "name": self.name,
            "role": self.role,
            "epoch": self.epoch,
            "position": list(position) if position is not None else None,
            "incarnation": self._copies.identity.incarnation,
            "leader": self.leader.name if self.leader is not None else None,
            "clients": list(self.leader.clients) if self.leader is not None else [],
            "zookeeper": "connected" if self._coordinator.connected else "not connected",
            "blocked": self.blocked,
            "following": asdict(following.statistics()) if following is not None else None,
            "leading": asdict(self._leading.statistics()) if self._leading is not None else None,
        }

    def _become(self, role: str, epoch: int | None = None, leader: LeaderRecord | None = None) -> None:
        if epoch is not None:
            self.epoch = epoch
        if (role, leader) != (self.role, self.leader):
            log.info("replica %s of set %s: %s (epoch %d)", self.name, self.config.name, role, self.epoch)
        self.role = role
        self.leader = leader
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
                nursery.start_soon(self._run_alive)
                task_status.started()
                while True:
                    try:
                        await self._live()
                    except CoordinatorLost:
                        await self._wait_connected()
                    except (StoreError, OSError) as error:
                        await self._reopen(error)
        except BaseExceptionGroup as group:
            told, rest = group.split((ConfigurationError, StoreError))
            if told is None or rest is not None:
                raise
            raise _first(told) from None
        finally:
            with trio.CancelScope(shield=True):  # a store must not be closed while anything uses it: files only
                if self._term is not None:
                    self._term.end("the replica has stopped")
                await self._run_blocking(self._copies.close)

    async def _open(self) -> Store:
        """The current copy; an empty one, which counts no more, if it is damaged."""
        self._first = True
        try:
            store: Store = await self._run_blocking(self._copies.open)
        except StoreDamaged as error:
            log.error("replica %s: its store is damaged, and is filled anew by a leader: %s", self.name, error)
            store = await self._run_blocking(self._copies.start_anew)
        return store

    async def _reopen(self, failure: Exception) -> None:
        log.error("replica %s: its store failed and is opened again: %s", self.name, failure)
        delay = self.config.retry_interval
        self._become(NONE)
        while True:
            await trio.sleep(delay)
            try:
                self._store = None
                self._ring.clear()
                self._store = await self._open()
                return
            except StoreError as error:
                delay = min(2 * delay, 10.0)
                log.error("replica %s: its store can't be opened, next try in %.1f s: %s", self.name, delay, error)

    async def _accept(self, stream: trio.abc.Stream) -> None:
        try:
            with trio.move_on_after(self.config.heartbeat_timeout):
                while self._proposing:  # the others may see that this replica was elected before it hears so itself
                    await self._changed.wait()
            leading = self._leading
            if leading is not None:
                await leading.serve(stream)
        except Exception:
            log.exception("replica %s: a replication link failed", self.name)
        finally:
            await trio.aclose_forcefully(stream)

    async def _run_alive(self) -> None:
        """Keep ``alive/NAME``: for status only, no rule depends on it."""
        seen = -1
        session = 0
        while True:
            if self._coordinator.connected and self._coordinator.session != session:
                try:
                    data = encode({"address": self.address})
                    path = f"alive/{self.name}"
                    outcome = await self._coordinator.transact([CreateNode(path, data, ephemeral=True)])
                    if (
                        outcome is not Outcome.DONE
                    ):  # it may have been written; or that of my last session is still there
                        nodes = await self._coordinator.read()
                        if path not in nodes or nodes[path].owner != self._coordinator.session:
                            await trio.sleep(self.config.session_timeout / 4)
                            continue
                    session = self._coordinator.session
                except CoordinatorLost:
                    pass
            seen = await self._coordinator.wait_change(seen)

    # ---- reading and writing ZooKeeper

    async def _look(self) -> tuple[View, int]:
        """What ZooKeeper says, and the count of changes to wait for something newer with. Raises CoordinatorLost."""
        seen = self._coordinator.changes
        return parse_view(await self._coordinator.read()), seen

    async def _wait_connected(self) -> None:
        while not self._coordinator.connected:
            await self._coordinator.wait_change(self._coordinator.changes)

    def _me(self) -> Me:
        store = self._store
        assert store is not None
        identity = self._copies.identity
        position = Position(*store.position)
        return Me(self.name, identity.incarnation, identity.starts, self.config.weight, position)

    async def _settled(self, writes: Sequence[Write], happened: Callable[[View], bool]) -> Outcome:
        """Do a transaction that names my slot's version; an unknown outcome is settled by reading back.

        DONE: it was answered so. UNKNOWN: it was not answered, and reading shows that it has happened. REFUSED: it has
        not, and can't any more: my slot was written once more, so that it is void if it arrives later.
        """
        outcome = await self._coordinator.transact(writes)
        if outcome is not Outcome.UNKNOWN:
            return outcome
        while True:
            view = await self._read_when_connected()
            if election.has_written(view, self._me()):
                self._first = False  # also when an election has emptied the slot since
            if happened(view):
                return Outcome.UNKNOWN
            if self.name not in view.slots:
                return Outcome.REFUSED
            try:
                if await self._coordinator.transact(election.touch(view, self._me())) is Outcome.DONE:
                    return Outcome.REFUSED
            except CoordinatorLost:
                pass

    async def _read_when_connected(self) -> View:
        while True:
            try:
                return (await self._look())[0]
            except CoordinatorLost:
                await self._wait_connected()

    # ---- none and candidate

    async def _live(self) -> None:
        """One step: read, and do what the rules say; returns when there is something new to read."""
        view, seen = await self._look()
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
            await self._coordinator.transact(missing)
            return
        leader = election.visible_leader(view, me)
        if leader is not None and not self._may_try(leader):
            leader = None
        if self.role != CANDIDATE and leader is not None:
            # Look first whether it is really there: nothing is given up for a leader that does not speak.
            greeting = await self._greet(leader)
            if greeting is not None:
                await self._join(view, me, leader, greeting)
                return
            leader = None
        if not election.may_stand(view, me, self.config.replicas):
            await self._wait(seen, view, me, leader, None)
            return
        if not election.stands(view, me):
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
        self.blocked = proposal.reason if isinstance(proposal, Blocked) else ""
        delay = None
        if isinstance(proposal, Proposal):
            delay = election.rank(view, me) * self.config.election_step + max(0.0, self._resigned_until - now)
        if (delay is None or delay > 0) and await self._wait(seen, view, me, leader, delay):
            return
        assert isinstance(proposal, Proposal)
        session = self._coordinator.session
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
            delay = self.config.retry_interval if election.visible_leader(view, me) is not None else float("inf")
            changed = True
        else:
            changed = False
        found: list[Greeting] = []

        async def look_for_leader(scope: trio.CancelScope, record: LeaderRecord) -> None:
            greeting = await self._greet(record)
            if greeting is not None:
                found.append(greeting)
                scope.cancel()

        async with trio.open_nursery() as nursery:
            if leader is not None:
                nursery.start_soon(look_for_leader, nursery.cancel_scope, leader)
            with trio.move_on_after(delay):
                await self._coordinator.wait_change(seen)
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

    async def _greet(self, leader: LeaderRecord) -> Greeting | None:
        """Connect to a leader and hear it speak; None (and a pause before the next try) when it does not."""
        with trio.move_on_after(self.config.heartbeat_timeout):
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
            version = view.slots[me.name][1]
            outcome = await self._settled(
                election.give_up(view, me), lambda seen: election.has_given_up(seen, me, version)
            )
            if outcome is not Outcome.REFUSED:
                self._first = False
            if outcome is not Outcome.DONE:  # seeing an empty slot is no leave: an election may have emptied it
                return
            follower = Follower(
                self.config, self.name, self._copies, store, self._ring, run_blocking=self._run_blocking, rng=self._rng
            )
            self._following = follower
            failure: Exception | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_leader, leader)
                try:
                    await follower.follow(greeting, leader.epoch, lambda: self._become(FOLLOWER, leader.epoch, leader))
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
        finally:
            self._become(NONE)
            await trio.aclose_forcefully(greeting.stream)

    async def _watch_leader(self, followed: LeaderRecord) -> None:
        """The leader that is followed shows its addresses for clients once it has them: for those who ask here."""
        while True:
            seen = self._coordinator.changes
            try:
                view, seen = await self._look()
                shown = view.leader
                if shown is not None and shown.attempt == followed.attempt and self.leader is not None:
                    self.leader = shown
            except (CoordinatorLost, ConfigurationError):
                pass
            await self._coordinator.wait_change(seen)

    # ---- leading

    async def _lead(self, record: LeaderRecord, roster: Mapping[str, str]) -> None:
        store = self._store
        assert store is not None
        leader = Leader(
            self.config,
            self.name,
            record.epoch,
            store,
            self._ring,
            counted=roster,
            register=self._register,
            run_blocking=self._run_blocking,
            rng=self._rng,
        )
        term = Term(record.epoch, store, leader)
        reason = "the replica has stopped"
        failure: Exception | None = None
        self._leading = leader
        self._proposing = False
        self._become(LEADER, record.epoch, record)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(leader.run)
                nursery.start_soon(self._watch_leadership, record)
                await self._run_blocking(store.reload)  # a follower writes past what `open` has read
                first = store.position[1] + 1
                await term.commit(Batch([store.history_change(record.epoch, first)], (record.epoch, first)))
                await self._run_blocking(store.reload)
                self._term = term
                self._notify()
                await term.wait_released()
                reason = "handed over"
                await self._resign(record, leader)
                nursery.cancel_scope.cancel()
        except* LeadershipLost as lost:
            reason = str(_first(lost))
        except* (StoreError, OSError) as failed:
            reason = str(_first(failed))
            failure = failed
        finally:
            self._leading = None
            term.end(reason)
            if self._term is term:
                with trio.CancelScope(shield=True):  # the user releases it as soon as `lost` is set, whatever happens
                    await term.wait_released()
                self._term = None
            log.info("replica %s leads no more (epoch %d): %s", self.name, record.epoch, reason)
            self._become(NONE)
        if failure is not None or term.doubtful:
            raise StoreError(reason) from failure
        await self._run_blocking(store.reload)

    async def _watch_leadership(self, record: LeaderRecord) -> None:
        """See whether another epoch has begun; show the leader again when its node is gone. ZooKeeper may be away."""
        while True:
            seen = self._coordinator.changes
            self._addresses = trio.Event()
            try:
                view, seen = await self._look()
                if view.epoch > record.epoch:
                    raise LeadershipLost(f"epoch {view.epoch} has begun", view.epoch)
                shown = LeaderRecord(record.epoch, record.name, record.attempt, self.address, self.clients())
                self.leader = shown
                if view.epoch == record.epoch and not election.is_shown(view, shown, self._coordinator.session):
                    await self._coordinator.transact(election.show_again(view, shown))
                    continue
            except CoordinatorLost:
                pass
            except ConfigurationError as error:
                log.error("replica %s goes on leading, though: %s", self.name, error)
            await self._wait_change_or(self._addresses, seen)

    async def _wait_change_or(self, event: trio.Event, seen: int) -> None:
        """Wait for something new in ZooKeeper, or for an event."""
        async with trio.open_nursery() as nursery:

            async def wait_event() -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_event)
            await self._coordinator.wait_change(seen)
            nursery.cancel_scope.cancel()

    async def _register(self, name: str, incarnation: str) -> bool:
        """Put a learner on the roster: asked by the leader when the copy is durable up to its position."""
        while True:
            try:
                view, _ = await self._look()
                if view.roster.get(name) == incarnation:
                    return view.epoch == self.epoch
                writes = election.register(view, self.epoch, self.config.replicas, name, incarnation)
                if writes is None:
                    return False
                if await self._coordinator.transact(writes) is Outcome.DONE:
                    return True
            except CoordinatorLost:
                return False

    async def _resign(self, record: LeaderRecord, leader: Leader) -> None:
        """Rule 12: let the best follower catch up, then take the leader's node away and stand back for a while."""
        with trio.move_on_after(self.config.handover_timeout):
            await leader.wait_caught_up()
        self._resigned_until = trio.current_time() + self.config.handover_timeout
        with trio.move_on_after(self.config.handover_timeout):
            try:
                view, _ = await self._look()
                writes = election.resign(view, record)
                if writes:
                    await self._coordinator.transact(writes)
            except CoordinatorLost:
                pass


def _first(error: BaseException) -> BaseException:
    """The first of grouped errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


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
