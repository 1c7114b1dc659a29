"""Comparing two stores by difference. Owns the chunks that a walk is cut into, their digests, and what replaces them.

Follows DESIGN.md section 5, rule 9. The leader walks a snapshot and sends a digest per chunk; the follower compares them
with what its side copy has in the same *ranges of keys*, and asks for the chunks that differ. The ranges of a walk follow
each other without gaps, from the first possible key to the last: keys that only the follower has are found, too.

Everything is compared but META, which says which copy a store is. POSITION, ids, history and fences are content like any
other: a side copy is a store of the leader's snapshot once all chunks are replaced, and of nothing at all before that.
`Store.reload` reads them then. Pure over a `Reader`; `replace` alone writes, and does not sync: `Copies.swap` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain, pairwise
from struct import pack
from typing import NamedTuple

from pybroker.errors import CorruptRecord, ProtocolError
from pybroker.store import format as fmt
from pybroker.store.backend import Change, Entry, Reader
from pybroker.store.store import Store

FIRST = b"\0"  # where a walk starts: no key is below
STOP = bytes((fmt.END,))  # where it ends
DIGEST_BYTES = 16

# Measured: of a million messages of 256 bytes that differ in 1,000 scattered ones, 3.1 % of the data moves at this size, a
# quarter of it digests (and 0.7 % when nothing differs); 2.6 % at half the size (1.4 %), 5.1 % at twice the size (0.35 %).
CHUNK_BYTES = 8 * 1024  # keys and values of a chunk; the entry that passes it is still in
CHUNK_COUNT = 64  # keys of a chunk

BATCH_CHANGES_MAX = 1_000  # of one write
BATCH_BYTES_MAX = 4 * 1024 * 1024

_BEHIND_META = fmt.META_KEY + b"\0"


class ChunkDigest(NamedTuple):
    """The keys ``start <= key < stop`` (but META): how many, and a digest of them and their values."""

    start: bytes
    stop: bytes
    digest: bytes
    count: int  # type: ignore[assignment]  # the name of a method of tuples that nobody misses here


class Replaced(NamedTuple):
    """What `replace` did: keys written and deleted, bytes written, and keys whose new value was bad and was not taken."""

    puts: int
    deletes: int
    written: int
    kept: tuple[bytes, ...] = ()


def digests(
    reader: Reader,
    start: bytes,
    bytes_max: int,
    count_max: int,
    *,
    stop: bytes = STOP,
    chunk_bytes: int = CHUNK_BYTES,
    chunk_count: int = CHUNK_COUNT,
) -> tuple[list[ChunkDigest], bytes | None]:
    """The next chunks of a walk that began at FIRST, and where it goes on, or None at its end. Blocking.

    Ends with the chunk that brings it to `bytes_max` bytes of keys and values, or to `count_max` chunks. Use one snapshot for the
    whole walk. Raises `StoreDamaged` at a place that can't be read.
    """
    chunks: list[ChunkDigest] = []
    keys: list[bytes] = []
    values: list[bytes] = []
    size = walked = 0
    for key, value in _entries(reader, start, stop):
        if size >= chunk_bytes or len(keys) >= chunk_count:
            chunks.append(ChunkDigest(start, key, _digest(keys, values), len(keys)))
            walked += size
            start = key
            if walked >= bytes_max or len(chunks) >= count_max:
                return chunks, start
            keys = []
            values = []
            size = 0
        keys.append(key)
        values.append(value)
        size += len(key) + len(value)
    chunks.append(ChunkDigest(start, stop, _digest(keys, values), len(keys)))
    return chunks, None


def compare(reader: Reader, chunks: Iterable[ChunkDigest]) -> list[tuple[bytes, bytes]]:
    """The ranges, each that of one chunk, in which the reader has something else. Blocking.

    The chunks must follow each other. Memory is bounded by the largest chunk, whatever lies in the ranges. Raises
    `ProtocolError` for chunks that do not follow each other, `StoreDamaged` at a place that can't be read.
    """
    chunks = list(chunks)
    for before, after in pairwise(chunks):
        if before.stop != after.start:
            raise ProtocolError(f"chunks have a gap between {before.stop.hex()} and {after.start.hex()}")
    if any(chunk.start >= chunk.stop or chunk.stop > STOP for chunk in chunks):
        raise ProtocolError("a chunk's range is empty, or beyond the last key")
    different: list[tuple[bytes, bytes]] = []
    if not chunks:
        return different
    entries = _entries(reader, chunks[0].start, chunks[-1].stop)
    ahead = next(entries, None)
    for start, stop, digest, count in chunks:
        keys: list[bytes] = []
        values: list[bytes] = []
        found = 0
        while ahead is not None and ahead[0] < stop:
            found += 1
            if found <= count:
                keys.append(ahead[0])
                values.append(ahead[1])
            ahead = next(entries, None)
        if found != count or _digest(keys, values) != digest:
            different.append((start, stop))
    return different


def read(reader: Reader, start: bytes, stop: bytes) -> list[Entry]:
    """What a chunk holds: to be asked for ranges that `digests` made. Blocking. Raises `StoreDamaged`."""
    return list(_entries(reader, start, stop))


def replace(store: Store, start: bytes, stop: bytes, entries: Sequence[Entry]) -> Replaced:
    """Make the range hold `entries` and nothing else (but META). Blocking; not synced, and not one atomic batch.

    Only what differs is written. A value whose own checksum is wrong is not taken while the store has a whole one under
    that key: the peer's store is damaged there, ours need not become so. Call `Store.reload` after the last range.

    Raises `ProtocolError`, and writes nothing, when the entries are not in the range, not in order, or are of no kind
    that a store has; `StoreError`.
    """
    _check(start, stop, entries)
    wanted = dict(entries)
    kept: list[bytes] = []
    puts = deletes = written = 0
    changes: list[Change] = []
    pending = 0
    backend = store.backend

    def flush() -> None:
        backend.write(backend.new_batch(changes), False)

    with backend.snapshot() as reader:
        for key, old in _entries(reader, start, stop):
            value = wanted.pop(key, None)
            if value is None:
                changes.append((key, None))
                deletes += 1
            elif value != old:
                if fmt.is_whole(key, old) and not fmt.is_whole(key, value):
                    kept.append(key)
                    continue
                changes.append((key, value))
                puts += 1
                written += len(key) + len(value)
                pending += len(value)
            if len(changes) >= BATCH_CHANGES_MAX or pending >= BATCH_BYTES_MAX:
                flush()
                changes = []
                pending = 0
    for key, value in wanted.items():
        changes.append((key, value))
        puts += 1
        written += len(key) + len(value)
    if changes:
        flush()
    return Replaced(puts, deletes, written, tuple(kept))


def _entries(reader: Reader, start: bytes, stop: bytes) -> Iterator[Entry]:
    """The entries of a range but META: in two ranges where it lies within, so that no key has to be compared with it."""
    if not start <= fmt.META_KEY < stop:
        return reader.iterate(start, stop)
    return chain(reader.iterate(start, fmt.META_KEY), reader.iterate(_BEHIND_META, stop))


def _digest(keys: list[bytes], values: list[bytes]) -> bytes:
    """Lengths come first: no two different lists give the same bytes."""
    lengths = pack(f">{2 * len(keys)}I", *map(len, keys), *map(len, values))
    return blake2b(b"".join((lengths, *keys, *values)), digest_size=DIGEST_BYTES).digest()


def _check(start: bytes, stop: bytes, entries: Sequence[Entry]) -> None:
    last = b""
    for key, _ in entries:
        if not start <= key < stop or key <= last or key == fmt.META_KEY:
            raise ProtocolError(
                f"an entry {key.hex()} does not belong into {start.hex()} to {stop.hex()}, or here in it"
            )
        try:
            fmt.parse_key(key)
        except CorruptRecord as error:
            raise ProtocolError(f"an entry under {key.hex()}: {error.reason}") from error
        last = key
