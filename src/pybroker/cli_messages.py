"""``pybroker send`` and ``pybroker receive``: messages from and to a shell, over STOMP or the native protocol.

Owns their options and output. The scheme of ``--url`` says which protocol is spoken.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import click
import trio

from pybroker.connecting import connect
from pybroker.errors import ConfigurationError, UnknownDelivery
from pybroker.remote_client import RemoteClient
from pybroker.stomp_remote import StompClient, connect_stomp
from pybroker.subscription import ReceivedMessage, Subscription

DEFAULT_URL = "stomp://127.0.0.1:61613"
NATIVE = ("pybroker://", "pybroker+ssl://", "failover:", "discovery:")  # what URLs of the native client begin with
URL_HELP = (
    "stomp://HOST:PORT, pybroker://HOST:PORT, failover:(URL,URL), or discovery:(multicast://ADDRESS:PORT?group=G)."
)

Pairs = Sequence[tuple[str, str]]


class Shown(Protocol):
    """A message as a shell sees it."""

    @property
    def body(self) -> bytes: ...

    @property
    def headers(self) -> Pairs: ...


class Messages(Protocol):
    """A client as these commands use it."""

    async def send(self, destination: str, body: bytes, headers: Pairs, durable: bool) -> None:
        """Send; returns when it is confirmed."""

    async def receive(self, destination: str) -> Shown:
        """The next message of the one destination that is asked for."""

    async def ack(self) -> bool:
        """Acknowledge what `receive` gave; False when it will be delivered again."""


class _OfStomp:
    def __init__(self, client: StompClient) -> None:
        self._client = client
        self._subscribed = False

    async def send(self, destination: str, body: bytes, headers: Pairs, durable: bool) -> None:
        lines = [*headers] if durable else [*headers, ("persistent", "false")]
        await self._client.send(destination, body, lines)

    async def receive(self, destination: str) -> Shown:
        if not self._subscribed:
            self._subscribed = True
            await self._client.subscribe(destination, "client-individual", 1)
        self._message = await self._client.receive()
        return self._message

    async def ack(self) -> bool:
        await self._client.ack(self._message)
        return True


class _Received:
    """A message of the native protocol with what STOMP would say in headers."""

    def __init__(self, message: ReceivedMessage) -> None:
        self.body = message.body
        self.headers = [
            ("destination", message.destination),
            ("message-id", message.message_id),
            ("priority", str(message.priority)),
            ("persistent", "true" if message.durable else "false"),
            ("timestamp", str(message.timestamp)),
            ("expires", str(message.expires)),
            ("redelivered", "true" if message.redelivered else "false"),
            *message.headers,
        ]


class _OfNative:
    def __init__(self, client: RemoteClient) -> None:
        self._client = client
        self._subscription: Subscription | None = None

    async def send(self, destination: str, body: bytes, headers: Pairs, durable: bool) -> None:
        await self._client.send(destination, body, headers, durable=durable)

    async def receive(self, destination: str) -> Shown:
        if self._subscription is None:
            self._subscription = await self._client.subscribe(destination, prefetch=1).__aenter__()
        self._message = await self._subscription.receive()
        return _Received(self._message)

    async def ack(self) -> bool:
        try:
            await self._message.ack()
        except UnknownDelivery:  # the connection was lost meanwhile
            return False
        return True


@asynccontextmanager
async def _connected(url: str, user: str | None, ca: Path | None) -> AsyncIterator[Messages]:
    name, _, password = (user or "").partition(":")
    if url.startswith("stomp"):
        async with connect_stomp(url, (name, password) if user is not None else None, ca) as stomp:
            yield _OfStomp(stomp)
            await stomp.disconnect()
    elif not url.startswith(NATIVE):
        raise ConfigurationError(f"{url!r} is not a broker's address: it must look like {URL_HELP}")
    else:
        async with connect(url, user=name if user is not None else None, passcode=password, ca=ca) as native:
            yield _OfNative(native)


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name:
        raise click.BadParameter("--header must look like NAME:VALUE")
    return name, value


@click.command()
@click.argument("destination")
@click.argument("body", required=False)
@click.option("--url", default=DEFAULT_URL, show_default=True, help=URL_HELP)
@click.option("--header", "headers", multiple=True, metavar="NAME:VALUE")
@click.option("--count", default=1, show_default=True, help="How often to send it.")
@click.option("--transient", is_flag=True, help="Not durable.")
@click.option("--user", metavar="NAME:PASSWORD")
@click.option("--ca", type=click.Path(exists=True, path_type=Path), help="Authorities for TLS (PEM).")
def send(
    destination: str,
    body: str | None,
    url: str,
    headers: tuple[str, ...],
    count: int,
    transient: bool,
    user: str | None,
    ca: Path | None,
) -> None:
    """Send BODY (or standard input) to DESTINATION, and wait until it is confirmed."""
    data = sys.stdin.buffer.read() if body is None else os.fsencode(body)
    lines = [_header(header) for header in headers]

    async def run() -> None:
        async with _connected(url, user, ca) as client:
            for _ in range(count):
                await client.send(destination, data, lines, not transient)

    trio.run(run)


@click.command()
@click.argument("destination")
@click.option("--url", default=DEFAULT_URL, show_default=True, help=URL_HELP)
@click.option("--count", default=1, show_default=True, help="Messages to wait for; 0 = until interrupted.")
@click.option("--timeout", type=float, help="Seconds to wait for each message; then the exit status is 1.")
@click.option("--show-headers", is_flag=True, help="One line of JSON a message instead of its body.")
@click.option("--user", metavar="NAME:PASSWORD")
@click.option("--ca", type=click.Path(exists=True, path_type=Path), help="Authorities for TLS (PEM).")
def receive(
    destination: str, url: str, count: int, timeout: float | None, show_headers: bool, user: str | None, ca: Path | None
) -> None:
    """Receive from DESTINATION, write each body and a line feed to standard output, and acknowledge it after that."""

    async def run() -> None:
        async with _connected(url, user, ca) as client:
            received = 0
            while not count or received < count:
                with trio.move_on_after(timeout if timeout is not None else float("inf")) as scope:
                    message = await client.receive(destination)
                if scope.cancelled_caught:
                    print(f"no message within {timeout:g} s", file=sys.stderr)
                    sys.exit(1)
                if show_headers:
                    shown = {"headers": message.headers, "body": message.body.decode("utf-8", "replace")}
                    print(json.dumps(shown), flush=True)
                else:
                    sys.stdout.buffer.write(message.body + b"\n")
                    sys.stdout.buffer.flush()
                received += await client.ack()

    trio.run(run)
