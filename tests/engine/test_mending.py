"""Bad values under a running engine: the leader of a real set of followers, or a made-up copy to ask, on virtual time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from pybroker.config import BrokerConfig, Limits
from pybroker.core.invariants import check_invariants
from pybroker.engine import Engine
from pybroker.local_client import LocalClient
from pybroker.mending import RETRY_INTERVAL, Fetch
from pybroker.operations import order_of
from pybroker.spool import Spool
from pybroker.store import format as fmt
from pybroker.store.memory import MemoryBackend
from pybroker.store.store import Store
from tests.cluster.replicas import Led, Set, caught_up, replica_set
from tests.store.forgetful import ForgetfulBackend

BODIES = [b"message %d" % number for number in range(30)]
CONFIG = BrokerConfig(limits=Limits(window_messages_max=8))
QUEUE = "/queue/a"


def place(number: int) -> bytes:
    """The key of a message in the first queue."""
    return fmt.message_key(1, order_of(4, number))


async def leading(nodes: Set) -> Led:
    led = nodes.lead("a", 1)
    for name in "bc":
        nodes.follow(name, "a", 1)
    await led.begin()
    await caught_up(nodes, led, "b", "c")
    return led


@asynccontextmanager
async def running(store: Store, fetch: Fetch | None = None, committer: Any = None) -> AsyncIterator[Engine]:
    """An engine on a store, which a test may spoil."""
    store.reload()
    engine = Engine(CONFIG, store, Spool(lambda: Store.open(MemoryBackend())), committer=committer, fetch=fetch)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        yield engine
        check_invariants(engine.core)
        engine.journal.close()


@asynccontextmanager
async def led_engine(led: Led) -> AsyncIterator[Engine]:
    async with running(led.node.store, led.leader.fetch, led.leader) as engine:
        yield engine


async def send(engine: Engine, bodies: Sequence[bytes] = BODIES) -> None:
    async with LocalClient(lambda: engine) as client:
        for body in bodies:
            await client.send(QUEUE, body)


async def receive(engine: Engine, seconds: float = 3.0) -> list[bytes]:
    """Everything that comes, acknowledged."""
    found: list[bytes] = []
    async with LocalClient(lambda: engine) as client, client.subscribe(QUEUE, prefetch=5) as messages:
        with trio.move_on_after(seconds):
            async for message in messages:
                found.append(message.body)
                await message.ack()
    return found


def flip(nodes: Set, name: str, key: bytes) -> None:
    nodes[name].copies.backend.flip(key, 77)  # type: ignore[attr-defined]


async def test_a_leader_s_bad_message_is_fetched_and_delivered_once_in_its_place(autojump_clock):
    async with replica_set() as nodes:
        led = await leading(nodes)
        async with led_engine(led) as engine:
            await send(engine)
        await caught_up(nodes, led, "b", "c")
        for number in (0, 11, 12, 29):
            flip(nodes, "a", place(number))
        flip(nodes, "b", place(11))  # the other follower has it
        async with led_engine(led) as engine:
            assert await receive(engine) == BODIES
            assert engine.mender is not None
            assert (engine.mender.mended, engine.mender.left) == (4, 0)
            [queue] = engine.core.queues.values()
            assert (queue.count, queue.counts.corrupt) == (0, 0)
        await caught_up(nodes, led, "b", "c")
        assert led.lost is None


async def test_what_was_fetched_is_written_on_every_copy(autojump_clock):
    async with replica_set() as nodes:
        led = await leading(nodes)
        async with led_engine(led) as engine:
            await send(engine)
        await caught_up(nodes, led, "b", "c")
        flip(nodes, "a", place(3))
        flip(nodes, "b", place(3))
        async with (
            led_engine(led) as engine,
            LocalClient(lambda: engine) as client,
            client.subscribe(QUEUE, prefetch=5) as messages,
        ):
            taken = await messages.receive_batch(5)
            assert [message.body for message in taken][3] == BODIES[3]
        await caught_up(nodes, led, "b", "c")  # all three hold the same, and
        assert led.node.store.backend.get(place(3)) is not None
        assert not led.node.store.read_page(1, 0, 100, 1 << 20).corrupt


async def test_what_every_copy_has_bad_is_never_delivered_but_counted_and_taken_up_when_one_is_whole(autojump_clock):
    async with replica_set(scrub_interval=0) as nodes:
        led = await leading(nodes)
        async with led_engine(led) as engine:
            await send(engine)
        await caught_up(nodes, led, "b", "c")
        whole = led.node.store.backend.get(place(7))
        for name in "abc":
            flip(nodes, name, place(7))
        async with led_engine(led) as engine:
            assert await receive(engine) == BODIES[:7] + BODIES[8:]
            [queue] = engine.core.queues.values()
            assert (queue.count, queue.counts.corrupt) == (1, 1)
            await trio.sleep(3 * RETRY_INTERVAL)
            assert engine.mender is not None
            assert (engine.mender.mended, engine.mender.left, queue.counts.corrupt) == (0, 1, 1)
            nodes["c"].copies.backend.set(place(7), whole)  # type: ignore[attr-defined]
            assert await receive(engine, 2 * RETRY_INTERVAL) == [BODIES[7]]
            assert (engine.mender.mended, engine.mender.left) == (1, 0)
            assert (queue.count, queue.counts.corrupt) == (0, 0)
        await caught_up(nodes, led, "b", "c")


async def test_without_another_copy_a_bad_message_is_counted_and_the_others_are_delivered(autojump_clock):
    backend = ForgetfulBackend()
    async with running(Store.open(backend)) as engine:
        await send(engine)
    backend.flip(place(7), 77)
    async with running(Store.open(backend)) as engine:
        assert await receive(engine) == BODIES[:7] + BODIES[8:]
        [queue] = engine.core.queues.values()
        assert (queue.count, queue.counts.corrupt) == (1, 1)


async def test_a_page_waits_for_values_and_what_comes_meanwhile_has_its_place_behind(autojump_clock):
    backend = ForgetfulBackend()
    async with running(Store.open(backend)) as engine:
        await send(engine)
    whole = backend.get(place(4))
    assert whole is not None
    backend.flip(place(4), 77)
    asked, answer = trio.Event(), trio.Event()

    async def fetch(keys: Sequence[bytes]) -> Mapping[bytes, bytes]:
        assert list(keys) == [place(4)]
        asked.set()
        await answer.wait()
        return {place(4): whole}

    async with running(Store.open(backend), fetch) as engine, trio.open_nursery() as nursery:
        found: list[bytes] = []

        async def consume() -> None:
            found.extend(await receive(engine))

        nursery.start_soon(consume)
        await asked.wait()
        await send(engine, [b"late"])
        answer.set()
        await trio.sleep(5)
        assert found == [*BODIES, b"late"]
