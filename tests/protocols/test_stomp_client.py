"""The client session, against the server session and against frames that no good server sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stomp_feeding import VERSIONS, drain, every_way, new_session, open_client, steady

from pybroker.message import Message, encode_headers
from pybroker.protocols.stomp_client import (
    Connected,
    ErrorReceived,
    MessageReceived,
    ReceiptReceived,
    StompClientSession,
)
from pybroker.protocols.stomp_events import (
    Abort,
    Ack,
    Begin,
    Commit,
    Connect,
    Disconnect,
    Event,
    Failed,
    Nack,
    Send,
    Subscribe,
    Unsubscribe,
)
from pybroker.protocols.stomp_session import StompSession

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)


def pair(version: str, **connect: object) -> tuple[StompClientSession, StompSession]:
    """A client and a server that know each other."""
    client, server = StompClientSession(), new_session()
    client.connect(versions=(version,), **connect)  # type: ignore[arg-type]
    assert isinstance(to_server(client, server)[0], Connect)
    assert isinstance(to_client(client, server)[0], Connected)
    assert client.version == server.version == version
    return client, server


def to_server(client: StompClientSession, server: StompSession) -> list[Event]:
    server.receive_data(client.data_to_send())
    return drain(server)


def to_client(client: StompClientSession, server: StompSession) -> list[Event]:
    client.receive_data(server.data_to_send())
    return drain(client)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_session_from_connect_to_disconnect(version: str) -> None:
    client, server = pair(version, login="user", passcode="secret", client_id="c")
    client.subscribe("/queue/a", "0", "client-individual", {"prefetch-count": "5"}, receipt="r:1")
    client.send("/queue/a", b"x\0y", [("k", "1"), ("k", "2")], transaction="t", receipt="2")
    client.begin("t")
    client.commit("t")
    client.abort("u")
    client.unsubscribe("0")
    client.heartbeat()
    client.disconnect("bye")
    subscribe, send, begin, commit, abort, unsubscribe, disconnect = to_server(client, server)
    assert isinstance(subscribe, Subscribe)
    assert (subscribe.id, subscribe.destination, subscribe.prefetch) == ("0", "/queue/a", 5)
    assert (subscribe.ack, subscribe.client_id) == ("client-individual", "c")
    assert isinstance(send, Send)
    assert (send.message.body, send.message.header_block) == (b"x\0y", b"k:1\nk:2\n")
    assert (send.transaction, send.receipt) == ("t", b"2")
    assert [begin, commit, abort] == [Begin("t", None), Commit("t", None), Abort("u", None)]
    assert unsubscribe == Unsubscribe("0", None, None, "c", None)
    assert isinstance(disconnect, Disconnect)
    assert subscribe.receipt is not None
    assert disconnect.receipt is not None
    server.receipt(subscribe.receipt)
    server.receipt(disconnect.receipt)
    assert to_client(client, server) == [ReceiptReceived("r:1"), ReceiptReceived("bye")]


@pytest.mark.parametrize("version", VERSIONS)
def test_messages_and_their_acknowledgement(version: str) -> None:
    client, server = pair(version)
    message = Message("/queue/a", b"body", encode_headers([("k", "a:b")]), message_id=b"m-1", timestamp=7)
    frame = server.message_frame(server.message_head("0"), message, True, 2, b"77")
    client.receive_data(b"\n" + frame)
    (event,) = drain(client)
    assert isinstance(event, MessageReceived)
    assert event.body == b"body"
    assert event.header("subscription") == "0"
    assert event.header("message-id") == "m-1"
    assert event.header("redelivered") == "true"
    assert event.header("delivery-count") == "2"
    assert event.header("k") == "a:b"
    assert event.header("ack") == ("77" if version == "1.2" else None)
    expected = {"1.2": (b"77", None, None), "1.1": (None, b"m-1", "0"), "1.0": (None, b"m-1", None)}[version]
    client.ack(event, receipt="1")
    assert to_server(client, server) == [Ack(*expected, None, b"1")]
    if version == "1.0":
        with pytest.raises(RuntimeError, match="NACK"):
            client.nack(event)
    else:
        client.nack(event, transaction="t")
        assert to_server(client, server) == [Nack(*expected, "t", None)]


def test_the_best_version_is_offered_and_heart_beats_are_negotiated() -> None:
    client, server = StompClientSession(), new_session()
    client.connect(heart_beat=(500, 3000))
    to_server(client, server)
    (event,) = to_client(client, server)
    assert isinstance(event, Connected)
    assert (event.version, event.session, event.server) == ("1.2", "session-1", "pybroker/test")
    assert (client.heartbeat_send_ms, client.heartbeat_receive_ms) == (1000, 3000)
    assert (server.heartbeat_receive_ms, server.heartbeat_send_ms) == (1000, 3000)


def test_an_error_ends_the_session() -> None:
    client, server = pair("1.2")
    server.error("no: such\nthing", b"5")
    server_says = server.data_to_send()
    client.receive_data(server_says + server_says)
    (event,) = drain(client)
    assert isinstance(event, ErrorReceived)
    assert (event.message, event.header("receipt-id"), event.body) == ("no: such\nthing", "5", b"no: such\nthing")
    with pytest.raises(RuntimeError):
        client.send("/queue/a", b"")


def test_a_version_that_is_not_spoken() -> None:
    client = StompClientSession()
    client.connect()
    client.receive_data(b"ERROR\nversion:2.0\nmessage:no\n\nSupported protocol versions are 2.0\0")
    (event,) = drain(client)
    assert isinstance(event, ErrorReceived)
    with pytest.raises(ValueError, match="versions"):
        StompClientSession().connect(versions=("1.3",))


@pytest.mark.parametrize(
    "data",
    [
        b"CONNECTED\nversion:1.1\n\n\0",
        b"CONNECTED\nversion:1.2\nheart-beat:x\n\n\0",
        b"MESSAGE\n\n\0",
        b"SEND\n\n\0",
        b"CONNECTED\nversion:1.2\n\n\0CONNECTED\nversion:1.2\n\n\0",
        b"CONNECTED\nversion:1.2\n\n\0RECEIPT\n\n\0",
        b"CONNECTED\nversion:1.2\n\n\0RECEIPT\nreceipt-id:1\n\nbody\0",
        b"CONNECTED\nversion:1.2\n\n\0MESSAGE\nx:\\t\n\n\0",
    ],
)
def test_a_server_that_breaks_the_protocol(data: bytes) -> None:
    def connecting() -> StompClientSession:
        client = StompClientSession()
        client.connect(versions=("1.2",))
        client.data_to_send()
        return client

    events, _ = every_way(connecting, data)
    assert isinstance(events[-1], Failed)


def test_misuse_is_told_at_once() -> None:
    client = StompClientSession()
    with pytest.raises(RuntimeError, match="SEND needs an open session"):
        client.send("/queue/a", b"")
    with pytest.raises(ValueError, match="line feed"):
        client.connect(login="a\nb")
    client.connect()
    with pytest.raises(RuntimeError):
        client.connect()
    client = open_client()
    with pytest.raises(ValueError, match="ack=auto"):
        client.ack(MessageReceived([("message-id", "1")], b""))
    client.disconnect()
    with pytest.raises(RuntimeError):
        client.begin("t")


@steady
@given(
    version=st.sampled_from(["1.1", "1.2"]),
    destination=texts.filter(bool),
    headers=st.lists(st.tuples(texts, texts), max_size=4),
    body=st.binary(max_size=30),
    receipt=texts,
)
def test_whatever_a_client_sends_comes_back_to_it(
    version: str, destination: str, headers: list[tuple[str, str]], body: bytes, receipt: str
) -> None:
    headers = [("x-" + name, value) for name, value in headers]
    client, server = pair(version)
    client.send(destination, body, headers, receipt=receipt)
    (event,) = to_server(client, server)
    assert isinstance(event, Send)
    assert event.receipt is not None
    server.receipt(event.receipt)
    event.message.message_id = b"1"
    client.receive_data(server.data_to_send())
    client.receive_data(server.message_frame(server.message_head("0"), event.message, False, 1, b"1"))
    receipt_event, message = drain(client)
    assert receipt_event == ReceiptReceived(receipt)
    assert isinstance(message, MessageReceived)
    assert message.body == body
    assert message.header("destination") == destination
    assert [pair for pair in message.headers if pair[0].startswith("x-")] == headers


@steady
@given(data=st.binary(max_size=300), version=st.sampled_from(VERSIONS))
def test_random_bytes_never_raise(data: bytes, version: str) -> None:
    every_way(lambda: open_client(version), data)
