"""Connections, consumers and transactions as the core knows them: who holds what. Decides nothing about messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pybroker.consumer_options import PLAIN, ConsumerOptions
from pybroker.core.entry import Entry

if TYPE_CHECKING:
    from pybroker.core.queue import Queue
    from pybroker.core.temporary import TemporaryQueue
    from pybroker.core.wildcard import Head
    from pybroker.destination import Destination
    from pybroker.message import Message

AUTO = "auto"  # acknowledged when the transport has taken it
CUMULATIVE = "cumulative"  # an acknowledgement is for all deliveries up to it
INDIVIDUAL = "individual"  # each on its own
JOIN_WORK = 16  # coming and leaving of a consumer of one queue take as long as so many messages
ACK_MODES = (AUTO, CUMULATIVE, INDIVIDUAL)


class Connection:
    """One client. `sink` is the run time's object for it, which the core only hands back."""

    __slots__ = (
        "client_id",
        "closed",
        "consumers",
        "members",
        "name",
        "paused",
        "produced",
        "sink",
        "temporaries",
        "transactions",
    )

    def __init__(self, sink: Any, client_id: str) -> None:
        self.sink = sink
        self.client_id = client_id
        self.consumers: dict[Consumer, None] = {}  # in order, so that the core is deterministic
        self.members = 0  # queues that those of its consumers have that have several, together
        self.transactions: dict[str, Transaction] = {}
        self.temporaries: dict[str, TemporaryQueue] = {}  # its temporary destinations
        self.name = ""  # in advisories; "" while its client was not let in
        self.produced: dict[str, Destination] = {}  # where it sends to, as far as somebody watches
        self.paused = False  # its outbox is full: nothing is dispatched to it
        self.closed = False


class Consumer:
    """One subscription of one connection to one queue.

    credit   messages that it may still be given; `size` bytes that it holds unacknowledged, at most `size_max`
    unacked  delivery tag to entry, in order of delivery
    holding  its deliveries that wait for their batch
    context  the run time's own data about it
    """

    __slots__ = (
        "ack_mode",
        "connection",
        "context",
        "credit",
        "holding",
        "last_tag",
        "listed",
        "matches",
        "options",
        "queue",
        "sink",
        "size",
        "size_max",
        "unacked",
    )

    head: Head | None = None  # whose member it is
    members: Mapping[Queue, Consumer] | None = None  # of a consumer of several queues, in each of these

    def __init__(
        self,
        connection: Connection,
        queue: Queue,
        ack_mode: str,
        prefetch: int,
        size_max: int,
        context: Any,
        options: ConsumerOptions = PLAIN,
    ) -> None:
        self.connection = connection
        self.sink = connection.sink
        self.queue = queue
        self.ack_mode = ack_mode
        self.credit = prefetch
        self.size = 0
        self.size_max = size_max
        self.unacked: dict[int, Entry] = {}
        self.last_tag = 0
        self.holding = 0
        self.listed = False  # it stands in its queue's list of consumers that may be given something
        self.context = context
        self.options = options
        self.matches: Callable[[Message], bool] | None = None  # which messages it may be given; None = all

    @property
    def able(self) -> bool:
        """Whether it may be given a message now."""
        return self.credit > 0 and self.size < self.size_max and not self.connection.paused

    @property
    def parts(self) -> Iterable[Consumer]:
        """Itself; of a consumer of several queues its members."""
        return (self,)

    def start(self) -> None:
        """Take part in the dispatch, for the first time."""
        self.go_on()

    def go_on(self) -> None:
        """Take part in the dispatch if it is able."""
        self.queue.list_consumer(self)
        self.queue.dispatch()

    def rest(self) -> None:
        """Be given nothing."""
        self.queue.unlist_consumer(self)


class Transaction:
    """Sends and settlements that wait for a commit."""

    __slots__ = ("messages", "numbered", "settled", "size")

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.numbered: dict[Message, tuple[str, int]] = {}  # of these, those with a producer, and their sequences
        self.settled: list[tuple[Entry, bool]] = []  # (entry, True = acknowledged, False = rejected)
        self.size = 0

    @property
    def count(self) -> int:
        return len(self.messages) + len(self.settled)
