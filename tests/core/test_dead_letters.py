"""`pybroker.core.dead_letters` and `retiring`: where dead letters go, what they say, and that none is lost or there twice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.core import dead_letters
from pybroker.core.dead_letters import Death
from pybroker.errors import ConfigurationError
from pybroker.message import Message, encode_headers
from pybroker.policies import Policies
from pybroker.settings import make_config
from tests.core.bench import Bench

DLQ = "/queue/DLQ"


def fail(b: Bench, to: str, body: bytes, deliveries: int = 1, **options: Any) -> None:
    """Send a message, and reject it so often."""
    consumer = b.subscribe(to)
    b.send(to, body, **options)
    b.settle()
    for _ in range(deliveries):
        b.nack(consumer, body)
        b.settle()
    b.leave(consumer)


def letters(b: Bench, name: str = DLQ) -> list[Message]:
    consumer = b.subscribe(name)
    b.settle()
    found = [entry.message for entry in b.entries(consumer)]
    b.leave(consumer)
    b.settle()
    return found


def death(letter: Message) -> Death:
    read = dead_letters.read(letter)
    assert read is not None
    return read[0]


# ---- where they go


def test_a_dead_letter_queue_of_its_own_for_each_destination():
    b = Bench(
        1,
        policy=(
            {"match": "/queue/>", "dead_letter_queue": "/queue/DLQ.{name}"},
            {"match": "/queue/b", "dead_letter_queue": "/queue/B"},
        ),
    )
    for name in ("a.x", "b", "c"):
        fail(b, f"/queue/{name}", name.encode())
    assert [m.body for m in letters(b, "/queue/DLQ.a.x")] == [b"a.x"]
    assert [m.body for m in letters(b, "/queue/B")] == [b"b"]
    assert [m.body for m in letters(b, "/queue/DLQ.c")] == [b"c"]


def test_a_subscriptions_dead_letter_goes_by_its_topics_name_and_says_whose_it_was():
    b = Bench(1, policy=({"match": "/topic/>", "dead_letter_queue": "/queue/DLQ.T.{name}"},))
    consumer = b.subscribe("/topic/t.*", durable_name="s", client_id="c")
    b.send("/topic/t.x", b"1")
    b.settle()
    b.nack(consumer, b"1")
    b.settle()
    (letter,) = letters(b, "/queue/DLQ.T.t.x")
    assert death(letter)[:4] == ("/topic/t.x", "c/s", "deliveries", 1)


@pytest.mark.parametrize(
    ("queue", "transient", "durable", "kept"),
    [("", True, True, 0), (DLQ, False, False, 0), (DLQ, False, True, 1), (DLQ, True, False, 1)],
)
def test_what_a_policy_has_no_dead_letters_for_is_dropped_and_counted(
    queue: str, transient: bool, durable: bool, kept: int
):
    b = Bench(1, policy=({"match": "/queue/a", "dead_letter_queue": queue, "dead_letter_transient": transient},))
    fail(b, "/queue/a", b"1", durable=durable)
    counts = b.queue("/queue/a").counts
    assert (b.queue("/queue/a").depth, counts.dead_lettered, counts.dropped) == (0, kept, 1 - kept)
    assert len(letters(b)) == kept


def test_what_is_rejected_in_a_queue_of_dead_letters_stays_there():
    b = Bench(1, policy=({"match": "/queue/>", "dead_letter_queue": "/queue/DLQ.{name}"},))
    fail(b, "/queue/a", b"1")
    consumer = b.subscribe("/queue/DLQ.a")
    b.settle()
    for _ in range(3):
        b.nack(consumer, b"1")
        b.settle()
    assert b.queue("/queue/DLQ.a").depth == 1
    assert b.core.by_destination.keys() == {"/queue/a", "/queue/DLQ.a"}


@pytest.mark.parametrize("name", ["a" * 1_021, ".".join("a" * 64)])
def test_where_a_queue_of_its_own_can_not_be_dead_letters_go_where_all_others_go(name: str):
    """Any client may choose such a name: nothing is raised, in the middle of a rejection, a disconnection or a start."""
    b = Bench(1, policy=({"match": "/queue/>", "dead_letter_queue": "/queue/DLQ.{name}", "dead_letter_expired": True},))
    to = "/queue/" + name
    fail(b, to, b"rejected")
    b.send(to, b"expired on arrival", expires=b.core.now - 1)
    connection = b.connect()
    b.subscribe(to, on=connection)
    other = b.subscribe("/queue/other", on=connection)
    b.send(to, b"disconnected")
    b.send("/queue/other", b"x")
    b.settle()
    b.disconnect(connection)
    assert not b.queue("/queue/other").outstanding
    assert other not in b.queue("/queue/other").consumers
    b.subscribe(to)
    b.send(to, b"crashed")
    b.settle()
    b.crash()
    b.subscribe(to)
    b.settle()
    assert [m.body for m in letters(b)] == [b"rejected", b"expired on arrival", b"disconnected", b"crashed"]
    assert b.queue(to).depth == 0


@pytest.mark.parametrize(
    "text", ["/topic/x", "/queue/a.*", "/queue/{name}", "DLQ", "/queue/{name}.{name}", "/queue/a..b"]
)
def test_a_dead_letter_queue_that_can_not_be_is_refused(text: str):
    with pytest.raises(ConfigurationError, match=r"policy\[0\]\.dead_letter_queue: expected '', or /queue/NAME"):
        make_config(policy=[{"match": "/queue/a", "dead_letter_queue": text}])


def test_which_queues_are_for_dead_letters():
    config = make_config(policy=[{"match": "/queue/>", "dead_letter_queue": "/queue/x.{name}.y"}])
    policies = Policies(config.policy, config.limits, config.delivery)
    from pybroker.destination import parse_destination

    found = {
        text: policies.is_dead_letter_queue(parse_destination(text))
        for text in ("/queue/x.a.y", "/queue/x.y", "/queue/a", "/queue/ActiveMQ.DLQ", "/topic/x.a.y")
    }
    assert found == {
        "/queue/x.a.y": True,
        "/queue/x.y": False,
        "/queue/a": False,
        "/queue/ActiveMQ.DLQ": True,
        "/topic/x.a.y": False,
    }


# ---- what they say


def test_a_dead_letter_is_the_message_with_what_happened_in_front_of_its_headers():
    b = Bench(2)
    block = encode_headers([("ward", "3"), ("dead-letter-reason", "an app's own")])
    fail(b, "/queue/a", b"1", 2, header_block=block, priority=7, expires=b.driver.now + 99_000)
    (letter,) = letters(b)
    assert (letter.body, letter.priority, letter.durable, letter.expires) == (b"1", 7, True, 0)
    assert letter.message_id.startswith(b"id-1-")
    assert dead_letters.read(letter) == (
        Death("/queue/a", "", "deliveries", 2, b.driver.now, b.driver.now + 99_000),
        block,
    )


texts = st.text(min_size=1, max_size=20)
numbers = st.integers(0, 10**15)


@given(texts, texts, numbers, numbers, st.lists(st.tuples(texts, texts), max_size=3))
def test_what_is_written_is_read(
    subscription: str, reason: str, deliveries: int, expires: int, headers: list[tuple[str, str]]
):
    b = Bench()
    block = encode_headers(headers)
    message = Message("/topic/t", b"x", block, expires=expires)
    letter = dead_letters.letter(b.core, message, b.core.policies.base, reason, deliveries, subscription)
    assert letter is not None
    assert dead_letters.read(letter) == (
        Death("/topic/t", subscription, reason, deliveries, b.driver.now, expires),
        block,
    )


@given(
    st.lists(
        st.tuples(texts | st.sampled_from(["dead-letter-" + name for name in dead_letters.FIELDS]), texts), max_size=4
    )
)
def test_a_message_that_is_no_dead_letter_is_read_as_none_or_as_one_that_says_the_same(headers: list[tuple[str, str]]):
    read = dead_letters.read(Message("/queue/a", b"", encode_headers(headers)))
    assert read is None or ("dead-letter-origin", read[0].origin) in headers


# ---- expired ones


EXPIRED = ({"match": "/queue/a", "dead_letter_expired": True}, {"match": "/topic/>", "dead_letter_expired": True})


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize("window", [1, 100])
def test_expired_messages_are_dead_letters_wherever_they_were(durable: bool, window: int):
    b = Bench(3, policy=EXPIRED, window_messages_max=window)
    bodies = [b"%d" % number for number in range(6)]
    b.send("/queue/a", *bodies, durable=durable, expires=b.driver.now + 100)
    b.send("/queue/b", b"other", durable=durable, expires=b.driver.now + 100)
    b.settle()
    b.wait(100)
    for _ in range(3):
        b.core.sweep()
        b.end()
        b.settle()
    assert (b.queue("/queue/a").depth, b.queue("/queue/b").depth, b.queue("/queue/a").counts.expired) == (0, 0, 6)
    found = letters(b)
    assert sorted(m.body for m in found) == bodies
    assert {death(m)[2:4] for m in found} == {("expired", 0)}


def test_expired_messages_in_the_store_are_read_in_steps_of_bounded_size():
    b = Bench(3, policy=EXPIRED, window_messages_max=1, window_bytes_max=250)
    bodies = [b"%d" % number * 100 for number in range(7)]
    b.send("/queue/a", *bodies, expires=b.driver.now + 100)
    b.settle()
    b.wait(100)
    depths = []
    for _ in range(5):
        b.core.sweep()
        b.end()
        b.settle()
        depths.append(b.queue("/queue/a").depth)
    assert depths == sorted(depths, reverse=True)
    assert depths[0] > 0 == depths[-1]
    assert sorted(m.body for m in letters(b)) == bodies


@pytest.mark.parametrize("steps", range(12))
def test_a_crash_while_messages_expire_neither_loses_nor_doubles_one(steps: int):
    b = Bench(3, policy=EXPIRED, window_messages_max=2)
    bodies = [b"%d" % number for number in range(5)]
    b.send("/queue/a", *bodies, expires=b.driver.now + 100)
    b.settle()
    b.wait(100)
    b.core.sweep()
    b.end()
    for _ in range(steps):
        b.driver.step_commit() or b.driver.step_read()
    b.crash()
    for _ in range(3):
        b.core.sweep()
        b.end()
        b.settle()
    assert sorted(m.body for m in letters(b)) == bodies


def test_subscriptions_that_share_a_body_have_a_dead_letter_each():
    b = Bench(3, policy=EXPIRED, window_messages_max=1)
    for name in ("s", "t"):
        b.leave(b.subscribe("/topic/t", durable_name=name, client_id="c"))
    b.send("/topic/t", b"1", b"2", b"3", expires=b.driver.now + 100)
    b.settle()
    b.wait(100)
    for _ in range(3):
        b.core.sweep()
        b.end()
        b.settle()
    found = [(m.body, death(m).subscription) for m in letters(b)]
    assert sorted(found) == [(body, name) for body in (b"1", b"2", b"3") for name in ("c/s", "c/t")]


@pytest.mark.parametrize("to", ["/queue/a", "/topic/t"])
def test_one_that_has_expired_when_it_comes_is_a_dead_letter(to: str):
    b = Bench(3, policy=EXPIRED)
    assert b.core.send(Message(to, b"late", expires=b.driver.now - 1))
    assert not b.core.send(Message("/queue/b", b"late", expires=b.driver.now - 1))
    b.end()
    b.settle()
    assert [(m.body, death(m).reason) for m in letters(b)] == [(b"late", "expired")]
