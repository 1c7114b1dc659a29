"""The leader's end of one follower's connection: sends it batches and heartbeats, takes its answers. Owns its cursor and its end.

DESIGN.md section 5, rules 7 and 9. Batches are taken from the leader's ring, which so is every follower's outbox: one that falls
further behind than `outbox_bytes_max`, or than the ring, is cut and catches up again.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from pybroker.cluster.catchup import SEND_BYTES, DifferenceSender, Mend, RunBlocking
from pybroker.cluster.frame_stream import FrameStream, LinkBroken
from pybroker.cluster.frames import (
    CATCHING_UP,
    FOLLOWING,
    Answer,
    Fetch,
    Frame,
    Heartbeat,
    HeartbeatAnswer,
    Member,
    Refusal,
    SnapshotEnd,
    Values,
    Want,
    encode,
)
from pybroker.cluster.registry import Position
from pybroker.cluster.repair import Exchange
from pybroker.cluster.ring import Ring
from pybroker.cluster.tracking import Copy, Tracking
from pybroker.errors import ProtocolError, StoreError
from pybroker.store.store import Store

log = logging.getLogger("pybroker.cluster")

FAREWELL = 0.5  # seconds for a last word


@dataclass(frozen=True, slots=True)
class LinkContext:
    """What all links of one leader share.

    answered  called after each answer
    deposed   called with an epoch above the leader's
    mend      gets whole values for bad ones of the leader's store
    members   gives the leader's table, for heartbeats
    """

    epoch: int
    store: Store
    ring: Ring
    tracking: Tracking
    run_reading: RunBlocking
    silence: float
    outbox_bytes_max: int
    answered: Callable[[], None]
    deposed: Callable[[str, int], None]
    mend: Mend
    members: Callable[[], tuple[Member, ...]] = tuple


class Link:
    """One follower that was welcomed. `cursor`: the number of the last batch that it has or was sent; None: by difference."""

    def __init__(
        self,
        context: LinkContext,
        frames: FrameStream,
        copy: Copy,
        attachment: int,
        position: Position,
        cursor: int | None,
    ) -> None:
        self.copy = copy
        self.attachment = attachment
        self.position = position  # durable, as the follower last said
        self.unsent_bytes = 0  # of batches that wait for this follower
        self.chunks_compared = 0
        self.moved_bytes = 0
        self.ended: str | None = None
        self.closed = trio.Event()  # `run` has ended
        self.exchange = Exchange(context.epoch, frames, lambda: context.store, context.run_reading)
        self._context = context
        self._frames = frames
        self._cursor = cursor
        self._scope = trio.CancelScope()
        self._work = trio.Event()
        self._beat_due = trio.Event()
        self._beat = 0
        self._unsent_bytes_max = context.outbox_bytes_max
        self._send_wants, self._wants = trio.open_memory_channel[Want](1)
        if cursor is not None:
            self._count_unsent(cursor)

    @property
    def state(self) -> str:
        return CATCHING_UP if self._cursor is None else FOLLOWING

    def cut(self, reason: str) -> None:
        """End the link; the first reason is kept."""
        if self.ended is None:
            self.ended = reason
        self._scope.cancel()

    def batch_added(self, size: int) -> None:
        """The ring has a new batch."""
        if self._cursor is None:
            return
        self.unsent_bytes += size
        if self.unsent_bytes - size > self._unsent_bytes_max:
            self.cut(f"too slow: {self.unsent_bytes} bytes of batches wait for it")
        else:
            self._work.set()

    def beat(self, number: int) -> None:
        """A heartbeat is to be sent."""
        self._beat = number
        self._beat_due.set()

    async def run(self) -> None:
        """Until the link ends; `ended` says why. Raises nothing but what is a fault of the program."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._guard, self._send_beats)
                    nursery.start_soon(self._guard, self._send_all_batches)
                    nursery.start_soon(self._guard, self.exchange.run)
                    await self._guard(self._receive)
        finally:
            self.closed.set()

    async def _guard(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except LinkBroken as error:
            self.cut(str(error))
        except ProtocolError as error:
            if self.ended is None:
                self.ended = str(error)
            refusal = Refusal("protocol", str(error)[:500], self._context.epoch)
            await self._frames.farewell(refusal, FAREWELL)
            self.cut(str(error))
        except StoreError as error:
            log.error("replica %s can't be brought up from this store: %s", self.copy.name, error)
            self.cut(str(error))

    # ---- what it says

    async def _receive(self) -> None:
        silence = self._context.silence
        while True:
            for frame in await self._frames.receive(silence):
                self._take(frame)

    def _take(self, frame: Frame) -> None:
        context = self._context
        tracking = context.tracking
        if isinstance(frame, Answer):
            tracking.answer(self.attachment, frame.epoch, frame.position)
            self.position = frame.position
            context.answered()
        elif isinstance(frame, HeartbeatAnswer):
            tracking.answer_beat(self.attachment, frame.epoch, frame.number, frame.position)
            context.answered()
        elif isinstance(frame, Want):
            if frame.epoch != context.epoch:
                raise ProtocolError(f"a frame of epoch {frame.epoch}, this is {context.epoch}")
            try:
                self._send_wants.send_nowait(frame)
            except trio.WouldBlock:
                raise ProtocolError("a follower wants ranges that it was not asked about") from None
        elif isinstance(frame, Fetch | Values):
            self.exchange.take(frame)
        elif isinstance(frame, Refusal):
            if frame.epoch > context.epoch:
                context.deposed(f"{self.copy.name} follows epoch {frame.epoch}: {frame.text}", frame.epoch)
            raise LinkBroken(f"it refused ({frame.code}): {frame.text}")
        else:
            raise ProtocolError(f"a follower sent {type(frame).__name__}")

    # ---- what it is told

    async def _send_beats(self) -> None:
        context = self._context
        while True:
            await self._beat_due.wait()
            self._beat_due = trio.Event()
            number = self._beat
            context.tracking.beat_sent(self.attachment, number)
            beat = Heartbeat(context.epoch, number, context.tracking.reach(), context.members())
            await self._frames.send(encode(beat))

    async def _send_all_batches(self) -> None:
        if self._cursor is None:
            await self._catch_up()
        while True:
            data = self._next_batches()
            if data:
                await self._frames.send(data)
            else:
                self._work = trio.Event()
                await self._work.wait()

    def _next_batches(self) -> bytes:
        """What is to be sent now, in one write; empty when there is nothing."""
        ring = self._context.ring
        cursor = self._cursor
        assert cursor is not None
        pieces: list[bytes] = []
        size = 0
        while cursor < ring.last.lsn and size < SEND_BYTES:
            batch = ring.get(cursor + 1)
            if batch is None:
                raise LinkBroken("too slow: the batches that it needs are not kept any more")
            cursor += 1
            self.unsent_bytes -= batch.size
            pieces.append(batch.frame(self._context.epoch))
            size += batch.size
        if not pieces:
            return b""
        self._cursor = cursor
        self._context.tracking.sent(self.attachment, cursor)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _catch_up(self) -> None:
        context = self._context
        sender = DifferenceSender(
            context.epoch,
            context.store,
            context.ring,
            context.run_reading,
            self._frames.send,
            self._wants.receive,
            context.mend,
        )
        try:
            position = await sender.run()
        finally:
            self.chunks_compared = sender.compared
            self.moved_bytes = sender.moved_bytes
        self._count_unsent(position.lsn)
        self._cursor = position.lsn
        context.tracking.sent(self.attachment, position.lsn)
        await self._frames.send(encode(SnapshotEnd(context.epoch, position)))

    def _count_unsent(self, cursor: int) -> None:
        ring = self._context.ring
        batches = [ring.get(lsn) for lsn in range(max(cursor, ring.base.lsn) + 1, ring.last.lsn + 1)]
        self.unsent_bytes = sum(batch.size for batch in batches if batch is not None)
        self._unsent_bytes_max = max(
            self._unsent_bytes_max, self.unsent_bytes
        )  # it must not grow beyond where it begins
