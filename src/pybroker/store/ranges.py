"""Ranges of keys: halving them, and reading one in spite of places that LevelDB can't read. Owns the search for where to go on.

Follows DESIGN.md section 4: damage costs what is damaged, not what lies behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pybroker.errors import StoreDamaged
from pybroker.store.backend import Entry, Reader

KEY_BYTES = 26  # one more than the longest key: keys are compared as numbers of this many bytes

OnDamage = Callable[
    [bytes, bytes, StoreDamaged], None
]  # (first key that is unknown, first key that is read again, why)


def iterate_whole(reader: Reader, start: bytes, stop: bytes, on_damage: OnDamage) -> Iterator[Entry]:
    """The entries of a range; unreadable places are reported and passed over."""
    while start < stop:
        try:
            for entry in reader.iterate(start, stop):
                start = entry[0] + b"\0"
                yield entry
            return
        except StoreDamaged as error:
            behind = _behind_damage(reader, start, stop)
            on_damage(start, behind, error)
            start = behind


def _behind_damage(reader: Reader, start: bytes, stop: bytes) -> bytes:
    """The first key above `start` from which can be read again, or `stop`: by doubling steps, then by halves."""
    bad = _number(start)
    end = _number(stop)
    step = 1
    while bad + step < end and not _readable(reader, _key(bad + step), stop):
        step *= 2
    good = min(bad + step, end)
    while good - bad > 1:
        half = (bad + good) // 2
        if _readable(reader, _key(half), stop):
            good = half
        else:
            bad = half
    return stop if good == end else _key(good)


def middle(start: bytes, stop: bytes) -> bytes:
    """A key about halfway between two."""
    return _key((_number(start) + _number(stop)) // 2)


def _number(key: bytes) -> int:
    return int.from_bytes(key[:KEY_BYTES].ljust(KEY_BYTES, b"\0"), "big")


def _key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def _readable(reader: Reader, start: bytes, stop: bytes) -> bool:
    try:
        next(reader.iterate(start, stop), None)
    except StoreDamaged:
        return False
    return True
