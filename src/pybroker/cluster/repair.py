"""Whole values for bad ones, asked of the other end of a replication link. Owns the questions, the answers and their limits.

DESIGN.md section 4: a value whose checksum is wrong is never delivered; in a replica set it is fetched from a peer. Both ends of
a link ask and answer in the same way, one question at a time. Every value is checked with its key before it is sent, and again
before it is taken. What may be done with it is the asker's affair: see `Store.mend` for a store, `core` for a message.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import trio

from pybroker.cluster.catchup import RunBlocking
from pybroker.cluster.frame_stream import FrameStream, LinkBroken
from pybroker.cluster.frames import FETCH_KEYS_MAX, FRAME_BYTES_MAX, Fetch, Values, encode
from pybroker.cluster.registry import Position
from pybroker.errors import CorruptRecord, ProtocolError, StoreDamaged, StoreError
from pybroker.store import format as fmt
from pybroker.store.backend import Reader
from pybroker.store.store import Store

log = logging.getLogger("pybroker.cluster")

VALUES_BYTES = 1024 * 1024  # values in one answer, but at least one: the asker asks again for the others

OWN_KEYS = (fmt.META_KEY, fmt.POSITION_KEY)  # of each copy its own, and known in memory: never another's to say


class Answer(NamedTuple):
    """What another copy had under a key at batch number `known_at`: a whole value, or None for no such key."""

    value: bytes | None
    known_at: int


def may_be_asked(key: bytes) -> bool:
    """Whether another copy can have the value of that key: it is of a known kind, and not each copy's own."""
    try:
        fmt.parse_key(key)
    except CorruptRecord:
        return False
    return key not in OWN_KEYS


def position_of(reader: Reader) -> Position | None:
    """The position that a snapshot has, None if that record itself is bad."""
    value = reader.get(fmt.POSITION_KEY)
    if value is None:
        return Position(0, 0)
    try:
        return Position(*fmt.decode_pair(fmt.POSITION_KEY, value))
    except CorruptRecord:
        return None


def read_values(
    store: Store, keys: Iterable[bytes], bytes_max: int = VALUES_BYTES
) -> tuple[Position, list[tuple[bytes, bytes | None]]]:
    """What the keys hold: nothing of bad values, nothing beyond `bytes_max` but a first value. Blocking."""
    pairs: list[tuple[bytes, bytes | None]] = []
    size = 0
    with store.backend.snapshot() as reader:
        position = position_of(reader)
        if position is None:
            return Position(0, 0), []
        for key in keys:
            try:
                value = reader.get(key)
            except StoreDamaged as error:
                store.distrust(str(error), unreadable=True)
                continue
            if value is not None:
                if not fmt.is_whole(key, value):
                    continue
                if size and size + len(value) > bytes_max:
                    break
                size += len(value)
            pairs.append((key, value))
    return position, pairs


class Exchange:
    """Questions and answers on one link of `epoch`, in both directions. `run` sends both; `take` gets the peer's frames.

    store  gives the store to answer from: None while there is none (then the answer is that nothing is known)
    """

    def __init__(
        self, epoch: int, frames: FrameStream, store: Callable[[], Store | None], run_reading: RunBlocking
    ) -> None:
        self._epoch = epoch
        self._frames = frames
        self._store = store
        self._run_reading = run_reading
        self._number = 0
        self._asking = trio.Lock()
        self._asked: frozenset[bytes] | None = None  # the keys of a question that is not answered yet
        self._bytes_max = 0  # of frames, when nothing is asked
        self._answer: Values | None = None
        self._answered = trio.Event()
        self._unsent: Fetch | None = None
        self._question: Fetch | None = None  # the peer's
        self._work = trio.Event()
        self._ended = False

    # ---- asking

    async def fetch(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """What the peer has under these keys; those that are missing are bad there too. Raises LinkBroken."""
        answers: dict[bytes, Answer] = {}
        left = list(dict.fromkeys(filter(may_be_asked, keys)))
        async with self._asking:
            while left:
                values = await self._ask(left[:FETCH_KEYS_MAX])
                if not values.pairs:
                    left = left[FETCH_KEYS_MAX:]
                for key, value in values.pairs:
                    if value is None or fmt.is_whole(key, value):
                        answers[key] = Answer(value, values.position.lsn)
                    else:
                        log.warning("a peer sent a bad value for record %s, which is not taken", key.hex())
                answered = {key for key, _ in values.pairs}
                left = [key for key in left if key not in answered]
        return answers

    async def _ask(self, keys: list[bytes]) -> Values:
        while self._asked is not None and not self._ended:  # nobody waited for that answer any more
            await self._answered.wait()
        if self._ended:
            raise LinkBroken("the link has ended")
        self._number += 1
        self._asked = frozenset(keys)
        self._answer = None
        self._answered = trio.Event()
        reader = self._frames.reader
        self._bytes_max, reader.bytes_max = reader.bytes_max, FRAME_BYTES_MAX
        self._unsent = Fetch(self._epoch, self._number, tuple(keys))  # by `run`: whoever asks may be cancelled
        self._work.set()
        await self._answered.wait()
        if self._answer is None:
            raise LinkBroken("the link ended before a question was answered")
        return self._answer

    # ---- what the peer says

    def take(self, frame: Fetch | Values) -> None:
        """A frame of the peer. Raises ProtocolError for one that can't be."""
        if frame.epoch != self._epoch:
            raise ProtocolError(f"a frame of epoch {frame.epoch}, this is {self._epoch}")
        if isinstance(frame, Fetch):
            if self._question is not None:
                raise ProtocolError("a question for values before the last one was answered")
            if not all(map(may_be_asked, frame.keys)):
                raise ProtocolError("a question for the values of keys that are no replica's to ask for")
            self._question = frame
            self._work.set()
            return
        keys = [key for key, _ in frame.pairs]
        if self._asked is None or frame.number != self._number:
            raise ProtocolError(f"values for question {frame.number}, which was not asked")
        if len(set(keys)) != len(keys) or not self._asked.issuperset(keys):
            raise ProtocolError("values of other keys than were asked for")
        self._asked = None
        self._frames.reader.bytes_max = self._bytes_max
        self._answer = frame
        self._answered.set()

    # ---- sending

    async def run(self) -> None:
        """Ask, and answer the peer, until cancelled; whoever waits for an answer is told then that the link has ended."""
        try:
            while True:
                unsent, self._unsent = self._unsent, None
                if unsent is not None:
                    await self._frames.send_frame(unsent)
                elif self._question is not None:
                    data = encode(await self._values(self._question))
                    self._question = None
                    await self._frames.send(data)
                else:
                    self._work = trio.Event()
                    await self._work.wait()
        finally:
            self._ended = True
            self._answered.set()

    async def _values(self, question: Fetch) -> Values:
        store = self._store()
        position, pairs = Position(0, 0), list[tuple[bytes, bytes | None]]()
        if store is not None:
            try:
                position, pairs = await self._run_reading(partial(read_values, store, question.keys))
            except StoreError as error:  # it may have been closed, to catch up by difference
                log.info("values can't be read for a peer: %s", error)
        return Values(self._epoch, question.number, position, tuple(pairs))
