"""How replicas reach each other, as a small protocol: TCP (with TLS when configured), or a simulated network in tests."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from pybroker.cluster.tls import make_contexts
from pybroker.config import ReplicaSetConfig

log = logging.getLogger("pybroker.cluster")

HANDSHAKE = 5.0  # seconds for the TLS hand-shake of a connection that was accepted
HANDSHAKES_MAX = 64  # connections that are in it at a time
TOLD_MAX = 1_024  # failures that are remembered as logged

Handler = Callable[[trio.abc.Stream], Awaitable[None]]


class Network(Protocol):
    """Opens and accepts streams. Addresses are ``HOST:PORT``."""

    async def dial(self, address: str) -> trio.abc.Stream:
        """Connect. Raises OSError. (The caller sets the deadline.)"""
        ...

    async def serve(
        self, address: str, handler: Handler, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept until cancelled, a task for each stream; `started` gives the bound address. The handler closes its stream."""
        ...


class TcpNetwork:
    """TCP; with contexts for the two sides, TLS. A peer that fails the TLS hand-shake is counted, and told of once.

    handshake  seconds for the TLS hand-shake of a connection that was accepted
    """

    def __init__(
        self,
        client_context: ssl.SSLContext | None = None,
        server_context: ssl.SSLContext | None = None,
        handshake: float = HANDSHAKE,
    ) -> None:
        self._client_context = client_context
        self._server_context = server_context
        self._handshake = handshake
        self._handshakes = 0
        self._told: set[str] = set()  # of what a failure was logged already
        self.refused = 0  # connections that were accepted and did not get through the TLS hand-shake

    async def dial(self, address: str) -> trio.abc.Stream:
        host, port = split_address(address)
        transport = await trio.open_tcp_stream(host, port)
        if self._client_context is None:
            return transport
        stream = trio.SSLStream(transport, self._client_context, server_hostname=host)
        try:
            await stream.do_handshake()
        except BaseException as error:
            await trio.aclose_forcefully(stream)
            if isinstance(error, trio.BrokenResourceError):
                text = f"TLS hand-shake with {address} failed: {_cause(error)}"
                self._tell_once(f"dial {address}", text)
                raise ConnectionError(text) from error
            raise
        self._told.discard(f"dial {address}")
        return stream

    async def serve(
        self, address: str, handler: Handler, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        host, port = split_address(address)

        async def serve_one(transport: trio.SocketStream) -> None:
            stream = await self._secured(transport)
            if stream is not None:
                await handler(stream)

        listeners = await trio.open_tcp_listeners(port, host=host)
        async with trio.open_nursery() as nursery:
            bound = listeners[0].socket.getsockname()
            nursery.start_soon(trio.serve_listeners, serve_one, listeners)
            task_status.started(f"{bound[0]}:{bound[1]}" if ":" not in bound[0] else f"[{bound[0]}]:{bound[1]}")

    async def _secured(self, transport: trio.SocketStream) -> trio.abc.Stream | None:
        """The stream after its TLS hand-shake, if there is one; None when that failed, and the stream is closed."""
        context = self._server_context
        if context is None:
            return transport
        stream = trio.SSLStream(transport, context, server_side=True)
        failure = f"more than {HANDSHAKES_MAX} connections are in it"
        done = False
        self._handshakes += 1
        try:
            if self._handshakes <= HANDSHAKES_MAX:
                failure = f"not done within {self._handshake:g} s"
                with trio.move_on_after(self._handshake):
                    await stream.do_handshake()
                    done = True
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as error:
            failure = _cause(error)
        finally:
            self._handshakes -= 1
            if not done:
                self.refused += 1  # before the peer can see it
                await trio.aclose_forcefully(stream)
        if done:
            return stream
        self._tell_once("accept", f"the TLS hand-shake of an incoming replication connection failed: {failure}")
        return None

    def _tell_once(self, what: str, text: str) -> None:
        """What fails is tried again and again: the first time is a warning, the others are for those who debug."""
        log.log(logging.DEBUG if what in self._told else logging.WARNING, "%s", text)
        if len(self._told) < TOLD_MAX:
            self._told.add(what)


def make_network(config: ReplicaSetConfig) -> TcpNetwork:
    """The network of a replica. Raises ConfigurationError for a certificate, key or authority that can't be used."""
    contexts = make_contexts(config)
    return TcpNetwork() if contexts is None else TcpNetwork(*contexts)


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error) or type(error).__name__


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT``, an IPv6 host in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)
