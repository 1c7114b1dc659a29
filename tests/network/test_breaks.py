"""Links and brokers that break while messages are forwarded: nothing that was confirmed is lost, nothing is stored twice."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import trio

from pybroker.errors import BrokerError
from pybroker.network_status import network_status
from tests.network.brokers import Node, World, two, world

Q = "/queue/q"


class Traffic:
    """Numbered messages, sent at some brokers and consumed at others, over breaks and restarts of both.

    confirmed  what a producer was told to be stored
    firsts     messages that were delivered without a mark of redelivery; anything there twice was stored twice
    """

    def __init__(self) -> None:
        self.sent = 0
        self.confirmed: set[str] = set()
        self.firsts: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.stopped = False

    async def produce(self, node: Node, pause: float, destination: str = Q) -> None:
        while not self.stopped:
            try:
                async with node.connect() as client:
                    while not self.stopped:
                        self.sent += 1
                        body = str(self.sent)
                        await client.send(destination, body.encode())
                        self.confirmed.add(body)
                        await trio.sleep(pause)
            except BrokerError:
                await trio.sleep(0.1)

    async def consume(self, node: Node, destination: str = Q, pause: float = 0.0) -> None:
        while True:
            try:
                async with node.connect() as client, client.subscribe(destination, prefetch=20) as messages:
                    async for message in messages:
                        body = message.body.decode()
                        self.firsts[body] += not message.redelivered
                        self.seen.add(body)
                        await message.ack()
                        await trio.sleep(0.0 if self.stopped else pause)
            except BrokerError:
                await trio.sleep(0.1)

    def check(self) -> None:
        assert self.confirmed <= self.seen, sorted(self.confirmed - self.seen, key=int)
        twice = {body: count for body, count in self.firsts.items() if count > 1}
        assert not twice, twice


async def settle(network: World, traffic: Traffic) -> None:
    """Heal everything and wait until all is consumed."""
    traffic.stopped = True
    network.plan = lambda number, source, target: None
    for node in network.nodes.values():
        if not node.running:
            await node.start()
    for wire in network.wires:
        wire.let_go()
    await trio.sleep(30)
    for node in network.nodes.values():
        assert node.depth("q") == 0, node.name
        for peer in network.nodes.values():
            assert node.waiting(peer.name) == 0
    network.check()


async def test_what_was_not_accepted_is_sent_again_and_stored_once(autojump_clock: trio.abc.Clock) -> None:
    """The link breaks between the commit at the peer and its answer: the classic way to have a message twice."""
    async with two() as (network, a, b):
        async with b.consuming(Q, []) as found:
            await a.send(Q, "before")
            await network.wait(lambda: found == ["before"] and a.waiting("b") == 0)
            network.wires[0].pipes[1].held = True  # answers don't come back
            await a.send(Q, *map(str, range(100)))
            await network.wait(lambda: len(found) == 101)
            assert a.waiting("b") == 100
            assert a.network._links["b"].link is not None
            network.wires[0].cut()
            await network.wait(lambda: len(network.wires) == 2 and a.waiting("b") == 0)
            await trio.sleep(1)
        assert found == ["before", *map(str, range(100))]
        assert (a.peer("b").forwarded, b.peer("a").repeats) == (101, 100)


async def test_what_was_never_there_is_sent_again_in_order(autojump_clock: trio.abc.Clock) -> None:
    async with two() as (network, a, b):
        async with b.consuming(Q, []) as found:
            await a.send(Q, "before")
            await network.wait(lambda: found == ["before"] and a.waiting("b") == 0)
            network.wires[0].pipes[0].held = True
            await a.send(Q, *map(str, range(100)))
            await trio.sleep(0.5)
            assert found == ["before"]
            network.wires[0].cut()
            await network.wait(lambda: len(found) == 101)
        assert found == ["before", *map(str, range(100))]
        assert b.peer("a").repeats == 0


@pytest.mark.parametrize("which", ["a", "b", "ab"])
async def test_messages_in_doubt_survive_a_restart_and_are_stored_once(
    autojump_clock: trio.abc.Clock, which: str
) -> None:
    async with two() as (network, a, b):
        async with b.consuming(Q, []) as found:
            await a.send(Q, "before")
            await network.wait(lambda: found == ["before"] and a.waiting("b") == 0)
            network.wires[0].pipes[1].held = True
            await a.send(Q, *map(str, range(50)))
            await network.wait(lambda: len(found) == 51)
        assert in_doubt(a) == 50
        network.refused.add(("a", "b"))
        for name in which:
            await network.nodes[name].kill()
        for name in which:
            await network.nodes[name].start()
        await network.wait(lambda: not a.linked())
        assert in_doubt(a) == 50
        await a.send("/queue/other", "not forwarded")
        assert in_doubt(a) == 50
        network.refused.clear()
        await network.wait_linked(("a", "b"))
        await network.wait(lambda: a.waiting("b") == 0)
        assert await b.drain(Q) == []
        assert await a.drain(Q) == []
        assert b.peer("a").repeats == 50
        assert in_doubt(a) == 0


def in_doubt(node: Node) -> int:
    """Messages that may be at a peer already, as an operator is shown it."""
    status = network_status(node.engine.core.links, node.name, "default", node.status())
    return sum(peer.in_doubt for peer in status.peers)


async def test_many_breaks_are_no_deliveries_of_a_message(autojump_clock: trio.abc.Clock) -> None:
    """What a link did not bring over was not delivered to anybody: it is no dead letter, however often the link breaks."""
    async with two() as (network, a, b):
        async with b.consuming(Q, []) as found:
            await a.send(Q, "before")
            await network.wait(lambda: a.waiting("b") == 0)
            network.wires[0].pipes[0].held = True
            await a.send(Q, "1")
            for number in range(12):
                network.wires[-1].cut()
                await network.wait(lambda: len(network.wires) == number + 2)  # noqa: B023
                await network.wait_linked(("a", "b"))
                network.wires[-1].pipes[0].held = True
            network.wires[-1].cut()
            await network.wait(lambda: found == ["before", "1"])
        assert a.depth("ActiveMQ.DLQ") == b.depth("ActiveMQ.DLQ") == 0


async def test_a_message_that_waits_for_a_peer_goes_to_nobody_else(autojump_clock: trio.abc.Clock) -> None:
    """It may be there already; only an operator can say that the peer will not come back."""
    async with two() as (network, a, b):
        async with b.consuming(Q, []) as found:
            await a.send(Q, "before")
            await network.wait(lambda: found == ["before"] and a.waiting("b") == 0)
            network.wires[0].pipes[0].held = True
            await a.send(Q, "1", "2")
            await network.wait(lambda: a.waiting("b") == 2)
        await b.kill()
        assert await a.drain(Q) == []
        await network.wait(lambda: not a.linked())
        assert a.engine.begin_turn().links.remove("b") == 2
        a.engine.end_turn()
        async with a.connect() as client, client.subscribe(Q) as messages:
            received = [await messages.receive() for _ in range(2)]
        assert [message.body for message in received] == [b"1", b"2"]
        assert all(message.redelivered for message in received)


@pytest.mark.parametrize("fault", ["cut", "hold"])
async def test_a_link_that_breaks_at_any_byte_loses_nothing_and_repeats_nothing(
    autojump_clock: trio.abc.Clock, fault: str
) -> None:
    async with two() as (network, a, b):
        async with b.consuming(Q, []) as found:
            await a.send(Q, *map(str, range(20)))
            await network.wait(lambda: len(found) == 20 and a.waiting("b") == 0)
        whole = network.wires[0].passed
    for limit in range(800, whole, 23):
        async with world() as network:
            network.plan = lambda number, source, target, limit=limit: (limit, fault) if number == 1 else None
            a, b = network.add("a", ["b"]), network.add("b")
            await b.start()
            await a.start()
            async with b.consuming(Q, []) as found:
                await a.send(Q, *map(str, range(20)))
                await network.wait(lambda: len(found) == 20 and a.waiting("b") == 0)  # noqa: B023
                await trio.sleep(5)
            assert found == [str(number) for number in range(20)]


@pytest.mark.parametrize("seed", range(10))
async def test_links_and_brokers_that_break_at_random(autojump_clock: trio.abc.Clock, seed: int) -> None:
    """Three brokers in a triangle, each with producers; consumers at one or two of them; everything breaks now and then."""
    rng = random.Random(seed)
    async with world() as network:
        names = "abc"
        options: dict[str, Any] = {"link_messages_max": rng.choice((3, 50, 2_000)), "retry_interval_max": 1.0}
        for name in names:
            network.add(name, [other for other in names if other != name], **options)
        for node in network.nodes.values():
            await node.start()

        def plan(number: int, source: str, target: str) -> tuple[int, str] | None:
            return (rng.randrange(20_000), rng.choice(("cut", "hold"))) if rng.random() < 0.7 else None

        network.plan = plan
        traffic = Traffic()
        async with trio.open_nursery() as clients:
            for node in network.nodes.values():
                clients.start_soon(traffic.produce, node, rng.choice((0.01, 0.1)))
            for name in rng.sample(names, rng.choice((1, 2))):
                clients.start_soon(traffic.consume, network.nodes[name], Q, rng.choice((0.0, 0.02)))
            for _ in range(12):
                await trio.sleep(rng.uniform(0.2, 3.0))
                node = network.nodes[rng.choice(names)]
                if rng.random() < 0.6:
                    await (node.kill() if rng.random() < 0.7 else node.stop())
                    await trio.sleep(rng.choice((0.0, 0.5, 4.0)))
                    await node.start()
                elif network.wires:
                    wire = rng.choice(network.wires)
                    rng.choice((wire.cut, wire.hold, lambda wire=wire: wire.break_for(wire.source)))()
            await settle(network, traffic)
            clients.cancel_scope.cancel()
        traffic.check()
        assert len(traffic.confirmed) > 100
