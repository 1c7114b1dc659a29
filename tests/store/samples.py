"""Strategies and helpers that the store's tests share."""

from __future__ import annotations

from hypothesis import strategies as st

from pybroker.message import Message, Route
from pybroker.operations import LEVELS, PeerRecord, ProducerRecord, QueueRecord, StoredEntry, order_of
from pybroker.store import Store

u64 = st.integers(0, 2**64 - 1)
sequences = st.integers(0, 2**56 - 1)
text = st.text(st.characters(codec="utf-8"), max_size=30)

names = st.lists(text, max_size=4).map(tuple)
routes = st.builds(
    Route,
    passed=names,
    targets=names,
    deliveries=st.integers(0, 2**32 - 1),
    priority=st.integers(0, 9),
)
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
    route=st.none() | routes,
)
producers = st.builds(
    ProducerRecord,
    producer_id=text,
    ranges=st.sets(st.integers(0, 2**61), max_size=6).map(lambda ends: ranges_between(sorted(ends))),
    floor=u64,
    last_used=u64,
)
peers = st.builds(PeerRecord, name=text, demand=st.lists(st.tuples(text, text, names), max_size=4).map(tuple))
records = st.builds(
    QueueRecord,
    queue_id=u64,
    kind=st.sampled_from(["queue", "subscription", "deleted", "link"]),
    name=text,
    client_id=text,
    subscription=text,
    next_sequence=u64,
    count=u64,
    size=u64,
    head=u64,
    dispatched=st.tuples(*[u64] * LEVELS),
    selector=st.just("") | text,
)


def ranges_between(ends: list[int]) -> tuple[int, ...]:
    """Ranges that rise, with a gap behind each, of ascending numbers."""
    return tuple(4 * end + (at % 2) for at, end in enumerate(ends[: len(ends) // 2 * 2]))


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
