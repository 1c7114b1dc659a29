"""A broker's core and store for tests that tell one story: short calls, each a turn of its own, over the driver."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pybroker.config import DeliveryPolicy, Limits
from pybroker.core.broker import Core
from pybroker.core.consumer import INDIVIDUAL, Connection, Consumer
from pybroker.core.entry import Entry
from pybroker.core.invariants import check_invariants
from pybroker.core.queue import Queue
from pybroker.destination import parse_destination
from pybroker.message import Message
from pybroker.settings import make_config
from tests.core.driver import Driver, Ignore

POLICY = DeliveryPolicy(deliveries_max=3, dead_letter_queue="/queue/DLQ")


class Bench:
    """`seen(consumer)` is what a client has seen: bodies with the number of deliveries before."""

    def __init__(
        self,
        deliveries_max: int = 3,
        policy: tuple[dict[str, Any], ...] = (),
        routing: dict[str, Any] | None = None,
        composite: tuple[dict[str, Any], ...] = (),
        **limits: Any,
    ) -> None:
        self.eye = Ignore()
        delivery = replace(POLICY, deliveries_max=deliveries_max)
        config = make_config(policy=policy, routing=routing or {}, composite=composite)
        self.driver = Driver(
            Limits(**limits),
            delivery,
            self.eye,
            policies=config.policy,
            routing=config.routing,
            composites=config.composite,
        )

    @property
    def core(self) -> Core:
        return self.driver.begin_turn()

    def end(self) -> None:
        """End the turn, and look whether the core contradicts itself."""
        self.driver.end_turn()
        check_invariants(self.driver.core)

    def settle(self) -> None:
        self.driver.settle()
        check_invariants(self.driver.core)
        report = self.driver.verify()
        assert report.ok, report.problems

    def wait(self, milliseconds: int) -> None:
        """Let time pass; what is due then happens."""
        self.driver.wait(milliseconds)
        check_invariants(self.driver.core)

    def crash(self) -> None:
        self.driver.crash()
        check_invariants(self.driver.core)

    def connect(self) -> Connection:
        return self.driver.connect()

    def subscribe(self, to: str, mode: str = INDIVIDUAL, *, on: Connection | None = None, **options: Any) -> Consumer:
        core = self.core
        consumer = core.subscribe(on or self.connect(), to, mode, **options)
        core.start(consumer)
        self.end()
        return consumer

    def send(self, to: str, *bodies: bytes, **options: Any) -> None:
        for body in bodies:
            self.core.send(Message(to, body, **options))
        self.end()

    def ack(self, consumer: Consumer, body: bytes, transaction: str | None = None) -> None:
        self.core.acknowledge(consumer, self.tag(consumer, body), transaction)
        self.end()

    def nack(self, consumer: Consumer, body: bytes, transaction: str | None = None) -> None:
        self.core.reject(consumer, self.tag(consumer, body), transaction)
        self.end()

    def leave(self, consumer: Consumer) -> None:
        self.core.unsubscribe(consumer)
        self.end()

    def disconnect(self, connection: Connection) -> None:
        self.core.disconnect(connection)
        self.end()

    def tag(self, consumer: Consumer, body: bytes) -> int:
        return next(tag for tag, entry in consumer.unacked.items() if entry.message.body == body)

    def seen(self, consumer: Consumer) -> list[tuple[bytes, int]]:
        return [(body, deliveries) for to, _, deliveries, body in self.eye.deliveries if to is consumer]

    def bodies(self, consumer: Consumer) -> list[bytes]:
        return [body for body, _ in self.seen(consumer)]

    def entries(self, consumer: Consumer) -> list[Entry]:
        return [entry for to, entry, _, _ in self.eye.deliveries if to is consumer]

    def queue(self, to: str) -> Queue:
        return self.driver.core.queue(parse_destination(to))
