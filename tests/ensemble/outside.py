"""The programs outside a replica set: those of `tests.crash.outside`, that reconnect over the list of the set's addresses.

Run as a process of its own: ``python -m tests.ensemble.outside DIRECTORY NAME`` with the roles in DIRECTORY/NAME.json, each in a
thread. They wait for the file NAME.go there, or for the one that their spec names as `after`. While a producer runs, its file
ROLE.times has the time (`time.monotonic`, a C double) of each receipt. The ledgers go to NAME.ledger at the end.

Where `tests.crash` has the number of the broker's life, these ledgers have the time at which the connection was begun.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.crash import outside as alone
from tests.crash.wire import Disconnected, Frame
from tests.ensemble.wire import Connection

RETRY = 0.005  # seconds between two rounds over the addresses


class Failover(alone.Role):
    """A program that tries one address of the set after the other."""

    connection: Connection
    process: str  # the name of the process that it runs in

    def connections(self) -> Iterator[Any]:
        addresses = [(host, port) for host, port in self.spec["addresses"]]
        errors: Counter[str] = Counter()
        self.ledger["errors"] = errors
        while not self.told(self.spec.get("after", f"{self.process}.go")):
            time.sleep(RETRY)
        number = 0
        while True:
            try:
                self.connection = Connection(addresses[number % len(addresses)], self.spec.get("client_id", ""))
            except Disconnected:
                number += 1
                if number % len(addresses) == 0:
                    time.sleep(RETRY)
                continue
            self.life = self.connection.opened  # type: ignore[assignment]
            self.ledger["connections"] += 1
            yield self.connection
            errors[self.connection.error or "(no error frame)"] += 1


class Confirming(Failover):
    """Writes down when it got receipts, for all to see."""

    def ready(self) -> None:
        if not self.told(f"{self.name}.ready"):
            super().ready()

    def connections(self) -> Iterator[Any]:
        with (self.directory / f"{self.name}.times").open("ab", buffering=0) as times:
            for connection in super().connections():
                wait = connection.wait

                def noting(timeout: float, wait: Any = wait) -> list[Frame]:
                    frames: list[Frame] = wait(timeout)
                    now = struct.pack("d", time.monotonic())
                    times.write(now * sum(frame.command == "RECEIPT" for frame in frames))
                    return frames

                connection.wait = noting
                yield connection


class Producer(Confirming, alone.Producer):
    pass


class Transactor(Confirming, alone.Transactor):
    pass


class Taking(Failover, alone.Consumer):
    """Notes from where each message came, and where each acknowledgement went."""

    def note(self, frame: Frame) -> dict[str, Any]:
        return self._from_here(super().note(frame))

    def acknowledge(self, connection: Any, frame: Frame, receipt: str) -> None:
        for ack in self.acks_of[receipt]:
            self._from_here(ack)
        super().acknowledge(connection, frame, receipt)

    def _from_here(self, row: dict[str, Any]) -> dict[str, Any]:
        row["address"] = list(self.connection.address)
        return row


class Consumer(Taking, alone.Consumer):
    pass


class Mover(Taking, alone.Mover):
    pass


ROLES: dict[str, type[Failover]] = {role.__name__: role for role in (Producer, Transactor, Consumer, Mover)}


def main() -> None:
    directory, name = Path(sys.argv[1]), sys.argv[2]
    roles = [ROLES[spec["role"]](directory, spec) for spec in json.loads((directory / f"{name}.json").read_text())]

    def run(role: Failover) -> None:
        try:
            role.run()
        except BaseException:
            (directory / f"{role.name}.failed").write_text(traceback.format_exc())
            os._exit(1)

    for role in roles:
        role.process = name
    threads = [threading.Thread(target=run, args=(role,)) for role in roles]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    temporary = directory / f"{name}.ledger.new"
    temporary.write_text(json.dumps([role.ledger for role in roles]))
    temporary.replace(directory / f"{name}.ledger")


if __name__ == "__main__":
    main()
