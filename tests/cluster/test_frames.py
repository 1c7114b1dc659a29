"""The frames: whole, byte by byte, damaged, too long, of the wrong shape; and the proofs of the hand-shake."""

from __future__ import annotations

import random
import tracemalloc
from struct import Struct
from zlib import crc32

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.cluster import frames as f
from pybroker.cluster.handshake import Conversation, follower_proof, leader_proof, proof_fault
from pybroker.cluster.registry import Position
from pybroker.cluster.ring import Ring, RingBatch
from pybroker.errors import ProtocolError

P = Position
SAMPLES: list[f.Frame] = [
    f.Challenge(b"n" * 16, "a", 3),
    f.Hello(1, "set", "b", "0a1b", P(2, 99), 3, b"m" * 16, b"p" * 32),
    f.Welcome(3, P(3, 100), b"", f.BATCHES),
    f.Welcome(3, P(3, 100), b"q" * 32, f.DIFFERENCE),
    f.Refusal("other-set", "this is set x", 0),
    f.BatchFrame(3, P(3, 100), P(2, 99), f.encode_changes([(b"k", b"v"), (b"l", None)])),
    f.Answer(3, P(3, 100)),
    f.Heartbeat(3, 17, 99),
    f.Heartbeat(
        3,
        18,
        99,
        (f.Member("a", "0a1b", True, f.LEADING, P(3, 99)), f.Member("b", "2c", False, f.CATCHING_UP, P(0, 0))),
    ),
    f.HeartbeatAnswer(3, 17, P(3, 99)),
    f.SnapshotBegin(3, P(3, 99)),
    f.Digests(3, P(3, 99), ((b"\0", b"m", b"d" * 16, 3), (b"m", b"\xff", b"e" * 16, 0))),
    f.Want(3, ((b"m", b"\xff"),)),
    f.Want(3, ()),
    f.Chunk(3, b"m", b"\xff", f.encode_entries([(b"n", b"1"), (b"o", b"2")])),
    f.SnapshotEnd(3, P(3, 120)),
]


def packed(payload: bytes, version: int = f.VERSION) -> bytes:
    start = Struct(">BII").pack(version, len(payload), crc32(payload))
    return start + Struct(">I").pack(crc32(start)) + payload


def reader() -> f.FrameReader:
    return f.FrameReader(1 << 20)


def test_frames_survive_whole_byte_by_byte_and_in_a_row():
    data = b"".join(map(f.encode, SAMPLES))
    assert reader().feed(data) == SAMPLES
    slow = reader()
    assert [frame for at in range(len(data)) for frame in slow.feed(data[at : at + 1])] == SAMPLES
    assert slow.buffered == 0
    for sample in SAMPLES:
        one = reader()
        assert one.feed(f.encode(sample) + b"\x01\x00") == [sample]
        assert one.buffered == 2


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=f.KEY_BYTES_MAX), st.none() | st.binary())))
def test_changes_survive(changes):
    assert f.decode_changes(f.encode_changes(changes)) == changes


def test_the_bytes_of_a_frame_do_not_change():
    assert f.encode(f.Answer(3, P(3, 100))).hex() == "0100000006" + "28a0051c" + "abba87f6" + "930603920364"


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: type(sample).__name__)
def test_every_flipped_bit_is_found(sample):
    data = f.encode(sample)
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError):
            reader().feed(bytes(bad))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgpack.packb(None),
        msgpack.packb([]),
        msgpack.packb({1: 2}),
        msgpack.packb(["6", 3, [3, 100]]),
        msgpack.packb([99, 1]),
        msgpack.packb([True, b"n" * 16, "a", 3]),
        msgpack.packb([6, 3]),
        msgpack.packb([6, 3, [3, 100], 1]),
        msgpack.packb([6, 3, [3, 100]]) + b"\0",
        msgpack.packb([6, -1, [3, 100]]),
        msgpack.packb([6, True, [3, 100]]),
        msgpack.packb([6, 2**63, [3, 100]]),
        msgpack.packb([6, 3, [3, 100, 1]]),
        msgpack.packb([6, 3, [3, 1.5]]),
        msgpack.packb([6, 3, None]),
        msgpack.packb([1, b"short", "a", 3]),
        msgpack.packb([1, "n" * 16, "a", 3]),
        msgpack.packb([1, b"n" * 16, "../../etc", 3]),
        msgpack.packb([1, b"n" * 16, "", 3]),
        msgpack.packb([1, b"n" * 16, "a" * 65, 3]),
        msgpack.packb([1, b"n" * 16, b"a", 3]),
        msgpack.packb([3, 3, [3, 1], b"x", "batches"]),
        msgpack.packb([3, 3, [3, 1], b"", "somehow"]),
        msgpack.packb([3, 3, [3, 1], b"", ["batches"]]),
        msgpack.packb([4, "Code", "text", 0]),
        msgpack.packb([4, "code", "t" * 501, 0]),
        msgpack.packb([5, 3, [3, 1], [3, 0], "text"]),
        msgpack.packb([10, 3, [3, 1], [[b"a", b"b", b"short", 1]]]),
        msgpack.packb([10, 3, [3, 1], [[b"a", b"b", b"d" * 16]]]),
        msgpack.packb([10, 3, [3, 1], [[b"a" * 257, b"b", b"d" * 16, 1]]]),
        msgpack.packb([11, 3, [[b"a", b"b"]] * (f.RANGES_MAX + 1)]),
        msgpack.packb([11, 3, {"a": 1}]),
        msgpack.packb([7, 3, 1, 1]),
        msgpack.packb([7, 3, 1, 1, None]),
        msgpack.packb([7, 3, 1, 1, [None]]),
        msgpack.packb([7, 3, 1, 1, [["a", "1", True, "following", [3, 1]]] * (f.MEMBERS_MAX + 1)]),
        msgpack.packb([7, 3, 1, 1, [["a", "1", 1, "following", [3, 1]]]]),
        msgpack.packb([7, 3, 1, 1, [["a", "1", True, "dancing", [3, 1]]]]),
        msgpack.packb([7, 3, 1, 1, [["a", "1", True, ["following"], [3, 1]]]]),
        msgpack.packb([7, 3, 1, 1, [["a/b", "1", True, "following", [3, 1]]]]),
        msgpack.packb([7, 3, 1, 1, [["a", "1", True, "following", 3]]]),
        msgpack.packb([6, 3, msgpack.Timestamp(1)]),
        msgpack.packb([6, 3, msgpack.ExtType(5, b"x")]),
        b"\x91" * 3000 + b"\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\x93\x04\xa2\xff\xff\x00",
    ],
)
def test_wrong_shapes_are_protocol_errors(payload):
    one = reader()
    with pytest.raises(ProtocolError):
        one.feed(packed(payload))
    with pytest.raises(ProtocolError):  # and it says so again
        one.feed(f.encode(SAMPLES[0]))


def test_another_version_is_named():
    with pytest.raises(ProtocolError, match="version 2"):
        reader().feed(packed(msgpack.packb([6, 3, [3, 1]]), version=2))


@pytest.mark.parametrize(
    "run",
    [
        b"",
        msgpack.packb([[b"k"]]),
        msgpack.packb([[b"k"], []]),
        msgpack.packb([[b""], [b"v"]]),
        msgpack.packb([["k"], [b"v"]]),
        msgpack.packb([[b"k"], ["v"]]),
        msgpack.packb([[b"k" * 257], [b"v"]]),
        msgpack.packb([[[1]], [b"v"]]),
        msgpack.packb({b"k": b"v"}),
        msgpack.packb([7, 8]),
    ],
)
def test_wrong_changes_are_protocol_errors(run):
    with pytest.raises(ProtocolError):
        f.decode_changes(run)
    with pytest.raises(ProtocolError):
        f.decode_entries(run)


def test_entries_rise_and_have_values():
    for entries in ([(b"b", b"1"), (b"a", b"2")], [(b"a", b"1"), (b"a", b"2")], [(b"a", None)]):
        with pytest.raises(ProtocolError):
            f.decode_entries(f.encode_changes(entries))


def test_a_long_frame_is_refused_by_its_head():
    one = f.FrameReader(1000)
    with pytest.raises(ProtocolError, match="limit is 1000"):
        one.feed(f.encode(f.BatchFrame(1, P(1, 1), P(0, 0), bytes(2000)))[: f.HEAD_BYTES])


def test_memory_is_bounded_by_the_limit():
    one = f.FrameReader(4096)
    head = Struct(">BII").pack(f.VERSION, 4096, 0)
    tracemalloc.start()
    try:
        one.feed(head + Struct(">I").pack(crc32(head)))
        for _ in range(100):
            try:
                one.feed(bytes(1024))
            except ProtocolError:
                break
        else:
            raise AssertionError("100 KiB of a frame of 4 KiB were taken")
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 2**32))
def test_noise_is_a_protocol_error_or_nothing(noise, seed):
    rng = random.Random(seed)
    data = bytearray(b"".join(f.encode(rng.choice(SAMPLES)) for _ in range(3)))
    at = rng.randrange(len(data))
    data[at : at + rng.randrange(40)] = noise
    one = reader()
    try:
        while data:
            size = rng.randrange(1, 50)
            one.feed(bytes(data[:size]))
            del data[:size]
    except ProtocolError:
        pass


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.binary() | st.text() | st.floats(),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text() | st.integers(0, 5), inner, max_size=3),
    ),
    st.integers(0, 15),
)
def test_any_value_in_a_good_envelope_is_a_frame_or_a_protocol_error(value, kind):
    fields = value if isinstance(value, list) else [value]
    for payload in (msgpack.packb([kind, *fields]), msgpack.packb(value)):
        try:
            found = reader().feed(packed(payload))
        except ProtocolError:
            continue
        assert reader().feed(f.encode(found[0])) == found
        for run in (getattr(found[0], "changes", None), getattr(found[0], "entries", None)):
            if run is not None:
                with pytest.raises(ProtocolError):
                    f.decode_changes(run)


# ---- proofs

TALK = Conversation("set", "a", "b", "0a1b", 3, b"n" * 16, b"m" * 16)


def test_a_proof_is_about_everything_that_was_said():
    secret = b"secret"
    good = follower_proof(secret, TALK, P(1, 2))
    assert len(good) == f.PROOF_BYTES
    others = [
        follower_proof(b"other", TALK, P(1, 2)),
        follower_proof(secret, TALK, P(1, 3)),
        leader_proof(secret, TALK, P(1, 2), f.BATCHES),
        leader_proof(secret, TALK, P(1, 2), f.DIFFERENCE),
    ]
    for field in TALK._fields:
        value = getattr(TALK, field)
        changed = value + 1 if isinstance(value, int) else value + value[:1]
        others.append(follower_proof(secret, TALK._replace(**{field: changed}), P(1, 2)))
    # what one field loses the next one gains
    others.append(follower_proof(secret, TALK._replace(leader="ab", follower=""), P(1, 2)))
    assert good not in others
    assert len(set(others)) == len(others)


def test_both_must_have_a_secret_or_neither():
    proof = follower_proof(b"secret", TALK, P(1, 2))
    assert proof_fault(b"secret", proof, proof) is None
    assert proof_fault(None, b"", follower_proof(None, TALK, P(1, 2))) is None
    assert "the peer has none" in (proof_fault(b"secret", b"", proof) or "")
    assert "this replica has none" in (proof_fault(None, proof, b"") or "")
    assert "another secret" in (proof_fault(b"secret", b"x" * 32, proof) or "")


# ---- the ring


def entry(lsn: int, epoch: int = 1, size: int = 10, before: int | None = None) -> RingBatch:
    return RingBatch(P(epoch, lsn), P(epoch if before is None else before, lsn - 1), bytes(size))


def test_the_ring_keeps_what_its_bytes_allow_and_what_the_store_has_not():
    ring = Ring(100)
    ring.align(P(1, 5))
    for lsn in range(6, 40):
        ring.append(entry(lsn), keep_after=lsn - 1)
    assert ring.bytes == 100
    assert (ring.base, ring.last, len(ring)) == (P(1, 29), P(1, 39), 10)
    assert [ring.holds_after(lsn) for lsn in (28, 29, 39, 40)] == [False, True, True, False]
    assert ring.get(29) is None
    for lsn in range(40, 60):  # the store is behind: nothing that it has not is dropped
        ring.append(entry(lsn), keep_after=34)
    assert (ring.base.lsn, ring.bytes) == (34, 250)
    with pytest.raises(ValueError, match="does not follow"):
        ring.append(entry(61), keep_after=60)
    with pytest.raises(ValueError, match="does not follow"):
        ring.append(entry(60, epoch=2), keep_after=60)
    ring.append(entry(60, epoch=2, before=1), keep_after=34)
    ring.align(P(1, 59))
    assert (ring.last, ring.bytes) == (P(1, 59), 250)
    ring.align(P(2, 50))
    assert (ring.base, ring.last, ring.bytes, len(ring)) == (P(2, 50), P(2, 50), 0, 0)


def test_a_batch_is_sent_again_under_a_later_epoch():
    changes = f.encode_changes([(b"k", b"v")])
    batch = RingBatch(P(1, 7), P(1, 6), changes)
    first = batch.frame(1)
    assert batch.frame(1) is first
    assert reader().feed(batch.frame(2)) == [f.BatchFrame(2, P(1, 7), P(1, 6), changes)]
    assert batch.changes == changes
    assert batch.size == len(changes)


def test_what_follows_a_frame_is_held_to_the_limit_of_its_own_moment() -> None:
    """A batch may come with the Welcome in one read: it was refused by the limit of the hand-shake, and the link cut."""
    welcome = f.Welcome(1, P(1, 1), bytes(f.PROOF_BYTES), f.BATCHES)
    batch = f.BatchFrame(1, P(1, 2), P(1, 1), bytes(5_000))
    reader = f.FrameReader()
    assert reader.feed(f.encode(welcome) + f.encode(batch), 1) == [welcome]
    reader.bytes_max = f.FRAME_BYTES_MAX
    assert reader.feed(b"") == [batch]
