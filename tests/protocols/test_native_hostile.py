"""Peers of the native protocol that mean harm: lengths, nesting, floods and nonsense meet a named limit, not the memory's end."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_feeding import FROM_BROKER, FROM_CLIENT, HELLO, drain, new_session, open_session, sends, steady

from pybroker.config import NativeLimits
from pybroker.errors import LimitExceeded, ProtocolError
from pybroker.protocols import native_decoding
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_decoding import unpack_frame
from pybroker.protocols.native_frames import pack_frame
from pybroker.protocols.native_session import CLOSED, NativeSession, Opening, Violation

MEGABYTE = 1024 * 1024


def violation(session: NativeSession, data: bytes) -> ProtocolError:
    """The error that these bytes lead to, as the last event; nothing is read behind it."""
    session.receive_data(data)
    events = drain(session)
    assert isinstance(events[-1], Violation), events
    assert session.state == CLOSED
    session.receive_data(data)
    assert session.next_events(10) == []
    assert session.buffered_bytes == 0
    return events[-1].error


def test_a_length_beyond_the_limit_is_refused_at_once() -> None:
    error = violation(new_session(), struct.pack(">I", 65_537))
    assert isinstance(error, LimitExceeded)
    assert error.limit == "native.handshake_bytes_max"
    error = violation(open_session(), struct.pack(">I", 2**32 - 1))
    assert isinstance(error, LimitExceeded)
    assert error.limit == "native.frame_bytes_max"


def test_a_frame_that_is_never_whole_costs_no_more_than_its_bytes() -> None:
    session = open_session(NativeLimits(frame_bytes_max=4 * MEGABYTE))
    tracemalloc.start()
    try:
        session.receive_data(struct.pack(">I", 4 * MEGABYTE))
        for _ in range(63):
            session.receive_data(bytes(65_536))
            assert session.next_events(10) == []
        assert tracemalloc.get_traced_memory()[1] < 10 * MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("depth", [500, 5_000, 500_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    for opening in (b"\x91", b"\x81\xa0"):
        payload = opening * depth + b"\xc0"
        assert "frame" in str(violation(open_session(), struct.pack(">I", len(payload)) + payload))


@pytest.mark.parametrize("item", [b"\xc0", b"\x90", b"\x91\xc0", b"\x81\xa0\xc0", b"\xa0", b"\xcb" + bytes(8)])
def test_a_large_frame_of_many_small_things_does_not_fill_the_memory(item: bytes) -> None:
    """A pair of bytes on the wire can be a hundred times as many in memory."""
    count = 32 * MEGABYTE // len(item)
    payload = b"\x93" + bytes([wire.SEND]) + b"\x01\xdd" + struct.pack(">I", count) + item * count
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            unpack_frame(payload)
        assert tracemalloc.get_traced_memory()[1] < 300 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_large_frame_as_clients_send_them_is_no_such_thing() -> None:
    row = ["/queue/a", b"x" * 600, b"", 20, 0]
    fields = unpack_frame(msgpack.packb([wire.SEND, 1, [row] * 10_000]))
    assert len(fields[2]) == 10_000


def test_a_send_with_too_many_messages_is_refused_before_they_are_made() -> None:
    session = open_session(NativeLimits(send_messages_max=10))
    session.receive_data(sends(10))
    assert len(session.next_events(100)) == 1
    row = ["nonsense"]
    error = violation(session, pack_frame((wire.SEND, 11, [row] * 11)))
    assert isinstance(error, LimitExceeded)
    assert (error.limit, error.value) == ("native.send_messages_max", 10)
    error = violation(open_session(), pack_frame((wire.COMMIT, 1, [row] * 101, [], [])))
    assert isinstance(error, LimitExceeded)
    assert error.limit == "limits.transaction_messages_max"


def test_many_ranges_take_no_long_time_and_too_many_are_refused() -> None:
    most = native_decoding.RANGES_MAX
    began = time.monotonic()
    session = open_session()
    session.receive_data(pack_frame((wire.ACK, 0, 1, list(range(2 * most)))))
    (event,) = session.next_events(10)
    assert isinstance(event, wire.Ack)
    assert len(event.ranges) == most
    assert time.monotonic() - began < 5
    assert "at most 100000" in str(violation(session, pack_frame((wire.ACK, 0, 1, list(range(2 * most + 2))))))


def test_header_blocks_without_end_are_not_remembered() -> None:
    session = open_session()
    tracemalloc.start()
    try:
        for number in range(2_000):
            block = b"n%d:" % number + b"v" * 2_000 + b"\n"
            session.receive_data(pack_frame((wire.SEND, 1, [["/queue/a", b"", block, 20, 0]])))
            assert len(session.next_events(10)) == 1
        assert tracemalloc.get_traced_memory()[0] < 2 * MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "frame", [wire.encode_beat(), pack_frame((wire.CREDIT, 1, 1)), wire.encode_ack(0, 1, [(1, 9)])]
)
def test_a_flood_of_small_frames_leaves_nothing_behind(frame: bytes) -> None:
    session = open_session()
    for _ in range(10):
        session.receive_data(frame * 5_000)
        while session.next_events(512):
            pass
        assert session.buffered_bytes == 0


def test_nothing_is_kept_of_what_comes_before_hello_is_answered() -> None:
    session = new_session()
    session.receive_data(HELLO)
    assert isinstance(session.next_events(1)[0], Opening)
    session.receive_data(sends(5))
    assert session.next_events(10) == []
    assert session._opening == b""


def mutated(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randrange(1, 4)):
        way = generator.randrange(4)
        at = generator.randrange(len(changed) + 1)
        if way == 0 and changed:
            changed[at % len(changed)] = generator.randrange(256)
        elif way == 1:
            del changed[at : at + generator.randrange(8)]
        elif way == 2:
            changed[at:at] = generator.randbytes(generator.randrange(8))
        else:
            changed[at:at] = changed[at : at + generator.randrange(40)]
    return bytes(changed)


@pytest.mark.parametrize("seed", range(20))
def test_damaged_streams_give_frames_or_one_violation(seed: int) -> None:
    generator = random.Random(seed)
    frames = [pack_frame((kind, *fields)) for kind, fields in FROM_CLIENT.items()]
    for _ in range(200):
        data = HELLO + b"".join(generator.sample(frames, 5))
        session = new_session()
        events: list[Any] = []
        data = mutated(data, generator)
        while data:
            size = generator.randrange(1, 200)
            session.receive_data(data[:size])
            events += drain(session, generator.randrange(1, 9))
            data = data[size:]
        assert not any(isinstance(event, Violation) for event in events[:-1])


@steady
@given(st.lists(st.binary(max_size=60), max_size=5), st.booleans())
def test_any_bytes(pieces: list[bytes], opened: bool) -> None:
    session = open_session() if opened else new_session()
    for piece in pieces:
        session.receive_data(piece)
        drain(session)


@steady
@given(st.lists(st.sampled_from([*FROM_CLIENT.items(), *FROM_BROKER.items()]), max_size=8))
def test_frames_in_any_order_end_at_the_first_that_may_not_come(frames: list[tuple[int, Any]]) -> None:
    session = open_session()
    session.receive_data(b"".join(pack_frame((kind, *fields)) for kind, fields in frames))
    events = drain(session)
    for at, (kind, _) in enumerate(frames):
        if kind in FROM_BROKER or kind in (wire.BYE, wire.ERROR):
            beats = sum(kind == wire.BEAT for kind, _ in frames[:at])
            assert len(events) == at - beats + 1
            assert isinstance(events[-1], Violation) == (kind in FROM_BROKER)
            return
    assert not any(isinstance(event, Violation) for event in events)
