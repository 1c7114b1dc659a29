"""Idempotent sends: a key seen within the window is stored once, through restarts; what is remembered is bounded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pybroker.core.message_keys import record_of
from pybroker.errors import InvalidDestination
from pybroker.message import Message
from tests.core.bench import Bench

Q = "/queue/q"


def send(bench: Bench, key: str, to: str = Q, **options: Any) -> None:
    bench.send(to, b"x", header_block=f"message-key:{key}\n".encode(), **options)


def depth(bench: Bench, name: str = Q) -> int:
    queue = bench.core.by_destination.get(name)
    return queue.depth if queue is not None else 0


def test_a_repeat_is_not_stored_also_after_a_restart():
    bench = Bench()
    send(bench, "a")
    bench.settle()
    bench.crash()
    send(bench, "a")
    send(bench, "b")
    assert depth(bench) == 2
    assert bench.core.duplicates == 1


def test_what_was_not_committed_is_not_a_repeat():
    bench = Bench()
    send(bench, "a")
    bench.crash()
    send(bench, "a")
    bench.settle()
    assert depth(bench) == 1


def test_a_durable_send_is_no_repeat_of_one_that_is_not_stored():
    """It would be confirmed as durable, and be gone after a crash."""
    bench = Bench()
    send(bench, "a", durable=False)
    send(bench, "a", durable=True)
    send(bench, "a", durable=True)
    send(bench, "a", durable=False)
    assert depth(bench) == 2
    bench.settle()
    bench.crash()
    assert depth(bench) == 1
    send(bench, "a", durable=True)
    assert depth(bench) == 1


def test_a_key_is_one_of_its_destination():
    bench = Bench()
    for to in (Q, "/queue/r", f"{Q},r", f"{Q},r"):
        send(bench, "a", to)
    assert (depth(bench), depth(bench, "/queue/r")) == (2, 2)


def test_the_window_by_policy():
    bench = Bench(
        policy=({"match": "/queue/q", "message_key_window": 5}, {"match": "/queue/off", "message_key_window": 0})
    )
    send(bench, "a")
    bench.wait(4_999)
    send(bench, "a")
    assert depth(bench) == 1, "a repeat does not make the window longer"
    bench.wait(1)
    send(bench, "a")
    assert depth(bench) == 2
    send(bench, "a", "/queue/off")
    send(bench, "a", "/queue/off")
    assert depth(bench, "/queue/off") == 2


def test_a_refused_send_leaves_no_key():
    bench = Bench()
    with pytest.raises(InvalidDestination):
        bench.core.send(Message("/queue/a.*", b"", b"message-key:a\n"))
    assert len(bench.core.message_keys) == 0


def test_a_repeat_needs_no_room():
    """Who is not sure and sends once more would be told that it is refused, and it is stored."""
    bench = Bench(policy=({"match": Q, "messages_max": 1, "full_policy": "refuse"},))

    def full(key: str, *, durable: bool = True, sent: bool = True) -> bool:
        message = Message(Q, b"x", f"message-key:{key}\n".encode(), durable)
        return bench.core.full(message, sent=sent) is not None

    assert not full("a")
    send(bench, "a", durable=False)
    assert full("b")
    assert full("a")  # it would be stored
    assert not full("a", durable=False)
    bench.core.disk_full = "the disk is full"
    assert not full("a", durable=False)
    assert full("a", durable=False, sent=False)  # what is moved, or comes over a link, is stored whatever its key is
    bench.core.disk_full = ""
    bench.wait(3_600_000)
    assert full("a", durable=False)


@pytest.mark.parametrize("dead_letters", [False, True])
def test_what_has_expired_when_it_comes_leaves_no_key(dead_letters: bool):
    bench = Bench(policy=({"match": "/queue/>", "dead_letter_expired": dead_letters},))
    send(bench, "a", expires=bench.core.now - 1)
    send(bench, "a", f"{Q},r", expires=bench.core.now)
    assert len(bench.core.message_keys) == 0
    send(bench, "a", expires=bench.core.now + 1)
    send(bench, "a", f"{Q},r")
    assert (depth(bench), depth(bench, "/queue/r"), bench.core.duplicates) == (2, 1, 0)


def test_a_topic_s_key_counts_whether_anybody_subscribes_or_not():
    bench = Bench()
    send(bench, "a", "/topic/t")
    bench.settle()
    bench.crash()
    late = bench.subscribe("/topic/t")
    send(bench, "a", "/topic/t")
    send(bench, "b", "/topic/t")
    bench.settle()
    assert len(bench.seen(late)) == 1


def test_keys_that_were_pushed_out_take_no_room():
    bench = Bench(message_keys_max=10)
    keys = bench.core.message_keys
    for number in range(2_000):
        bench.core.send(Message(Q, b"", b"message-key:%d\n" % number))
        assert len(keys._due) <= 2 * len(keys) + 64
    bench.end()
    assert len(keys) == 10
    bench.driver.now += 3_600_000
    bench.core.sweep()
    assert (len(keys), len(keys._due)) == (0, 0)


def test_in_a_transaction_each_once():
    bench = Bench()
    connection = bench.connect()
    bench.core.begin(connection, "t")
    for _ in range(2):
        bench.core.send_later(connection, Message(Q, b"x", b"message-key:a\n"), "t")
    assert depth(bench) == 0
    bench.core.commit(connection, "t")
    bench.end()
    bench.settle()
    bench.crash()
    send(bench, "a")
    assert depth(bench) == 1


def test_a_scheduled_message_is_kept_once_and_sent_when_it_is_due():
    bench = Bench()
    block = b"AMQ_SCHEDULED_DELAY:1000\nmessage-key:a\n"
    for _ in range(2):
        bench.core.send(Message(Q, b"x", block))
        bench.end()
    bench.settle()
    assert depth(bench) == 0
    bench.driver.now += 1_000
    bench.core.schedules.release(10)
    bench.end()
    bench.settle()
    assert depth(bench) == 1


class Keys(RuleBasedStateMachine):
    """Against a dictionary of what the store holds, and what is still to be written."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(policy=({"match": "/queue/q", "message_key_window": 10},), message_keys_max=3)
        self.known: dict[str, int] = {}
        self.count = 0
        self.saved: tuple[dict[str, int], int] = ({}, 0)

    @rule(key=st.sampled_from("abcdef"))
    def send(self, key: str) -> None:
        now = self.bench.core.now
        if self.known.get(key, -1) <= now:
            self.count += 1
            self.known = {each: until for each, until in self.known.items() if until > now}
            self.known.pop(key, None)
            while len(self.known) >= 3:
                del self.known[next(iter(self.known))]
            self.known[key] = now + 10_000
        send(self.bench, key)

    @rule()
    def settle(self) -> None:
        self.bench.settle()
        self.saved = dict(self.known), self.count

    @rule(milliseconds=st.sampled_from((1, 3_000, 10_000)))
    def wait(self, milliseconds: int) -> None:
        self.bench.wait(milliseconds)
        self.bench.core.sweep()
        self.bench.end()

    @rule()
    def crash(self) -> None:
        self.bench.driver.settle()
        self.saved = dict(self.known), self.count
        self.bench.crash()
        known, self.count = self.saved
        # Which of those of one time came first is not stored.
        self.known = dict(sorted(known.items(), key=lambda item: (item[1], record_of(Q, item[0]))))

    @invariant()
    def stored_once(self) -> None:
        assert depth(self.bench) == self.count
        assert len(self.bench.core.message_keys) <= 3


TestKeys = Keys.TestCase
TestKeys.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
