"""The programs outside: producers and consumers that survive their broker, and write down what they did and saw.

Run as a process of its own: ``python -m tests.crash.outside DIRECTORY NAME`` with the roles in DIRECTORY/NAME.json, each in a
thread. DIRECTORY/address holds the number of the broker's life and its port; files there tell when to finish. The
ledgers go to DIRECTORY/NAME.ledger at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
import threading
import time
import traceback
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.crash.wire import Connection, Disconnected, Frame

RETRY = 0.01  # seconds between two tries to connect
TURN = 0.02  # seconds that a role waits for frames before it looks around

Ledger = dict[str, Any]


class Role:
    """One program. `spec`: its settings; `ledger`: what it did and saw."""

    def __init__(self, directory: Path, spec: dict[str, Any]) -> None:
        self.directory = directory
        self.spec = spec
        self.name: str = spec["name"]
        self.random = random.Random(f"{spec['seed']} {self.name}")
        self.life = 0
        self.ledger: Ledger = {"role": spec["role"], "name": self.name, "connections": 0}

    def told(self, what: str) -> bool:
        return (self.directory / what).exists()

    def connections(self) -> Iterator[Connection]:
        """One session after the other, until the loop over it is left."""
        while True:
            try:
                life, port = map(int, (self.directory / "address").read_text().split())
                connection = Connection(port, self.spec.get("client_id", ""))
            except (Disconnected, FileNotFoundError):
                time.sleep(RETRY)
                continue
            self.life = life
            self.ledger["connections"] += 1
            yield connection

    def run(self) -> None:
        for connection in self.connections():
            try:
                if self.serve(connection):
                    return
            except Disconnected:
                connection.close()

    @abstractmethod
    def serve(self, connection: Connection) -> bool:
        """Use a connection until it ends; True when there is nothing more to do."""

    def ready(self) -> None:
        (self.directory / f"{self.name}.ready").touch()


class Sender(Role):
    """Makes messages: the body says whose it is and which, the rest is noise."""

    def __init__(self, directory: Path, spec: dict[str, Any]) -> None:
        super().__init__(directory, spec)
        self.bodies: dict[str, bytes] = {}
        self.sent: dict[str, dict[str, Any]] = {}
        self.ledger["sent"] = self.sent
        self.began = time.monotonic()
        self.made = 0

    def make(self, destination: str) -> str:
        id = f"{self.name}-{self.made}"
        self.made += 1
        size = self.random.choice((10, 100, 100, 1_000, 1_000, 10_000, 60_000 if self.random.random() < 0.1 else 10))
        body = self.bodies[id] = f"{id} ".encode() + self.random.randbytes(size)
        sha = hashlib.sha256(body).hexdigest()
        self.sent[id] = {"to": destination, "sha": sha, "attempts": 0, "confirmed": None}
        return id

    def put(self, connection: Connection, id: str, *headers: tuple[str, str]) -> None:
        self.sent[id]["attempts"] += 1
        connection.send("SEND", ("destination", self.sent[id]["to"]), ("id", id), *headers, body=self.bodies[id])

    @property
    def may_go_on(self) -> bool:
        """Whether the pace allows one more."""
        return self.made < self.spec["first"] + (time.monotonic() - self.began) * self.spec["pace"]


class Producer(Sender):
    """Pipelined sends with receipts. What was not confirmed is sent again with probability `resend`, or given up."""

    def __init__(self, directory: Path, spec: dict[str, Any]) -> None:
        super().__init__(directory, spec)
        self.unconfirmed: dict[str, None] = {}

    def serve(self, connection: Connection) -> bool:
        for id in list(self.unconfirmed):
            if self.random.random() < self.spec["resend"]:
                self.put(connection, id, ("receipt", id))
            else:
                del self.unconfirmed[id]
        while True:
            finishing = self.told("finish")
            while not finishing and len(self.unconfirmed) < self.spec["window"] and self.may_go_on:
                id = self.make(self.spec["destination"])
                self.unconfirmed[id] = None
                self.put(connection, id, ("receipt", id))
            if finishing and not self.unconfirmed:
                connection.close()
                return True
            for frame in connection.wait(TURN):
                id = frame.headers["receipt-id"]
                del self.unconfirmed[id]
                del self.bodies[id]
                self.sent[id]["confirmed"] = self.life
            if self.made >= self.spec["first"]:
                self.ready()


class Transactor(Sender):
    """Transactions of several sends to two queues; nothing is tried again."""

    def __init__(self, directory: Path, spec: dict[str, Any]) -> None:
        super().__init__(directory, spec)
        self.transactions: list[dict[str, Any]] = []
        self.ledger["transactions"] = self.transactions

    def serve(self, connection: Connection) -> bool:
        while not self.told("finish"):
            name = f"t{len(self.transactions)}"
            abort = self.random.random() < 0.1
            transaction: dict[str, Any] = {"ids": [], "end": "abort" if abort else "commit", "confirmed": None}
            self.transactions.append(transaction)
            connection.send("BEGIN", ("transaction", name))
            for number in range(self.random.randrange(1, 8)):
                id = self.make(self.spec["destinations"][number % 2])
                transaction["ids"].append(id)
                self.put(connection, id, ("transaction", name))
            connection.send(transaction["end"].upper(), ("transaction", name), ("receipt", name))
            others = connection.receipt(name)
            assert not others, others
            transaction["confirmed"] = self.life
            self.bodies.clear()
            self.ready()
            time.sleep(self.spec["pause"])
        connection.close()
        return True


class Consumer(Role):
    """Takes from destinations, in one of the modes of acknowledgement; gives some back, and keeps some to itself."""

    def __init__(self, directory: Path, spec: dict[str, Any]) -> None:
        super().__init__(directory, spec)
        self.deliveries: list[dict[str, Any]] = []
        self.acks: list[dict[str, Any]] = []
        self.ledger |= {"deliveries": self.deliveries, "acks": self.acks, "ack": spec["ack"]}
        self.acks_of: dict[str, list[dict[str, Any]]] = {}  # receipt id to what it stands for
        self.uncounted: list[dict[str, Any]] = []  # deliveries that the next cumulative acknowledgement covers
        self.last = 0

    def subscribe(self, connection: Connection) -> list[Frame]:
        frames: list[Frame] = []
        for number, destination in enumerate(self.spec["destinations"]):
            headers = [("id", str(number)), ("destination", destination), ("ack", self.spec["ack"])]
            headers += [("activemq.prefetchSize", str(self.spec["prefetch"])), ("receipt", f"s{number}")]
            if "client_id" in self.spec:
                headers.append(("activemq.subscriptionName", self.name))
            connection.send("SUBSCRIBE", *headers)
            frames += connection.receipt(f"s{number}")
        return frames

    def serve(self, connection: Connection) -> bool:
        self.acks_of.clear()
        self.uncounted.clear()
        finishing = self.told("finish")
        frames = self.subscribe(connection)
        self.ready()
        while True:
            for frame in frames:
                if frame.command == "RECEIPT":
                    self.confirmed(frame.headers["receipt-id"])
                else:
                    self.take(connection, frame, finishing)
            if self.told("drained") and not frames:
                connection.close()
                return True
            if not finishing and self.told("finish"):
                finishing = True
                if self.spec["ack"] != "auto":  # what it has kept to itself goes back
                    self.leave(connection)
            frames = connection.wait(TURN)

    def leave(self, connection: Connection) -> None:
        connection.send("DISCONNECT", ("receipt", "bye"))
        for frame in connection.receipt("bye"):
            if frame.command == "RECEIPT":
                self.confirmed(frame.headers["receipt-id"])
            else:
                self.note(frame)
        connection.close()
        raise Disconnected

    def note(self, frame: Frame) -> dict[str, Any]:
        delivery = {
            "id": frame.headers["id"],
            "sha": hashlib.sha256(frame.body).hexdigest(),
            "message_id": frame.headers["message-id"],
            "redelivered": frame.headers["redelivered"],
            "from": self.spec["destinations"][int(frame.headers["subscription"])],
            "reason": frame.headers.get("dead-letter-reason"),
            "life": self.life,
            "at": time.monotonic(),
        }
        self.deliveries.append(delivery)
        return delivery

    def take(self, connection: Connection, frame: Frame, finishing: bool) -> None:
        delivery = self.note(frame)
        if self.spec["pause"]:
            time.sleep(self.spec["pause"])
        if self.spec["ack"] == "auto":
            return
        chance = 1.0 if finishing else self.random.random()
        cumulative = self.spec["ack"] == "client"
        if cumulative:
            self.uncounted.append(delivery)
            if not finishing and len(self.uncounted) < 5:
                return
        elif chance < 0.02:
            return  # kept
        elif chance < 0.04:
            connection.send("NACK", ("id", frame.headers["ack"]))
            return
        self.last += 1
        receipt = f"a{self.last}"
        covered = self.uncounted if cumulative else [delivery]
        acks = [
            {"message_id": each["message_id"], "from": each["from"], "life": self.life, "confirmed": None}
            for each in covered
        ]
        self.acks += acks
        self.acks_of[receipt] = acks
        self.uncounted = []
        self.acknowledge(connection, frame, receipt)

    def acknowledge(self, connection: Connection, frame: Frame, receipt: str) -> None:
        connection.send("ACK", ("id", frame.headers["ack"]), ("receipt", receipt))

    def confirmed(self, receipt: str) -> None:
        for ack in self.acks_of.pop(receipt):
            ack["confirmed"] = time.monotonic()


class Mover(Consumer):
    """Moves messages to another queue: the send and the acknowledgement in one transaction."""

    def acknowledge(self, connection: Connection, frame: Frame, receipt: str) -> None:
        transaction = ("transaction", receipt)
        connection.send("BEGIN", transaction)
        head = ("destination", self.spec["to"]), ("id", frame.headers["id"])
        connection.send("SEND", *head, transaction, body=frame.body)
        connection.send("ACK", ("id", frame.headers["ack"]), transaction)
        connection.send("COMMIT", transaction, ("receipt", receipt))


ROLES = {role.__name__: role for role in (Producer, Transactor, Consumer, Mover)}


def main() -> None:
    directory, name = Path(sys.argv[1]), sys.argv[2]
    roles = [ROLES[spec["role"]](directory, spec) for spec in json.loads((directory / f"{name}.json").read_text())]

    def run(role: Role) -> None:
        try:
            role.run()
        except BaseException:
            (directory / f"{role.name}.failed").write_text(traceback.format_exc())
            os._exit(1)

    threads = [threading.Thread(target=run, args=(role,)) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (directory / f"{name}.ledger").write_text(json.dumps([role.ledger for role in roles]))


if __name__ == "__main__":
    main()
