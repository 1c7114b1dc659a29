"""Walking over a store in search of bad values, slowly, and putting whole ones in their places. Owns the pace and the place.

DESIGN.md section 4. Nobody reads a follower's store, nor all of a leader's: what goes bad there would be found when it is
needed. So each replica walks over its own store from time to time, in slices, in a reading thread, and asks its leader, or its
followers, for what it finds bad. The rule that says when a peer's value may be taken is `Store.mend`'s. What no value can mend
(a place that LevelDB can't read, a key that no copy has) makes the store *suspect*: such a copy is compared with its leader's.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import trio

from pybroker.cluster.catchup import RunBlocking
from pybroker.cluster.frame_stream import LinkBroken
from pybroker.cluster.frames import FETCH_KEYS_MAX
from pybroker.cluster.repair import OWN_KEYS, Answer, may_be_asked, position_of
from pybroker.config import ReplicaSetConfig
from pybroker.errors import StoreDamaged, StoreError
from pybroker.store import format as fmt
from pybroker.store.backend import Entry
from pybroker.store.chunks import FIRST, STOP
from pybroker.store.store import Store

log = logging.getLogger("pybroker.cluster")

SLICE_BYTES = 256 * 1024  # keys and values that are read in one go
SLICE_KEYS = 4_096
FIRST_WALK = 60.0  # seconds until the first walk: a process that is often restarted walks, too
PAUSE = 0.5  # seconds until something is tried again that can't be done now
TRIES = 10  # of a peer, or of this store, that is behind
LEFT_MAX = 10_000  # keys that are remembered as bad

Ask = Callable[[Sequence[bytes], int], Awaitable[dict[bytes, Answer]]]  # (keys, batch number that an answer must be at)


@dataclass(frozen=True, slots=True)
class ScrubStatistics:
    """Since the process started: whole `walks`, values that were `found` bad, and `repaired`. `left`: known to be bad now."""

    walks: int
    checked_bytes: int
    found: int
    repaired: int
    left: int


class Slice(NamedTuple):
    """A piece of a walk. `lsn`: the store was not beyond that batch when it was read; `next`: None at the walk's end."""

    lsn: int
    bad: list[Entry]
    size: int
    next: bytes | None


def read_slice(
    store: Store, start: bytes, bytes_max: int = SLICE_BYTES, keys_max: int = SLICE_KEYS, bad_max: int = FETCH_KEYS_MAX
) -> Slice:
    """Check every value from `start` on, up to one of the limits. Blocking. Raises StoreDamaged."""
    bad: list[Entry] = []
    size = count = 0
    behind: bytes | None = None
    with store.backend.snapshot() as reader:
        position = position_of(reader)
        for key, value in reader.iterate(start, STOP):
            if size >= bytes_max or count >= keys_max or len(bad) >= bad_max:
                behind = key
                break
            size += len(key) + len(value)
            count += 1
            if not fmt.is_whole(key, value):
                bad.append((key, value))
    return Slice(max(store.position[1], position.lsn if position is not None else 0), bad, size, behind)


class Scrubber:
    """One replica's walks: they go on where they were whatever its role becomes, and with whichever store is the current one."""

    def __init__(self, config: ReplicaSetConfig, run_reading: RunBlocking, run_blocking: RunBlocking) -> None:
        self._interval = config.scrub_interval
        self._rate = max(1, config.scrub_bytes_per_second)
        self._run_reading = run_reading
        self._run_blocking = run_blocking
        self._place = FIRST
        self._next: float | None = None  # when the next slice is due
        self._left: set[bytes] = set()
        self._walks = 0
        self._checked = 0
        self._found = 0
        self._repaired = 0

    def statistics(self) -> ScrubStatistics:
        return ScrubStatistics(self._walks, self._checked, self._found, self._repaired, len(self._left))

    async def run(self, store: Callable[[], Store | None], ask: Ask) -> None:
        """Walk until the store turns out to be suspect. `store` gives the present one, None while there is none to look at."""
        if not self._interval:
            await trio.sleep_forever()
        if self._next is None:
            self._next = trio.current_time() + min(self._interval, FIRST_WALK)
        while True:
            await trio.sleep_until(self._next)
            current = store()
            if current is None:
                await trio.sleep(PAUSE)
                continue
            if current.suspect:
                return
            try:
                await self._step(current, ask)
            except StoreDamaged as error:
                current.distrust(str(error), unreadable=True)
                log.error("a part of this store can't be read: %s", error)
            except StoreError as error:  # it was closed; or it has failed, which whoever writes to it will meet
                log.info("a walk over the store was interrupted: %s", error)
                await trio.sleep(PAUSE)

    async def mend(self, store: Store, bad: list[Entry], lsn: int, ask: Ask) -> bool:
        """Mend at once what somebody has met, where the store was not beyond batch `lsn`; whether all of it is whole now."""
        left = await self._repair(store, Slice(lsn, bad, 0, None), ask, self._left)
        self._left |= set(sorted(left)[: max(0, LEFT_MAX - len(self._left))])
        return not left

    async def _step(self, store: Store, ask: Ask) -> None:
        piece: Slice = await self._run_reading(partial(read_slice, store, self._place))
        start, stop = self._place, piece.next or STOP
        known = {key for key in self._left if start <= key < stop}
        store.look_for_damage()
        if store.unreadable:
            left = {
                key for key, _ in piece.bad
            }  # nothing is written to a copy that is to be replaced, and may refuse it
            self._found += len(left - known)
        else:
            left = await self._repair(store, piece, ask, known) if piece.bad else set[bytes]()
        self._left -= known
        self._left |= set(sorted(left)[: max(0, LEFT_MAX - len(self._left))])
        self._checked += piece.size
        now = trio.current_time()
        if piece.next is None:
            self._walks += 1
            self._place = FIRST
            self._next = now + self._interval
        else:
            self._place = piece.next
            self._next = now + piece.size / self._rate

    async def _repair(self, store: Store, piece: Slice, ask: Ask, known: set[bytes]) -> set[bytes]:
        """Keys whose values stay bad."""
        self._found += sum(key not in known for key, _ in piece.bad)
        left: set[bytes] = set()
        answers = await self._ask(ask, [key for key, _ in piece.bad if may_be_asked(key)], piece.lsn)
        for key, found in piece.bad:
            answer = answers.get(key)
            if key in OWN_KEYS:
                mended = await self._run_blocking(partial(store.mend_own, key, found))
            elif not may_be_asked(key):
                store.distrust(f"record {key.hex()} is of no known kind")
                left.add(key)
                continue
            elif answer is None or not await _wait_position(store, answer.known_at):
                left.add(key)
                continue
            elif answer.value is None:
                # Nobody deleted it here, and no other copy has it: some other key may be missing in its place.
                if await self._run_blocking(partial(store.still_holds, key, found, answer.known_at)):
                    store.distrust(f"record {key.hex()} is bad, and another copy has no such record")
                    left.add(key)
                continue
            else:
                mended = await self._run_blocking(partial(store.mend, key, found, answer.value, answer.known_at))
            if mended:
                self._repaired += 1
                log.warning("record %s was bad, and is whole again", key.hex())
        for key in left - known:
            log.error("record %s is bad, and no other copy could be asked for a whole one", key.hex())
        return left

    async def _ask(self, ask: Ask, keys: list[bytes], lsn: int) -> dict[bytes, Answer]:
        """Answers of copies that were at batch `lsn`, or beyond it."""
        answers: dict[bytes, Answer] = {}
        for tried in range(TRIES):
            wanted = [key for key in keys if key not in answers]
            if not wanted:
                break
            if tried:
                await trio.sleep(PAUSE)
            try:
                got = await ask(wanted, lsn)
            except LinkBroken:
                break
            answers |= {key: answer for key, answer in got.items() if answer.known_at >= lsn}
            if got.keys() <= answers.keys():  # nobody is behind: the others are bad there, too
                break
        return answers


async def _wait_position(store: Store, lsn: int) -> bool:
    """Wait until a store has reached what a peer had reached; False when it doesn't."""
    for _ in range(TRIES):
        if store.position[1] >= lsn:
            return True
        await trio.sleep(PAUSE)
    return False
