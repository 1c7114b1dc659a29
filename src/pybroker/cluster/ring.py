"""The ring of recent batches that every replica keeps in memory, so that one that was away is sent what it missed.

DESIGN.md section 5, rule 9. Owns the encoded batches and their bound in bytes; knows no stream, store or disk. Pure.
"""

from __future__ import annotations

from pybroker.cluster.frames import BatchFrame, encode
from pybroker.cluster.registry import Position

RING_BYTES_MAX = 64 * 1024 * 1024


class RingBatch:
    """One batch, encoded. Its frame is made once for each epoch that it is sent under, and holds the changes from then on."""

    __slots__ = ("_changes", "_frame", "_frame_epoch", "_size", "position", "previous")

    def __init__(self, position: Position, previous: Position, changes: bytes) -> None:
        self.position = position
        self.previous = previous
        self._size = len(changes)
        self._changes: bytes | None = changes
        self._frame = b""
        self._frame_epoch = 0

    @property
    def size(self) -> int:
        """Bytes of the encoded changes."""
        return self._size

    @property
    def changes(self) -> bytes:
        """The encoded changes: the frame ends with them."""
        if self._changes is not None:
            return self._changes
        return self._frame[len(self._frame) - self._size :]

    def frame(self, epoch: int) -> bytes:
        """The frame as a leader of `epoch` sends it. Raises ProtocolError if it is too long to be sent."""
        if self._changes is not None or self._frame_epoch != epoch:
            self._frame = encode(BatchFrame(epoch, self.position, self.previous, self.changes))
            self._frame_epoch = epoch
            self._changes = None
        return self._frame


class Ring:
    """The batches ``base + 1 .. last``, without a gap, the oldest dropped beyond `bytes_max`.

    `base` is the position before the first of them: a store that is there is brought up by them.
    """

    def __init__(self, bytes_max: int = RING_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self.base = Position(0, 0)
        self.bytes = 0
        self._batches: dict[int, RingBatch] = {}

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def last(self) -> Position:
        batch = self._batches.get(self.base.lsn + len(self._batches))
        return self.base if batch is None else batch.position

    def append(self, batch: RingBatch, keep_after: int) -> None:
        """Add the next batch; those up to number `keep_after` may be dropped for it. Raises ValueError if it is not the next."""
        if batch.previous != self.last or batch.position.lsn != batch.previous.lsn + 1:
            raise ValueError(f"batch {batch.position} after {batch.previous} does not follow {self.last}")
        self._batches[batch.position.lsn] = batch
        self.bytes += batch.size
        while self.bytes > self.bytes_max and self.base.lsn < keep_after:
            dropped = self._batches.pop(self.base.lsn + 1)
            self.bytes -= dropped.size
            self.base = dropped.position

    def holds_after(self, lsn: int) -> bool:
        """Whether every batch after number `lsn` is here."""
        return self.base.lsn <= lsn <= self.last.lsn

    def get(self, lsn: int) -> RingBatch | None:
        """Batch number `lsn`; None when it has been dropped, or is not there yet."""
        return self._batches.get(lsn)

    def clear(self) -> None:
        """Forget every batch: the store is going to be another one."""
        self._batches.clear()
        self.bytes = 0
        self.base = Position(0, 0)

    def align(self, position: Position) -> None:
        """Make the ring end at `position`, where the store is: drop what came after, or everything if it leads elsewhere."""
        while self._batches and self.last.lsn > position.lsn:
            self.bytes -= self._batches.pop(self.last.lsn).size
        if self.last != position:
            self._batches.clear()
            self.bytes = 0
            self.base = position
