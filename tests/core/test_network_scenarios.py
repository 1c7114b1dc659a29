"""Networks of whole brokers in named scenarios: what got stuck, looped or was lost elsewhere must not here.

DESIGN.md section 6. The scenarios are small, and say what comes out; what nobody thought of is `test_network`'s.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from pybroker.config import DeliveryPolicy, Limits, NetworkConfig
from pybroker.core.invariants import check_invariants
from pybroker.core.kinds import LINK
from pybroker.errors import BrokerError
from pybroker.message import Message, Route
from pybroker.store import format as fmt
from tests.core.network import Broker
from tests.core.network_clients import ClientWorld, Sent
from tests.core.network_story import chain, mesh, ring

Q = "/queue/q"


def network(
    names: str, pairs: Any = chain, *, window: int = 100, deliveries_max: int = 0, **options: Any
) -> ClientWorld:
    """Brokers, linked, at rest."""
    world = ClientWorld(
        names,
        pairs(names),
        limits=Limits(window_messages_max=window),
        delivery=DeliveryPolicy(deliveries_max=deliveries_max, dead_letter_queue="/queue/DLQ"),
        network=NetworkConfig(**options),
        seed="scenario",
    )
    world.heal()
    return world


def send(world: ClientWorld, name: str, count: int, to: str = Q, **options: Any) -> list[Sent]:
    return [world.send(world.brokers[name], to, **options) for _ in range(count)]


def seen(sends: list[Sent]) -> Counter[str]:
    """Which broker's consumers got how many of them, each counted at its last delivery."""
    found: Counter[str] = Counter()
    for sent in sends:
        for showings in sent.showings.values():
            found.update(each.member.broker.name for each in showings[-1:])
    return found


def depths(world: ClientWorld, destination: str = Q) -> dict[str, int]:
    found = {}
    for name, broker in world.brokers.items():
        queue = broker.core.by_destination.get(destination)
        if queue is not None and queue.depth:
            found[name] = queue.depth
    return found


def finish(world: ClientWorld) -> None:
    """Drain, and look at everything."""
    world.heal(world.acknowledge_all)
    world.check_census()
    world.check_topics()
    world.check_stores()


# ---- where messages go


def test_messages_do_not_stay_with_a_broker_whose_consumers_left() -> None:
    """ActiveMQ's stuck messages: what was forwarded comes back when the consumers do."""
    world = network("ab")
    member = world.join(world.brokers["b"], Q, prefetch=1)
    world.heal()
    sends = send(world, "a", 5)
    world.heal()
    assert depths(world) == {"b": 5}
    world.leave(member)
    world.heal()
    assert depths(world) == {"b": 5}, "nobody consumes anywhere: they stay"
    world.join(world.brokers["a"], Q, prefetch=10)
    finish(world)
    assert seen(sends) == {"a": 5}
    assert depths(world) == {}


def test_messages_follow_consumers_that_move_on_and_on() -> None:
    world = network("abc")
    sends = send(world, "a", 4)
    for name in "cabcbac":
        member = world.join(world.brokers[name], Q, prefetch=1)
        world.heal()
        assert depths(world) == {name: 4}
        world.leave(member)
        world.heal()
    world.join(world.brokers["b"], Q, prefetch=4)
    finish(world)
    assert seen(sends) == {"b": 4}


def test_local_consumers_come_first_and_take_only_what_they_can() -> None:
    world = network("ab")
    world.join(world.brokers["a"], Q, prefetch=2)
    world.join(world.brokers["b"], Q, prefetch=10)
    world.heal()
    sends = send(world, "a", 6)
    world.heal()
    assert seen(sends) == {"a": 2, "b": 4}
    finish(world)


def test_messages_do_not_wander_between_two_that_both_have_busy_consumers() -> None:
    world = network("ab")
    world.join(world.brokers["a"], Q, prefetch=1)
    world.join(world.brokers["b"], Q, prefetch=1)
    world.heal()
    send(world, "a", 10)
    world.heal()
    hops = [len(entry.message.route.passed) for entry in _ready(world.brokers["b"]) if entry.message.route is not None]
    assert hops == [1] * 8
    finish(world)


def _ready(broker: Broker) -> list[Any]:
    return list(broker.core.by_destination[Q].window)


@pytest.mark.parametrize(("names", "shape"), [("abcd", chain), ("abc", ring), ("abcde", ring), ("abcde", mesh)])
def test_a_consumer_at_the_far_end_gets_everything_once_and_in_order(names: str, shape: Any) -> None:
    world = network(names, shape)
    far = world.brokers[names[len(names) // 2] if shape is ring else names[-1]]
    world.join(far, Q, prefetch=3)
    world.heal()
    world.settled()
    sends = [sent for _ in range(10) for sent in send(world, "a", 2)]
    finish(world)
    assert seen(sends) == {far.name: 20}
    assert all(len(showings) == 1 for sent in sends for showings in sent.showings.values())


def test_several_consumers_share_what_comes_in_a_mesh() -> None:
    world = network("abcde", mesh)
    for name in "bcde":
        world.join(world.brokers[name], Q, prefetch=1)
    world.heal()
    sends = send(world, "a", 40)
    finish(world)
    assert sum(seen(sends).values()) == 40
    assert all(count >= 5 for count in seen(sends).values()), seen(sends)


def test_the_nearest_consumers_are_asked_first() -> None:
    world = network("abc")
    world.join(world.brokers["c"], Q, prefetch=10)
    world.join(world.brokers["b"], Q, prefetch=10)
    world.heal()
    sends = send(world, "a", 6)
    finish(world)
    assert seen(sends) == {"b": 6}


def test_what_is_excluded_crosses_no_link() -> None:
    world = network("ab", exclude=("/queue/own.>", "/topic/own.>"))
    for destination in ("/queue/own.x", "/topic/own.x", "/topic/>"):
        world.join(world.brokers["b"], destination, prefetch=10)
    world.heal()
    sends = send(world, "a", 2, "/queue/own.x") + send(world, "a", 2, "/topic/own.x")
    world.heal()
    assert seen(sends) == {}
    assert depths(world, "/queue/own.x") == {"a": 2}


def test_a_topic_reaches_each_subscriber_once_whatever_the_network_looks_like() -> None:
    for shape in (chain, ring, mesh):
        world = network("abcd", shape)
        for name in "abcd":
            world.join(world.brokers[name], "/topic/t", prefetch=10)
            world.join(world.brokers[name], "/topic/>", prefetch=10, durable_name="sub")
        world.heal()
        world.settled()
        sends = send(world, "b", 3, "/topic/t")
        finish(world)
        for sent in sends:
            assert len(sent.must) == len(sent.showings) == 8
            assert all(len(showings) == 1 for showings in sent.showings.values())


def test_a_durable_subscription_collects_while_its_broker_can_not_be_reached() -> None:
    world = network("abc")
    world.leave(world.join(world.brokers["c"], "/topic/t", durable_name="sub"))
    world.heal()
    world.settled()
    world.cut(("b", "c"))
    world.rest()
    sends = send(world, "a", 3, "/topic/t")
    world.rest()
    world.stop(world.brokers["b"], clean=False)
    world.stop(world.brokers["a"], clean=False)
    sends += send(world, "a", 2, "/topic/t")
    world.heal()
    world.join(world.brokers["c"], "/topic/t", durable_name="sub", prefetch=10)
    finish(world)
    assert seen(sends) == {"c": 5}


def test_a_durable_demand_that_a_broker_may_forget_in_a_crash_is_not_told_on() -> None:
    """Else b, which has forgotten the way to c, would drop what a sends because of what b has said."""
    world = network("abc")
    a, b, c = world.brokers.values()
    world.join(c, "/topic/t", durable_name="sub", prefetch=10)
    c.commit()
    world.say_news()
    world.deliver(c.ends["b"])
    world.say_news()
    assert not b.ends["a"].out
    b.commit()
    world.say_news()
    world.deliver(b.ends["a"])
    sends = send(world, "a", 1, "/topic/t")
    a.commit()
    world.stop(b, clean=False)
    for end in world.dead_ends():
        world.notice(end)
    world.dial(("a", "b"))
    world.rest()
    assert b.core.links.dropped == 0
    finish(world)
    assert seen(sends) == {"c": 1}


# ---- limits


def test_at_the_hop_limit_a_message_stays_is_counted_and_is_there_for_a_local_consumer() -> None:
    world = network("abcd", hops_max=2)
    member = world.join(world.brokers["c"], Q, prefetch=1)
    world.heal()
    sends = send(world, "a", 4)
    world.heal()
    assert depths(world) == {"c": 4}
    world.leave(member)
    world.join(world.brokers["d"], Q, prefetch=10)
    world.heal()
    assert depths(world) == {"c": 4}
    queue = world.brokers["c"].core.by_destination[Q]
    assert len(queue.stranded) == 4
    late = send(world, "c", 1)
    world.heal()
    assert seen(late) == {"d": 1}, "what may go on is not held up"
    world.stop(world.brokers["c"], clean=False)
    world.heal()
    assert depths(world)["c"] == 4
    world.join(world.brokers["c"], Q, prefetch=1)
    finish(world)
    assert seen(sends) == {"c": 4}


def test_stranded_messages_expire() -> None:
    world = network("abcd", hops_max=2)
    member = world.join(world.brokers["c"], Q, prefetch=1)
    world.heal()
    send(world, "a", 3, expires=world.now + 1_000)
    send(world, "a", 3, expires=world.now + 1_000, durable=False)
    world.heal()
    world.leave(member)
    world.join(world.brokers["d"], Q, prefetch=10)
    world.heal()
    assert depths(world) == {"c": 6}
    world.pass_time(2_000)
    world.heal()
    assert depths(world) == {}


def test_a_message_that_the_peer_refuses_becomes_a_dead_letter_with_the_reason() -> None:
    world = network("abc")
    middle = world.brokers["b"]
    world.join(world.brokers["c"], Q, prefetch=10)
    world.heal()
    send(world, "b", 1, "/queue/other")
    middle.core.limits = Limits(destinations_max=1)
    sends = send(world, "a", 2, block=b"k:v\n", priority=7)
    world.heal()
    letters = world.brokers["a"].core.by_destination["/queue/DLQ"]
    found = [entry.message for entry in letters.window]
    assert [message.body for message in found] == [sent.body for sent in sends]
    for message in found:
        reason = message.header("dead-letter-reason") or ""
        assert reason.startswith("refused by b: limit: too many queues"), reason
        assert message.header("dead-letter-origin") == Q
        assert message.header("k") == "v"
        assert message.priority == 7
    peer = world.brokers["a"].core.links.peers["b"]
    assert (peer.rejected, peer.forwarded, peer.waiting) == (2, 0, 0)


def test_a_broker_with_much_waiting_asks_for_no_more_until_it_is_consumed() -> None:
    world = network("ab", demand_backlog_max=4, link_messages_max=2)
    member = world.join(world.brokers["b"], Q, prefetch=1)
    world.heal()
    sends = send(world, "a", 30)
    world.step()
    for _ in range(200):
        world.step()
        world.tick()
    assert 4 <= depths(world)["b"] <= 10, depths(world)
    world.tick()
    world.rest()
    before = depths(world)["b"]
    world.rest()
    assert depths(world)["b"] == before, "it asks for no more"
    while depths(world):
        world.heal(world.acknowledge_all)
    assert seen(sends) == {"b": 30}
    world.leave(member)
    finish(world)


def test_what_expired_on_its_way_holds_up_nothing() -> None:
    """The queue of an earlier life, and one that waits for room, go on although nothing was accepted."""
    world = network("ab", window=2, link_messages_max=4)
    world.leave(world.join(world.brokers["b"], "/topic/t", durable_name="sub"))
    world.join(world.brokers["b"], Q, prefetch=10)
    world.heal()
    world.cut(("a", "b"))
    send(world, "a", 10, "/topic/t", expires=world.now + 1_000)
    world.rest()
    world.stop(world.brokers["a"], clean=False)
    send(world, "a", 10, "/topic/t", expires=world.now + 1_000)
    sends = send(world, "a", 10)
    world.rest()
    world.pass_time(2_000)
    finish(world)
    assert seen(sends) == {"b": 10}


def test_what_can_not_be_read_on_its_way_holds_up_nothing_and_goes_when_it_is_mended() -> None:
    world = network("ab", window=2)
    world.join(world.brokers["b"], Q, prefetch=100)
    a = world.brokers["a"]
    world.heal()
    sends = send(world, "a", 5)
    world.cut(("a", "b"))
    world.rest()
    a.peers = {}
    for queue in a.core.queues.values():
        if queue.kind == LINK:
            keys = [fmt.message_key(queue.queue_id, order) for order in range(queue.next_sequence)]
    whole = {key: a.backend.get(key) for key in keys}
    a.backend.write([(key, (value or b"")[:-1] + b"?") for key, value in whole.items()], True)
    world.stop(a, clean=False)
    sends += send(world, "a", 5, producer="another one")
    world.heal(world.acknowledge_all)
    assert seen(sends) == {"b": 5}
    assert a.core.links.peers["b"].waiting == 5
    a.backend.write([(key, value or b"") for key, value in whole.items()], True)
    world.stop(a, clean=False)
    finish(world)
    assert seen(sends) == {"b": 10}
    assert a.core.links.peers["b"].waiting == 0


# ---- a peer that will not come back


def _in_doubt(count: int, window: int = 100, **options: Any) -> tuple[ClientWorld, list[Sent]]:
    """All of them have come to b, and a does not know it."""
    world = network("ab", window=window, **options)
    world.join(world.brokers["b"], Q, prefetch=1)
    world.heal()
    sends = send(world, "a", count)
    a, b = world.brokers.values()
    while a.ends["b"].out or any(broker.step_commit() or broker.step_read() for broker in (a, b)):
        world.deliver(a.ends["b"])
    assert b.core.links.peers["a"].received == count
    world.cut(("a", "b"))
    for end in world.dead_ends():
        world.notice(end)
    world.rest()
    return world, sends


def test_messages_in_doubt_wait_for_their_peer() -> None:
    world, sends = _in_doubt(5)
    assert world.brokers["a"].core.links.peers["b"].waiting == 5
    world.join(world.brokers["a"], Q, prefetch=10)
    world.rest()
    assert not seen(sends)["a"]
    finish(world)
    assert seen(sends) == {"b": 5}


@pytest.mark.parametrize(("count", "window"), [(5, 100), (40, 4)])
def test_removing_a_peer_releases_what_waited_for_it(count: int, window: int) -> None:
    world, sends = _in_doubt(count, window)
    a = world.brokers["a"]
    waiting = a.core.links.peers["b"].waiting
    assert waiting == count
    assert world.remove_peer(a, "b") == waiting
    world.rest()
    assert depths(world)["a"] == count
    assert not any(queue.kind == LINK for queue in a.core.queues.values())
    member = world.join(a, Q, prefetch=100)
    world.rest()
    shown = [showings[-1] for sent in sends for showings in sent.showings.values() if showings[-1].member is member]
    assert len(shown) == count
    assert all(showing.deliveries for showing in shown), "they may have been delivered there"
    world.rest(world.acknowledge_all)
    world.stop(a, clean=False)
    assert depths(world).get("a") is None
    assert "b" not in a.core.links.peers
    world.check_stores()


def test_a_crash_in_the_middle_of_removing_a_peer() -> None:
    """At every step of it: then the next life goes on with it, or has not begun."""
    for at in range(200):
        world, sends = _in_doubt(20, window=4)
        a = world.brokers["a"]
        world.remove_peer(a, "b")
        finished = not all(a.step_commit() or a.step_read() for _ in range(at))
        if not finished:
            world.stop(a, clean=False)
            if "b" in a.core.links.peers:  # not even the first batch was committed
                world.remove_peer(a, "b")
        world.rest()
        assert depths(world)["a"] == 20
        assert not any(queue.kind == LINK for queue in a.core.queues.values())
        assert not any(record.kind == LINK for record in a.store.open(a.backend).records)
        world.join(a, Q, prefetch=100)
        world.rest(world.acknowledge_all)
        assert {sent.number for sent in sends} <= {each.sent.number for each in _done(world, a)}
        world.check_stores()
        if finished:
            assert at > 20
            return
    raise AssertionError("it never ends")


def _done(world: ClientWorld, broker: Broker) -> list[Any]:
    return [
        showing
        for sent in world.book.values()
        for showings in sent.showings.values()
        for showing in showings
        if showing.state == "done" and showing.member.broker is broker
    ]


def test_a_peer_that_was_removed_comes_back_in_the_same_life() -> None:
    """What is forwarded to it now is not taken for what was forwarded before."""
    world, _ = _in_doubt(5)
    a = world.brokers["a"]
    world.remove_peer(a, "b")
    member = world.join(a, Q, prefetch=10)
    world.rest(world.acknowledge_all)
    world.leave(member)
    sends = send(world, "a", 5)
    finish(world)
    assert seen(sends) == {"b": 5}
    assert all(showing.state == "done" for sent in sends for showing in sent.showings["queue",])


def test_only_a_known_peer_without_a_link_is_removed() -> None:
    world = network("ab")
    a = world.brokers["a"]
    with pytest.raises(BrokerError, match="peer b is linked"):
        world.remove_peer(a, "b")
    with pytest.raises(BrokerError, match="peer z is not known here; known are: b"):
        world.remove_peer(a, "z")


# ---- an enemy


def _forward(destination: str, **fields: Any) -> tuple[Any, ...]:
    route = Route(fields.pop("passed", ("b",)), fields.pop("targets", ()), fields.pop("deliveries", 0), 4)
    message = Message(destination, b"0:", message_id=b"x", route=route, **fields)
    return ("forward", 1, "elsewhere", 1, 0, message)


FRAMES: dict[str, tuple[Any, ...]] = {
    "accepts what was never sent": ("accepted", 1, [(1, 2**60)]),
    "accepts on a lane that isn't there": ("accepted", 99, [(1, 1)]),
    "rejects what was never sent": ("rejected", 1, 77, "code", "text"),
    "rejects on a lane that isn't there": ("rejected", 99, 1, "code", "text"),
    "demands nonsense": ("demand", False, [("nonsense", False, "b", ("b",))], []),
    "demands a pattern of queues": ("demand", False, [("/queue/>", False, "b", ("b",))], []),
    "demands a queue durably": ("demand", False, [("/queue/q", True, "b", ("b",))], []),
    "demands for this broker": ("demand", False, [("/queue/q", False, "a", ("b", "a"))], []),
    "demands by a way that goes round": ("demand", True, [("/queue/q", False, "z", ("b", "y", "b", "y", "z"))], []),
    "ends what it never demanded": ("demand", False, [], [("/queue/q", False, "z"), ("/topic/>", True, "a")]),
    "greets again": ("hello",),
}


@pytest.mark.parametrize("says", FRAMES)
def test_a_peer_that_lies_does_no_harm(says: str) -> None:
    world = network("ab")
    world.join(world.brokers["b"], Q, prefetch=2)
    world.heal()
    sends = send(world, "a", 6)
    world.rest()
    end = world.brokers["b"].ends["a"]
    end.out.append(FRAMES[says])
    world.deliver(end)
    check_invariants(world.brokers["a"].core)
    world.rest()
    world.heal()
    world.check_census()
    finish(world)
    assert seen(sends) == {"b": len(sends)}
    assert all(showing.state == "done" for sent in sends for showing in sent.showings["queue",])


@pytest.mark.parametrize(
    ("destination", "fields", "code"),
    [
        ("nonsense", {}, "destination"),
        ("/queue/*", {}, "destination"),
        ("/topic/a.>", {}, "destination"),
        ("/queue/q", {"priority": 77}, "message"),
    ],
)
def test_what_can_not_be_taken_is_refused_and_the_link_stays(destination: str, fields: Any, code: str) -> None:
    world = network("ab")
    b = world.brokers["b"]
    end = b.ends["a"]
    end.out.append(_forward(destination, **fields))
    world.deliver(end)
    answer = world.brokers["a"].ends["b"].out[-1]
    assert answer[:4] == ("rejected", 1, 1, code)
    assert world.linked()
    assert world.brokers["a"].core.links.peers["b"].received == 0


def test_a_topic_message_for_brokers_that_nobody_knows_is_dropped_and_counted() -> None:
    world = network("ab")
    end = world.brokers["b"].ends["a"]
    end.out.append(_forward("/topic/t", targets=("y", "z", "b")))
    world.deliver(end)
    world.rest()
    assert world.brokers["a"].core.links.dropped == 3


def test_a_peer_that_repeats_itself_is_heard_once() -> None:
    world = network("ab")
    end = world.brokers["b"].ends["a"]
    frame = _forward(Q)
    for _ in range(3):
        end.out.append((*frame[:5], Message(Q, b"0:", route=Route(("b",), (), 0, 4))))
        world.deliver(end)
        world.rest()
    peer = world.brokers["a"].core.links.peers["b"]
    assert (peer.received, peer.repeats) == (1, 2)
    assert depths(world) == {"a": 1}


# ---- copies of one send


def test_the_broker_that_takes_a_send_makes_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of a virtual topic's consumers that spans brokers gets a message once; a plain subscriber elsewhere, too."""
    world = network("abc")
    monkeypatch.setattr(world, "_check_content", lambda sent, message: None)  # a copy has a destination of its own
    queue, topic = "/queue/Consumer.one.VirtualTopic.t", "/topic/VirtualTopic.t"
    world.join(world.brokers["c"], queue, prefetch=100)
    world.heal()
    assert queue in world.brokers["a"].core.by_destination, "it collects for those of whom it has heard"
    world.leave(world.join(world.brokers["a"], queue, prefetch=100))
    world.join(world.brokers["b"], topic, prefetch=100)
    world.heal()
    sends = send(world, "a", 3, topic)
    world.heal()
    assert seen(sends) == {"b": 3, "c": 3}
    shown = [entry.message.destination for member in world.members for entry in member.consumer.unacked.values()]
    assert Counter(shown) == {topic: 3, queue: 3}
    assert depths(world, queue) == {"c": 3}
