"""Named stories of a network: what other brokers were known to do wrong, and what an operator will do one day.

Each is a story with its options, and ends with the checks that every run ends with (`NetSimulation.finish`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import product

import trio

from pybroker.config import DeliveryPolicy
from pybroker.errors import SendInDoubt
from pybroker.remote_client import RemoteClient
from tests.sim.net_clients import QUEUES, Drain, Receiver, Sender, client_of
from tests.sim.net_simulation import NetOptions, NetSimulation, linked, mesh

QUEUE = QUEUES[0]
SOON = 10.0  # seconds in which what is not disturbed any more has to have happened
PROMPT = 0.5  # seconds that a send may take where nothing is wrong


async def started(sim: NetSimulation) -> None:
    sim.start_all()
    for each in sim.live_sets():
        await sim.serving(each.name)


@asynccontextmanager
async def client_at(sim: NetSimulation, name: str, set_name: str) -> AsyncIterator[RemoteClient]:
    async with client_of(sim, name, sim.sets[set_name].names, sim.rng) as client:
        yield client


async def send(sim: NetSimulation, who: str, set_name: str, count: int) -> list[str]:
    """Send to the queue by one set; returns the messages' names."""
    names = []
    async with client_at(sim, who, set_name) as client:
        for number in range(count):
            name = f"{who}-{number}"
            body = f"{name}|".encode()
            sim.account.attempt(name, body)
            await client.send(QUEUE, body)
            sim.account.confirm(name, trio.current_time())
            names.append(name)
    return names


async def acknowledged(sim: NetSimulation, names: Sequence[str], seconds: float, otherwise: str) -> None:
    await sim.until(
        lambda: all(sim.account.sent[name].copy().acked_at is not None for name in names), seconds, otherwise
    )


def consume(sim: NetSimulation, who: str, set_name: str) -> Drain:
    """A consumer that takes all, until the clients are ended."""
    consumer = Drain(sim, who, sim.sets[set_name].names, QUEUE)
    sim.run_client(consumer)
    return consumer


# ---- ActiveMQ's stuck messages

STUCK = NetOptions(
    sizes={"a": 1, "b": 1, "c": 1},
    pairs=linked("ab", "bc"),
    senders=0,
    receivers=0,
    delivery=DeliveryPolicy(deliveries_max=0),
)


async def stuck(sim: NetSimulation) -> None:
    """Messages follow a consumer along a chain and back: also to the broker that they came from, as soon as it is wanted there."""
    await started(sim)
    names = await send(sim, "first", "a", 10)
    for number, where in enumerate("bcbacab"):
        who = f"holder{number}"
        async with (
            client_at(sim, who, where) as client,
            client.subscribe(QUEUE, ack="individual", prefetch=100) as subscription,
        ):
            seen: set[str] = set()
            with trio.move_on_after(SOON):
                while len(seen) < len(names):
                    seen |= {message.message_id for message in await subscription.receive_batch(100)}
            if len(seen) < len(names):
                sim.findings.add(f"the consumer at {where} got {len(seen)} of {len(names)}: {sim.left()}")
    consume(sim, "last", "a")
    await acknowledged(sim, names, SOON, "what its consumers left is stuck")
    await sim.finish()


# ---- the bridge that dies silently in its hand-shake

SILENT = NetOptions(sizes={"a": 1, "b": 1}, pairs=linked("ab"), senders=0, receivers=0)
STEPS = (
    0,
    1,
    2,
    3,
    4,
)  # pieces that get through: none, one frame of the hand-shake after the other, the first of the link


async def silent_bridge(sim: NetSimulation) -> None:
    """Whatever a link's peer has said last before it stops answering: the link is given up, and made again."""
    await started(sim)
    consume(sim, "consumer", "b")
    await acknowledged(sim, await send(sim, "before", "a", 1), SOON, "there is no link to begin with")
    for number, (there, back) in enumerate(product((*STEPS, None), repeat=2)):
        if there is None and back is None:
            continue
        for ends in (("a1", "b1"), ("b1", "a1")):
            sim.network.chokes[ends] = [(there, back)]
        sim.network.reset("a1", "b1")
        names = await send(sim, f"round{number}", "a", 3)
        await acknowledged(sim, names, 2 * SOON, f"the link that was choked after {there}, {back} pieces stays dead")
    if sim.counts["connections choked"] < 2 * len(STEPS):
        sim.findings.add(f"only {sim.counts['connections choked']} connections were choked")
    await sim.finish()


# ---- a leader killed while messages are forwarded

FAILOVER = NetOptions(sizes={"a": 3, "b": 3}, pairs=linked("ab"), senders=0, receivers=0, pause=0.02)


async def killed_leaders(sim: NetSimulation, sets: str = "aabbab", rounds: int = 1) -> None:
    """The leader that forwards, and the one that takes, are killed again and again, in the middle of it."""
    await started(sim)
    consumer = Receiver(sim, "r0", sim.sets["b"].names, QUEUE)
    sim.run_client(consumer)
    for number in range(2):
        sim.run_client(Sender(sim, f"s{number}", sim.sets["a"].names))
    await trio.sleep(1.0)
    for name in sets * rounds:
        before = sim.account.forwarded
        with trio.move_on_after(SOON):
            while sim.account.forwarded < before + 3:  # noqa: ASYNC110
                await trio.sleep(sim.rng.uniform(0.001, 0.03))
        member = await sim.serving(name)
        member.kill(sim.rng.random() < 0.3)
        await trio.sleep(sim.rng.uniform(0.1, 1.0))
        if member.life is None:
            member.start()
        await sim.serving(name)
    await sim.finish()


# ---- a node joins under load

JOINING = NetOptions(sizes={"a": 3, "b": 1, "c": 1}, senders=0, receivers=0, pause=0.05)


async def joining(sim: NetSimulation) -> None:
    """A broker joins by announcing itself: nobody loses a connection or waits, and its consumers get their share."""
    sim.sets["c"].absent = True
    await started(sim)
    slowest = 0.0
    over = False

    async def load(who: str, set_name: str) -> None:
        nonlocal slowest
        number = 0
        async with client_at(sim, who, set_name) as client:
            while not over:
                number += 1
                name = f"{who}-{number}"
                body = f"{name}|".encode()
                sim.account.attempt(name, body)
                began = trio.current_time()
                await client.send(QUEUE, body)
                sim.account.confirm(name, trio.current_time())
                slowest = max(slowest, trio.current_time() - began)
                await trio.sleep(0.02)
            if client.statistics().connections > 1:
                sim.findings.add(f"{who} lost its connection to set {set_name}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(load, "la", "a")
        nursery.start_soon(load, "lb", "b")
        consume(sim, "consumer", "b")
        await trio.sleep(3.0)
        sim.sets["c"].absent = False
        sim.start_all()
        newcomer = consume(sim, "newcomer", "c")
        await sim.until(
            lambda: any(message.copy().ack_tried == newcomer.name for message in sim.account.sent.values()),
            SOON,
            "the consumer at the broker that joined gets nothing",
        )
        await trio.sleep(2.0)
        over = True
    if slowest > PROMPT:
        sim.findings.add(f"a send took {slowest:.3f} s while a broker joined")
    await sim.finish()


# ---- a set that will not come back

REMOVED = NetOptions(sizes={"a": 3, "b": 1, "c": 1}, pairs=mesh("abc"), senders=0, receivers=0)


async def removed(sim: NetSimulation) -> None:
    """What is on its way to a dead set returns when an operator removes it, marked, and goes to others."""
    await started(sim)
    async with client_at(sim, "holder", "b") as client, client.subscribe(QUEUE, ack="individual", prefetch=3):
        await sim.until(lambda: f"a: {QUEUE}" in sim.demanded(), SOON, "demand does not come")
        sim.network.cut("b1", "a1"), sim.network.cut("b1", "a2"), sim.network.cut("b1", "a3")
        names = await send(sim, "first", "a", 5)  # they arrive there, and nobody hears of it
        await trio.sleep(0.5)
        sim["b1"].kill(silently=True)
        sim.sets["b"].absent = True
    consume(sim, "consumer", "c")
    await trio.sleep(5.0)
    waiting = [name for name in names if sim.account.sent[name].copy().acked_at is not None]
    if waiting:
        sim.findings.add(f"{waiting} may be at b, and were given to somebody else")
    sim.account.removed.add("b")
    member = await sim.serving("a")
    assert member.life is not None
    count = await member.life.broker.remove_peer("b")
    if count != len(names):
        sim.findings.add(f"{count} messages were on their way, not {len(names)}")
    await acknowledged(sim, names, SOON, "what was on its way to the removed set is stuck")
    if not all(
        marked for name in names for _, place, marked in sim.account.sent[name].copy().deliveries if place[0][0] != "b"
    ):
        sim.findings.add("what was on its way to the removed set is not marked as redelivered")
    await sim.finish()


# ---- an id that two brokers have been told

OFFERED = NetOptions(sizes={"a": 1, "b": 1}, pairs=linked("ab"), senders=0, receivers=0)


async def offered_twice(sim: NetSimulation) -> None:
    """A broker lets a client in, who never hears of it, and sends by another one, which goes silent: the first must not take it."""
    sim.network.weather.tear = 0.0  # a frame is one piece
    sim.network.chokes[("s", "a1")] = [(None, 0)] * 3
    sim.network.chokes[("s", "b1")] = [(None, 1)]  # lets the client in, and is not heard any more
    sim.sets["b"].absent = True
    await started(sim)
    body = b"s-1|"
    sim.account.attempt("s-1", body)

    async def begin_late() -> None:
        await trio.sleep(0.5)
        sim.sets["b"].absent = False
        sim.start_all()

    sim.nursery.start_soon(begin_late)
    doubt = False
    async with client_of(sim, "s", ["a1", "b1"], sim.rng) as client:
        sim.network.chokes[("s", "a1")].clear()
        try:
            await client.send(QUEUE, body)
        except SendInDoubt:
            doubt = True
    if not doubt:
        sim.findings.add("a send was repeated to another broker than the one that may have it")
    await sim.finish()
