"""A program that uses stomp.py and knows nothing of pybroker: one interface over its three protocol versions.

Every wait has an end. Where something must not come, the tests send a marker behind it instead of waiting.
"""

from __future__ import annotations

import itertools
import logging
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import stomp

TIMEOUT = 10.0
VERSIONS = ("1.0", "1.1", "1.2")
CONNECTIONS = {"1.0": stomp.Connection10, "1.1": stomp.Connection11, "1.2": stomp.Connection12}

logging.getLogger("stomp.py").setLevel(logging.CRITICAL)  # it warns of each connection that the tests cut


class Inbox(stomp.ConnectionListener):
    """Puts everything that the broker says where a test can wait for it."""

    def __init__(self) -> None:
        self.connected: queue.Queue[Any] = queue.Queue()
        self.messages: queue.Queue[Any] = queue.Queue()
        self.receipts: queue.Queue[str] = queue.Queue()
        self.errors: queue.Queue[Any] = queue.Queue()
        self.disconnected: queue.Queue[bool] = queue.Queue()
        self.heartbeats: queue.Queue[bool] = queue.Queue()

    def on_connected(self, frame: Any) -> None:
        self.connected.put(frame)

    def on_message(self, frame: Any) -> None:
        self.messages.put(frame)

    def on_receipt(self, frame: Any) -> None:
        self.receipts.put(frame.headers["receipt-id"])

    def on_error(self, frame: Any) -> None:
        self.errors.put(frame)

    def on_disconnected(self) -> None:
        self.disconnected.put(True)

    def on_heartbeat(self) -> None:
        self.heartbeats.put(True)


class Program:
    """One connection. Bodies are bytes as they came; headers are stomp.py's dictionary (the first of repeats)."""

    def __init__(self, port: int, version: str = "1.2", **options: Any) -> None:
        self.version = version
        self.inbox = Inbox()
        self._receipts = itertools.count(1)
        self.connection = CONNECTIONS[version](
            [("127.0.0.1", port)], auto_decode=False, reconnect_attempts_max=1, **options
        )
        self.connection.set_listener("inbox", self.inbox)

    def connect(self, login: str | None = None, passcode: str | None = None, **headers: str) -> Any:
        """Connect; return the CONNECTED frame."""
        self.connection.connect(login, passcode, wait=True, headers=headers)
        return self.inbox.connected.get(timeout=TIMEOUT)

    def confirmed(self, receipt: str) -> None:
        """Wait for a receipt; it must be the next one."""
        try:
            got = self.inbox.receipts.get(timeout=TIMEOUT)
        except queue.Empty:
            raise AssertionError(f"no receipt came, but {list(self.inbox.errors.queue)}") from None
        assert got == receipt

    def new_receipt(self) -> str:
        return f"r-{next(self._receipts)}"

    def send(self, destination: str, body: bytes | str = b"", **headers: Any) -> None:
        """Send; returns when the broker has confirmed it. In names of headers ``_`` stands for ``-``."""
        receipt = self.new_receipt()
        self.connection.send(destination, body, headers={**_named(headers), "receipt": receipt})
        self.confirmed(receipt)

    def subscribe(self, destination: str, ack: str = "auto", id: str = "1", **headers: Any) -> None:
        receipt = self.new_receipt()
        self.connection.subscribe(destination, id=id, ack=ack, headers={**_named(headers), "receipt": receipt})
        self.confirmed(receipt)

    def unsubscribe(self, id: str = "1", **headers: Any) -> None:
        receipt = self.new_receipt()
        self.connection.unsubscribe(id=id, headers={**_named(headers), "receipt": receipt})
        self.confirmed(receipt)

    def receive(self, timeout: float = TIMEOUT) -> Any:
        """The next message."""
        try:
            return self.inbox.messages.get(timeout=timeout)
        except queue.Empty:
            raise AssertionError(f"no message came, but {list(self.inbox.errors.queue)}") from None

    def bodies(self, count: int) -> list[bytes]:
        return [self.receive().body for _ in range(count)]

    def error(self) -> Any:
        """The ERROR that must come, after which the connection must end."""
        found = self.inbox.errors.get(timeout=TIMEOUT)
        self.inbox.disconnected.get(timeout=TIMEOUT)
        return found

    def ack(self, message: Any, transaction: str | None = None) -> None:
        """Acknowledge; returns when the broker has confirmed it."""
        self._settle(self.connection.ack, message, transaction)

    def nack(self, message: Any, transaction: str | None = None) -> None:
        self._settle(self.connection.nack, message, transaction)

    def _settle(self, method: Any, message: Any, transaction: str | None) -> None:
        receipt = self.new_receipt()
        headers = message.headers
        if self.version == "1.2":
            method(headers["ack"], transaction=transaction, receipt=receipt)
        elif self.version == "1.1":
            method(headers["message-id"], headers["subscription"], transaction=transaction, receipt=receipt)
        else:
            method(headers["message-id"], transaction=transaction, receipt=receipt)
        self.confirmed(receipt)

    def transaction(self, command: str, name: str) -> None:
        """``begin``, ``commit`` or ``abort``."""
        receipt = self.new_receipt()
        getattr(self.connection, command)(name, headers={"receipt": receipt})
        self.confirmed(receipt)

    def disconnect(self) -> None:
        """Say goodbye and wait for the broker's answer."""
        receipt = self.new_receipt()
        self.connection.disconnect(receipt=receipt)
        self.confirmed(receipt)

    def cut(self) -> None:
        """Close the socket without a word."""
        self.connection.transport.disconnect_socket()


def _named(headers: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@contextmanager
def program(
    port: int, version: str = "1.2", login: str | None = None, passcode: str | None = None, **headers: str
) -> Iterator[Program]:
    """A program that is connected while the block runs."""
    one = Program(port, version)
    try:
        one.connect(login, passcode, **_named(headers))
        yield one
    finally:
        one.cut()
