"""Transactions: sends and settlements that happen together at the commit, or not at all. A part of `Core`.

All that a commit emits is emitted in one turn, and so enters one batch: that is what makes it all or nothing across a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pybroker.core.consumer import Connection, Consumer, Transaction
from pybroker.core.entry import SETTLING, Entry
from pybroker.core.kinds import DELETED
from pybroker.core.producers import Once
from pybroker.core.queue import Queue
from pybroker.errors import BrokerError, LimitExceeded, TransactionError
from pybroker.message import Message

if TYPE_CHECKING:
    from pybroker.core.broker import Core


def begin(core: Core, connection: Connection, name: str) -> None:
    limits = core.limits
    if name in connection.transactions:
        raise TransactionError(f"transaction {name!r} is open already")
    if len(connection.transactions) >= limits.transactions_max:
        raise LimitExceeded("limits.transactions_max", limits.transactions_max, "too many open transactions")
    connection.transactions[name] = Transaction()


def _transaction(connection: Connection, name: str) -> Transaction:
    try:
        return connection.transactions[name]
    except KeyError:
        raise TransactionError(f"transaction {name!r} is not open: BEGIN it first") from None


def _check_transaction(core: Core, transaction: Transaction, count: int, size: int) -> None:
    limits = core.limits
    if transaction.count + count > limits.transaction_messages_max:
        raise LimitExceeded(
            "limits.transaction_messages_max", limits.transaction_messages_max, "too many messages in a transaction"
        )
    if transaction.size + size > limits.transaction_bytes_max:
        raise LimitExceeded(
            "limits.transaction_bytes_max", limits.transaction_bytes_max, "too many bytes in a transaction"
        )


def send_later(core: Core, connection: Connection, message: Message, name: str, once: Once | None = None) -> None:
    """Send within a transaction. What its producer sent before is left out; it is looked at again at the commit."""
    transaction = _transaction(connection, name)
    if once is not None and not core.producers.is_new(*once):
        return
    core.check(message)
    _check_transaction(core, transaction, 1, message.size)
    transaction.messages.append(message)
    if once is not None:
        transaction.numbered[message] = once[:2]
    transaction.size += message.size
    core.memory_bytes += message.size


def settle_later(core: Core, consumer: Consumer, entries: list[Entry], name: str, done: bool) -> None:
    transaction = _transaction(consumer.connection, name)
    _check_transaction(core, transaction, len(entries), sum(entry.message.size for entry in entries))
    for entry in entries:
        entry.queue.settle(entry)
        entry.state = SETTLING
        transaction.settled.append((entry, done))
        transaction.size += entry.message.size
    for queue in {entry.queue: None for entry in entries}:
        if queue.available or queue.members:
            queue.dispatch()


def commit(core: Core, connection: Connection, name: str, once: Once | None = None) -> None:
    """Do all that the transaction collected, in one turn and so in one batch; or give all back, and raise why.

    With `once` the commit has a sequence of its own. One that is stored already is done with: what the transaction has collected
    since is given up as by `abort`, if it is open at all. Raises SendInDoubt, also for what the transaction would send; the
    transaction is aborted then.
    """
    if once is not None and not _is_first(core, connection, name, once):
        return
    transaction = _transaction(connection, name)
    del connection.transactions[name]
    core.memory_bytes -= sum(message.size for message in transaction.messages)
    try:
        _leave_out_repeats(core, transaction)
        _prepare(core, transaction.messages)
    except BrokerError:
        _give_back(core, transaction)
        raise
    _carry_out(core, transaction)
    for message, (producer_id, sequence) in transaction.numbered.items():
        core.producers.open(producer_id, sequence).stored(sequence, sequence, message.durable)
    if once is not None:
        core.producers.open(once[0], once[1]).stored(once[1], once[1])


def _is_first(core: Core, connection: Connection, name: str, once: Once) -> bool:
    """Whether a commit is to be done. If it is not, or if nobody knows (SendInDoubt), the transaction is aborted."""
    new = False
    try:
        new = core.producers.is_new(*once)
    finally:
        if not new and name in connection.transactions:
            abort(core, connection, name)
    return new


def _leave_out_repeats(core: Core, transaction: Transaction) -> None:
    """Take out messages whose sequences have been stored since they were collected, or are there twice.

    Raises SendInDoubt. A producer that is not known was known when they were collected: it has been forgotten since.
    """
    if not transaction.numbered:
        return
    seen: set[tuple[str, int]] = set()
    repeats: set[Message] = set()
    for message, number in transaction.numbered.items():
        if number in seen:
            core.duplicates += 1
        elif core.producers.is_new(*number, repeated=True):
            seen.add(number)
            continue
        repeats.add(message)
    if repeats:
        transaction.messages = [message for message in transaction.messages if message not in repeats]


def transact(core: Core, messages: list[Message], acknowledged: Sequence[Entry], rejected: Sequence[Entry]) -> bool:
    """A whole transaction at once; the entries are outstanding, each there once. True when the store will keep all messages.

    Raises LimitExceeded, InvalidDestination, InvalidMessage; nothing is done then.
    """
    transaction = Transaction()
    size = sum(message.size for message in messages)
    _check_transaction(core, transaction, len(messages) + len(acknowledged) + len(rejected), size)
    for message in messages:
        core.check(message)
    _prepare(core, messages)
    transaction.messages = messages
    for entries, done in ((acknowledged, True), (rejected, False)):
        for entry in entries:
            entry.queue.settle(entry)
            entry.state = SETTLING
            transaction.settled.append((entry, done))
    return _carry_out(core, transaction)


def _prepare(core: Core, messages: list[Message]) -> None:
    """Raise whatever sending one of these could raise, and make the queues that they need: from here on all can be carried out."""
    for message in messages:  # filters may ask for these, and must decide now as they do when it is sent
        if not message.message_id:
            message.message_id = core.new_message_id()
        message.timestamp = core.now
    scheduled = set(core.schedules.check_all(messages))
    sent = (message for message in messages if message not in scheduled)
    core.routing.make_queues([name for message in sent for name in core.routing.destinations(message)])


def _carry_out(core: Core, transaction: Transaction) -> bool:
    queues: dict[Queue, list[Entry]] = {}
    for entry, done in transaction.settled:
        returning = queues.setdefault(entry.queue, [])
        if done:
            entry.queue.remove(entry)
            entry.queue.counts.acknowledged += 1
        else:
            returning.append(entry)
    stored = [core.send(message) for message in transaction.messages]
    _return(core, queues)
    return all(stored)


def abort(core: Core, connection: Connection, name: str) -> None:
    """Forget the sends; acknowledged and rejected messages return to their places, marked as redelivered."""
    transaction = _transaction(connection, name)
    del connection.transactions[name]
    core.memory_bytes -= sum(message.size for message in transaction.messages)
    _give_back(core, transaction)


def _give_back(core: Core, transaction: Transaction) -> None:
    queues: dict[Queue, list[Entry]] = {}
    for entry, _ in transaction.settled:
        queues.setdefault(entry.queue, []).append(entry)
    _return(core, queues)


def _return(core: Core, queues: dict[Queue, list[Entry]]) -> None:
    for queue, entries in queues.items():
        if queue.queue_id not in core.queues:  # a plain subscription that went with its consumer
            for entry in entries:
                del queue.outstanding[entry.order]
                queue.forget(entry)
            continue
        queue.put_back(entries)
        if queue.kind == DELETED:
            queue.empty()
        else:
            queue.dispatch()
