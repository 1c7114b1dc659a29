"""Store operations: what the core asks the store to keep. Owns the vocabulary; the core emits, the store encodes.

An operation is a plain tuple whose first item is one of the tags below: the hot path makes one or two of them for each
message. ``order`` is the place of a message in its queue: ``(9 - priority) << 56 | sequence``, so that ascending
order is delivery order. All operations of one batch become durable together or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from pybroker.message import PRIORITY_MAX, Message

PUT_MESSAGE = 1  # (PUT_MESSAGE, queue_id, order, message)
DELETE_MESSAGE = 2  # (DELETE_MESSAGE, queue_id, order, expires, counted): counted = it has a delivery record
PUT_DELIVERIES = 3  # (PUT_DELIVERIES, queue_id, order, deliveries): how often delivery of it has begun; 0 too
PUT_BODY = 4  # (PUT_BODY, body_id, message, references): a message that several subscriptions share
SET_REFERENCES = 5  # (SET_REFERENCES, body_id, references): how many references are left
DELETE_BODY = 6  # (DELETE_BODY, body_id)
PUT_REFERENCE = 7  # (PUT_REFERENCE, queue_id, order, body_id, expires, size)
PUT_QUEUE = 8  # (PUT_QUEUE, QueueRecord)
DELETE_QUEUE = 9  # (DELETE_QUEUE, queue_id): the descriptor only; its messages are deleted by their own operations
PUT_VALUE = 10  # (PUT_VALUE, key, value): a whole value for a bad one, as another copy of the store has it
PUT_PRODUCER = 11  # (PUT_PRODUCER, ProducerRecord)
DELETE_PRODUCER = 12  # (DELETE_PRODUCER, producer_id)
PUT_PEER = 13  # (PUT_PEER, PeerRecord)
DELETE_PEER = 14  # (DELETE_PEER, name)
PUT_SCHEDULE = 20  # (PUT_SCHEDULE, Schedule, due): due = when it was due before, 0 for a new one
DELETE_SCHEDULE = 21  # (DELETE_SCHEDULE, number, due)
PUT_SCHEDULING = 22  # (PUT_SCHEDULING, SchedulingRecord)

SEQUENCE_BITS = 56
SEQUENCE_MASK = (1 << SEQUENCE_BITS) - 1
LEVELS = PRIORITY_MAX + 1

Operation = tuple[object, ...]


def order_of(priority: int, sequence: int) -> int:
    """The place of a message in its queue: higher priority first, then by sequence."""
    return (PRIORITY_MAX - priority) << SEQUENCE_BITS | sequence


@dataclass(frozen=True, slots=True)
class QueueRecord:
    """A queue's (or durable subscription's) descriptor. Written with each batch that touches the queue.

    queue_id       unsigned 64 bits, never used again, also when the queue is deleted
    kind           ``"queue"``, ``"subscription"``, ``"link"`` (what is on its way to another broker), or ``"deleted"``: one
                   whose messages are still being removed
    name           the queue's name; for a subscription the topic's name or pattern; for a link the other broker's name
    client_id      owner of a durable subscription; for a link its namespace, in which a sequence is never used again; else ""
    subscription   name of a durable subscription, else ""
    next_sequence  the sequence that the next message will get
    count, size    durable messages in the queue, and their bytes (`Message.size`)
    head           lower bound of the smallest order in the queue: where reading starts
    dispatched     per level (index 0 = priority 9) the sequence below which delivery may have begun
    selector       of a durable subscription, which messages it collects; "" = all
    """

    queue_id: int
    kind: str
    name: str
    client_id: str = ""
    subscription: str = ""
    next_sequence: int = 0
    count: int = 0
    size: int = 0
    head: int = 0
    dispatched: tuple[int, ...] = (0,) * LEVELS
    selector: str = ""


@dataclass(frozen=True, slots=True)
class ProducerRecord:
    """Which sends of one producer are stored. Written with each batch that stores one of them.

    producer_id  unique, and hard to guess: made by the producer
    ranges       the sequences that were stored: first, last, first, last, ..., rising, with gaps between them
    floor        of sequences below it nobody knows any more whether they were stored
    last_used    milliseconds since the Unix epoch; of a message key ("key " and a digest): when it is to be forgotten
    """

    producer_id: str
    ranges: tuple[int, ...] = ()
    floor: int = 0
    last_used: int = 0


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """Another broker of the network, and the durable demand that holds also while it can't be reached.

    name    of the broker, or of its replica set
    demand  (topic pattern without ``/topic/``, the broker with the durable subscription, brokers on the way there from the
            peer, which comes first, to that broker, which comes last)
    """

    name: str
    demand: tuple[tuple[str, str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    """A message that is to be sent at a later time, and perhaps again after that. Times in milliseconds.

    number   unique in its store, never used again
    due      when it is to be sent next, since the Unix epoch
    message  what is sent; its `timestamp` is when it was scheduled
    left     how often it is sent again after that, -1 = without end; with `cron`, after each of its times
    period   between two of these
    cron     a cron expression: at each of its times the message is sent (or, with `delay` or `left`, a schedule begins). "" = none
    delay    from a time of `cron` to the first sending that belongs to it
    """

    number: int
    due: int
    message: Message
    left: int = 0
    period: int = 0
    cron: str = ""
    delay: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Its place among the others: in order of time, then in the order in which they came."""
        return self.due, self.number


@dataclass(frozen=True, slots=True)
class SchedulingRecord:
    """What the store has of schedules as a whole. Written with each batch that touches one.

    next_number  the number that the next schedule will get
    count, size  schedules in the store, and the bytes of their messages (`Message.size`)
    head         none of them is due before it
    """

    next_number: int = 1
    count: int = 0
    size: int = 0
    head: int = 0


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """One message read back from the store.

    `deliveries` is None without a delivery record; `body_id` is 0 for a message that is stored in its queue.
    """

    order: int
    message: Message
    deliveries: int | None = None
    body_id: int = 0
    references: int = 0


@dataclass(frozen=True, slots=True)
class DueEntry:
    """One row of the expiry index: a message that expires at ``expires`` (milliseconds since the Unix epoch).

    `body_id` and `references` are those of a message that subscriptions share, else 0.
    """

    expires: int
    queue_id: int
    order: int
    size: int
    body_id: int = 0
    references: int = 0
