"""Bad values of the store, with other copies to ask and without: what is delivered, what is counted, what is written."""

from __future__ import annotations

import pytest

from pybroker.core.consumer import Consumer
from pybroker.core.invariants import check_invariants
from pybroker.core.queue import Queue
from pybroker.operations import PUT_VALUE, order_of
from pybroker.store import format as fmt
from tests.core.bench import Bench
from tests.core.promises import leftovers

DIGITS = [b"%d" % number for number in range(10)]


def place(sequence: int) -> int:
    return order_of(4, sequence)


def spoil(bench: Bench, key: bytes) -> bytes:
    """One bit of a value flips on the disk; the whole value, as another copy has it."""
    value = bench.driver.backend.get(key)
    assert value is not None
    bad = bytearray(value)
    bad[-5] ^= 4
    bench.driver.backend.write([(key, bytes(bad))], True)
    return value


def filled(window: int = 2) -> tuple[Bench, Queue]:
    """Ten messages in a queue, the window holds the first ones."""
    bench = Bench(window_messages_max=window)
    bench.driver.peers = {}
    bench.send("/queue/a", *DIGITS)
    bench.driver.settle()
    return bench, bench.queue("/queue/a")


def consume(bench: Bench, consumer: Consumer) -> None:
    bench.driver.settle()
    while consumer.unacked:
        bench.ack(consumer, next(iter(consumer.unacked.values())).message.body)
        bench.driver.settle()
    check_invariants(bench.driver.core)


def check_clean(bench: Bench) -> None:
    """Nothing is left, and nothing is wrong."""
    bench.settle()
    assert leftovers(bench.driver.store) == []
    assert (bench.core.stored_bytes, bench.core.memory_bytes, len(bench.core.shared)) == (0, 0, 0)
    assert all(queue.depth == 0 for queue in bench.core.queues.values())


def test_a_bad_message_is_mended_and_delivered_once_in_its_place():
    bench, queue = filled()
    key = fmt.message_key(queue.queue_id, place(5))
    bench.driver.peers = {key: spoil(bench, key)}
    consumer = bench.subscribe("/queue/a", prefetch=3)
    consume(bench, consumer)
    assert bench.bodies(consumer) == DIGITS
    assert queue.counts.corrupt == 0
    check_clean(bench)


def test_a_value_that_was_mended_is_written_before_its_message_is_shown():
    bench, queue = filled()
    key = fmt.message_key(queue.queue_id, place(5))
    whole = bench.driver.peers[key] = spoil(bench, key)
    consumer = bench.subscribe("/queue/a", prefetch=100)
    while b"5" not in bench.bodies(consumer):
        assert bench.driver.step_commit() or bench.driver.step_read()
    assert bench.driver.backend.get(key) == whole
    bench.crash()
    bench.driver.peers = None
    consume(bench, bench.subscribe("/queue/a"))
    check_clean(bench)


def test_what_no_copy_has_whole_is_not_delivered_and_stays_counted_over_lives():
    bench, queue = filled()
    key = fmt.message_key(queue.queue_id, place(5))
    whole = spoil(bench, key)
    for _ in range(3):
        consumer = bench.subscribe("/queue/a", prefetch=3)
        consume(bench, consumer)
        queue = bench.queue("/queue/a")
        assert b"5" not in bench.bodies(consumer)
        assert (queue.count, queue.counts.corrupt, queue.unread) == (1, 1, {place(5)})
        assert queue.head <= place(5)  # or no later life would ever look for it
        bench.send("/queue/a", *[b"more"] * 5_000)  # beyond HEAD_EVERY removals
        consume(bench, consumer)
        assert queue.head <= place(5)
        bench.crash()
    bench.driver.peers = {key: whole}
    consumer = bench.subscribe("/queue/a")
    consume(bench, consumer)
    assert bench.bodies(consumer)[-1] == b"5"
    check_clean(bench)


@pytest.mark.parametrize("tail", [False, True])
def test_what_becomes_whole_later_is_taken_up_in_its_place(tail: bool):
    bench, queue = filled(window=4)
    key = fmt.message_key(queue.queue_id, place(1))
    whole = spoil(bench, key)
    bench.crash()
    queue = bench.queue("/queue/a")
    consumer = bench.subscribe("/queue/a", prefetch=2)
    bench.driver.settle()
    assert bench.bodies(consumer) == [b"0", b"2"]
    if tail:
        consume(bench, consumer)
    bench.core.messages_mended([(queue.queue_id, place(1), (PUT_VALUE, key, whole))])
    bench.end()
    consume(bench, consumer)
    if tail:
        assert bench.bodies(consumer) == [b"0", *DIGITS[2:], b"1"]
    else:
        assert bench.bodies(consumer) == [b"0", b"2", b"1", *DIGITS[3:]]
    assert queue.counts.corrupt == 0
    check_clean(bench)


def test_values_for_messages_that_were_read_or_are_gone_are_not_written():
    bench, queue = filled()
    key = fmt.message_key(queue.queue_id, place(5))
    bench.core.messages_mended(
        [(queue.queue_id, place(5), (PUT_VALUE, key, b"stale")), (99, place(5), (PUT_VALUE, key, b"x"))]
    )
    assert not bench.core.operations


def test_a_bad_value_of_a_message_that_memory_has_is_not_brought_back_after_it_went():
    bench = Bench(window_messages_max=8)
    bench.driver.peers = {}
    consumer = bench.subscribe("/queue/a", prefetch=3)
    bench.core.pause(consumer.connection)
    bench.send("/queue/a", b"1", b"2")
    queue = bench.queue("/queue/a")
    queue.shrink(1, 0)
    bench.core.resume(consumer.connection)
    bench.end()
    bench.driver.settle()
    bench.core.pause(consumer.connection)
    bench.send("/queue/a", b"u", b"v", priority=9)
    queue.shrink(1, 0)
    bench.core.resume(consumer.connection)
    bench.end()
    bench.driver.commit()
    key = fmt.message_key(queue.queue_id, place(1))  # of b"2", which is out
    bench.driver.peers = {key: spoil(bench, key)}
    while bench.driver.reads[0].steps < 2:
        bench.driver.step_read()
    assert bench.driver.reads[0].mended
    bench.ack(consumer, b"2")
    bench.driver.commit()
    assert bench.driver.backend.get(key) is None
    consume(bench, consumer)
    assert bench.bodies(consumer) == [b"1", b"2", b"u", b"v"]
    check_clean(bench)


def test_a_bad_count_of_deliveries_is_mended():
    bench, queue = filled()
    consumer = bench.subscribe("/queue/a", prefetch=1)
    for _ in range(2):
        bench.driver.settle()
        bench.nack(consumer, b"0")
    bench.driver.settle()
    bench.crash()
    queue = bench.queue("/queue/a")
    key = fmt.deliveries_key(queue.queue_id, place(0))
    bench.driver.peers = {key: spoil(bench, key)}
    consumer = bench.subscribe("/queue/a", prefetch=1)
    bench.driver.settle()
    # Its third delivery had begun: with the record it is known to be one too many.
    assert bench.bodies(consumer) == [b"1"]
    assert queue.counts.dead_lettered == 1
    assert queue.counts.corrupt == 0


@pytest.mark.parametrize("which", [fmt.body_key, fmt.references_key])
def test_what_subscriptions_share_is_mended(which):
    bench = Bench(window_messages_max=4)
    bench.driver.peers = {}
    for name in ("s", "t"):
        bench.leave(bench.subscribe("/topic/t", durable_name=name, client_id="c"))
    bench.send("/topic/t", *DIGITS)
    bench.driver.settle()
    bench.crash()
    bodies = [
        fmt.parse_key(key)[1] for key, _ in bench.driver.backend.iterate(bytes((fmt.BODY,)), bytes((fmt.BODY + 1,)))
    ]
    key = which(bodies[3])
    bench.driver.peers = {key: spoil(bench, key)}
    for name in ("s", "t"):
        consumer = bench.subscribe("/topic/t", durable_name=name, client_id="c")
        consume(bench, consumer)
        assert bench.bodies(consumer) == DIGITS
    check_clean(bench)


def test_memory_s_count_of_references_goes_before_another_copy_s():
    bench = Bench(window_messages_max=4)
    bench.driver.peers = {}
    for name in ("r", "s", "t"):
        bench.leave(bench.subscribe("/topic/t", durable_name=name, client_id="c"))
    bench.send("/topic/t", b"1")
    bench.driver.settle()
    bench.crash()
    first, second = (bench.subscribe("/topic/t", durable_name=name, client_id="c") for name in ("r", "s"))
    bench.driver.settle()
    [(key, three)] = bench.driver.backend.iterate(bytes((fmt.REFERENCES,)), bytes((fmt.REFERENCES + 1,)))
    third = bench.subscribe("/topic/t", durable_name="t", client_id="c")
    bench.ack(first, b"1")  # two, in a batch that comes after the request to read
    while not bench.driver.reads:
        bench.driver.step_commit()
    spoil(bench, key)
    bench.driver.peers = {key: three}
    while bench.driver.reads:  # the acknowledgement is in the open batch
        bench.driver.step_read()
    bench.settle()
    assert fmt.decode_number(key, bench.driver.backend.get(key) or b"") == 2
    consume(bench, third)
    consume(bench, second)
    assert bench.bodies(second) == bench.bodies(third) == [b"1"]
    check_clean(bench)
