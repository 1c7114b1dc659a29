"""`pybroker.statistics`: what is counted where a queue's messages are on their way between memory, store and spool."""

from __future__ import annotations

from pybroker.statistics import queue_statistics
from tests.core.bench import Bench


def test_the_bytes_of_a_queue_are_whole_while_a_page_is_read():
    b = Bench(window_messages_max=2)
    for number in range(8):
        b.send("/queue/a", b"%d" % number * 100, durable=False)
    b.settle()
    consumer = b.subscribe("/queue/a", prefetch=2)
    while b.queue("/queue/a").page is None:
        b.ack(consumer, b.bodies(consumer)[-1])
        b.driver.commit()
    acknowledged = 8 - queue_statistics(b.queue("/queue/a")).depth
    for _ in range(10):
        b.send("/queue/a", b"9" * 100, durable=False)
    queue = b.queue("/queue/a")
    assert queue.page is not None
    assert queue.page.added, "some came while a page is read"
    assert queue_statistics(queue).bytes == 100 * (18 - acknowledged)
