"""A replica set in a network: its links follow its leader, and nothing that was confirmed is lost or stored twice on the way.

Whole brokers on virtual time: three replicas of the set "s", and one broker of its own, "n".
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio

from pybroker.broker import Broker
from pybroker.cluster.datagrams import Segment
from pybroker.cluster.native_urls import parse_native_url
from pybroker.cluster.replica import Replica
from pybroker.config import BrokerConfig, NetworkConfig
from pybroker.errors import BrokerClosed, BrokerError
from pybroker.keeper import Alone
from pybroker.local_client import LocalClient
from pybroker.network_membership import Membership
from pybroker.replicated import Replicated
from tests.cluster.members import CONFIG
from tests.cluster.replicas import until
from tests.engine.sets import Brokers, Embedded
from tests.engine.support import close_without_thread
from tests.network.brokers import DISCOVERY, Randomness, url
from tests.network.wires import Wire

Q = "/queue/q"


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pybroker.broker.close_store", close_without_thread)
    monkeypatch.setattr("pybroker.keeper.close_store", close_without_thread)


class Networked(Embedded):
    """A replica of the set, or the broker "n" of its own, that takes part in the network."""

    brokers: NetworkedBrokers

    async def start(self) -> None:
        group = self.brokers
        network = group.network_config(self.name)
        name = self.name
        config = BrokerConfig(name=name, network=network)
        membership = Membership(
            config,
            "pybroker/test",
            dial=lambda address: group.dial(name, address),
            open_datagrams=group.segment.open_at(name),
            randomness=Randomness(f"{name} {trio.current_time()}"),
        )
        if name == "n":
            self.broker = Broker(config, Alone(config), membership)
        else:
            self.coordinator = group.zookeeper.connect(name)
            replica = Replica(
                replace(CONFIG, bind=name, clients=(f"stomp://{name}:61613",)),
                name,
                self.copies,
                self.coordinator,
                group.network,
                run_blocking=self._run_blocking,
                rng=self.rng,
            )
            self.broker = Broker(config, Replicated(replica), membership)
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        await group.nursery.start(self._run, self.scope)

    async def kill(self) -> None:
        engine = self.broker._engine
        connections = list(engine.core.connections) if engine is not None else []
        await super().kill()
        self.brokers.cut(self.name)
        for connection in connections:  # clients in the killed process would be gone with it
            if isinstance(connection.sink, LocalClient):
                connection.sink.fail(BrokerClosed("killed"))


class NetworkedBrokers(Brokers):
    def __init__(self, nursery: trio.Nursery, discovery: bool) -> None:
        super().__init__(nursery, {})
        self.discovery = discovery
        self.segment = Segment()
        self.wires: list[Wire] = []
        self.all = {name: Networked(self, name) for name in "abc"}
        self.alone = Networked(self, "n")

    def network_config(self, name: str) -> NetworkConfig:
        own = "n" if name == "n" else "s"
        peers = (",".join(map(url, "abc")),) if name == "n" and not self.discovery else ()
        found = DISCOVERY if self.discovery else ""
        return NetworkConfig(name=own, peers=peers, discovery=found, advertise=(url(name),), secret="secret")

    async def dial(self, source: str, address: str) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        target = parse_native_url(address).host
        one = self.alone if target == "n" else self.all[target]
        if one.broker.role not in ("leader", "standalone"):
            raise ConnectionRefusedError(f"{target} does not listen")
        wire = Wire(source, target)
        self.wires.append(wire)
        self.nursery.start_soon(one.broker._server.serve_stream, wire.ends[1], True)
        return wire.ends[0]

    def cut(self, name: str) -> None:
        for wire in self.wires:
            if name in (wire.source, wire.target):
                wire.cut()

    def linked(self) -> bool:
        """The broker of its own and the leader of the set, at both ends."""
        leading = self.leading()
        if len(leading) != 1:
            return False
        return all(
            [peer.state for peer in one.broker.network_status().peers] == ["linked"] for one in (self.alone, leading[0])
        )


@asynccontextmanager
async def a_set_and_one(discovery: bool) -> AsyncIterator[NetworkedBrokers]:
    async with trio.open_nursery() as nursery:
        group = NetworkedBrokers(nursery, discovery)
        await nursery.start(group.zookeeper.run)
        for one in (*group.all.values(), group.alone):
            await one.start()
        await group.settled()
        await until(group.linked, 10.0)
        yield group
        nursery.cancel_scope.cancel()


async def produce(broker: Any, confirmed: set[int], count: int) -> None:
    """Send numbers to whoever `broker()` is; those in doubt are not counted, and not sent again."""
    sent = 0
    while len(confirmed) < count:
        try:
            async with broker().connect() as client:
                while len(confirmed) < count:
                    sent += 1
                    await client.send(Q, b"%d" % sent)
                    confirmed.add(sent)
                    await trio.sleep(0.01)
        except BrokerError:
            await trio.sleep(0.1)


async def consume(broker: Any, seen: set[int], firsts: list[int]) -> None:
    while True:
        try:
            async with broker().connect() as client, client.subscribe(Q) as messages:
                async for message in messages:
                    seen.add(int(message.body))
                    if not message.redelivered:
                        firsts.append(int(message.body))
                    await message.ack()
        except BrokerError:
            await trio.sleep(0.05)


@pytest.mark.parametrize("discovery", [False, True])
@pytest.mark.parametrize("direction", ["to the set", "from the set"])
@pytest.mark.parametrize("how", ["kill", "hand over", "stop", "lose"])
async def test_the_link_follows_the_leader_without_loss_or_repeat(
    autojump_clock: trio.abc.Clock, discovery: bool, direction: str, how: str
) -> None:
    async with a_set_and_one(discovery) as group:
        confirmed: set[int] = set()
        seen: set[int] = set()
        firsts: list[int] = []

        def the_set() -> Broker:
            leading = group.leading()
            return (leading[0] if leading else next(iter(group.all.values()))).broker

        def the_one() -> Broker:
            return group.alone.broker

        source, target = (the_one, the_set) if direction == "to the set" else (the_set, the_one)
        async with trio.open_nursery() as clients:
            clients.start_soon(produce, source, confirmed, 600)
            clients.start_soon(consume, target, seen, firsts)
            for round_ in range(3):
                await trio.sleep(random.Random(f"{how} {round_}").uniform(0.5, 1.5))
                leader = await group.leader()
                if how == "kill":
                    await leader.kill()
                elif how == "hand over":
                    await leader.broker.hand_over()
                elif how == "stop":
                    await leader.broker._stop()
                else:
                    group.network.cut(leader.name)
                began = trio.current_time()
                await until(lambda: leader not in group.leading() and group.linked(), 10.0)  # noqa: B023
                assert trio.current_time() - began < (6.0 if how == "lose" else 1.0)
                if how in ("kill", "stop"):
                    await leader.start()
                group.network.silent.discard(leader.name)
                await group.settled()
            await until(lambda: len(confirmed) >= 600 and confirmed <= seen, 30.0)
            await trio.sleep(2)
            clients.cancel_scope.cancel()
        assert confirmed <= seen
        assert len(firsts) == len(set(firsts))
        await until(group.linked, 10.0)
        for broker in (the_set(), the_one()):
            assert [peer.waiting for peer in broker.network_status().peers] == [0]


async def test_a_set_that_hands_over_is_linked_again_at_once(autojump_clock: trio.abc.Clock) -> None:
    async with a_set_and_one(discovery=True) as group:
        leader = await group.leader()
        await leader.broker.hand_over()
        began = trio.current_time()
        await until(group.linked, 5.0)
        assert trio.current_time() - began < 0.5


async def test_a_broker_that_stops_takes_leave(autojump_clock: trio.abc.Clock) -> None:
    async with a_set_and_one(discovery=True) as group:
        leader = await group.leader()
        link = next(iter(leader.broker._membership._running._links.values()))  # type: ignore[union-attr]
        began = trio.current_time()
        await group.alone.broker._stop()
        assert trio.current_time() - began < 1.0
        assert link.code == "bye"
        assert leader.broker._membership.peers.snapshot().peers == {}  # type: ignore[union-attr]
