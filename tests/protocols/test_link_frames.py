"""Frames of a link: what is written is read back, every field is checked, nothing but a ProtocolError comes of anything else."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from link_feeding import message, plain, steady

from pybroker.errors import ProtocolError
from pybroker.message import Message, Route, encode_headers
from pybroker.protocols import link_frames as frames
from pybroker.protocols import native_frames
from pybroker.protocols.link_frames import decode_link_frame, row_of
from pybroker.protocols.native_decoding import FrameCutter, HeaderBlocks

numbers = st.integers(1, 2**63 - 1)
names = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20)
texts = st.text(max_size=50)
headers = st.lists(st.tuples(st.text(min_size=1, max_size=5), st.text(max_size=5)), max_size=3)


@st.composite
def ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    edges = sorted(draw(st.sets(st.integers(0, 10_000), min_size=2, max_size=20)))
    return list(zip(edges[::2], edges[1::2], strict=False))


@st.composite
def messages(draw: st.DrawFn) -> Message:
    priority = draw(st.integers(0, 9))
    route = Route(
        tuple(draw(st.lists(names, min_size=1, max_size=4))),
        tuple(draw(st.lists(names, max_size=4))),
        draw(st.integers(0, 2**32 - 1)),
        priority,
    )
    return Message(
        draw(texts),
        draw(st.binary(max_size=100)),
        encode_headers(draw(headers)),
        draw(st.booleans()),
        priority,
        draw(st.integers(0, 2**63 - 1)),
        draw(st.binary(max_size=30)),
        draw(st.integers(0, 2**63 - 1)),
        route,
    )


def read(data: bytes) -> object:
    cutter = FrameCutter(1_000_000, "limit")
    cutter.feed(data)
    fields = cutter.next()
    assert fields is not None
    assert cutter.left == 0
    return decode_link_frame(fields, HeaderBlocks())


@steady
@given(numbers, names, st.integers(1, 2**62), st.lists(st.tuples(st.integers(0, 2**56), messages()), min_size=1))
def test_forwarded_messages_are_read_as_they_were_written(lane: int, namespace: str, tag: int, sent: Any) -> None:
    data = frames.encode_forward(lane, namespace, tag, [row_of(*each) for each in sent])
    assert plain(read(data)) == plain(frames.Forward(lane, namespace, tag, sent))


@steady
@given(
    st.booleans(),
    st.lists(st.tuples(texts, st.booleans(), names, st.lists(names, max_size=4).map(tuple)), max_size=5),
    st.lists(st.tuples(texts, st.booleans(), names), max_size=5),
)
def test_demand_is_read_as_it_was_written(whole: bool, adds: Any, drops: Any) -> None:
    assert read(frames.encode_demand(whole, adds, drops)) == frames.Demand(whole, adds, drops)


@steady
@given(numbers, ranges(), numbers, st.text(max_size=64), texts)
def test_answers_are_read_as_they_were_written(lane: int, tags: Any, tag: int, code: str, said: str) -> None:
    assert read(frames.encode_accepted(lane, tags)) == frames.Accepted(lane, tags)
    assert read(frames.encode_rejected(lane, tag, code, said)) == frames.Rejected(lane, tag, code, said)


def test_the_rest_is_read_as_it_was_written() -> None:
    assert read(frames.encode_link_hello({"name": "a"}, (2, 1))) == frames.LinkHello((2, 1), {"name": "a"})
    assert read(frames.encode_link_welcome(1, {"x": (1,)})) == frames.LinkWelcome(1, {"x": (1,)})
    assert read(frames.encode_link_proof(b"\1" * 32)) == frames.LinkProof(b"\1" * 32)
    assert read(native_frames.encode_bye()) == native_frames.Bye()
    assert read(native_frames.encode_beat()) == native_frames.Beat()
    assert read(native_frames.encode_error("c", "t")) == native_frames.Error("c", "t", {})


def test_a_long_reason_is_cut_and_not_refused() -> None:
    found = read(frames.encode_rejected(1, 1, "c", "x" * 100_000))
    assert isinstance(found, frames.Rejected)
    assert found.text == "x" * 4_096


def test_what_all_messages_of_a_frame_have_in_common_is_kept_once() -> None:
    sent = [(number, message(number, passed=("x", "a"), targets=("t",))) for number in range(3)]
    found = read(frames.encode_forward(1, "n", 1, [row_of(*each) for each in sent]))
    assert isinstance(found, frames.Forward)
    first, *rest = [each.route for _, each in found.messages]
    assert first is not None
    assert all(route is not None and route.passed is first.passed for route in rest)


FRAMES: dict[str, tuple[Any, ...]] = {
    "hello": (30, "pybroker link", (1,), {}),
    "welcome": (31, 1, {}),
    "proof": (32, b"p"),
    "demand": (33, True, (("/queue/q", False, "o", ("a", "o")),), (("/queue/q", False, "o"),)),
    "forward": (34, 1, "n", 1, ((1, "/queue/q", b"", b"", 20, 0, b"id", 1, 0, ("a",), ()),)),
    "accepted": (35, 1, (1, 2)),
    "rejected": (36, 1, 1, "code", "text"),
    "error": (3, "code", "text", {}),
    "bye": (4,),
    "beat": (5,),
}
WRONG = (
    None,
    True,
    -1,
    2**64 - 1,
    1.5,
    "text",
    "",
    b"bytes",
    (),
    (1,),
    ("a", 1),
    ((),),
    ((1, 2, 3),),
    {},
    {"a": 1},
    {b"a": 1},
)


@pytest.mark.parametrize("name", FRAMES)
def test_a_field_that_is_wrong_is_a_protocol_error_and_nothing_else(name: str) -> None:
    good = FRAMES[name]
    decode_link_frame(good, HeaderBlocks())
    refused = 0
    for at in range(1, len(good)):
        for wrong in WRONG:
            try:
                decode_link_frame((*good[:at], wrong, *good[at + 1 :]), HeaderBlocks())
            except ProtocolError:
                refused += 1
    for fields in ((*good, 1), good[:-1]):
        if fields:
            with pytest.raises(ProtocolError):
                decode_link_frame(fields, HeaderBlocks())
    assert refused >= 8 * (len(good) - 1)


@pytest.mark.parametrize("field", range(11))
def test_a_field_of_a_message_that_is_wrong_is_a_protocol_error_and_nothing_else(field: int) -> None:
    (good,) = FRAMES["forward"][4]
    refused = 0
    for wrong in WRONG:
        row = (*good[:field], wrong, *good[field + 1 :])
        try:
            decode_link_frame((34, 1, "n", 1, (row,)), HeaderBlocks())
        except ProtocolError:
            refused += 1
        try:  # behind a good one, whose names are known already
            decode_link_frame((34, 1, "n", 1, (good, row)), HeaderBlocks())
        except ProtocolError:
            refused += 1
    assert refused >= 2 * 10


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ((30, "pybroker", (1,), {}), "must say 'pybroker link'"),
        ((30, "pybroker link", tuple(range(65)), {}), "at most 64"),
        ((32, b"x" * 65), "at most 64 bytes"),
        ((33, True, (("/queue/q", False, "", ()),), ()), "must be a name"),
        ((33, True, (("/queue/q", False, "o", ("x",) * 1_001),), ()), "at most 1000 names"),
        ((34, 1, "n", 1, ()), "at least one message"),
        ((34, 1, "n", 0, FRAMES["forward"][4]), "tag must be"),
        ((34, 1, "n" * 256, 1, FRAMES["forward"][4]), "namespace must be"),
        ((34, 1, "n", 1, ((1, "/queue/q", b"", b"x", 20, 0, b"id", 1, 0, ("a",), ()),)), "header block"),
        ((34, 1, "n", 1, ((1, "/queue/q", b"", b"", 20, 0, b"id", 1, 0, (), ()),)), "passed its sender"),
        ((34, 1, "n", 1, ((1, "/queue/q", b"", b"", 26, 0, b"id", 1, 0, ("a",), ()),)), "flags"),
        ((34, 1, "n", 1, ((1, "/queue/q", b"", b"", 20, 0, b"id", 1, 0, ("a",), ("t",) * 10_001),)), "at most 10000"),
        ((35, 1, ()), "at least one"),
        ((35, 1, (2, 1)), "rising"),
        ((10, 1, ()), "frames of type 10 are not known on a link"),
        ((99,), "frames of type 99"),
    ],
)
def test_what_is_wrong_is_said(fields: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        decode_link_frame(fields, HeaderBlocks())


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4).map(tuple) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@steady
@given(st.sampled_from((3, 4, 5, 30, 31, 32, 33, 34, 35, 36, 37)), st.lists(values, max_size=6))
def test_any_array_is_read_or_refused(kind: int, rest: list[Any]) -> None:
    with suppress(ProtocolError):
        decode_link_frame((kind, *rest), HeaderBlocks())


@steady
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    cutter = FrameCutter(1_000, "limit")
    cutter.feed(data)
    with suppress(ProtocolError):
        while (fields := cutter.next()) is not None:
            decode_link_frame(fields, HeaderBlocks())


def test_a_frame_is_what_the_document_says() -> None:
    """Written by hand from NATIVE.md, apart from the encoder."""
    sent = message(7, passed=("x", "a"), targets=("t",), deliveries=2, priority=9, durable=True, header_block=b"k:v\n")
    data = frames.encode_forward(3, "space", 5, [row_of(9, sent)])
    row = [9, "/queue/q", b"7", b"k:v\n", 16 + 9, 0, b"id-7", 1_007, 2, ["x", "a"], ["t"]]
    packed = msgpack.packb([34, 3, "space", 5, [row]])
    assert data == len(packed).to_bytes(4, "big") + packed
