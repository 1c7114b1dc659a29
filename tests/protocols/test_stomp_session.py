"""The server session: version negotiation, heart-beats, what comes before and after, what MESSAGE and ERROR say."""

from __future__ import annotations

import pytest
from stomp_feeding import VERSIONS, connect_frame, every_way, new_session, open_session

from pybroker.errors import AuthenticationFailed, ProtocolError
from pybroker.message import Message, encode_headers
from pybroker.protocols.stomp_events import (
    Connect,
    Failed,
    Send,
)

# Connecting.


@pytest.mark.parametrize(
    ("accept", "version"),
    [
        (None, "1.0"),
        ("1.0", "1.0"),
        ("1.1", "1.1"),
        ("1.2", "1.2"),
        ("1.0,1.1,2.0", "1.1"),  # the specification's example
        ("1.2,1.1", "1.2"),
        ("1.1, 1.2 ", "1.2"),
    ],
)
@pytest.mark.parametrize("command", ["CONNECT", "STOMP"])
def test_the_highest_common_version_is_taken(command: str, accept: str | None, version: str) -> None:
    line = "" if accept is None else f"accept-version:{accept}\n"
    events, output = every_way(new_session, f"{command}\n{line}host:stomp.github.org\n\n\0".encode())
    (event,) = events
    assert isinstance(event, Connect)
    assert (event.version, event.host) == (version, "stomp.github.org")
    assert output.startswith(b"CONNECTED\nversion:" + version.encode() + b"\n")
    assert b"\nsession:session-1\nserver:pybroker/test\n\n\0" in output
    assert (b"\nheart-beat:1000,1000\n" in output) == (version != "1.0")


@pytest.mark.parametrize("accept", ["2.0", "", "1", "1.3,1.25"])
def test_no_common_version_is_an_error_that_lists_the_versions(accept: str) -> None:
    events, output = every_way(new_session, f"CONNECT\naccept-version:{accept}\n\n\0SEND\n\n\0".encode())
    assert len(events) == 1
    assert isinstance(events[0], Failed)
    assert output.startswith(b"ERROR\nversion:1.2,1.1,1.0\n")
    assert b"\ncontent-type:text/plain\n" in output
    assert b"\n\nSupported protocol versions are 1.2 1.1 1.0\0" in output


def test_connect_headers_are_not_escaped() -> None:
    data = b"CONNECT\naccept-version:1.2\nlogin:a\\nb:c\npasscode:\\\\\nclient-id:x\n\n\0"
    events, _ = every_way(new_session, data)
    (event,) = events
    assert isinstance(event, Connect)
    assert (event.login, event.passcode, event.client_id) == ("a\\nb:c", "\\\\", "x")


def test_1_0_connect_headers_may_be_padded() -> None:
    events, _ = every_way(new_session, b"CONNECT\nlogin: user\npasscode: secret\n\n\0")
    (event,) = events
    assert isinstance(event, Connect)
    assert (event.login, event.passcode) == ("user", "secret")
    assert "user" in repr(event)
    assert "secret" not in repr(event)


def test_carriage_returns_in_connect_are_taken_whatever_the_version() -> None:
    for version in VERSIONS:
        events, _ = every_way(new_session, connect_frame(version).replace(b"\n", b"\r\n"))
        assert isinstance(events[0], Connect)


@pytest.mark.parametrize("frame", [b"SEND\ndestination:/queue/a\n\n\0", b"\x16\x03\x01\x02\0", b"GET / HTTP/1.1\r\n"])
def test_nothing_comes_before_connect(frame: bytes) -> None:
    events, output = every_way(new_session, frame)
    assert isinstance(events[0], Failed)
    assert output.startswith(b"ERROR\nmessage:")


def test_connect_has_no_body_so_that_nobody_unknown_can_fill_memory() -> None:
    events, _ = every_way(new_session, b"CONNECT\ncontent-length:1000\n\n")
    assert isinstance(events[0], Failed)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_second_connect_is_refused(version: str) -> None:
    (event,), output = every_way(lambda: open_session(version), connect_frame(version))
    assert isinstance(event, Failed)
    assert "connected already" in str(event.error)
    assert output.startswith(b"ERROR\n")


def test_frames_behind_connect_wait_for_its_answer() -> None:
    session = new_session()
    session.receive_data(connect_frame("1.1") + b"SEND\ndestination:/queue/a\nx:\\c\n\nhello\0")
    assert [type(event) for event in session.next_events(10)] == [Connect]
    assert session.next_events(10) == []
    assert session.data_to_send() == b""
    session.accept("s")
    (event,) = session.next_events(10)
    assert isinstance(event, Send)


def test_a_refused_login_ends_the_session() -> None:
    session = new_session()
    session.receive_data(connect_frame("1.2") + b"SEND\ndestination:/queue/a\n\nhello\0")
    session.next_events(1)
    session.error(AuthenticationFailed("wrong user or password"))
    assert session.next_events(1) == []
    assert session.closed
    assert session.buffered_bytes == 0
    assert session.data_to_send() == (
        b"ERROR\nmessage:wrong user or password\ncode:authentication\ncontent-type:text/plain\n"
        b"content-length:22\n\nwrong user or password\0"
    )
    session.error("again")  # said once
    assert session.data_to_send() == b""
    with pytest.raises(RuntimeError):
        session.accept("s")


@pytest.mark.parametrize(
    ("asked", "send", "receive"),
    [
        ("0,0", 0, 0),
        ("5000,0", 0, 5000),
        ("0,5000", 5000, 0),
        ("10,20", 1000, 1000),
        ("20000,10000", 10000, 20000),
        (None, 0, 0),
    ],
)
def test_heart_beats_are_negotiated(asked: str | None, send: int, receive: int) -> None:
    line = "" if asked is None else f"heart-beat:{asked}\n"
    session = new_session()
    session.receive_data(f"CONNECT\naccept-version:1.2\n{line}\n\0".encode())
    assert isinstance(session.next_events(1)[0], Connect)
    session.accept("s")
    assert (session.heartbeat_send_ms, session.heartbeat_receive_ms) == (send, receive)
    session.data_to_send()
    session.heartbeat()
    assert session.data_to_send() == b"\n"


@pytest.mark.parametrize("value", ["", "1", "1,2,3", "a,b", "-1,0", "1.5,0", "1,٣", "9" * 11 + ",0", " 1,2"])
def test_a_malformed_heart_beat_is_refused(value: str) -> None:
    events, _ = every_way(new_session, f"CONNECT\naccept-version:1.1\nheart-beat:{value}\n\n\0".encode())
    assert isinstance(events[0], Failed)
    assert "heart-beat" in str(events[0].error)


# Delivering.


def frame_of(version: str, message: Message, redelivered: bool = False, deliveries: int = 1) -> bytes:
    session = open_session(version)
    return session.message_frame(session.message_head("s:1"), message, redelivered, deliveries, b"9")


def test_message_frames_of_each_version() -> None:
    message = Message("/queue/a", b"x\0y", b"b:1\nb:2\n", message_id=b"007", timestamp=5)
    rest = b"message-id:007\ndestination:/queue/a\ntimestamp:5\ncontent-length:3\nb:1\nb:2\n\nx\0y\0"
    assert frame_of("1.2", message) == b"MESSAGE\nsubscription:s\\c1\nack:9\nredelivered:false\n" + rest
    assert frame_of("1.1", message) == b"MESSAGE\nsubscription:s\\c1\nredelivered:false\n" + rest
    assert frame_of("1.0", message) == b"MESSAGE\nsubscription:s:1\nredelivered:false\n" + rest
    session = open_session("1.0")
    assert session.message_frame(session.message_head(None), message, True, 3, None) == (
        b"MESSAGE\nredelivered:true\ndelivery-count:3\n" + rest
    )
    assert session.data_to_send() == b""


def test_a_large_body_goes_out_the_same() -> None:
    body = bytes(range(256)) * 100
    frame = frame_of("1.2", Message("/queue/a", body, b"a:b\n"))
    assert frame.endswith(b"\ncontent-length:25600\na:b\n\n" + body + b"\0")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.2", b"a\\cb:1\\r\\n\\\\\nc:2\\c\n"),
        ("1.1", b"a\\cb:1\r\\n\\\\\nc:2\\c\n"),
        ("1.0", b"c:2:\n"),  # a name with a colon can't be said
    ],
)
def test_escaped_headers_go_out_as_each_version_can_say_them(version: str, said: bytes) -> None:
    block = encode_headers([("a:b", "1\r\n\\"), ("c", "2:")])
    frame = frame_of(version, Message("/queue/é:a", b"", block))
    assert b"\ncontent-length:0\n" + said + b"\n\0" in frame
    colon = b":" if version == "1.0" else b"\\c"
    assert b"\ndestination:/queue/\xc3\xa9" + colon + b"a\n" in frame


def test_priority_and_expiry_set_in_process_are_said_once() -> None:
    frame = frame_of("1.2", Message("/queue/a", b"", b"x:y\n", priority=9, expires=12))
    assert b"\npriority:9\nexpires:12\nx:y\n" in frame
    frame = frame_of("1.2", Message("/queue/a", b"", b"priority:9\nexpires:12\n", priority=9, expires=12))
    assert frame.count(b"priority") == frame.count(b"expires") == 1
    assert b"priority" not in frame_of("1.2", Message("/queue/a", b""))


def test_many_destinations_are_not_kept() -> None:
    session = open_session()
    head = session.message_head("0")
    for number in range(100):
        frame = session.message_frame(head, Message(f"/queue/{number}", b""), False, 1, None)
        assert b"\ndestination:/queue/%d\n" % number in frame
    assert len(session._destinations) <= 16


@pytest.mark.parametrize("version", [None, *VERSIONS])
def test_an_error_text_never_breaks_out_of_its_frame(version: str | None) -> None:
    session = new_session() if version is None else open_session(version)
    session.error(ProtocolError("a: b\nreceipt-id:x\n\n\0\ud800"), b"5")
    head, _, body = session.data_to_send().partition(b"\n\n")
    lines = head.split(b"\n")
    assert lines[:2] == [b"ERROR", b"receipt-id:5"]
    assert [line.partition(b":")[0] for line in lines[2:]] == [b"message", b"code", b"content-type", b"content-length"]
    assert len(body) == int(lines[-1].partition(b":")[2]) + 1
