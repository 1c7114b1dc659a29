"""Listeners: accepts connections and looks after them. Owns sockets, TLS hand-shakes, the connection limit and heart-beats."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import trio

from pybroker.config import BrokerConfig
from pybroker.connections import ServedConnection, say_last
from pybroker.engine import Engine
from pybroker.errors import BrokerClosed, BrokerError, ConfigurationError, LimitExceeded
from pybroker.listeners import ListenerConfig, check_exposure, make_ssl_context, parse_listener
from pybroker.native_server import NativeConnection
from pybroker.protocols.native_session import error_frame
from pybroker.protocols.stomp_headers import encode_frame
from pybroker.protocols.stomp_send import HeaderMemo
from pybroker.stomp_server import StompConnection
from pybroker.users import Users

log = logging.getLogger("pybroker.server")

LOGINS_AT_A_TIME = 2  # password checks that run at once; each takes a thread tens of milliseconds
NATIVE = "pybroker"  # the protocol's name in a listener's scheme
BEATS_PER_INTERVAL = 4  # how often it is looked whether a heart-beat is due


class Server:
    """All listeners of one broker. `find_engine` gives the engine that runs now; raises while there is none.

    `ports` are those that its predecessor had: a listener of port 0 takes its own again.

    accept_link  what serves a connection by which another broker of the network links with this one: it is given the stream
                 and the bytes that were read of it, and returns when the link has ended. None: this broker is in no network.
    members      the brokers of the network, name to native URLs, as clients are told them (`set_members`)
    """

    def __init__(
        self, config: BrokerConfig, find_engine: Callable[[], Engine], software: str, ports: Sequence[int] = ()
    ) -> None:
        self.config = config
        self.software = software  # the name in CONNECTED
        self.memo = HeaderMemo()
        self.accept_link: Callable[[trio.abc.Stream, bytes], Awaitable[None]] | None = None
        self.members: Mapping[str, tuple[str, ...]] = MappingProxyType({})
        self.beating: set[ServedConnection] = set()
        self.urls: tuple[str, ...] = ()
        self.ports = tuple(ports)
        self.refused = 0  # connections beyond the limit
        self._find_engine = find_engine
        self._users = Users(config.users)
        self._connections: set[ServedConnection] = set()
        self._accepted = 0
        self._open = 0
        self._logins = trio.CapacityLimiter(LOGINS_AT_A_TIME)
        self._bound: list[tuple[ListenerConfig, ssl.SSLContext | None, list[trio.SocketListener]]] = []
        self._accepting = trio.CancelScope()
        self._empty = trio.Event()

    @property
    def connections(self) -> int:
        return self._open

    async def bind(self) -> None:
        """Open all listeners. Raises ConfigurationError; then none is left open."""
        try:
            for number, url in enumerate(self.config.listen):
                listener = parse_listener(url)
                check_exposure(listener, self.config.anonymous)
                context = make_ssl_context(listener)
                port = listener.port or (self.ports[number] if self.ports else 0)
                try:
                    sockets = await trio.open_tcp_listeners(port, host=listener.host)
                except OSError as error:
                    reason = error.strerror or error.__cause__ or error
                    raise ConfigurationError(f"listener {listener.url} can't be opened: {reason}") from None
                if listener.port == 0:  # a name may have several addresses, and each would get a port of its own
                    for extra in sockets[1:]:
                        await extra.aclose()
                    del sockets[1:]
                self._bound.append((listener, context, sockets))
        except BaseException:
            await self._unbind()
            raise
        self.ports = tuple(sockets[0].socket.getsockname()[1] for _, _, sockets in self._bound)
        self.urls = tuple(
            listener.address_url(port) for (listener, _, _), port in zip(self._bound, self.ports, strict=True)
        )

    async def _unbind(self) -> None:
        with trio.CancelScope(shield=True):
            for _, _, sockets in self._bound:
                for each in sockets:
                    await each.aclose()
        self._bound.clear()

    async def run(self) -> None:
        """Accept and serve until cancelled, or until `stop_accepting` and the last connection's end."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run_heartbeats)
            async with trio.open_nursery() as connections:
                with self._accepting:
                    async with trio.open_nursery() as accepting:
                        for listener, context, sockets in self._bound:
                            handler = partial(self._serve, listener, context)
                            accepting.start_soon(
                                partial(trio.serve_listeners, handler, sockets, handler_nursery=connections)
                            )
                        await trio.sleep_forever()
            nursery.cancel_scope.cancel()

    def close_listeners(self) -> None:
        """Accept nothing more: `run` returns with the end of the last connection."""
        self._accepting.cancel()
        for _, _, sockets in self._bound:
            for each in sockets:
                each.socket.close()
        self._bound.clear()
        self.urls = ()

    def close_connections(self, error: BrokerError) -> None:
        """End all connections in good order: what was taken is committed and confirmed first."""
        for connection in list(self._connections):
            connection.close(error)

    async def wait_closed(self) -> None:
        """Wait until there is no connection."""
        while self._open:
            self._empty = trio.Event()
            await self._empty.wait()

    async def authenticate(self, login: str | None, passcode: str | None, anonymous: bool) -> None:
        """Check a login. Raises AuthenticationFailed."""
        check = partial(self._users.authenticate, login, passcode, anonymous=anonymous)
        if self.config.users and (login or passcode):
            await trio.to_thread.run_sync(check, limiter=self._logins)
        else:
            check()

    async def serve_stream(self, stream: trio.abc.Stream, native: bool) -> None:
        """Serve one connection of the native protocol, or of STOMP, to its end, as a listener does; closes the stream."""
        with self._counted():
            await self._serve_stream(stream, native)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._empty.set()

    async def _serve(self, listener: ListenerConfig, context: ssl.SSLContext | None, stream: trio.SocketStream) -> None:
        with self._counted():
            await self._serve_one(listener, context, stream)

    async def _serve_one(
        self, listener: ListenerConfig, context: ssl.SSLContext | None, transport: trio.SocketStream
    ) -> None:
        stream: trio.abc.Stream = transport
        native = listener.protocol == NATIVE
        keep_alive(transport)
        try:
            if context is not None:
                stream = trio.SSLStream(transport, context, server_side=True, https_compatible=True)
                with trio.fail_after((self.config.native if native else self.config.stomp).connect_timeout):
                    await stream.do_handshake()
        except (trio.BrokenResourceError, trio.TooSlowError, OSError) as error:
            log.info("a connection to %s failed in its hand-shake: %s", listener.url, error.__cause__ or error)
            await trio.aclose_forcefully(stream)
            return
        await self._serve_stream(stream, native)

    async def _serve_stream(self, stream: trio.abc.Stream, native: bool) -> None:
        connection: ServedConnection
        limit = self.config.limits.connections_max
        try:
            if self._open > limit:
                self.refused += 1
                raise LimitExceeded("limits.connections_max", limit, "too many connections")
            engine = self._find_engine()
            self._accepted += 1
            kind = NativeConnection if native else StompConnection
            connection = kind(self, engine, stream, self._accepted, self.config.anonymous)
        except BrokerError as error:
            await _refuse(stream, error, native)
            return
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self.beating.discard(connection)

    async def _run_heartbeats(self) -> None:
        intervals = (self.config.stomp.heartbeat_min_ms / 1000, self.config.native.heartbeat_interval)
        pause = min(interval for interval in (*intervals, 1.0) if interval) / BEATS_PER_INTERVAL
        while True:
            await trio.sleep(pause)
            self._beat()

    def _beat(self) -> None:
        """A function of its own: what it last looked at is not held while `_run_heartbeats` sleeps."""
        now = trio.current_time()
        for connection in list(self.beating):
            connection.beat(now)

    def set_members(self, members: Mapping[str, tuple[str, ...]]) -> None:
        """Tell all native clients, and those to come, which brokers the network has: name to native URLs."""
        if members != self.members:
            self.members = MappingProxyType(dict(members))
            for connection in list(self._connections):
                if isinstance(connection, NativeConnection):
                    connection.tell_members()


def keep_alive(stream: trio.SocketStream) -> None:
    """Let the system find out that a peer without heart-beats is gone: what it holds returns after about two minutes."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


async def _refuse(stream: trio.abc.Stream, error: BrokerError, native: bool) -> None:
    """Say why a connection can't be served, and close it."""
    if native:
        data = error_frame(error)
    else:
        headers = [("message", str(error)), ("code", error.code), ("content-type", "text/plain")]
        data = encode_frame("ERROR", headers, None, str(error).encode())
    await say_last(stream, data)


STOPPING = BrokerClosed("the broker is stopping: connect again later, or to another one")
