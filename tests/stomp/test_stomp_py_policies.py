"""stomp.py and destination policies: a delayed redelivery, the dead letters of one queue, and their way back by command."""

from __future__ import annotations

from pathlib import Path

from tests.stomp.programs import program
from tests.support.serving import call_pybroker, served

CONFIG = """
[[policy]]
match = "/queue/ward.>"
deliveries_max = 2
redelivery_delay = 0.2
dead_letter_queue = "/queue/DLQ.{name}"
[[policy]]
match = "/queue/small"
messages_max = 1
full_policy = "refuse"
"""


def test_a_delay_a_dead_letter_queue_of_its_own_and_the_way_back(directory: Path):
    (directory / "b.toml").write_text(CONFIG)
    with served(directory / "data", directory / "b.toml") as broker, program(broker.port) as one:
        one.send("/queue/ward.3", "referral", patient="7")
        one.subscribe("/queue/ward.3", ack="client-individual", **{"activemq.prefetchSize": "1"})
        one.nack(one.receive())
        one.send("/queue/ward.3", "another")
        other = one.receive()
        assert other.body == b"another"  # it doesn't wait for the one in front of it
        one.ack(other)
        again = one.receive()
        assert (again.body, again.headers["redelivered"]) == (b"referral", "true")
        one.nack(again)
        one.unsubscribe()
        one.subscribe("/queue/DLQ.ward.3", ack="client-individual", id="2")
        letter = one.receive()
        assert (letter.body, letter.headers["patient"]) == (b"referral", "7")
        names = ("origin", "reason", "deliveries")
        assert [letter.headers[f"dead-letter-{name}"] for name in names] == ["/queue/ward.3", "deliveries", "2"]
        one.unsubscribe(id="2")
        done = call_pybroker("dlq", "retry", "--origin", "/queue/ward.>", "--data", directory / "data")
        assert done.stdout == b"1 dead letters sent back\n", done.stderr
        one.subscribe("/queue/ward.3", ack="client-individual", id="3")
        back = one.receive()
        assert (back.body, back.headers["redelivered"]) == (b"referral", "false")
        assert "dead-letter-origin" not in back.headers
        one.ack(back)


def test_a_full_queue_refuses_by_its_policy(directory: Path):
    (directory / "b.toml").write_text(CONFIG)
    with served(directory / "data", directory / "b.toml") as broker, program(broker.port) as one:
        one.send("/queue/small", "1")
        with program(broker.port) as other:
            other.connection.send("/queue/small", "2")
            assert "messages_max is 1" in str(other.error().headers["message"])
