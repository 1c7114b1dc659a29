"""Frames of the native protocol: there and back in every way a network may cut them, and what is not as it should be."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.consumer_options import ConsumerOptions
from pybroker.destination import TEMPORARY_KINDS
from pybroker.errors import LimitExceeded, ProtocolError, SubscriptionError
from pybroker.message import Message, encode_headers
from pybroker.protocols import native_decoding, native_frames
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_decoding import FrameCutter, HeaderBlocks, decode_frame, unpack_frame
from pybroker.protocols.native_frames import NUMBER_MAX, TEXT_MAX, pack_frame

steady = settings(deadline=None)  # a busy machine is no failure
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
numbers = st.integers(0, NUMBER_MAX)
requests = st.integers(1, NUMBER_MAX)
codes = st.sampled_from(["full", "limit", "in-doubt"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
options = st.dictionaries(texts, st.booleans() | numbers | texts | st.lists(texts, max_size=3), max_size=4)
blocks = st.lists(st.tuples(texts.filter(bool), texts), max_size=3).map(encode_headers)


@st.composite
def ranges(draw: st.DrawFn) -> list[tuple[int, int]]:
    ends = sorted(draw(st.sets(numbers, min_size=2, max_size=8)))
    if len(ends) % 2:
        ends.pop()
    return list(zip(ends[::2], ends[1::2], strict=True))


@st.composite
def messages(draw: st.DrawFn, delivered: bool = False) -> Message:
    message = Message(
        draw(texts),
        draw(st.binary(max_size=20)),
        draw(blocks),
        draw(st.booleans()),
        draw(st.integers(0, 9)),
        draw(numbers),
    )
    if delivered:
        message.message_id = draw(st.binary(max_size=8))
        message.timestamp = draw(numbers)
    return message


def batches(delivered: bool = False) -> st.SearchStrategy[list[Any]]:
    one: st.SearchStrategy[Any] = messages(delivered)
    return st.lists(st.tuples(one, numbers) if delivered else one, min_size=1, max_size=4)


settlements = st.dictionaries(numbers, ranges(), max_size=3)
results = st.lists(
    st.tuples(requests, requests, st.booleans()).filter(lambda each: each[0] <= each[1]), min_size=1, max_size=4
)

cursors = st.none() | st.tuples(numbers, numbers, numbers)

# Each: the encoder, its arguments, and the value that is to come out.
FRAMES: dict[str, tuple[Callable[..., bytes], st.SearchStrategy[tuple[Any, ...]], type[Any]]] = {
    "HELLO": (wire.encode_hello, st.tuples(options, st.lists(numbers, max_size=3)), wire.Hello),
    "WELCOME": (wire.encode_welcome, st.tuples(numbers, options), wire.Welcome),
    "ERROR": (wire.encode_error, st.tuples(codes, texts, options), wire.Error),
    "BYE": (wire.encode_bye, st.tuples(), wire.Bye),
    "BEAT": (wire.encode_beat, st.tuples(), wire.Beat),
    "SEND": (wire.encode_send, st.tuples(st.integers(1, 2**62), batches()), wire.Send),
    "COMMIT": (
        wire.encode_commit,
        st.tuples(requests, st.lists(messages(), max_size=3), settlements, settlements),
        wire.Commit,
    ),
    "SUBSCRIBE": (
        wire.encode_subscribe,
        st.tuples(requests, numbers, texts, texts, numbers, texts, options),
        wire.Subscribe,
    ),
    "UNSUBSCRIBE": (wire.encode_unsubscribe, st.tuples(requests, numbers), wire.Unsubscribe),
    "ACK": (wire.encode_ack, st.tuples(numbers, numbers, ranges()), wire.Ack),
    "NACK": (wire.encode_nack, st.tuples(numbers, numbers, ranges()), wire.Nack),
    "CREDIT": (wire.encode_credit, st.tuples(numbers, numbers), wire.Credit),
    "REMOVE": (wire.encode_remove, st.tuples(requests, texts), wire.Remove),
    "CREATE": (
        wire.encode_create,
        st.tuples(requests, st.sampled_from(TEMPORARY_KINDS), st.text(min_size=16, max_size=64)),
        wire.Create,
    ),
    "DELETE": (wire.encode_delete, st.tuples(requests, texts), wire.Delete),
    "CONFIRM": (wire.encode_confirm, st.tuples(results), wire.Confirm),
    "REFUSED": (wire.encode_refused, st.tuples(requests, codes, texts), wire.Refused),
    "DONE": (wire.encode_done, st.tuples(requests), wire.Done),
    "FAILED": (wire.encode_failed, st.tuples(requests, codes, texts), wire.Failed),
    "DELIVER": (wire.encode_deliver, st.tuples(numbers, requests, batches(True)), wire.Deliver),
    "ENDED": (wire.encode_ended, st.tuples(numbers, codes, texts), wire.Ended),
    "MEMBERS": (
        wire.encode_members,
        st.tuples(st.dictionaries(texts, st.lists(texts, max_size=3), max_size=3)),
        wire.Members,
    ),
    "BROWSE": (wire.encode_browse, st.tuples(requests, texts, texts, numbers, cursors), wire.Browse),
    "PAGE": (
        wire.encode_page,
        st.tuples(requests, batches(True), st.just((0,)), cursors, numbers),
        wire.Page,
    ),
}


@st.composite
def encoded(draw: st.DrawFn) -> tuple[bytes, Any]:
    """A frame's bytes, and its value."""
    encode, arguments, kind = FRAMES[draw(st.sampled_from(sorted(FRAMES)))]
    chosen = draw(arguments)
    if kind is wire.Hello:
        return encode(*chosen), kind(chosen[1], chosen[0])
    return encode(*chosen), kind(*chosen)


def test_a_subscription_without_options_has_no_field_for_them() -> None:
    """Older brokers know six fields."""
    plain = wire.encode_subscribe(1, 2, "/queue/q", "auto", options={})
    assert msgpack.unpackb(plain[4:]) == [12, 1, 2, "/queue/q", "auto", 0, ""]
    chosen = wire.encode_subscribe(1, 2, "/queue/q", "auto", options={"exclusive": True})
    assert msgpack.unpackb(chosen[4:])[7:] == [{"exclusive": True}]


@given(
    st.builds(
        ConsumerOptions,
        selector=texts,
        exclusive=st.booleans(),
        priority=st.integers(-128, 127),
        retroactive=st.booleans(),
    )
)
def test_a_consumers_options_come_out_as_they_went_in(chosen: ConsumerOptions) -> None:
    packed = wire.pack_options(chosen)
    assert wire.unpack_options(packed) == chosen
    assert set(packed) == {
        name for name in ("selector", "exclusive", "priority", "retroactive") if getattr(chosen, name)
    }


@pytest.mark.parametrize(
    "packed", [{"colour": "red"}, {"selector": 1}, {"exclusive": 1}, {"priority": True}, {"priority": 128}]
)
def test_options_that_are_not_what_they_should_be_are_refused(packed: dict[str, Any]) -> None:
    with pytest.raises(SubscriptionError):
        wire.unpack_options(packed)


def plain(value: Any) -> Any:
    """A frame's value in a form that compares by value."""
    if isinstance(value, Message):
        return tuple(getattr(value, name) for name in Message.__slots__)
    if isinstance(value, list | tuple):
        kind = type(value).__name__ if hasattr(value, "_fields") else ""
        return (kind, *map(plain, value))
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def decode(data: bytes) -> Any:
    return decode_frame(unpack_frame(data[4:]), HeaderBlocks())


def cut(pieces: list[bytes], bytes_max: int = 2**20) -> tuple[list[Any], int]:
    """What comes out of pieces of a stream, and how many bytes are left."""
    cutter = FrameCutter(bytes_max, "limit")
    header_blocks = HeaderBlocks()
    found = []
    for piece in pieces:
        cutter.feed(piece)
        while (fields := cutter.next()) is not None:
            found.append(decode_frame(fields, header_blocks))
    return found, cutter.left


@steady
@given(st.lists(encoded(), max_size=4), encoded(), st.data())
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    frames: list[tuple[bytes, Any]], next_one: tuple[bytes, Any], data: st.DataObject
) -> None:
    whole = b"".join(each for each, _ in frames)
    expected = plain([value for _, value in frames])
    places = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4)))
    pieces = [whole[start:end] for start, end in zip([0, *places], [*places, len(whole)], strict=True)]
    for way in ([whole], [whole[at : at + 1] for at in range(len(whole))], pieces):
        found, left = cut(way)
        assert plain(found) == expected
        assert left == 0
    start = next_one[0][: data.draw(st.integers(0, len(next_one[0]) - 1))]
    found, left = cut([whole + start])
    assert plain(found) == expected
    assert left == len(start)
    found, left = cut([whole + start, next_one[0][len(start) :]])
    assert plain(found) == plain([*[value for _, value in frames], next_one[1]])


def test_the_table_of_the_specification_is_that_of_the_code() -> None:
    page = (Path(native_frames.__file__).parent / "NATIVE.md").read_text()
    table = {name: int(number) for number, name in re.findall(r"^\| (\d+) ([A-Z]+) \|", page, re.MULTILINE)}
    clients = {name: number for name, number in table.items() if number < 30}
    assert clients.keys() == FRAMES.keys()
    assert clients == {name: getattr(wire, name) for name in FRAMES}
    assert set(native_decoding._DECODERS) == set(clients.values())


def test_bytes_on_the_wire_do_not_change() -> None:
    message = Message("/queue/a", b"\x00", b"n:v\n", True, 4, 5)
    row = b"\x95\xa8/queue/a\xc4\x01\x00\xc4\x04n:v\n\x14\x05"
    assert wire.encode_send(300, [message]) == struct.pack(">I", 27) + b"\x93\x0a\xcd\x01\x2c\x91" + row
    assert wire.encode_ack(0, 3, [(1, 2), (7, 7)]) == struct.pack(">I", 9) + b"\x94\x0e\x00\x03\x94\x01\x02\x07\x07"
    assert wire.encode_confirm([(1, 5, True)]) == struct.pack(">I", 7) + b"\x92\x14\x91\x93\x01\x05\xc3"
    assert wire.encode_beat() == struct.pack(">I", 2) + b"\x91\x05"


def read_or_refused(fields: Any) -> None:
    with suppress(ProtocolError):
        decode(pack_frame(fields))


@steady
@given(st.sampled_from(sorted(native_decoding._DECODERS)), st.lists(values, max_size=6))
def test_any_fields_are_a_frame_or_a_protocol_error(kind: int, fields: list[Any]) -> None:
    read_or_refused([kind, *fields])


@steady
@given(encoded(), st.data())
def test_a_frame_with_one_part_exchanged_is_a_frame_or_a_protocol_error(
    frame: tuple[bytes, Any], data: st.DataObject
) -> None:
    fields = msgpack.unpackb(frame[0][4:], raw=False, strict_map_key=False)
    place: Any = fields
    while True:
        if not place:
            return
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if isinstance(place[key], list | dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = data.draw(values)
        break
    read_or_refused(fields)


@steady
@given(st.binary(max_size=40))
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    with suppress(ProtocolError):
        decode_frame(unpack_frame(data), HeaderBlocks())


WRONG: list[tuple[list[Any], str]] = [
    ([99], "frames of type 99 are not known"),
    ([0], "not known"),
    ([wire.HELLO, "stomp", [1], {}], "must say 'pybroker'"),
    ([wire.HELLO, "pybroker", 1, {}], "versions must be an array"),
    ([wire.HELLO, "pybroker", [1], {1: 2}], "not msgpack"),
    ([wire.HELLO, "pybroker", [1]], "3 fields are expected, not 2"),
    ([wire.SEND, 1, []], "at least one message"),
    ([wire.SEND, 0, [["a", b"", b"", 4, 0]]], "sequence must be a whole number from 1"),
    ([wire.SEND, NUMBER_MAX, [["a", b"", b"", 4, 0]]], "sequence must be"),
    ([wire.SEND, True, [["a", b"", b"", 4, 0]]], "sequence must be"),
    ([wire.SEND, 1, [["a", b"", b"", 4]]], "must be an array of 5"),
    ([wire.SEND, 1, [[b"a", b"", b"", 4, 0]]], "destination must be text"),
    ([wire.SEND, 1, [["a", "", b"", 4, 0]]], "its body bytes"),
    ([wire.SEND, 1, [["a", b"", b"", 10, 0]]], "flags must be its priority"),
    ([wire.SEND, 1, [["a", b"", b"", 32, 0]]], "flags must be its priority"),
    ([wire.SEND, 1, [["a", b"", b"", -1, 0]]], "flags must be its priority"),
    ([wire.SEND, 1, [["a", b"", b"", 4, -1]]], "expires must be"),
    ([wire.SEND, 1, [["a", b"", b"", 4, 2**63]]], "expires must be"),
    ([wire.SEND, 1, [["a", b"", "n:v\n", 4, 0]]], "header block must be bytes"),
    *[
        ([wire.SEND, 1, [["a", b"", block, 4, 0]]], "header block is lines")
        for block in (
            b"n",
            b"n:v",
            b":v\n",
            b"n:v\n\n",
            b"n:a:b\n",
            b"n:\\t\n",
            b"n:\\\n",
            b"\xff:v\n",
            b"n:v\r\n",
            b"\n",
        )
    ],
    ([wire.ACK, 0, 1, []], "pairs of numbers"),
    ([wire.ACK, 0, 1, [1]], "pairs of numbers"),
    ([wire.ACK, 0, 1, [2, 1]], "rising pairs"),
    ([wire.ACK, 0, 1, [1, 3, 3, 4]], "rising pairs"),
    ([wire.ACK, 0, 1, [5, 6, 1, 2]], "rising pairs"),
    ([wire.ACK, 0, 1, [1, 2**63]], "rising pairs"),
    ([wire.ACK, 0, 1, [1.0, 2.0]], "rising pairs"),
    ([wire.ACK, -1, 1, [1, 2]], "request must be"),
    ([wire.SUBSCRIBE, 0, 1, "a", "auto", 0, ""], "request must be a whole number from 1"),
    ([wire.SUBSCRIBE, 1, 1, "x" * (TEXT_MAX + 1), "auto", 0, ""], "destination must be text of at most 4096"),
    ([wire.CONFIRM, [[1, 2, 1]]], "stored must be"),
    ([wire.CONFIRM, [[2, 1, True]]], "sequence must be"),
    ([wire.DELIVER, 1, 1, [["a", b"", b"", 4, 0, "id", 0, 0]]], "message id must be bytes"),
    ([wire.COMMIT, 1, [], [[1, [1, 1], 0]], []], "2 fields are expected"),
    ([wire.MEMBERS, {"a": "b"}], "URLs must be an array"),
    ([wire.BYE, 1], "0 fields are expected"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG, ids=[f"{number}" for number in range(len(WRONG))])
def test_what_is_wrong_is_named(fields: list[Any], words: str) -> None:
    with pytest.raises(ProtocolError, match=re.escape(words)):
        decode(pack_frame(fields))


@pytest.mark.parametrize("data", [b"", b"\x90", b"\x80", b"\x05", b"\x91\xa1a", b"\x92\x05", b"\xc1", b"\x91\x05\x05"])
def test_what_is_no_array_with_a_type_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack_frame(data)


def test_a_frame_beyond_the_limit_is_refused_before_it_is_read() -> None:
    cutter = FrameCutter(100, "native.frame_bytes_max")
    cutter.feed(struct.pack(">I", 101))
    with pytest.raises(LimitExceeded, match=r"a frame has 101 bytes: limit native.frame_bytes_max is 100"):
        cutter.next()


def test_header_blocks_that_were_seen_are_known_and_bad_ones_never_are() -> None:
    known = HeaderBlocks()
    for number in range(3 * native_decoding.HEADER_BLOCKS_MAX):
        block = b"name:%d\n" % number
        assert known.check(block) is block
        assert known.check(bytes(bytearray(block))) == block
        with pytest.raises(ProtocolError):
            known.check(b"name:%d" % number)
        assert len(known.known) <= native_decoding.HEADER_BLOCKS_MAX
    long = b"n:" + b"v" * native_decoding.HEADER_BLOCK_REMEMBERED + b"\n"
    assert known.check(long) == long
    assert long not in known.known
    for odd in ([], {}, None, 5, ["n:v\n"], memoryview(b"n:v\n")):
        with pytest.raises(ProtocolError):
            known.check(odd)
