"""The spool: a second store for non-durable messages that did not fit into memory. Owns its making and its removal.

What is in it is discarded at open, so removing a directory is this file's business: it removes only what it has
marked as a spool, and of that only files with LevelDB's names.
"""

from __future__ import annotations

import os
from pathlib import Path

from pybroker.errors import StoreError, StoreFormatError
from pybroker.store.directory import DIRECTORY_MODE, SPOOL_MARKER, is_ours
from pybroker.store.leveldb import LevelDBBackend, destroy
from pybroker.store.store import Store

MARKER = SPOOL_MARKER  # an empty file beside LevelDB's: this directory holds nothing that must be kept


def open_spool(path: str | os.PathLike[str]) -> Store:
    """Discard what is in the spool's directory and open an empty store there. Blocking.

    Write to it with ``sync=False``. Raises what `discard` and `Store.open` raise.
    """
    directory = Path(path)
    discard(directory)
    try:
        directory.mkdir(mode=DIRECTORY_MODE, parents=True)
        (directory / MARKER).touch()
    except OSError as error:
        raise StoreError(f"the spool {directory} can't be made: {error.strerror}") from error
    return Store.open(LevelDBBackend(directory))


def discard(path: str | os.PathLike[str]) -> None:
    """Remove a spool's directory; nothing to do when there is none. Blocking.

    Raises `StoreFormatError` for anything but a spool (a store, a link, a directory with other files), `StoreLocked`
    when somebody has it open.
    """
    directory = Path(path)
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise StoreFormatError(f"{directory} is not a spool: it is not a directory")
    try:
        names = {entry.name for entry in directory.iterdir()}
    except FileNotFoundError:
        return
    foreign = sorted(name for name in names if not is_ours(name))
    if foreign:
        raise StoreFormatError(f"{directory} is not a spool: it has {foreign[0]!r}; nothing was removed")
    if names and MARKER not in names:
        raise StoreFormatError(f"{directory} is not a spool: it has no {MARKER}; nothing was removed")
    try:
        if len(names) > 1:
            destroy(directory)
        (directory / MARKER).unlink(missing_ok=True)  # last: until then the directory is known as a spool
        directory.rmdir()
    except OSError as error:
        raise StoreError(f"the spool {directory} can't be removed: {error.strerror}") from error
