"""The leader's side of replication: makes batches durable on a quorum, takes followers on, holds the lease.

DESIGN.md section 5, rules 5 to 10. Owns the leader's ring, its book of who holds what (`tracking`) and one `Link` per follower.
It never decides who leads: it ends with `LeadershipLost`, and whoever runs it asks ZooKeeper. In the quorum modes a batch is
written to this leader's own store only when Q-1 counted followers hold it: its disk never holds what no quorum has.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import trio

from pybroker.cluster.catchup import RunBlocking
from pybroker.cluster.frame_stream import FrameStream, LinkBroken
from pybroker.cluster.frames import (
    BATCHES,
    CONTROL_BYTES_MAX,
    DIFFERENCE,
    FOLLOWING,
    LEADING,
    MEMBERS_MAX,
    NONCE_BYTES,
    PROTOCOL,
    Challenge,
    Hello,
    Member,
    Refusal,
    Welcome,
    encode,
    encode_changes,
)
from pybroker.cluster.handshake import Conversation, follower_proof, leader_proof, proof_fault
from pybroker.cluster.lease_clock import LeaseClock, seconds_asleep
from pybroker.cluster.link import FAREWELL, Link, LinkContext
from pybroker.cluster.places import Places
from pybroker.cluster.registry import Position
from pybroker.cluster.repair import Answer, read_values
from pybroker.cluster.ring import Ring, RingBatch
from pybroker.cluster.scrub import Scrubber
from pybroker.cluster.statistics import FollowerStatistics, LeaderStatistics
from pybroker.cluster.tracking import Copy, Tracking
from pybroker.config import ReplicaSetConfig
from pybroker.errors import BrokerError, ProtocolError, StoreError
from pybroker.store.committer import Batch
from pybroker.store.store import Store

log = logging.getLogger("pybroker.cluster")

HANDSHAKE = 5.0  # seconds from accepting a connection to its Hello
HANDSHAKES_MAX = 64  # connections that have not proved anything yet
CLOSING = 2.0  # seconds for a link that was replaced to end
OWN_BYTES_MAX = 64 * 1024 * 1024  # of values that are whole by now in the leader's own store
SYNC_INTERVAL = 1.0  # seconds until the leader's disk is asked to, in the modes that do not wait for it


class LeadershipLost(BrokerError):
    """This replica does not lead any more. `epoch` is the higher one that it heard of, or 0."""

    code = "leadership-lost"

    def __init__(self, reason: str, epoch: int = 0) -> None:
        super().__init__(reason)
        self.epoch = epoch


class Leader:
    """One term of leading: from an election won to `LeadershipLost`. Implements `Committer`.

    ring          the recent batches of this replica's life as a follower; it is aligned to the store
    counted       name to incarnation: the roster as the election left it
    register      puts a copy on the roster in ZooKeeper; True only when it certainly is there
    run_blocking  runs a blocking call elsewhere, one at a time; `run_reading` the same for long reads
    rng           for nonces
    scrubber      this replica's walks in search of bad values; None = one that begins with this leader
    asleep        for how many seconds the machine has been suspended
    """

    def __init__(
        self,
        config: ReplicaSetConfig,
        name: str,
        epoch: int,
        store: Store,
        ring: Ring,
        *,
        counted: Mapping[str, str],
        register: Callable[[str, str], Awaitable[bool]],
        run_blocking: RunBlocking,
        rng: random.Random,
        run_reading: RunBlocking | None = None,
        scrubber: Scrubber | None = None,
        outbox_bytes_max: int | None = None,
        asleep: Callable[[], float] = seconds_asleep,
    ) -> None:
        self.config = config
        self.name = name
        self.epoch = epoch
        self.ring = ring
        position = Position(*store.position)
        ring.align(position)
        self._store = store
        self._run_blocking = run_blocking
        self._rng = rng
        self._clock = LeaseClock(asleep)
        self._had_lease = False  # from then on a lease that is over stays over
        self._synced = config.sync in ("quorum_disk", "local_disk")
        self._unsynced = False
        self._secret = config.secret.encode() or None
        self._run_reading = run_reading if run_reading is not None else run_blocking
        self._scrubber = scrubber or Scrubber(config, self._run_reading, run_blocking)
        self._started_after = position.lsn  # batches above are of this epoch
        copies = [Copy(*pair) for pair in counted.items()]
        self._tracking = Tracking(epoch, config.replicas // 2 + 1, name, copies, position.lsn)
        self._links: dict[str, Link] = {}
        self.places = Places(
            config,
            name,
            counted,
            self._tracking,
            register=register,
            cut=self._cut_link,
            counting=self._answered,
        )
        self._handshakes = 0
        self._refused = 0
        self._cut = 0
        self._lost: LeadershipLost | None = None
        self._ended = trio.Event()
        self._changed = trio.Event()
        self._awaited: int | None = None  # the batch that `commit` waits for
        self._reached = trio.Event()
        self._context = LinkContext(
            epoch=epoch,
            store=store,
            ring=ring,
            tracking=self._tracking,
            run_reading=self._run_reading,
            silence=config.lease,
            outbox_bytes_max=outbox_bytes_max if outbox_bytes_max is not None else config.ring_bytes_max,
            answered=self._answered,
            deposed=self._depose,
            mend=lambda bad, lsn: self._scrubber.mend(store, bad, lsn, self.ask_followers),
            members=self.members,
        )

    # ---- committing

    @property
    def position(self) -> Position:
        """That of the last batch, which may be under way."""
        return self.ring.last

    async def commit(self, batch: Batch) -> None:
        """Make one batch as safe as the sync mode asks. One at a time.

        Raises LeadershipLost, StoreError, or ProtocolError for a batch too large to be sent. Nobody knows then whether it is
        stored.
        """
        self._check_leading()
        previous = self.ring.last
        position = Position(*batch.position)
        if position != (self.epoch, previous.lsn + 1) or self._awaited is not None:
            raise ValueError(f"batch {position} can't follow {previous} in epoch {self.epoch}")
        entry = RingBatch(position, previous, encode_changes(batch.changes))
        entry.frame(self.epoch)
        self.ring.append(entry, keep_after=self._store.position[1])
        self._tracking.append(position.lsn)
        for link in self._links.values():
            link.batch_added(entry.size)
        if self.config.sync in ("quorum_disk", "quorum_mem"):
            await self.wait_reach(position.lsn)
        await self._write(batch)

    async def wait_reach(self, lsn: int) -> None:
        """Wait until a quorum holds that batch, in any mode. Raises LeadershipLost. (Not beside a `commit`.)"""
        if self._tracking.reach() < lsn:
            self._awaited = lsn
            self._reached = trio.Event()
            try:
                await self._reached.wait()
            finally:
                self._awaited = None
        self._check_leading()

    async def _write(self, batch: Batch) -> None:
        store = self._store
        prepared = store.prepare(batch.changes, batch.position)  # on the event loop: cheap calls into C
        self._unsynced = not self._synced
        try:
            await self._run_blocking(partial(store.write, prepared, self._synced))
        except BaseException:
            # Also when it was cancelled: nobody knows now whether the next batch would follow this one on the disk.
            self._lose(LeadershipLost("a write to the leader's own store did not end well"))
            raise

    async def sync(self) -> None:
        """Ask the disk for what was written without waiting for it. Raises StoreError, which ends the leadership."""
        if not self._unsynced:
            return
        self._unsynced = False
        backend = self._store.backend
        try:
            await self._run_blocking(lambda: backend.write(backend.new_batch([]), True))
        except BaseException:
            self._unsynced = True
            self._lose(LeadershipLost("the disk of the leader's own store could not be asked for what was written"))
            raise

    async def _sync_regularly(self) -> None:
        while True:
            await trio.sleep(SYNC_INTERVAL)
            try:
                await self.sync()
            except StoreError as error:
                log.error("the leader's own store: %s", error)
                return

    def _check_leading(self) -> None:
        if self._lost is not None:
            raise LeadershipLost(str(self._lost), self._lost.epoch)

    # ---- leading

    @property
    def lease_valid(self) -> bool:
        """Whether this replica may show what it has: nobody else can have been elected, as far as it can know.

        To find the lease over is to end the leadership, for good: what comes late must not make it valid again.
        """
        if self._lost is not None:
            return False
        if self._clock.now() < self._tracking.lease_until(self.config.lease):
            self._had_lease = True
            return True
        if self._had_lease:
            self.step_down(f"no quorum has answered a heartbeat of the last {self.config.lease:g} s")
        return False

    async def wait_lease(self) -> None:
        """Wait until a quorum has answered for the first time. Raises LeadershipLost."""
        while not self.lease_valid:
            self._check_leading()
            await self._changed.wait()

    def step_down(self, reason: str) -> None:
        """End the leadership for good: nothing is confirmed any more, every link is cut, `run` raises LeadershipLost."""
        self._lose(LeadershipLost(reason))

    async def run(self) -> None:
        """Send heartbeats and put learners on the roster until this replica does not lead any more. Raises LeadershipLost."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.places.run)
            if not self._synced:
                nursery.start_soon(self._sync_regularly)
            nursery.start_soon(self._scrubber.run, lambda: self._store, self.ask_followers)
            try:
                await self._beat_until_lost()
            finally:
                self._lose(LeadershipLost("the leader was stopped"))
                nursery.cancel_scope.cancel()
        self._check_leading()

    async def _beat_until_lost(self) -> None:
        config = self.config
        patience = 2 * config.lease
        started = self._clock.now()
        while self._lost is None:
            now = self._clock.now()
            if self._links and not self._had_lease:
                started = now  # somebody is here: perhaps a learner, who counts when it has been brought up
            if not self.lease_valid and now >= started + patience:
                self.step_down(f"no quorum has answered for {now - started:.1f} s")
            if self._lost is not None:
                return
            number = self._tracking.beat(now)
            for link in self._links.values():
                link.beat(number)
            with trio.move_on_after(config.heartbeat_interval):
                await self._ended.wait()

    def _lose(self, lost: LeadershipLost) -> None:
        if self._lost is None:
            self._lost = lost
        self._ended.set()
        self._reached.set()
        self._notify()
        for link in self._links.values():
            link.cut(f"this leader has ended: {self._lost}")

    def _depose(self, reason: str, epoch: int) -> None:
        self._lose(LeadershipLost(reason, epoch))

    def _answered(self) -> None:
        """Some follower said something: look at who waits for it."""
        tracking = self._tracking
        if self._awaited is not None and tracking.reach() >= self._awaited:
            self._reached.set()
        self.places.look()
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- the roster

    def stop_counting(self, name: str) -> None:
        """Before an operator's change takes a name off the roster in ZooKeeper: see `Places.bar`."""
        self.places.bar(name)
        self._notify()

    def set_roster(self, roster: Mapping[str, str]) -> None:
        """The roster has been changed in ZooKeeper. One that this leader is not on any more ends its leadership."""
        if self.name not in roster:
            self.step_down(f"the name {self.name} was taken off the roster")
        else:
            self.places.set(roster)

    def _cut_link(self, name: str, reason: str) -> None:
        link = self._links.get(name)
        if link is not None:
            link.cut(reason)

    # ---- bad values

    async def fetch(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Whole values of keys that were found bad in this leader's store: its own ones if they are whole by now, or followers'.

        Each is at least as new as this store is now. Keys that nobody has whole are missing. Takes no longer than
        `heartbeat_timeout`.
        """
        lsn = self._store.position[1]
        _, pairs = await self._run_reading(partial(read_values, self._store, keys, OWN_BYTES_MAX))
        found = {key: value for key, value in pairs if value is not None}
        answers = await self.ask_followers([key for key in keys if key not in found], lsn)
        return found | {key: answer.value for key, answer in answers.items() if answer.value is not None}

    async def ask_followers(self, keys: Sequence[bytes], lsn: int) -> dict[bytes, Answer]:
        """What followers that hold everything up to batch `lsn` have under these keys; a value goes before no value."""
        answers: dict[bytes, Answer] = {}
        asked: set[Link] = set()
        with trio.move_on_after(self.config.heartbeat_timeout):
            while wanted := [key for key in keys if key not in answers or answers[key].value is None]:
                links = [link for link in self._links.values() if link.state == FOLLOWING and link not in asked]
                if not links:
                    break
                link = max(links, key=lambda link: link.position.lsn)
                if link.position.lsn < lsn:
                    await self._changed.wait()  # none has answered for that batch yet
                    continue
                asked.add(link)
                try:
                    got = await link.exchange.fetch(wanted)
                except LinkBroken:
                    continue
                answers |= {key: answer for key, answer in got.items() if answer.known_at >= lsn}
        return answers

    # ---- waiting

    def _following(self) -> list[Link]:
        return [
            link for link in self._links.values() if link.state == FOLLOWING and self._tracking.is_counted(link.copy)
        ]

    def others_hold(self) -> bool:
        """Whether a quorum of counted copies beside this one is attached, and takes batches."""
        return len(self._following()) > self.config.replicas // 2

    async def wait_followers(self, count: int) -> None:
        """Wait until so many counted followers are attached and take batches. Raises LeadershipLost."""
        while True:
            self._check_leading()
            if len(self._following()) >= count:
                return
            await self._changed.wait()

    async def wait_caught_up(self) -> str:
        """Wait until some counted follower that is attached holds every batch durably; its name. Raises LeadershipLost."""
        while True:
            self._check_leading()
            for link in self._following():
                if self._tracking.durable(link.copy.name) >= self.ring.last.lsn:
                    return link.copy.name
            await self._changed.wait()

    def statistics(self) -> LeaderStatistics:
        """What this leader knows now."""
        last = self.ring.last
        left = self._tracking.lease_until(self.config.lease) - self._clock.now()
        followers = [
            FollowerStatistics(
                name=name,
                incarnation=link.copy.incarnation,
                state=link.state,
                counted=self._tracking.is_counted(link.copy),
                position=link.position,
                lag=max(0, last.lsn - link.position.lsn),
                unsent_bytes=link.unsent_bytes,
                chunks_compared=link.chunks_compared,
                moved_bytes=link.moved_bytes,
            )
            for name, link in sorted(self._links.items())
        ]
        return LeaderStatistics(
            epoch=self.epoch,
            position=last,
            durable=Position(*self._store.position),
            reach=self._tracking.reach(),
            lease_valid=self.lease_valid,
            lease_left=max(0.0, left),
            ring_batches=len(self.ring),
            ring_bytes=self.ring.bytes,
            refused=self._refused,
            cut=self._cut,
            scrub=self._scrubber.statistics(),
            followers=tuple(followers),
        )

    def members(self) -> tuple[Member, ...]:
        """This leader and the copies that are attached to it, as it shows them to all."""
        own = Member(self.name, self.places.incarnation(self.name), True, LEADING, Position(*self._store.position))
        others = [
            Member(*link.copy, self._tracking.is_counted(link.copy), link.state, link.position)
            for _, link in sorted(self._links.items())
        ]
        return (own, *others)[:MEMBERS_MAX]

    # ---- followers

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Take one incoming connection to its end, and close it. Raises nothing: one connection must not end the others."""
        try:
            if self._handshakes >= HANDSHAKES_MAX or self._lost is not None:
                return
            self._handshakes += 1
            frames = FrameStream(stream)
            try:
                link = await self._shake_hands(frames)
            finally:
                self._handshakes -= 1
            if link is not None:
                await self._run_link(link)
        except Exception:
            log.exception("a replication connection met a fault of the program")
        finally:
            with trio.move_on_after(FAREWELL, shield=True):
                await trio.aclose_forcefully(stream)

    async def _shake_hands(self, frames: FrameStream) -> Link | None:
        """The new follower's link, its Welcome sent; None when it was refused, told why."""
        deadline = HANDSHAKE
        nonce = self._rng.randbytes(NONCE_BYTES)
        with trio.move_on_after(deadline):
            try:
                await frames.send_frame(Challenge(nonce, self.name, self.epoch))
                hello = await frames.receive_one(deadline)
                if not isinstance(hello, Hello):
                    raise ProtocolError(f"the first frame is {type(hello).__name__}, not Hello")
                conversation = Conversation(
                    self.config.name, self.name, hello.name, hello.incarnation, hello.epoch, nonce, hello.nonce
                )
                refusal = self._fault(hello, conversation)
                if refusal is None:
                    return await self._welcome(frames, hello, conversation)
            except LinkBroken as error:
                log.info("a replication connection ended before its hand-shake did: %s", error)
                return None
            except ProtocolError as error:
                refusal = Refusal("protocol", str(error)[:500])
            self._refused += 1
            log.warning("a replication connection was refused (%s): %s", refusal.code, refusal.text)
            await frames.farewell(refusal, FAREWELL)
        return None

    def _fault(self, hello: Hello, conversation: Conversation) -> Refusal | None:
        """Why that follower can't be taken on. Nothing that it says is believed before its proof is right."""
        if hello.protocol != PROTOCOL:
            return Refusal("protocol-version", f"protocol version {hello.protocol}; this leader speaks {PROTOCOL}")
        if hello.set_name != self.config.name:
            return Refusal("other-set", f"this is set {self.config.name}, not {hello.set_name}")
        fault = proof_fault(self._secret, hello.proof, follower_proof(self._secret, conversation, hello.position))
        if fault is not None:
            return Refusal("secret", fault)
        if hello.epoch > self.epoch:
            self._depose(f"{hello.name} follows epoch {hello.epoch}", hello.epoch)
        if hello.epoch != self.epoch or self._lost is not None:
            return Refusal("other-epoch", f"this leader's epoch is {self.epoch}, not {hello.epoch}", self.epoch)
        if hello.name == self.name:
            return Refusal("own-name", f"{hello.name} is this leader's own name")
        return self.places.fault(hello.name, self._links)

    async def _welcome(self, frames: FrameStream, hello: Hello, conversation: Conversation) -> Link | None:
        copy = Copy(hello.name, hello.incarnation)
        while hello.name in self._links:  # another connection of the name may come first while the old one ends
            await self._end_link(hello.name)
        if self._lost is not None:
            return None
        by_batches = self._is_mine(hello.position) and self.ring.holds_after(hello.position.lsn)
        durable = hello.position.lsn if self._is_mine(hello.position) else 0
        attachment = self._tracking.attach(copy, durable)
        cursor = hello.position.lsn if by_batches else None
        link = Link(self._context, frames, copy, attachment, hello.position, cursor)
        self._links[hello.name] = link
        try:
            frames.reader.bytes_max = CONTROL_BYTES_MAX
            position, how = self.ring.last, BATCHES if by_batches else DIFFERENCE
            proof = leader_proof(self._secret, conversation, position, how)
            await frames.send(encode(Welcome(self.epoch, position, proof, how)))
        except BaseException:
            link.closed.set()
            self._forget(link)
            raise
        log.info("replica %s (copy %s) attached at %s, %s", *copy, tuple(hello.position), how)
        return link

    def _is_mine(self, position: Position) -> bool:
        """Whether the leader's own history went through that position.

        A store of epoch 0 was in no set before, one at lsn 0 may be a salvaged one: their positions don't say what they hold.
        """
        if position.epoch == 0 or position.lsn == 0 or position.lsn > self.ring.last.lsn:
            return False
        if position.lsn > self._started_after:
            return position.epoch == self.epoch
        return self._store.epoch_at(position.lsn) == position.epoch

    async def _end_link(self, name: str) -> None:
        """The name has a new connection: end the old one first."""
        old = self._links.get(name)
        if old is not None:
            old.cut("replaced by a newer connection")
            self._forget(old)
            with trio.move_on_after(CLOSING):
                await old.closed.wait()

    async def _run_link(self, link: Link) -> None:
        try:
            number = self._tracking.beat(self._clock.now())
            link.beat(number)
            self._answered()
            await link.run()
        finally:
            self._forget(link)
            self._notify()
        self._cut += 1
        log.info("replica %s (copy %s) detached: %s", *link.copy, link.ended)

    def _forget(self, link: Link) -> None:
        self._tracking.detach(link.attachment)
        if self._links.get(link.copy.name) is link:
            del self._links[link.copy.name]
