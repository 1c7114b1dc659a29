"""A STOMP client over a socket, for the command line and for tests. Owns one connection; no reconnecting, no pipelining."""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import trio

from pybroker.errors import BrokerError, ConfigurationError
from pybroker.protocols.stomp_client import (
    Connected,
    ErrorReceived,
    MessageReceived,
    ReceiptReceived,
    StompClientSession,
)
from pybroker.protocols.stomp_events import Event, Failed

RECEIVE_BYTES = 65_536
EVENTS_MAX = 1_000  # taken out of one read at a time


class StompClient:
    """A session with a broker elsewhere. Made by `connect_stomp`."""

    def __init__(self, stream: trio.abc.Stream, session: StompClientSession) -> None:
        self._stream = stream
        self._session = session
        self._messages: deque[MessageReceived] = deque()
        self._receipts: set[str] = set()
        self._last_receipt = 0
        self._last_subscription = 0

    async def send(self, destination: str, body: bytes, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Send a message; returns when the broker has confirmed it. Raises BrokerError with what it says."""
        receipt = self._receipt()
        self._session.send(destination, body, list(headers), receipt=receipt)
        await self._confirmed(receipt)

    async def subscribe(self, destination: str, ack: str, prefetch: int) -> None:
        """Subscribe; messages come by `receive`."""
        self._last_subscription += 1
        receipt = self._receipt()
        headers = [("activemq.prefetchSize", str(prefetch))]
        self._session.subscribe(destination, str(self._last_subscription), ack, headers, receipt=receipt)  # type: ignore[arg-type]
        await self._confirmed(receipt)

    async def receive(self) -> MessageReceived:
        """The next message; waits for it."""
        while not self._messages:
            await self._read()
        return self._messages.popleft()

    async def ack(self, message: MessageReceived) -> None:
        """Acknowledge; returns when the broker has confirmed it."""
        receipt = self._receipt()
        self._session.ack(message, receipt=receipt)
        await self._confirmed(receipt)

    async def disconnect(self) -> None:
        """Say goodbye; returns when all before it was handled."""
        receipt = self._receipt()
        self._session.disconnect(receipt)
        await self._confirmed(receipt)

    def _receipt(self) -> str:
        self._last_receipt += 1
        return f"r{self._last_receipt}"

    async def _confirmed(self, receipt: str) -> None:
        await self._stream.send_all(self._session.data_to_send())
        while receipt not in self._receipts:
            await self._read()
        self._receipts.discard(receipt)

    async def _read(self) -> None:
        for event in await self._events():
            if isinstance(event, MessageReceived):
                self._messages.append(event)
            elif isinstance(event, ReceiptReceived):
                self._receipts.add(event.receipt_id)

    async def _events(self) -> list[Event]:
        data = await self._stream.receive_some(RECEIVE_BYTES)
        self._session.receive_data(bytes(data))
        found: list[Event] = []
        while events := self._session.next_events(EVENTS_MAX):
            found += events
        for event in found:
            if isinstance(event, ErrorReceived):
                raise BrokerError(event.message)
            if isinstance(event, Failed):
                raise event.error
        if not data:
            raise BrokerError("the broker closed the connection")
        return found

    async def _open(self, host: str, user: tuple[str, str] | None) -> None:
        login, passcode = user if user is not None else (None, None)
        self._session.connect(host, login, passcode)
        await self._stream.send_all(self._session.data_to_send())
        while True:
            for event in await self._events():
                if isinstance(event, Connected):
                    return


@asynccontextmanager
async def connect_stomp(
    url: str, user: tuple[str, str] | None = None, ca: Path | None = None
) -> AsyncIterator[StompClient]:
    """Connect to ``stomp://HOST:PORT`` or ``stomp+ssl://HOST:PORT``. Raises ConfigurationError, BrokerError."""
    try:
        parts = urlsplit(url)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:  # brackets that don't close, or a port that is no number
        scheme, host, port = "", None, None
    if scheme not in ("stomp", "stomp+ssl") or not host or not port:
        raise ConfigurationError(f"{url!r} is not a broker's address: it must look like stomp://HOST:PORT")
    try:
        stream: trio.abc.Stream = await trio.open_tcp_stream(host, port)
    except OSError as error:
        raise BrokerError(f"no connection to {url}: {error}") from None
    if scheme == "stomp+ssl":
        context = ssl.create_default_context(cafile=ca)
        stream = trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)
    try:
        client = StompClient(stream, StompClientSession())
        await client._open(host, user)
        yield client
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise BrokerError(f"the connection to {url} broke: {error.__cause__ or error}") from error
    finally:
        await trio.aclose_forcefully(stream)
