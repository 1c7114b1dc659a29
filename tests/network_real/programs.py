"""The native programs outside a network of brokers: they send and take by `pybroker.connect`, and write down what they did and saw.

Run as a process of its own: ``python -m tests.network_real.programs DIRECTORY NAME`` with the roles in DIRECTORY/NAME.json, each a
task. Files and ledgers are those of `tests.ensemble.outside`. Here the library's own client connects again and repeats what was
not confirmed; the programs only notice what it could not know (errors, counted by kind). An `address` here is a host.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import sys
import time
import traceback
from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import trio

import pybroker
from pybroker.connect_options import ConnectOptions
from pybroker.errors import BrokerError, BrokerUnavailable, SendInDoubt, TransactionError, UnknownDelivery
from pybroker.remote_client import RemoteClient
from pybroker.subscription import ReceivedMessage, Subscription

TURN = 0.02  # seconds between two looks around
DEADLINE = 60.0  # seconds for which an operation waits for a broker: longer than any fault lasts
KEPT_MAX = 10  # messages that a consumer keeps to itself before it leaves its subscription
HEARTBEAT = 0.25  # seconds
IN_DOUBT = (SendInDoubt, BrokerUnavailable, TransactionError)


class Program:
    """One of them. `spec`: its settings; `ledger`: what it did and saw; `life`: when its last connection was lost, or it began."""

    def __init__(self, directory: Path, process: str, spec: dict[str, Any]) -> None:
        self.directory = directory
        self.process = process
        self.spec = spec
        self.name: str = spec["name"]
        self.random = random.Random(f"{spec['seed']} {self.name}")
        self.errors: Counter[str] = Counter()
        self.life = time.monotonic()
        self.ledger: dict[str, Any] = {"role": spec["role"], "name": self.name, "connections": 0, "errors": self.errors}

    def told(self, what: str) -> bool:
        return (self.directory / what).exists()

    async def wait_told(self, what: str) -> None:
        while not self.told(what):  # noqa: ASYNC110 - it is a file
            await trio.sleep(TURN)

    def ready(self) -> None:
        (self.directory / f"{self.name}.ready").touch()

    async def run(self) -> None:
        await self.wait_told(self.spec.get("after", f"{self.process}.go"))
        self.life = time.monotonic()
        options = ConnectOptions(
            deadline=DEADLINE,
            heartbeat_interval=HEARTBEAT,
            reconnect_delay_max=0.5,
            connect_timeout=1.0,
            discovery_secret=self.spec["secret"],
        )
        async with (
            pybroker.connect(self.spec["url"], client_id=self.spec.get("client_id", ""), options=options) as client,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(self._follow, client)
            await self.serve(client)
            statistics = client.statistics()
            self.ledger["connections"] = statistics.connections
            self.ledger["repeated"] = statistics.repeated
            nursery.cancel_scope.cancel()

    async def _follow(self, client: RemoteClient) -> None:
        async for event in client.events():
            if event.kind == "disconnected":
                self.life = time.monotonic()
                self.errors[str(event.error)] += 1

    @abstractmethod
    async def serve(self, client: RemoteClient) -> None:
        """Use a client until there is nothing more to do."""


class Sender(Program):
    """Makes messages as `tests.crash.outside.Sender` does, and writes down what id the client gave each."""

    def __init__(self, directory: Path, process: str, spec: dict[str, Any]) -> None:
        super().__init__(directory, process, spec)
        self.sent: dict[str, dict[str, Any]] = {}
        self.ledger |= {"sent": self.sent, "once": True}
        self.began = 0.0

    def make(self, destination: str) -> tuple[str, bytes]:
        id = f"{self.name}-{len(self.sent)}"
        body = f"{id} ".encode() + self.random.randbytes(self.random.choice((10, 100, 100, 1_000, 1_000, 10_000)))
        sha = hashlib.sha256(body).hexdigest()
        self.sent[id] = {"to": destination, "sha": sha, "attempts": 1, "confirmed": None}
        return id, body

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """Note what is not known of sends; their rows stay unconfirmed."""
        try:
            yield
        except IN_DOUBT as error:
            self.errors[type(error).__name__] += 1

    async def wait_pace(self) -> None:
        self.began = self.began or time.monotonic()
        while len(self.sent) > (time.monotonic() - self.began) * self.spec["pace"] and not self.told("finish"):  # noqa: ASYNC110
            await trio.sleep(1 / self.spec["pace"])


class Producer(Sender):
    """Pipelined sends, one publisher after the other, each for as many messages as chance says, up to the window."""

    async def serve(self, client: RemoteClient) -> None:
        with (self.directory / f"{self.name}.times").open("ab", buffering=0) as times:
            while not self.told("finish"):
                ids = []
                async with self.counted():
                    async with client.publisher() as publisher:
                        for _ in range(self.random.randint(1, self.spec["window"])):
                            id, body = self.make(self.spec["destination"])
                            ids.append(id)
                            self.sent[id]["message_id"] = await publisher.send(
                                self.spec["destination"], body, headers={"id": id}
                            )
                    now = time.monotonic()
                    for id in ids:
                        self.sent[id]["confirmed"] = now
                    times.write(struct.pack("d", now) * len(ids))
                    self.ready()
                await self.wait_pace()


class Transactor(Sender):
    """Transactions of several sends to two queues."""

    async def serve(self, client: RemoteClient) -> None:
        transactions: list[dict[str, Any]] = []
        self.ledger["transactions"] = transactions
        with (self.directory / f"{self.name}.times").open("ab", buffering=0) as times:
            while not self.told("finish"):
                transaction: dict[str, Any] = {"ids": [], "end": "commit", "confirmed": None}
                transactions.append(transaction)
                async with self.counted():
                    async with client.transaction() as inside:
                        for number in range(self.random.randrange(1, 8)):
                            destination = self.spec["destinations"][number % 2]
                            id, body = self.make(destination)
                            transaction["ids"].append(id)
                            await inside.send(destination, body, headers={"id": id})
                    transaction["confirmed"] = time.monotonic()
                    times.write(struct.pack("d", transaction["confirmed"]))
                    self.ready()
                await self.wait_pace()


class Consumer(Program):
    """Takes from destinations and acknowledges each message; gives some back, and keeps some to itself."""

    def __init__(self, directory: Path, process: str, spec: dict[str, Any]) -> None:
        super().__init__(directory, process, spec)
        self.deliveries: list[dict[str, Any]] = []
        self.acks: list[dict[str, Any]] = []
        self.ledger |= {"deliveries": self.deliveries, "acks": self.acks, "ack": "individual"}
        self.entered = 0

    async def serve(self, client: RemoteClient) -> None:
        async with trio.open_nursery() as nursery:
            for destination in self.spec["destinations"]:
                nursery.start_soon(self._consume, client, destination)

    async def _consume(self, client: RemoteClient, destination: str) -> None:
        while not self.told("drained"):
            durable = self.name if "client_id" in self.spec else None
            async with client.subscribe(destination, prefetch=self.spec["prefetch"], durable_name=durable) as messages:
                self.entered += 1
                if self.entered >= len(self.spec["destinations"]):
                    self.ready()
                await self._take_all(client, messages, finishing=self.told("finish"))

    async def _take_all(self, client: RemoteClient, messages: Subscription, finishing: bool) -> None:
        """Until what is kept has to go back, or there is nothing more to do."""
        kept = 0
        while kept < KEPT_MAX:
            batch: list[ReceivedMessage] = []
            with trio.move_on_after(TURN):
                batch = await messages.receive_batch(20)
            if not batch and (self.told("drained") or (self.told("finish") and not finishing)):
                return
            rows = [self._note(client, message, messages.destination) for message in batch]
            chances = [1.0 if finishing else self.random.random() for _ in batch]
            kept += sum(chance < 0.01 for chance in chances)
            back = [message for message, chance in zip(batch, chances, strict=True) if 0.01 <= chance < 0.02]
            done = [(message, row) for message, row, chance in zip(batch, rows, chances, strict=True) if chance >= 0.02]
            try:
                if back:
                    await messages.nack(back)
                if done:
                    await self._acknowledge(messages, done)
            except (UnknownDelivery, SendInDoubt) as error:
                self.errors[type(error).__name__] += 1

    async def _acknowledge(self, messages: Subscription, done: list[tuple[ReceivedMessage, dict[str, Any]]]) -> None:
        acks = [{name: row[name] for name in ("message_id", "from", "life", "address")} for _, row in done]
        for ack in acks:
            ack["confirmed"] = None
        self.acks += acks
        await messages.ack([message for message, _ in done])
        now = time.monotonic()
        for ack in acks:
            ack["confirmed"] = now

    def _note(self, client: RemoteClient, message: ReceivedMessage, place: str) -> dict[str, Any]:
        row = {
            "id": message.header("id"),
            "sha": hashlib.sha256(message.body).hexdigest(),
            "message_id": message.message_id,
            "redelivered": "true" if message.redelivered else "false",
            "from": place,
            "reason": message.header("dead-letter-reason"),
            "life": self.life,
            "at": time.monotonic(),
            "address": urlsplit(client.statistics().url).hostname,
        }
        self.deliveries.append(row)
        return row


ROLES: dict[str, type[Program]] = {role.__name__: role for role in (Producer, Transactor, Consumer)}


async def run(directory: Path, process: str, programs: list[Program]) -> None:
    async def fenced(program: Program) -> None:
        try:
            await program.run()
        except (BrokerError, ExceptionGroup):
            (directory / f"{program.name}.failed").write_text(traceback.format_exc())
            os._exit(1)

    async with trio.open_nursery() as nursery:
        for program in programs:
            nursery.start_soon(fenced, program)


def main() -> None:
    directory, process = Path(sys.argv[1]), sys.argv[2]
    specs = json.loads((directory / f"{process}.json").read_text())
    programs = [ROLES[spec["role"]](directory, process, spec) for spec in specs]
    try:
        trio.run(run, directory, process, programs)
    except BaseException:
        (directory / f"{process}.failed").write_text(traceback.format_exc())
        raise
    temporary = directory / f"{process}.ledger.new"
    temporary.write_text(json.dumps([program.ledger for program in programs]))
    temporary.replace(directory / f"{process}.ledger")


if __name__ == "__main__":
    main()
