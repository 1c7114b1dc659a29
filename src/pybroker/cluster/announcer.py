"""Saying that one is there, and hearing who else is: the two tasks of discovery. Owns when is sent, and that nothing ends them.

DESIGN.md section 6. What is said is in `announcements.py`, how it travels in `datagrams.py`, who was heard in `peers.py`. A network
that is down is logged once, and tried again; it never ends a broker, and never holds up its stop.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import trio

from pybroker.cluster.announcements import (
    BOOT_BYTES,
    GONE,
    HERE,
    NUMBER_MAX,
    Announcement,
    Gate,
    Reason,
    encode,
)
from pybroker.cluster.datagrams import Datagrams, Open
from pybroker.cluster.discovery import GROUP, Discovery
from pybroker.cluster.multicast import Multicast
from pybroker.cluster.peers import PeerTable

log = logging.getLogger("pybroker.cluster")

INTERVAL = 0.5  # seconds between two announcements
SILENCE = 5.0  # seconds without any datagram after which the sockets are opened anew: an interface that comes back is joined again
RETRY = 0.5  # seconds until sockets that failed are opened again
GONE_REPEATS = 3  # one may be lost
GONE_TIMEOUT = 1.0  # seconds that leaving may take

_MEND = {
    Reason.VERSION: "it is of another version of pybroker",
    Reason.UNSIGNED: "it is not signed, and a secret is set here: the group's brokers and clients all need the same secret",
    Reason.SIGNED: "it is signed, and no secret is set here: the group's brokers and clients all need the same secret",
    Reason.FORGED: "its signature is wrong: who sent it has another secret, or forged it",
    Reason.NAME: "it has the name of another broker that is there: each broker, or set, needs a network name of its own",
    Reason.FULL: "the table of peers is full: network.peers_max",
}


class Announcer:
    """Announces one broker from `run` until that ends, and says "gone" then.

    group     None: that of the discovery URL, or the default one
    interval  seconds between two announcements
    boot      16 random bytes, another one for each announcer
    """

    def __init__(
        self,
        discovery: Discovery,
        *,
        name: str,
        node: str,
        epoch: int,
        urls: Sequence[str],
        group: str | None = None,
        secret: str = "",
        interval: float = INTERVAL,
        boot: bytes | None = None,
        open_datagrams: Open = Multicast,
    ) -> None:
        """Raises ConfigurationError when what is to be announced is not fit for it (as `encode` does)."""
        self.boot = boot if boot is not None else secrets.token_bytes(BOOT_BYTES)
        self._discovery = discovery
        self._group = group or discovery.group or GROUP
        self._secret = secret.encode() or None
        self._interval = interval
        self._open = open_datagrams
        self._told = _Told(f"announcements to {discovery.url}")
        self._changed = trio.Event()
        self._counter = 0
        self._said = self._checked(Announcement(name, node, epoch, tuple(urls), self.boot, NUMBER_MAX))

    def changed(self, *, urls: Sequence[str] | None = None, epoch: int | None = None) -> None:
        """Say at once what is different, or the same again. Raises ConfigurationError as the constructor does."""
        said = self._said
        self._said = self._checked(
            said._replace(urls=said.urls if urls is None else tuple(urls), epoch=said.epoch if epoch is None else epoch)
        )
        self._changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Announce until cancelled. Started when the first announcement was sent, or could not be."""
        datagrams: Datagrams | None = None
        started = False
        try:
            while True:
                self._changed = trio.Event()
                try:
                    if datagrams is None:
                        datagrams = self._open(self._discovery, listen=False)
                    await self._send(datagrams, HERE)
                    self._told.works()
                except OSError as error:
                    self._told.fails(error)
                    if datagrams is not None:
                        datagrams.close()
                        datagrams = None
                if not started:
                    task_status.started()
                    started = True
                with trio.move_on_after(self._interval):
                    await self._changed.wait()
        finally:
            if datagrams is not None:
                await self._leave(datagrams)

    def _checked(self, said: Announcement) -> Announcement:
        """What can be sent, also with the longest counter."""
        encode(said, self._group, self._secret)
        return said

    async def _leave(self, datagrams: Datagrams) -> None:
        with trio.move_on_after(GONE_TIMEOUT, shield=True):
            try:
                for _ in range(GONE_REPEATS):
                    await self._send(datagrams, GONE)
            except OSError as error:
                self._told.fails(error)
        datagrams.close()

    async def _send(self, datagrams: Datagrams, kind: str) -> None:
        self._counter += 1
        said = self._said._replace(counter=self._counter, kind=kind)
        await datagrams.send(encode(said, self._group, self._secret))


async def listen_for_peers(
    discovery: Discovery,
    table: PeerTable,
    *,
    group: str | None = None,
    secret: str = "",
    own_boots: AbstractSet[bytes] = frozenset(),
    open_datagrams: Open = Multicast,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Keep a table of peers up to date until cancelled. For brokers and for clients.

    group      None: that of the discovery URL, or the default one
    secret     of the group. Without one only unsigned announcements are taken, with one only those that it signed
    own_boots  of announcers of this process, whose announcements are none of a peer

    Started when it listens, or could not yet. Peers expire here also while nothing is heard.
    """
    gate = Gate(group or discovery.group or GROUP, secret.encode() or None, own_boots)
    listener = _Listener(gate, table, _Told(f"listening for announcements at {discovery.url}"))
    started = False
    async with trio.open_nursery() as nursery:
        nursery.start_soon(table.run_expiry)
        while True:
            datagrams: Datagrams | None = None
            try:
                datagrams = open_datagrams(discovery, listen=True)
            except OSError as error:
                listener.told.fails(error)
            if not started:
                task_status.started()
                started = True
            if datagrams is None:
                await trio.sleep(RETRY)
            else:
                await listener.listen(datagrams)


class _Listener:
    """Hands what comes to the table, and says once of each kind of mistake in others' configuration that it was seen."""

    def __init__(self, gate: Gate, table: PeerTable, told: _Told) -> None:
        self.told = told
        self._gate = gate
        self._table = table
        self._warned: set[Reason] = set()

    async def listen(self, datagrams: Datagrams) -> None:
        """Until it fails, or was silent for long. Closes what it listened to."""
        try:
            while True:
                with trio.move_on_after(SILENCE) as silent:
                    self._take(await datagrams.receive())
                self.told.works()
                if silent.cancelled_caught:
                    return
        except OSError as error:
            self.told.fails(error)
            await trio.sleep(RETRY)
        finally:
            datagrams.close()

    def _take(self, datagram: bytes) -> None:
        found = self._gate.admit(datagram)
        if isinstance(found, Reason):
            self._table.drop(found)
            self._warn(found, "an announcement")
        elif (reason := self._table.apply(found)) is not None:
            self._warn(reason, f"the announcement of {found.name!r} (node {found.node!r}, {', '.join(found.urls)})")

    def _warn(self, reason: Reason, whose: str) -> None:
        if reason in _MEND and reason not in self._warned:
            self._warned.add(reason)
            log.warning("%s was dropped: %s (told once; all are counted)", whose, _MEND[reason])


class _Told:
    """Logs that something fails once, until it works again."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._fails = False

    def fails(self, error: OSError) -> None:
        if not self._fails:
            self._fails = True
            log.warning("%s: %s; trying on", self._what, error.strerror or error)

    def works(self) -> None:
        if self._fails:
            self._fails = False
            log.info("%s: works again", self._what)
