"""Composites, virtual topics and message keys as stomp.py asks for them."""

from __future__ import annotations

import pytest

from tests.stomp.programs import VERSIONS, program
from tests.support.serving import ServedBroker

every_version = pytest.mark.parametrize("version", VERSIONS)


@every_version
def test_a_composite_and_a_virtual_topic(broker: ServedBroker, name: str, version: str):
    queue, topic = f"/queue/{name}", f"VirtualTopic.{name}"
    collecting = f"/queue/Consumer.one.{topic}"
    with program(broker.port, version) as one:
        one.subscribe(queue)
        one.subscribe(collecting, id="2")
        one.send(f"{queue},topic://{topic}", b"1")
        assert one.bodies(2) == [b"1", b"1"]
        one.disconnect()


@every_version
def test_a_key_that_was_seen(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        for body in (b"1", b"2"):
            one.send(f"/queue/{name}", body, **{"message-key": "k"})
        one.send(f"/queue/{name}", b"3", **{"message-key": "another"})
        one.subscribe(f"/queue/{name}")
        assert one.bodies(2) == [b"1", b"3"]
        one.disconnect()
