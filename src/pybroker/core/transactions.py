"""Transactions: sends and settlements that happen together at the commit, or not at all. A part of `Core`.

All that a commit emits is emitted in one turn, and so enters one batch: that is what makes it all or nothing across a crash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pybroker.core.consumer import Connection, Consumer, Transaction
from pybroker.core.entry import SETTLING, Entry
from pybroker.core.queue import DELETED, Queue
from pybroker.errors import LimitExceeded, TransactionError
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


def send_later(core: Core, connection: Connection, message: Message, name: str) -> None:
    """Send within a transaction."""
    transaction = _transaction(connection, name)
    core.check(message)
    _check_transaction(core, transaction, 1, message.size)
    transaction.messages.append(message)
    transaction.size += message.size
    core.memory_bytes += message.size


def settle_later(core: Core, consumer: Consumer, entries: list[Entry], name: str, done: bool) -> None:
    transaction = _transaction(consumer.connection, name)
    _check_transaction(core, transaction, len(entries), sum(entry.message.size for entry in entries))
    queue = consumer.queue
    for entry in entries:
        queue.settle(entry)
        entry.state = SETTLING
        transaction.settled.append((entry, done))
        transaction.size += entry.message.size
    if queue.available:
        queue.dispatch()


def commit(core: Core, connection: Connection, name: str) -> None:
    """Do all that the transaction collected, in one turn and so in one batch. Raises TransactionError, BrokerFull."""
    transaction = _transaction(connection, name)
    del connection.transactions[name]
    messages = transaction.messages
    core.memory_bytes -= sum(message.size for message in messages)
    new = {message.destination for message in messages} - core.by_destination.keys()
    if len(core.queues) + len(new) > core.limits.destinations_max and any(text.startswith("/queue/") for text in new):
        _give_back(core, transaction)
        limit = core.limits.destinations_max
        raise LimitExceeded("limits.destinations_max", limit, "too many queues; the transaction was aborted")
    queues: dict[Queue, list[Entry]] = {}
    for entry, done in transaction.settled:
        returning = queues.setdefault(entry.queue, [])
        if done:
            entry.queue.remove(entry)
            entry.queue.counts.acknowledged += 1
        else:
            returning.append(entry)
    for message in messages:
        core.send(message)
    _return(core, queues)


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
