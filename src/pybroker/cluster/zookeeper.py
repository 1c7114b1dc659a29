"""A replica's session with real ZooKeeper, over kazoo. Owns the connection; knows no rule of the election.

DESIGN.md section 5. kazoo runs threads of its own; what they call here only hands over to trio and can't raise. None of
kazoo's recipes is used. No request is submitted unless the connection stands at that very moment (kazoo would keep it and
send it after reconnecting), and nothing is ever tried again: what became of a transaction is an `Outcome`.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import trio
from kazoo.client import KazooClient
from kazoo.exceptions import (
    AuthFailedError,
    BadVersionError,
    InvalidACLError,
    KazooException,
    NoAuthError,
    NodeExistsError,
    NoNodeError,
    NotEmptyError,
    OperationTimeoutError,
    RolledBackError,
    RuntimeInconsistency,
)
from kazoo.handlers.threading import SequentialThreadingHandler
from kazoo.hosts import collect_hosts
from kazoo.protocol.connection import _CONNECTION_DROP
from kazoo.protocol.states import KazooState, KeeperState
from kazoo.retry import KazooRetry
from kazoo.security import ACL, OPEN_ACL_UNSAFE, Permissions, make_digest_acl

from pybroker.cluster.coordinator import (
    CheckNode,
    CoordinatorLost,
    CreateNode,
    DeleteNode,
    Node,
    Outcome,
    SetNode,
    Write,
)
from pybroker.cluster.registry import check_name
from pybroker.errors import ConfigurationError

log = logging.getLogger(__name__)

ROOT = "pybroker"  # all sets lie below this node
SINGLE_NODES = ("config", "epoch", "roster", "leader")
FAMILIES = ("slots", "alive")  # nodes whose children are read
RETRY_DELAY = 0.05  # seconds between connection attempts: at first,
RETRY_DELAY_MAX = 1.0  # and in the end
CLOSE_TIMEOUT = 2.0  # seconds that `aclose` waits for ZooKeeper's answer
READ_TRIES_MAX = 3  # a read begins again when an operator removes the set's nodes under it

# What says that a version or an existence was another one. RolledBack and RuntimeInconsistency stand for the
# writes before and after the one that was refused.
_REFUSALS = (BadVersionError, NoNodeError, NodeExistsError, NotEmptyError, RolledBackError, RuntimeInconsistency)
_FORBIDDEN = (NoAuthError, InvalidACLError, AuthFailedError)


@dataclass(frozen=True, slots=True)
class ZooKeeperTls:
    """TLS to ZooKeeper. Paths of PEM files; the servers' certificates must name the hosts that are connected to.

    ca              certificates of the authorities to trust beside the system's
    certificate     this client's own, when the servers ask for one, with `key` (and `key_password`)
    """

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    key_password: str | None = None


class ZooKeeperCoordinator:
    """`Coordinator` over a ZooKeeper ensemble. `start` it; `aclose` it (or use it in ``async with``).

    servers          ``HOST:PORT,HOST:PORT`` and perhaps a chroot: ``HOST:PORT/CHROOT``. What is missing of the chroot is made.
    name             of the set
    session_timeout  seconds; ZooKeeper may shorten it to 20 of its ticks
    secret           ``USER:PASSWORD``: all that is made belongs to it, and nobody else may read or write it
    tls              when given, the connection is encrypted and the servers' names are checked

    Raises ConfigurationError when an argument is not what it must be.
    """

    def __init__(
        self,
        servers: str,
        name: str,
        *,
        session_timeout: float = 10.0,
        secret: str | None = None,
        tls: ZooKeeperTls | None = None,
    ) -> None:
        if session_timeout <= 0:
            raise ConfigurationError(f"session_timeout must be more than 0 seconds, not {session_timeout}")
        self._hosts, chroot = _parse_servers(servers)
        self._base = f"{chroot}/{ROOT}/{check_name(name, 'the name of the set')}"
        self._session_timeout = session_timeout
        self._credential = _parse_secret(secret)
        self._acl = OPEN_ACL_UNSAFE if self._credential is None else [make_digest_acl(*self._credential, all=True)]
        self._tls = _check_tls(tls)
        self._client: _Client | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._is_connected = False
        self._session = 0
        self._prepared = 0  # the session that found or made the set's parent nodes
        self._children: dict[str, list[str]] = {family: [] for family in FAMILIES}
        self._changes = 0
        self._changed = trio.Event()

    async def start(self) -> None:
        """Begin to connect, and return at once. Attempts go on until `aclose`."""
        self._token = trio.lowlevel.current_trio_token()
        auth = [] if self._credential is None else [("digest", ":".join(self._credential))]
        client = _Client(self._hosts, self._session_timeout, auth, self._tls, self._on_state)
        self._client = client  # before its first news can come
        await trio.to_thread.run_sync(client.start_async)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    @property
    def connected(self) -> bool:
        return self._is_connected

    @property
    def session(self) -> int:
        return self._session

    @property
    def changes(self) -> int:
        return self._changes

    async def read(self) -> Mapping[str, Node]:
        """See `Coordinator.read`. Also raises ConfigurationError when the nodes belong to somebody else."""
        for _ in range(READ_TRIES_MAX):
            await self._prepare()
            nodes = await self._read_once()
            if nodes is not None:
                return MappingProxyType(nodes)
            self._prepared = 0
        raise CoordinatorLost(f"the nodes below {self._base} vanish while they are read")

    async def transact(self, writes: Sequence[Write]) -> Outcome:
        """See `Coordinator.transact`. Also raises ConfigurationError when the nodes belong to somebody else."""
        if not writes:
            raise ValueError("a transaction needs a write")
        if any(not isinstance(write, CreateNode) and write.version < 0 for write in writes):
            raise ValueError("a version is 0 or more: a write without a version could not be settled")
        await self._prepare()
        (answer,) = await self._ask(lambda client: [self._submit_transaction(client, writes)])
        if isinstance(answer, _NotSubmitted):
            raise CoordinatorLost("there is no connection to ZooKeeper")
        results = answer if isinstance(answer, list) else [answer]  # a list of results *and exceptions*
        errors = [result for result in results if isinstance(result, Exception)]
        self._check_allowed(errors)
        if not errors:
            return Outcome.DONE
        if all(isinstance(error, _REFUSALS) for error in errors):
            return Outcome.REFUSED
        log.info("a transaction with ZooKeeper has an unknown outcome: %r", errors[0])
        return Outcome.UNKNOWN

    async def wait_change(self, seen: int) -> int:
        """See `Coordinator.wait_change`."""
        while self._changes == seen:
            await self._changed.wait()
        return self._changes

    async def aclose(self) -> None:
        """See `Coordinator.aclose`. Takes at most a few seconds, also when it is cancelled."""
        client, self._client = self._client, None
        self._is_connected = False
        self._session = 0
        self._bump()
        if client is None:
            return
        # kazoo waits for the server: a thread that it keeps longer than that is left to end by itself
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await trio.to_thread.run_sync(client.end, abandon_on_cancel=True)

    # -- requests

    async def _ask(self, submit: Callable[[_Client], list[Any]]) -> list[Any]:
        """Submit requests, all in one go, and return their answers: values, or the exceptions themselves.

        Raises CoordinatorLost when there is no connection. A cancelled caller has submitted nothing, or withdraws nothing.
        """
        await trio.lowlevel.checkpoint()
        client = self._client
        if client is None or not self._is_connected:
            raise CoordinatorLost("there is no connection to ZooKeeper")
        results = submit(client)
        countdown = _Countdown(len(results))
        for result in results:
            result.rawlink(lambda _: self._hand_over(countdown.count))
        with trio.move_on_after(self._session_timeout):
            await countdown.done.wait()
        if any(not result.ready() for result in results):
            # kazoo notices a silent server only if nothing is sent, and can lose an answer that it does not understand
            client.drop_connection()
        return [_answer_of(result) for result in results]

    async def _prepare(self) -> None:
        """Once in each session: make the parent nodes that are missing, and see that they are ours."""
        session = self._session
        if self._prepared == session and session:
            return
        parts = self._base.strip("/").split("/")
        parents = ["/" + "/".join(parts[: depth + 1]) for depth in range(len(parts))]
        parents += [f"{self._base}/{family}" for family in FAMILIES]
        # asked for first: creating one that exists is forbidden where creating its siblings is
        found = await self._ask(lambda client: [client.exists_async(path) for path in parents])
        # one that we may not even ask for is there; whether we may use it shows later
        self._check_answers([answer for answer in found if not isinstance(answer, NoAuthError)])
        absent = [path for path, stat in zip(parents, found, strict=True) if stat is None]
        if absent:
            made = await self._ask(lambda client: [client.create_async(path, b"", acl=self._acl) for path in absent])
            self._check_answers([answer for answer in made if not isinstance(answer, NodeExistsError)])
        if self._credential is not None:
            (answer,) = await self._ask(lambda client: [client.get_acls_async(self._base)])
            self._check_answers([answer])
            if any(_is_open(entry) for entry in answer[0]):
                raise ConfigurationError(
                    f"the node {self._base} in ZooKeeper is open to everyone, but a secret is configured: "
                    "remove what was made without it, or give it the secret's ACL"
                )
        self._prepared = session

    async def _read_once(self) -> dict[str, Node] | None:
        """The nodes; None when parent nodes are missing. ZooKeeper answers in order, so that the ``sync`` counts for all."""
        base = self._base
        known = [*SINGLE_NODES, *(f"{family}/{name}" for family in FAMILIES for name in self._children[family])]

        def submit(client: _Client) -> list[Any]:
            requests = [client.sync_async(base)]
            for path in (base, *(f"{base}/{family}" for family in FAMILIES)):
                requests.append(client.get_children_async(path, watch=self._on_watch))
            return requests + [client.get_async(f"{base}/{path}", watch=self._on_watch) for path in known]

        answers = await self._ask(submit)
        if any(isinstance(answer, NoNodeError) for answer in answers[:4]):
            return None
        self._check_answers(answers[:4])
        for family, names in zip(FAMILIES, answers[2:4], strict=True):
            self._children[family] = sorted(names)
        found = dict(zip(known, answers[4:], strict=True))
        # what was not known before is asked for now; a node that is gone again changes its parent, which is watched
        more = [f"{family}/{name}" for family in FAMILIES for name in self._children[family]]
        more = [path for path in more if path not in found or isinstance(found[path], NoNodeError)]
        if more:
            answers = await self._ask(
                lambda client: [client.get_async(f"{base}/{path}", watch=self._on_watch) for path in more]
            )
            found.update(zip(more, answers, strict=True))
        there = {path: answer for path, answer in found.items() if not isinstance(answer, NoNodeError)}
        self._check_answers(list(there.values()))
        return {path: Node(data, stat.version, stat.ephemeralOwner) for path, (data, stat) in there.items()}

    def _submit_transaction(self, client: _Client, writes: Sequence[Write]) -> Any:
        transaction = client.transaction()
        for write in writes:
            path = f"{self._base}/{write.path}"
            match write:
                case SetNode():
                    transaction.set_data(path, write.data, write.version)
                case CheckNode():
                    transaction.check(path, write.version)
                case CreateNode():
                    transaction.create(path, write.data, acl=self._acl, ephemeral=write.ephemeral)
                case DeleteNode():
                    transaction.delete(path, write.version)
        return transaction.commit_async()

    def _check_answers(self, answers: Sequence[Any]) -> None:
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        self._check_allowed(errors)
        if errors:
            raise CoordinatorLost(f"ZooKeeper did not answer: {errors[0]!r}")

    def _check_allowed(self, errors: Sequence[Exception]) -> None:
        if any(isinstance(error, _FORBIDDEN) for error in errors):
            raise ConfigurationError(
                f"ZooKeeper denies access to {self._base}: it, or a node above it, belongs to somebody else. "
                "The secret must be the one that the set was made with; sets with other secrets need a chroot of their own"
            )

    # -- what kazoo's threads call

    def _on_watch(self, _event: object) -> None:
        self._hand_over(self._bump, idempotent=True)

    def _on_state(self, is_connected: bool, session: int) -> None:
        self._hand_over(lambda: self._change_state(is_connected, session))

    def _hand_over(self, function: Callable[[], None], *, idempotent: bool = False) -> None:
        """Have trio's thread call a function, which must not raise."""
        assert self._token is not None
        try:
            self._token.run_sync_soon(function, idempotent=idempotent)
        except trio.RunFinishedError:
            log.debug("trio has ended before kazoo did")

    # -- what they hand over

    def _change_state(self, is_connected: bool, session: int) -> None:
        if self._client is None:
            return  # closed in the meantime
        if session != self._session and self._session:
            log.warning("the session 0x%x with ZooKeeper is over", self._session)
        if is_connected and not self._is_connected:
            log.info("connected to ZooKeeper, session 0x%x", session)
        elif self._is_connected and not is_connected:
            log.warning("the connection to ZooKeeper is lost")
        self._is_connected = is_connected
        self._session = session
        self._bump()

    def _bump(self) -> None:
        self._changes += 1
        self._changed.set()
        self._changed = trio.Event()


class _NotSubmitted(KazooException):  # type: ignore[misc]  # kazoo has no types
    """The connection was gone when the request was to be submitted."""


class _Countdown:
    """An event that is set at the n-th call."""

    __slots__ = ("_left", "done")

    def __init__(self, count: int) -> None:
        self._left = count
        self.done = trio.Event()

    def count(self) -> None:
        self._left -= 1
        if not self._left:
            self.done.set()


class _Handler(SequentialThreadingHandler):  # type: ignore[misc]
    """kazoo's threads and sockets, with bounds that it lacks."""

    def __init__(self, connect_timeout: float, before: Callable[[str, int], None]) -> None:
        super().__init__()
        self._connect_timeout = connect_timeout
        self._before = before
        self._has_told = False

    def create_connection(self, *args: Any, **kwargs: Any) -> Any:
        # kazoo waits a whole session timeout for one address that swallows packets: the session would end meanwhile
        kwargs["timeout"] = self._connect_timeout
        address = kwargs["address"]
        self._before(kwargs["hostname"], address[1])
        try:
            connection = super().create_connection(*args, **kwargs)
        except OSError as error:
            if not self._has_told:  # once in an outage
                log.warning("ZooKeeper can't be reached at %s:%d (%s); trying on", *address[:2], error)
            self._has_told = True
            raise
        return connection

    def tell_again(self) -> None:
        self._has_told = False

    def select(self, rlist: Sequence[Any], wlist: Sequence[Any], xlist: Sequence[Any], timeout: float) -> Any:
        # TLS may have decrypted more than was asked for: the socket itself is silent then, and kazoo would wait for it
        pending = [one for one in rlist if isinstance(one, ssl.SSLSocket) and one.pending()]
        if not pending:
            return super().select(rlist, wlist, xlist, timeout)
        readable, writable, broken = super().select(rlist, wlist, xlist, 0)
        return [*pending, *(one for one in readable if one not in pending)], writable, broken


class _Client(KazooClient):  # type: ignore[misc]
    """kazoo's client, with a gate that lets no request in while there is no connection.

    The methods that it overrides are kazoo's own seams (of 2.11, the first that checks a server's name). All but the
    constructor run on kazoo's threads too.
    """

    hosts: list[tuple[str, int]]

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        session_timeout: float,
        auth: Sequence[tuple[str, str]],
        tls: ZooKeeperTls | None,
        tell: Callable[[bool, int], None],
    ) -> None:
        self._gate = threading.Lock()
        self._tell = tell
        self._session_seconds = session_timeout
        self._away_since: float | None = None
        self._peer: tuple[str, int] | None = None
        hosts = random.sample(hosts, len(hosts))
        handler = _Handler(session_timeout / (2 * len(hosts)), self._before_attempt)
        retry = KazooRetry(max_tries=-1, delay=RETRY_DELAY, max_delay=RETRY_DELAY_MAX, sleep_func=handler.sleep_func)
        # an answer that is not ZooKeeper's raises whatever it likes, and must not end the attempts
        retry.retry_exceptions = (*retry.retry_exceptions, Exception)
        super().__init__(
            hosts=",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in hosts),
            timeout=session_timeout,
            handler=handler,
            auth_data=auth,
            randomize_hosts=False,  # the order is kept here: see `_on_kazoo_state`
            connection_retry=retry,
            logger=_quiet_logger(),
            use_ssl=tls is not None,
            ca=tls.ca if tls else None,
            certfile=tls.certificate if tls else None,
            keyfile=tls.key if tls else None,
            keyfile_password=tls.key_password if tls else None,
            verify_certs=True,
            check_hostname=tls is not None,
        )
        self.add_listener(self._on_kazoo_state)

    def end(self) -> None:
        """End the session. Blocks until ZooKeeper has answered or can't be reached."""
        opening = self._connection._socket if self._state != KeeperState.CONNECTED else None
        if opening is not None:  # kazoo would wait for a silent server's welcome first
            with contextlib.suppress(OSError):
                opening.shutdown(socket.SHUT_RDWR)
        try:
            self.stop()
            self.close()
        except Exception as error:  # kazoo raises bare ones here
            log.warning("the session with ZooKeeper did not end in order: %s", error)

    def drop_connection(self) -> None:
        """Connect anew: the server does not answer."""
        self._call(_CONNECTION_DROP, self.handler.async_result())

    def _call(self, request: Any, async_object: Any) -> Any:
        # The connection's thread changes the state first and fails all waiting requests then, within the same gate:
        # a request is either failed by it or not let in, and none is sent after the next connection.
        with self._gate:
            if self._state != KeeperState.CONNECTED:
                async_object.set_exception(_NotSubmitted())
                return False
            return super()._call(request, async_object)

    def _notify_pending(self, state: Any) -> None:
        with self._gate:
            super()._notify_pending(state)

    def _on_kazoo_state(self, state: str) -> None:
        if state == KazooState.CONNECTED:
            self._away_since = None
            self.handler.tell_again()
        elif self._away_since is None:
            self._away_since = time.monotonic()
            # the server that went away (it may be paused, and accept connections still) is tried last
            if self._peer in self.hosts:
                self.hosts = [host for host in self.hosts if host != self._peer] + [self._peer]
        self._tell(state == KazooState.CONNECTED, 0 if state == KazooState.LOST else self._session_id or 0)

    def _before_attempt(self, host: str, port: int) -> None:
        self._peer = (host, port)
        # An ensemble that lost its data, or got an old copy back, refuses whoever has seen newer transactions, for good.
        # We need not be kept from older states: every read syncs. Said only when it seems so: it ends the session early.
        if self._away_since is not None and time.monotonic() - self._away_since > self._session_seconds:
            self.last_zxid = 0


def _quiet_logger() -> logging.Logger:
    """kazoo tells of every attempt; an application that wants to hear it sets this logger's level."""
    logger = log.getChild("kazoo")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)
    return logger


def _answer_of(result: Any) -> Any:
    if not result.ready():
        return OperationTimeoutError()
    return result.value if result.exception is None else result.exception


def _is_open(entry: ACL) -> bool:
    return entry.id.scheme == "world" and bool(entry.perms & ~Permissions.READ)


def _parse_servers(servers: str) -> tuple[list[tuple[str, int]], str]:
    """Hosts with ports, and the chroot: empty, or a path without a slash at its end."""
    try:
        hosts, chroot = collect_hosts(servers)
    except ValueError as error:
        raise ConfigurationError(
            f"the ZooKeeper servers {servers!r} must be HOST:PORT,HOST:PORT with or without /CHROOT ({error})"
        ) from error
    chroot = (chroot or "").rstrip("/")
    if any(part in ("", ".", "..") or "\0" in part for part in chroot.split("/")[1:]):
        raise ConfigurationError(f"the chroot {chroot!r} of the ZooKeeper servers is not a path")
    return list(dict.fromkeys(hosts)), chroot


def _parse_secret(secret: str | None) -> tuple[str, str] | None:
    if secret is None:
        return None
    user, colon, password = secret.partition(":")
    if not (user and colon and password):
        raise ConfigurationError("the ZooKeeper secret must be USER:PASSWORD, neither of them empty")
    return user, password


def _check_tls(tls: ZooKeeperTls | None) -> ZooKeeperTls | None:
    """Load the files once: kazoo would only find that they can't be read at each attempt."""
    if tls is None:
        return None
    if (tls.certificate is None) != (tls.key is None):
        raise ConfigurationError("TLS to ZooKeeper needs both certificate and key, or neither")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if tls.ca is not None:
            context.load_verify_locations(tls.ca)
        if tls.certificate is not None and tls.key is not None:
            context.load_cert_chain(tls.certificate, tls.key, tls.key_password)
    except OSError as error:
        raise ConfigurationError(f"a TLS file for ZooKeeper can't be used: {error}") from error
    return tls
