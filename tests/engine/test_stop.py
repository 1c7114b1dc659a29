"""The end of a broker, and two of them in one process. A graceful stop commits what was taken, and is bounded in time."""

# ruff: noqa: ASYNC110, PT012, SIM117 (whole blocks are what is tested, and the nesting shows what ends first)
from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import trio

from pybroker.broker import Broker, open_broker
from pybroker.errors import BrokerClosed, BrokerError, StoreLocked, SubscriptionError
from pybroker.stomp_remote import connect_stomp
from tests.crash.wire import Connection
from tests.engine.support import OWNER, Disk, broker_on, check, drain

Q = "/queue/q"
SENDS_MAX = 5_000  # after which a sender should have been stopped
SLACK = 4.0  # seconds that a busy machine may take beside the bound


def port_of(broker: Broker) -> int:
    return int(broker.listeners[0].rpartition(":")[2])


async def deaf_client(broker: Broker, destination: str) -> socket.socket:
    """A STOMP client that subscribes and then reads nothing."""
    sock = socket.create_connection(("127.0.0.1", port_of(broker)))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.sendall(b"CONNECT\naccept-version:1.2\nhost:h\n\n\0")
    sock.sendall(b"SUBSCRIBE\nid:1\nack:auto\ndestination:" + destination.encode() + b"\n\n\0")
    while not any(row.consumers for row in broker.statistics().destinations):
        await trio.sleep(0.01)
    return sock


async def test_a_stop_is_bounded_with_a_client_that_never_reads(tmp_path: Path) -> None:
    deaf = None
    async with open_broker(data_dir=tmp_path, listen=["stomp://127.0.0.1:0"], stop_timeout=0.5) as broker:
        deaf = await deaf_client(broker, Q)
        async with broker.connect() as client, client.publisher() as publisher:
            for _ in range(200):
                await publisher.send(Q, bytes(65_536))
        began = time.monotonic()
    took = time.monotonic() - began
    deaf.close()
    assert 0.4 < took < 0.5 + SLACK
    async with open_broker(data_dir=tmp_path) as broker:  # what it had not taken is there
        (row,) = [row for row in broker.statistics().destinations if row.name == "q"]
        assert 100 < row.depth <= 200
        check(broker)


async def test_a_stop_is_quick_with_clients_that_listen(tmp_path: Path) -> None:
    ended: list[str] = []

    async def listen(url: str, task_status: trio.TaskStatus[None]) -> None:
        async with connect_stomp(url) as client:
            await client.subscribe(Q, "client-individual", 10)
            task_status.started()
            message = await client.receive()
            with pytest.raises(BrokerError, match="stopping") as caught:
                await client.receive()
            ended.append(f"{message.header('id')}: {caught.value}")

    async with trio.open_nursery() as nursery:
        async with open_broker(data_dir=tmp_path, listen=["stomp://127.0.0.1:0"]) as broker:
            for _ in range(3):
                await nursery.start(listen, broker.listeners[0])
            async with broker.connect() as client:
                for number in range(3):
                    await client.send(Q, b"", {"id": str(number)})
            await trio.sleep(0.1)
            began = time.monotonic()
        assert time.monotonic() - began < SLACK
    assert sorted(text[0] for text in ended) == ["0", "1", "2"]
    async with open_broker(data_dir=tmp_path) as broker, broker.connect() as client:
        async with client.subscribe(Q) as messages:
            batch = [await messages.receive() for _ in range(3)]
        assert [(message.header("id"), message.redelivered) for message in batch] == [
            ("0", True),
            ("1", True),
            ("2", True),
        ]


async def test_after_its_receipt_a_disconnect_has_given_everything_back() -> None:
    """Also when the peer keeps its end of the socket open: its durable subscription can be taken up by the next one."""
    subscribe = ("id", "1"), ("destination", "/topic/t"), ("ack", "client"), ("activemq.subscriptionName", "s")

    def run(port: int) -> list[str]:
        seen = []
        connections = []
        for number in range(5):
            connection = Connection(port, "owner")
            connections.append(connection)
            connection.send("SUBSCRIBE", *subscribe, ("receipt", "subscribed"))
            frames = connection.receipt("subscribed")
            if number == 0:
                connection.send("SEND", ("destination", "/topic/t"), ("receipt", "sent"), body=b"x")
                frames = connection.receipt("sent")
            frames = frames or connection.wait(5)
            seen += [frame.headers["redelivered"] for frame in frames]
            connection.send("DISCONNECT", ("receipt", "bye"))
            connection.receipt("bye")
        for connection in connections:
            connection.close()
        return seen

    async with open_broker(listen=["stomp://127.0.0.1:0"]) as broker:
        began = time.monotonic()
        seen = await trio.to_thread.run_sync(run, port_of(broker))
        assert time.monotonic() - began < SLACK
    assert seen == ["false", "true", "true", "true", "true"]


async def test_a_stop_commits_and_confirms_what_was_taken(tmp_path: Path) -> None:
    """Sends whose receipts wait for the disk when the stop begins get them."""
    receipts = b""
    async with trio.open_nursery() as nursery:
        async with open_broker(data_dir=tmp_path, listen=["stomp://127.0.0.1:0"]) as broker:
            stream = await trio.open_tcp_stream("127.0.0.1", port_of(broker))
            await stream.send_all(b"CONNECT\naccept-version:1.2\nhost:h\n\n\0")
            await stream.receive_some()
            frames = [f"SEND\ndestination:{Q}\nreceipt:r{number}\n\nx\0".encode() for number in range(300)]
            await stream.send_all(b"".join(frames))

            async def read() -> None:
                nonlocal receipts
                while data := await stream.receive_some():
                    receipts += data

            nursery.start_soon(read)
    confirmed = receipts.count(b"RECEIPT\n")
    assert b"ERROR\n" in receipts
    async with open_broker(data_dir=tmp_path) as broker:
        depth = sum(row.depth for row in broker.statistics().destinations)
        assert confirmed == depth


async def test_clients_of_this_process_are_told_of_the_stop(autojump_clock: trio.testing.MockClock) -> None:
    """Also those that other tasks use: nobody waits for a broker that has gone."""
    told: list[str] = []

    async def receive(broker: Broker) -> None:
        async with broker.connect() as client, client.subscribe(Q) as messages:
            with pytest.raises(BrokerClosed):
                while True:
                    await messages.receive()
            told.append("receive")

    async def send(broker: Broker) -> None:
        async with broker.connect() as client:
            with pytest.raises(BrokerClosed):
                for _ in range(SENDS_MAX):
                    await client.send("/queue/other", b"")
            told.append("send")

    async def publish(broker: Broker) -> None:
        async with broker.connect() as client:
            with pytest.raises(BrokerError):
                async with client.publisher() as publisher:
                    for _ in range(SENDS_MAX):
                        await publisher.send("/queue/third", b"")
            told.append("publish")

    with trio.move_on_after(60):
        async with trio.open_nursery() as nursery:
            async with broker_on(Disk()) as broker:
                for task in (receive, send, publish):
                    nursery.start_soon(task, broker)
                for _ in range(100):  # the virtual clock stands still while the senders run
                    await trio.lowlevel.checkpoint()
    assert sorted(told) == ["publish", "receive", "send"]


async def test_a_client_that_is_closed_ends_what_its_other_tasks_wait_for(
    autojump_clock: trio.testing.MockClock,
) -> None:
    ended: list[str] = []
    async with broker_on(Disk()) as broker:
        with trio.move_on_after(60):
            async with trio.open_nursery() as nursery:
                async with broker.connect() as client:

                    async def receive() -> None:
                        async with client.subscribe(Q) as messages:
                            with pytest.raises((BrokerClosed, SubscriptionError)):
                                await messages.receive()
                            ended.append("receive")

                    nursery.start_soon(receive)
                    await trio.testing.wait_all_tasks_blocked()
        assert ended == ["receive"]


async def test_a_stop_while_a_write_hangs_waits_for_the_disk_and_confirms(
    autojump_clock: trio.testing.MockClock,
) -> None:
    disk = Disk()
    confirmed: list[str] = []

    async def send(broker: Broker) -> None:
        async with broker.connect() as client:
            await client.send(Q, b"", {"id": "a"})
            confirmed.append("a")

    async with trio.open_nursery() as nursery:
        async with broker_on(disk) as broker:
            disk.shut()
            nursery.start_soon(send, broker)
            await trio.testing.wait_all_tasks_blocked()

            async def release() -> None:
                await trio.sleep(3)
                assert not confirmed
                disk.gate.set()

            nursery.start_soon(release)
    assert confirmed == ["a"]
    async with broker_on(Disk(disk.backend.synced)) as broker:
        assert [message.id for message in (await drain(broker, Q))[Q]] == ["a"]


async def test_two_brokers_in_one_process_know_nothing_of_each_other(tmp_path: Path) -> None:
    listen = ["stomp://127.0.0.1:0"]
    async with (
        open_broker(data_dir=tmp_path / "a", listen=listen, name="a") as first,
        open_broker(data_dir=tmp_path / "b", listen=listen, name="b") as second,
        open_broker(name="c") as third,
    ):
        brokers = (first, second, third)
        assert first.listeners != second.listeners
        for broker in brokers:
            name = broker.config.name
            async with broker.connect(OWNER) as client:
                async with client.subscribe("/topic/t", durable_name="same"):
                    pass
                await client.send(Q, name.encode())
                await client.send("/topic/t", name.encode())
        for broker in brokers:
            name = broker.config.name.encode()
            rows = {row.kind: row.depth for row in broker.statistics().destinations}
            assert rows == {"queue": 1, "subscription": 1}
            async with broker.connect(OWNER) as client:
                for destination, durable in ((Q, None), ("/topic/t", "same")):
                    async with client.subscribe(destination, durable_name=durable) as messages:
                        message = await messages.receive()
                        assert message.body == name
                        await message.ack()
        with pytest.raises(StoreLocked):
            async with open_broker(data_dir=tmp_path / "a"):
                pass
        async with connect_stomp(second.listeners[0]) as client:  # the refused one did the others no harm
            await client.send(Q, b"still here")
        async with first.connect() as one:
            await one.send(Q, b"still here")
    async with open_broker(data_dir=tmp_path / "a") as again:
        check(again)
