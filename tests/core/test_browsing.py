"""Looking into queues and moving messages: pages beside consumers, producers, expiry, and crashes."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from pybroker.core import queue as queue_module
from pybroker.core.browsing import BrowsePage, BrowseRequest, Cursor, browse_loaded
from pybroker.errors import InvalidDestination
from pybroker.message import Message
from pybroker.operations import SEQUENCE_MASK, StoredEntry
from tests.core.bench import Bench
from tests.core.promises import leftovers

SMALL = {"window_messages_max": 4, "window_bytes_max": 90, "browse_messages_max": 3, "browse_bytes_max": 60}


def browse_all(bench: Bench, to: str, **options: Any) -> list[BrowsePage]:
    """All pages of a queue, read while nothing else happens."""
    pages: list[BrowsePage] = []
    cursor: Cursor | None = None
    while True:
        page = bench.core.browse(to, None, cursor=cursor, **options)
        bench.end()
        bench.settle()
        pages.append(page)
        cursor = page.cursor
        if cursor is None:
            return pages


def shown(pages: list[BrowsePage]) -> list[bytes]:
    return [each.message.body for page in pages for each in page.messages]


def in_order(bench: Bench, to: str) -> list[bytes]:
    return shown(browse_all(bench, to))


@pytest.mark.parametrize("durable", [True, False])
def test_a_deep_queue_is_shown_in_the_order_of_delivery_page_by_page(durable: bool):
    bench = Bench(**SMALL)
    bodies = [b"%d" % number for number in range(20)]
    bench.send("/queue/a", *bodies, durable=durable)
    bench.send("/queue/a", b"low", durable=durable, priority=1)
    bench.send("/queue/a", b"high", durable=durable, priority=8)
    pages = browse_all(bench, "/queue/a")
    assert shown(pages) == [b"high", *bodies, b"low"]
    assert max(len(page.messages) for page in pages) == 3
    assert bench.queue("/queue/a").depth == 22


def test_a_page_of_both_kinds_is_no_larger_than_one_of_either_but_has_one_message():
    bench = Bench(**{**SMALL, "browse_messages_max": 10})
    for number in range(6):
        bench.send("/queue/a", b"%d" % number * 25, durable=number % 2 == 0)
    bench.send("/queue/a", b"L" * 200, durable=False)
    bench.send("/queue/a", b"l" * 200)
    bench.settle()
    pages = browse_all(bench, "/queue/a")
    assert [[len(each.message.body) for each in page.messages] for page in pages] == [[25, 25]] * 3 + [[200], [200]]


@pytest.mark.parametrize("limit", [0, 1])
def test_what_can_not_be_read_is_counted_once_on_the_page_that_passes_it(limit: int):
    """`limit`: the page ends in front of its second message; or else its bound is there."""
    bench = Bench(**SMALL)
    bench.send("/queue/a", b"0", b"1", b"2", b"3")
    bench.settle()
    bench.core.browse("/queue/a", None, limit=limit)
    (request,) = [each for each in bench.core.held if isinstance(each, BrowseRequest)]
    first, unread, second, beyond = [StoredEntry(entry.order, entry.message) for entry in request.queue.window]
    came_later = (first.order & ~SEQUENCE_MASK) - SEQUENCE_MASK - 1 + request.cursor.stop  # on a level before
    orders = [came_later, unread.order, beyond.order]
    browse_loaded(bench.core, request, [first, second], [], None if limit else second.order, orders)
    assert request.page.unread == 1
    assert request.page.cursor is not None
    assert request.page.cursor.position == second.order


def test_what_is_out_is_shown_as_outstanding_and_nothing_is_delivered_or_marked_by_a_browser():
    bench = Bench(**SMALL)
    consumer = bench.subscribe("/queue/a", prefetch=2)
    bench.send("/queue/a", b"1", b"2", b"3", b"4")
    bench.settle()
    pages = browse_all(bench, "/queue/a")
    found = [(each.message.body, each.outstanding, each.deliveries) for page in pages for each in page.messages]
    assert found == [(b"1", True, 0), (b"2", True, 0), (b"3", False, 0), (b"4", False, 0)]
    bench.nack(consumer, b"1")
    bench.settle()
    bench.crash()
    after = bench.subscribe("/queue/a")
    bench.settle()
    assert [body for body, _ in bench.seen(after)] == [b"1", b"2", b"3", b"4"]
    assert [deliveries for _, deliveries in bench.seen(after)][2:] == [0, 0]


def test_what_is_not_committed_is_not_shown():
    bench = Bench()
    page = bench.core.browse("/queue/a", None)  # before the queue is there: it is empty
    bench.end()
    bench.send("/queue/a", b"1")
    assert bench.driver.writing is None
    page = bench.core.browse("/queue/a", None)
    bench.end()
    while bench.driver.step_read():
        pass
    assert page.messages == []
    assert page not in bench.eye.confirmations
    bench.settle()
    assert shown([page]) == [b"1"]
    assert page in bench.eye.confirmations


def test_a_browser_ends_though_a_producer_is_faster():
    bench = Bench(**SMALL)
    bench.send("/queue/a", b"1", b"2", b"3", b"4")
    cursor, bodies = None, []
    for number in range(10):
        page = bench.core.browse("/queue/a", None, cursor=cursor)
        bench.end()
        bench.send("/queue/a", *[b"later %d" % number] * 10)
        bench.settle()
        bodies += shown([page])
        cursor = page.cursor
        if cursor is None:
            break
    assert bodies == [b"1", b"2", b"3", b"4"]
    assert cursor is None


def test_a_limit_and_a_selector():
    bench = Bench(**SMALL)
    bench.send("/queue/a", *[b"%d" % number for number in range(20)])
    odd = lambda message: int(message.body) % 2 == 1  # noqa: E731
    assert len(shown(browse_all(bench, "/queue/a", matches=odd))) == 10
    page = bench.core.browse("/queue/a", None, matches=odd, limit=1)
    bench.end()
    bench.settle()
    assert shown([page]) == [b"1"]
    assert page.cursor is not None


@pytest.mark.parametrize("to", ["/topic/a", "/queue/a.*", "nonsense"])
def test_only_one_queue_can_be_looked_into(to: str):
    with pytest.raises(InvalidDestination):
        Bench().core.browse(to, None)


@pytest.mark.parametrize("durable", [True, False])
def test_a_purge_leaves_what_a_consumer_has_and_says_how_much(durable: bool):
    bench = Bench(**SMALL)
    consumer = bench.subscribe("/queue/a", prefetch=2)
    bench.send("/queue/a", *[b"%d" % number for number in range(20)], durable=durable)
    bench.settle()
    pages = browse_all(bench, "/queue/a", moving=bench.core.moving("/queue/a", None))
    assert sum(page.moved for page in pages) == 18
    assert sum(page.outstanding for page in pages) == 2
    assert bench.queue("/queue/a").counts.removed == 18
    bench.ack(consumer, b"0")
    bench.ack(consumer, b"1")
    bench.settle()
    assert bench.queue("/queue/a").depth == 0
    assert leftovers(bench.driver.store) == []
    assert (bench.core.memory_bytes, bench.core.spooled, bench.core.stored_bytes) == (0, 0, 0)


def test_a_move_keeps_id_headers_body_priority_and_expiry():
    bench = Bench()
    far = bench.driver.now + 1_000_000
    bench.core.send(Message("/queue/a", b"body", b"k:v\n", True, 7, far, b"my-id"))
    bench.end()
    browse_all(bench, "/queue/a", moving=bench.core.moving("/queue/a", "/queue/b"))
    bench.crash()
    (moved,) = [each.message for page in browse_all(bench, "/queue/b") for each in page.messages]
    assert (moved.destination, moved.body, moved.header_block) == ("/queue/b", b"body", b"k:v\n")
    assert (moved.durable, moved.priority, moved.expires, moved.message_id) == (True, 7, far, b"my-id")
    assert moved.timestamp == 1_000_000
    assert in_order(bench, "/queue/a") == []


def test_a_move_is_in_one_batch():
    bench = Bench()
    bench.send("/queue/a", b"1", b"2")
    bench.settle()
    bench.core.browse("/queue/a", None, moving=bench.core.moving("/queue/a", "/queue/b"))
    bench.end()
    while not bench.driver.batch.changes:
        assert bench.driver.step_read() or bench.driver.step_commit()
    bench.crash()  # before the batch: nothing has happened
    assert in_order(bench, "/queue/a") == [b"1", b"2"]
    assert in_order(bench, "/queue/b") == []


def test_a_copy_leaves_the_original():
    bench = Bench(**SMALL)
    bodies = [b"%d" % number for number in range(9)]
    bench.send("/queue/a", *bodies)
    browse_all(bench, "/queue/a", moving=bench.core.moving("/queue/a", "/queue/b", keep=True))
    assert in_order(bench, "/queue/a") == bodies
    assert in_order(bench, "/queue/b") == bodies


def test_a_move_stops_where_its_target_is_full():
    bench = Bench(queue_messages_max=3)
    bench.send("/queue/b", b"there")
    bench.send("/queue/a", b"1", b"2", b"3")
    page = bench.core.browse("/queue/a", None, moving=bench.core.moving("/queue/a", "/queue/b"))
    bench.end()
    bench.settle()
    assert page.moved == 2
    assert page.refused is not None
    assert page.cursor is not None
    assert in_order(bench, "/queue/a") == [b"3"]


def test_a_queue_is_not_moved_into_itself():
    bench = Bench()
    with pytest.raises(InvalidDestination, match="itself"):
        bench.core.moving("/queue/a", "/queue/a")


@pytest.mark.parametrize("durable", [True, False])
def test_what_was_consumed_while_a_page_was_read_is_not_moved_though_it_was_behind_the_window(durable: bool):
    """Planted once by leaving out `removals`: the message came out of the target a second time."""
    bench = Bench(window_messages_max=2)
    bench.send("/queue/a", b"1", b"2", b"3", b"4", durable=durable)
    bench.queue("/queue/a").shrink(1, 0)
    bench.end()
    bench.settle()
    page = bench.core.browse("/queue/a", None, moving=bench.core.moving("/queue/a", "/queue/b"))
    bench.end()
    bench.driver.commit()
    bench.driver.step_read()
    bench.driver.step_read()  # the page is read, and not handed over
    read = bench.driver.reads.popleft()
    consumer = bench.subscribe("/queue/a", prefetch=4)
    bench.settle()
    bench.ack(consumer, b"3")
    bench.settle()
    bench.leave(consumer)
    bench.queue("/queue/a").shrink(1, 0)  # 1 stays in memory: 3 would be behind the window, if it were there
    bench.end()
    bench.driver.reads.appendleft(read)
    bench.settle()
    assert page.moved == 3
    assert in_order(bench, "/queue/b") == [b"1", b"2", b"4"]
    assert in_order(bench, "/queue/a") == []


@pytest.mark.parametrize("shrunk", [True, False])
def test_what_virtual_topics_share_is_shown_moved_and_purged_and_its_body_goes_with_the_last(shrunk: bool):
    bench = Bench(**SMALL)
    first, second = "/queue/Consumer.A.VirtualTopic.t", "/queue/Consumer.B.VirtualTopic.t"
    for to in (first, second):
        bench.leave(bench.subscribe(to))
    bodies = [b"%d" % number for number in range(10)]
    bench.send("/topic/VirtualTopic.t", *bodies)
    if shrunk:
        for to in (first, second):
            bench.queue(to).shrink(1, 0)
        bench.end()
    bench.settle()
    pages = browse_all(bench, first)
    assert shown(pages) == bodies
    assert {each.message.destination for page in pages for each in page.messages} == {first}
    browse_all(bench, first, moving=bench.core.moving(first, "/queue/a"))
    assert in_order(bench, "/queue/a") == bodies
    browse_all(bench, second, moving=bench.core.moving(second, None))
    bench.crash()
    assert in_order(bench, "/queue/a") == bodies
    browse_all(bench, "/queue/a", moving=bench.core.moving("/queue/a", None))
    assert leftovers(bench.driver.store) == []
    assert len(bench.core.shared) == 0


def test_what_a_choosy_queue_has_passed_over_is_purged_too():
    """What nobody takes is left to the store below the place to which the queue was read."""
    bench = Bench(**SMALL)
    consumer = bench.subscribe("/queue/a", prefetch=1)
    for number in range(20):
        bench.core.send(Message("/queue/a", b"%d" % number, b"JMSXGroupID:g\n"))
    bench.end()
    bench.settle()
    other = bench.subscribe("/queue/a", prefetch=5)  # gets nothing: the group has an owner
    bench.settle()
    assert bench.bodies(other) == []
    pages = browse_all(bench, "/queue/a", moving=bench.core.moving("/queue/a", None))
    assert (sum(page.moved for page in pages), sum(page.outstanding for page in pages)) == (19, 1)
    bench.ack(consumer, b"0")
    bench.settle()
    assert bench.queue("/queue/a").depth == 0
    assert leftovers(bench.driver.store) == []


class BrowsingMachine(RuleBasedStateMachine):
    """Two queues with producers, consumers, browsers and movers, and a crash at any step.

    At the end each message that was confirmed was acknowledged, or is in one place. A browser shows, once, whatever was in its
    queue from before its first page until after its last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = patch.object(queue_module, "HEAD_EVERY", 2)
        self.patch.start()
        self.bench = Bench(deliveries_max=0, **SMALL)
        self.number = 0
        self.consumers: list[Any] = []
        self.pages: list[BrowsePage] = []  # of the browser under way
        self.before: set[bytes] = set()
        self.gone: set[bytes] = set()  # acknowledged, or moved from /queue/a, since the browser began
        self.mover: BrowsePage | None = None
        self.acked: Counter[bytes] = Counter()
        self.sent: set[bytes] = set()  # durable and committed

    def driver_queues(self) -> dict[str, set[bytes]]:
        found: dict[str, set[bytes]] = {}
        with self.bench.driver.backend.snapshot():
            for to in ("/queue/a", "/queue/b"):
                queue = self.bench.queue(to)
                rows = self.bench.driver.store.read_page(queue.queue_id, 0, 10_000, 1 << 24).entries
                found[to] = {row.message.body for row in rows}
                assert len(rows) == len(found[to])
        self.bench.end()
        return found

    @rule(count=st.integers(1, 8), durable=st.booleans(), priority=st.sampled_from((4, 4, 4, 0, 9)))
    def send(self, count: int, durable: bool, priority: int) -> None:
        for _ in range(count):
            self.number += 1
            body = b"%c%d" % (b"d" if durable else b"t", self.number)
            self.bench.core.send(Message("/queue/a", body, durable=durable, priority=priority))
        self.bench.end()

    @rule(prefetch=st.integers(1, 5), to=st.sampled_from(("/queue/a", "/queue/a", "/queue/b")))
    @precondition(lambda self: len(self.consumers) < 2)
    def consume(self, prefetch: int, to: str) -> None:
        self.consumers.append(self.bench.subscribe(to, prefetch=prefetch))

    @rule(number=st.integers(0, 9), ack=st.booleans())
    @precondition(lambda self: any(self.visible()))
    def settle_one(self, number: int, ack: bool) -> None:
        choices = self.visible()
        consumer, entry = choices[number % len(choices)]
        if ack:
            self.acked[entry.message.body] += 1
            self.gone.add(entry.message.body)
            self.bench.core.acknowledge(consumer, entry.tag)
        else:
            self.bench.core.reject(consumer, entry.tag)
        self.bench.end()

    def visible(self) -> list[Any]:
        return [(each, entry) for each in self.consumers for entry in each.unacked.values() if entry.state == 2]

    @rule()
    @precondition(lambda self: self.consumers)
    def leave(self) -> None:
        self.bench.leave(self.consumers.pop(0))

    @rule(to=st.sampled_from(("/queue/a", "/queue/b")))
    def shrink(self, to: str) -> None:
        self.bench.queue(to).shrink(1, 0)
        self.bench.end()

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.bench.driver.step_commit()
        self.bench.end()

    @rule(count=st.integers(1, 3))
    def step_read(self, count: int) -> None:
        for _ in range(count):
            self.bench.driver.step_read()
        self.bench.end()

    @rule()
    def browse(self) -> None:
        """Ask for the next page, once the last one is there; at the end look at what was shown."""
        core = self.bench.core
        if self.mover is not None and self.mover not in self.confirmed():
            return
        if not self.pages:
            queue = self.bench.queue("/queue/a")
            self.gone = set()
            ready = [entry.message.body for entry in (*queue.window, *queue.outstanding.values())]
            self.before = set(ready)  # what is behind the window is looked at by `driver_queues` at rest only
            self.pages = [core.browse("/queue/a", None)]
        elif self.pages[-1] in self.confirmed():
            if self.pages[-1].cursor is not None:
                self.pages.append(core.browse("/queue/a", None, cursor=self.pages[-1].cursor))
            else:
                bodies = shown(self.pages)
                assert len(bodies) == len(set(bodies)), bodies
                assert self.before - self.gone <= set(bodies), (self.before, self.gone, bodies)
                self.pages = []
        self.bench.end()

    def confirmed(self) -> list[BrowsePage]:
        return [token for token in self.bench.eye.confirmations if isinstance(token, BrowsePage)]

    @rule(limit=st.sampled_from((0, 0, 1, 2)), even=st.booleans())
    def move(self, limit: int, even: bool) -> None:
        core = self.bench.core
        if self.mover is None or self.mover in self.confirmed():
            cursor = self.mover.cursor if self.mover is not None else None
            matches = (lambda message: int(message.body[1:]) % 2 == 0) if even else None
            self.pages = []  # what is moved from under a browser may be shown, or not
            moving = core.moving("/queue/a", "/queue/b")
            self.mover = core.browse("/queue/a", None, cursor=cursor, matches=matches, limit=limit, moving=moving)
        self.bench.end()

    @rule()
    def come_to_rest(self) -> None:
        self.bench.settle()
        places = self.driver_queues()
        self.bench.settle()
        everywhere = Counter([body for bodies in places.values() for body in bodies])
        assert not [body for body, count in everywhere.items() if count > 1], places
        assert not set(everywhere) & set(self.acked), "acknowledged, and still there"
        self.sent |= set(everywhere)
        missing = self.sent - set(everywhere) - set(self.acked)
        assert not missing, missing
        assert all(count == 1 for count in self.acked.values()), self.acked

    @rule()
    def crash(self) -> None:
        self.come_to_rest()
        driver = self.bench.driver
        moving = self.bench.core.moving("/queue/a", "/queue/b")
        self.bench.core.browse("/queue/a", None, moving=moving)
        self.bench.end()
        while driver.step_read() or (not driver.batch.work and driver.step_commit()):
            if driver.batch.work:
                break
        driver.step_commit()
        self.bench.crash()
        self.consumers.clear()
        self.pages, self.mover = [], None
        self.come_to_rest()

    def teardown(self) -> None:
        try:
            self.come_to_rest()
            for consumer in self.consumers:
                self.bench.leave(consumer)
            for to in ("/queue/a", "/queue/b"):
                browse_all(self.bench, to, moving=self.bench.core.moving(to, None))
            core = self.bench.core
            sums = (core.memory_bytes, core.stored_bytes, core.spooled_bytes, core.spooled)
            assert sums == (0, 0, 0, 0), sums
            assert leftovers(self.bench.driver.store) == []
        finally:
            self.patch.stop()


def test_browsers_and_movers_beside_everything_else():
    run_state_machine_as_test(
        BrowsingMachine,
        settings=settings(
            max_examples=40,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
