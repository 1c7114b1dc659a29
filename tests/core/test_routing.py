"""Where a message goes beside its own destination: all copies or none, through crashes, one for each destination."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.config import DeliveryPolicy, Limits, NetworkConfig
from pybroker.core import routing
from pybroker.core.consumer import AUTO
from pybroker.destination import check_sendable, parse_composite
from pybroker.errors import InvalidDestination, LimitExceeded
from pybroker.message import Message
from pybroker.operations import PUT_BODY
from tests.core.bench import Bench
from tests.core.network import World
from tests.core.network_story import chain
from tests.core.promises import leftovers
from tests.core.test_browsing import browse_all

A, B, C = "/queue/a", "/queue/b", "/queue/c"
X = "VirtualTopic.x"


def depths(bench: Bench) -> dict[str, int]:
    return {name: queue.depth for name, queue in bench.core.by_destination.items() if queue.depth}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/queue/a", ["/queue/a"]),
        ("/queue/a,/queue/b", ["/queue/a", "/queue/b"]),
        ("/queue/a,b", ["/queue/a", "/queue/b"]),
        ("/topic/a,b", ["/topic/a", "/topic/b"]),
        ("/queue/a,/topic/b,c", ["/queue/a", "/topic/b", "/queue/c"]),
        ("/queue/a,topic://b,queue://c", ["/queue/a", "/topic/b", "/queue/c"]),
        (" /queue/a , b ", ["/queue/a", "/queue/b"]),
        ("/queue/a,a,/queue/a", ["/queue/a"]),
    ],
)
def test_the_forms_of_a_composite(text: str, found: list[str]):
    assert [str(each) for each in parse_composite(text)] == found


@pytest.mark.parametrize(
    "text", ["/queue/a,", ",/queue/a", "/queue/a,,b", "a,/queue/b", "/queue/a,/other/b", "/queue/a,b.*"]
)
def test_what_can_not_be_sent_to(text: str):
    with pytest.raises(InvalidDestination):
        check_sendable(text)
    bench = Bench()
    for send in (bench.core.send, bench.core.check):
        with pytest.raises(InvalidDestination):
            send(Message(text, b""))
    assert not bench.core.operations
    assert not bench.core.by_destination


@given(st.text(alphabet="/queatopic:.,*> b\n", max_size=40))
def test_any_text_is_parsed_or_refused(text: str):
    try:
        targets = parse_composite(text)
    except InvalidDestination:
        return
    assert len(set(targets)) == len(targets) >= 1
    assert parse_composite(",".join(map(str, targets))) == targets


def test_a_composite_is_stored_whole_or_not_at_all():
    bench = Bench()
    bench.subscribe("/topic/t", durable_name="s", client_id="c")
    bench.settle()
    bench.core.send(Message(f"{A},b,/topic/t", b"1", message_id=b"mine"))
    bench.end()
    bench.crash()  # before the batch was written
    assert depths(bench) == {}
    bench.send(f"{A},b,/topic/t", b"1", message_id=b"mine")
    bench.settle()
    bench.crash()
    assert depths(bench) == {A: 1, B: 1}
    consumers = [bench.subscribe(A), bench.subscribe(B), bench.subscribe("/topic/t", durable_name="s", client_id="c")]
    bench.settle()
    for consumer, destination in zip(consumers, (A, B, "/topic/t"), strict=True):
        (entry,) = bench.entries(consumer)
        message = entry.message
        assert (message.destination, message.body, message.message_id) == (destination, b"1", b"mine")
        bench.ack(consumer, b"1")
    bench.settle()
    assert leftovers(bench.driver.store) == []
    assert bench.core.memory_bytes == 0


def test_a_composite_makes_all_its_queues_or_none():
    bench = Bench(destinations_max=2)
    for send in (lambda m: bench.core.send(m), lambda m: bench.core.transact([m], (), ())):
        with pytest.raises(LimitExceeded, match="destinations_max"):
            send(Message(f"{A},b,c", b""))
    assert not bench.core.by_destination
    bench.send(f"{A},b", b"1")
    assert depths(bench) == {A: 1, B: 1}


def test_a_composite_that_goes_to_another_broker_too_makes_all_its_queues_or_none():
    """What is on its way there is in a queue of its own, which is made meanwhile."""
    world = World(
        "ab", chain("ab"), limits=Limits(destinations_max=2), delivery=DeliveryPolicy(), network=NetworkConfig()
    )
    world.heal()
    here, there = world.brokers["a"], world.brokers["b"]
    watcher = there.connect()
    there.run(lambda core: core.start(core.subscribe(watcher, "/topic/t", AUTO)))
    world.heal()
    here.run(lambda core: core.send(Message(f"/topic/t,{A},{B}", b"1")))
    assert {name: queue.depth for name, queue in here.core.by_destination.items()} == {A: 1, B: 1}


def test_a_composite_has_a_limit():
    bench = Bench(composite_destinations_max=2)
    bench.send(f"{A},b", b"1")
    with pytest.raises(LimitExceeded, match="composite_destinations_max"):
        bench.core.send(Message(f"{A},b,c", b""))


def test_a_composite_in_a_transaction_and_as_a_repeat():
    bench = Bench()
    connection = bench.connect()
    bench.core.begin(connection, "t")
    bench.core.send_later(connection, Message(f"{A},b", b"1"), "t", ("p", 1, False))
    bench.end()
    assert depths(bench) == {}
    bench.core.commit(connection, "t")
    bench.end()
    bench.settle()
    bench.crash()
    assert not bench.core.send_once(Message(f"{A},b", b"1"), ("p", 1, True))
    assert depths(bench) == {A: 1, B: 1}


def test_a_full_queue_of_a_composite_makes_it_wait():
    bench = Bench(queue_messages_max=1)
    bench.send(B, b"1")
    assert bench.core.full(Message(f"{A},b", b"")) is not None
    assert bench.core.full(Message(f"{A},c", b"")) is None
    assert bench.core.full(Message("/queue/a,..", b"")) is None  # the send says what is wrong


def test_a_full_queue_of_a_virtual_topic_makes_its_producers_wait():
    bench = Bench(queue_messages_max=1)
    bench.subscribe(f"/queue/Consumer.one.{X}")
    assert bench.core.full(Message(f"/topic/{X}", b"")) is None
    bench.send(f"/topic/{X}", b"1")
    assert bench.core.full(Message(f"/topic/{X}", b"")) is not None
    assert bench.core.full(Message(f"/queue/a,/topic/{X}", b"")) is not None
    assert bench.core.full(Message("/topic/VirtualTopic.y", b"")) is None


# ---- from the configuration


def test_forwarding_by_configuration():
    bench = Bench(composite=({"name": A, "forward_to": [B, C]}, {"name": "/topic/t.*", "forward_to": [A]}))
    bench.send(A, b"1")
    assert depths(bench) == {B: 1, C: 1}
    bench.subscribe(A)  # nothing changes with the queue's existence
    bench.send(A, b"2")
    bench.send("/topic/t.1", b"3")  # a chain
    assert depths(bench) == {B: 3, C: 3}
    bench.settle()
    bench.crash()
    bench.send(A, b"4")
    assert depths(bench) == {B: 4, C: 4}


def test_forwarding_that_keeps_a_copy_and_a_circle():
    rules = (
        {"name": A, "forward_to": [B], "forward_only": False},
        {"name": B, "forward_to": [A], "forward_only": False},
    )
    bench = Bench(composite=rules)
    bench.send(A, b"1")
    bench.send(f"{A},b", b"2")
    assert depths(bench) == {A: 2, B: 2}


def test_a_circle_of_entries_that_only_forward_loses_nothing():
    bench = Bench(composite=({"name": A, "forward_to": [B]}, {"name": B, "forward_to": [A]}))
    bench.send(A, b"1")
    bench.send(f"{A},b", b"2")
    bench.send(f"{A},c", b"3")
    assert depths(bench) == {A: 2, B: 1, C: 1}


def test_filters_forward_what_they_admit_and_lose_nothing():
    bench = Bench(
        composite=(
            {"name": A, "forward_to": [B], "filter": "ward = 3"},
            {"name": A, "forward_to": [C], "filter": "ward > 2"},
        )
    )
    for ward in (1, 3, 4):
        bench.send(A, b"%d" % ward, header_block=b"ward:%d\n" % ward)
    bench.settle()
    consumers = {name: bench.subscribe(name) for name in (A, B, C)}
    bench.settle()
    found = {name: bench.bodies(consumer) for name, consumer in consumers.items()}
    assert found == {A: [b"1"], B: [b"3"], C: [b"3", b"4"]}


def test_forward_only_counts_for_what_its_entry_forwards():
    bench = Bench(
        composite=(
            {"name": A, "forward_to": [B], "filter": "ward = 3", "forward_only": True},
            {"name": A, "forward_to": [C], "forward_only": False},
        )
    )
    bench.send(A, b"1", header_block=b"ward:1\n")
    assert depths(bench) == {A: 1, C: 1}
    bench.send(A, b"2", header_block=b"ward:3\n")
    assert depths(bench) == {A: 1, B: 1, C: 2}


# ---- virtual topics and mirrored queues


def test_a_virtual_topic_is_collected_by_each_consumer_queue_also_after_a_crash_with_nobody_there():
    bench = Bench()
    one, two = f"/queue/Consumer.one.{X}", f"/queue/Consumer.two.{X}"
    for name in (one, two):
        bench.leave(bench.subscribe(name))
    bench.settle()
    bench.crash()
    bench.core.send(Message(f"/topic/{X}", b"1"))
    assert sum(operation[0] == PUT_BODY for operation in bench.core.operations) == 1
    bench.end()
    bench.settle()
    bench.crash()
    assert depths(bench) == {one: 1, two: 1}
    consumers = [bench.subscribe(one), bench.subscribe(two)]
    bench.settle()
    for consumer, name in zip(consumers, (one, two), strict=True):
        (entry,) = bench.entries(consumer)
        assert (entry.message.destination, entry.message.body) == (name, b"1")
        bench.ack(consumer, b"1")
        bench.settle()
    assert leftovers(bench.driver.store) == []


def test_a_virtual_topic_beside_subscribers_and_after_dead_letters():
    bench = Bench(deliveries_max=1)
    name = f"/queue/Consumer.one.{X}"
    durable = bench.subscribe(f"/topic/{X}", durable_name="s", client_id="c")
    plain = bench.subscribe("/topic/VirtualTopic.>")
    queue = bench.subscribe(name)
    bench.send(f"/topic/{X}", b"1")
    bench.send(f"/topic/{X}", b"2", durable=False)
    bench.settle()
    for consumer in (durable, plain, queue):
        assert bench.bodies(consumer) == [b"1", b"2"]
    bench.nack(queue, b"1")
    bench.settle()
    assert depths(bench) == {name: 1, "/queue/DLQ": 1}
    bench.ack(durable, b"1")
    bench.settle()
    bench.crash()
    assert depths(bench) == {"/queue/DLQ": 1}


def test_a_queue_that_a_send_reaches_directly_and_by_its_virtual_topic_gets_one_copy():
    name = f"/queue/Consumer.one.{X}"
    bench = Bench(composite=({"name": A, "forward_to": [f"/topic/{X}", name]},))
    bench.send(f"{name},/topic/{X}", b"1")  # also where the send itself makes it
    bench.send(A, b"2")
    bench.send(f"/topic/{X},{name}", b"3", durable=False)
    consumer = bench.subscribe(name)
    bench.settle()
    assert bench.bodies(consumer) == [b"1", b"2", b"3"]


def test_virtual_topics_by_another_name_or_not_at_all():
    bench = Bench(routing={"virtual_topics": "v.*", "virtual_consumers": "q.of.*."})
    bench.subscribe("/queue/q.of.one.v.x")
    bench.subscribe(f"/queue/Consumer.one.{X}")
    bench.send("/topic/v.x", b"1")
    bench.send(f"/topic/{X}", b"1")
    assert depths(bench) == {"/queue/q.of.one.v.x": 1}
    bench = Bench(routing={"virtual_topics": ""})
    bench.subscribe(f"/queue/Consumer.one.{X}")
    bench.send(f"/topic/{X}", b"1")
    assert depths(bench) == {}
    assert bench.core.unrouted == 1


def test_a_mirrored_queue_is_published_on_its_topic():
    bench = Bench(routing={"mirrored_queues": ["/queue/a.>"]})
    watcher = bench.subscribe("/topic/VirtualTopic.Mirror.a.1")
    bench.subscribe("/queue/Consumer.audit.VirtualTopic.Mirror.a.1")
    for name in ("/queue/a.1", "/queue/a.2", "/queue/b"):
        bench.send(name, b"1")
    bench.send("/queue/a.1", b"2")
    bench.settle()
    assert bench.bodies(watcher) == [b"1", b"2"]
    assert depths(bench) == {
        "/queue/a.1": 2,
        "/queue/a.2": 1,
        "/queue/b": 1,
        "/queue/Consumer.audit.VirtualTopic.Mirror.a.1": 2,
    }


LONG = "/queue/" + "a" * 1_010  # too long for the topic of its mirror


@pytest.mark.parametrize("to", [LONG, f"{A},{LONG}", B])
@pytest.mark.parametrize("there", [False, True])
def test_a_queue_whose_mirror_can_not_be_is_refused_when_something_is_sent(to: str, there: bool):
    """Else a commit would find it out in the middle, and a schedule when it is due."""
    bench = Bench(
        routing={"mirrored_queues": ["/queue/>"]},
        composite=({"name": B, "forward_to": [LONG], "filter": "ward = 3"},),
    )
    connection = bench.connect()
    consumer = bench.subscribe(A, on=connection)
    bench.send(A, b"1")
    if there:
        bench.subscribe(LONG)
    bench.settle()
    bench.core.begin(connection, "t")
    bench.ack(consumer, b"1", "t")
    for block in (b"ward:3\n", b"ward:3\nAMQ_SCHEDULED_DELAY:5\n"):
        for send in (
            lambda m: bench.core.send(m),
            lambda m: bench.core.send_later(connection, m, "t"),
            lambda m: bench.core.transact([m], (), ()),
        ):
            with pytest.raises(
                InvalidDestination, match=r"is mirrored, and its mirror can't be: .*/topic/VirtualTopic\.Mi"
            ):
                send(Message(to, b"x", block))
    bench.core.commit(connection, "t")
    bench.end()
    assert len(bench.core.schedules) == 0
    assert depths(bench) == {}


def test_a_commit_that_finds_something_wrong_gives_all_back(monkeypatch: pytest.MonkeyPatch):
    bench = Bench()
    connection = bench.connect()
    consumer = bench.subscribe(A, on=connection)
    bench.send(A, b"1")
    bench.settle()
    bench.core.begin(connection, "t")
    bench.ack(consumer, b"1", "t")
    bench.core.send_later(connection, Message(B, b"x"), "t")

    def refuse(message: Message) -> list[str]:
        raise InvalidDestination("no")

    monkeypatch.setattr(bench.core.routing, "destinations", refuse)
    with pytest.raises(InvalidDestination):
        bench.core.commit(connection, "t")
    bench.end()
    monkeypatch.undo()
    bench.settle()
    assert bench.seen(consumer) == [(b"1", 0), (b"1", 1)]


def test_what_concerns_a_name_is_found_once_and_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """With many entries it takes milliseconds."""
    bench = Bench(composite=({"name": A, "forward_to": [B], "forward_only": False},))
    bench.send(A, b"1")
    monkeypatch.setattr(routing, "matches", lambda pattern, parts: pytest.fail("a walk over the entries"))
    bench.send(A, b"2")
    monkeypatch.undo()
    monkeypatch.setattr(routing, "PLACES_MAX", 3)
    for number in range(10):
        bench.core.check_destination(f"/queue/n.{number}")
        assert len(bench.core.routing._places) <= 3
    bench.send(A, b"3")
    assert depths(bench) == {A: 3, B: 3}


COLLECTS = "/queue/Consumer.one.VirtualTopic.t"
NAMES = ("/queue/a", "/queue/b", "/queue/c", "/topic/VirtualTopic.t", COLLECTS)
RULE = st.fixed_dictionaries(
    {
        "name": st.sampled_from((*NAMES, "/queue/*")),
        "forward_to": st.lists(st.sampled_from(NAMES), min_size=1, max_size=3),
        "forward_only": st.booleans(),
    }
)


@given(st.lists(RULE, max_size=4).map(tuple), st.lists(st.sampled_from(NAMES), min_size=1, max_size=3), st.booleans())
def test_every_copy_and_none_twice(rules: tuple[dict[str, object], ...], names: list[str], mirrored: bool):
    """Against a walk over the rules by sets."""
    routing = {
        "mirrored_queues": ["/queue/c"] if mirrored else [],
        "mirror_prefix": "VirtualTopic.t",
        "mirror_suffix": "x",
    }
    bench = Bench(composite=rules, routing=routing)
    bench.subscribe(COLLECTS)
    bench.send(",".join(names), b"1")
    bench.settle()
    bench.crash()

    def applies(rule: dict[str, object], name: str) -> bool:
        return rule["name"] == name or (rule["name"] == "/queue/*" and name in ("/queue/a", "/queue/b", "/queue/c"))

    reached = set(names)
    while (
        more := {to for rule in rules for name in reached if applies(rule, name) for to in rule["forward_to"]} - reached
    ):  # type: ignore[attr-defined]
        reached |= more
    kept = {name for name in reached if not any(applies(rule, name) and rule["forward_only"] for rule in rules)}
    mirrors = mirrored and "/queue/c" in reached
    if not kept and not mirrors:
        kept = set(names)  # a circle
    wanted = Counter({name: 1 for name in kept if name.startswith("/queue/")})
    if "/topic/VirtualTopic.t" in kept:
        wanted[COLLECTS] = 1
    assert Counter(depths(bench)) == wanted


def test_copies_of_a_virtual_topic_that_only_the_store_has_are_shown_moved_and_removed_as_their_queues():
    bench = Bench(window_messages_max=2, policy=({"match": "/queue/>", "dead_letter_expired": True},))
    one, two, three = (f"/queue/Consumer.{name}.{X}" for name in ("one", "two", "three"))
    for name in (one, two, three):
        bench.leave(bench.subscribe(name))
    bench.send(f"/topic/{X}", *(b"%d" % number for number in range(6)), expires=bench.core.now + 1_000)
    bench.settle()
    bench.crash()
    pages = browse_all(bench, one)
    assert {each.message.destination for page in pages for each in page.messages} == {one}
    browse_all(bench, one, moving=bench.core.moving(one, None))
    browse_all(bench, two, moving=bench.core.moving(two, "/queue/a"))
    assert depths(bench) == {three: 6, A: 6}
    bench.driver.now += 1_000
    for _ in range(3):
        bench.core.sweep()
        bench.end()
        bench.settle()
    letters = bench.subscribe("/queue/DLQ")
    bench.settle()
    origins = Counter(entry.message.header("dead-letter-origin") for entry in bench.entries(letters))
    assert origins == {three: 6, A: 6}
    for body in list(bench.bodies(letters)):
        bench.ack(letters, body)
    bench.settle()
    assert leftovers(bench.driver.store) == []
