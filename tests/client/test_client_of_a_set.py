"""A client of a replica set over the network: leaders are killed and hand over, and it finds the next one.

Every send is confirmed and stored once; every message is consumed; nothing that was confirmed comes twice.
"""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pybroker.connect_options import ConnectOptions
from pybroker.errors import SendInDoubt, TransactionError, UnknownDelivery
from pybroker.remote_client import RemoteClient
from tests.client.support import Wires, wires
from tests.engine.sets import Brokers, Embedded, brokers
from tests.engine.support import close_without_thread

Q, OTHER = "/queue/q", "/queue/other"
URLS = {name: f"pybroker://{name}:1" for name in "abc"}
ALL = f"failover:({','.join(URLS.values())})"
OPTIONS = ConnectOptions(deadline=60, reconnect_delay_max=0.5)


@pytest.fixture(autouse=True)
def _no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pybroker.broker.close_store", close_without_thread)


def serve(net: Wires, one: Embedded) -> None:
    async def answer(stream: trio.abc.Stream) -> None:
        await one.broker._server.serve_stream(stream, native=True)

    net.serve(URLS[one.name], answer)


async def change_leader(net: Wires, group: Brokers, how: str) -> None:
    leader = await group.settled()
    if how == "handover":
        await leader.broker.hand_over()
    else:
        net.close(URLS[leader.name])
        net.cut(URLS[leader.name])
        await leader.kill()
        await group.leader()
        await leader.start()
        serve(net, leader)
    await group.settled()


async def drained(client: RemoteClient, destination: str) -> list[str]:
    found: list[str] = []
    async with client.subscribe(destination) as messages:
        while True:
            with trio.move_on_after(5):
                batch = await messages.receive_batch(100)
                found += [message.header("id") or "" for message in batch]
                await messages.ack(batch)
                continue
            return found


@pytest.mark.parametrize("how", ["kill", "handover"])
async def test_every_send_is_stored_once(autojump_clock: MockClock, how: str) -> None:
    async with wires() as net, brokers() as group:
        for one in group.all.values():
            serve(net, one)
        await group.settled()
        async with net.client(ALL, options=OPTIONS) as client:
            over = trio.Event()
            sent: list[str] = []

            async def publish() -> None:
                async with client.publisher(max_in_flight=20) as publisher:
                    while not over.is_set():
                        ids = [str(len(sent) + number) for number in range(3)]
                        sent.extend(ids)
                        await publisher.send_many([(Q, b"x", {"id": id}) for id in ids])
                        await trio.sleep(0.01)
                assert publisher.confirmed == len(sent)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(publish)
                for _ in range(3):
                    await trio.sleep(0.5)
                    await change_leader(net, group, how)
                over.set()
            assert len(sent) > 200
            assert await drained(client, Q) == sent
            assert client.statistics().in_doubt == 0
            assert client.statistics().connections >= 4


@pytest.mark.parametrize("how", ["kill", "handover"])
async def test_every_message_is_moved_once(autojump_clock: MockClock, how: str) -> None:
    """Consumed and sent on in transactions, while leaders change: each of them is all or nothing."""
    async with wires() as net, brokers() as group:
        for one in group.all.values():
            serve(net, one)
        await group.settled()
        ids = [str(number) for number in range(300)]
        async with net.client(ALL, options=OPTIONS) as client:
            async with client.publisher() as publisher:
                await publisher.send_many([(Q, b"x", {"id": id}) for id in ids])
            moved: list[str] = []
            doubts = 0

            async def move() -> None:
                nonlocal doubts
                async with client.subscribe(Q, prefetch=10) as messages:
                    while len(moved) < len(ids):
                        message = await messages.receive()
                        id = message.header("id") or ""
                        try:
                            async with client.transaction() as transaction:
                                await transaction.send(OTHER, b"x", {"id": id})
                                await transaction.ack(message)
                        except (UnknownDelivery, TransactionError):
                            continue  # for certain
                        except SendInDoubt:
                            doubts += 1
                            continue
                        moved.append(id)
                        await trio.sleep(0.01)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(move)
                for _ in range(3):
                    await trio.sleep(0.5)
                    await change_leader(net, group, how)
            assert doubts == 0, "the same set knows"
            assert sorted(moved, key=int) == ids
            assert sorted(await drained(client, OTHER), key=int) == ids
            assert await drained(client, Q) == []
