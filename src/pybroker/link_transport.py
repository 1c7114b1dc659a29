"""How other brokers of the network are dialled: TCP, with TLS for ``pybroker+ssl``. Owns no connection once it is made."""

from __future__ import annotations

from typing import Protocol

import trio

from pybroker.cluster.native_urls import parse_native_url
from pybroker.cluster.tls import make_link_context
from pybroker.config import NetworkConfig


class Dial(Protocol):
    """Opens a stream to a native listener."""

    async def __call__(self, url: str) -> trio.abc.Stream:
        """Connect. Raises OSError, and ConfigurationError for a URL that can't be dialled. (The caller sets the deadline.)"""
        ...


def make_dial(config: NetworkConfig) -> Dial:
    """Dial over TCP. Raises ConfigurationError for a certificate, key or authority that can't be used."""
    context = make_link_context(config)

    async def dial(url: str) -> trio.abc.Stream:
        address = parse_native_url(url)
        if address.tls and context is None:
            raise ConnectionError(f"{url} can't be dialled without network.certificate, key and peer_ca")
        if context is not None and not address.tls and address.beyond_loopback and "plaintext" not in config.allow:
            raise ConnectionError(
                f"{url} is not dialled, as links of this broker have certificates: give the peer a pybroker+ssl listener, or ask "
                'for it by name with network.allow = ["plaintext"]'
            )
        transport = await trio.open_tcp_stream(address.host, address.port)
        if not address.tls or context is None:
            return transport
        stream = trio.SSLStream(transport, context, server_hostname=address.host, https_compatible=True)
        try:
            await stream.do_handshake()
        except BaseException as error:
            await trio.aclose_forcefully(stream)
            if isinstance(error, trio.BrokenResourceError):
                raise ConnectionError(
                    f"TLS hand-shake with {url} failed: {error.__cause__ or 'the peer hung up'}"
                ) from error
            raise
        return stream

    return dial
