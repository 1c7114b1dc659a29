"""A link that breaks at every single step of forwarding: nothing is lost, nothing is stored twice (DESIGN.md section 6).

The way of a few messages over links is taken step by step. At each step in turn something is made to fail; then the links come up
again, all is let come to rest, and every message must be there once, and be consumed once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pybroker.config import DeliveryPolicy, Limits, NetworkConfig
from tests.core.network import Broker
from tests.core.network_clients import ClientWorld, Sent
from tests.core.network_story import chain

COUNT = 6
Failure = Callable[[ClientWorld], None]


def network(names: str, *, window: int = 100) -> ClientWorld:
    """A chain that is linked, with a consumer of the queue and a durable subscriber at its end, who take nothing yet."""
    world = ClientWorld(
        names,
        chain(names),
        limits=Limits(window_messages_max=window),
        delivery=DeliveryPolicy(deliveries_max=0),
        network=NetworkConfig(link_messages_max=4),
        seed="breaks",
    )
    world.heal()
    last = world.brokers[names[-1]]
    world.join(last, "/queue/q", prefetch=3)
    world.leave(world.join(last, "/topic/t", durable_name="sub"))
    world.heal()
    world.settled()
    return world


def send_all(world: ClientWorld) -> list[Sent]:
    first = world.brokers["a"]
    return [world.send(first, destination) for _ in range(COUNT // 2) for destination in ("/queue/q", "/topic/t")]


def cut(world: ClientWorld) -> None:
    world.cut(world.pairs[-1])


def cut_and_one_end_notices_late(world: ClientWorld) -> None:
    """The other one has a new connection before this one knows that the old one is dead."""
    pair = world.pairs[-1]
    world.cut(pair)
    world.dial(pair)


def stop(name: str, clean: bool, and_cut: bool = False) -> Failure:
    def fail(world: ClientWorld) -> None:
        if and_cut:
            world.cut(world.pairs[0])
        world.stop(world.brokers[name], clean)

    return fail


def both_crash(world: ClientWorld) -> None:
    for name in "ab":
        world.stop(world.brokers[name], clean=False)


FAILURES: dict[str, Failure] = {
    "cut": cut,
    "cut, noticed late": cut_and_one_end_notices_late,
    "the sender crashes": stop("a", False),
    "the receiver crashes": stop("b", False),
    "both crash": both_crash,
    "the sender is stopped": stop("a", True),
    "the receiver is stopped": stop("b", True),
    "cut, and the sender crashes": stop("a", False, True),
}


def steps(names: str, window: int) -> int:
    """How many steps it takes when nothing fails."""
    world = network(names, window=window)
    send_all(world)
    count = 0
    while world.step():
        count += 1
    return count


def check_whole(world: ClientWorld) -> None:
    """Heal, drain, and look at the book."""
    world.heal()
    assert world.linked()
    world.check_census()
    last = world.brokers[world.pairs[-1][1]]
    if not any(each.destination == "/queue/q" for each in world.alive()):
        world.join(last, "/queue/q", prefetch=10)
    world.join(last, "/topic/t", durable_name="sub", prefetch=10)
    world.heal(world.acknowledge_all)
    world.check_census()
    world.check_topics()
    world.check_stores()
    for sent in world.book.values():
        if sent.stored:
            seen = [each for showings in sent.showings.values() for each in showings]
            assert [each.state for each in seen].count("done") == 1, (sent, seen)
    for broker in world.brokers.values():
        assert all(not queue.depth for queue in broker.core.queues.values()), broker


@pytest.mark.slow
@pytest.mark.parametrize("window", [100, 2])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("names", ["ab", "abc"])
def test_a_failure_at_every_step(names: str, failure: str, window: int) -> None:
    count = steps(names, window)
    assert count > 20
    for at in range(count + 1):
        world = network(names, window=window)
        sends = send_all(world)
        for _ in range(at):
            assert world.step()
        FAILURES[failure](world)
        try:
            check_whole(world)
        except AssertionError as error:
            raise AssertionError(
                f"failing at step {at} of {count}, {sum(each.stored for each in sends)} sent: {error}"
            ) from error


def test_a_failure_while_the_failure_is_mended() -> None:
    """The link breaks again, at every step of what follows the first break in the middle."""
    half = steps("ab", 100) // 2
    for at in range(60):
        world = network("ab")
        send_all(world)
        for _ in range(half):
            world.step()
        cut(world)
        for end in world.dead_ends():
            world.notice(end)
        world.dial(world.pairs[0])
        for _ in range(at):
            world.step()
        broker: Broker = world.brokers["ab"[at % 2]]
        world.stop(broker, clean=at % 4 > 1)
        check_whole(world)
