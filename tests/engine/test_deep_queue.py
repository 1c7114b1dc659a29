"""A queue far deeper than its window: in order, exactly once, in bounded memory (DESIGN.md section 4, P3 and P6)."""

# ruff: noqa: SIM117 (whole blocks are what is tested, and the nesting shows what ends first)
from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from pybroker.broker import Broker, open_broker
from tests.engine.support import check, check_empty, engine_of

Q = "/queue/deep"
COUNT = 20_000
WINDOW = 64
BODY = 200  # bytes
SEED = 20_240_611


async def fill(broker: Broker, rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Send `count` messages of mixed priorities and durability; (-priority, number) of each, in delivery order."""
    sent: list[tuple[int, int]] = []
    most = 0
    async with broker.connect() as client, client.publisher(max_in_flight=500) as publisher:
        for number in range(count):
            priority = rng.choice((0, 4, 4, 4, 9))
            durable = rng.random() < 0.5
            body = number.to_bytes(4, "big") * (BODY // 4)
            await publisher.send(Q, body, durable=durable, priority=priority)
            sent.append((-priority, number))
            if number % 997 == 0:
                most = max(most, engine_of(broker).core.memory_bytes)
    # the window; what is behind it is in the store or the spool
    assert most < 20 * WINDOW * (BODY + 1_000)
    return sorted(sent)


@pytest.mark.parametrize("on_disk", [False, True])
async def test_a_deep_queue_comes_out_in_order_exactly_once(tmp_path: Path, on_disk: bool) -> None:
    rng = random.Random(SEED)
    limits = {"window_messages_max": WINDOW, "window_bytes_max": 1 << 20}
    async with open_broker(data_dir=tmp_path if on_disk else None, limits=limits) as broker:
        expected = await fill(broker, rng, COUNT)
        core = engine_of(broker).core
        assert core.spooled > COUNT // 4
        check(broker)
        received: list[tuple[int, int]] = []
        most = 0
        async with broker.connect() as client, client.subscribe(Q, prefetch=100) as messages:
            while len(received) < COUNT:
                batch = await messages.receive_batch(100)
                for message in batch:
                    number = int.from_bytes(message.body[:4], "big")
                    assert message.body == message.body[:4] * (BODY // 4)
                    assert not message.redelivered
                    received.append((-message.priority, number))
                most = max(most, core.memory_bytes)
                if len(received) % 17 == 0:
                    check(broker)
                await messages.ack(batch)
            with trio.move_on_after(0.1):
                extra = await messages.receive()
                raise AssertionError(f"one too many: {extra}")
        assert received == expected
        assert most < (100 + 4 * WINDOW) * (BODY + 1_000)
        check_empty(broker)


async def test_a_deep_queue_with_consumers_that_give_back() -> None:
    """Competing consumers, rejections, higher priorities coming in meanwhile: each exactly once, none lost."""
    rng = random.Random(SEED + 1)
    count = 4_000
    limits = {"window_messages_max": 16}
    async with open_broker(limits=limits, delivery={"deliveries_max": 1_000}) as broker:
        seen: dict[int, int] = {}

        async def consume() -> None:
            while len(seen) < count:
                async with broker.connect() as client:
                    async with client.subscribe(Q, prefetch=rng.choice((1, 3, 50))) as messages:
                        for _ in range(rng.randrange(100)):
                            with trio.move_on_after(0.01) as waiting:  # it may keep all that it may have
                                message = await messages.receive()
                            if waiting.cancelled_caught:
                                break
                            if rng.random() < 0.1:
                                await message.nack()
                            elif rng.random() < 0.9:
                                number = int.from_bytes(message.body[:4], "big")
                                await message.ack()
                                seen[number] = seen.get(number, 0) + 1
                check(broker)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill, broker, rng, count)
            for _ in range(3):
                nursery.start_soon(consume)
        assert sorted(seen) == list(range(count))
        assert set(seen.values()) == {1}
        check_empty(broker)
