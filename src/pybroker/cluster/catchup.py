"""Catching up by difference, both sides of it. Owns the order in which ranges and batches go over; no stream, no side copy's files.

DESIGN.md section 5, rule 9. The leader walks its store in *windows* of keys. Each window is read from a snapshot of its own, at
a position P; before its digests go the batches since the window before. The follower applies them to its side copy: below the
walk's place that is right as it is, and what lies beyond will be compared with a later snapshot, which has the batch already. So
after each window the side copy is, below the walk's place, the leader's store at P; after the last, all of it is. Nothing is
spooled on either side, no snapshot lives long, and nothing counts before the whole side copy has become the current one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from pybroker.cluster.frames import (
    RANGES_MAX,
    Chunk,
    Digests,
    SnapshotBegin,
    Want,
    decode_entries,
    encode,
    encode_entries,
)
from pybroker.cluster.registry import Position
from pybroker.cluster.ring import Ring
from pybroker.errors import ProtocolError, StoreDamaged, StoreError
from pybroker.store import chunks
from pybroker.store import format as fmt
from pybroker.store.backend import Change, Entry, Reader
from pybroker.store.store import Store

RunBlocking = Callable[[Callable[[], Any]], Awaitable[Any]]
Mend = Callable[
    [list[Entry], int], Awaitable[bool]
]  # (bad entries, batch number that the store was at) -> all whole now

WINDOW_BYTES = 4 * 1024 * 1024  # keys and values of one window
SEND_BYTES = 1024 * 1024  # batches that go into one write
# Kinds whose values change.
CHANGING = frozenset(
    (
        *(fmt.PRODUCER, fmt.PEER, fmt.QUEUE, fmt.POSITION, fmt.IDS, fmt.DELIVERIES, fmt.REFERENCES),
        *(fmt.SCHEDULING, fmt.SCHEDULE),
    )
)


class _Window:
    """One snapshot of the leader's store, open until the follower has what it wants of the window."""

    def __init__(self, store: Store, start: bytes) -> None:
        self._snapshot = store.backend.snapshot()
        self._reader: Reader = self._snapshot.__enter__()
        try:
            value = self._reader.get(fmt.POSITION_KEY)
            self.position = Position(0, 0) if value is None else Position(*fmt.decode_pair(fmt.POSITION_KEY, value))
            self.digests, self.next_start = chunks.digests(self._reader, start, WINDOW_BYTES, RANGES_MAX)
        except BaseException:
            self.close()
            raise

    def chunk(self, epoch: int, start: bytes, stop: bytes) -> tuple[bytes, list[Entry]]:
        """A chunk's frame, and those of its entries that are bad and that a follower can't have a right value of."""
        entries = chunks.read(self._reader, start, stop)
        bad = [(key, value) for key, value in entries if key[0] in CHANGING and not fmt.is_whole(key, value)]
        return encode(Chunk(epoch, start, stop, encode_entries(entries))), bad

    def close(self) -> None:
        self._snapshot.__exit__(None, None, None)


class DifferenceSender:
    """The leader's side, for one follower: `send` takes encoded frames, `wants` waits for the follower's next Want.

    mend  gets whole values for bad ones of this store from other copies: a follower that has an older value in the place of one
          that changes would keep it
    """

    def __init__(
        self,
        epoch: int,
        store: Store,
        ring: Ring,
        run_blocking: RunBlocking,
        send: Callable[[bytes], Awaitable[None]],
        wants: Callable[[], Awaitable[Want]],
        mend: Mend,
    ) -> None:
        self._epoch = epoch
        self._store = store
        self._ring = ring
        self._run_blocking = run_blocking
        self._send = send
        self._wants = wants
        self._mend = mend
        self.walks = (
            0  # walks begun: more than one if the ring did not hold what came during a window, or a value was bad
        )
        self.compared = 0  # chunks
        self.moved_bytes = 0  # of chunks that differed

    async def run(self) -> Position:
        """Walk until the follower's side copy is whole, at the position that is returned; the caller sends SnapshotEnd.

        Raises what `send` and `wants` raise, ProtocolError, and StoreError when the own store can't be read.
        """
        while True:
            position = await self._walk()
            if position is not None:
                return position

    async def _walk(self) -> Position | None:
        """One walk over all keys; None if another is needed.

        Batches were dropped from the ring that the follower would have needed, or a bad value was found, and mended.
        """
        self.walks += 1
        start: bytes | None = chunks.FIRST
        position: Position | None = None
        while start is not None:
            window: _Window = await self._run_blocking(partial(_Window, self._store, start))
            try:
                if position is None:
                    await self._send(encode(SnapshotBegin(self._epoch, window.position)))
                elif not await self._send_batches(position, window.position):
                    return None
                position = window.position
                if not await self._send_window(window):
                    return None
            finally:
                window.close()
            start = window.next_start
        return position

    async def _send_batches(self, after: Position, upto: Position) -> bool:
        lsn = after.lsn
        while lsn < upto.lsn:
            pieces: list[bytes] = []
            size = 0
            while lsn < upto.lsn and size < SEND_BYTES:
                batch = self._ring.get(lsn + 1)
                if batch is None:
                    return False
                lsn += 1
                pieces.append(batch.frame(self._epoch))
                size += len(pieces[-1])
            await self._send(b"".join(pieces))
        return True

    async def _send_window(self, window: _Window) -> bool:
        await self._send(encode(Digests(self._epoch, window.position, tuple(window.digests))))
        self.compared += len(window.digests)
        want = await self._wants()
        edges = {digest.start for digest in window.digests} | {window.digests[-1].stop}
        last = window.digests[0].start
        for start, stop in want.ranges:
            if start not in edges or stop not in edges or not last <= start < stop:
                raise ProtocolError("a follower wants a range that it was not offered")
            last = stop
        for start, stop in want.ranges:
            frame: bytes
            bad: list[Entry]
            frame, bad = await self._run_blocking(partial(window.chunk, self._epoch, start, stop))
            if bad:
                if not await self._mend(bad, max(window.position.lsn, self._store.position[1])):
                    raise StoreError(f"record {bad[0][0].hex()} is bad here, and no other copy has it whole")
                return False
            self.moved_bytes += len(frame)
            await self._send(frame)
        return True


class SideCopy:
    """The follower's side: a side copy on its way to become the leader's store. Blocking where it says so.

    Every frame that can't follow the one before is a ProtocolError, and changes nothing.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.position: Position | None = None  # of the leader's store, to which the keys below `_place` are brought
        self._place = chunks.FIRST
        self._stop = chunks.FIRST  # where the window that is open ends
        self._wanted: deque[tuple[bytes, bytes]] = deque()

    def begin(self) -> None:
        """A walk begins, with the first key."""
        self.position = None
        self._place = self._stop = chunks.FIRST
        self._wanted.clear()

    def compare(self, frame: Digests) -> Want:
        """A window's digests: what differs here, ranges that touch joined. Blocking."""
        if self._wanted:
            raise ProtocolError("digests before the chunks of the window before them")
        if self.position is not None and frame.position != self.position:
            raise ProtocolError(f"digests at {frame.position}, where batches led to {self.position}")
        if not frame.ranges or frame.ranges[0][0] != self._place:
            raise ProtocolError("digests that do not go on where the walk is")
        digests = [chunks.ChunkDigest(*row) for row in frame.ranges]
        with self.store.backend.snapshot() as reader:
            different = chunks.compare(reader, digests)
        joined: list[tuple[bytes, bytes]] = []
        for start, stop in different:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        self.position = frame.position
        self._stop = digests[-1].stop
        self._wanted.extend(joined)
        self._close_window()
        return Want(frame.epoch, tuple(joined))

    def replace(self, frame: Chunk) -> None:
        """A chunk that was wanted. Blocking."""
        if not self._wanted or self._wanted[0] != (frame.start, frame.stop):
            raise ProtocolError("a chunk that was not wanted, or not now")
        chunks.replace(self.store, frame.start, frame.stop, decode_entries(frame.entries))
        self._wanted.popleft()
        self._close_window()

    def apply(self, previous: Position, position: Position, changes: Sequence[Change]) -> None:
        """A batch between two windows. Blocking, not synced."""
        if self._wanted or self.position is None or previous != self.position:
            raise ProtocolError(f"batch {position} after {previous} does not fit a walk at {self.position}")
        self.store.apply(changes, position, False)
        self.position = position

    def finish(self, position: Position) -> None:
        """The walk is over: see that the side copy is what it should be. Blocking."""
        if self._wanted or self._place != chunks.STOP or position != self.position:
            raise ProtocolError("the end of a walk that is not at its end")
        try:
            self.store.reload()
        except StoreDamaged as error:
            raise ProtocolError(f"what the leader has sent is no store: {error}") from error
        if self.store.position != position or self.store.epoch_at(position.lsn) != position.epoch:
            raise ProtocolError(f"the side copy is at {self.store.position} where the leader's store is at {position}")

    def _close_window(self) -> None:
        if not self._wanted:
            self._place = self._stop
