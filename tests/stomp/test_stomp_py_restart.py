"""stomp.py as an outside client, across its own absence and the broker's: kill -9, start again, go on."""

from __future__ import annotations

import queue
from pathlib import Path

import pytest

from tests.stomp.programs import VERSIONS, Program, program
from tests.support.serving import ServedBroker, served

every_version = pytest.mark.parametrize("version", VERSIONS)

# What each convention says in CONNECT, in SUBSCRIBE, and in the UNSUBSCRIBE that ends the subscription for good.
ACTIVEMQ = ({"client-id": "ward-3"}, {"activemq.subscriptionName": "ecg"}, {"activemq.subscriptionName": "ecg"})
RABBITMQ = ({}, {"durable": "true", "auto-delete": "false"}, {"durable": "true", "auto-delete": "false"})
conventions = pytest.mark.parametrize("convention", [ACTIVEMQ, RABBITMQ], ids=["activemq", "rabbitmq"])
Convention = tuple[dict[str, str], dict[str, str], dict[str, str]]


@every_version
def test_what_was_confirmed_survives_kill_9(directory: Path, version: str):
    with served(directory / "data") as broker:
        with program(broker.port, version) as one:
            for number in range(20):
                one.send("/queue/a", f"durable {number}")
            one.send("/queue/a", "transient", persistent="false")
            one.transaction("begin", "open")
            one.send("/queue/a", "never committed", transaction="open")
            one.transaction("begin", "done")
            one.send("/queue/a", "committed", transaction="done")
            one.transaction("commit", "done")
            one.subscribe("/queue/a", ack="client-individual", **{"activemq.prefetchSize": "3"})
            shown = [one.receive() for _ in range(3)]
            one.ack(shown[1])
            broker.kill()
        broker.restart()
        with program(broker.port, version) as other:
            other.subscribe("/queue/a", ack="client-individual")
            messages = [other.receive() for _ in range(20)]
            expected = [f"durable {number}".encode() for number in range(20) if number != 1]
            assert [message.body for message in messages] == [*expected, b"committed"]
            marked = [message.body for message in messages if message.headers["redelivered"] == "true"]
            assert set(marked) >= {b"durable 0", b"durable 2"}
            again = next(message for message in messages if message.body == b"durable 0")
            assert again.headers["message-id"] == shown[0].headers["message-id"]
            for message in messages:
                other.ack(message)
            assert broker.queue_status("a")["depth"] == 0


def test_a_transient_message_is_gone_after_a_good_stop_too(directory: Path):
    with served(directory / "data") as broker:
        with program(broker.port) as one:
            one.send("/queue/a", "transient", persistent="false")
            one.send("/queue/a", "durable", persistent="true")
        assert broker.terminate() == 0
        broker.restart()
        with program(broker.port) as other:
            other.subscribe("/queue/a")
            assert other.receive().body == b"durable"


def test_a_message_that_takes_its_consumers_broker_down_is_counted(directory: Path):
    """Deliveries are counted across kill -9, so that the dead-letter queue ends it."""
    (directory / "b.toml").write_text("[delivery]\ndeliveries_max = 3\n")
    with served(directory / "data", directory / "b.toml") as broker:
        with program(broker.port) as one:
            one.send("/queue/a", "poison")
        for deliveries in range(3):
            with program(broker.port) as one:
                one.subscribe("/queue/a", ack="client-individual")
                message = one.receive()
                assert message.headers["redelivered"] == ("true" if deliveries else "false")
                assert message.headers.get("delivery-count", "1") == str(deliveries + 1)
                broker.kill()
            broker.restart()
        with program(broker.port) as keeper:
            keeper.subscribe("/queue/ActiveMQ.DLQ", ack="client-individual")
            keeper.subscribe("/queue/a", id="2")
            letter = keeper.receive()
            assert (letter.body, letter.headers["dead-letter-origin"]) == (b"poison", "/queue/a")


@conventions
@every_version
def test_a_durable_subscription_collects_while_its_owner_is_away(
    broker: ServedBroker, name: str, version: str, convention: Convention
):
    connect, subscribe, unsubscribe = convention
    connect = {key: f"{value}-{name}" for key, value in connect.items()}
    with program(broker.port, version) as sender:
        with program(broker.port, version, **connect) as one:
            one.subscribe(f"/topic/{name}.*", "client", id=name, **subscribe)
            sender.send(f"/topic/{name}.x", "present")
            one.ack(one.receive())
            one.disconnect()
        for body in "abc":
            sender.send(f"/topic/{name}.x", body)
        with program(broker.port, version, **connect) as again:
            again.subscribe(f"/topic/{name}.*", "client", id=name, **subscribe)
            messages = [again.receive() for _ in range(3)]
            assert [message.body for message in messages] == [b"a", b"b", b"c"]
            assert {message.headers["redelivered"] for message in messages} == {"false"}
            again.ack(messages[-1])
            again.unsubscribe(id=name, **unsubscribe)
        sender.send(f"/topic/{name}.x", "for nobody")
        with program(broker.port, version, **connect) as last:
            last.subscribe(f"/topic/{name}.*", "client", id=name, **subscribe)
            sender.send(f"/topic/{name}.x", "marker")
            assert last.receive().body == b"marker"


@conventions
def test_durable_subscriptions_survive_kill_9(directory: Path, convention: Convention):
    connect, subscribe, _ = convention
    with served(directory / "data") as broker:
        with program(broker.port, **connect) as one, program(broker.port, **connect) as sender:
            one.subscribe("/topic/ward.>", "client-individual", id="sub", **subscribe)
            sender.send("/topic/ward.ecg", "seen")
            sender.send("/topic/ward.ecg", "seen and done")
            seen, done = one.receive(), one.receive()
            one.ack(done)
            one.cut()
            sender.send("/topic/ward.lab", "missed")
            broker.kill()
        broker.restart()
        with program(broker.port, **connect) as again, program(broker.port) as sender:
            sender.send("/topic/ward", "after the restart")  # it collects before its owner is back
            again.subscribe("/topic/ward.>", "client-individual", id="sub", **subscribe)
            messages = [again.receive() for _ in range(3)]
            assert [message.body for message in messages] == [b"seen", b"missed", b"after the restart"]
            assert messages[0].headers["redelivered"] == "true"
            assert messages[0].headers["message-id"] == seen.headers["message-id"]


@conventions
def test_a_durable_subscription_that_never_had_a_message_survives_kill_9(directory: Path, convention: Convention):
    connect, subscribe, _ = convention
    with served(directory / "data") as broker:
        with program(broker.port, **connect) as one:
            one.subscribe("/topic/ward", "client", id="sub", **subscribe)
            broker.kill()
        broker.restart()
        with program(broker.port) as sender:
            sender.send("/topic/ward", "kept for it")
        with program(broker.port, **connect) as again:
            again.subscribe("/topic/ward", "client", id="sub", **subscribe)
            assert again.receive().body == b"kept for it"


def test_a_program_reconnects_after_the_broker_was_killed(directory: Path):
    with served(directory / "data") as broker:
        one = Program(broker.port)
        try:
            one.connect()
            one.subscribe("/queue/a", ack="client-individual")
            one.send("/queue/a", "before")
            first = one.receive()
            broker.kill()
            one.inbox.disconnected.get(timeout=5)
            broker.restart(same_port=True)
            one.connect()
            one.subscribe("/queue/a", ack="client-individual")
            again = one.receive()
            assert (again.body, again.headers["redelivered"]) == (b"before", "true")
            assert again.headers["message-id"] == first.headers["message-id"]
            one.ack(again)
            one.send("/queue/a", "after")
            assert one.receive().body == b"after"
        finally:
            one.cut()


def test_a_good_stop_keeps_every_confirmed_message(directory: Path):
    """SIGTERM while a program sends and another holds messages: nothing that was confirmed is missing."""
    with served(directory / "data") as broker:
        with program(broker.port) as consumer, program(broker.port) as producer:
            consumer.subscribe("/queue/a", ack="client-individual", **{"activemq.prefetchSize": "5"})
            for number in range(300):
                producer.connection.send("/queue/a", str(number), headers={"receipt": f"sent-{number}"})
            held = [consumer.receive() for _ in range(5)]
            assert broker.terminate() == 0
            producer.inbox.disconnected.get(timeout=5)
            assert "stopping" in producer.inbox.errors.get(timeout=5).headers["message"]
            confirmed = set()
            while True:
                try:
                    confirmed.add(int(producer.inbox.receipts.get_nowait().removeprefix("sent-")))
                except queue.Empty:
                    break
        assert confirmed
        broker.restart()
        with program(broker.port) as other:
            other.subscribe("/queue/a", ack="client-individual")
            messages = [other.receive() for _ in range(broker.queue_status("a")["depth"])]
            numbers = [int(message.body) for message in messages]
            assert numbers == sorted(set(numbers))
            assert confirmed <= set(numbers)
            marked = {message.body for message in messages if message.headers["redelivered"] == "true"}
            assert marked == {message.body for message in held}
