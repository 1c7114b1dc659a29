"""stomp.py with message groups, exclusive consumers and consumer priority, by ActiveMQ's headers."""

from __future__ import annotations

from tests.stomp.programs import Program, program
from tests.support.serving import ServedBroker

ONE_BY_ONE = "client-individual"


def receive(one: Program, count: int) -> list[bytes]:
    messages = [one.receive() for _ in range(count)]
    for message in messages:
        one.ack(message)
    return [message.body for message in messages]


def test_groups_keep_their_order_move_and_are_closed(broker: ServedBroker, name: str):
    queue = f"/queue/{name}"
    with program(broker.port) as sender, program(broker.port) as right:
        with program(broker.port) as left:
            left.subscribe(queue, ack=ONE_BY_ONE)
            sender.send(queue, "anna 0", JMSXGroupID="anna")
            assert receive(left, 1) == [b"anna 0"]
            right.subscribe(queue, ack=ONE_BY_ONE, **{"activemq.priority": "1"})
            for number in range(3):
                sender.send(queue, f"bert {number}", JMSXGroupID="bert")
                sender.send(queue, f"anna {number + 1}", JMSXGroupID="anna")
            assert receive(right, 3) == [b"bert 0", b"bert 1", b"bert 2"]
            assert receive(left, 2) == [b"anna 1", b"anna 2"]
            sender.send(queue, "cora 0", JMSXGroupID="cora")
            assert receive(right, 1) == [b"cora 0"]
        moved = right.receive()  # the third one of Anna's was with the one that has gone
        assert (moved.body, moved.headers["redelivered"]) == (b"anna 3", "true")
        right.ack(moved)
        with program(broker.port) as preferred:
            preferred.subscribe(queue, ack=ONE_BY_ONE, **{"activemq.priority": "2"})
            sender.send(queue, "anna 4", JMSXGroupID="anna", JMSXGroupSeq="-1")
            assert receive(right, 1) == [b"anna 4"]
            sender.send(queue, "anna 5", JMSXGroupID="anna")
            assert receive(preferred, 1) == [b"anna 5"]


def test_a_standby_takes_over_from_an_exclusive_consumer(broker: ServedBroker, name: str):
    queue = f"/queue/{name}"
    with program(broker.port) as standby, program(broker.port) as owner:
        owner.subscribe(queue, ack=ONE_BY_ONE, **{"activemq.exclusive": "true"})
        standby.subscribe(queue, ack=ONE_BY_ONE, **{"activemq.exclusive": "true"})
        for number in range(3):
            standby.send(queue, str(number))
        assert receive(owner, 2) == [b"0", b"1"]
        assert standby.inbox.messages.empty()
        owner.cut()
        assert receive(standby, 1) == [b"2"]
        standby.send(queue, "3")
        assert receive(standby, 1) == [b"3"]


def test_the_higher_priority_is_filled_first(broker: ServedBroker, name: str):
    queue = f"/queue/{name}"
    with program(broker.port) as low, program(broker.port) as high:
        low.subscribe(queue, ack=ONE_BY_ONE, **{"activemq.priority": "-1"})
        high.subscribe(queue, ack=ONE_BY_ONE, **{"activemq.prefetchSize": "2"})
        for number in range(4):
            high.send(queue, str(number))
        assert low.bodies(2) == [b"2", b"3"]
        assert receive(high, 2) == [b"0", b"1"]
