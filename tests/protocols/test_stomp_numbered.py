"""SEND and COMMIT that a producer numbers: which headers say so, and that the memo of header lines is neither filled nor fooled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stomp_feeding import VERSIONS, every_way, feed, open_session, plain, steady

from pybroker.protocols.stomp_events import Abort, Begin, Commit, Event, Failed, Numbered, Send
from pybroker.protocols.stomp_headers import encode_pair
from pybroker.protocols.stomp_numbered import cut_sequence
from pybroker.protocols.stomp_send import HeaderMemo

every_version = pytest.mark.parametrize("version", VERSIONS)


def sends(version: str, *blocks: bytes, memo: HeaderMemo | None = None) -> list[Event]:
    data = b"".join(b"SEND\ndestination:/queue/a\n" + block + b"\nbody\0" for block in blocks)
    events, _ = every_way(lambda: open_session(version, memo=memo), data)
    return events


def numbers(events: list[Event]) -> list[Numbered | None]:
    assert all(isinstance(event, Send) for event in events), events
    return [event.numbered for event in events if isinstance(event, Send)]


@every_version
def test_a_send_says_its_number_and_passes_nothing_of_it_on(version: str) -> None:
    events = sends(
        version,
        b"producer-id:ward-3\nproducer-sequence:7\n",
        b"a:b\nproducer-repeat:true\nreceipt:r\nproducer-sequence:0\nproducer-id:ward-3\nc:d\n",
        b"producer-id:ward-3\nproducer-sequence:999999999999999999\nproducer-repeat:false\n",
        b"producer-id:\xc3\xa4\nproducer-sequence:007\nproducer-sequence:8\nproducer-id:other\n",
        b"a:b\n",
    )
    assert numbers(events) == [
        Numbered("ward-3", 7),
        Numbered("ward-3", 0, True),
        Numbered("ward-3", 10**18 - 1),
        Numbered("ä", 7),
        None,
    ]
    blocks = [event.message.header_block for event in events if isinstance(event, Send)]
    assert blocks == [b"", b"a:b\nc:d\n", b"", b"", b"a:b\n"]
    assert isinstance(events[1], Send)
    assert events[1].receipt == b"r"


def test_ways_of_writing_that_are_not_plain() -> None:
    assert numbers(sends("1.2", b"producer-id:a\\cb\r\nproducer-sequence:5\r\n")) == [Numbered("a:b", 5)]
    assert numbers(sends("1.0", b"producer-id: a \nproducer-sequence: 5 \n")) == [Numbered("a", 5)]


BAD = {
    "no id": (b"producer-sequence:1\n", "producer-id, too"),
    "no sequence": (b"producer-id:p\n", "producer-sequence, too"),
    "repeat alone": (b"producer-repeat:true\n", "producer-id, too"),
    "repeat and id": (b"producer-repeat:true\nproducer-id:p\n", "producer-sequence, too"),
    "empty id": (b"producer-id:\nproducer-sequence:1\n", "1 to 64 printable"),
    "long id": (b"producer-id:" + b"x" * 65 + b"\nproducer-sequence:1\n", "1 to 64 printable"),
    "id with a space": (b"producer-id:link a\nproducer-sequence:1\n", "without a space"),
    "id with a control character": (b"producer-id:a\x07b\nproducer-sequence:1\n", "printable"),
    "empty sequence": (b"producer-id:p\nproducer-sequence:\n", "whole number from 0"),
    "negative sequence": (b"producer-id:p\nproducer-sequence:-1\n", "whole number from 0"),
    "signed sequence": (b"producer-id:p\nproducer-sequence:+1\n", "whole number from 0"),
    "fraction": (b"producer-id:p\nproducer-sequence:1.5\n", "whole number from 0"),
    "hexadecimal": (b"producer-id:p\nproducer-sequence:0x1\n", "whole number from 0"),
    "other digits": ("producer-id:p\nproducer-sequence:\u0661\n".encode(), "whole number from 0"),
    "superscript": ("producer-id:p\nproducer-sequence:\u00b2\n".encode(), "whole number from 0"),
    "huge sequence": (b"producer-id:p\nproducer-sequence:1000000000000000000\n", "up to 18 digits"),
    "first of two counts": (b"producer-id:p\nproducer-sequence:x\nproducer-sequence:1\n", "whole number from 0"),
    "repeat": (b"producer-id:p\nproducer-sequence:1\nproducer-repeat:yes\n", "true or false"),
}


@every_version
@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said(name: str, version: str) -> None:
    lines, text = BAD[name]
    for frame in (b"SEND\ndestination:/queue/a\n" + lines + b"\nbody\0", b"COMMIT\ntransaction:t\n" + lines + b"\n\0"):
        events, output = every_way(lambda: open_session(version), frame)
        (failed,) = events
        assert isinstance(failed, Failed)
        assert text in str(failed.error)
        assert failed.error.code == "protocol"
        assert output.startswith(b"ERROR\n")


@every_version
def test_a_commit_says_its_number_and_begin_and_abort_do_not_care(version: str) -> None:
    numbered = b"transaction:t\nproducer-id:p\nproducer-sequence:7\nproducer-repeat:true\n\n\0"
    data = (
        b"BEGIN\n"
        + numbered
        + b"COMMIT\n"
        + numbered
        + b"COMMIT\ntransaction:t\nreceipt:r\n\n\0"
        + b"ABORT\n"
        + numbered
    )
    events, _ = every_way(lambda: open_session(version), data)
    assert events == [
        Begin("t", None),
        Commit("t", None, Numbered("p", 7, True)),
        Commit("t", b"r"),
        Abort("t", None),
    ]


def test_frames_of_one_producer_share_what_is_remembered() -> None:
    memo = HeaderMemo(entries_max=4)
    session = open_session(memo=memo)
    data = b"".join(
        b"SEND\ndestination:/queue/a\nreceipt:%d\nproducer-id:p\nproducer-sequence:%d\na:b\n\n\0" % (number, number)
        for number in range(100)
    )
    events, _ = feed(session, [data])
    assert numbers(events) == [Numbered("p", number) for number in range(100)]
    assert list(memo.table("1.2")) == [b"\ndestination:/queue/a\nproducer-id:p\na:b\n\0"]
    assert len({id(event.message.header_block) for event in events if isinstance(event, Send)}) == 1
    frames = [b"SEND\ndestination:/queue/a\nproducer-id:p\nproducer-sequence: %d\n\n\0" % number for number in range(9)]
    events, _ = feed(open_session("1.0", memo=memo), frames)
    assert numbers(events) == [Numbered("p", number) for number in range(9)]
    assert memo.table("1.0") == {}, "numbers that can't be cut out are not remembered"


def test_what_is_remembered_of_numbered_frames_is_no_answer_for_others() -> None:
    memo = HeaderMemo()
    numbered, plain_lines = b"producer-id:p\nproducer-sequence:7\n", b"producer-id:p\n"
    for _ in range(2):
        events, _ = feed(open_session(memo=memo), [b"SEND\ndestination:/queue/a\n" + numbered + b"\n\0"])
        assert numbers(events) == [Numbered("p", 7)]
        (failed,), _ = feed(open_session(memo=memo), [b"SEND\ndestination:/queue/a\n" + plain_lines + b"\n\0"])
        assert isinstance(failed, Failed)


some_lines = st.lists(
    st.sampled_from(
        [
            *(b"producer-id:p\n", b"producer-id:q\n", b"producer-id: p \n", b"producer-id:p\r\n"),
            *(
                b"producer-sequence:1\n",
                b"producer-sequence:2\n",
                b"producer-sequence: 3 \n",
                b"producer-sequence:4\r\n",
            ),
            *(b"producer-sequence:x\n", b"producer-sequence:\n", b"xproducer-sequence:5\n", b"a:\\c\n", b"a:b\n"),
            *(b"producer-repeat:true\n", b"producer-repeat:false\n", b"receipt:1\n", b"transaction:t\n"),
        ]
    ),
    max_size=5,
)


@steady
@given(st.lists(some_lines, max_size=6), st.sampled_from(VERSIONS))
def test_the_memo_changes_nothing(frames: list[list[bytes]], version: str) -> None:
    def all_of(memo: HeaderMemo) -> list[object]:
        found: list[object] = []
        for lines in frames:  # a connection for each: one that fails ends
            events, _ = feed(
                open_session(version, memo=memo), [b"SEND\ndestination:/queue/a\n" + b"".join(lines) + b"\nbody\0"]
            )
            found += map(plain, events)
        return found

    plainly = all_of(HeaderMemo(entries_max=0))
    memo = HeaderMemo()
    assert all_of(memo) == plainly
    assert all_of(memo) == plainly, "warm"


@given(
    st.integers(0, 10**18 - 1),
    st.text(min_size=1, max_size=5).map(lambda name: encode_pair("x" + name, "v", "1.2").encode()),
)
def test_cutting_leaves_the_other_lines(sequence: int, line: bytes) -> None:
    lines = b"\n" + line + b"producer-sequence:%d\n" % sequence + line
    assert cut_sequence(lines) == (b"\n" + line + line, sequence)
    assert cut_sequence(b"\n" + line) is None
