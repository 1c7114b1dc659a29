"""The copies of a replica's store: the current one, and a side copy that a difference is written into. Owns the swap.

Follows DESIGN.md section 5, rules 9 and 10. The current copy stands as it is until one rename makes the side copy the
current one; a crash at any point leaves the old whole copy or the new whole copy. What the copies hold is not looked at here.

LevelDB's table files never change, so a side copy shares them by hard links: it costs no space when it is made, and
as much as is written into it (at most the store once more) until the old copy is removed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from pybroker.errors import ConfigurationError, StoreDamaged, StoreError, StoreFormatError
from pybroker.store.directory import holds_data, is_ours, locked, make_directory
from pybroker.store.files import TEMPORARY, Files
from pybroker.store.layout import (
    IDENTITY_FILE,
    LOCK_FILE,
    POINTER_FILE,
    STORE_DIRECTORY,
    Identity,
    copy_name,
    copy_number,
    current_name,
    encode_identity,
    read_identity,
)
from pybroker.store.leveldb import LevelDBBackend
from pybroker.store.memory_copies import MemoryCopies
from pybroker.store.store import Store, write_beginning

__all__ = ["Copies", "DiskCopies", "Identity", "MemoryCopies", "remove_copies"]

NewIncarnation = Callable[[], str]  # a random name for a new copy


class Copies(Protocol):
    """The copies of one replica. Everything blocks, and is called from one thread at a time.

    One store is open at a time. After any error none may be: `abandon_side` opens the current copy again.
    """

    @property
    def identity(self) -> Identity:
        """Which copy this is; after `open`."""
        ...

    def open(self) -> Store:
        """Open the current copy at a start of the replica; remove what a crash has left.

        A copy that is new, or is not the one that the identity knows, gets a new incarnation. Raises
        `ConfigurationError` when it belongs to another replica, `StoreLocked`, `StoreDamaged`, `StoreFormatError`,
        `StoreError`.
        """
        ...

    def begin_side(self, store: Store, empty: bool = False) -> Store:
        """Close the current copy and open a side copy that holds the same; or nothing, where it can't be read."""
        ...

    def swap(self, side: Store) -> Store:
        """Make the side copy, which is whole now, the current one, durably, and open it; then remove the old one."""
        ...

    def abandon_side(self, side: Store | None = None) -> Store:
        """Remove the side copy, if there is one, and open the current copy."""
        ...

    def count_start(self) -> None:
        """Raise the start counter, durably: once in a life, when the slot was seen, and before it is written."""
        ...

    def renew(self) -> None:
        """Take a new incarnation: the store stays, but the set must not count on what it holds."""
        ...

    def start_anew(self) -> Store:
        """Take a new incarnation and an empty store, for a copy that will not open. What it held is removed."""
        ...

    def close(self) -> None:
        """Close what is open and let go of the directory. Idempotent."""
        ...


class DiskCopies:
    """`Copies` in a data directory; see `layout.py` for what lies there."""

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        set_name: str,
        name: str,
        new_incarnation: NewIncarnation,
        files: Files | None = None,
    ) -> None:
        self.data_dir = Path(data_dir)
        self._set = set_name
        self._name = name
        self._new_incarnation = new_incarnation
        self._files = files or Files()
        self._identity: Identity | None = None
        self._lock: int | None = None
        self._store: Store | None = None  # the one that is open
        self._side: str | None = None  # the name of the side copy, if that is the one

    @property
    def identity(self) -> Identity:
        if self._identity is None:
            raise StoreError("the identity is not known before the copies are opened")
        return self._identity

    # ---- opening

    def open(self) -> Store:
        self._claim()
        self._close_store()
        identity = self._read_identity()
        try:
            name = current_name(self.data_dir)
            there = self._is_there(name)
            if not there and name != STORE_DIRECTORY:
                raise StoreDamaged(f"the current copy {self.data_dir / name} of the store is missing")
            if identity is None or not there:
                # New, or what it had is gone. The new name is durable before anything is made under it.
                identity = Identity(self._set, self._name, self._new_incarnation(), identity.starts if identity else 0)
            self._write_identity(identity)
            store = self._open_current(name, create=not there)
            try:
                self._remember(store)
                self._remove_all_but(name)
            except BaseException:
                self._close_store()
                raise
        except OSError as error:
            raise self._translated(error) from error
        return store

    def _read_identity(self) -> Identity | None:
        identity = read_identity(self.data_dir)
        if identity is not None and (identity.set, identity.name) != (self._set, self._name):
            raise ConfigurationError(
                f"{self.data_dir} belongs to replica {identity.name!r} of set {identity.set!r}, not to {self._name!r} "
                f"of {self._set!r}: use that name, or another data directory"
            )
        return identity

    def _remember(self, store: Store) -> None:
        """Bind identity and store. Another store, or an older state of it, in its place makes it another copy."""
        identity = self.identity
        if identity.store_id and (store.store_id != identity.store_id or store.starts <= identity.opened):
            identity = replace(identity, incarnation=self._new_incarnation())
        self._write_identity(replace(identity, store_id=store.store_id, opened=store.starts))

    def _is_there(self, name: str) -> bool:
        """Whether a directory holds a database, or what is left of one: not what LevelDB makes before it has one."""
        path = self.data_dir / name
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise StoreFormatError(f"{path} is not a copy of the store: it is not a directory")
        return path.is_dir() and holds_data(path)

    def _open_current(self, name: str, create: bool = False) -> Store:
        self._store = _open_store(self.data_dir / name, create)
        self._side = None
        return self._store

    # ---- the side copy

    def begin_side(self, store: Store, empty: bool = False) -> Store:
        self._expect(store, side=False)
        try:
            name = current_name(self.data_dir)
            self._close_store()  # nothing changes the files now
            self._remove_all_but(name)
            side = copy_name((copy_number(name) or 0) + 1)
            if empty:
                self._begin(self.data_dir / side, store)
            else:
                self._copy(self.data_dir / name, self.data_dir / side)
            self._store = _open_store(self.data_dir / side, create=False)
            self._side = side
        except OSError as error:
            raise self._translated(error) from error
        return self._store

    def _begin(self, target: Path, store: Store) -> None:
        """A copy that holds nothing yet, under the identity of `store`."""
        self._files.make_directory(target)
        backend = LevelDBBackend(target, create=True)
        try:
            write_beginning(backend, store.store_id, store.starts)
        finally:
            backend.close()

    def _copy(self, source: Path, target: Path) -> None:
        self._files.make_directory(target)
        for path in sorted(source.iterdir()):
            if (
                path.is_symlink()
                or not path.is_file()
                or not is_ours(path.name)
                or path.name in ("LOCK", "LOG", "LOG.old")
            ):
                continue
            if path.suffix in (".ldb", ".sst"):
                self._files.link_or_copy(path, target / path.name)
            else:
                self._files.copy(path, target / path.name)

    def swap(self, side: Store) -> Store:
        self._expect(side, side=True)
        name = self._side
        assert name is not None
        try:
            self._close_store()
            # LevelDB does not sync a log that it has left behind, so a synced last write would not be enough.
            directory = self.data_dir / name
            for path in sorted(directory.iterdir()):
                self._files.sync(path)
            self._files.sync(directory)
            self._files.sync(self.data_dir)
            self._files.replace(self.data_dir / POINTER_FILE, name.encode() + b"\n")
            store = self._open_current(name)
            self._remove_all_but(name)
        except OSError as error:
            raise self._translated(error) from error
        return store

    def abandon_side(self, side: Store | None = None) -> Store:
        try:
            self._close_store()
            name = current_name(self.data_dir)
            store = self._open_current(name)
            self._remove_all_but(name)
        except OSError as error:
            raise self._translated(error) from error
        return store

    def _expect(self, store: Store, side: bool) -> None:
        if store is not self._store or (self._side is not None) is not side:
            raise StoreError(f"that store is not the {'side copy' if side else 'current copy'} that is open")

    # ---- new copies

    def count_start(self) -> None:
        try:
            self._write_identity(replace(self.identity, starts=self.identity.starts + 1))
        except OSError as error:
            raise self._translated(error) from error

    def renew(self) -> None:
        try:
            self._write_identity(replace(self.identity, incarnation=self._new_incarnation()))
        except OSError as error:
            raise self._translated(error) from error

    def start_anew(self) -> Store:
        self._claim()
        self._close_store()
        try:
            identity = self._read_identity() or Identity(self._set, self._name, "")
            self._write_identity(
                Identity(self._set, self._name, self._new_incarnation(), identity.starts)
            )  # first: from now on nobody counts on what is removed
            if (self.data_dir / POINTER_FILE).exists():
                self._files.unlink(self.data_dir / POINTER_FILE)
                self._files.sync(self.data_dir)
            self._remove_all_but(None)
            store = self._open_current(STORE_DIRECTORY, create=True)
            self._remember(store)
        except OSError as error:
            raise self._translated(error) from error
        return store

    def _write_identity(self, identity: Identity) -> None:
        self._files.replace(self.data_dir / IDENTITY_FILE, encode_identity(identity))
        self._identity = identity

    # ---- removing

    def _remove_all_but(self, current: str | None) -> None:
        """What is not the current copy: only ever files of LevelDB's names in directories of ours."""
        left = [path for path in sorted(self.data_dir.iterdir()) if copy_number(path.name) is not None]
        left = [path for path in left if path.name != current and path.is_dir() and not path.is_symlink()]
        if left:
            self._files.sync(self.data_dir)  # the pointer that says so must not be lost after what it does not name
        for directory in left:
            _remove_copy(self._files, directory)
        for name in (POINTER_FILE + TEMPORARY, IDENTITY_FILE + TEMPORARY):
            if (self.data_dir / name).exists():
                self._files.unlink(self.data_dir / name)

    # ---- the claim

    def _claim(self) -> None:
        """One process, and one object in it: while a side copy is open nothing holds LevelDB's lock of the current one."""
        if self._lock is None:
            make_directory(self.data_dir)
            self._lock = _lock(self.data_dir)

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()
        self._store = None
        self._side = None

    def close(self) -> None:
        self._close_store()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:
            self.close()

    def _translated(self, error: OSError) -> StoreError:
        return StoreError(f"the copies of the store in {self.data_dir}: {error}")


def remove_copies(data_dir: str | os.PathLike[str], files: Files | None = None) -> None:
    """Remove what a replica that is given up has left: all copies, then pointer and identity. Blocking; final.

    Leaves anything else in the directory alone. Raises `StoreLocked` when it is in use, `StoreError`.
    """
    directory = Path(data_dir)
    files = files or Files()
    if not directory.is_dir():
        return
    lock = _lock(directory)
    try:
        # The identity goes first: an interrupted removal must not leave a copy that the set counts on.
        for name in (IDENTITY_FILE, IDENTITY_FILE + TEMPORARY, POINTER_FILE, POINTER_FILE + TEMPORARY):
            if (directory / name).exists():
                files.unlink(directory / name)
                files.sync(directory)
        for path in sorted(directory.iterdir()):
            if copy_number(path.name) is not None and path.is_dir() and not path.is_symlink():
                _remove_copy(files, path)
        files.unlink(directory / LOCK_FILE)
        files.sync(directory)
    except OSError as error:
        raise StoreError(f"the copies of the store in {directory} can't be removed: {error}") from error
    finally:
        os.close(lock)


def _open_store(path: Path, create: bool) -> Store:
    backend = LevelDBBackend(path, create=create)
    try:
        return Store.open(backend)
    except BaseException:
        backend.close()
        raise


def _remove_copy(files: Files, directory: Path) -> None:
    foreign = sorted(path.name for path in directory.iterdir() if not is_ours(path.name))
    if foreign:
        raise StoreFormatError(
            f"{directory} is not only a copy of the store: it has {foreign[0]!r}; nothing was removed"
        )
    # CURRENT goes first: without it the directory can't be taken for a store again.
    for path in sorted(directory.iterdir(), key=lambda path: (path.name != "CURRENT", path.name)):
        files.unlink(path)
    files.remove_directory(directory)


def _lock(directory: Path) -> int:
    """Claim a data directory: `flock` belongs to the descriptor, so it also tells two brokers of one process apart."""
    try:
        descriptor = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StoreError(f"{directory / LOCK_FILE} can't be made: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise locked(directory) from None
    return descriptor
