"""What one native connection has still to be told: frames, confirmations and deliveries, and how they go together on the wire.

Deliveries stay entries until the socket takes them: what was taken back meanwhile is left out, and what came in several turns
goes out in one frame. Owns no socket, and decides nothing about messages.
"""

from __future__ import annotations

from collections.abc import Iterable

from pybroker.core.consumer import Consumer
from pybroker.core.entry import SENT, Entry
from pybroker.protocols.native_frames import encode_confirm, encode_deliver

DELIVERY_BYTES = 64  # what a delivery is counted with beside its message
RESULT_BYTES = 16  # what a range of confirmed sends is counted with
DELIVER_MESSAGES_MAX = 1_000  # messages in one DELIVER
DELIVER_BYTES_MAX = 1024 * 1024  # bytes of these (one message always may)

Result = tuple[int, int, bool]  # first sequence, last sequence, stored


class Receiver:
    """A subscription as its connection knows it: its number on the wire, and what waits for the socket."""

    __slots__ = ("consumer", "number", "ready")

    consumer: Consumer

    def __init__(self, number: int) -> None:
        self.number = number
        self.ready: list[Entry] = []


class Outbox:
    """Takes what is to be said, and gives it out as bytes. `size`: about the bytes of all that was not taken."""

    __slots__ = ("_frames", "_receivers", "_results", "size")

    def __init__(self) -> None:
        self.size = 0
        self._frames: list[bytes] = []
        self._results: list[Result] = []  # of the CONFIRM behind the frames
        self._receivers: list[Receiver] = []  # those with something ready, in order of the first of it

    def put(self, frame: bytes) -> None:
        """Say a frame, behind what was confirmed before it."""
        if self._results:
            self._pack_results()
        self._frames.append(frame)
        self.size += len(frame)

    def confirm(self, results: Iterable[Result]) -> None:
        """Confirm sends. What follows what was confirmed before it is said in one range with that."""
        mine = self._results
        for result in results:
            first, last, stored = result
            if mine and mine[-1][1] + 1 == first and mine[-1][2] is stored:
                mine[-1] = (mine[-1][0], last, stored)
            else:
                mine.append(result)
                self.size += RESULT_BYTES

    def deliver(self, receiver: Receiver, entry: Entry) -> None:
        ready = receiver.ready
        if not ready:
            self._receivers.append(receiver)
        ready.append(entry)
        self.size += entry.message.size + DELIVERY_BYTES

    def take(self) -> list[bytes]:
        """All there is, as frames; empties the outbox (apart from `size`, which the caller lowers when they are out)."""
        if self._results:
            self._pack_results()
        frames, self._frames = self._frames, []
        receivers, self._receivers = self._receivers, []
        for receiver in receivers:
            ready, receiver.ready = receiver.ready, []
            _pack_deliveries(frames, receiver.number, [entry for entry in ready if entry.state == SENT])
        return frames

    def clear(self) -> None:
        self.take()
        self.size = 0

    def _pack_results(self) -> None:
        self._frames.append(encode_confirm(self._results))
        self._results = []


def _pack_deliveries(frames: list[bytes], number: int, entries: list[Entry]) -> None:
    at = 0
    while at < len(entries):
        stop = _end_of_run(entries, at)
        run = entries[at:stop] if at or stop < len(entries) else entries
        frames.append(encode_deliver(number, run[0].tag, [(entry.message, entry.deliveries) for entry in run]))
        at = stop


def _end_of_run(entries: list[Entry], at: int) -> int:
    """Where the frame ends that begins with the entry at `at`: its tags follow each other, and it is not too large."""
    stop = min(at + DELIVER_MESSAGES_MAX, len(entries))
    first = entries[at].tag
    if entries[stop - 1].tag - first == stop - 1 - at:
        sizes = [entry.message.size for entry in entries[at:stop]]
        if sum(sizes) <= DELIVER_BYTES_MAX:
            return stop
    size = 0
    for index in range(at, stop):
        size += entries[index].message.size
        if index > at and (size > DELIVER_BYTES_MAX or entries[index].tag != first + index - at):
            return index
    return stop
