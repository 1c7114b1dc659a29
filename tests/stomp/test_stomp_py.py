"""stomp.py as an outside client: messages, acknowledgements, transactions and subscriptions in all three versions.

The broker is a process of its own. What has to survive it is in `test_stomp_py_restart`.
"""

from __future__ import annotations

import hashlib
import random
import time

import pytest

from tests.stomp.programs import VERSIONS, Program, program
from tests.support.serving import ServedBroker
from tests.support.wire import BlockingPeer, frame

every_version = pytest.mark.parametrize("version", VERSIONS)
versions_with_nack = pytest.mark.parametrize("version", ["1.1", "1.2"])  # STOMP 1.0 has no NACK


# ---- connecting


@every_version
def test_connected_names_version_session_and_server(broker: ServedBroker, version: str):
    sessions = set()
    for _ in range(2):
        one = Program(broker.port, version)
        connected = one.connect()
        assert connected.headers["version"] == version
        assert connected.headers["server"].startswith("pybroker/")
        sessions.add(connected.headers["session"])
        one.disconnect()
    assert len(sessions) == 2


@every_version
def test_disconnect_is_confirmed_and_ends_the_connection(broker: ServedBroker, version: str):
    with program(broker.port, version) as one:
        one.disconnect()
        assert one.inbox.disconnected.get(timeout=5)
        assert one.inbox.errors.empty()


# ---- headers and bodies

TRICKY = {
    "plain": "value",
    "with-colon": "a:b::c",
    "with-backslash": "C:\\new\\c\\r",
    "with-lines": "one\ntwo\n",
    "with-unicode": "Blutdruck µ ≥ 120 → 🫀",
    "with-spaces": "  kept  ",
    "empty": "",
}


@versions_with_nack
def test_headers_with_every_kind_of_character_arrive_unchanged(broker: ServedBroker, name: str, version: str):
    tricky = dict(TRICKY, **({"with-returns": "a\r\nb\r"} if version == "1.2" else {}))
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}")
        one.send(f"/queue/{name}", "x", **tricky)
        headers = one.receive().headers
        assert {key: headers[key] for key in tricky} == tricky


@pytest.mark.parametrize(("sender", "receiver"), [("1.1", "1.2"), ("1.2", "1.1")])
def test_headers_are_translated_between_versions(broker: ServedBroker, name: str, sender: str, receiver: str):
    with program(broker.port, sender) as one, program(broker.port, receiver) as other:
        other.subscribe(f"/queue/{name}")
        one.send(f"/queue/{name}", "x", **TRICKY)
        headers = other.receive().headers
        assert {key: headers[key] for key in TRICKY} == TRICKY


def test_version_1_0_has_no_escapes(broker: ServedBroker, name: str):
    with program(broker.port, "1.0") as one, BlockingPeer(broker.port, "1.0") as peer:
        peer.send(frame("SUBSCRIBE", f"destination:/queue/{name}"))
        one.send(f"/queue/{name}", "x", path="C:\\new", ratio="1:2")
        message = peer.frame()
        assert (message["path"], message["ratio"]) == ("C:\\new", "1:2")


@every_version
def test_repeated_headers_arrive_all_and_in_order(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one, BlockingPeer(broker.port, version) as peer:
        peer.do("SUBSCRIBE", f"destination:/queue/{name}", "id:1")
        one.send(f"/queue/{name}", "x", hop=("first", "second", "first"), zone="last")
        message = peer.frame()
        assert message.all("hop") == ["first", "second", "first"]
        assert [key for key, _ in message.headers if key in ("hop", "zone")] == ["hop", "hop", "hop", "zone"]


@every_version
def test_conventional_headers_pass_through(broker: ServedBroker, name: str, version: str):
    headers = {
        "persistent": "true",
        "priority": "4",
        "correlation-id": "c-17",
        "reply-to": "/queue/answers",
        "content-type": "x-application/hl7-v2+er7",
        "type": "ORU^R01",
        "JMSXGroupID": "patient-7",
    }
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}")
        one.send(f"/queue/{name}", "x", **headers)
        message = one.receive()
        assert {key: message.headers[key] for key in headers} == headers
        assert message.headers["destination"] == f"/queue/{name}"
        assert message.headers["subscription"] == "1"
        assert message.headers["redelivered"] == "false"
        assert message.headers["message-id"]
        assert abs(int(message.headers["timestamp"]) / 1000 - time.time()) < 60
        assert ("ack" in message.headers) is False  # ack:auto has nothing to acknowledge
        assert "receipt" not in message.headers


BODIES = {
    "text": b"plain text",
    "empty": b"",
    "nuls": b"\0",
    "binary": bytes(range(256)) * 4 + b"\0\0\n\0",
    "like-a-frame": b"\n\n\0SEND\ndestination:/queue/other\n\n\0",
    "lines": b"\r\n\n\r\n",
    "utf-8": "Müller ≥ 5 🫀".encode(),
    "megabyte": random.Random(5).randbytes(1_048_576),
}


@every_version
def test_bodies_of_every_kind_arrive_unchanged(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}")
        for body in BODIES.values():
            one.send(f"/queue/{name}", body)
        received = one.bodies(len(BODIES))
        assert [hashlib.sha256(body).hexdigest() for body in received] == [
            hashlib.sha256(body).hexdigest() for body in BODIES.values()
        ]


@every_version
def test_a_body_without_content_length_ends_at_its_nul(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.connection.auto_content_length = False
        one.subscribe(f"/queue/{name}")
        one.send(f"/queue/{name}", b"ends here")
        message = one.receive()
        assert message.body == b"ends here"
        assert message.headers["content-length"] == "9"


@every_version
def test_many_messages_keep_their_order(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one, program(broker.port, version) as other:
        other.subscribe(f"/queue/{name}", ack="client")
        for number in range(500):
            one.connection.send(f"/queue/{name}", str(number))
        received = [other.receive() for _ in range(500)]
        assert [int(message.body) for message in received] == list(range(500))
        assert len({message.headers["message-id"] for message in received}) == 500
        other.ack(received[-1])
        assert broker.queue_status(name)["depth"] == 0


# ---- acknowledging


@every_version
def test_auto_needs_no_acknowledgement(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}", ack="auto")
        one.send(f"/queue/{name}", "a")
        one.receive()
        one.unsubscribe()
    with program(broker.port, version) as other:
        other.subscribe(f"/queue/{name}", ack="client-individual")
        other.send(f"/queue/{name}", "marker")
        assert other.receive().body == b"marker"


@every_version
def test_client_acknowledges_all_up_to_one(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        for number in range(5):
            one.send(f"/queue/{name}", str(number))
        one.subscribe(f"/queue/{name}", ack="client")
        messages = [one.receive() for _ in range(5)]
        one.ack(messages[2])
    with program(broker.port, version) as other:
        other.subscribe(f"/queue/{name}", ack="client")
        left = [other.receive() for _ in range(2)]
        assert [message.body for message in left] == [b"3", b"4"]
        assert {message.headers["redelivered"] for message in left} == {"true"}


@every_version
def test_client_individual_acknowledges_only_that_one(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        for number in range(5):
            one.send(f"/queue/{name}", str(number))
        one.subscribe(f"/queue/{name}", ack="client-individual")
        messages = [one.receive() for _ in range(5)]
        for number in (3, 1):
            one.ack(messages[number])
    with program(broker.port, version) as other:
        other.subscribe(f"/queue/{name}", ack="client-individual")
        assert other.bodies(3) == [b"0", b"2", b"4"]


@every_version
def test_what_a_lost_program_had_goes_to_another_and_is_marked(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as other:
        with program(broker.port, version) as one:
            one.subscribe(f"/queue/{name}", ack="client-individual")
            one.send(f"/queue/{name}", "a", trace="t")
            first = one.receive()
            assert first.headers["redelivered"] == "false"
            other.subscribe(f"/queue/{name}", ack="client-individual")
            one.cut()
        second = other.receive()
        assert (second.body, second.headers["trace"]) == (b"a", "t")
        assert second.headers["redelivered"] == "true"
        assert second.headers["message-id"] == first.headers["message-id"]
        other.ack(second)


@versions_with_nack
def test_nack_brings_a_message_again_at_its_place(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        for body in "abc":
            one.send(f"/queue/{name}", body)
        one.subscribe(f"/queue/{name}", ack="client-individual", **{"activemq.prefetchSize": "1"})
        first = one.receive()
        one.nack(first)
        again = one.receive()
        assert again.body == b"a"  # before b, which came after it
        assert (first.headers["redelivered"], again.headers["redelivered"]) == ("false", "true")
        assert again.headers["message-id"] == first.headers["message-id"]
        one.ack(again)
        assert one.receive().body == b"b"


@versions_with_nack
def test_the_sixth_failed_delivery_is_the_last(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.send(f"/queue/{name}", "poison", origin="ward-3")
        one.send(f"/queue/{name}", "good")
        one.subscribe(f"/queue/{name}", ack="client-individual", **{"activemq.prefetchSize": "1"})
        tries = []
        while (message := one.receive()).body == b"poison":
            tries.append(message.headers["redelivered"])
            one.nack(message)
        assert tries == ["false"] + ["true"] * 5
        assert message.body == b"good"
        one.ack(message)
    with program(broker.port, version) as keeper:
        keeper.subscribe("/queue/ActiveMQ.DLQ", ack="client-individual")
        letter = keeper.receive()
        assert letter.body == b"poison"
        assert letter.headers["origin"] == "ward-3"
        assert letter.headers["dead-letter-origin"] == f"/queue/{name}"
        assert letter.headers["dead-letter-reason"] == "deliveries"
        assert letter.headers["dead-letter-deliveries"] == "6"
        keeper.ack(letter)


def test_letters_of_one_message_from_two_subscriptions_can_both_be_acknowledged(broker: ServedBroker, name: str):
    """In 1.1 an acknowledgement names the message, and both letters come from the same one."""
    durable = {"activemq.subscriptionName": "s"}
    for number in "12":
        with program(broker.port, "1.1", client_id=f"{name}-{number}") as one:
            one.subscribe(f"/topic/{name}", "client-individual", **durable)
            one.disconnect()
    with program(broker.port, "1.1") as sender:
        sender.send(f"/topic/{name}", "poison")
    for number in "12":
        with program(broker.port, "1.1", client_id=f"{name}-{number}") as one:
            one.subscribe(f"/topic/{name}", "client-individual", **durable)
            for _ in range(6):
                one.nack(one.receive())
    with program(broker.port, "1.1") as keeper:
        keeper.subscribe("/queue/ActiveMQ.DLQ", ack="client-individual")
        letters = [keeper.receive() for _ in range(2)]
        assert len({letter.headers["dead-letter-subscription"] for letter in letters}) == 2
        for letter in letters:
            keeper.ack(letter)
        assert broker.queue_status("ActiveMQ.DLQ")["depth"] == 0


# ---- transactions


@every_version
def test_sends_of_a_transaction_come_at_its_commit(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one, program(broker.port, version) as other:
        other.subscribe(f"/queue/{name}")
        one.transaction("begin", "t1")
        one.send(f"/queue/{name}", "in-1", transaction="t1")
        one.send(f"/queue/{name}", "outside")
        one.send(f"/queue/{name}", "in-2", transaction="t1")
        assert other.receive().body == b"outside"
        one.transaction("commit", "t1")
        messages = [other.receive() for _ in range(2)]
        assert [message.body for message in messages] == [b"in-1", b"in-2"]
        assert "transaction" not in messages[0].headers


@every_version
def test_sends_of_an_aborted_transaction_never_come(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}")
        one.transaction("begin", "t1")
        one.send(f"/queue/{name}", "dropped", transaction="t1")
        one.transaction("abort", "t1")
        one.send(f"/queue/{name}", "marker")
        assert one.receive().body == b"marker"


@every_version
def test_acknowledgements_of_a_transaction(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        for body in ("kept", "taken"):
            one.send(f"/queue/{name}", body)
        one.subscribe(f"/queue/{name}", ack="client-individual", **{"activemq.prefetchSize": "1"})
        one.transaction("begin", "aborted")
        one.ack(one.receive(), "aborted")
        taken = one.receive()
        one.transaction("abort", "aborted")
        one.transaction("begin", "committed")
        one.ack(taken, "committed")
        one.send(f"/queue/{name}.out", "answer", transaction="committed")
        one.transaction("commit", "committed")
        again = one.receive()
        assert (again.body, again.headers["redelivered"]) == (b"kept", "true")
        one.ack(again)
        assert broker.queue_status(name)["depth"] == 0
        assert broker.queue_status(f"{name}.out")["depth"] == 1


@every_version
def test_a_transaction_that_its_program_left_is_aborted(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as other:
        with program(broker.port, version) as one:
            one.subscribe(f"/queue/{name}", ack="client-individual")
            one.send(f"/queue/{name}", "a")
            one.transaction("begin", "t1")
            one.ack(one.receive(), "t1")
            one.send(f"/queue/{name}", "dropped", transaction="t1")
            one.cut()
        other.subscribe(f"/queue/{name}", ack="client-individual")
        message = other.receive()
        assert (message.body, message.headers["redelivered"]) == (b"a", "true")
        other.ack(message)
        assert broker.queue_status(name)["depth"] == 0


# ---- topics


@every_version
def test_every_subscriber_of_a_topic_gets_a_copy(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one, program(broker.port, version) as other:
        for each in (one, other):
            each.subscribe(f"/topic/{name}")
        one.send(f"/topic/{name}", "to all")
        assert [each.receive().body for each in (one, other)] == [b"to all"] * 2


@every_version
@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("*.ecg", ["a.ecg", "b.ecg"]),
        ("a.*", ["a.ecg", "a.lab"]),
        ("a.>", ["a", "a.ecg", "a.lab", "a.lab.urgent"]),
        (">", ["a", "a.ecg", "a.lab", "a.lab.urgent", "b.ecg"]),
    ],
)
def test_topics_by_pattern(broker: ServedBroker, name: str, version: str, pattern: str, matching: list[str]):
    with program(broker.port, version) as one:
        one.subscribe(f"/topic/{name}.{pattern}")
        for topic in ("a", "a.ecg", "a.lab", "a.lab.urgent", "b.ecg"):
            one.send(f"/topic/{name}.{topic}", topic)
        messages = [one.receive() for _ in matching]
        assert [message.body.decode() for message in messages] == matching
        assert [message.headers["destination"] for message in messages] == [
            f"/topic/{name}.{topic}" for topic in matching
        ]
        one.unsubscribe()
        one.subscribe(f"/queue/{name}")
        one.send(f"/queue/{name}", "marker")
        assert one.receive().body == b"marker"  # and nothing else was on its way


@every_version
def test_a_topic_keeps_nothing_for_those_who_come_later(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.send(f"/topic/{name}", "before")
        one.subscribe(f"/topic/{name}")
        one.send(f"/topic/{name}", "after")
        assert one.receive().body == b"after"


# ---- priority, expiry, prefetch


@every_version
def test_higher_priority_comes_first(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        for number, priority in enumerate("4094194"):
            one.send(f"/queue/{name}", str(number), priority=priority)
        one.send(f"/queue/{name}", "7")  # 4 is the default
        one.subscribe(f"/queue/{name}")
        messages = [one.receive() for _ in range(8)]
        assert [message.body for message in messages] == [b"2", b"5", b"0", b"3", b"6", b"7", b"4", b"1"]
        assert messages[0].headers["priority"] == "9"


@every_version
def test_an_expired_message_is_not_delivered(broker: ServedBroker, name: str, version: str):
    now = int(time.time() * 1000)
    with program(broker.port, version) as one:
        one.send(f"/queue/{name}", "late already", expires=str(now - 1))
        one.send(f"/queue/{name}", "soon", expires=str(now + 300))
        one.send(f"/queue/{name}", "much later", expires=str(now + 3_600_000))
        one.send(f"/queue/{name}", "never", expires="0")
        time.sleep(max(0.0, now / 1000 + 0.31 - time.time()))  # the clock is what is tested
        one.subscribe(f"/queue/{name}")
        message = one.receive()
        assert (message.body, message.headers["expires"]) == (b"much later", str(now + 3_600_000))
        assert one.receive().body == b"never"


@every_version
@pytest.mark.parametrize("header", ["activemq.prefetchSize", "prefetch-count"])
def test_prefetch_bounds_what_is_out(broker: ServedBroker, name: str, version: str, header: str):
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}", ack="client-individual", **{header: "2"})
        for number in range(5):
            one.send(f"/queue/{name}", str(number))  # confirmed: what could be given out has been
        first = one.receive()
        assert one.receive().body == b"1"
        row = broker.queue_status(name)
        assert (row["depth"], row["outstanding"]) == (5, 2)
        assert one.inbox.messages.empty()
        one.ack(first)
        assert one.receive().body == b"2"


@every_version
def test_messages_are_shared_among_consumers_with_room(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one, program(broker.port, version) as other:
        for each in (one, other):
            each.subscribe(f"/queue/{name}", ack="client-individual")
        for number in range(20):
            one.send(f"/queue/{name}", str(number))
        got = [one.bodies(10), other.bodies(10)]
        assert sorted(int(body) for bodies in got for body in bodies) == list(range(20))
