"""`connect`: a client of brokers elsewhere. Owns its arguments, TLS, and the life of the tasks behind a client."""

from __future__ import annotations

import random
import secrets
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from pybroker.addresses import Target, parse_target
from pybroker.broker import single
from pybroker.cluster.announcer import listen_for_peers
from pybroker.cluster.peers import PeerTable
from pybroker.connect_options import ConnectOptions
from pybroker.errors import ConfigurationError
from pybroker.protocols.native_frames import TEXT_MAX
from pybroker.remote_client import RemoteClient
from pybroker.remote_connection import Dial, make_dial
from pybroker.remote_lifeline import Lifeline
from pybroker.remote_search import Announced, Search, Source


@asynccontextmanager
async def connect(
    url: str,
    *,
    client_id: str = "",
    user: str | None = None,
    passcode: str | None = None,
    tls: ssl.SSLContext | None = None,
    ca: str | Path | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
    options: ConnectOptions | None = None,
) -> AsyncIterator[RemoteClient]:
    """A client of a broker over the network, while the block runs.

    ::

        async with pybroker.connect("failover:(pybroker://a:61620,pybroker://b:61620)") as client:
            await client.send("/queue/referrals", b"...")

    url          ``pybroker://HOST:PORT``, ``pybroker+ssl://``, ``failover:(URL,URL)``, or
                 ``discovery:(multicast://ADDRESS:PORT?group=G&interface=IP)``; ``?name=value&name=value`` behind it
                 are options of `ConnectOptions`
    client_id    needed for durable subscriptions
    user, passcode  where the broker wants them
    tls          a context for ``pybroker+ssl``; or instead
    ca           PEM file of who signs the brokers' certificates (otherwise: the system's authorities), and
    certificate, key  PEM files that this client shows

    Returns when a broker has let the client in. Leaving the block waits (for `close_timeout` seconds at most) for what was not
    answered. Raises ConfigurationError, AuthenticationFailed, ProtocolError, BrokerUnavailable (none answered by the deadline).
    """
    target = parse_target(url, options)
    context = _tls_context(tls, ca, certificate, key)
    tls_only = all(each.tls for each in target.brokers) if target.brokers else context is not None
    hello = _hello(client_id, user, passcode)
    with _unwrapped():
        async with (
            _discovered(target) as source,
            connected(target, source, tls_only, make_dial(context), hello) as client,
        ):
            yield client


@asynccontextmanager
async def connected(
    target: Target,
    source: Source | None,
    tls_only: bool,
    dial: Dial,
    hello: dict[str, str],
    chance: random.Random | None = None,
) -> AsyncIterator[RemoteClient]:
    """`connect` with everything that it makes of its arguments in the caller's hand."""
    search = Search(target, source, tls_only, chance or secrets.SystemRandom())
    lifeline = Lifeline(target.options, search, dial, hello)
    background = trio.CancelScope()

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        with background:
            await lifeline.run(task_status=task_status)

    with _unwrapped():
        async with trio.open_nursery() as nursery:
            with trio.move_on_after(target.options.deadline) as scope:
                await nursery.start(run)
            if scope.cancelled_caught:
                raise lifeline.unavailable()
            # When the block is cancelled the connection is not, yet: what was handed out and settled is still said.
            background.shield = True
            try:
                yield RemoteClient(lifeline)
            finally:
                with trio.CancelScope(shield=True):  # `close` has a deadline
                    await lifeline.close()
                lifeline.end()
                background.cancel()


@contextmanager
def _unwrapped() -> Iterator[None]:
    """One error, and not a group of it that a nursery made."""
    try:
        yield
    except BaseExceptionGroup as group:
        error = single(group)
        if error is group:
            raise
        raise error from error.__cause__


@asynccontextmanager
async def _discovered(target: Target) -> AsyncIterator[Source | None]:
    """Where addresses come from, while the block runs."""
    if target.discovery is None:
        yield None
        return
    table = PeerTable(peers_max=target.options.addresses_max)
    async with trio.open_nursery() as nursery:

        async def listen(*, task_status: trio.TaskStatus[None]) -> None:
            assert target.discovery is not None
            await listen_for_peers(
                target.discovery, table, secret=target.options.discovery_secret, task_status=task_status
            )

        await nursery.start(listen)
        yield Announced(table)
        nursery.cancel_scope.cancel()


def _hello(client_id: str, user: str | None, passcode: str | None) -> dict[str, str]:
    hello = {"client_id": client_id, "login": user or "", "passcode": passcode or ""}
    for name, text in hello.items():
        try:
            fits = isinstance(text, str) and len(text.encode()) <= TEXT_MAX
        except UnicodeEncodeError:
            fits = False
        if not fits:
            raise ConfigurationError(f"{name}: expected text of at most {TEXT_MAX} bytes in UTF-8")
    return hello


def _tls_context(
    tls: ssl.SSLContext | None, ca: str | Path | None, certificate: str | Path | None, key: str | Path | None
) -> ssl.SSLContext | None:
    """The context that is asked for, None when nothing is. Raises ConfigurationError."""
    if tls is not None:
        if ca is not None or certificate is not None or key is not None:
            raise ConfigurationError("tls is a whole context: give either it, or ca, certificate and key")
        return tls
    if (certificate is None) != (key is None):
        raise ConfigurationError("certificate and key are given together or not at all")
    if ca is None and certificate is None:
        return None
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"ca {ca}: expected a PEM file of certificates: {_reason(error)}") from error
    if certificate is not None:
        try:
            context.load_cert_chain(certificate, key, password=_no_password)
        except (OSError, ssl.SSLError, ValueError) as error:
            raise ConfigurationError(
                f"certificate {certificate} and key {key}: expected a PEM certificate and its private key, without a password: "
                f"{_reason(error)}"
            ) from error
    return context


def _no_password() -> str:
    """Instead of asking at the terminal."""
    raise ValueError("the key has a password")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError) and error.reason:
        return error.reason
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
