"""What a replica's data directory holds beside its store: the identity, and the pointer to the current copy.

Follows DESIGN.md section 5, rules 9 and 10. Owns these two files, their reading and what is refused of them; the copies
themselves are `copies.py`'s business.

    DIR/identity      JSON: whose copy this is. Lies outside of the copied store: a copy of a store is no second replica
    DIR/current       the name of the current copy's directory; without this file it is ``store``
    DIR/store         the first copy
    DIR/copy-NUMBER   later ones, made to catch up by difference
    DIR/lock          held by the process that uses the directory
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from pybroker.errors import StoreDamaged, StoreError, StoreFormatError

IDENTITY_FILE = "identity"
POINTER_FILE = "current"
LOCK_FILE = "lock"
STORE_DIRECTORY = "store"  # of a broker's data directory
FILE_BYTES_MAX = 4096  # of identity and pointer

_COPY = re.compile(r"copy-([1-9][0-9]{0,8})")
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """Which copy of which replica this is.

    set          the replica set's name
    name         the replica's name in it
    incarnation  random: names the copy. A new one is a learner, whatever it holds
    starts       how many of its lives came to write the replica's slot; raised on the disk before that (`Copies.count_start`),
                 and by no start that has not seen the slot: or an old copy would outgrow it by being started
    store_id     of the store that belongs to it, and how often that had been opened: another store in its place, or an
    opened       older copy of it, is not the one that the set counts on
    """

    set: str
    name: str
    incarnation: str
    starts: int = 0
    store_id: str = ""
    opened: int = 0


def copy_name(number: int) -> str:
    return f"copy-{number}"


def copy_number(name: str) -> int | None:
    """Of a name of a copy's directory (``store`` is 0); None for any other name."""
    if name == STORE_DIRECTORY:
        return 0
    found = _COPY.fullmatch(name)
    return int(found[1]) if found else None


def current_name(data_dir: Path) -> str:
    """The name of the current copy's directory. Blocking.

    Raises `StoreFormatError` for a pointer to anything else than a copy's directory, `StoreError` if it can't be read.
    """
    text = _read(data_dir / POINTER_FILE)
    if text is None:
        return STORE_DIRECTORY
    name = text.removesuffix("\n")
    if copy_number(name) is None:
        raise StoreFormatError(f"{data_dir / POINTER_FILE} says {name[:40]!r}, which is no copy of the store")
    return name


def encode_identity(identity: Identity) -> bytes:
    return json.dumps({"format": _FORMAT} | asdict(identity), indent=1).encode() + b"\n"


def read_identity(data_dir: Path) -> Identity | None:
    """The identity in a data directory, or None. Blocking.

    Raises `StoreDamaged` for a file that does not parse, `StoreFormatError` for a later format, `StoreError`.
    """
    path = data_dir / IDENTITY_FILE
    text = _read(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
        if found.pop("format") != _FORMAT:
            raise StoreFormatError(f"{path} is of a later version of pybroker")
        identity = Identity(**found)
        for name in ("set", "name", "incarnation", "store_id"):
            if not isinstance(getattr(identity, name), str):
                raise TypeError(f"{name} is no text")
        for name in ("starts", "opened"):
            number = getattr(identity, name)
            if type(number) is not int or number < 0:
                raise ValueError(f"{name} is no number")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreDamaged(
            f"{path} can't be read ({error}): remove it, and the replica takes part as a new copy"
        ) from error
    return identity


def _read(path: Path) -> str | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StoreError(f"{path} can't be read: {error.strerror}") from error
    try:
        with os.fdopen(descriptor, "rb") as file:
            return file.read(FILE_BYTES_MAX).decode("utf-8", "replace")
    except OSError as error:
        raise StoreError(f"{path} can't be read: {error.strerror}") from error
