"""Consumers of several queues as stomp.py asks for them."""

from __future__ import annotations

import pytest

from tests.stomp.programs import VERSIONS, program
from tests.support.serving import ServedBroker

every_version = pytest.mark.parametrize("version", VERSIONS)


@every_version
def test_a_pattern_and_a_composite(broker: ServedBroker, name: str, version: str):
    first, second = f"/queue/{name}.one", f"/queue/{name}.two"
    with program(broker.port, version) as one:
        one.send(first, b"1")
        one.subscribe(f"/queue/{name}.*", ack="client")
        one.send(second, b"2")
        frames = [one.receive(), one.receive()]
        assert [(frame.headers["destination"], frame.headers["subscription"]) for frame in frames] == [
            (first, "1"),
            (second, "1"),
        ]
        one.ack(frames[-1])  # for both, of whichever queue
        one.unsubscribe()
        one.subscribe(f"{first},{second}", id="2")
        one.send(f"{first},{second}", b"3")
        assert one.bodies(2) == [b"3", b"3"]
        one.disconnect()
