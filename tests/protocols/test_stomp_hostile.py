"""The memo of header lines, capped turns, limits, the end of the stream, and bytes that mean harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stomp_feeding import VERSIONS, every_way, feed, new_session, open_session, plain, steady

from pybroker.config import StompLimits
from pybroker.errors import LimitExceeded
from pybroker.message import decode_headers, encode_headers
from pybroker.protocols.stomp_events import (
    Failed,
    Send,
)
from pybroker.protocols.stomp_headers import encode_frame
from pybroker.protocols.stomp_send import HeaderMemo

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
names = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(lambda name: name[0] != "\0")


# The memo, turns, limits, hostile peers.

send_lines = st.lists(
    st.sampled_from(
        [
            b"destination:/queue/a\n",
            b"destination:/queue/b\n",
            b"receipt:1\n",
            b"receipt:a\\cb\n",
            b"receipt:\n",
            b"receipt:\\t\n",
            b"content-length:1\n",
            b"content-length:3\n",
            b"transaction:t\n",
            b"persistent:false\n",
            b"priority:7\n",
            b"priority:8\n",
            b"priority:x\n",
            b"expires:5\n",
            b"a:b\n",
            b"a:\\c\n",
            b"a:b\r\n",
            b"c: d \n",
            b"xreceipt:7\n",
            b"message-id:5\n",
            b"producer-id:p\nproducer-sequence:6\n",
            b"producer-sequence:7\n",
        ]
    ),
    max_size=6,
)


@steady
@given(
    frames=st.lists(st.tuples(send_lines, st.sampled_from([b"x", b"xyz"])), max_size=8),
    version=st.sampled_from(VERSIONS),
)
def test_the_memo_changes_nothing(frames: list[tuple[list[bytes], bytes]], version: str) -> None:
    data = b"".join(b"SEND\n" + b"".join(lines) + b"\n" + body + b"\0" for lines, body in frames)
    plainly = feed(open_session(version, memo=HeaderMemo(entries_max=0)), [data])
    for memo in (HeaderMemo(), HeaderMemo(entries_max=2), HeaderMemo(bytes_max=100)):
        session = open_session(version, memo=memo)
        events, output = feed(session, [data])
        assert [plain(event) for event in events] == [plain(event) for event in plainly[0]]
        assert output == plainly[1]
    warm = HeaderMemo()  # shared with sessions of other versions, and filled by an earlier one
    for before in VERSIONS:
        feed(open_session(before, memo=warm), [data])
    events, output = feed(open_session(version, memo=warm), [data])
    assert [plain(event) for event in events] == [plain(event) for event in plainly[0]]
    assert output == plainly[1]


def test_the_memo_is_bounded_and_used() -> None:
    memo = HeaderMemo(entries_max=4, bytes_max=1000)
    session = open_session(memo=memo)
    for number in range(50):
        feed(session, [b"SEND\ndestination:/queue/a\nn:%d\n\n\0" % (number % 7)])
        assert len(memo.table("1.2")) <= 4
    feed(session, [b"SEND\ndestination:/queue/a\nn:" + b"x" * 3000 + b"\n\n\0"])
    assert sum(len(lines) for lines in memo.table("1.2")) <= 1000
    memo = HeaderMemo()
    session = open_session(memo=memo)
    data = b"".join(
        b"SEND\ndestination:/queue/a\nreceipt:%d\na:b\ncontent-length:%d\n\n%b\0" % (number, number, b"x" * number)
        for number in range(20)
    )
    events, _ = feed(session, [data])
    assert len(events) == 20
    assert list(memo.table("1.2")) == [b"\ndestination:/queue/a\na:b\n"]
    assert len({id(event.message.header_block) for event in events if isinstance(event, Send)}) == 1


def test_versions_that_share_a_memo_do_not_share_entries() -> None:
    memo = HeaderMemo()
    blocks = []
    for version in ("1.0", "1.2", "1.0", "1.2"):
        (event,), _ = feed(open_session(version, memo=memo), [b"SEND\ndestination:/queue/a\nx:\\c\n\n\0"])
        assert isinstance(event, Send)
        blocks.append(event.message.header_block)
    assert blocks == [b"x:\\\\c\n", b"x:\\c\n"] * 2


def test_the_memo_is_bounded_in_bytes() -> None:
    memo = HeaderMemo(entries_max=100, bytes_max=4000)
    session = open_session(memo=memo)
    for number in range(50):
        feed(session, [b"SEND\ndestination:/queue/a\nn:%d" % number + b"x" * 300 + b"\n\n\0"])
        assert 0 < sum(len(lines) for lines in memo.table("1.2")) <= 2000


def test_a_turn_is_capped_and_keeps_order() -> None:
    session = open_session()
    session.receive_data(b"".join(b"SEND\ndestination:/queue/a\n\n%d\0" % number for number in range(100)))
    bodies = []
    while events := session.next_events(7):
        assert len(events) <= 7
        bodies += [int(event.message.body) for event in events if isinstance(event, Send)]
    assert bodies == list(range(100))
    assert session.buffered_bytes == 0


def test_events_before_a_failure_come_first_and_none_after() -> None:
    session = open_session()
    good = b"SEND\ndestination:/queue/a\nreceipt:1\n\n\0"
    events, output = feed(session, [good + good + b"SEND\nreceipt:2\n\n\0" + good, good])
    assert [type(event) for event in events] == [Send, Send, Failed]
    assert output.count(b"ERROR\n") == 1
    assert b"receipt-id:2\n" in output
    assert session.closed


@pytest.mark.parametrize(
    ("frame", "limit"),
    [
        (b"SEND\nreceipt:1\n" + b"a:b\n" * 1000, "stomp.header_count_max"),
        (b"SEND\nreceipt:1\na:" + b"x" * 20_000, "stomp.header_bytes_max"),
        (b"SEND\nreceipt:1\n" + (b"a:" + b"x" * 16_000 + b"\n") * 5, "stomp.header_block_bytes_max"),
        (b"SEND\nreceipt:1\ncontent-length:67108865\n\n", "stomp.body_bytes_max"),
    ],
)
def test_a_limit_that_is_passed_is_named_in_the_error(frame: bytes, limit: str) -> None:
    session = open_session()
    events, output = feed(session, [frame])
    (event,) = events
    assert isinstance(event, Failed)
    assert isinstance(event.error, LimitExceeded)
    assert event.error.limit == limit
    assert output.startswith(b"ERROR\nreceipt-id:1\nmessage:")
    assert limit.encode() in output
    assert b"\ncode:limit\n" in output
    assert session.buffered_bytes == 0


def test_exactly_the_limits_are_let_through() -> None:
    limits = StompLimits(header_count_max=5, header_bytes_max=30, header_block_bytes_max=60, body_bytes_max=4)
    frame = b"SEND\ndestination:/queue/a\n" + b"a:b\n" * 2 + b"receipt:1\ncontent-length:4\n\nabcd\0"
    for _ in range(2):  # plainly, and from the memo
        (event,) = every_way(lambda: open_session(limits=limits), frame)[0]
        assert isinstance(event, Send), event
    for more in (frame.replace(b"a:b\n", b"a:b\na:b\n", 1), frame.replace(b":4\n\n", b":5\n\n")):
        (event,) = every_way(lambda: open_session(limits=limits), more)[0]
        assert isinstance(event, Failed)


def test_the_end_of_the_stream() -> None:
    session = open_session()
    assert feed(session, [b"SEND\ndestination:/queue/a\n\nx\0\n", b""])[0][0].message.body == b"x"  # type: ignore[attr-defined]
    session = open_session()
    (event,), _ = feed(session, [b"SEND\ndestination:/queue/a\n\nx", b""])
    assert isinstance(event, Failed)
    assert "ended inside a frame" in str(event.error)


@steady
@given(data=st.binary(max_size=400), version=st.sampled_from([None, *VERSIONS]))
def test_random_bytes_never_raise(data: bytes, version: str | None) -> None:
    every_way(new_session if version is None else lambda: open_session(version), data)


@steady
@given(
    version=st.sampled_from(VERSIONS),
    pieces=st.lists(
        st.sampled_from(
            [
                b"CONNECT\n\n\0", b"SEND\n", b"SUBSCRIBE\n", b"UNSUBSCRIBE\n", b"ACK\n", b"NACK\n", b"BEGIN\n",
                b"DISCONNECT\n", b"destination:/queue/a\n", b"id:1\n", b"message-id:1\n", b"subscription:1\n",
                b"transaction:1\n", b"receipt:\\c\n", b"receipt:1\n", b"content-length:2\n", b"\n", b"\r\n", b"\0", b"ab",
                b"\n\n\0", b"\xff", b":", b"\\", b"prefetch-count:1\n", b"ack:client\n", b"persistent:false\n",
            ]
        ),
        max_size=30,
    ),
)  # fmt: skip
def test_likely_bytes_mean_the_same_however_they_are_cut(version: str, pieces: list[bytes]) -> None:
    limits = StompLimits(command_bytes_max=20, header_count_max=5, header_bytes_max=40, header_block_bytes_max=100)
    data = b"".join(pieces)
    if data:
        every_way(lambda: open_session(version, limits), data)


@steady
@given(
    headers=st.lists(st.tuples(names, texts), max_size=5),
    body=st.binary(max_size=20),
    version=st.sampled_from(["1.1", "1.2"]),
)
def test_what_is_sent_is_what_is_delivered(headers: list[tuple[str, str]], body: bytes, version: str) -> None:
    headers = [("x" + name, value) for name, value in headers]
    session = open_session(version)
    frame = encode_frame("SEND", [("destination", "/queue/a"), *headers], version, body)
    (event,), _ = feed(session, [frame])
    assert isinstance(event, Send)
    assert decode_headers(event.message.header_block) == headers
    assert event.message.header_block == encode_headers(headers)
    assert event.message.body == body
