"""The server's side of a native connection as a table of states and frames, fed in every way; and peers that mean harm."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_feeding import FROM_BROKER, FROM_CLIENT, HELLO, every_way, new_session, open_session, plain, sends, steady

from pybroker.errors import BrokerFull, NotLeader, ProtocolError
from pybroker.protocols import native_frames as wire
from pybroker.protocols.native_decoding import HeaderBlocks, decode_frame, unpack_frame
from pybroker.protocols.native_frames import pack_frame
from pybroker.protocols.native_session import (
    CLOSED,
    NEW,
    OPEN,
    OPENING,
    LinkOpening,
    Opening,
    Violation,
    error_frame,
)


def test_states_and_frames() -> None:
    """Each frame in each state: what may come, and that everything else ends it."""
    everything = {**FROM_CLIENT, **FROM_BROKER, wire.HELLO: ("pybroker", [1], {}), 30: ("pybroker link", [1], {})}
    for kind, fields in everything.items():
        frame = pack_frame((kind, *fields))
        session = new_session()
        session.receive_data(frame)
        events = session.next_events(10)
        if kind == wire.HELLO:
            assert isinstance(events[0], Opening)
            assert session.state == OPENING
            session.receive_data(frame)
            assert session.next_events(10) == [], "nothing is read before it is answered"
            session.accept({})
            (event,) = session.next_events(10)
            assert isinstance(event, Violation)
            assert "a second HELLO" in str(event.error)
        elif kind == 30:
            assert events == [LinkOpening(frame)]
        else:
            assert isinstance(events[0], Violation)
            assert "the first frame must be HELLO" in str(events[0].error)
        assert session.state == CLOSED
        session = open_session()
        session.receive_data(frame + sends(1))
        events = session.next_events(10)
        if kind in FROM_CLIENT:
            assert not any(isinstance(event, Violation) for event in events)
            last = kind in (wire.BYE, wire.ERROR)
            assert session.state == (CLOSED if last else OPEN)
            assert len(events) == (1 if last or kind == wire.BEAT else 2)
        else:
            assert isinstance(events[0], Violation)
            assert session.state == CLOSED
            assert len(events) == 1
        session.receive_data(sends(1))
        if session.state == CLOSED:
            assert session.next_events(10) == []
            assert session.buffered_bytes == 0


def test_what_the_owner_may_not_do_is_no_protocol_error() -> None:
    session = new_session()
    with pytest.raises(RuntimeError, match="the session is new"):
        session.accept({})
    with pytest.raises(RuntimeError, match="the session is open"):
        open_session().accept({})
    assert session.state == NEW


def test_hello_has_options_and_what_is_unknown_is_passed_over() -> None:
    session = new_session()
    options = {"software": "s", "login": "l", "client_id": "c", "heartbeat": 5, "producer": "p" * 64, "future": [1]}
    session.receive_data(wire.encode_hello({**options, "producer_new": True}, (7, 1)))
    assert session.next_events(1) == [Opening(1, "s", "l", "", "c", 5.0, "p" * 64, True)]
    session = new_session()
    session.receive_data(wire.encode_hello({}))
    assert session.next_events(1) == [Opening(1, "", "", "", "", 0.0, "", False)]


def test_errors_say_code_text_and_where_to_go() -> None:
    def decoded(frame: bytes) -> Any:
        return decode_frame(unpack_frame(frame[4:]), HeaderBlocks())

    assert decoded(error_frame(BrokerFull("no room"))) == wire.Error("full", "no room", {})
    error = NotLeader("b leads", "b", ("stomp://b:1", "pybroker://b:2", "pybroker+ssl://b:3"))
    details = {"leader": "b", "urls": ("pybroker://b:2", "pybroker+ssl://b:3")}
    assert decoded(error_frame(error)) == wire.Error("not-leader", "b leads", details)
    assert decoded(error_frame(ProtocolError("\ud800" + "x" * 10_000))).text == "?" + "x" * (wire.TEXT_MAX - 1)
    session = open_session()
    session.receive_data(sends(3))
    session.error(BrokerFull("no room"))
    assert session.next_events(10) == []
    assert decoded(session.data_to_send()).code == "full"
    assert session.data_to_send() == b""


# ---- portions


def test_a_large_send_is_handed_on_in_portions() -> None:
    session = open_session()
    session.receive_data(sends(10) + sends(2, 11) + pack_frame((wire.CREDIT, 1, 1)))
    portions = [[plain(event)[:2] for event in session.next_events(4)] for _ in range(4)]
    assert portions == [
        [(wire.Send, 1)],
        [(wire.Send, 5)],
        [(wire.Send, 9), (wire.Send, 11)],
        [(wire.Credit, wire.Credit(1, 1))],
    ]
    assert session.next_events(4) == []


def test_acknowledgements_count_what_they_settle() -> None:
    session = open_session()
    session.receive_data(wire.encode_ack(0, 1, [(1, 100)]) * 5)
    assert len(session.next_events(150)) == 2
    session.receive_data(b"")
    assert len(session.next_events(10)) == 1


def test_heart_beats_hide_nothing_that_comes_behind_them() -> None:
    session = open_session()
    session.receive_data(wire.encode_beat() * 1_000 + sends(1) + wire.encode_beat())
    assert [plain(event)[0] for event in session.next_events(2)] == [wire.Send]


@steady
@given(
    st.lists(st.sampled_from([*FROM_CLIENT.items(), *FROM_BROKER.items()]), max_size=6),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_frames_are_the_same_however_they_come(frames: list[tuple[int, Any]], seed: int, hello: bool) -> None:
    data = b"".join(pack_frame((kind, *fields)) for kind, fields in frames)
    every_way((HELLO if hello else b"") + sends(7) + data if hello else data, seed)


def test_a_link_hands_on_all_that_was_read() -> None:
    link = pack_frame((30, "pybroker link", [1], {}))
    assert every_way(link) == [LinkOpening(link)]
    session = new_session()
    session.receive_data(link + b"more of it")
    assert session.next_events(10) == [LinkOpening(link + b"more of it")]
