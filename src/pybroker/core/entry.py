"""An entry: one message in one queue. Owns the states that it passes through; decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pybroker.core.consumer import Consumer
    from pybroker.core.queue import Queue
    from pybroker.core.shared import SharedBody
    from pybroker.message import Message

READY = 0  # waits in its queue's window
HELD = 1  # given to a consumer, not yet shown to it: before its batch is committed, or within the turn
SENT = 2  # shown to the consumer, not yet acknowledged
SETTLING = 3  # acknowledged (or rejected) inside an open transaction
GONE = 4  # no longer in its queue
STRANDED = 5  # at the hop limit of the network: only a consumer of this broker may have it
DELAYED = 6  # rejected, and not yet due for its next delivery: see redelivery.py

ENTRY_BYTES = 512  # what an entry is counted with beside its message: about what its objects take


class Entry:
    """A message's place in a queue.

    order       see `pybroker.operations`: ascending order is delivery order
    deliveries  deliveries that have ended without an acknowledgement
    stored      the store holds it; otherwise it lives in memory, or in the spool when `spooled`
    recorded    the store holds a delivery record of it
    shared      the body that it shares with other durable subscriptions, or None
    consumer, tag   who has it, under which delivery tag (states HELD, SENT and SETTLING)
    """

    __slots__ = (
        "consumer",
        "deliveries",
        "message",
        "order",
        "queue",
        "recorded",
        "shared",
        "spooled",
        "state",
        "stored",
        "tag",
    )

    consumer: Consumer | None

    def __init__(
        self, message: Message, order: int, queue: Queue, stored: bool, shared: SharedBody | None = None
    ) -> None:
        self.message = message
        self.order = order
        self.queue = queue
        self.stored = stored
        self.shared = shared
        self.deliveries = 0
        self.state = READY
        self.consumer = None
        self.tag = 0
        self.recorded = False
        self.spooled = False

    def again(self) -> Entry:
        """A successor for an entry whose held delivery must not be shown any more; this one is GONE."""
        successor = Entry(self.message, self.order, self.queue, self.stored, self.shared)
        successor.deliveries = self.deliveries
        successor.recorded = self.recorded
        successor.spooled = self.spooled
        self.state = GONE
        return successor

    def __repr__(self) -> str:
        state = ("READY", "HELD", "SENT", "SETTLING", "GONE", "STRANDED", "DELAYED")[self.state]
        return f"<Entry {self.message.message_id!r} {state} in {self.queue.name} at {self.order:#x}>"
