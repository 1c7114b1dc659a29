"""The frames of replication, sans-IO: bytes in, frames out, bytes out. Owns their encoding and every limit on them.

DESIGN.md section 5. A frame is a head, then a payload: ``version u8, payload bytes u32, crc32 of the payload u32, crc32
of the head up to here u32``, all big endian; the payload is a msgpack array of the type's number and the fields. Whatever
is not exactly that is a `ProtocolError`, never another exception. A frame of changes carries them as one run of bytes that is
encoded once for all followers. Names from the wire are checked here, and never become paths. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from struct import Struct
from typing import Any, NamedTuple
from zlib import crc32

import msgpack

from pybroker.cluster.registry import NAME, Position
from pybroker.errors import ProtocolError
from pybroker.store.backend import Change, Entry

VERSION = 1  # of the frames; the first byte of each
PROTOCOL = 1  # of what is said with them; in Hello

HANDSHAKE_BYTES_MAX = 4_096  # a payload from a peer that has proved nothing yet
CONTROL_BYTES_MAX = 1024 * 1024  # a payload from a follower
FRAME_BYTES_MAX = 256 * 1024 * 1024  # any payload; so the most that one batch can hold
KEY_BYTES_MAX = 256  # one key of the store
RANGES_MAX = 2_048  # ranges in one Digests or Want
FETCH_KEYS_MAX = 256  # keys in one Fetch or Values
MEMBERS_MAX = 32  # rows of a leader's table that a heartbeat carries
TEXT_CHARACTERS_MAX = 500  # the text of a refusal
NONCE_BYTES = 16
PROOF_BYTES = 32
DIGEST_BYTES = 16
NUMBER_MAX = 2**63 - 1

BATCHES = "batches"
DIFFERENCE = "difference"

LEADING = "leading"  # states of a member, as the leader knows them
FOLLOWING = "following"
CATCHING_UP = "catching up"
MEMBER_STATES = (LEADING, FOLLOWING, CATCHING_UP)

_HEAD = Struct(">BIII")
_HEAD_START = Struct(">BII")
_CHECK = Struct(">I")
HEAD_BYTES = _HEAD.size
_CODE = re.compile(r"[a-z][a-z-]{0,31}")


class Challenge(NamedTuple):
    """The leader's first word on a new connection: what the proof must be about, and who it says it is."""

    nonce: bytes
    name: str
    epoch: int


class Hello(NamedTuple):
    """Who wants to follow, and up to where its store is durable. `epoch` is the one that it follows."""

    protocol: int
    set_name: str
    name: str
    incarnation: str
    position: Position
    epoch: int
    nonce: bytes
    proof: bytes


class Welcome(NamedTuple):
    """The leader takes the follower on. `how`: BATCHES after its position, or by DIFFERENCE."""

    epoch: int
    position: Position
    proof: bytes
    how: str


class Refusal(NamedTuple):
    """Why a side ends the connection. `code` is a stable word; `epoch` the refusing side's, 0 where it says nothing of it."""

    code: str
    text: str
    epoch: int = 0


class BatchFrame(NamedTuple):
    """One batch; `changes` is what `encode_changes` made. `previous` is the position that it must meet."""

    epoch: int
    position: Position
    previous: Position
    changes: bytes


class Answer(NamedTuple):
    """The follower holds everything up to `position`, as safely as the sync mode asks."""

    epoch: int
    position: Position


class Member(NamedTuple):
    """What the leader knows of itself, or of a copy that is attached to it. `position` is the durable one."""

    name: str
    incarnation: str
    counted: bool
    state: str
    position: Position


class Heartbeat(NamedTuple):
    """The leader is there. `commit` is the number of the last batch that a quorum holds; `members` is for status only."""

    epoch: int
    number: int
    commit: int
    members: tuple[Member, ...] = ()


class HeartbeatAnswer(NamedTuple):
    """The follower is there and follows that epoch. `position` is its durable one."""

    epoch: int
    number: int
    position: Position


class SnapshotBegin(NamedTuple):
    """Catching up by difference begins, or begins again, with the first key."""

    epoch: int
    position: Position


class Digests(NamedTuple):
    """Ranges of keys that follow each other, ``(start, stop, digest, count)``, as the leader's store has them at `position`."""

    epoch: int
    position: Position
    ranges: tuple[tuple[bytes, bytes, bytes, int], ...]


class Want(NamedTuple):
    """Those of the ranges that differ here; perhaps none."""

    epoch: int
    ranges: tuple[tuple[bytes, bytes], ...]


class Chunk(NamedTuple):
    """All entries of a range that was wanted; `entries` is what `encode_entries` made."""

    epoch: int
    start: bytes
    stop: bytes
    entries: bytes


class SnapshotEnd(NamedTuple):
    """Every range was compared: the side copy is the leader's store as it was at `position`."""

    epoch: int
    position: Position


class Fetch(NamedTuple):
    """Either side asks for the values of keys whose own ones are bad. It has no second question before the first is answered."""

    epoch: int
    number: int
    keys: tuple[bytes, ...]


class Values(NamedTuple):
    """What that question's keys hold in this store at `position`: whole values, or None where there is no such key.

    A key is missing if its value is bad here too; or if there was no room for it, beside one that is there.
    """

    epoch: int
    number: int
    position: Position
    pairs: tuple[tuple[bytes, bytes | None], ...]


Frame = (
    Challenge
    | Hello
    | Welcome
    | Refusal
    | BatchFrame
    | Answer
    | Heartbeat
    | HeartbeatAnswer
    | SnapshotBegin
    | Digests
    | Want
    | Chunk
    | SnapshotEnd
    | Fetch
    | Values
)


# ---- fields


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= NUMBER_MAX:
        raise ProtocolError("a replication frame has a field that is not a number in range")
    return value


def _position(value: Any) -> Position:
    if type(value) is not list or len(value) != 2:
        raise ProtocolError("a replication frame has a field that is not a position")
    return Position(_number(value[0]), _number(value[1]))


def _name(value: Any) -> str:
    if type(value) is not str or not NAME.fullmatch(value):
        raise ProtocolError("a replication frame has a name that is not 1 to 64 letters, digits, '_', '.' or '-'")
    return value


def _word(value: Any) -> str:
    if type(value) is not str or not _CODE.fullmatch(value):
        raise ProtocolError("a replication frame has a field that is not a word")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > TEXT_CHARACTERS_MAX:
        raise ProtocolError(
            f"a replication frame has a field that is not a text of up to {TEXT_CHARACTERS_MAX} characters"
        )
    return "".join(character if character.isprintable() else "?" for character in value)


def _how(value: Any) -> str:
    if value not in (BATCHES, DIFFERENCE) or type(value) is not str:
        raise ProtocolError("a replication frame names an unknown way of catching up")
    return value


def _members(value: Any) -> tuple[Member, ...]:
    if type(value) is not list or len(value) > MEMBERS_MAX:
        raise ProtocolError(f"a replication frame has a field that is not a table of up to {MEMBERS_MAX} members")
    return tuple(map(_member, value))


def _member(value: Any) -> Member:
    if type(value) is not list or len(value) != 5 or type(value[2]) is not bool or value[3] not in MEMBER_STATES:
        raise ProtocolError("a replication frame has a member that is not name, copy, counted, state and position")
    name, incarnation, counted, state, position = value
    return Member(_name(name), _name(incarnation), counted, state, _position(position))


def _exactly(size: int) -> Callable[[Any], bytes]:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) != size:
            raise ProtocolError(f"a replication frame has a field that is not {size} bytes")
        return value

    return check


def _proof(value: Any) -> bytes:
    if type(value) is not bytes or len(value) not in (0, PROOF_BYTES):
        raise ProtocolError(f"a replication frame has a proof that is neither empty nor {PROOF_BYTES} bytes")
    return value


def _run(value: Any) -> bytes:
    if type(value) is not bytes:
        raise ProtocolError("a replication frame has changes that are not a run of bytes")
    return value


def _key(value: Any) -> bytes:
    if type(value) is not bytes or len(value) > KEY_BYTES_MAX:
        raise ProtocolError(f"a replication frame has a key that is not up to {KEY_BYTES_MAX} bytes")
    return value


_digest = _exactly(DIGEST_BYTES)


def _rows(value: Any, width: int) -> list[list[Any]]:
    if type(value) is not list or len(value) > RANGES_MAX:
        raise ProtocolError(f"a replication frame has a field that is not a list of up to {RANGES_MAX} ranges")
    if any(type(row) is not list or len(row) != width for row in value):
        raise ProtocolError("a replication frame has a range of another shape")
    return value


def _digest_rows(value: Any) -> tuple[tuple[bytes, bytes, bytes, int], ...]:
    return tuple((_key(row[0]), _key(row[1]), _digest(row[2]), _number(row[3])) for row in _rows(value, 4))


def _range_rows(value: Any) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((_key(row[0]), _key(row[1])) for row in _rows(value, 2))


def _keys(value: Any) -> tuple[bytes, ...]:
    if type(value) is not list or len(value) > FETCH_KEYS_MAX:
        raise ProtocolError(f"a replication frame has a field that is not a list of up to {FETCH_KEYS_MAX} keys")
    return tuple(map(_key, value))


def _pairs(value: Any) -> tuple[tuple[bytes, bytes | None], ...]:
    if type(value) is not list or any(type(row) is not list or len(row) != 2 for row in value):
        raise ProtocolError("a replication frame has a field that is not a list of keys and values")
    keys = _keys([row[0] for row in value])
    values = [row[1] for row in value]
    if not set(map(type, values)) <= {bytes, type(None)}:
        raise ProtocolError("a replication frame has values that are not bytes")
    return tuple(zip(keys, values, strict=True))


_nonce = _exactly(NONCE_BYTES)

# On the wire: do not change, and never renumber a type.
_SHAPES: dict[int, tuple[type[Any], tuple[Callable[[Any], Any], ...]]] = {
    1: (Challenge, (_nonce, _name, _number)),
    2: (Hello, (_number, _name, _name, _name, _position, _number, _nonce, _proof)),
    3: (Welcome, (_number, _position, _proof, _how)),
    4: (Refusal, (_word, _text, _number)),
    5: (BatchFrame, (_number, _position, _position, _run)),
    6: (Answer, (_number, _position)),
    7: (Heartbeat, (_number, _number, _number, _members)),
    8: (HeartbeatAnswer, (_number, _number, _position)),
    9: (SnapshotBegin, (_number, _position)),
    10: (Digests, (_number, _position, _digest_rows)),
    11: (Want, (_number, _range_rows)),
    12: (Chunk, (_number, _key, _key, _run)),
    13: (SnapshotEnd, (_number, _position)),
    14: (Fetch, (_number, _number, _keys)),
    15: (Values, (_number, _number, _position, _pairs)),
}
_KINDS = {shape[0]: kind for kind, shape in _SHAPES.items()}


# ---- encoding


def encode(frame: Frame) -> bytes:
    """A frame as bytes. Raises ProtocolError if it is longer than FRAME_BYTES_MAX."""
    payload: bytes = msgpack.packb((_KINDS[type(frame)], *frame))
    if len(payload) > FRAME_BYTES_MAX:
        raise ProtocolError(f"a replication frame of {len(payload)} bytes: limit FRAME_BYTES_MAX is {FRAME_BYTES_MAX}")
    start = _HEAD_START.pack(VERSION, len(payload), crc32(payload))
    return b"".join((start, _CHECK.pack(crc32(start)), payload))


def encode_changes(changes: Iterable[Change]) -> bytes:
    """The changes of a batch as one run of bytes: a list of keys, then one of values (nil: deleted)."""
    columns = tuple(zip(*changes, strict=True)) or ((), ())
    packed: bytes = msgpack.packb(columns)
    return packed


def decode_changes(run: bytes) -> list[Change]:
    """The changes of a batch. Raises ProtocolError for anything that `encode_changes` does not make."""
    keys, values = _columns(run)
    if not set(map(type, values)) <= {bytes, type(None)}:
        raise ProtocolError("a batch has values that are not bytes")
    return list(zip(keys, values, strict=True))


def encode_entries(entries: Iterable[Entry]) -> bytes:
    """The entries of a chunk as one run of bytes."""
    return encode_changes(entries)


def decode_entries(run: bytes) -> list[Entry]:
    """The entries of a chunk, their keys rising. Raises ProtocolError for anything else."""
    keys, values = _columns(run)
    if not set(map(type, values)) <= {bytes}:
        raise ProtocolError("a chunk has values that are not bytes")
    if any(first >= second for first, second in pairwise(keys)):
        raise ProtocolError("a chunk has keys that do not rise")
    return list(zip(keys, values, strict=True))


def _columns(run: bytes) -> tuple[list[bytes], list[Any]]:
    columns = _unpack(run)
    if type(columns) is not list or len(columns) != 2:
        raise ProtocolError("changes are not two columns")
    keys, values = columns
    if type(keys) is not list or type(values) is not list or len(keys) != len(values):
        raise ProtocolError("changes are not two columns of one length")
    if keys and (not set(map(type, keys)) <= {bytes} or not 0 < len(min(keys, key=len)) <= len(max(keys, key=len))):
        raise ProtocolError("changes have keys that are not bytes, or empty ones")
    if keys and len(max(keys, key=len)) > KEY_BYTES_MAX:
        raise ProtocolError(f"changes have a key longer than {KEY_BYTES_MAX} bytes")
    return keys, values


def _unpack(data: bytes | memoryview) -> Any:
    try:
        return msgpack.unpackb(data, strict_map_key=True)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ProtocolError(f"a replication frame does not parse ({type(error).__name__})") from error


# ---- decoding


class FrameReader:
    """Cuts a stream of bytes into frames. After an error it is of no more use, and says the same again.

    `bytes_max` is the longest payload now; it may be raised when the peer has proved itself. What is buffered is never more
    than a head, a payload and the last `feed`.
    """

    def __init__(self, bytes_max: int = HANDSHAKE_BYTES_MAX) -> None:
        self.bytes_max = bytes_max
        self._buffer = bytearray()
        self._error: str | None = None

    @property
    def buffered(self) -> int:
        """Bytes of a frame that is not whole yet."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray, count_max: int | None = None) -> list[Frame]:
        """The frames that are whole now, `count_max` of them at most: the rest is not looked at yet, `bytes_max` may change first.

        Raises ProtocolError; frames before the bad one in the same `data` are lost.
        """
        if self._error is not None:
            raise ProtocolError(self._error)
        self._buffer += data
        try:
            return self._take(count_max)
        except ProtocolError as error:
            self._error = str(error)
            self._buffer.clear()
            raise

    def _take(self, count_max: int | None) -> list[Frame]:
        frames: list[Frame] = []
        buffer = self._buffer
        at = 0
        while len(buffer) - at >= HEAD_BYTES and len(frames) != count_max:
            version, size, check, head_check = _HEAD.unpack_from(buffer, at)
            if version != VERSION:
                raise ProtocolError(f"the peer's frames have version {version}, this version speaks {VERSION}")
            if crc32(buffer[at : at + _HEAD_START.size]) != head_check:
                raise ProtocolError("the head of a replication frame has a wrong checksum")
            if size > self.bytes_max:
                raise ProtocolError(f"a replication frame of {size} bytes, where the limit is {self.bytes_max}")
            end = at + HEAD_BYTES + size
            if len(buffer) < end:
                break
            payload = bytes(memoryview(buffer)[at + HEAD_BYTES : end])
            if crc32(payload) != check:
                raise ProtocolError("a replication frame has a wrong checksum")
            frames.append(_decode(payload))
            at = end
        if at:
            del buffer[:at]
        return frames


def _decode(payload: bytes) -> Frame:
    fields = _unpack(payload)
    if type(fields) is not list or not fields or type(fields[0]) is not int or fields[0] not in _SHAPES:
        raise ProtocolError("a replication frame of a type that this version does not know")
    kind, checks = _SHAPES[fields[0]]
    if len(fields) - 1 != len(checks):
        raise ProtocolError(
            f"a replication frame {kind.__name__} with {len(fields) - 1} fields, where it has {len(checks)}"
        )
    frame: Frame = kind(*[check(value) for check, value in zip(checks, fields[1:], strict=True)])
    return frame
