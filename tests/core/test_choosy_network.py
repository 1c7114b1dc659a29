"""Selective consumers and groups in a network: what nobody here takes goes on, and what has to stay is looked at again in time."""

from __future__ import annotations

import pytest

from pybroker.config import DeliveryPolicy, Limits, NetworkConfig
from pybroker.consumer_options import ConsumerOptions
from pybroker.core.broker import Core
from pybroker.core.consumer import INDIVIDUAL, Consumer
from pybroker.core.invariants import check_invariants
from pybroker.core.queue import Queue
from pybroker.message import Message, Route

Q = "/queue/q"


class Story:
    """A broker with a plain consumer and a selective one, and a link to ``there``, which wants the messages of the queue."""

    def __init__(self, window: int = 100) -> None:
        self.core = Core(
            Limits(window_messages_max=window),
            DeliveryPolicy(),
            first_id=1,
            id_prefix="x",
            now=1,
            network=NetworkConfig(hops_max=4),
            network_name="here",
            life="life",
        )
        self.link = self.core.links.up("there", None)
        self.core.links.hear(self.link, True, [(Q, False, "there", ("there",))], [])
        self.client = self.core.connect(None)
        self.plain = self.consume()
        self.picky = self.consume("ward = 2")

    def consume(self, selector: str = "") -> Consumer:
        options = ConsumerOptions(selector)
        consumer = self.core.subscribe(self.client, Q, INDIVIDUAL, prefetch=1, options=options)
        self.core.start(consumer)
        return consumer

    def receive(self, *passed: str, count: int = 2) -> Queue:
        """Messages come over the link that were at those brokers; the plain consumer gets the first one."""
        for number in range(1, count + 1):
            message = Message(Q, b"%d" % number, durable=False, message_id=b"%d" % number, route=Route(passed))
            self.core.links.receive(self.link, "n", number, message)
        check_invariants(self.core)
        queue = self.core.by_destination[Q]
        assert (queue.choosing is not None, len(queue.window), queue.counts.forwarded) == (True, count - 1, 0)
        return queue

    def unsubscribe(self, consumer: Consumer) -> None:
        self.core.unsubscribe(consumer)
        check_invariants(self.core)


def test_what_had_to_stay_for_a_plain_consumer_goes_back_when_he_has_left() -> None:
    story = Story()
    queue = story.receive("there")
    story.unsubscribe(story.plain)
    assert (queue.depth, queue.counts.forwarded) == (0, 2)


def test_what_had_to_stay_for_a_plain_consumer_goes_back_from_the_store_too() -> None:
    story = Story(window=2)
    queue = story.receive("there", count=2)
    queue.choosing.shrink(0, 0)  # type: ignore[union-attr]
    assert not queue.window
    story.unsubscribe(story.plain)
    assert queue.page is not None


@pytest.mark.parametrize("leaving", ["plain", "picky"])
def test_what_is_at_the_hop_limit_stays_for_whoever_comes(leaving: str) -> None:
    story = Story()
    queue = story.receive("a", "b", "c", "there")
    story.unsubscribe(getattr(story, leaving))
    assert (queue.depth, queue.counts.forwarded) == (2, 0)
    consumer = story.consume()
    check_invariants(story.core)
    assert len(consumer.unacked) == 1
