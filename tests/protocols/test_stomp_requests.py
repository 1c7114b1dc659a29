"""What each client frame asks for in each version: SEND, SUBSCRIBE, UNSUBSCRIBE, ACK, NACK, transactions, receipts."""

from __future__ import annotations

import pytest
from stomp_feeding import VERSIONS, connect_frame, drain, every_way, feed, new_session, open_session

from pybroker.config import StompLimits
from pybroker.errors import BrokerError, InvalidMessage, ProtocolError
from pybroker.protocols.stomp_events import (
    Abort,
    Ack,
    Begin,
    Commit,
    Disconnect,
    Event,
    Failed,
    Nack,
    Send,
    Subscribe,
    Unsubscribe,
)
from pybroker.protocols.stomp_session import StompSession


def one(version: str, data: bytes) -> Event:
    """The only event of some bytes on an open session, fed in every way."""
    events, _ = every_way(lambda: open_session(version), data)
    (event,) = events
    return event


def sent(version: str, data: bytes) -> Send:
    event = one(version, data)
    assert isinstance(event, Send), event
    return event


def refused(version: str, data: bytes) -> tuple[BrokerError, bytes]:
    """The error of the first failing frame, and the ERROR frame."""
    events, output = every_way(lambda: open_session(version), data)
    assert isinstance(events[-1], Failed), events
    assert output.startswith(b"ERROR\n")
    assert output.endswith(b"\0")
    return events[-1].error, output


# SEND.


@pytest.mark.parametrize("version", VERSIONS)
def test_send_of_the_specification(version: str) -> None:
    event = sent(version, b"SEND\ndestination:/queue/a\ncontent-type:text/plain\n\nhello queue a\n\0")
    message = event.message
    assert (message.destination, message.body) == ("/queue/a", b"hello queue a\n")
    assert message.header_block == b"content-type:text/plain\n"
    assert (message.durable, message.priority, message.expires) == (True, 4, 0)
    assert (event.transaction, event.receipt) == (None, None)


def test_send_keeps_application_headers_in_order_and_drops_the_transport_s() -> None:
    event = sent(
        "1.2",
        b"SEND\nb:1\nreceipt:r\ndestination:/queue/a\nmessage-id:m\nb:2\nsubscription:s\nredelivered:true\nack:a\n"
        b"timestamp:5\npersistent:false\ndelivery-count:9\ntransaction:t\ncontent-length:1\nexpires:77\nreceipt:q\n"
        b"destination:/queue/b\npriority:7\ncontent-length:8\nreply-to:/queue/r\ncorrelation-id:c\n"
        b"priority:1\nexpires:x\n\n\0\0",
    )
    message = event.message
    assert message.destination == "/queue/a"
    assert message.body == b"\0"
    assert message.header_block == (
        b"b:1\nb:2\npersistent:false\nexpires:77\npriority:7\nreply-to:/queue/r\ncorrelation-id:c\n"
        b"priority:1\nexpires:x\n"
    )
    assert (message.durable, message.priority, message.expires) == (False, 7, 77)
    assert (event.transaction, event.receipt) == ("t", b"r")


@pytest.mark.parametrize(
    ("version", "line", "block"),
    [
        ("1.2", b"u:http://x", b"u:http\\c//x\n"),
        ("1.2", b"u:\\r\\n\\c\\\\", b"u:\\r\\n\\c\\\\\n"),
        ("1.2", b"a\\cb:c", b"a\\cb:c\n"),
        ("1.1", b"u:a\rb", b"u:a\\rb\n"),
        ("1.1", b"u:b\r", b"u:b\\r\n"),
        ("1.1", b"u:\\n:\\c\\\\", b"u:\\n\\c\\c\\\\\n"),
        ("1.0", b"u:a\\nb:c", b"u:a\\\\nb\\cc\n"),
        ("1.0", b"u: padded ", b"u: padded \n"),
        ("1.2", b"u: padded ", b"u: padded \n"),
        ("1.2", "ü:é\u2028".encode(), "ü:é\u2028\n".encode()),
        ("1.2", b"Priority:11", b"Priority:11\n"),  # names are case-sensitive
    ],
)
def test_application_headers_are_kept_as_1_2_escapes_them(version: str, line: bytes, block: bytes) -> None:
    event = sent(version, b"SEND\ndestination:/queue/a\n" + line + b"\n\nx\0")
    assert event.message.header_block == block


@pytest.mark.parametrize(
    ("version", "lines", "text"),
    [
        ("1.2", b"", "destination"),
        ("1.2", b"destination:\n", "destination"),
        ("1.2", b"Destination:/queue/a\n", "destination"),
        ("1.1", b"destination:/queue/a\nx:\\r\n", "escape"),
        ("1.2", b"destination:/queue/a\nx:\\t\n", "escape"),
        ("1.2", b"destination:/queue/a\nx:\xff\n", "UTF-8"),
        ("1.2", b"destination:/queue/a\nno colon\n", "colon"),
        ("1.2", b"destination:/queue/a\n:x\n", "empty name"),
        ("1.2", b"destination:/queue/a\nx:a\rb\n", "carriage return"),
        ("1.2", b"destination:/queue/a\npersistent:yes\n", "persistent"),
        ("1.2", b"destination:/queue/a\npersistent:True\n", "persistent"),
        ("1.2", b"destination:/queue/a\npriority:10\n", "priority"),
        ("1.2", b"destination:/queue/a\npriority:-1\n", "priority"),
        ("1.2", b"destination:/queue/a\npriority:\n", "priority"),
        ("1.2", "destination:/queue/a\npriority:٣\n".encode(), "priority"),
        ("1.2", b"destination:/queue/a\nexpires:-1\n", "expires"),
        ("1.2", b"destination:/queue/a\nexpires:1.5\n", "expires"),
        ("1.2", b"destination:/queue/a\nexpires:" + b"9" * 5000 + b"\n", "expires"),
        ("1.2", b"destination:/queue/a\ntransaction:\n", "transaction"),
    ],
)
def test_a_send_that_is_wrong_is_refused_with_its_receipt(version: str, lines: bytes, text: str) -> None:
    error, output = refused(version, b"SEND\nreceipt:r\\c1\n" + lines + b"\nhello\0SEND\ndestination:/queue/b\n\n\0")
    assert isinstance(error, ProtocolError | InvalidMessage)
    assert text in str(error)
    assert output.startswith(b"ERROR\nreceipt-id:r\\c1\nmessage:")
    assert len(output) < 1000


@pytest.mark.parametrize("default", [True, False])
@pytest.mark.parametrize(
    ("line", "durable"), [(b"", None), (b"persistent:true\n", True), (b"persistent:false\n", False)]
)
def test_persistent_says_whether_a_message_is_durable(default: bool, line: bytes, durable: bool | None) -> None:
    session = StompSession(StompLimits(), durable_default=default)
    session.receive_data(connect_frame("1.2") + b"SEND\ndestination:/queue/a\n" + line + b"\n\0")
    event = drain(session)[1]
    assert isinstance(event, Send)
    assert event.message.durable is (default if durable is None else durable)


def test_1_0_pads_what_the_transport_reads() -> None:
    event = sent("1.0", b"SEND\ndestination: /queue/a\npriority: 5\nreceipt: 7\n\nx\0")
    assert (event.message.destination, event.message.priority, event.receipt) == ("/queue/a", 5, b"7")


# Receipts.


@pytest.mark.parametrize(
    ("version", "raw", "said"),
    [
        ("1.2", b"message-12345", b"message-12345"),
        ("1.2", b"", b""),
        ("1.2", b"a\\cb", b"a\\cb"),
        ("1.2", b"a:b", b"a\\cb"),
        ("1.2", "é".encode(), "é".encode()),
        ("1.1", b"a\rb", b"a\rb"),
        ("1.1", b"a\\nb:", b"a\\nb\\c"),
        ("1.0", b"a\\cb:c", b"a\\cb:c"),
    ],
)
@pytest.mark.parametrize(
    "frame",
    [
        b"SEND\ndestination:/queue/a\n",
        b"SUBSCRIBE\ndestination:/queue/a\nid:0\n",
        b"UNSUBSCRIBE\nid:0\n",
        b"ACK\nid:1\nmessage-id:1\nsubscription:0\n",
        b"ACK\nmessage-id:1\nsubscription:0\nid:1\n",
        b"BEGIN\ntransaction:t\n",
        b"COMMIT\ntransaction:t\n",
        b"ABORT\ntransaction:t\n",
        b"DISCONNECT\n",
    ],
)
def test_every_frame_may_ask_for_a_receipt(frame: bytes, version: str, raw: bytes, said: bytes) -> None:
    event = one(version, frame + b"receipt:" + raw + b"\n\n\0")
    assert event.receipt == said  # type: ignore[attr-defined]
    session = open_session(version)
    session.receipt(said)
    assert session.data_to_send() == b"RECEIPT\nreceipt-id:" + said + b"\n\n\0"


def test_a_receipt_that_is_malformed_is_refused() -> None:
    for receipt in (b"\\t", b"\xff", b"a\xc3"):
        _, output = refused("1.2", b"SEND\ndestination:/queue/a\nreceipt:" + receipt + b"\n\n\0")
        assert b"receipt-id" not in output


# SUBSCRIBE and UNSUBSCRIBE.


def subscribed(version: str, lines: bytes, connect: bytes | None = None) -> Subscribe:
    session = new_session()
    session.receive_data((connect or connect_frame(version)) + b"SUBSCRIBE\n" + lines + b"\n\0")
    event = drain(session)[1]
    assert isinstance(event, Subscribe), event
    return event


@pytest.mark.parametrize("version", VERSIONS)
def test_subscribe_of_the_specification(version: str) -> None:
    event = one(version, b"SUBSCRIBE\nid:0\ndestination:/queue/foo\nack:client\n\n\0")
    assert event == Subscribe(
        "0",
        "/queue/foo",
        "client",
        None,
        None,
        None,
        None,
        [("id", "0"), ("destination", "/queue/foo"), ("ack", "client")],
    )


def test_subscribe_without_id_is_for_1_0() -> None:
    assert subscribed("1.0", b"destination: /queue/foo\nack: client\n").id is None  # 1.0's own, padded example
    for version in ("1.1", "1.2"):
        error, _ = refused(version, b"SUBSCRIBE\ndestination:/queue/foo\n\n\0")
        assert "id:0" in str(error)


@pytest.mark.parametrize("mode", ["auto", "client", "client-individual"])
def test_the_ack_modes(mode: str) -> None:
    assert subscribed("1.1", b"id:0\ndestination:/queue/a\nack:" + mode.encode() + b"\n").ack == mode
    assert subscribed("1.1", b"id:0\ndestination:/queue/a\n").ack == "auto"


@pytest.mark.parametrize(
    ("lines", "prefetch"),
    [
        (b"", None),
        (b"activemq.prefetchSize:1\n", 1),
        (b"prefetch-count:25\n", 25),
        (b"prefetch-count:0\n", None),
        (b"activemq.prefetchSize:3\nprefetch-count:4\n", 3),
    ],
)
def test_prefetch_as_activemq_and_rabbitmq_say_it(lines: bytes, prefetch: int | None) -> None:
    assert subscribed("1.2", b"id:0\ndestination:/queue/a\n" + lines).prefetch == prefetch


@pytest.mark.parametrize(
    ("lines", "name", "client_id"),
    [
        (b"client-id:c\nactivemq.subscriptionName:n\n", "n", "c"),
        (b"client-id:c\ndurable-subscription-name:n\n", "n", "c"),
        (b"durable:true\nauto-delete:false\n", "0", None),
        (b"durable:true\n", None, None),
        (b"client-id:c\n", None, "c"),
    ],
)
def test_durable_subscriptions_as_activemq_and_rabbitmq_say_them(
    lines: bytes, name: str | None, client_id: str | None
) -> None:
    event = subscribed("1.2", b"id:0\ndestination:/topic/a\n" + lines)
    assert (event.durable_name, event.client_id) == (name, client_id)


def test_the_client_id_of_connect_owns_durable_subscriptions() -> None:
    connect = b"CONNECT\naccept-version:1.1\nclient-id:c\n\n\0"
    event = subscribed("1.1", b"id:0\ndestination:/topic/a\nactivemq.subscriptionName:n\n", connect)
    assert (event.durable_name, event.client_id) == ("n", "c")


def test_durable_true_on_a_queue_is_no_durable_subscription() -> None:
    assert subscribed("1.2", b"id:0\ndestination:/queue/a\ndurable:true\nauto-delete:false\n").durable_name is None


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (b"id:0\n", "destination"),
        (b"id:0\ndestination:/queue/a\nack:maybe\n", "client-individual"),
        (b"id:0\ndestination:/queue/a\nactivemq.priority:high\n", "activemq.priority"),
        (b"id:0\ndestination:/topic/a\nactivemq.subscriptionName:n\n", "client-id"),
        (b"id:0\ndestination:/queue/a\nactivemq.prefetchSize:0\n", "activemq.prefetchSize"),
        (b"id:0\ndestination:/queue/a\nactivemq.prefetchSize:-1\n", "activemq.prefetchSize"),
        (b"id:0\ndestination:/queue/a\nprefetch-count:x\n", "prefetch-count"),
        (b"id:0\ndestination:/queue/a\nprefetch-count:" + b"9" * 5000 + b"\n", "prefetch-count"),
    ],
)
def test_a_subscribe_that_is_wrong_is_refused(lines: bytes, text: str) -> None:
    error, output = refused("1.2", b"SUBSCRIBE\nreceipt:5\n" + lines + b"\n\0")
    assert text in str(error)
    assert b"receipt-id:5\n" in output


def test_unsubscribe() -> None:
    for version in VERSIONS:
        assert one(version, b"UNSUBSCRIBE\nid:0\n\n\0") == Unsubscribe("0", None, None, None, None)
    assert one("1.0", b"UNSUBSCRIBE\ndestination: /queue/a\n\n\0") == Unsubscribe(None, "/queue/a", None, None, None)
    for version in ("1.1", "1.2"):
        assert "id" in str(refused(version, b"UNSUBSCRIBE\ndestination:/queue/a\n\n\0")[0])
    assert "id or destination" in str(refused("1.0", b"UNSUBSCRIBE\n\n\0")[0])


def test_unsubscribe_of_a_durable_subscription() -> None:
    activemq = b"UNSUBSCRIBE\nclient-id:c\nactivemq.subscriptionName:n\n\n\0"
    assert one("1.2", activemq) == Unsubscribe(None, None, "n", "c", None)
    rabbitmq = b"UNSUBSCRIBE\nid:7\ndurable:true\nauto-delete:false\n\n\0"
    assert one("1.2", rabbitmq) == Unsubscribe("7", None, "7", None, None)


# ACK, NACK and transactions.


@pytest.mark.parametrize(("command", "kind"), [(b"ACK", Ack), (b"NACK", Nack)])
def test_acknowledgements_of_each_version(command: bytes, kind: type[Ack]) -> None:
    assert one("1.2", command + b"\nid:12\n\n\0") == kind(b"12", None, None, None, None)
    assert one("1.2", command + b"\nid:a\\cb\ntransaction:t\n\n\0") == kind(b"a:b", None, None, "t", None)
    assert one("1.2", command + "\nid:é\n\n\0".encode()) == kind("é".encode(), None, None, None, None)
    frame = command + b"\nsubscription:0\nmessage-id:007\ntransaction:tx1\n\n\0"
    assert one("1.1", frame) == kind(None, b"007", "0", "tx1", None)
    if kind is Ack:
        assert one("1.0", b"ACK\nmessage-id: 007\n\n\0") == Ack(None, b"007", None, None, None)


@pytest.mark.parametrize(
    ("version", "frame", "text"),
    [
        ("1.2", b"ACK\nmessage-id:1\nsubscription:0\n\n\0", "ack header"),
        ("1.2", b"ACK\nid:\n\n\0", "ack header"),
        ("1.2", b"NACK\n\n\0", "id"),
        ("1.2", b"ACK\nid:\\t\n\n\0", "escape"),
        ("1.2", b"ACK\nid:\xff\n\n\0", "UTF-8"),
        ("1.1", b"ACK\nmessage-id:1\n\n\0", "subscription"),
        ("1.1", b"NACK\nsubscription:1\n\n\0", "message-id"),
        ("1.0", b"ACK\n\n\0", "message-id"),
        ("1.0", b"NACK\nmessage-id:1\n\n\0", "NACK"),
        ("1.2", b"ACK\nid:1\ntransaction:\n\n\0", "transaction"),
        ("1.2", b"BEGIN\n\n\0", "transaction"),
        ("1.2", b"COMMIT\ntransaction:\n\n\0", "transaction"),
        ("1.2", b"ABORT\nx:y\n\n\0", "transaction"),
        ("1.2", b"MESSAGE\nx:y\n\n\0", "MESSAGE"),
        ("1.2", b"ACK\nid:1\n\nbody\0", "body"),
    ],
)
def test_a_frame_that_is_wrong_is_refused(version: str, frame: bytes, text: str) -> None:
    error, _ = refused(version, frame)
    assert text in str(error)


def test_1_0_ignores_bodies_where_none_belong() -> None:
    assert one("1.0", b"SUBSCRIBE\ndestination:/queue/a\n\nignored\0\n").destination == "/queue/a"  # type: ignore[attr-defined]


@pytest.mark.parametrize("version", VERSIONS)
def test_transactions_and_disconnect(version: str) -> None:
    data = (
        b"BEGIN\ntransaction:t\n\n\0\n\nSEND\ndestination:/queue/a\ntransaction:t\n\nx\0"
        b"COMMIT\ntransaction:t\n\n\0ABORT\ntransaction:u\nreceipt:1\n\n\0DISCONNECT\nreceipt:77\n\n\0"
    )
    events, output = every_way(lambda: open_session(version), data)
    assert [events[0], *events[2:]] == [Begin("t", None), Commit("t", None), Abort("u", b"1"), Disconnect(b"77")]
    assert isinstance(events[1], Send)
    assert events[1].transaction == "t"
    assert output == b""


def test_nothing_is_read_after_disconnect() -> None:
    session = open_session()
    events, _ = feed(session, [b"DISCONNECT\n\n\0SEND\ndestination:/queue/a\n\n\0BOGUS\n\n\0", b"x" * 1000])
    assert events == [Disconnect(None)]
    assert session.buffered_bytes == 0
