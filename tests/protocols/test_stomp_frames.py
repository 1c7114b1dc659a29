"""Framing, escaping and limits: FrameReader and the header codec, whichever side they serve."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from stomp_feeding import VERSIONS, steady

from pybroker.config import StompLimits
from pybroker.errors import InvalidMessage, LimitExceeded, ProtocolError
from pybroker.message import decode_headers, encode_headers
from pybroker.protocols.stomp_frames import Frame, FrameReader
from pybroker.protocols.stomp_headers import block_for, decode_head, encode_frame, encode_pair

COMMANDS = {b"SEND": True, b"MESSAGE": True, b"ERROR": True, b"SUBSCRIBE": False, b"RECEIPT": False}
SMALL = StompLimits(
    command_bytes_max=12, header_count_max=4, header_bytes_max=20, header_block_bytes_max=50, body_bytes_max=30
)

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(
    lambda name: name[0] != "\0" and name != "content-length"
)
headers_lists = st.lists(st.tuples(names, texts), max_size=6)


def reader(version: str | None = "1.2", limits: StompLimits | None = None) -> FrameReader:
    made = FrameReader(limits or StompLimits())
    made.expect(COMMANDS, version)
    return made


def read_all(made: FrameReader, pieces: list[bytes]) -> list[Frame]:
    frames: list[Frame] = []
    for piece in pieces:
        made.receive(piece)
        while found := made.read(2):
            frames += found
    return frames


def every_way(data: bytes, version: str | None = "1.2", limits: StompLimits | None = None) -> tuple[list[Frame], str]:
    """Frames and failure of whole data, of each byte alone, of every cut in two, and of data with more after it."""
    results = []
    ways = [[data], [data[at : at + 1] for at in range(len(data))]]
    ways += [[data[:cut], data[cut:]] for cut in range(1, len(data), 1 + len(data) // 50)]
    for pieces in ways:
        made = reader(version, limits)
        frames = read_all(made, pieces)
        results.append((frames, repr(made.failure), made.failed_head))
        if len(results) == 1 and not made.buffered_bytes:  # whole frames: what follows changes nothing
            ways.append([data + b"\n\n"])
    assert all(result == results[0] for result in results), results
    return results[0][:2]


def failure(data: bytes, version: str | None = "1.2", limits: StompLimits | None = None) -> str:
    frames, error = every_way(data, version, limits)
    assert frames == []
    assert error != "None"
    return error


@pytest.mark.parametrize("version", VERSIONS)
def test_a_frame_with_content_length_may_hold_nul(version: str) -> None:
    frames, error = every_way(b"SEND\na:b\ncontent-length:3\nc:d\n\nx\0y\0\nSEND\n\nz\0", version)
    assert frames == [(b"SEND", b"\na:b\nc:d\n", b"x\0y"), (b"SEND", b"\n", b"z")]
    assert error == "None"


def test_a_body_without_content_length_ends_at_the_first_nul() -> None:
    frames, _ = every_way(b"\n\nSEND\na:b\n\none\n\ntwo\0\n\n\nMESSAGE\n\n\0\r\n")
    assert frames == [(b"SEND", b"\na:b\n", b"one\n\ntwo"), (b"MESSAGE", b"\n", b"")]


@pytest.mark.parametrize("version", [None, "1.2"])
def test_carriage_returns_before_line_feeds_are_dropped(version: str | None) -> None:
    frames, error = every_way(b"SEND\r\na:b\r\ncontent-length:2\r\nc:\r\n\r\n\r\n\0\r\n\r\nSEND\n\r\nx\n\n\0", version)
    assert frames == [(b"SEND", b"\na:b\nc:\n", b"\r\n"), (b"SEND", b"\n", b"x\n\n")]
    assert error == "None"


def test_an_empty_line_of_carriage_return_is_found_before_a_later_empty_line() -> None:
    frames, _ = every_way(b"SEND\na:b\n\r\nbody\n\nmore\0")
    assert frames == [(b"SEND", b"\na:b\n", b"body\n\nmore")]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_carriage_return_is_part_of_the_line_before_1_2(version: str) -> None:
    frames, _ = every_way(b"SEND\na:b\r\n\nx\0", version)
    assert frames == [(b"SEND", b"\na:b\r\n", b"x")]
    assert "SEND\\\\r" in failure(b"SEND\r\na:b\r\n\r\nx\0", version)


def test_what_is_not_a_frame_is_refused() -> None:
    assert "expected SEND" in failure(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert "first line" in failure(b"\x16\x03\x01\0\0")  # a TLS hello on a plain port
    assert "first line" in failure(b"SEND\0\n\n\0")
    assert "expected SEND" in failure(b"send\n\n\0")
    assert "expected SEND" in failure(b"\rSEND\n\n\0")
    assert "empty line" in failure(b"SEND\na:b\n\0")
    assert "empty line" in failure(b"SEND\na:b\n\0SEND\nc:d\n\nx\0")
    assert "carriage return" in failure(b"SEND\na:b\rc\n\nx\0")


def test_a_body_where_none_may_be_is_refused_at_its_first_octet() -> None:
    assert "can't have a body" in failure(b"SUBSCRIBE\nid:0\n\nx")
    assert "can't have a body" in failure(b"SUBSCRIBE\ncontent-length:5\n\n")
    assert every_way(b"SUBSCRIBE\ncontent-length:0\n\n\0")[0] == [(b"SUBSCRIBE", b"\n", b"")]


@pytest.mark.parametrize("value", ["", "-1", "+1", "1.0", "1e3", "0x10", "1_0", " 1", "1 ", "٣", "²", "a"])
def test_a_content_length_that_is_no_number_is_refused_before_the_body(value: str) -> None:
    assert "content-length must be" in failure(f"SEND\ncontent-length:{value}\n\n".encode())


@pytest.mark.parametrize("value", ["67108865", "9" * 18, "9" * 5000, "0" * 19])
def test_a_content_length_that_is_too_much_is_refused_before_the_body(value: str) -> None:
    error = failure(b"SEND\ncontent-length:" + value.encode() + b"\n\n")
    assert error.startswith("LimitExceeded")
    assert "stomp.body_bytes_max" in error


def test_the_first_content_length_counts() -> None:
    frames, _ = every_way(b"SEND\ncontent-length:3\ncontent-length:x\n\na\0b\0")
    assert frames == [(b"SEND", b"\ncontent-length:x\n", b"a\0b")]


def test_spaces_around_a_content_length_are_for_1_0() -> None:
    assert every_way(b"SEND\ncontent-length: 3\n\na\0b\0", "1.0")[0] == [(b"SEND", b"\n", b"a\0b")]


@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_a_content_length_that_no_nul_follows_is_refused(length: int) -> None:
    assert "no NUL follows" in failure(b"SEND\ncontent-length:%d\n\nabc\0\n\n" % length)


@pytest.mark.parametrize(
    ("data", "limit"),
    [
        (b"X" * 12, None),
        (b"X" * 13 + b"\0", "stomp.command_bytes_max"),
        (b"X" * 12 + b"\r", None),
        (b"X" * 13, "stomp.command_bytes_max"),
        (b"X" * 14 + b"\n", "stomp.command_bytes_max"),
        (b"SEND\na:b\nc:d\ne:f\ng:h\n\n", None),
        (b"SEND\na:b\nc:d\ne:f\ng:h\ni", "stomp.header_count_max"),
        (b"SEND\n" + b"a" * 20, None),
        (b"SEND\n" + b"a" * 22, "stomp.header_bytes_max"),
        (b"SEND\na:" + b"a" * 18 + b"\n", None),
        (b"SEND\na:" + b"a" * 19 + b"\n", "stomp.header_bytes_max"),
        (b"SEND\n" + b"a:bbbbbbbbbbbbbbbbb\n" * 2 + b"a:bbbbbbb\n\r\nx", None),
        (b"SEND\n" + b"a:bbbbbbbbbbbbbbbbb\n" * 2 + b"a:bbbbbbbb\n", "stomp.header_block_bytes_max"),
        (b"SEND\n" + b"a:bbbbbbbbbbbbbbbbb\n" * 2 + b"a:bbbbbbbb", "stomp.header_block_bytes_max"),
        (b"SEND\n\n" + b"x" * 30, None),
        (b"SEND\n\n" + b"x" * 31, "stomp.body_bytes_max"),
        (b"SEND\n\n" + b"x" * 31 + b"\0", "stomp.body_bytes_max"),
        (b"SEND\ncontent-length:30\n\n" + b"x" * 30 + b"\0", None),
        (b"SEND\ncontent-length:31\n\n", "stomp.body_bytes_max"),
    ],
)
def test_each_limit_is_named_when_it_is_passed_and_not_before(data: bytes, limit: str | None) -> None:
    _, error = every_way(data, "1.2", SMALL)
    assert (limit in error) if limit else error == "None"


def test_a_full_block_may_end_in_any_way() -> None:
    full = b"SEND\n" + b"a:bbbbbbbbbbbbbbbbb\n" * 2 + b"a:bbbbbbb\n"
    for end in (b"\n", b"\r\n"):
        frames, _ = every_way(full + end + b"x\0", "1.2", SMALL)
        assert [frame[2] for frame in frames] == [b"x"]


def test_short_headers_are_counted_too() -> None:
    limits = StompLimits(header_count_max=3)
    assert len(every_way(b"SEND\na:\na:\na:\n\n\0", "1.2", limits)[0]) == 1
    assert "stomp.header_count_max" in failure(b"SEND\na:\na:\na:\na:\n\n\0", "1.2", limits)


def test_a_limit_error_carries_its_value() -> None:
    made = reader(limits=SMALL)
    made.receive(b"SEND\na:b\nreceipt:7\na:b\na:b\na:b\n")
    assert made.read(1) == []
    assert isinstance(made.failure, LimitExceeded)
    assert (made.failure.limit, made.failure.value) == ("stomp.header_count_max", 4)
    assert b"\nreceipt:7\n" in made.failed_head


@pytest.mark.parametrize("endless", [b"x", b"x:y\n", b"\r", b"a" * 100, b"SEND\n"])
def test_a_peer_that_never_ends_holds_little(endless: bytes) -> None:
    made = reader(limits=SMALL)
    made.receive(b"SEND\n")
    for _ in range(300):
        made.receive(endless)
        made.read(10)
        assert made.buffered_bytes <= 100 + len(endless)
    assert made.failure is not None


def test_endless_heart_beats_hold_nothing() -> None:
    made = reader()
    for _ in range(100):
        made.receive(b"\n" * 1000 + b"\r\n" * 1000)
        assert made.read(10) == []
        assert made.buffered_bytes == 0
    assert made.failure is None


def test_the_end_of_the_stream_inside_a_frame_is_a_failure_and_between_frames_is_none() -> None:
    for data in (b"S", b"SEND\n", b"SEND\na", b"SEND\n\nx", b"SEND\ncontent-length:3\n\nx"):
        made = reader()
        assert read_all(made, [data, b""]) == []
        assert "inside a frame" in str(made.failure), data
    made = reader()
    assert len(read_all(made, [b"SEND\n\nx\0\n", b""])) == 1
    assert made.failure is None


def test_frames_before_a_failure_are_read() -> None:
    frames, error = every_way(b"SEND\n\na\0SEND\n\nb\0BOGUS\n\n\0SEND\n\nc\0")
    assert [frame[2] for frame in frames] == [b"a", b"b"]
    assert "BOGUS" in error


def test_a_large_body_in_small_reads_takes_linear_time() -> None:
    def seconds(size: int) -> float:
        start = time.process_time()
        for length in (b"content-length:%d\n" % size, b""):
            made = reader()
            made.receive(b"SEND\n" + length + b"\n")
            for _ in range(size // 512):
                assert made.read(1) == []
                made.receive(b"x" * 512)
            made.receive(b"\0")
            ((_, _, body),) = made.read(1)
            assert len(body) == size
        return time.process_time() - start

    small, large = seconds(1 << 20), seconds(1 << 23)
    assert large < 30 * small + 0.5  # eight times the bytes; quadratic would be 64 times


@steady
@given(
    command=st.sampled_from([b"SEND", b"MESSAGE"]),
    headers=headers_lists,
    body=st.binary(max_size=40),
    version=st.sampled_from(["1.1", "1.2"]),
)
@example(command=b"SEND", headers=[("\\", ":\n\r\\c"), ("a\r", "\r")], body=b"\0\n\n", version="1.2")
def test_every_frame_comes_back(command: bytes, headers: list[tuple[str, str]], body: bytes, version: str) -> None:
    data = encode_frame(command.decode(), headers, version, body)
    frames, error = every_way(data + data, version)
    assert error == "None"
    assert [(frame[0], decode_head(frame[1], version), frame[2]) for frame in frames] == [(command, headers, body)] * 2


@steady
@given(headers=headers_lists, body=st.binary(max_size=40))
def test_1_0_frames_come_back_as_far_as_1_0_can_say_them(headers: list[tuple[str, str]], body: bytes) -> None:
    expected = [(name, value.replace("\n", " ")) for name, value in headers if ":" not in name and "\n" not in name]
    frames, _ = every_way(encode_frame("SEND", headers, "1.0", body), "1.0")
    assert [(decode_head(head, "1.0"), got) for _, head, got in frames] == [(expected, body)]


@steady
@given(headers=headers_lists)
def test_a_header_block_is_said_by_each_version_as_far_as_it_can(headers: list[tuple[str, str]]) -> None:
    block = encode_headers(headers)
    assert block_for(block, "1.2") == block
    assert decode_head(b"\n" + block_for(block, "1.1"), "1.1") == headers
    kept = [(name, value.replace("\n", " ")) for name, value in headers if ":" not in name and "\n" not in name]
    assert decode_head(b"\n" + block_for(block, "1.0"), "1.0") == kept


@steady
@given(block=st.lists(st.sampled_from(["\\", "n", "c", "r", "t", "a", ":", "é"]), max_size=8).map("".join))
def test_escapes_are_those_of_each_version(block: str) -> None:
    head = f"\nx:{block}\n".encode()
    try:
        expected = decode_headers(f"x:{block}\n".encode())  # the reference: STOMP 1.2 in the values layer
    except InvalidMessage:
        with pytest.raises(ProtocolError):
            decode_head(head, "1.2")
    else:
        odd_end = (len(block) - len(block.rstrip("\\"))) % 2
        if not odd_end:  # the values layer never meets a lone backslash at the end
            assert decode_head(head, "1.2") == expected
    assert decode_head(head, "1.0") == [("x", block)]
    assert decode_head(head, None) == [("x", block)]
    undefined = {"\\" + name for name in "rta:é"}
    pairs = block.replace("\\\\", "")
    if any(escape in pairs for escape in undefined):
        with pytest.raises(ProtocolError, match=r"not defined in STOMP 1\.1"):
            decode_head(head, "1.1")


@pytest.mark.parametrize("text", ["\\t", "a\\", "\\:", "\\ ", "\\\\\\", "\\N"])
@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_undefined_escapes_are_refused_in_names_and_values(text: str, version: str) -> None:
    for line in (f"x:{text}", f"{text}x:y" if ":" not in text and not text.endswith("\\") else f"x:{text}"):
        with pytest.raises(ProtocolError, match="not defined"):
            decode_head(f"\n{line}\n".encode(), version)


@pytest.mark.parametrize("head", [b"\na\n", b"\n:b\n", b"\na:\xff\n", b"\n\xc0\x80:b\n", b"\na:\xed\xa0\x80\n"])
def test_malformed_header_lines_are_refused(head: bytes) -> None:
    for version in (None, *VERSIONS):
        with pytest.raises(ProtocolError):
            decode_head(head, version)


def test_a_raw_colon_in_a_value_is_taken_as_it_is() -> None:
    assert decode_head(b"\nurl:http://x:1/\n", "1.2") == [("url", "http://x:1/")]


def test_a_line_feed_never_gets_out_of_a_header() -> None:
    for version in (None, *VERSIONS):
        assert encode_pair("a", "b\nc:d\n\n\0", version).count("\n") == 1


@steady
@given(data=st.binary(max_size=300), version=st.sampled_from([None, *VERSIONS]))
def test_random_bytes_never_raise(data: bytes, version: str | None) -> None:
    every_way(data, version, SMALL)


@steady
@given(
    pieces=st.lists(
        st.sampled_from(
            [
                b"SEND",
                b"SUBSCRIBE",
                b"\n",
                b"\r\n",
                b"\n\n",
                b"\0",
                b"a:b",
                b"content-length:",
                b"3",
                b"receipt:1",
                b"\r",
                b"x",
            ]
        ),
        max_size=40,
    ),
    version=st.sampled_from([None, *VERSIONS]),
    limits=st.sampled_from([SMALL, StompLimits()]),
)
def test_likely_bytes_mean_the_same_however_they_are_cut(
    pieces: list[bytes], version: str | None, limits: StompLimits
) -> None:
    every_way(b"".join(pieces), version, limits)
