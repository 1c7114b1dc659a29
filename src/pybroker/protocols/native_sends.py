"""What a client has sent and not had confirmed, over all its connections (NATIVE.md "Sending, once"). Pure.

Owns the producer's id, its sequences, the send window, and what is written again after a lost connection. A sequence is given when
something is submitted; it is never given to anything else under the same producer id.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from pybroker.errors import ProtocolError
from pybroker.protocols.native_frames import COMMIT, DURABLE, SEND, Ranges, pack_frame

Row = tuple[str, bytes, bytes, int, int]  # destination, body, header block, flags, expires: as it is sent

FRAME_MESSAGES_MAX = 1_000  # messages in one SEND
FRAME_BYTES_MAX = 1024 * 1024  # bytes of these (one message always may)
DESTINATION_BYTES = 1_100  # most bytes of a destination in a frame
ROW_BYTES = 64  # most bytes of a message in a frame beside destination, body and header block
FRAME_BYTES = 64  # the same of a frame beside its messages


def flags_of(durable: bool, priority: int) -> int:
    """How priority and durability travel."""
    return priority | DURABLE if durable else priority


def row_size(row: Row) -> int:
    """Bytes that a message is counted with in the send window."""
    return len(row[1]) + len(row[2])


def wire_size(row: Row) -> int:
    """Most bytes that a message takes in a frame."""
    return row_size(row) + DESTINATION_BYTES + ROW_BYTES


class Submission:
    """Messages that go together, or one transaction. Sequences `first` to `last`.

    left      sequences that are not answered
    dropped   as many were not answered when it was forgotten
    tried     it was written, on this connection or an earlier one: so it may be stored
    named     its owner was told its message id, which is good under this producer only
    context   whose it is; the caller's own affair
    """

    __slots__ = (
        "acks",
        "context",
        "dropped",
        "first",
        "last",
        "left",
        "nacks",
        "named",
        "open",
        "rows",
        "size",
        "tried",
    )

    def __init__(self, first: int, rows: list[Row], size: int, context: Any) -> None:
        self.first = first
        self.last = first + len(rows) - 1
        self.rows = rows
        self.size = size  # of what is not answered
        self.left = len(rows)
        self.dropped = 0
        self.open: list[tuple[int, int]] = [(first, self.last)]  # ranges that are not answered
        self.acks: Mapping[int, Ranges] | None = None  # not None: a transaction, with one sequence
        self.nacks: Mapping[int, Ranges] = {}
        self.context = context
        self.tried = False
        self.named = False

    @property
    def settles(self) -> bool:
        """Whether it has acknowledgements in it, which are void on any other connection."""
        return bool(self.acks or self.nacks)

    def close(self, first: int, last: int) -> tuple[int, int]:
        """Take a range out of what is open; how many sequences and bytes of these were open."""
        if (
            first <= self.first
            and last >= self.last
            and len(self.open) == 1
            and self.left == self.last - self.first + 1
        ):
            count, size = self.left, self.size
            self.open = []
            self.left = self.size = 0
            return count, size
        kept: list[tuple[int, int]] = []
        count = 0
        size = 0
        for low, high in self.open:
            start, end = max(low, first), min(high, last)
            if start > end:
                kept.append((low, high))
                continue
            count += end - start + 1
            size += self._size_of(start, end)
            if low < start:
                kept.append((low, start - 1))
            if end < high:
                kept.append((end + 1, high))
        self.open = kept
        self.left -= count
        self.size -= size
        return count, size

    def _size_of(self, first: int, last: int) -> int:
        if self.acks is not None:
            return self.size
        return sum(map(row_size, self.rows[first - self.first : last - self.first + 1]))


class Sends:
    """All that is submitted and not answered, in the order of its sequences."""

    def __init__(self, producer: str) -> None:
        self.producer = producer
        self.messages_max = 0  # the send window of the present connection; 0 = there is none
        self.bytes_max = 0
        self.messages = 0  # submitted and not answered
        self.bytes = 0
        self._frame_messages_max = FRAME_MESSAGES_MAX
        self._frame_bytes_max = FRAME_BYTES_MAX
        self.known = False  # something was written under this producer's id
        self.repeated = 0  # messages and transactions that were written again
        self._next = 1
        self._pending: deque[Submission] = deque()
        self._queue: deque[tuple[Submission, int, int]] = deque()  # what is to be written, on this connection
        self._out_messages = 0  # written on this connection and not answered
        self._out_bytes = 0
        self._written = 0  # the last sequence written on this connection

    # ---- what the caller submits

    @property
    def has_room(self) -> bool:
        """Whether something may be submitted: there is a connection, and its window is not used up."""
        return self.messages < self.messages_max and (self.bytes < self.bytes_max or not self.messages)

    @property
    def room(self) -> int:
        """Messages that may be submitted."""
        return self.messages_max - self.messages

    @property
    def pending(self) -> int:
        """Submissions that are not answered."""
        return len(self._pending)

    def message_id(self, sequence: int) -> str:
        return f"{self.producer}-{sequence:x}"

    def submit(self, rows: list[Row], size: int, context: Any) -> Submission:
        """Messages, in order; `size` is the sum of their `row_size`."""
        return self._add(Submission(self._next, rows, size, context))

    def submit_transaction(
        self, rows: list[Row], size: int, acks: Mapping[int, Ranges], nacks: Mapping[int, Ranges], context: Any
    ) -> Submission:
        submission = Submission(self._next, rows, size, context)
        submission.acks, submission.nacks = acks, nacks
        submission.last, submission.left, submission.open = self._next, 1, [(self._next, self._next)]
        return self._add(submission)

    def _add(self, submission: Submission) -> Submission:
        self._next = submission.last + 1
        self.messages += max(len(submission.rows), 1)
        self.bytes += submission.size
        self._pending.append(submission)
        self._queue.append((submission, submission.first, submission.last))
        return submission

    def withdraw(self, submission: Submission) -> None:
        """Its owner does not wait any more: what was not written never will be, and what was is not written again."""
        if not self.withdraw_unwritten(submission):
            submission.context = None

    def withdraw_unwritten(self, submission: Submission) -> bool:
        """Forget something that was never written; False when it was, or is answered."""
        if submission.tried or not submission.left:
            return False
        self._uncount(submission, submission.left, submission.size)
        submission.left = 0  # it is passed over where it stands
        if submission is self._pending[-1]:
            self._pending.pop()
            self._queue.pop()
            self._next = submission.first
        return True

    def abandon(self) -> list[Submission]:
        """Forget everything that is not answered, for lack of a broker; those with `tried` are in doubt."""
        found = list(self._pending)
        self._drop(found)
        return found

    def _drop(self, submissions: list[Submission]) -> None:
        gone = set(map(id, submissions))
        for each in submissions:
            self._uncount(each, each.left, each.size)
            each.dropped, each.left = each.left, 0
        self._pending = deque(each for each in self._pending if id(each) not in gone)
        self._queue = deque(piece for piece in self._queue if id(piece[0]) not in gone)

    def _uncount(self, submission: Submission, count: int, size: int) -> None:
        self.messages -= count if submission.acks is None else max(len(submission.rows), 1)
        self.bytes -= size

    # ---- connections

    def disconnected(self) -> None:
        """The connection is lost: what is not answered is to be written again, except what nobody waits for."""
        self.messages_max = self.bytes_max = 0
        self._out_messages = self._out_bytes = self._written = 0
        self._drop([each for each in self._pending if each.tried and each.context is None])
        self._queue = deque((each, first, last) for each in self._pending for first, last in each.open)

    def connected(
        self, messages_max: int, bytes_max: int, frame_bytes_max: int, body_bytes_max: int
    ) -> list[Submission]:
        """There is a connection, with these limits; returns (and forgets) what can't be said on it, being too large."""
        self.messages_max, self.bytes_max = messages_max, bytes_max
        self._frame_messages_max = max(
            min(FRAME_MESSAGES_MAX, frame_bytes_max // 2 // (DESTINATION_BYTES + ROW_BYTES)), 1
        )
        self._frame_bytes_max = min(FRAME_BYTES_MAX, frame_bytes_max // 2)
        large = [
            each
            for each in self._pending
            if any(len(row[1]) > body_bytes_max or FRAME_BYTES + wire_size(row) > frame_bytes_max for row in each.rows)
            or (each.acks is not None and FRAME_BYTES + sum(map(wire_size, each.rows)) > frame_bytes_max)
        ]
        if large:
            self._drop(large)
        return large

    def elsewhere(self, producer: str) -> list[Submission]:
        """The broker does not know this producer: go on as another one. Returns (and forgets) what can't go on with it.

        That is what was `tried`, and now is in doubt, and what is `named`. With the same id, the caller wants everything repeated
        that can be: in doubt are then only transactions that acknowledge something.
        """
        same = producer == self.producer
        doubtful = [
            each for each in self._pending if (each.tried and (each.settles or not same)) or (each.named and not same)
        ]
        self._drop(doubtful)
        self.known = False
        if not same:
            self.producer = producer
            self._next = 1
            for each in self._pending:  # never written: whole
                length = each.last - each.first
                each.first, each.last = self._next, self._next + length
                each.open = [(each.first, each.last)]
                self._next = each.last + 1
        self._queue = deque((each, first, last) for each in self._pending for first, last in each.open)
        return doubtful

    # ---- frames

    @property
    def writable(self) -> bool:
        """Whether `next_frame` would give one."""
        queue = self._queue
        while queue and not queue[0][0].left:
            queue.popleft()
        if not queue or not self.messages_max:
            return False
        submission, first, _ = queue[0]
        if submission.acks is not None:
            count, size = max(len(submission.rows), 1), submission.size
        else:
            count, size = 1, row_size(submission.rows[first - submission.first])
        return not self._out_messages or self._fits(count, size)  # something alone always may

    def _fits(self, count: int, size: int) -> bool:
        """Whether the window takes so much more."""
        return self._out_messages + count <= self.messages_max and self._out_bytes + size <= self.bytes_max

    def next_frame(self) -> bytes | None:
        """The next SEND or COMMIT, as far as the window goes."""
        if not self.writable:
            return None
        submission, first, _ = self._queue[0]
        self.known = True
        if submission.acks is not None:
            self._queue.popleft()
            self._note(submission, max(len(submission.rows), 1), submission.size)
            self._written = submission.last
            settled = [
                [(number, _flat(ranges)) for number, ranges in each.items()]
                for each in (submission.acks, submission.nacks)
            ]
            return pack_frame((COMMIT, submission.first, submission.rows, *settled))
        rows: list[Row] = []
        own = False  # `rows` is a list of this call, and no submission's
        size = 0
        expected = first
        while self._queue and len(rows) < self._frame_messages_max:
            submission, low, high = self._queue[0]
            if low != expected or submission.acks is not None or not submission.left:
                break
            count = high - low + 1
            if (
                count == len(submission.rows)
                and len(rows) + count <= self._frame_messages_max
                and size + submission.size <= self._frame_bytes_max
                and self._fits(count, submission.size)
            ):
                piece, piece_size = submission.rows, submission.size
            else:
                piece, piece_size = self._part(submission, low, high, len(rows), size)
                if not piece:
                    break
            self._queue.popleft()
            if len(piece) < count:
                self._queue.appendleft((submission, low + len(piece), high))
            if own:
                rows += piece
            else:
                own = bool(rows)
                rows = rows + piece if rows else piece
            size += piece_size
            expected = low + len(piece)
            self._note(submission, len(piece), piece_size)
        self._written = expected - 1
        return pack_frame((SEND, first, rows))

    def _part(self, submission: Submission, low: int, high: int, taken: int, size: int) -> tuple[list[Row], int]:
        """As many messages of a submission as frame and window take; one alone always may."""
        piece: list[Row] = []
        piece_size = 0
        for row in submission.rows[low - submission.first : high - submission.first + 1]:
            more = row_size(row)
            first = not taken and not piece
            if not self._fits(len(piece) + 1, piece_size + more) and (not first or self._out_messages):
                break
            if not first and (
                taken + len(piece) >= self._frame_messages_max or size + piece_size + more > self._frame_bytes_max
            ):
                break
            piece.append(row)
            piece_size += more
        return piece, piece_size

    def _note(self, submission: Submission, count: int, size: int) -> None:
        if submission.tried:
            self.repeated += count
        submission.tried = True
        self._out_messages += count
        self._out_bytes += size

    # ---- answers

    def confirm(self, first: int, last: int) -> list[tuple[Submission, int]]:
        """These sequences are confirmed: whose they are, and how many of each. Raises ProtocolError."""
        if last > self._written:
            raise ProtocolError(f"sequence {last} was confirmed, and {self._written} was the last one that was sent")
        found: list[tuple[Submission, int]] = []
        wanted = last - first + 1
        pending = self._pending
        for submission in pending:
            if submission.first > last:
                break
            if submission.last < first or not submission.left:
                continue
            count = self._close(submission, first, last)
            if count:
                wanted -= count
                found.append((submission, count))
        while pending and not pending[0].left:
            pending.popleft()
        if wanted:
            raise ProtocolError(f"sequences {first} to {last} were confirmed, and {wanted} of them were not under way")
        return found

    def refuse(self, sequence: int) -> Submission:
        """A sequence was refused: whose it was. Raises ProtocolError."""
        return self.confirm(sequence, sequence)[0][0]

    def _close(self, submission: Submission, first: int, last: int) -> int:
        count, size = submission.close(first, last)
        if count:
            self._uncount(submission, count, size)
            self._out_messages -= count if submission.acks is None else max(len(submission.rows), 1)
            self._out_bytes -= size
        return count


def _flat(ranges: Ranges) -> list[int]:
    return [number for each in ranges for number in each]
