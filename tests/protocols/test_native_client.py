"""The client's side of the native protocol: what may come when, how acknowledgements are packed, that no bytes make it raise."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker import errors
from pybroker.errors import BrokerError, BrokerFull, LimitExceeded, NotLeader, ProtocolError, SubscriptionError
from pybroker.message import Message
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_client import (
    CLOSED,
    OPEN,
    Answered,
    Closed,
    Confirmed,
    NativeClientSession,
    Numbers,
    Opened,
    Rejected,
    ranges_of,
)
from pybroker.protocols.native_decoding import FrameCutter, HeaderBlocks, decode_frame
from pybroker.protocols.native_errors import error_of
from pybroker.protocols.native_frames import Ack, Bye, Commit, Deliver, Frame, Hello, Nack, Send, Subscribe, Unsubscribe
from pybroker.protocols.native_sends import Row, Sends

WELCOME = {
    "broker": "b",
    "session": "s",
    "heartbeat": 5,
    "body_bytes_max": 1_000,
    "frame_bytes_max": 100_000,
    "send_messages_max": 100,
    "send_bytes_max": 10_000,
    "producer_known": True,
    "members": {"b": ["pybroker://b:1"]},
    "something_new": [1, 2],
}
ROW: Row = ("/queue/q", b"x", b"", 20, 0)


class Pair:
    """A session, and the eyes of its broker."""

    def __init__(self, opened: bool = True) -> None:
        self.sends = Sends("producer-of-16-chars")
        self.session = NativeClientSession(self.sends, Numbers(), {"software": "test"})
        self._cutter = FrameCutter(10**6, "none")
        self._blocks = HeaderBlocks()
        assert self.said() == [Hello((1,), {"software": "test"})]
        if opened:
            (event,) = self.session.receive_data(wire.encode_welcome(1, WELCOME))
            assert isinstance(event, Opened)
            self.sends.connected(event.send_messages_max, event.send_bytes_max, 10**6, 10**6)

    def said(self) -> list[Frame]:
        frames: list[Frame] = []
        while data := self.session.data_to_send():
            self._cutter.feed(data)
        while (fields := self._cutter.next()) is not None:
            frames.append(decode_frame(fields, self._blocks))
        return frames

    def hear(self, *frames: bytes) -> list[Any]:
        return self.session.receive_data(b"".join(frames))


def test_a_broker_lets_the_client_in() -> None:
    pair = Pair(opened=False)
    (event,) = pair.hear(wire.encode_welcome(1, WELCOME))
    assert event == Opened("b", "s", "", 5.0, 1_000, 100_000, 100, 10_000, 0, 0, True, {"b": ("pybroker://b:1",)})
    assert pair.session.state == OPEN


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("broker", 5),
        ("heartbeat", -1),
        ("heartbeat", "5"),
        ("heartbeat", float("nan")),
        ("body_bytes_max", 0),
        ("frame_bytes_max", None),
        ("send_messages_max", True),
        ("send_bytes_max", 1.5),
        ("transaction_messages_max", -1),
        ("producer_known", 1),
        ("members", []),
        ("members", {"b": "url"}),
        ("members", {"b": [5]}),
    ],
)
def test_a_welcome_that_is_none(name: str, value: object) -> None:
    pair = Pair(opened=False)
    (event,) = pair.hear(wire.encode_welcome(1, {**WELCOME, name: value}))
    assert isinstance(event, Closed)
    assert isinstance(event.error, ProtocolError)
    assert name in str(event.error)


def test_another_version() -> None:
    (event,) = Pair(opened=False).hear(wire.encode_welcome(2, WELCOME))
    assert isinstance(event, Closed)
    assert "version 2" in str(event.error)


FRAMES = {
    "welcome": wire.encode_welcome(1, WELCOME),
    "confirm": wire.encode_confirm([(1, 1, True)]),
    "refused": wire.encode_refused(1, "full", "x"),
    "done": wire.encode_done(1),
    "failed": wire.encode_failed(1, "full", "x"),
    "deliver": wire.encode_deliver(1, 1, []),
    "ended": wire.encode_ended(1, "full", "x"),
    "members": wire.encode_members({}),
    "beat": wire.encode_beat(),
    "bye": wire.encode_bye(),
    "hello": wire.encode_hello({}),
    "send": wire.encode_send(1, []),
    "subscribe": wire.encode_subscribe(1, 1, "/queue/q", "auto"),
}


@pytest.mark.parametrize(
    ("opened", "name"),
    [(False, name) for name in FRAMES if name != "welcome"]
    + [
        (True, name)
        for name in ("welcome", "hello", "send", "subscribe", "confirm", "refused", "done", "failed", "bye")
    ],
)
def test_frames_that_may_not_come_now(opened: bool, name: str) -> None:
    pair = Pair(opened)
    (event,) = pair.hear(FRAMES[name], FRAMES["beat"])
    assert isinstance(event, Closed)
    assert isinstance(event.error, ProtocolError)
    assert pair.session.state == CLOSED
    assert pair.hear(FRAMES["beat"]) == []
    assert pair.said() == []


def test_an_error_is_the_last_word() -> None:
    pair = Pair()
    events = pair.hear(
        wire.encode_deliver(1, 1, []),
        wire.encode_error("not-leader", "b leads", {"leader": "b", "urls": ["u"]}),
        b"junk",
    )
    assert isinstance(events[0], Deliver)
    error = events[1].error
    assert isinstance(error, NotLeader)
    assert (error.leader, error.urls, str(error)) == ("b", ("u",), "b leads")


def test_the_end_of_the_stream() -> None:
    (event,) = Pair().hear(b"")
    assert isinstance(event, Closed)
    assert event.error is not None


def test_requests_and_their_answers() -> None:
    pair = Pair()
    session = pair.session
    first = session.subscribe("s1", "/queue/q", "auto", 5, "")
    second = session.subscribe("s2", "/topic/t", "individual", 0, "d")
    session.unsubscribe("u", first)
    session.remove("r", "d")
    session.credit(second, 9)
    assert pair.said() == [
        Subscribe(1, 1, "/queue/q", "auto", 5, "", {}),
        Subscribe(2, 2, "/topic/t", "individual", 0, "d", {}),
        Unsubscribe(3, 1),
        wire.Remove(4, "d"),
        wire.Credit(2, 9),
    ]
    events = pair.hear(wire.encode_done(2), wire.encode_failed(1, "subscription", "no"), wire.encode_done(4))
    assert events[0] == Answered(["s2"], None)
    assert events[1].contexts == ["s1"]
    assert isinstance(events[1].error, SubscriptionError)
    assert session.owes
    assert session.orphans() == ["u"]


def test_acknowledgements_of_a_turn_are_one_frame() -> None:
    pair = Pair()
    session = pair.session
    session.settle(1, [3, 4], True, "a")
    session.settle(2, [7], True)
    session.settle(1, [1, 2, 6], True, "b")
    session.settle(1, [8], False, "c")
    session.settle(1, [9], True)
    assert pair.said() == [Ack(1, 1, [(1, 4), (6, 6)]), Ack(0, 2, [(7, 7)]), Nack(2, 1, [(8, 8)]), Ack(0, 1, [(9, 9)])]
    assert pair.hear(wire.encode_done(1), wire.encode_done(2)) == [Answered(["a", "b"], None), Answered(["c"], None)]


def test_many_ranges_are_several_frames_with_one_answer() -> None:
    pair = Pair()
    pair.session.settle(1, list(range(0, 5_000, 2)), True, "all")
    frames = pair.said()
    assert [len(each.ranges) for each in frames if isinstance(each, Ack)] == [1_000, 1_000, 500]
    assert [each.request for each in frames if isinstance(each, Ack)] == [0, 0, 1], "done when all before it is"


def test_acknowledgements_go_before_the_end_of_their_subscription_and_before_transactions() -> None:
    pair = Pair()
    pair.sends.submit_transaction([ROW], 1, {}, {}, "tx")
    pair.session.settle(1, [1], True)
    pair.session.unsubscribe("u", 1)
    pair.session.settle(2, [2], True)
    kinds = [each.__class__ for each in pair.said()]
    assert kinds == [Ack, Unsubscribe, Ack, Commit]


def test_goodbye_comes_last() -> None:
    pair = Pair()
    session = pair.session
    mine = pair.sends.submit([ROW, ROW], 2, "mine")
    session.settle(1, [1], True)
    session.bye()
    assert [each.__class__ for each in pair.said()] == [Ack, Send]
    assert pair.hear(wire.encode_confirm([(1, 1, False)]), wire.encode_refused(2, "full", "no"))[0] == Confirmed(
        mine, 1, False
    )
    assert [each.__class__ for each in pair.said()] == [Bye]
    assert pair.said() == []
    with pytest.raises(RuntimeError):
        session.credit(1, 5)
    assert pair.hear(wire.encode_bye()) == [Closed(None)]


def test_answers_to_sends() -> None:
    pair = Pair()
    first, second = pair.sends.submit([ROW] * 3, 3, "a"), pair.sends.submit([ROW], 1, "b")
    assert [each.__class__ for each in pair.said()] == [Send]
    events = pair.hear(wire.encode_confirm([(1, 2, True), (4, 4, False)]), wire.encode_refused(3, "full", "no room"))
    assert events[:2] == [Confirmed(first, 2, True), Confirmed(second, 1, False)]
    assert isinstance(events[2], Rejected)
    assert (events[2].submission, str(events[2].error)) == (first, "no room")
    assert isinstance(events[2].error, BrokerFull)


def test_heart_beats() -> None:
    pair = Pair()
    pair.session.beat()
    assert pair.said() == [wire.Beat()]
    assert pair.hear(wire.encode_beat() * 3) == []


def feed(pieces: Iterable[bytes]) -> list[Any]:
    session = NativeClientSession(Sends("producer-of-16-chars"), Numbers(), {})
    events: list[Any] = []
    for piece in pieces:
        events += session.receive_data(piece)
    return [event if not isinstance(event, Closed) else str(event.error) for event in events]


CONVERSATION = b"".join(
    [
        wire.encode_welcome(1, WELCOME),
        wire.encode_beat(),
        wire.encode_members({"a": ["pybroker://a:1"]}),
        wire.encode_ended(5, "slow-consumer", "too slow"),
        wire.encode_error("closed", "stopping"),
        b"what comes behind it",
    ]
)


def test_however_the_bytes_come() -> None:
    whole = feed([CONVERSATION])
    assert len(whole) == 4
    assert feed([CONVERSATION[at : at + 1] for at in range(len(CONVERSATION))]) == whole
    for at in range(1, len(CONVERSATION)):
        assert feed([CONVERSATION[:at], CONVERSATION[at:]]) == whole


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_make_it_raise(data: bytes, opened: bool) -> None:
    events = feed([wire.encode_welcome(1, WELCOME), data] if opened else [data])
    assert sum(isinstance(event, str) for event in events) <= 1


@given(st.data())
def test_no_change_of_a_byte_makes_it_raise(data: st.DataObject) -> None:
    deliver = wire.encode_deliver(1, 5, [(Message("/queue/q", b"b", b"a:b\n", message_id=b"m", timestamp=1), 2)])
    stream = bytearray(wire.encode_welcome(1, WELCOME) + deliver + wire.encode_confirm([(1, 1, True)]))
    for _ in range(data.draw(st.integers(1, 3))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    feed([bytes(stream)])


@given(st.sets(st.integers(1, 200), min_size=1))
def test_ranges(tags: set[int]) -> None:
    found = ranges_of(list(tags))
    assert [number for first, last in found for number in range(first, last + 1)] == sorted(tags)
    assert all(after[0] > before[1] + 1 for before, after in pairwise(found))


def test_errors_come_back_as_what_they_were() -> None:
    for each in vars(errors).values():
        if (
            isinstance(each, type)
            and issubclass(each, BrokerError)
            and each not in (LimitExceeded, errors.CorruptRecord)
        ):
            error = error_of(each.code, "text")
            assert (type(error), str(error)) == (each, "text")
    limit = error_of("limit", str(LimitExceeded("stomp.body_bytes_max", 5, "the body has 6 bytes")))
    assert isinstance(limit, LimitExceeded)
    assert (limit.limit, limit.value, str(limit)) == (
        "stomp.body_bytes_max",
        5,
        "the body has 6 bytes: limit stomp.body_bytes_max is 5",
    )
    assert type(error_of("limit", "some limit")) is ProtocolError
    assert type(error_of("never-heard-of", "text")) is BrokerError
    leader = error_of("not-leader", "text", {"leader": 5, "urls": ["a", 5]})
    assert isinstance(leader, NotLeader)
    assert (leader.leader, leader.urls) == ("", ())
