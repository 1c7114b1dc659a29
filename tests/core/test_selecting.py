"""Selectors of topic subscriptions: who gets what, what is kept through a crash, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from pybroker.consumer_options import ConsumerOptions
from pybroker.core.consumer import INDIVIDUAL, Consumer
from pybroker.errors import InvalidSelector, SubscriptionError
from pybroker.message import Message, encode_headers
from pybroker.selectors.compiled import Selector
from tests.core.bench import Bench
from tests.core.promises import leftovers

OWNER = {"client_id": "c", "durable_name": "s"}


def subscribe(bench: Bench, selector: str, to: str = "/topic/t", **options: Any) -> Consumer:
    return bench.subscribe(to, options=ConsumerOptions(selector), **options)


def publish(bench: Bench, *bodies: bytes, headers: dict[str, str], to: str = "/topic/t", **fields: Any) -> None:
    bench.send(to, *bodies, header_block=encode_headers(headers), **fields)


def test_a_subscriber_gets_only_what_its_selector_is_true_for() -> None:
    bench = Bench()
    ward, everything = subscribe(bench, "ward = 3"), subscribe(bench, "")
    urgent = subscribe(bench, "JMSPriority > 4", "/topic/>")
    publish(bench, b"3", headers={"ward": "3"})
    publish(bench, b"4", headers={"ward": "4"}, priority=9)
    publish(bench, b"none", headers={})
    bench.settle()
    assert bench.bodies(ward) == [b"3"]
    assert sorted(bench.bodies(everything)) == [b"3", b"4", b"none"]
    assert bench.bodies(urgent) == [b"4"]


def test_a_durable_subscription_collects_by_its_selector_through_a_crash() -> None:
    bench = Bench()
    bench.leave(subscribe(bench, "ward = 3", **OWNER))
    publish(bench, b"before", headers={"ward": "3"})
    publish(bench, b"other", headers={"ward": "4"})
    bench.settle()
    bench.crash()
    publish(bench, b"after", headers={"ward": "3"})
    publish(bench, b"other", headers={"ward": "4"})
    bench.settle()
    bench.crash()
    consumer = subscribe(bench, "ward = 3", **OWNER)
    bench.settle()
    assert bench.bodies(consumer) == [b"before", b"after"]


@pytest.mark.parametrize("asked", ["", "ward = 4", "ward=3"])
def test_a_durable_subscription_keeps_its_selector_until_it_is_removed(asked: str) -> None:
    bench = Bench()
    bench.leave(subscribe(bench, "ward = 3", **OWNER))
    bench.settle()
    bench.crash()
    publish(bench, b"3", headers={"ward": "3"})
    with pytest.raises(SubscriptionError, match=r"has the selector 'ward = 3'.*unsubscribe it first"):
        subscribe(bench, asked, **OWNER)
    bench.core.remove_subscription("c", "s")
    bench.end()
    consumer = subscribe(bench, asked, **OWNER)
    publish(bench, b"4", headers={"ward": "4"})
    bench.settle()
    assert bench.bodies(consumer) == ([] if asked == "ward=3" else [b"4"])


def test_a_body_is_shared_by_those_who_are_chosen() -> None:
    """The count of references is theirs: with a larger one the body would stay for ever, with a smaller one it would be lost."""
    bench = Bench()
    consumers = []
    for number in range(4):
        name = f"s{number}"
        consumers.append(subscribe(bench, f"to >= {number}", client_id="c", durable_name=name, prefetch=1))
    for to in ("0", "1", "3"):
        publish(bench, to.encode(), headers={"to": to})
    bench.settle()
    for number, consumer in enumerate(consumers):
        for body in [b"0", b"1", b"3"]:
            if int(body) >= number:
                bench.ack(consumer, body)
                bench.settle()
    assert leftovers(bench.driver.store) == []


def test_a_wrong_selector_makes_no_subscription() -> None:
    bench = Bench()
    with pytest.raises(InvalidSelector, match="column 8: the selector ends"):
        subscribe(bench, "ward = ", **OWNER)
    with pytest.raises(InvalidSelector, match="selector_bytes_max is 2048"):
        subscribe(bench, "a = '" + "x" * 2_048 + "'", **OWNER)
    assert not bench.core.subscriptions
    assert not bench.core.queues


def test_ten_thousand_equalities_cost_the_evaluation_of_those_that_can_be_true(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(subscriptions_max=20_000)
    core, connection = bench.core, bench.connect()
    consumers = []
    for number in range(10_000):
        options = ConsumerOptions(f"id = '{number}' AND ward > 2")
        consumers.append(core.subscribe(connection, "/topic/t", INDIVIDUAL, options=options))
        core.start(consumers[-1])
    evaluated = []
    matches = Selector.matches.__get__  # the field of the tuple

    class Counted:
        def __get__(self, selector: Selector, owner: type) -> Any:
            evaluated.append(selector.text)
            return matches(selector, owner)

    monkeypatch.setattr(Selector, "matches", Counted())
    for number in ("7", "9999", "none"):
        core.send(Message("/topic/t", number.encode(), encode_headers({"id": number, "ward": "3"})))
    bench.end()
    assert evaluated == ["id = '7' AND ward > 2", "id = '9999' AND ward > 2"]
    assert (bench.bodies(consumers[7]), bench.bodies(consumers[9999])) == ([b"7"], [b"9999"])
    assert len(bench.eye.deliveries) == 2


def test_a_wrong_selector_makes_no_queue_and_no_consumer() -> None:
    bench = Bench()
    with pytest.raises(InvalidSelector, match="column 9"):
        subscribe(bench, "ward = (", "/queue/q")
    assert not bench.core.queues
