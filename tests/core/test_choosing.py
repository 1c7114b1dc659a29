"""Who of a queue's consumers gets what when not everyone may take everything, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest

from pybroker.consumer_options import ConsumerOptions
from pybroker.core import choosing as choosing_module
from pybroker.core import loading
from pybroker.core.consumer import Consumer
from pybroker.core.groups import BUCKETS, NAME_MAX, closes, group_of
from pybroker.core.loading import from_store
from pybroker.message import Message, encode_headers
from tests.core.bench import Bench

QUEUE = "/queue/q"


def subscribe(bench: Bench, selector: str = "", exclusive: bool = False, priority: int = 0, **more: Any) -> Consumer:
    return bench.subscribe(QUEUE, options=ConsumerOptions(selector, exclusive, priority), **more)


def send(bench: Bench, *bodies: bytes, durable: bool = True, **headers: str) -> None:
    bench.send(QUEUE, *bodies, header_block=encode_headers(headers), durable=durable)


def numbers(first: int, last: int) -> list[bytes]:
    return [b"%d" % number for number in range(first, last)]


# ---- selectors


@pytest.mark.parametrize("durable", [True, False])
def test_a_page_full_of_strangers_starves_nobody(durable: bool) -> None:
    """ActiveMQ's weakness: when maxPageSize messages at the head match no consumer, what is behind them is never dispatched."""
    bench = Bench(window_messages_max=8)
    send(bench, *numbers(0, 500), durable=durable, ward="1")
    send(bench, b"for ward 2", durable=durable, ward="2")
    bench.settle()
    second = subscribe(bench, "ward = 2")
    bench.settle()
    assert bench.bodies(second) == [b"for ward 2"]
    first = subscribe(bench, "ward = 1", prefetch=500)
    bench.settle()
    assert bench.seen(first) == [(body, 0) for body in numbers(0, 500)]  # in order, and none counts as delivered before
    assert len(bench.queue(QUEUE).window) <= 8


def test_what_a_slow_consumer_wants_waits_for_it_while_others_go_on() -> None:
    bench = Bench(window_messages_max=8)
    slow = subscribe(bench, "ward = 1", prefetch=1)
    quick = subscribe(bench, "ward = 2", prefetch=1_000)
    for number in range(100):
        send(bench, b"%d" % number, ward=str(number % 2 + 1))
    bench.settle()
    assert bench.bodies(quick) == numbers(0, 100)[1::2]
    for number in range(0, 100, 2):
        assert bench.bodies(slow)[-1] == b"%d" % number
        bench.ack(slow, b"%d" % number)
        bench.settle()
    assert bench.bodies(slow) == numbers(0, 100)[::2]


def test_who_is_paused_gets_nothing_though_all_had_come_equally_far_and_another_joins() -> None:
    bench = Bench()
    first, second = subscribe(bench, "ward = 1"), subscribe(bench, "ward = 2")
    send(bench, b"a", ward="1")
    bench.settle()
    bench.core.pause(first.connection)
    third = subscribe(bench, "ward = 1")  # as many may be given something as before
    send(bench, b"b", ward="1")
    bench.settle()
    assert (bench.bodies(first), bench.bodies(second), bench.bodies(third)) == ([b"a"], [], [b"b"])


def test_what_was_passed_over_is_not_redelivered_after_a_crash() -> None:
    bench = Bench(window_messages_max=8)
    second = subscribe(bench, "ward = 2")
    for number in range(40):
        send(bench, b"%d" % number, ward=str(number % 2 + 1))
    bench.settle()
    assert len(bench.bodies(second)) == 20
    bench.crash()
    everything = subscribe(bench)
    bench.settle()
    assert bench.seen(everything) == [(b"%d" % number, number % 2) for number in range(40)]


def test_a_returned_message_goes_to_another_one_that_it_is_for() -> None:
    bench = Bench(window_messages_max=8)
    one, other = subscribe(bench, "ward = 1"), subscribe(bench, "ward <= 2")
    for number in range(30):
        send(bench, b"%d" % number, ward=str(number % 2 + 1))
    bench.settle()
    lost = sorted(bench.bodies(one))
    assert lost
    assert len(lost) + len(bench.bodies(other)) == 30
    bench.leave(one)
    bench.settle()
    assert sorted(body for body, deliveries in bench.seen(other) if deliveries) == lost


def test_each_consumer_is_asked_once_about_each_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a queue of many selective consumers costs messages times consumers at most, however small their prefetch."""
    bench = Bench()
    consumers = [subscribe(bench, f"ward = {number}", prefetch=1) for number in range(20)]
    asked = 0

    for place in bench.queue(QUEUE).choosing._places.values():  # type: ignore[union-attr]

        def counting(message: Message, matches: Any = place.matches) -> bool:
            nonlocal asked
            asked += 1
            return bool(matches(message))

        place.matches = counting
    for number in range(1_000):
        send(bench, b"%d" % number, ward=str(number % 20))
    bench.settle()
    for number in range(1_000):
        bench.ack(consumers[number % 20], b"%d" % number)
        bench.settle()
    assert bench.queue(QUEUE).depth == 0
    assert asked <= 20 * 1_000


def test_of_many_selectors_only_those_that_may_be_true_are_asked() -> None:
    bench = Bench()
    on = bench.connect()
    consumers = [subscribe(bench, f"ward = {number}", on=on, prefetch=100) for number in range(100)]
    some = subscribe(bench, "ward > 97", on=on, prefetch=100)
    late = subscribe(bench, "ward = 7 AND bed = 2", on=on, priority=5, prefetch=100)
    asked = 0
    for place in bench.queue(QUEUE).choosing._places.values():  # type: ignore[union-attr]

        def counting(message: Message, matches: Any = place.matches) -> bool:
            nonlocal asked
            asked += 1
            return bool(matches(message))

        place.matches = counting
    for number in (3, 99, 7, 3, 7, 1_000, 42):
        send(bench, b"%d" % number, ward=str(number), bed="1")
    send(bench, b"bed", ward="7", bed="2")
    bench.settle()
    assert [len(bench.bodies(consumers[number])) for number in (3, 7, 42, 99)] == [2, 2, 1, 1]
    assert (bench.bodies(some), bench.bodies(late)) == ([b"1000"], [b"bed"])
    assert asked <= 3 * 8


def test_an_idle_consumer_does_not_make_others_read_the_queue_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read from the store for a deep queue is a few times its depth, whoever else stands by."""
    depth = 400
    read = 0

    def counting(*row: Any) -> Any:
        nonlocal read
        read += 1
        return from_store(*row)

    monkeypatch.setattr(loading, "from_store", counting)
    bench = Bench(window_messages_max=16)
    send(bench, *numbers(0, depth), ward="1")
    bench.settle()
    slow = subscribe(bench, "ward = 1", prefetch=1)
    subscribe(bench, "ward = 2", prefetch=10)
    subscribe(bench, "ward = 3", prefetch=10)
    bench.settle()
    for body in numbers(0, depth):
        assert bench.bodies(slow)[-1] == body
        bench.ack(slow, body)
        bench.driver.settle()
    assert bench.queue(QUEUE).depth == 0
    assert read <= 4 * depth


# ---- message groups


def test_a_group_stays_with_its_consumer_and_moves_when_he_leaves() -> None:
    bench = Bench()
    consumers = [subscribe(bench) for _ in range(3)]
    for number in range(60):
        send(bench, b"%d" % number, JMSXGroupID=f"patient {number % 6}")
    bench.settle()
    had = [{int(body) % 6 for body in bench.bodies(consumer)} for consumer in consumers]
    assert sorted(map(len, had)) == [2, 2, 2]  # the one with the fewest groups gets a new one
    assert set.union(*had) == set(range(6))
    bench.leave(consumers[0])
    send(bench, b"last", JMSXGroupID=f"patient {min(had[0])}")
    bench.settle()
    seen = [bench.seen(consumer) for consumer in consumers[1:]]
    taken = [each for each in seen if (b"last", 0) in each]
    assert len(taken) == 1
    mine = [(body, deliveries) for body, deliveries in taken[0] if body == b"last" or int(body) % 6 == min(had[0])]
    assert [body for body, _ in mine] == [b"%d" % number for number in range(min(had[0]), 60, 6)] + [b"last"]
    assert all(deliveries == 1 for body, deliveries in mine if body != b"last")


def test_a_closing_message_goes_to_the_owner_and_frees_the_group() -> None:
    bench = Bench()
    first, second = subscribe(bench, prefetch=2), subscribe(bench, prefetch=10)
    send(bench, b"1", JMSXGroupID="g")
    send(bench, b"other", JMSXGroupID="h")
    send(bench, b"end", JMSXGroupID="g", JMSXGroupSeq="-1")
    send(bench, b"again", JMSXGroupID="g")
    bench.settle()
    assert bench.bodies(first) == [b"1", b"end"]
    assert bench.bodies(second) == [b"other", b"again"]


def test_a_delivery_reads_its_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counting(message: Message) -> bytes:
        read.append(message.body)
        return group_of(message)

    monkeypatch.setattr(choosing_module, "group_of", counting)
    bench = Bench()
    for _ in range(3):
        subscribe(bench, prefetch=100)
    for number in range(20):
        send(bench, b"%d" % number, JMSXGroupID=f"g{number % 4}")
    assert read == numbers(0, 20)


def test_a_group_waits_for_its_owner_while_others_are_served() -> None:
    bench = Bench()
    owner = subscribe(bench, prefetch=1)
    send(bench, b"1", b"2", b"3", JMSXGroupID="g")
    other = subscribe(bench)
    send(bench, b"4", JMSXGroupID="h")
    send(bench, b"no group")
    bench.settle()
    assert bench.bodies(owner) == [b"1"]
    assert bench.bodies(other) == [b"4", b"no group"]
    for body in (b"1", b"2"):
        bench.ack(owner, body)
        bench.settle()
    assert bench.bodies(owner) == [b"1", b"2", b"3"]


def test_a_million_groups_cost_bounded_memory() -> None:
    bench = Bench(groups_max=1_000)
    consumers = [subscribe(bench) for _ in range(4)]
    send(bench, b"first", JMSXGroupID="first")
    choosing = bench.queue(QUEUE).choosing
    assert choosing is not None
    owners: dict[bytes, Consumer] = {}
    for number in range(1_000_000):
        name = b"%d" % number
        if choosing.groups.owner(name) is None:
            choosing.groups.bind(name, consumers[number % 4])
        if not number % 100_000:
            owners[name] = choosing.groups.owner(name)  # type: ignore[assignment]
    assert len(choosing.groups) <= 1_000 + BUCKETS
    assert all(choosing.groups.owner(name) is owner for name, owner in owners.items())
    assert sum(map(choosing.groups.count, consumers)) == len(choosing.groups)
    for consumer in consumers:
        bench.leave(consumer)
    assert bench.core.group_names == 0
    assert bench.queue(QUEUE).choosing is None


def test_a_group_of_a_bucket_stays_in_order_and_is_not_closed_for_the_others() -> None:
    bench = Bench(groups_max=0)
    for _ in range(3):
        subscribe(bench)
    for number in range(90):
        send(bench, b"%d" % number, JMSXGroupID=f"g{number % 30}", **({"JMSXGroupSeq": "-1"} if number == 31 else {}))
    by_group: dict[int, list[tuple[Consumer, int]]] = {}
    for consumer, _, _, body in bench.eye.deliveries:
        by_group.setdefault(int(body) % 30, []).append((consumer, int(body)))
    bench.settle()
    for consumer, _, _, body in bench.eye.deliveries:
        by_group.setdefault(int(body) % 30, []).append((consumer, int(body)))
    for seen in by_group.values():
        assert len({consumer for consumer, _ in seen}) == 1


def test_reading_of_group_headers() -> None:
    def message(**headers: str) -> Message:
        return Message(QUEUE, b"", encode_headers(headers))

    assert group_of(message(a="1", JMSXGroupID="x:y")) == b"x\\cy"
    assert group_of(message(XJMSXGroupID="x")) == b""
    assert group_of(message(a="JMSXGroupID")) == b""
    assert group_of(Message(QUEUE, b"", b"JMSXGroupID:first\nJMSXGroupID:second\n")) == b"first"
    long = group_of(message(JMSXGroupID="x" * 100_000))
    assert 0 < len(long) <= NAME_MAX
    assert long != group_of(message(JMSXGroupID="x" * 99_999))
    assert [closes(message(JMSXGroupSeq=text)) for text in ("-1", " -1", "1", "0", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_when_the_last_group_is_closed_the_queue_is_one_like_others() -> None:
    bench = Bench()
    first, second = subscribe(bench, prefetch=10), subscribe(bench, prefetch=10)
    send(bench, b"1", JMSXGroupID="g")
    assert bench.queue(QUEUE).choosing is not None
    send(bench, b"end", JMSXGroupID="g", JMSXGroupSeq="-1")
    assert bench.queue(QUEUE).choosing is None
    send(bench, b"2", b"3")
    send(bench, b"4", JMSXGroupID="g")
    send(bench, b"5", JMSXGroupID="g")
    bench.settle()
    seen = [set(bench.bodies(consumer)) for consumer in (first, second)]
    assert all(len(each & {b"2", b"3"}) == 1 for each in seen)
    assert any({b"4", b"5"} <= each for each in seen)


# ---- exclusive consumers and priority


def test_one_exclusive_consumer_gets_everything_and_the_next_takes_over_at_once() -> None:
    bench = Bench()
    plain = subscribe(bench)
    first, second = subscribe(bench, exclusive=True), subscribe(bench, exclusive=True)
    send(bench, *numbers(0, 4))
    bench.settle()
    assert (bench.bodies(plain), bench.bodies(first), bench.bodies(second)) == ([], numbers(0, 4), [])
    bench.leave(first)
    bench.settle()
    assert bench.seen(second) == [(body, 1) for body in numbers(0, 4)]
    bench.leave(second)
    bench.settle()
    assert bench.seen(plain) == [(body, 2) for body in numbers(0, 4)]
    assert bench.queue(QUEUE).choosing is None


def test_of_exclusive_consumers_the_one_with_the_highest_priority_owns() -> None:
    bench = Bench()
    low = subscribe(bench, exclusive=True)
    send(bench, b"0")
    high = subscribe(bench, exclusive=True, priority=5)
    send(bench, b"1")
    bench.settle()
    assert (bench.bodies(low), bench.bodies(high)) == ([b"0"], [b"1"])


def test_a_higher_priority_is_served_first_while_it_has_credit() -> None:
    bench = Bench()
    low, high = subscribe(bench, priority=-1), subscribe(bench, priority=10, prefetch=2)
    send(bench, *numbers(0, 4))
    bench.settle()
    assert (bench.bodies(high), bench.bodies(low)) == (numbers(0, 2), numbers(2, 4))
    bench.ack(high, b"0")
    send(bench, b"4", b"5")
    bench.settle()
    assert (bench.bodies(high), bench.bodies(low)) == ([b"0", b"1", b"4"], [b"2", b"3", b"5"])


def test_a_send_asks_no_more_than_the_first_of_many_who_stand_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a message costs does not grow with the consumers that are able and have seen everything: ranks are kept."""
    bench = Bench(subscriptions_max=500)
    on = bench.connect()
    consumers = [subscribe(bench, priority=number % 2, on=on, prefetch=4) for number in range(300)]
    send(bench, b"first")
    ranked = 0

    def counting(place: choosing_module.Place) -> tuple[int, int]:
        nonlocal ranked
        ranked += 1
        return -place.priority, place.turn

    monkeypatch.setattr(choosing_module, "_rank", counting)
    send(bench, *numbers(0, 299))
    bench.settle()
    assert ranked <= 299 * 40
    counts = [len(bench.bodies(consumer)) for consumer in consumers]
    assert (counts[::2], counts[1::2]) == ([0] * 150, [2] * 150)


def test_what_cannot_be_read_does_not_stop_a_queue_for_good() -> None:
    """A header block that is none, from code that made one by hand."""
    bench = Bench()
    consumer = subscribe(bench, "ward = 1")
    core = bench.core
    with pytest.raises(UnicodeDecodeError):
        core.send(Message(QUEUE, b"bad", b"a:\xff\n"))
    choosing = bench.driver.core.queue(consumer.queue.destination).choosing
    assert choosing is not None
    assert not choosing._busy
