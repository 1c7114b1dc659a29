"""Strategies and helpers that the store's tests share."""

from __future__ import annotations

from hypothesis import strategies as st

from pybroker.message import Message
from pybroker.operations import LEVELS, QueueRecord, StoredEntry, order_of
from pybroker.store import Store

u64 = st.integers(0, 2**64 - 1)
sequences = st.integers(0, 2**56 - 1)
text = st.text(st.characters(codec="utf-8"), max_size=30)

messages = st.builds(
    Message,
    destination=text,
    body=st.binary(max_size=200),
    header_block=st.binary(max_size=60),
    durable=st.booleans(),
    priority=st.integers(0, 9),
    expires=u64,
    message_id=st.binary(max_size=40),
    timestamp=u64,
)
records = st.builds(
    QueueRecord,
    queue_id=u64,
    kind=st.sampled_from(["queue", "subscription", "deleted"]),
    name=text,
    client_id=text,
    subscription=text,
    next_sequence=u64,
    count=u64,
    size=u64,
    head=u64,
    dispatched=st.tuples(*[u64] * LEVELS),
)


def message(body: bytes = b"body", priority: int = 4, expires: int = 0, destination: str = "/queue/q") -> Message:
    return Message(destination, body, b"a:b\n", True, priority, expires, b"id-" + body[:8], 1_700_000_000_000)


def fields(entry: Message | StoredEntry) -> tuple[object, ...]:
    """What makes two messages (or entries) the same: the classes have no equality of content themselves."""
    if isinstance(entry, StoredEntry):
        return (entry.order, fields(entry.message), entry.deliveries, entry.body_id, entry.references)
    return tuple(getattr(entry, name) for name in Message.__slots__ if name != "holders")


class Writer:
    """Writes batches with ascending positions."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, *operations: tuple[object, ...], sync: bool = True) -> None:
        epoch, lsn = self.store.position
        self.store.write(self.store.prepare(self.store.encode(operations), (epoch, lsn + 1)), sync)


def place(sequence: int, priority: int = 4) -> int:
    return order_of(priority, sequence)
