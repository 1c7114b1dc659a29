"""Temporary destinations by stomp.py: names of the connection, what others see of them, and what happens when it ends."""

from __future__ import annotations

import pytest

from pybroker.control import ask
from tests.stomp.programs import VERSIONS, program
from tests.support.serving import ServedBroker

every_version = pytest.mark.parametrize("version", VERSIONS)


@every_version
def test_a_request_and_its_reply(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as asker, program(broker.port, version) as service:
        service.subscribe(f"/queue/{name}")
        asker.subscribe("/temp-queue/answers", id="answers")
        for number in range(3):
            asker.send(f"/queue/{name}", b"?", reply_to="/temp-queue/answers", correlation_id=str(number))
            request = service.receive()
            address = request.headers["reply-to"]
            assert address.startswith("/remote-temp-queue/")
            service.send(address, b"!", correlation_id=request.headers["correlation-id"], persistent="true")
            reply = asker.receive()
            assert reply.body == b"!"
            assert reply.headers["correlation-id"] == str(number)
            assert reply.headers["destination"] == "/temp-queue/answers"
            if version != "1.0":
                assert reply.headers["subscription"] == "answers"


def test_one_name_is_another_queue_on_another_connection(broker: ServedBroker, name: str):
    with program(broker.port) as one, program(broker.port) as two, program(broker.port) as service:
        service.subscribe(f"/queue/{name}")
        for asker in (one, two):
            asker.subscribe("/temp-queue/answers")
            asker.send(f"/queue/{name}", b"?", reply_to="/temp-queue/answers")
        addresses = [service.receive().headers["reply-to"] for _ in range(2)]
        assert len(set(addresses)) == 2
        service.send(addresses[1], b"for two")
        service.send(addresses[0], b"for one")
        assert (one.receive().body, two.receive().body) == (b"for one", b"for two")
        one.send("/temp-queue/answers", b"to itself")
        assert one.receive().body == b"to itself"


def test_a_reply_is_confirmed_when_the_asker_is_gone(broker: ServedBroker, name: str):
    before = statistics(broker)["unclaimed"]
    with program(broker.port) as service:
        service.subscribe(f"/queue/{name}")
        with program(broker.port) as asker:
            asker.send(f"/queue/{name}", b"?", reply_to="/temp-queue/answers")
            address = service.receive().headers["reply-to"]
            service.send(address, b"nobody subscribes yet")
            asker.disconnect()
        for _ in range(3):
            service.send(address, b"late")
    assert statistics(broker)["unclaimed"] == before + 4


def test_another_connection_can_not_listen(broker: ServedBroker, name: str):
    with program(broker.port) as asker, program(broker.port) as thief:
        thief.subscribe(f"/queue/{name}")
        asker.send(f"/queue/{name}", b"?", reply_to="/temp-topic/news")
        address = thief.receive().headers["reply-to"]
        assert address.startswith("/remote-temp-topic/")
        thief.connection.subscribe(address, id="2")
        assert "only its owner can consume it" in thief.error().headers["message"]


@pytest.mark.parametrize("destination", ["/temp-queue/", "/temp-queue/*", "/temp-topic/a.>", "/remote-temp-queue/*"])
def test_names_that_none_can_have(broker: ServedBroker, destination: str):
    with program(broker.port) as one:
        one.connection.send(destination, b"")
        assert one.error().headers["code"] == "destination"


def test_transactions_reply_as_well(broker: ServedBroker, name: str):
    with program(broker.port) as asker, program(broker.port) as service:
        asker.subscribe("/temp-queue/answers")
        service.subscribe(f"/queue/{name}", ack="client")
        asker.transaction("begin", "t")
        asker.send(f"/queue/{name}", b"?", reply_to="/temp-queue/answers", transaction="t")
        asker.transaction("commit", "t")
        request = service.receive()
        service.transaction("begin", "t")
        service.send(request.headers["reply-to"], b"!", transaction="t")
        service.ack(request, "t")
        service.transaction("commit", "t")
        assert asker.receive().body == b"!"


def statistics(broker: ServedBroker) -> dict[str, int]:
    assert broker.data_dir is not None
    found: dict[str, int] = ask(broker.data_dir, "status")
    return found
