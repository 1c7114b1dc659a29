"""The directory that a LevelDB database lives in. Owns its making, its claim by this process, and what belongs in it.

Two traps of LevelDB 1.22 are kept away from here:

- A second open of a directory in one process fails, but drops the first one's lock against other processes (LevelDB
  closes a descriptor of the lock file, and POSIX locks end with any of them). So what is open is known here as well.
- LevelDB without its CURRENT file makes a new database and *deletes* the tables of the old one. So that is refused.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

from pybroker.errors import StoreDamaged, StoreError, StoreFormatError, StoreLocked

DIRECTORY_MODE = 0o700  # messages are nobody else's business
SPOOL_MARKER = "PYBROKER-SPOOL"  # a file of ours that may lie beside LevelDB's; see spool.py

# Directories (device, inode) that this process has open. Global because the locks are the process's, not a broker's.
_held: set[tuple[int, int]] = set()
_held_lock = threading.Lock()

_OURS = re.compile(SPOOL_MARKER + r"|CURRENT|LOCK|LOG|LOG\.old|MANIFEST-\d+|\d+\.(log|ldb|sst|dbtmp)")
_DATA = re.compile(r"\d+\.(log|ldb|sst)")


def prepare_directory(path: Path, create: bool) -> None:
    """Make sure that LevelDB can open it, or with `create` make a new database in it, without harm to what is there."""
    try:
        names = {entry.name for entry in path.iterdir()}
    except FileNotFoundError:
        if not create:
            raise StoreError(f"there is no store in {path}") from None
        make_directory(path)
        return
    except OSError as error:
        raise StoreError(f"the store's directory {path} can't be read: {error.strerror}") from error
    if "CURRENT" in names:
        return
    if any(_DATA.fullmatch(name) for name in names):
        raise StoreDamaged(damage_text("its CURRENT file is missing", path))
    if not create:
        raise StoreError(f"there is no store in {path}")
    foreign = sorted(name for name in names if not is_ours(name))
    if foreign:
        raise StoreFormatError(f"{path} is not a store, and not empty: it has {foreign[0]!r}")


def make_directory(path: Path) -> None:
    """Make it and its parents, durably."""
    try:
        missing = [path, *(parent for parent in path.absolute().parents if not parent.exists())]
        for directory in reversed(missing):
            directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            descriptor = os.open(directory.absolute().parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise StoreError(f"the store's directory {path} can't be made: {error.strerror}") from error


def holds_data(path: Path) -> bool:
    """Whether there is a database in a directory, or what is left of one."""
    return any(entry.name == "CURRENT" or _DATA.fullmatch(entry.name) for entry in path.iterdir())


def is_ours(name: str) -> bool:
    """Whether a file of that name can be LevelDB's, or a marker of ours."""
    return _OURS.fullmatch(name) is not None


def hold_directory(path: Path) -> tuple[int, int]:
    """Claim a directory for this process; raise `StoreLocked` if it has it open already."""
    status = path.stat()
    identity = status.st_dev, status.st_ino
    with _held_lock:
        if identity in _held:
            raise locked(path)
        _held.add(identity)
    return identity


def release_directory(identity: tuple[int, int]) -> None:
    """Give a claim back."""
    with _held_lock:
        _held.discard(identity)


def locked(path: Path) -> StoreLocked:
    """The error for a directory that is in use."""
    return StoreLocked(
        f"the store in {path} is open already, in another process or in another broker of this one: "
        "stop that one, or use another data directory"
    )


def damage_text(what: str, path: Path) -> str:
    """What is wrong, and how to go on."""
    directory = path.parent if path.name == "store" else path
    return f"the store in {path} is damaged: {what}; `pybroker store salvage {directory} NEWDIR` copies what is whole"
