"""A link's session: who may link with whom, what proves it, and which frame may come when."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from link_feeding import (
    SECRET,
    drain,
    every_way,
    introduction,
    join,
    message,
    pair,
    plain,
    session,
    steady,
)

from pybroker.errors import ProtocolError
from pybroker.protocols import link_frames as frames
from pybroker.protocols import link_handshake, native_frames
from pybroker.protocols.link_handshake import LinkRefused
from pybroker.protocols.link_session import Established, LinkSession
from pybroker.protocols.native_decoding import FrameCutter


@pytest.mark.parametrize("secret", [None, SECRET])
def test_both_ends_learn_who_the_other_is(secret: bytes | None) -> None:
    dialler, acceptor = pair(secret)
    assert dialler.peer == introduction("b")
    assert acceptor.peer == introduction("a")
    assert dialler.version == acceptor.version == 1


def test_the_best_version_of_both_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_handshake, "LINK_VERSIONS", (3, 2, 1))
    dialler, acceptor = session(dialled=True, versions=(1, 2, 7)), session()
    join(dialler, acceptor)
    assert dialler.version == acceptor.version == 2


def refused_by(target: LinkSession, data: bytes) -> LinkRefused:
    target.receive_data(data)
    with pytest.raises(LinkRefused) as caught:
        target.next_event()
    return caught.value


@pytest.mark.parametrize(
    ("changes", "options", "code", "said"),
    [
        ({"group": "other"}, {}, "group", "network.group must be the same"),
        ({"name": "b", "life": "life-of-b"}, {}, "itself", "dialled itself"),
        ({"name": "b", "life": "another"}, {}, "name", "network.name of its own"),
        ({}, {"versions": (8, 9)}, "version", "versions 8, 9 .* were offered, 1 are spoken here"),
    ],
)
def test_who_does_not_fit_is_refused_at_once(changes: Any, options: Any, code: str, said: str) -> None:
    dialler = session(introduction("a")._replace(**changes), dialled=True, **options)
    error = refused_by(session(), dialler.data_to_send())
    assert error.code == code
    with pytest.raises(LinkRefused, match=said):
        raise error


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (SECRET, None, "one broker has a secret and the other has none: network.secret"),
        (None, SECRET, "one broker has a secret and the other has none: network.secret"),
        (SECRET, b"other", "different secrets: network.secret"),
    ],
)
def test_the_dialler_finds_another_secret(ours: bytes | None, theirs: bytes | None, said: str) -> None:
    dialler, acceptor = session(dialled=True, secret=ours), session(secret=theirs)
    acceptor.receive_data(dialler.data_to_send())
    assert acceptor.next_event() is None
    error = refused_by(dialler, acceptor.data_to_send())
    assert error.code == "authentication"
    with pytest.raises(LinkRefused, match=said):
        raise error
    acceptor.receive_data(dialler.error(error))
    event = acceptor.next_event()
    assert isinstance(event, native_frames.Error)
    assert event.code == "authentication"
    assert acceptor.state == "closed"


@pytest.mark.parametrize("proof", [b"", b"\0" * 32])
def test_the_acceptor_wants_the_diallers_proof(proof: bytes) -> None:
    dialler, acceptor = session(dialled=True), session()
    acceptor.receive_data(dialler.data_to_send())
    assert acceptor.next_event() is None
    error = refused_by(acceptor, frames.encode_link_proof(proof))
    assert error.code == "authentication"


def cut(data: bytes) -> tuple[Any, ...]:
    cutter = FrameCutter(1_000_000, "limit")
    cutter.feed(data)
    fields = cutter.next()
    assert fields is not None
    return fields


def test_no_proof_of_one_link_is_one_of_another() -> None:
    """Neither the other side's own proof, nor one that was heard before, with the same words but another nonce."""
    dialler, acceptor = session(dialled=True), session()
    acceptor.receive_data(dialler.data_to_send())
    acceptor.next_event()
    welcome = cut(acceptor.data_to_send())
    error = refused_by(acceptor, frames.encode_link_proof(welcome[2]["proof"]))
    assert error.code == "authentication"

    first, second = session(dialled=True), session()
    hello = first.data_to_send()
    second.receive_data(hello)
    second.next_event()
    first.receive_data(second.data_to_send())
    first.next_event()
    recorded = first.data_to_send()
    third = session(introduction("b", nonce=b"c" * 32))
    third.receive_data(hello)
    third.next_event()
    assert refused_by(third, recorded).code == "authentication"


@pytest.mark.parametrize("field", introduction()._fields)
@pytest.mark.parametrize("which", ["hello", "welcome"])
def test_nothing_that_is_said_can_be_changed_on_the_way(field: str, which: str) -> None:
    others: dict[str, Any] = {
        "group": "default",
        "name": "mallory",
        "life": "another",
        "epoch": 9,
        "nonce": b"x" * 32,
        "software": "other",
        "urls": ["pybroker://mallory:1"],
        "heartbeat": 60.0,
    }
    dialler, acceptor = session(dialled=True), session()

    def change(options: dict[str, Any]) -> dict[str, Any]:
        return {**options, field: others.get(field, 7)} if field != "group" else {**options, "more": 1}

    hello = cut(dialler.data_to_send())
    acceptor.receive_data(frames.encode_link_hello(change(hello[3]) if which == "hello" else hello[3], hello[2]))
    assert acceptor.next_event() is None
    welcome = cut(acceptor.data_to_send())
    data = frames.encode_link_welcome(1, change(welcome[2]) if which == "welcome" else welcome[2])
    assert refused_by(dialler, data).code == "authentication"


def test_what_is_not_known_is_passed_over_and_still_proved() -> None:
    dialler, acceptor = session(dialled=True), session()
    extra = {"later": {"b": [1, 2], "a": None, "c": b"x"}}
    dialler._said.update(extra)
    acceptor._said.update(extra)
    dialler._output = [frames.encode_link_hello(dialler._said)]
    join(dialler, acceptor)


@pytest.mark.parametrize("field", introduction()._fields)
@pytest.mark.parametrize(
    "wrong", [None, -1, "", b"", (), "x" * 5_000, 2**64 - 1, float("nan"), float("inf"), True, (1,) * 20]
)
def test_an_introduction_that_is_wrong_is_a_protocol_error(field: str, wrong: Any) -> None:
    options = {**link_handshake.options_of(introduction()), field: wrong}
    try:
        found = link_handshake.introduction_of(options)
    except ProtocolError:
        return
    assert (field, wrong) in [("group", ""), ("software", ""), ("urls", ())]
    assert getattr(found, field) == wrong


def test_options_that_are_too_deep_are_refused() -> None:
    deep: Any = 1
    for _ in range(400):
        deep = {"a": deep}
    dialler, acceptor = session(dialled=True), session()
    acceptor.receive_data(frames.encode_link_hello({**dialler._said, "more": deep}))
    with pytest.raises(ProtocolError, match="nested at most"):
        acceptor.next_event()


# ---- which frame may come when

ANY = {
    "LinkHello": frames.encode_link_hello(link_handshake.options_of(introduction("a"))),
    "LinkWelcome": frames.encode_link_welcome(1, link_handshake.options_of(introduction("b"))),
    "LinkProof": frames.encode_link_proof(b""),
    "Demand": frames.encode_demand(True, [], []),
    "Forward": frames.encode_forward(1, "n", 1, [frames.row_of(1, message())]),
    "Accepted": frames.encode_accepted(1, [(1, 1)]),
    "Rejected": frames.encode_rejected(1, 1, "c", "t"),
    "Beat": native_frames.encode_beat(),
    "Bye": native_frames.encode_bye(),
    "Error": native_frames.encode_error("c", "t"),
}
MAY = {
    "waits for LINK_HELLO": {"LinkHello", "Error"},
    "waits for LINK_WELCOME": {"LinkWelcome", "Error"},
    "waits for LINK_PROOF": {"LinkProof", "Error"},
    "up": {"Demand", "Forward", "Accepted", "Rejected", "Beat", "Bye", "Error"},
}


def in_state(state: str) -> LinkSession:
    if state == "waits for LINK_WELCOME":
        end = session(dialled=True, secret=None)
    elif state == "up":
        end = pair(None)[1]
    else:
        end = session(secret=None)
        if state == "waits for LINK_PROOF":
            end.receive_data(session(dialled=True, secret=None).data_to_send())
            end.next_event()
    assert end.state == state
    return end


@pytest.mark.parametrize(("state", "name"), list(itertools.product(MAY, ANY)))
def test_a_frame_comes_when_it_may_and_only_then(state: str, name: str) -> None:
    end = in_state(state)
    end.receive_data(ANY[name])
    if name in MAY[state]:
        end.next_event()
        assert (end.state == "closed") == (name in ("Bye", "Error"))
    else:
        with pytest.raises(ProtocolError, match=f"{name} can't come now"):
            end.next_event()


@pytest.mark.parametrize("way", ["error", "bye", "stop_reading"])
def test_nothing_is_read_after_the_end(way: str) -> None:
    _, end = pair()
    getattr(end, way)(*([ProtocolError("x")] if way == "error" else []))
    end.receive_data(ANY["Demand"])
    assert end.next_event() is None
    assert end.buffered_bytes == 0
    if way == "stop_reading":  # what is owed may still be said
        end.accepted(1, [(1, 1)])
        end.bye()
    with pytest.raises(RuntimeError, match="can be sent"):
        end.accepted(1, [(1, 1)])


def test_nothing_of_a_link_is_sent_before_it_is_up() -> None:
    end = in_state("waits for LINK_PROOF")
    for send in (end.beat, end.bye, lambda: end.demand(True, [], []), lambda: end.forward(1, "n", 1, [])):
        with pytest.raises(RuntimeError, match="waits for LINK_PROOF"):
            send()


def test_a_refusal_takes_back_what_was_not_said_yet() -> None:
    dialler, acceptor = session(dialled=True), session()
    acceptor.receive_data(dialler.data_to_send())
    acceptor.next_event()
    dialler.receive_data(acceptor.data_to_send())
    assert isinstance(dialler.next_event(), Established)
    dialler.error(LinkRefused("linked", "there is one"))
    assert dialler.data_to_send() == b""  # the proof would make the other end think that the link is up


# ---- forwarding


def forwarded(
    lane: int = 1, namespace: str = "n", first: int = 1, count: int = 1, passed: tuple[str, ...] = ("a",)
) -> bytes:
    rows = [frames.row_of(number, message(number, passed)) for number in range(count)]
    return frames.encode_forward(lane, namespace, first, rows)


def test_lanes_keep_their_namespaces_and_their_tags_rise() -> None:
    _, end = pair()
    end.receive_data(forwarded(1, "n", 1, 3) + forwarded(2, "m", 1) + forwarded(1, "n", 9, 2) + forwarded(1, "n", 11))
    assert len(drain(end)) == 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (forwarded(1, "other", 4), "lane 1 is 'n' on this link"),
        (forwarded(1, "n", 3), "must rise"),
        (forwarded(2, "m", passed=("a", "x")), "the last broker .* must be its sender, a"),
    ],
)
def test_a_peer_that_mixes_up_lanes_is_told_so(data: bytes, said: str) -> None:
    _, end = pair()
    end.receive_data(forwarded(1, "n", 1, 3) + data)
    assert end.next_event() is not None
    with pytest.raises(ProtocolError, match=said):
        end.next_event()


def test_the_number_of_lanes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pybroker.protocols.link_session.LANES_MAX", 2)
    _, end = pair()
    end.receive_data(b"".join(forwarded(lane) for lane in (1, 2, 3)))
    assert end.next_event() is not None
    assert end.next_event() is not None
    with pytest.raises(ProtocolError, match="at most 2 lanes"):
        end.next_event()


# ---- bytes


def test_a_frame_before_the_link_is_up_has_a_limit_of_its_own() -> None:
    end = session(handshake_bytes_max=100)
    end.receive_data((101).to_bytes(4, "big"))
    with pytest.raises(ProtocolError, match=r"native\.handshake_bytes_max is 100"):
        end.next_event()
    _, end = pair()
    end.receive_data((1_000_001).to_bytes(4, "big"))
    with pytest.raises(ProtocolError, match=r"native\.frame_bytes_max is 1000000"):
        end.next_event()


def test_a_link_is_read_the_same_however_its_bytes_are_cut() -> None:
    dialler, acceptor = session(dialled=True), session()
    data = dialler.data_to_send()
    acceptor.receive_data(data)
    acceptor.next_event()
    dialler.receive_data(acceptor.data_to_send())
    dialler.next_event()
    data += (
        dialler.data_to_send() + forwarded(1, "n", 1, 5) + ANY["Demand"] + ANY["Accepted"] + ANY["Beat"] + ANY["Bye"]
    )
    events = every_way(session, data + ANY["Beat"])
    assert [event.__class__.__name__ for event in events] == [
        "Established",
        "tuple",
        "Demand",
        "Accepted",
        "Beat",
        "Bye",
    ]


frame_lists = st.lists(st.sampled_from(sorted(ANY)), max_size=6)


@steady
@given(st.sampled_from(sorted(MAY)), frame_lists, st.integers(0, 1_000))
def test_any_order_of_frames_is_the_same_however_it_is_cut(state: str, order: list[str], seed: int) -> None:
    every_way(lambda: in_state(state), b"".join(ANY[name] for name in order) or b"\0", seed)


@steady
@given(st.sampled_from(sorted(MAY)), st.lists(st.binary(max_size=40), max_size=5), st.data())
def test_any_bytes_end_a_link_in_good_order_or_not_at_all(state: str, pieces: list[bytes], data: st.DataObject) -> None:
    end = in_state(state)
    for piece in pieces:
        whole = data.draw(st.booleans())
        end.receive_data(len(piece).to_bytes(4, "big") + piece if whole else piece)
        drain(end)
        assert end.buffered_bytes <= 1_000_004


@steady
@given(st.sampled_from(sorted(ANY)), st.data())
def test_any_changed_bit_is_read_or_refused(name: str, data: st.DataObject) -> None:
    raw = bytearray(ANY[name])
    place = data.draw(st.integers(32, len(raw) * 8 - 1))  # behind the length
    raw[place // 8] ^= 1 << place % 8
    end = in_state(next(state for state, may in MAY.items() if name in may))
    end.receive_data(bytes(raw))
    drain(end)


def test_what_is_forwarded_comes_out_as_it_went_in() -> None:
    dialler, acceptor = pair()
    sent = [(number, message(number, ("x", "a"), targets=("t",), deliveries=3, priority=7)) for number in range(3)]
    acceptor.receive_data(dialler.forward(1, "n", 5, [frames.row_of(*each) for each in sent]))
    for _, each in sent:
        each.priority = 7
    assert drain(acceptor) == [plain(frames.Forward(1, "n", 5, sent))]
