"""The follower's side of replication: keeps this replica's store the same as the leader's.

DESIGN.md section 5, rules 2, 7 and 9. Owns the replica's store while it follows, its ring, and its one connection to the leader. It
takes frames of exactly the epoch that it was told to follow; a batch that does not fit its position is refused, never
applied. It never says that it holds what is not on its disk (in the modes that say so), nor anything of a side copy before
that has become the current one. It decides nothing: whoever runs it says whom to follow, and asks it for its final position.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from pybroker.cluster.catchup import RunBlocking, SideCopy
from pybroker.cluster.frame_stream import FrameStream, LinkBroken
from pybroker.cluster.frames import (
    DIFFERENCE,
    FRAME_BYTES_MAX,
    NONCE_BYTES,
    PROTOCOL,
    Answer,
    BatchFrame,
    Challenge,
    Chunk,
    Digests,
    Fetch,
    Frame,
    Heartbeat,
    HeartbeatAnswer,
    Hello,
    Member,
    Refusal,
    SnapshotBegin,
    SnapshotEnd,
    Values,
    Welcome,
    decode_changes,
    encode,
)
from pybroker.cluster.handshake import Conversation, follower_proof, leader_proof, proof_fault
from pybroker.cluster.link import FAREWELL
from pybroker.cluster.network import Network
from pybroker.cluster.registry import Position
from pybroker.cluster.repair import Answer as Found
from pybroker.cluster.repair import Exchange
from pybroker.cluster.ring import Ring, RingBatch
from pybroker.cluster.scrub import Scrubber, ScrubStatistics
from pybroker.config import ReplicaSetConfig
from pybroker.errors import BrokerError, CorruptRecord, ProtocolError, StoreDamaged, StoreError
from pybroker.store import format as fmt
from pybroker.store.backend import Change
from pybroker.store.copies import Copies
from pybroker.store.store import Store

log = logging.getLogger("pybroker.cluster")

T = TypeVar("T")

HANDSHAKE = 5.0  # seconds for the leader's Welcome
SETTLING = 30.0  # seconds that giving up a side copy may take when this replica is told to stop following
PENDING_BYTES_MAX = 32 * 1024 * 1024  # that wait for the disk before the connection is not read any more
WRITE_BYTES_MAX = 4 * 1024 * 1024  # batches that have arrived are written together up to this size
SYNC_INTERVAL = 1.0  # seconds until the disk is asked to, in the modes that answer before it has what they answer for


class FollowingEnded(BrokerError):
    """The connection to the leader is over: broken, silent, refused, or a frame did not fit.

    `reason` is a stable word (the leader's own, where it refused); `epoch` the one that the leader named with a refusal, or 0.
    """

    code = "following-ended"

    def __init__(self, text: str, reason: str = "link-broken", epoch: int = 0) -> None:
        super().__init__(text)
        self.reason = reason
        self.epoch = epoch


@dataclass(frozen=True, slots=True)
class Greeting:
    """A connection on which a leader has spoken, and has been told nothing yet."""

    stream: trio.abc.Stream
    frames: FrameStream
    challenge: Challenge


@dataclass(frozen=True, slots=True)
class FollowingStatistics:
    """`commit` is the leader's word on what a quorum holds; `heard_at` the clock's time of its last word, or None.

    `members` is the leader's own table, as it said it last.
    """

    position: Position
    commit: int
    catching_up: bool
    heard_at: float | None
    batches: int
    writes: int
    swaps: int
    scrub: ScrubStatistics
    members: tuple[Member, ...]


class Follower:
    """What a replica is while it follows. After `follow` the owner goes on with `store`, unless that raised StoreError.

    copies        of the replica; `store` is the current one, that they have opened
    ring          recent batches, for a later life as a leader; it is aligned to the store
    run_blocking  runs a blocking call elsewhere, one at a time; `run_reading` the same for long reads
    rng           for nonces
    scrubber      this replica's walks in search of bad values; None = one that begins with this follower

    A store that is suspect (see `Store`) says that it is nowhere, so that it is compared with the leader's; one that can't be
    read even for that is filled from nothing, in a side copy too: what there is stands until there is something better.
    """

    def __init__(
        self,
        config: ReplicaSetConfig,
        name: str,
        copies: Copies,
        store: Store,
        ring: Ring,
        *,
        run_blocking: RunBlocking,
        rng: random.Random,
        run_reading: RunBlocking | None = None,
        scrubber: Scrubber | None = None,
    ) -> None:
        self.config = config
        self.name = name
        self.store: Store | None = store
        self.position = Position(*store.position)  # of the current copy
        self.ring = ring
        ring.align(self.position)
        self.synced = config.sync in ("quorum_disk", "local_disk")  # whether an answer waits for the disk
        self.secret = config.secret.encode() or None
        self.copies = copies
        self._run_blocking = run_blocking
        self.run_reading = run_reading if run_reading is not None else run_blocking
        self.scrubber = scrubber or Scrubber(config, self.run_reading, run_blocking)
        self._suspect = (store.suspect, store.unreadable)  # of the current copy, also while it is not open
        self._rng = rng
        self._unsynced = False
        self._following: _Following | None = None
        self.batches = 0
        self.writes = 0
        self.swaps = 0

    @staticmethod
    async def greet(network: Network, address: str) -> Greeting:
        """Connect to a leader and hear it speak. Raises OSError and FollowingEnded; the caller sets the deadline."""
        stream = await network.dial(address)
        try:
            frames = FrameStream(stream)
            challenge = await frames.receive_one(HANDSHAKE)
            if isinstance(challenge, Refusal):
                raise _refused(challenge)
            if not isinstance(challenge, Challenge):
                raise ProtocolError(f"the leader's first frame is {type(challenge).__name__}, not Challenge")
        except BaseException as error:
            await trio.aclose_forcefully(stream)
            if isinstance(error, LinkBroken | ProtocolError):
                raise FollowingEnded(str(error), error.code) from error
            raise
        return Greeting(stream, frames, challenge)

    async def follow(self, greeting: Greeting, epoch: int, welcomed: Callable[[], None]) -> None:
        """Follow the leader of `epoch` until that can't go on, and close the stream. Always raises.

        `welcomed` is called when the leader has taken this replica on. Raises FollowingEnded; StoreError when this
        replica's own store fails, which must then be opened again. After anything else, cancellation too, `store` is open and
        its position is durable and final: nothing of what this leader has said will come after.
        """
        following = _Following(self, greeting, epoch, welcomed)
        self._following = following
        try:
            await following.run()
        except (LinkBroken, ProtocolError) as error:
            raise FollowingEnded(str(error), error.code) from error
        finally:
            self._following = None
            with trio.move_on_after(SETTLING, shield=True):
                await trio.aclose_forcefully(greeting.stream)
                await self._settle()
            if self.store is None:
                raise StoreError("the store could not be opened again after catching up was broken off")

    async def _settle(self) -> None:
        """Give up a side copy, and make durable what was written."""
        if self.store is None:
            self.store = await self._run_blocking(self.copies.abandon_side)
            if self._suspect[0]:
                self.store.distrust(*self._suspect)
        await self.sync()
        self._take_store(self.store)

    def statistics(self) -> FollowingStatistics:
        """What this follower knows now."""
        following = self._following
        return FollowingStatistics(
            position=self.position,
            commit=following.commit if following is not None else 0,
            catching_up=following is not None and following.catching_up,
            heard_at=following.heard_at if following is not None else None,
            batches=self.batches,
            writes=self.writes,
            swaps=self.swaps,
            scrub=self.scrubber.statistics(),
            members=following.members if following is not None else (),
        )

    # ---- the store

    def _take_store(self, store: Store) -> None:
        self.store = store
        self.position = Position(*store.position)
        self.ring.align(self.position)

    async def write(self, batches: list[tuple[BatchFrame, list[Change]]]) -> None:
        """Write batches that follow the store's position, in one write: all of them become durable together, in order."""
        store = self.store
        if store is None:
            raise StoreError("the store is not open")
        changes = batches[0][1] if len(batches) == 1 else [change for _, some in batches for change in some]
        position = batches[-1][0].position
        try:
            await self._run_blocking(partial(store.apply, changes, position, self.synced))
        except CorruptRecord as error:
            raise ProtocolError(f"batch {position} has a record that is not whole: {error}") from error
        finally:
            # Also when it was cancelled: a write that was under way has ended by now.
            self.position = Position(*store.position)
        self._unsynced = not self.synced
        for frame, _ in batches:
            self.ring.append(RingBatch(frame.position, frame.previous, frame.changes), keep_after=position.lsn)
        self.batches += len(batches)
        self.writes += 1

    async def sync(self) -> None:
        """Ask the disk for what was written without waiting for it."""
        store = self.store
        if self._unsynced and store is not None:
            self._unsynced = False
            try:
                await self._run_blocking(partial(store.apply, [], store.position, True))
            except BaseException:
                self._unsynced = True
                raise

    async def begin_side(self) -> SideCopy:
        store = self.store
        if store is None:
            raise StoreError("the store is not open")
        self.store = None  # it is closed now, whatever comes of it
        self._suspect = (store.suspect, store.unreadable)
        side = SideCopy(await self._run_blocking(partial(self.copies.begin_side, store, store.unreadable)))
        self._unsynced = False  # opening the copy again reads what is there, and syncs
        return side

    async def run_on_side(self, call: Callable[[], T]) -> T:
        """Something that blocks, on the side copy. A record that can't be taken is the leader's fault."""
        try:
            result: T = await self._run_blocking(call)
        except CorruptRecord as error:
            raise ProtocolError(f"the leader sent a record that is not whole: {error}") from error
        except StoreDamaged as error:
            self._suspect = (str(error), True)
            raise LinkBroken(f"what was copied can't be read, and is left out the next time: {error}") from error
        return result

    async def swap(self, side: SideCopy) -> None:
        self._take_store(await self._run_blocking(partial(self.copies.swap, side.store)))
        self.swaps += 1

    def nonce(self) -> bytes:
        return self._rng.randbytes(NONCE_BYTES)


class _Following:
    """One connection to one leader: a task reads and answers heartbeats, another writes to the disk and answers."""

    def __init__(self, follower: Follower, greeting: Greeting, epoch: int, welcomed: Callable[[], None]) -> None:
        self.commit = 0
        self.members: tuple[Member, ...] = ()
        self.heard_at: float | None = None
        self.catching_up = False
        self._follower = follower
        self._config = follower.config
        self._frames = greeting.frames
        self._challenge = greeting.challenge
        self._epoch = epoch
        self._welcomed = welcomed
        self._scope = trio.CancelScope()
        self._failure: Exception | None = None
        self._pending: deque[Frame] = deque()
        self._pending_bytes = 0
        self._work = trio.Event()
        self._room = trio.Event()
        self._side: SideCopy | None = None
        self._sync_at: float | None = None
        self._exchange = Exchange(epoch, greeting.frames, self._whole_store, follower.run_reading)

    async def run(self) -> None:
        await self._shake_hands()
        self._frames.reader.bytes_max = FRAME_BYTES_MAX
        self._welcomed()
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._guard, self._write)
                nursery.start_soon(self._guard, self._exchange.run)
                nursery.start_soon(self._guard, self._scrub)
                await self._guard(self._receive)
        if self._failure is not None:
            raise self._failure
        raise LinkBroken("the link was ended here")

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except ProtocolError as error:
            if self._failure is None:
                self._failure = error
                await self._frames.farewell(Refusal("does-not-fit", str(error)[:500], self._epoch), FAREWELL)
        except BrokerError as error:
            if self._failure is None:
                self._failure = error
        self._scope.cancel()

    # ---- hand-shake

    async def _shake_hands(self) -> None:
        follower = self._follower
        name, incarnation = follower.name, follower.copies.identity.incarnation
        challenge = self._challenge
        with trio.move_on_after(HANDSHAKE):
            if challenge.epoch != self._epoch:
                raise ProtocolError(f"the leader's epoch is {challenge.epoch}, this replica follows {self._epoch}")
            nonce = follower.nonce()
            conversation = Conversation(
                self._config.name, challenge.name, name, incarnation, self._epoch, challenge.nonce, nonce
            )
            store = follower.store
            position = Position(0, 0) if store is not None and store.suspect else follower.position
            proof = follower_proof(follower.secret, conversation, position)
            await self._frames.send_frame(
                Hello(PROTOCOL, self._config.name, name, incarnation, position, self._epoch, nonce, proof)
            )
            welcome = await self._frames.receive_one(HANDSHAKE)
            if isinstance(welcome, Refusal):
                raise _refused(welcome)
            if not isinstance(welcome, Welcome) or welcome.epoch != self._epoch:
                raise ProtocolError("the leader's answer is no Welcome to the epoch that this replica follows")
            expected = leader_proof(follower.secret, conversation, welcome.position, welcome.how)
            fault = proof_fault(follower.secret, welcome.proof, expected)
            if fault is not None:
                raise ProtocolError(f"the leader's proof: {fault}")
            self.catching_up = welcome.how == DIFFERENCE
            self.heard_at = trio.current_time()
            return
        raise LinkBroken(f"no Welcome within {HANDSHAKE:g} s")

    # ---- reading

    async def _receive(self) -> None:
        silence = self._config.heartbeat_timeout
        while True:
            for frame in await self._frames.receive(silence):
                await self._take(frame)
            self.heard_at = trio.current_time()
            while self._pending_bytes > PENDING_BYTES_MAX:
                self._room = trio.Event()
                await self._room.wait()

    async def _take(self, frame: Frame) -> None:
        if isinstance(frame, Refusal):
            raise _refused(frame)
        if isinstance(frame, Challenge | Hello | Welcome):
            raise ProtocolError(f"{type(frame).__name__} after the hand-shake")
        if frame.epoch != self._epoch:
            raise ProtocolError(f"a frame of epoch {frame.epoch}: this replica follows epoch {self._epoch}")
        if isinstance(frame, Heartbeat):
            self.commit = frame.commit
            self.members = frame.members
            with trio.move_on_after(self._config.heartbeat_timeout):
                await self._frames.send_frame(HeartbeatAnswer(self._epoch, frame.number, self._follower.position))
                return
            raise LinkBroken("the leader takes no answers")
        if isinstance(frame, Fetch | Values):
            self._exchange.take(frame)
            return
        self._pending.append(frame)
        self._pending_bytes += _size(frame)
        self._work.set()

    # ---- writing

    async def _write(self) -> None:
        while True:
            if not self._pending:
                await self._wait_work()
            elif isinstance(self._pending[0], BatchFrame) and not self.catching_up:
                await self._write_batches()
            else:
                await self._catch_up(self._pop())

    async def _wait_work(self) -> None:
        self._work = trio.Event()
        if self._sync_at is None:
            await self._work.wait()
            return
        with trio.move_on_at(self._sync_at):
            await self._work.wait()
            return
        self._sync_at = None
        await self._follower.sync()

    def _pop(self) -> Frame:
        frame = self._pending.popleft()
        self._pending_bytes -= _size(frame)
        self._room.set()
        return frame

    async def _write_batches(self) -> None:
        """Everything that has arrived, up to a size, in one write; then one answer."""
        batches: list[tuple[BatchFrame, list[Change]]] = []
        size = 0
        last = self._follower.position
        while self._pending and size < WRITE_BYTES_MAX:
            frame = self._pending[0]
            if not isinstance(frame, BatchFrame):
                break
            self._pop()
            batches.append((frame, self._fitting(frame, last)))
            last = frame.position
            size += len(frame.changes)
        await self._follower.write(batches)
        await self._answer()
        if not self._follower.synced:
            now = trio.current_time()
            if self._sync_at is None:
                self._sync_at = now + SYNC_INTERVAL
            elif now >= self._sync_at:
                self._sync_at = None
                await self._follower.sync()

    async def _answer(self) -> None:
        await self._frames.send_frame(Answer(self._epoch, self._follower.position))

    def _fitting(self, frame: BatchFrame, last: Position) -> list[Change]:
        """The changes of a batch that may be applied to a store at `last`."""
        if frame.previous != last:
            raise ProtocolError(f"batch {frame.position} follows {frame.previous}, and this store is at {last}")
        position = frame.position
        if position.lsn != last.lsn + 1 or not last.epoch <= position.epoch <= self._epoch:
            raise ProtocolError(f"batch {position} can't follow {last} in epoch {self._epoch}")
        changes = decode_changes(frame.changes)
        for key, _ in changes:
            if key == fmt.META_KEY or key[0] == fmt.END:
                raise ProtocolError(f"batch {position} changes the key {key.hex()}, which is no replica's to change")
        return changes

    # ---- bad values

    def _whole_store(self) -> Store | None:
        """The store, unless it is about to be another one."""
        return None if self.catching_up else self._follower.store

    async def _scrub(self) -> None:
        async def ask(keys: Sequence[bytes], lsn: int) -> dict[bytes, Found]:
            return await self._exchange.fetch(keys)

        await self._follower.scrubber.run(self._whole_store, ask)
        store = self._whole_store()
        if store is not None:
            raise LinkBroken(f"this copy is going to be compared with the leader's: {store.suspect}")

    # ---- catching up by difference

    async def _catch_up(self, frame: Frame) -> None:
        follower = self._follower
        run = follower.run_on_side
        if not self.catching_up:
            raise ProtocolError(f"{type(frame).__name__} while this replica does not catch up")
        if isinstance(frame, SnapshotBegin):
            if self._side is None:
                log.info("catching up by difference, from %s to %s", tuple(follower.position), tuple(frame.position))
                self._side = await follower.begin_side()
            self._side.begin()
            return
        side = self._side
        if side is None:
            raise ProtocolError(f"{type(frame).__name__} before the beginning of a walk")
        if isinstance(frame, Digests):
            want = await run(partial(side.compare, frame))
            await self._frames.send(encode(want))
        elif isinstance(frame, Chunk):
            await run(partial(side.replace, frame))
        elif isinstance(frame, BatchFrame):
            changes = self._fitting(frame, frame.previous)
            await run(partial(side.apply, frame.previous, frame.position, changes))
        elif isinstance(frame, SnapshotEnd):
            await run(partial(side.finish, frame.position))
            await follower.swap(side)
            self._side = None
            self.catching_up = False
            await self._answer()
        else:
            raise ProtocolError(f"a leader sent {type(frame).__name__}")


def _refused(refusal: Refusal) -> FollowingEnded:
    return FollowingEnded(f"the leader refused ({refusal.code}): {refusal.text}", refusal.code, refusal.epoch)


def _size(frame: Frame) -> int:
    """About how many bytes a frame that waits takes."""
    if isinstance(frame, BatchFrame):
        return 200 + len(frame.changes)
    if isinstance(frame, Chunk):
        return 200 + len(frame.entries)
    if isinstance(frame, Digests):
        return 200 + 300 * len(frame.ranges)
    return 200
