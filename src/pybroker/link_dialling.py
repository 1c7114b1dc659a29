"""Keeps a link with one peer: dials its addresses in turn whenever there is no link with it. Owns the back-off; no connection.

DESIGN.md section 6. What a dialled link is, and which of two stays, is its owner's (`broker_network`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import trio

from pybroker.config import NetworkConfig
from pybroker.link_connection import LinkConnection
from pybroker.protocols.link_handshake import GROUP, ITSELF, LINKED, NAME, REPLACED, SECRET, VERSION

log = logging.getLogger("pybroker.network")

JITTER = 0.5  # a pause is at least so much of what it is at most
ELSEWHERE_MAX = 16  # addresses that a round takes from those that refuse
TOLD_MAX = 64  # troubles that are remembered as logged, until there is a link
OPERATORS = (GROUP, NAME, VERSION, SECRET)  # codes of what only an operator can mend
GRACE = 3.0  # silences of a link for which the higher name waits to be dialled, before it dials itself


class Owner(Protocol):
    """What a dialler needs to know, and to have done."""

    def random(self) -> float:
        """From 0 up to 1."""

    def missing(self, name: str, epoch: int) -> bool:
        """Whether there is no link with that peer, or only one with an earlier leader of it than that of `epoch`."""

    async def wait_missing(self, name: str, epoch: int) -> None:
        """Wait until that is so."""

    async def dial(self, url: str) -> LinkConnection | str:
        """Dial, and let the link be served; or why there is no connection."""


class Dialler:
    """Keeps the link with one peer.

    name    of the peer; "" for an address that was given, as long as nobody has answered there
    urls    its addresses
    wanted  False: it was not heard for long; it is not dialled any more once there is no link with it
    trouble why there is no link, "" if nothing was wrong
    link    the one that it has dialled last
    """

    def __init__(self, owner: Owner, config: NetworkConfig, name: str, urls: Sequence[str], epoch: int = 0) -> None:
        self.name = name
        self.urls = tuple(urls)
        self.epoch = epoch
        self.wanted = True
        self.trouble = ""
        self.link: LinkConnection | None = None
        self._owner = owner
        self._config = config
        self._fixed = not name
        self._changed = trio.Event()
        self._following = trio.CancelScope()
        self._told: set[str] = set()

    def update(self, urls: Sequence[str], epoch: int) -> None:
        """It announces itself, perhaps otherwise than before: then it is tried at once."""
        if (tuple(urls), epoch) != (self.urls, self.epoch) or not self.wanted:
            later = epoch > self.epoch
            self.urls, self.epoch = tuple(urls), epoch
            self.wanted = True
            self._changed.set()
            if later:  # whatever link there is, it is with an earlier leader
                self._following.cancel()

    def give_up(self) -> None:
        """It is not heard any more."""
        self.wanted = False
        self._changed.set()

    async def run(self, reluctant: bool = False) -> None:
        """Keep the link until the peer is not wanted any more; `reluctant`: it is the other one that should dial."""
        config = self._config
        delay = config.retry_interval
        while self.wanted and self.urls:
            if self.name:
                with trio.CancelScope() as self._following:
                    await self._owner.wait_missing(self.name, self.epoch)
                if self._following.cancelled_caught:
                    continue
            if reluctant:
                await trio.sleep(GRACE * config.heartbeat_timeout)
                if not self._owner.missing(self.name, self.epoch):
                    continue
            self._changed = trio.Event()
            if not self.wanted:
                return
            if await self._round():
                delay = config.retry_interval
            with trio.move_on_after(delay * (JITTER + (1 - JITTER) * self._owner.random())):
                await self._changed.wait()
            delay = config.retry_interval if self._changed.is_set() else min(2 * delay, config.retry_interval_max)

    async def _round(self) -> bool:
        """Try each address once; True after a link that has worked."""
        urls = list(self.urls)
        for url in urls:  # it grows
            link = await self._owner.dial(url)
            if isinstance(link, str):
                self._tell(url, link)
                continue
            self.link = link
            with trio.CancelScope() as self._following:
                await link.wait_closed()
            if link.peer is not None and self._fixed:
                self.name = link.peer.name
            if self._following.cancelled_caught:
                return True
            if link.code == ITSELF:
                self.urls = tuple(other for other in self.urls if other != url)
                continue
            self._tell(url, link.text, link.code)
            if link.heard:
                self._told.clear()
                return link.code != REPLACED
            if link.code == LINKED:
                return False
            more = [other for other in link.elsewhere if other not in urls]
            urls += more[: max(0, len(self.urls) + ELSEWHERE_MAX - len(urls))]
        return False

    def _tell(self, url: str, trouble: str, code: str = "") -> None:
        """Keep it for who asks; log what is new, once."""
        self.trouble = f"{url}: {trouble}"
        if self.trouble not in self._told and len(self._told) < TOLD_MAX:
            self._told.add(self.trouble)
            log.log(logging.WARNING if code in OPERATORS else logging.INFO, "no link by %s: %s", url, trouble)
