"""The backend on LevelDB. Owns every call of plyvel and its traps; knows no key of the store but the end mark.

Traps handled here, each seen in plyvel 1.5 or LevelDB 1.22:

- An iterator that meets a bad block at the end of the database stops as if there were nothing more. So the database
  holds an *end mark*, greater than every other key; an iteration that ends before it is an error.
- A database closed under another thread's feet crashes the process; so does a snapshot that is released while it
  closes. So each reader has a lock, `write` has one, and `close` takes them all.
- Leaving a ``with write_batch()`` block by an exception writes the partial batch. So there is no such block.
- `sync` is fixed when a plyvel batch is made. A store asks for the same one nearly always, so the batch is made for
  what the last write asked for, and made again in the rare other case.

plyvel releases the GIL in `write`, `get`, and each step of an iterator; not while it closes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pybroker.errors import StoreDamaged, StoreError, StoreFormatError
from pybroker.store import ranges
from pybroker.store.backend import Change, Entry, Reader
from pybroker.store.directory import damage_text, hold_directory, locked, prepare_directory, release_directory
from pybroker.store.resident import ResidentTrim

try:
    import plyvel
except ImportError:  # CPython 3.13 and later: the fork that has wheels
    import plyvel_next as plyvel

END_MARK = b"\xff"  # on disk: do not change
END_VALUE = b"pybroker end mark"

# Measured; see FORMAT.md, "LevelDB's options".
OPTIONS: dict[str, Any] = {
    "paranoid_checks": True,
    "write_buffer_size": 4 * 1024 * 1024,  # two of these are in memory at most
    "max_open_files": 74,  # LevelDB's minimum: 64 tables, each mapped into memory as far as it was read
    "max_file_size": 1024 * 1024,  # of a table; LevelDB's minimum, to keep what is mapped small
    "lru_cache_size": 1024 * 1024,  # uncompressed blocks are read where they are mapped, not cached
    "compression": None,  # a flipped bit then costs one message, not a block; and no processor time
}
NOWHERE = b"\0"  # no key is there: compacting it only makes a table of what is in memory
COMPACT_BYTES = 32 * 1024 * 1024  # on the disk, that are compacted in one go: a close waits for it
COMPACT_DEPTH = 136  # times that a range is halved: down to single messages
TRIM_WRITES = 32  # writes between two looks at the resident memory


class LevelDBBackend:
    """A `Backend` in a directory.

    With `create` a missing or empty directory becomes a new database. With `adopt` a database without an end mark gets
    one (after a repair), where it is refused otherwise.

    Raises `StoreLocked`, `StoreDamaged`, `StoreFormatError` for a directory or database that holds something else, and
    `StoreError` for what the system refuses.
    """

    blocking = True

    def __init__(self, path: str | os.PathLike[str], *, create: bool = True, adopt: bool = False) -> None:
        self.path = Path(path)
        self.unverified_reads = 0  # iterations that had to go on without LevelDB's own checksums
        self._failed: str | None = None
        self._closed = False
        self._sync = True
        self._unsynced = False  # something was written that the disk has not been asked for
        self._write_lock = threading.Lock()
        self._compact_lock = threading.Lock()
        self._registry_lock = threading.RLock()  # a forgotten generator may end, and take it, anywhere
        self._readers: set[_Reader] = set()
        self._writes = 0
        prepare_directory(self.path, create)
        self._trim = ResidentTrim(self.path)
        self._hold = hold_directory(self.path)
        try:
            self._db: Any = _open(self.path, create)
            try:
                self._check_end_mark(adopt)
            except BaseException:
                self._db.close()
                raise
        except BaseException:
            release_directory(self._hold)
            raise

    def _check_end_mark(self, adopt: bool) -> None:
        try:
            value = self._db.get(END_MARK)
            if value == END_VALUE:
                return
            if not adopt and (value is not None or next(self._db.iterator(), None) is not None):
                raise StoreFormatError(f"{self.path} is a LevelDB database, but not a pybroker store")
            self._db.put(END_MARK, END_VALUE, sync=True)
        except plyvel.Error as error:
            raise _translated(error, self.path) from error

    # ---- writing

    def new_batch(self, changes: Sequence[Change]) -> object:
        self._check_usable()
        return _Batch(self._fill(changes, self._sync), self._sync, changes)

    def _fill(self, changes: Sequence[Change], sync: bool) -> Any:
        try:
            batch = self._db.write_batch(sync=sync)
            put = batch.put
            delete = batch.delete
            for key, value in changes:
                if value is None:
                    delete(key)
                else:
                    put(key, value)
        except RuntimeError as error:
            raise StoreError(f"the store in {self.path} is closed") from error
        return batch

    def write(self, batch: object, sync: bool) -> None:
        assert isinstance(batch, _Batch)
        with self._write_lock:
            self._check_usable()
            prepared = batch.prepared
            if batch.sync is not sync:
                self._sync = sync
                prepared = self._fill(batch.changes, sync)
            try:
                if sync and self._unsynced:
                    # LevelDB syncs the log that it writes now, and not one that it has just left behind: what is in that one is
                    # safe when the table made of it is.
                    self._db.compact_range(start=NOWHERE, stop=NOWHERE)
                prepared.write()
                self._unsynced = not sync
            except plyvel.Error as error:
                failure = _translated(error, self.path)
                self._failed = str(failure)
                raise failure from error
            self._writes += 1
            if self._writes % TRIM_WRITES == 0:
                self._trim.check()

    def _check_usable(self) -> None:
        if self._closed:
            raise StoreError(f"the store in {self.path} is closed")
        if self._failed is not None:
            raise StoreError(f"a write failed before, the store must be opened again: {self._failed}")

    # ---- reading

    def snapshot(self) -> AbstractContextManager[Reader]:
        return self._reader()

    def _reader(self) -> _Reader:
        with self._registry_lock:
            self._check_usable()
            reader = _Reader(self, self._db)
            self._readers.add(reader)
        return reader

    def reader_closed(self, reader: _Reader) -> None:
        with self._registry_lock:
            self._readers.discard(reader)
        self._trim.check()

    def get(self, key: bytes) -> bytes | None:
        with self._reader() as reader:
            return reader.get(key)

    def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        entries = self._reader().owned(start, stop)
        next(entries)  # now it closes its reader also when nobody takes an entry
        return entries

    def approximate_size(self) -> int:
        """Bytes of all files in the directory."""
        self._check_usable()
        size = 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # a table that a compaction has just removed
                    size += entry.stat().st_size
        return size

    def compact(self, start: bytes, stop: bytes) -> None:
        self._compact_piece(NOWHERE, NOWHERE)  # what is in memory goes into a table first
        for first, last in self._pieces(start, stop, 0):
            self._compact_piece(first, last)

    def _compact_piece(self, start: bytes, stop: bytes) -> None:
        with self._compact_lock:  # `close` comes in between two pieces
            if not self._closed and self._failed is None:
                self._db.compact_range(start=start, stop=stop)

    def _pieces(self, start: bytes, stop: bytes, depth: int) -> Iterator[tuple[bytes, bytes]]:
        """Parts of a range with little on the disk in each."""
        with self._compact_lock:
            if self._closed:
                return
            size = self._db.approximate_size(start, stop)
        if size <= COMPACT_BYTES or depth == COMPACT_DEPTH:
            if size:
                yield start, stop
            return
        half = ranges.middle(start, stop)
        yield from self._pieces(start, half, depth + 1)
        yield from self._pieces(half, stop, depth + 1)

    def count_unverified(self) -> None:
        with self._registry_lock:
            self.unverified_reads += 1

    def close(self) -> None:
        with self._registry_lock:
            self._closed = True
            readers = list(self._readers)
        for reader in readers:
            reader.close()
        with self._write_lock, self._compact_lock:
            self._close_database()

    def _close_database(self) -> None:
        if not self._db.closed:
            self._db.close()
            release_directory(self._hold)

    def __del__(self) -> None:
        """Forgotten rather than closed: plyvel closes it anyway, and the claim on the directory must end with that."""
        if hasattr(self, "_db"):
            self._close_database()


class _Batch:
    __slots__ = ("changes", "prepared", "sync")

    def __init__(self, prepared: Any, sync: bool, changes: Sequence[Change]) -> None:
        self.prepared = prepared
        self.sync = sync
        self.changes = changes


class _Reader:
    """A snapshot. Every call of plyvel happens under its lock, so that `close` can't come in between."""

    def __init__(self, backend: LevelDBBackend, db: Any) -> None:
        self._backend = backend
        self._path = backend.path
        self._lock = threading.RLock()  # a forgotten generator may be collected, and closed, while it is held
        self._snapshot: Any = db.snapshot()

    def __enter__(self) -> _Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        self._backend.reader_closed(self)

    def close(self) -> None:
        with self._lock:
            self._snapshot = (
                None  # releases it, under the lock; iterators of it are closed with the database, or by their generator
            )

    def _check_open(self) -> None:
        """To be called under the lock. No local name may hold the snapshot: outside of the lock its end is a crash."""
        if self._snapshot is None:
            raise StoreError(f"the store in {self._path} is closed")

    def get(self, key: bytes) -> bytes | None:
        with self._lock:
            self._check_open()
            try:
                value: bytes | None = self._snapshot.get(key, verify_checksums=True)
            except plyvel.Error:
                self._backend.count_unverified()
                try:  # the damage may be elsewhere in the block: the value's own checksum decides
                    value = self._snapshot.get(key)
                except plyvel.Error as error:
                    raise _damaged(error, self._path) from error
            return value

    def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        lock = self._lock
        iterator: Any = None
        verified = True
        try:
            while True:
                with lock:
                    self._check_open()
                    try:
                        if iterator is None:
                            iterator = self._snapshot.iterator(start=start, verify_checksums=verified)
                        key, value = next(iterator)
                    except StopIteration:
                        raise StoreDamaged(damage_text("the end mark was not met", self._path)) from None
                    except plyvel.Error as error:
                        if not verified:
                            raise _damaged(error, self._path) from error
                        # Go on where it stopped: the values' own checksums say which of them are whole.
                        verified = False
                        self._backend.count_unverified()
                        if iterator is not None:
                            iterator.close()
                            iterator = None
                        continue
                if key >= stop:
                    return
                yield key, value
                start = key + b"\0"
        finally:
            if iterator is not None:
                with lock:
                    iterator.close()

    def owned(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        """Something to start with, the entries, then close the reader."""
        with self:
            yield b"", b""
            yield from self.iterate(start, stop)


# ---- whole directories


def repair(path: Path) -> None:
    """LevelDB's own repair, in place: only ever for a copy. Raises `StoreDamaged` when that fails, too."""
    hold = hold_directory(path)
    try:
        plyvel.repair_db(str(path), **(OPTIONS | {"paranoid_checks": False}))
    except plyvel.Error as error:
        raise _damaged(error, path) from error
    finally:
        release_directory(hold)


def destroy(path: Path) -> None:
    """Remove a database's files, if nobody has it open; raises `StoreLocked` if somebody has."""
    hold = hold_directory(path)
    try:
        plyvel.destroy_db(str(path))
    except plyvel.Error as error:
        raise _translated(error, path) from error
    finally:
        release_directory(hold)


# ---- errors


def _open(path: Path, create: bool) -> Any:
    try:
        return plyvel.DB(str(path), create_if_missing=create, **OPTIONS)
    except plyvel.Error as error:
        raise _translated(error, path) from error


def _text(error: Exception) -> str:
    """What LevelDB said: plyvel shows it as the text of a bytes object."""
    said = error.args[0] if error.args else ""
    return said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)


def _translated(error: Exception, path: Path) -> StoreError:
    text = _text(error)
    if isinstance(error, plyvel.IOError):
        if "lock " in text and ("already held" in text or "temporarily unavailable" in text):
            return locked(path)
        return StoreError(f"the store in {path}: {text}")
    if isinstance(error, plyvel.CorruptionError):
        return _damaged(error, path)
    if "comparator" in text:
        return StoreFormatError(f"{path} is a LevelDB database, but not a pybroker store: {text}")
    return StoreError(f"the store in {path}: {text}")


def _damaged(error: Exception, path: Path) -> StoreDamaged:
    return StoreDamaged(damage_text(_text(error), path))
