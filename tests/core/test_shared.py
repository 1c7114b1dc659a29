"""Bodies that durable subscriptions share: the count of references."""

from __future__ import annotations

from pybroker.core.shared import SharedBodies
from pybroker.message import Message
from pybroker.operations import DELETE_BODY, PUT_BODY, SET_REFERENCES
from tests.core.bench import Bench
from tests.core.promises import leftovers


def test_the_count_goes_down_to_the_deletion():
    bodies = SharedBodies()
    body = bodies.create(7, 3)
    assert bodies.release(body) == (SET_REFERENCES, 7, 2)
    assert bodies.release(body) == (SET_REFERENCES, 7, 1)
    assert bodies.release(body) == (DELETE_BODY, 7)


def test_a_body_that_nobody_holds_is_forgotten():
    bodies = SharedBodies()
    body = bodies.create(7, 2)
    bodies.hold(body)
    bodies.hold(body)
    bodies.let_go(body)
    assert len(bodies) == 1
    bodies.let_go(body)
    assert len(bodies) == 0
    assert bodies.loaded_from_store(7, 1).references == 1


def test_what_memory_knows_goes_before_what_was_read():
    bodies = SharedBodies()
    body = bodies.create(7, 3)
    bodies.hold(body)
    bodies.release(body)
    assert bodies.loaded_from_store(7, 3) is body
    assert body.references == 2


def test_a_count_is_kept_until_all_reads_under_way_have_ended():
    bodies = SharedBodies()
    body = bodies.create(7, 3)
    bodies.hold(body)
    bodies.read_began()
    bodies.read_began()
    bodies.release(body)
    bodies.let_go(body)
    bodies.read_ended()
    again = bodies.loaded_from_store(7, 3)  # that read began before the release
    assert again.references == 2
    bodies.hold(again)
    bodies.read_ended()
    assert len(bodies) == 1
    bodies.let_go(again)
    assert len(bodies) == 0


def test_a_topic_message_is_stored_once_and_its_body_goes_with_the_last_acknowledgement():
    bench = Bench()
    consumers = [bench.subscribe("/topic/t", durable_name=str(n), client_id="c") for n in range(3)]
    bench.settle()
    bench.core.send(Message("/topic/t", b"1"))
    assert sum(operation[0] == PUT_BODY for operation in bench.core.operations) == 1
    bench.end()
    bench.settle()
    for consumer in consumers:
        assert bench.seen(consumer) == [(b"1", 0)]
        assert leftovers(bench.driver.store)
        bench.ack(consumer, b"1")
        bench.settle()
    assert leftovers(bench.driver.store) == []
    assert bench.core.memory_bytes == 0


def test_a_message_for_one_durable_subscription_is_stored_in_it():
    bench = Bench()
    bench.subscribe("/topic/t", durable_name="s", client_id="c")
    bench.subscribe("/topic/t")
    bench.settle()
    bench.send("/topic/t", b"1")
    assert len(bench.core.shared) == 0


def test_the_count_is_right_after_a_crash_between_two_acknowledgements():
    bench = Bench()
    for name in ("one", "two"):
        bench.subscribe("/topic/t", durable_name=name, client_id="c")
    bench.send("/topic/t", b"1")
    bench.settle()
    first = next(iter(bench.core.connections)).consumers
    bench.ack(next(iter(first)), b"1")
    bench.settle()
    bench.crash()
    second = bench.subscribe("/topic/t", durable_name="two", client_id="c")
    bench.settle()
    assert bench.seen(second) == [(b"1", 1)]
    bench.ack(second, b"1")
    bench.settle()
    assert leftovers(bench.driver.store) == []
