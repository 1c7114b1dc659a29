"""Selectors as stomp.py asks for them."""

from __future__ import annotations

import pytest

from tests.stomp.programs import VERSIONS, program
from tests.support.serving import ServedBroker

every_version = pytest.mark.parametrize("version", VERSIONS)


@every_version
def test_a_topic_by_headers_and_jms_names(broker: ServedBroker, name: str, version: str):
    topic = f"/topic/{name}"
    with program(broker.port, version) as one:
        one.subscribe(topic, selector="JMSType = 'referral' AND JMSPriority > 4 AND ward IN ('3', '4') AND age < 18")
        one.send(topic, b"wanted", type="referral", priority="9", ward="3", age="17.5")
        one.send(topic, b"too old", type="referral", priority="9", ward="3", age="18")
        one.send(topic, b"not urgent", type="referral", priority="4", ward="3", age="1")
        one.send(topic, b"another type", type="report", priority="9", ward="3", age="1")
        one.send(topic, b"no ward", type="referral", priority="9", age="1")
        one.send(topic, b"end", type="referral", priority="5", ward="4", age="0")
        assert one.bodies(2) == [b"wanted", b"end"]
        one.disconnect()


@every_version
def test_a_durable_subscription(broker: ServedBroker, name: str, version: str):
    topic = f"/topic/{name}"
    durable = {"activemq.subscriptionName": name, "selector": "JMSCorrelationID = 'c-1'"}
    with program(broker.port, version, client_id=name) as one:
        one.subscribe(topic, **durable)
        one.disconnect()
    with program(broker.port, version) as sender:
        sender.send(topic, b"other", correlation_id="c-2")
        sender.send(topic, b"wanted", correlation_id="c-1")
        sender.disconnect()
    with program(broker.port, version, client_id=name) as one:
        one.subscribe(topic, **durable)
        assert one.bodies(1) == [b"wanted"]
        one.disconnect()


@every_version
def test_a_queue(broker: ServedBroker, name: str, version: str):
    queue = f"/queue/{name}"
    with program(broker.port, version) as one, program(broker.port, version) as other:
        for number in range(20):
            one.send(queue, str(number), number=str(number))
        one.subscribe(queue, selector="number / 5 * 5 = number OR number > 18")
        assert one.bodies(5) == [b"0", b"5", b"10", b"15", b"19"]
        one.disconnect()
        other.subscribe(queue)
        assert other.bodies(15) == [b"%d" % number for number in range(19) if number % 5]


@every_version
def test_a_wrong_selector(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.connection.subscribe(f"/topic/{name}", id="1", headers={"selector": "ward BETWEEN 1 OR 5"})
        found = one.error()
        assert "column 16: 'OR' can't stand here" in found.headers["message"]
        assert found.headers["code"] == "selector"
