"""Messages cross links between whole brokers: queues, topics, durable subscriptions; what local consumers want stays."""

from __future__ import annotations

import itertools

import pytest
import trio

from tests.network.brokers import World, two, world

Q = "/queue/q"
T = "/topic/news.local"


async def chain(network: World, names: str, **options: object) -> None:
    """Brokers in a row, each of which dials the next one."""
    for name, after in zip(names, [*names[1:], ""], strict=True):
        network.add(name, [after] if after else [], **options)
        await network.nodes[name].start()
    await network.wait_linked(*itertools.pairwise(names))


async def test_a_message_goes_where_it_is_consumed(autojump_clock: trio.abc.Clock) -> None:
    async with two() as (network, a, b):
        async with b.consuming(Q, []) as found:
            await a.send(Q, *map(str, range(500)))
            await network.wait(lambda: len(found) == 500)
        assert found == [str(number) for number in range(500)]
        await network.wait(lambda: a.depth("q") == b.depth("q") == a.waiting("b") == 0)
        assert (a.peer("b").forwarded, b.peer("a").received, b.peer("a").repeats) == (500, 500, 0)


async def test_a_message_comes_over_as_it_was_sent(autojump_clock: trio.abc.Clock) -> None:
    async with two() as (network, a, b), b.connect() as client, client.subscribe(Q) as messages, a.connect() as sender:
        await network.wait(lambda: a.engine.core.links.demand.heard("b") != set())
        headers = {"content-type": "text/plain", "odd:näme\n": "välue\\\r\n", "empty": ""}
        body = bytes(range(256)) * 20
        confirmation = await sender.send(Q, body, headers=headers, priority=7, durable=False)
        message = await messages.receive()
        assert (message.body, dict(message.headers), message.priority, message.durable) == (body, headers, 7, False)
        assert (message.message_id, message.redelivered, message.destination) == (
            confirmation.message_id,
            False,
            Q,
        )
        await message.ack()


async def test_local_consumers_come_first(autojump_clock: trio.abc.Clock) -> None:
    async with two() as (network, a, b):
        async with b.consuming(Q, []) as there, a.consuming(Q, []) as here:
            await network.wait(lambda: bool(a.engine.core.links.demand.heard("b")))
            await a.send(Q, *map(str, range(50)))
            await network.wait(lambda: len(here) == 50)
        assert there == []


async def test_what_came_before_its_consumer_follows_it(autojump_clock: trio.abc.Clock) -> None:
    async with two() as (network, a, b):
        await a.send(Q, *map(str, range(3_000)))
        assert a.depth("q") == 3_000
        async with b.consuming(Q, []) as found:
            await network.wait(lambda: len(found) == 3_000)
        assert found == [str(number) for number in range(3_000)]


async def test_what_was_forwarded_goes_on_to_where_its_consumers_went(autojump_clock: trio.abc.Clock) -> None:
    """ActiveMQ's stuck messages: forwarded to a broker whose consumers then leave, to come back where the others were."""
    async with two() as (network, a, b):
        async with b.connect() as client, client.subscribe(Q, prefetch=5) as messages:
            await a.send(Q, *map(str, range(100)))
            await network.wait(lambda: b.depth("q") == 100)
            await messages.receive()
        assert (a.depth("q"), b.depth("q")) == (0, 100)
        async with a.consuming(Q, []) as found:
            await network.wait(lambda: len(found) == 100)
        assert sorted(map(int, found)) == list(range(100))
        assert (a.depth("q"), b.depth("q")) == (0, 0)


async def test_a_chain_is_passed_and_remembered(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        await chain(network, "abcde")
        e = network.nodes["e"]
        async with e.connect() as client, client.subscribe(Q) as messages:
            await network.nodes["a"].send(Q, "x")
            with trio.fail_after(5):
                message = await messages.receive()
            (queue,) = (queue for queue in e.engine.core.queues.values() if queue.name == "q")
            (entry,) = queue.outstanding.values()
            assert entry.message.route is not None
            assert entry.message.route.passed == ("a", "b", "c", "d")
            assert not message.redelivered
            await message.ack()


async def test_deliveries_are_counted_over_links(autojump_clock: trio.abc.Clock) -> None:
    """A message that kills its consumers does so in the whole network no more often than at one broker."""
    async with two() as (network, a, b):
        await a.send(Q, "poison")
        seen = []
        for node in (a, b, a, b, a, b):
            async with node.connect() as client, client.subscribe(Q) as messages:
                with trio.fail_after(10):
                    message = await messages.receive()
                seen.append((message.deliveries, message.redelivered))
        assert seen == [(number, number > 0) for number in range(6)]
        await network.wait(lambda: b.depth("ActiveMQ.DLQ") == 1)
        assert (a.depth("q"), b.depth("q")) == (0, 0)


async def test_each_subscriber_of_a_topic_gets_one_copy(autojump_clock: trio.abc.Clock) -> None:
    """Three brokers, all linked with all: there are two ways to each."""
    async with world() as network:
        for name in "abc":
            await network.add(name, [other for other in "abc" if other < name]).start()
        await network.wait_linked(("a", "b"), ("b", "c"), ("a", "c"))
        a, b, c = (network.nodes[name] for name in "abc")
        async with (
            b.consuming(T, []) as one,
            b.consuming("/topic/news.>", []) as two_,
            c.consuming("/topic/news.*", []) as three,
            a.consuming(T, []) as four,
        ):
            await trio.sleep(1)
            await a.send(T, *map(str, range(20)))
            await trio.sleep(2)
        expected = [str(number) for number in range(20)]
        assert one == two_ == three == four == expected
        assert (a.peer("b").forwarded, a.peer("c").forwarded) == (20, 20)  # one copy for each broker
        assert c.peer("b").received == b.peer("c").received == 0


async def test_a_durable_subscription_elsewhere_gets_what_was_sent_while_the_link_was_cut(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with two() as (network, a, b):
        async with b.consuming(T, [], client_id="owner", durable_name="sub"):
            await network.wait(lambda: bool(a.engine.core.links.demand.heard("b")))
        network.refused.add(("a", "b"))
        network.wires[0].cut()
        await network.wait(lambda: not a.linked())
        await a.send(T, "1", "2")
        await a.kill()
        await a.start()
        await a.send(T, "3")
        network.refused.clear()
        await network.wait_linked(("a", "b"))
        async with b.consuming(T, [], client_id="owner", durable_name="sub") as found:
            await network.wait(lambda: len(found) == 3)
            await trio.sleep(1)
        assert found == ["1", "2", "3"]


async def test_destinations_that_are_left_out_stay(autojump_clock: trio.abc.Clock) -> None:
    async with two(include=("/queue/shared.>",), exclude=("/queue/shared.not",)) as (_, a, b):
        async with (
            b.consuming("/queue/shared.a", []) as shared,
            b.consuming("/queue/shared.not", []) as excluded,
            b.consuming("/queue/other", []) as other,
        ):
            for name in ("shared.a", "shared.not", "other"):
                await a.send(f"/queue/{name}", name)
            await trio.sleep(2)
        assert (shared, excluded, other) == (["shared.a"], [], [])
        assert (a.depth("shared.a"), a.depth("shared.not"), a.depth("other")) == (0, 1, 1)


async def test_demand_is_told_at_once_and_taken_back(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        await chain(network, "abc")
        a, c = network.nodes["a"], network.nodes["c"]
        heard = a.engine.core.links.demand.heard
        async with c.consuming(Q, []), c.consuming(T, []):
            await network.wait(lambda: len(heard("b")) == 2, 0.05)
        await network.wait(lambda: not heard("b"), 0.05)


async def test_many_demands_come_over_in_pieces(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pybroker.link_connection.DEMANDS_MAX", 7)
    async with world() as network:
        a, b = network.add("a", ["b"]), network.add("b")
        await b.start()
        async with b.connect() as client:
            subscriptions = [client.subscribe(f"/queue/{number}") for number in range(50)]
            for each in subscriptions:
                await each.__aenter__()
            await a.start()
            await network.wait(lambda: len(a.engine.core.links.demand.heard("b")) == 50)
            for each in subscriptions[:20]:
                await each.__aexit__(None, None, None)
            await network.wait(lambda: len(a.engine.core.links.demand.heard("b")) == 30)
            for each in subscriptions[20:]:
                await each.__aexit__(None, None, None)


async def test_a_broker_that_joins_learns_the_demand_and_disturbs_nobody(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        await chain(network, "abc")
        wires = list(network.wires)
        async with network.nodes["c"].consuming(Q, []) as found:
            d = network.add("d", ["a"])
            await d.start()
            await network.wait_linked(("a", "d"))
            await d.send(Q, *map(str, range(10)))
            await network.wait(lambda: len(found) == 10)
            await d.stop()
        assert [wire for wire in network.wires if not wire.pipes[0].ended][:2] == wires
