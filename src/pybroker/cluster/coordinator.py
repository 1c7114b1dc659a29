"""What a replica asks of ZooKeeper, as a small protocol. Owns its shapes; knows no rule of the election.

Nodes are named relative to the set's own path: ``config``, ``epoch``, ``roster``, ``slots/NAME``, ``leader``, ``alive/NAME``.
DESIGN.md section 5. There is a ZooKeeper version and an in-memory version under one conformance suite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from pybroker.errors import BrokerError


class Node(NamedTuple):
    """One node. `version` counts its writes; `owner` is the session that an ephemeral one ends with, 0 for others."""

    data: bytes
    version: int
    owner: int = 0


class SetNode(NamedTuple):
    """Write a node that has that version."""

    path: str
    data: bytes
    version: int


class CheckNode(NamedTuple):
    """The node must have that version."""

    path: str
    version: int


class CreateNode(NamedTuple):
    """Make a node that is not there; an ephemeral one goes with this session."""

    path: str
    data: bytes
    ephemeral: bool = False


class DeleteNode(NamedTuple):
    """Remove a node that has that version."""

    path: str
    version: int


Write = SetNode | CheckNode | CreateNode | DeleteNode


class Outcome(Enum):
    """What became of a transaction."""

    DONE = "done"
    REFUSED = "refused"  # a version or an existence was another one; nothing was written
    UNKNOWN = "unknown"  # it may have been written, or be written yet: settle it by reading and another versioned write


class CoordinatorLost(BrokerError):
    """There is no connection to ZooKeeper now; nothing was asked."""

    code = "coordinator-lost"


class Coordinator(Protocol):
    """One replica's session with ZooKeeper, below the path of its set."""

    @property
    def connected(self) -> bool:
        """Whether requests can be made now."""
        ...

    @property
    def session(self) -> int:
        """The id of the present session, 0 when there is none. It changes when a session expires."""
        ...

    async def read(self) -> Mapping[str, Node]:
        """All nodes of the set, each as it was at some moment after the call (``sync`` comes first).

        Raises CoordinatorLost. What it read is watched: `wait_change` returns when some of it may have changed.
        """
        ...

    async def transact(self, writes: Sequence[Write]) -> Outcome:
        """Do all of the writes at one moment, or none. Only submitted while connected; raises CoordinatorLost otherwise.

        Cancelling it withdraws nothing: the outcome is then unknown.
        """
        ...

    @property
    def changes(self) -> int:
        """The count of (possible) changes so far, those of the connection and the session included."""
        ...

    async def wait_change(self, seen: int) -> int:
        """Wait until `changes` is not `seen`, and return it.

        Take `changes` before a `read`, and give it here after it: then no change is missed.
        """
        ...

    async def aclose(self) -> None:
        """End the session: its ephemeral nodes go at once if there is a connection."""
        ...
