"""The disk of a simulated machine: what is on it, how it fails, and what it looks like after a crash. Owns the copies of one member.

Every copy keeps a *fingerprint* of all that is in it, whatever the order in which it came: two stores at one position must have
the same one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pybroker.errors import StoreError
from pybroker.store import format as fmt
from pybroker.store.backend import Change
from pybroker.store.copies import MemoryCopies
from pybroker.store.layout import Identity
from pybroker.store.store import Store
from tests.store.forgetful import ForgetfulBackend

OWN_KEYS = (fmt.META_KEY, fmt.POSITION_KEY)  # each copy's own, or known beside the content
MASK = (1 << 64) - 1
FLIPPED = (fmt.MESSAGE,)  # kinds of records of which bits are flipped; others have ways of their own
NAME = re.compile(rb"([a-z]\d-\d+)\|")  # of a message, at the beginning of its body


class SimBackend(ForgetfulBackend):
    """A backend of a disk. `damaged`: bits of it were flipped."""

    def __init__(self, disk: Disk, synced: dict[bytes, bytes] | None = None) -> None:
        super().__init__(synced)
        self.disk = disk
        self.damaged = False
        self.closed = False
        self.fingerprint = sum(map(hash, ((key, value) for key, value in self.synced.items() if key not in OWN_KEYS)))

    @property
    def position(self) -> tuple[int, int]:
        value = self._inner.get(fmt.POSITION_KEY)
        return (0, 0) if value is None else fmt.decode_pair(fmt.POSITION_KEY, value)

    @property
    def history(self) -> list[tuple[int, int]]:
        """``(epoch, first lsn)``, rising."""
        entries = self._inner.iterate(bytes((fmt.HISTORY,)), bytes((fmt.HISTORY + 1,)))
        return [(fmt.parse_key(key)[1], fmt.decode_number(key, value)) for key, value in entries]

    def write(self, batch: object, sync: bool) -> None:
        disk = self.disk
        if disk.full or disk.fails > 0:
            disk.fails = max(0, disk.fails - 1)
            self.fail_write = self.writes + 1
            disk.count("writes failed")
        changes: Sequence[Change] = batch  # type: ignore[assignment]
        moved = 0
        seen: dict[bytes, bytes | None] = {}
        for key, value in changes:
            if key in OWN_KEYS:
                continue
            old = seen[key] if key in seen else self._inner.get(key)
            if old is not None:
                moved -= hash((key, old))
            if value is not None:
                moved += hash((key, value))
            seen[key] = value
        super().write(batch, sync)
        self.fingerprint += moved
        disk.written(self)

    def crash(self, keep: int = 0, keep_failed: bool = False) -> SimBackend:
        plain = super().crash(keep, keep_failed)
        after = SimBackend(self.disk, plain.synced)
        after.damaged = self.damaged
        return after

    def set(self, key: bytes, value: bytes | None) -> None:
        old = self._inner.get(key)
        super().set(key, value)
        if key not in OWN_KEYS:
            self.fingerprint += (hash((key, value)) if value is not None else 0) - (
                hash((key, old)) if old is not None else 0
            )
        self.damaged = True


class SimCopies(MemoryCopies):
    """The copies of one life of a process."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        super().__init__(disk.set_name, disk.name, disk.new_incarnation, lambda: SimBackend(disk))
        if disk.identity is not None:
            self._identity = disk.identity
            self.backend = disk.backend

    def open(self) -> Store:
        self._reread()
        return super().open()

    def _open_current(self) -> Store:
        self._reread()
        return super()._open_current()

    def _reread(self) -> None:
        """After a failed write the system gives back what is on the disk, or in its memory."""
        backend = self.backend
        assert isinstance(backend, SimBackend)
        if backend.failed is not None:
            self._close_store()
            self.backend = self.disk.reread(backend)

    def swap(self, side: Store) -> Store:
        store = super().swap(side)
        backend = self.backend
        assert isinstance(backend, SimBackend)
        self.disk.count("side copies swapped in")
        self.disk.written(backend)
        return store


class Backup(NamedTuple):
    """A copy of a disk."""

    identity: Identity
    state: dict[bytes, bytes]


class Disk:
    """What outlives a process. `watch` is told of every state of the current copy: position and fingerprint."""

    def __init__(
        self,
        set_name: str,
        name: str,
        rng: random.Random,
        count: Callable[[str], None],
        watch: Callable[[str, tuple[int, int], int], None],
        bits_flip: Callable[[], bool],
    ) -> None:
        self.set_name = set_name
        self.name = name
        self.rng = rng
        self.count = count
        self.watch = watch
        self.bits_flip = bits_flip  # whether any bit was flipped in this run
        self.seconds = 0.001  # of a call
        self.slow = 0.0  # chance of a call that takes up to `slow_seconds`
        self.slow_seconds = 0.5
        self.full = False
        self.fails = 0  # so many writes fail
        self.forgets = True  # unsynced writes may be lost with the process: a machine that loses power
        self.identity: Identity | None = None
        self.lost = ""  # the incarnation whose disk was lost, though a copy of an earlier time has that name
        self.backend = SimBackend(self)
        self.copies: SimCopies | None = None

    def new_incarnation(self) -> str:
        return f"{self.rng.getrandbits(32):08x}"

    def latency(self) -> float:
        seconds = self.rng.uniform(0.3, 1.7) * self.seconds
        if self.slow and self.rng.random() < self.slow:
            seconds += self.rng.uniform(0, self.slow_seconds)
        return seconds

    def written(self, backend: SimBackend) -> None:
        """A write was done: a side copy's is nobody's business before it is swapped in."""
        copies = self.copies
        if copies is not None and copies.backend is backend and not self.is_damaged(backend):
            self.watch(self.name, backend.position, backend.fingerprint & MASK)

    def is_damaged(self, backend: SimBackend) -> bool:
        """Whether it holds bad values: its own, or what it was sent of another damaged copy."""
        if self.bits_flip():
            entries = backend._inner.iterate(b"\0", bytes((fmt.END,)))
            backend.damaged = any(not fmt.is_whole(key, value) for key, value in entries)
        return backend.damaged

    def reread(self, backend: SimBackend) -> SimBackend:
        kept = len(backend.unsynced)
        if self.forgets:
            kept = self.rng.randint(0, kept)
        return backend.crash(kept, self.rng.random() < 0.5)

    # ---- lives

    def insert(self) -> SimCopies:
        """The copies, for a new life of the process."""
        self.copies = SimCopies(self)
        return self.copies

    def remove(self) -> None:
        """The process is gone: what of its copies is on the disk stays."""
        copies = self.copies
        if copies is not None:
            assert isinstance(copies.backend, SimBackend)
            self.identity = copies.identity
            self.backend = self.reread(copies.backend)
            self.copies = None

    # ---- what befalls a disk while no process uses it

    def wipe(self) -> None:
        self.identity = None
        self.backend = SimBackend(self)

    def back_up(self) -> Backup | None:
        if self.copies is None:
            return None
        assert isinstance(self.copies.backend, SimBackend)
        return Backup(self.copies.identity, dict(self.copies.backend.synced))

    def restore(self, backup: Backup) -> None:
        self.lost = backup.identity.incarnation
        self.identity = backup.identity
        self.backend = SimBackend(self, dict(backup.state))

    # ---- at any time

    def messages(self) -> list[str]:
        """The names in the bodies of all whole messages of the current copy, where bits were flipped: some are not delivered."""
        if not self.bits_flip():
            return []
        backend: Any = self.copies.backend if self.copies is not None else self.backend
        entries = backend._inner.iterate(bytes((fmt.MESSAGE,)), bytes((fmt.MESSAGE + 1,)))
        found = [NAME.search(value) for key, value in entries if fmt.is_whole(key, value)]
        return [match[1].decode() for match in found if match]

    def flip_bit(self) -> str:
        """Flip a bit of some record of the current copy; what was hit, "" if there is nothing."""
        backend: Any = self.copies.backend if self.copies is not None else self.backend
        keys = sorted(key for key in backend.synced if key[0] in FLIPPED)
        if not keys:
            return ""
        key = self.rng.choice(keys)
        value = backend.synced[key]
        try:
            if backend.get(key) != value:
                return ""  # deleted, or changed, by a batch that is not synced
        except StoreError:
            return ""
        backend.flip(key, self.rng.randrange(len(value) * 8))
        return key.hex()
