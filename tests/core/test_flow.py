"""Room: when the broker is full, why it says so, and how it makes room without losing or reordering anything."""

from __future__ import annotations

import pytest

from pybroker.core.entry import ENTRY_BYTES
from pybroker.errors import LimitExceeded
from pybroker.message import Message
from tests.core.bench import Bench


def why(bench: Bench, to: str = "/queue/a") -> str:
    error = bench.core.full(Message(to, b""))
    bench.end()
    return "" if error is None else str(error)


@pytest.mark.parametrize("durable", [True, False])
def test_a_full_memory_is_made_room_in_by_leaving_windows_to_the_disk(durable: bool):
    bench = Bench(memory_bytes_max=20 * (ENTRY_BYTES + 3))
    bodies = [b"%03d" % number for number in range(60)]
    for body in bodies:
        assert why(bench) == ""
        bench.send("/queue/a", body, durable=durable)
        assert bench.core.memory_bytes <= 21 * (ENTRY_BYTES + 3)
    bench.settle()
    assert (bench.core.spooled > 0) == (not durable)
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert bench.bodies(consumer) == bodies


def test_memory_that_consumers_hold_can_not_be_made_room_in_and_the_answer_names_the_limit():
    bench = Bench(memory_bytes_max=5 * ENTRY_BYTES)
    consumer = bench.subscribe("/queue/a")
    bench.send("/queue/a", *(b"%d" % number for number in range(6)))
    bench.settle()
    assert "limits.memory_bytes_max" in why(bench)
    bench.core.freed = False
    bench.ack(consumer, b"0")
    bench.ack(consumer, b"1")
    assert bench.core.freed
    assert why(bench) == ""


def test_making_room_goes_round_the_queues_and_keeps_each_ones_first():
    bench = Bench(memory_bytes_max=20 * ENTRY_BYTES)
    for name in "abc":
        bench.send(f"/queue/{name}", *(b"%d" % number for number in range(8)))
    assert why(bench) == ""
    assert bench.core.memory_bytes <= 18 * ENTRY_BYTES
    assert all(len(queue.window) >= 1 for queue in bench.core.queues.values())
    bench.settle()
    for name in "abc":
        consumer = bench.subscribe(f"/queue/{name}")
        bench.settle()
        assert bench.bodies(consumer) == [b"%d" % number for number in range(8)]


@pytest.mark.parametrize("durable", [True, False])
def test_a_full_store_is_said_until_something_is_consumed(durable: bool):
    bench = Bench(store_bytes_max=10, window_messages_max=1)
    bench.send("/queue/a", *(b"%d" % number for number in range(13)), durable=durable)
    bench.settle()
    assert "limits.store_bytes_max" in why(bench)
    consumer = bench.subscribe("/queue/a", prefetch=1)
    for number in range(7):
        bench.settle()
        bench.ack(consumer, b"%d" % number)
    assert why(bench) == ""


def test_a_full_queue_holds_up_only_its_own_producers():
    bench = Bench(queue_messages_max=2)
    bench.send("/queue/a", b"1", b"2")
    assert "limits.queue_messages_max" in why(bench)
    assert why(bench, "/queue/b") == ""
    consumer = bench.subscribe("/queue/a")
    bench.settle()
    assert "limits.queue_messages_max" in why(bench)  # what is out is in the queue
    bench.ack(consumer, b"1")
    assert why(bench) == ""


def test_a_full_disk_is_said_as_the_caller_found_it():
    bench = Bench()
    bench.core.disk_full = "the disk has 1 byte left"
    assert why(bench) == "the disk has 1 byte left"
    bench.core.disk_full = ""
    assert why(bench) == ""


def test_a_stalled_consumer_costs_its_window_and_no_more():
    bench = Bench(window_messages_max=4)
    stalled = bench.subscribe("/queue/a", "auto", prefetch=3)
    bench.send("/queue/a", *(b"%d" % number for number in range(200)))
    bench.settle()
    assert len(stalled.unacked) == 3
    assert bench.core.memory_bytes <= (3 + 4) * (ENTRY_BYTES + 3)


def test_destinations_and_subscriptions_are_bounded():
    bench = Bench(destinations_max=2, subscriptions_max=1)
    connection = bench.connect()
    bench.subscribe("/queue/a", on=connection)
    with pytest.raises(LimitExceeded, match="subscriptions_max"):
        bench.subscribe("/queue/a", on=connection)
    bench.send("/queue/b", b"1")
    with pytest.raises(LimitExceeded, match="destinations_max"):
        bench.send("/queue/c", b"1")


def test_a_dead_letter_finds_its_queue_though_there_are_too_many():
    bench = Bench(deliveries_max=1, destinations_max=1)
    consumer = bench.subscribe("/queue/a")
    bench.send("/queue/a", b"1")
    bench.settle()
    bench.nack(consumer, b"1")
    bench.settle()
    assert bench.queue("/queue/DLQ").depth == 1
