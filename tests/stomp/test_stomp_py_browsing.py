"""Queue browsers by stomp.py, as ActiveMQ has them."""

from __future__ import annotations

import pytest

from tests.stomp.programs import VERSIONS, program
from tests.support.serving import ServedBroker

every_version = pytest.mark.parametrize("version", VERSIONS)


@every_version
def test_a_browser_shows_everything_and_says_that_this_was_the_end(broker: ServedBroker, name: str, version: str):
    to = f"/queue/{name}"
    with program(broker.port, version) as one:
        for number in range(300):  # more than two pages
            one.send(to, b"%d" % number, kind="odd" if number % 2 else "even")
        one.subscribe(to, id="look", browser="true", selector="kind = 'odd'")
        bodies = []
        while (message := one.receive()).headers.get("browser") != "end":
            bodies.append(int(message.body))
            assert message.headers.get("ack") is None
        assert bodies == list(range(1, 300, 2))
        assert message.headers["destination"] == to
        if version != "1.0":
            assert message.headers["subscription"] == "look"
        one.unsubscribe(id="look")
        row = broker.queue_status(name)
        assert (row["depth"], row["ready"], row["consumers"], row["enqueued"]) == (300, 300, 0, 300)


def test_consumers_get_everything_once_beside_a_browser(broker: ServedBroker, name: str):
    to = f"/queue/{name}"
    with program(broker.port) as one, program(broker.port) as two:
        for number in range(10):
            one.send(to, b"%d" % number)
        two.subscribe(to, id="look", browser="true")
        one.subscribe(to, id="take", ack="auto")
        taken = [one.receive() for _ in range(10)]
        assert [int(message.body) for message in taken] == list(range(10))
        assert {message.headers["redelivered"] for message in taken} == {"false"}


def test_a_topic_can_not_be_browsed(broker: ServedBroker, name: str):
    with program(broker.port) as one:
        one.connection.subscribe(f"/topic/{name}", id="look", headers={"browser": "true"})
        assert "can't be looked into" in one.error().headers["message"]
