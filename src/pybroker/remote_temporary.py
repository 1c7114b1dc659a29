"""Temporary destinations over the network. Owns what outlives a connection: the secret that each name is made of.

On each connection they are made again, before the subscriptions: under the same names, without what was in them.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from pybroker.destination import temporary_destination
from pybroker.errors import BrokerError, SendInDoubt
from pybroker.remote_waiting import Waiter

if TYPE_CHECKING:
    from pybroker.remote_lifeline import Lifeline

log = logging.getLogger("pybroker.client")


class RemoteTemporary:
    """One of them. `lost`: who wants to know of each lost connection."""

    def __init__(self, kind: str, lost: Callable[[BrokerError | None], None] | None) -> None:
        self.kind = kind
        self.secret = secrets.token_hex(16)
        self.destination = str(temporary_destination(kind, self.secret))
        self.told_lost = lost

    def answered(self, error: BrokerError | None) -> None:
        """Client: it was made again, or was not; then its subscriptions say so, too."""
        if error is not None:
            log.warning("%s could not be made again: %s", self.destination, error)

    def lost(self, error: BrokerError | None) -> None:
        """Client: the connection was lost before there was an answer; it is asked for again on the next."""


class RemoteTemporaries:
    """Those of one client, by their names."""

    def __init__(self, lifeline: Lifeline) -> None:
        self._lifeline = lifeline
        self._there: dict[str, RemoteTemporary] = {}

    async def open(self, kind: str, lost: Callable[[BrokerError | None], None] | None) -> str:
        """Make one; returns its name when it is there. Raises LimitExceeded, BrokerUnavailable."""
        temporary = RemoteTemporary(kind, lost)
        while True:
            await self._lifeline.wait_connected()
            waiter = Waiter("making a temporary destination")
            self._lifeline.create_temporary(waiter, kind, temporary.secret)
            try:
                await waiter.wait()
            except SendInDoubt:  # the connection was lost: on another one it is made, or taken over
                continue
            except BaseException:
                self._lifeline.delete_temporary(temporary.destination)
                raise
            self._there[temporary.destination] = temporary
            return temporary.destination

    def close(self, name: str) -> None:
        """Give one up."""
        if self._there.pop(name, None) is not None:
            self._lifeline.delete_temporary(name)

    def attach(self) -> None:
        """There is a connection: make all of them on it."""
        for temporary in self._there.values():
            self._lifeline.create_temporary(temporary, temporary.kind, temporary.secret)

    def detach(self, error: BrokerError | None) -> None:
        """The connection is lost."""
        for temporary in list(self._there.values()):
            if temporary.told_lost is not None:
                temporary.told_lost(error)
