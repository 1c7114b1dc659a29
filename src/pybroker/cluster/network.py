"""How replicas reach each other, as a small protocol: TCP (with TLS when configured), or a simulated network in tests."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

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
    """TCP; with contexts for the two sides, TLS."""

    def __init__(
        self, client_context: ssl.SSLContext | None = None, server_context: ssl.SSLContext | None = None
    ) -> None:
        self._client_context = client_context
        self._server_context = server_context

    async def dial(self, address: str) -> trio.abc.Stream:
        host, port = split_address(address)
        stream: trio.abc.Stream = await trio.open_tcp_stream(host, port)
        if self._client_context is not None:
            stream = trio.SSLStream(stream, self._client_context, server_hostname=host)
            try:
                await stream.do_handshake()
            except BaseException as error:
                await trio.aclose_forcefully(stream)
                if isinstance(error, trio.BrokenResourceError):
                    raise ConnectionError(f"TLS hand-shake with {address} failed: {error.__cause__}") from error
                raise
        return stream

    async def serve(
        self, address: str, handler: Handler, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        host, port = split_address(address)
        context = self._server_context

        async def serve_one(transport: trio.SocketStream) -> None:
            stream: trio.abc.Stream = transport
            if context is not None:
                stream = trio.SSLStream(transport, context, server_side=True)
            await handler(stream)

        listeners = await trio.open_tcp_listeners(port, host=host)
        async with trio.open_nursery() as nursery:
            bound = listeners[0].socket.getsockname()
            nursery.start_soon(trio.serve_listeners, serve_one, listeners)
            task_status.started(f"{bound[0]}:{bound[1]}" if ":" not in bound[0] else f"[{bound[0]}]:{bound[1]}")


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT``, an IPv6 host in brackets. Raises ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.strip("[]"), int(port)
