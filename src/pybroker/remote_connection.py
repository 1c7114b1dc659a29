"""One connection of a client to a broker over the network: opening it, reading it, writing it. Owns the stream and its tasks.

Knows nothing of what is sent or received; what comes is handed to the client, what is written is asked from the session. The
stream is never used again after a write that was cut short.
"""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable

import trio

from pybroker.cluster.native_urls import NativeAddress
from pybroker.errors import BrokerError, BrokerUnavailable, ConfigurationError
from pybroker.protocols.native_client import CLOSED, Closed, Event, NativeClientSession, Opened

RECEIVE_BYTES = 256 * 1024  # most bytes of one read
SILENCES = 3  # intervals of the broker's heart-beat without a byte after which it is lost
SILENCE_MIN = 1.0  # seconds: no connection is given up sooner

Dial = Callable[[NativeAddress], Awaitable[trio.abc.Stream]]


def make_dial(context: ssl.SSLContext | None) -> Dial:
    """How a broker is reached over TCP; `context` for addresses with TLS (None: the system's authorities)."""
    contexts = [context] if context is not None else []

    async def dial(address: NativeAddress) -> trio.abc.Stream:
        stream = await trio.open_tcp_stream(address.host, address.port)
        if not address.tls:
            return stream
        if not contexts:
            contexts.append(ssl.create_default_context())
        secured = trio.SSLStream(stream, contexts[0], server_hostname=address.host, https_compatible=True)
        try:
            await secured.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return secured

    return dial


class RemoteConnection:
    """A connection that a broker has let in. Made by `open_connection`; lives as long as `run`."""

    def __init__(
        self, stream: trio.abc.Stream, session: NativeClientSession, address: NativeAddress, opened: Opened, beat: float
    ) -> None:
        self.session = session
        self.address = address
        self.opened = opened
        self.early: list[Event] = []  # what came together with the broker's WELCOME
        self.silent = False  # the broker was not heard any more, and that is why it is over
        self._stream = stream
        self._beat = beat
        self._silence = max(opened.heartbeat * SILENCES, SILENCE_MIN) if opened.heartbeat else float("inf")
        self._wake = trio.Event()
        self._error: BrokerError | None = None

    def wake(self) -> None:
        """There is something to write."""
        self._wake.set()

    async def drop(self) -> None:
        """Instead of `run`: it is of no use."""
        await trio.aclose_forcefully(self._stream)

    async def run(self, handle: Callable[[list[Event]], None]) -> BrokerError | None:
        """Move bytes until the connection is over; returns why. The stream is closed then, also when cancelled."""
        try:
            handle(self.early)
            if self.session.state == CLOSED:
                return self._why(self.early)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_over, self._write, nursery.cancel_scope)
                await self._until_over(lambda: self._read(handle), nursery.cancel_scope)
            return self._error
        finally:
            await trio.aclose_forcefully(self._stream)

    async def _until_over(self, move: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await move()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._error = self._error or BrokerUnavailable(f"the connection was reset: {error.__cause__ or error}")
        scope.cancel()

    async def _read(self, handle: Callable[[list[Event]], None]) -> None:
        session, stream = self.session, self._stream
        while True:
            data: bytes | bytearray | None = None
            with trio.move_on_after(self._silence):
                data = await stream.receive_some(RECEIVE_BYTES)
            if data is None:
                self.silent = True
                self._error = BrokerUnavailable(f"the broker was silent for {self._silence:g} s")
                return
            events = session.receive_data(data)
            handle(events)
            if session.state == CLOSED:
                self._error = self._why(events)
                return

    @staticmethod
    def _why(events: list[Event]) -> BrokerError | None:
        return events[-1].error if events and isinstance(events[-1], Closed) else None

    async def _write(self) -> None:
        session, stream = self.session, self._stream
        while True:
            data = session.data_to_send()
            if data:
                await stream.send_all(data)
                continue
            self._wake = trio.Event()
            with trio.move_on_after(self._beat):
                await self._wake.wait()
                continue
            session.beat()


async def open_connection(
    dial: Dial, address: NativeAddress, session: NativeClientSession, timeout: float, beat: float
) -> RemoteConnection:
    """Connect and be let in within `timeout` seconds. Raises what the broker says, or BrokerUnavailable, or ConfigurationError."""
    try:
        with trio.fail_after(timeout):
            stream = await dial(address)
            try:
                return await _shake_hands(stream, session, address, beat)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
    except trio.TooSlowError:
        raise BrokerUnavailable(f"{address.url} did not answer within {timeout:g} s") from None
    except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise ConfigurationError(
                f"{address.url}: the broker's certificate is not trusted ({cause.verify_message}): "
                "give `ca`, the file of who signed it"
            ) from error
        raise BrokerUnavailable(f"no connection to {address.url}: {cause}") from error


async def _shake_hands(
    stream: trio.abc.Stream, session: NativeClientSession, address: NativeAddress, beat: float
) -> RemoteConnection:
    await stream.send_all(session.data_to_send())
    while True:
        events = session.receive_data(await stream.receive_some(RECEIVE_BYTES))
        for at, event in enumerate(events):
            if isinstance(event, Opened):
                connection = RemoteConnection(stream, session, address, event, beat)
                connection.early = events[at + 1 :]
                return connection
            if isinstance(event, Closed):
                raise event.error or BrokerUnavailable(f"{address.url} closed the connection")
