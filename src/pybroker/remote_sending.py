"""Sending over the network: messages as they travel, publishers and transactions. A part of `remote_client`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from pybroker.client import ClientTransaction, Headers, Publisher, check_expires, check_in_flight, checked_body
from pybroker.destination import check_sendable
from pybroker.errors import (
    BrokerError,
    InvalidMessage,
    LimitExceeded,
    SendInDoubt,
    TransactionError,
    UnknownDelivery,
)
from pybroker.message import PRIORITY_DEFAULT, PRIORITY_MAX, encode_headers
from pybroker.protocols.native_client import ranges_of
from pybroker.protocols.native_frames import NUMBER_MAX, Ranges
from pybroker.protocols.native_sends import (
    DESTINATION_BYTES,
    FRAME_BYTES,
    FRAME_BYTES_MAX,
    FRAME_MESSAGES_MAX,
    ROW_BYTES,
    Row,
    flags_of,
    row_size,
    wire_size,
)
from pybroker.remote_lifeline import Lifeline
from pybroker.remote_subscription import Attachment, RemoteSubscription
from pybroker.subscription import ReceivedMessage

DESTINATIONS_MAX = 1_000  # destinations that are remembered as well formed


class Sender:
    """Makes messages and gives them to the lifeline, one caller after the other."""

    def __init__(self, lifeline: Lifeline) -> None:
        self.lifeline = lifeline
        self._gate = trio.Lock()
        self._destinations: set[str] = set()

    def row(self, destination: str, body: bytes, headers: Headers, durable: bool, priority: int, expires: int) -> Row:
        """A message as it travels. Raises InvalidDestination, InvalidMessage, LimitExceeded for what no broker would take."""
        if body.__class__ is not bytes:
            body = bytes(checked_body(body))
        if destination not in self._destinations:
            self._check_destination(destination)
        if priority.__class__ is not int or not 0 <= priority <= PRIORITY_MAX:
            raise InvalidMessage(f"priority must be 0 to {PRIORITY_MAX}, not {priority}")
        if expires:
            check_expires(expires)
            if expires.__class__ is not int or expires > NUMBER_MAX:
                raise InvalidMessage(f"expires must be a whole number of milliseconds below 2^63, not {expires!r}")
        return destination, body, encode_headers(headers) if headers else b"", flags_of(durable, priority), expires or 0

    def _check_destination(self, text: str) -> None:
        check_sendable(text)
        if len(self._destinations) >= DESTINATIONS_MAX:
            self._destinations.clear()
        self._destinations.add(text)

    def fault_of(self, row: Row) -> LimitExceeded | None:
        """Why the present broker does not take a message, for its size."""
        opened = self.lifeline.opened
        limit = opened.body_bytes_max
        if len(row[1]) > limit:
            return LimitExceeded("stomp.body_bytes_max", limit, f"the body has {len(row[1])} bytes")
        limit = opened.frame_bytes_max
        size = FRAME_BYTES + wire_size(row)
        if size > limit:
            return LimitExceeded("native.frame_bytes_max", limit, f"a frame with this message has up to {size} bytes")
        return None

    def check_size(self, row: Row) -> None:
        """Raise LimitExceeded for a message that the present broker does not take."""
        fault = self.fault_of(row)
        if fault is not None:
            raise fault

    @property
    def small_bytes(self) -> int:
        """A message that has no more, with its headers, is taken."""
        opened = self.lifeline.opened
        return min(opened.body_bytes_max, opened.frame_bytes_max - FRAME_BYTES - DESTINATION_BYTES - ROW_BYTES)

    async def wait_room(self) -> None:
        """Wait until something may be sent; in the order of the callers. Raises BrokerUnavailable, BrokerClosed."""
        if self.lifeline.sends.has_room and not self._gate.locked():
            self.lifeline.check_open()
            return
        since = trio.current_time()
        async with self._gate:
            await self.lifeline.wait_room(since)


class RemotePublisher(Publisher):
    """Sends in flight, over one connection after the other."""

    def __init__(self, sender: Sender, max_in_flight: int) -> None:
        check_in_flight(max_in_flight)
        self._sender = sender
        self._max = max_in_flight
        self._changed = trio.Event()
        self._error: BrokerError | None = None
        self._failed = 0  # sends that will not be confirmed
        self.in_flight = 0
        self.confirmed = 0

    async def send(
        self,
        destination: str,
        body: bytes,
        headers: Headers = None,
        *,
        durable: bool = True,
        priority: int = PRIORITY_DEFAULT,
        expires: int = 0,
    ) -> str:
        row = self._sender.row(destination, body, headers, durable, priority, expires)
        await self._wait_room()
        self._sender.check_size(row)
        self.in_flight += 1
        submission = self._sender.lifeline.submit([row], row_size(row), self)
        submission.named = True
        return self._sender.lifeline.sends.message_id(submission.first)

    async def send_many(self, messages: Sequence[tuple[Any, ...]], *, durable: bool = True) -> None:
        rows: list[Row] = []
        wrong: BrokerError | None = None
        make = self._sender.row
        try:
            for item in messages:
                headers = item[2] if len(item) > 2 else None
                rows.append(make(item[0], item[1], headers, durable, PRIORITY_DEFAULT, 0))
        except BrokerError as error:
            wrong = error
        sends = self._sender.lifeline.sends
        at = 0
        while at < len(rows):
            await self._wait_room()
            room = min(self._max - self.in_flight, sends.room, FRAME_MESSAGES_MAX)
            part = rows[at : at + room] if at or room < len(rows) else rows
            size = sum([len(row[1]) + len(row[2]) for row in part])
            if size > FRAME_BYTES_MAX:
                part, size = self._cut(part)
            if size > self._sender.small_bytes:
                faults = map(self._sender.fault_of, part)
                found = next(((number, fault) for number, fault in enumerate(faults) if fault is not None), None)
                if found is not None:
                    part, wrong = part[: found[0]], found[1]
                    size = sum(map(row_size, part))
                    rows = rows[: at + len(part)]
                    if not part:
                        break
            at += len(part)
            self.in_flight += len(part)
            self._sender.lifeline.submit(part, size, self)
        if wrong is not None:
            raise wrong

    @staticmethod
    def _cut(rows: list[Row]) -> tuple[list[Row], int]:
        """As many as fit a frame, at least one."""
        size = 0
        for count, row in enumerate(rows):
            more = row_size(row)
            if count and size + more > FRAME_BYTES_MAX:
                return rows[:count], size
            size += more
        return rows, size

    async def _wait_room(self) -> None:
        """Wait until this publisher may send one more, and the connection takes it."""
        await trio.lowlevel.checkpoint()
        while True:
            while self._error is None and self.in_flight >= self._max:
                await self._changed.wait()
            if self._error is not None:
                raise self._error
            await self._sender.wait_room()
            if self._error is None and self.in_flight < self._max:
                return

    async def wait_confirmed(self) -> None:
        await trio.lowlevel.checkpoint()
        while self.in_flight:
            await self._changed.wait()
        self._check()

    def _check(self) -> None:
        error = self._error
        if isinstance(error, SendInDoubt):
            raise SendInDoubt(f"{self._failed} sends were not confirmed: {error}")
        if error is not None:
            raise error

    def take_confirmation(self, count: int, stored: bool) -> None:
        """Client: so many are as safe as asked."""
        self.in_flight -= count
        self.confirmed += count
        self._changed.set()
        self._changed = trio.Event()

    def take_refusal(self, count: int, error: BrokerError) -> None:
        """Client: so many never will be. A doubt is what must be told before anything else."""
        self.in_flight -= count
        self._failed += count
        if self._error is None or (isinstance(error, SendInDoubt) and not isinstance(self._error, SendInDoubt)):
            self._error = error
        self._changed.set()
        self._changed = trio.Event()


class _Settled:
    """What a transaction acknowledges and gives back of one subscription on one connection."""

    __slots__ = ("acks", "count", "nacks", "subscription")

    def __init__(self, subscription: RemoteSubscription) -> None:
        self.subscription = subscription
        self.acks: list[int] = []
        self.nacks: list[int] = []
        self.count = 0


class RemoteTransaction(ClientTransaction):
    """Collects what happens together; one frame at the end."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._lifeline = sender.lifeline
        self._rows: list[Row] = []
        self._size = 0
        self._wire_size = FRAME_BYTES
        self._settled: dict[Attachment, _Settled] = {}
        self._settled_count = 0  # acknowledgements
        self._answered = trio.Event()
        self._error: BrokerError | None = None

    async def send(
        self,
        destination: str,
        body: bytes,
        headers: Headers = None,
        *,
        durable: bool = True,
        priority: int = PRIORITY_DEFAULT,
        expires: int = 0,
    ) -> None:
        row = self._sender.row(destination, body, headers, durable, priority, expires)
        await self._lifeline.wait_connected()
        self._sender.check_size(row)
        self._check_frame(wire_size(row))
        self._check_limits(1, row_size(row))
        self._rows.append(row)
        self._size += row_size(row)
        self._wire_size += wire_size(row)

    def _check_frame(self, more: int) -> None:
        limit = self._lifeline.opened.frame_bytes_max
        if self._wire_size + more > limit:
            raise LimitExceeded(
                "native.frame_bytes_max", limit, "a transaction must fit into one frame, and this one does not"
            )

    def _check_limits(self, more: int, more_bytes: int) -> None:
        """The broker's own: what it would refuse is not collected."""
        opened = self._lifeline.opened
        limit = opened.transaction_messages_max
        if limit and len(self._rows) + self._settled_count + more > limit:
            raise LimitExceeded("limits.transaction_messages_max", limit, "too many messages in a transaction")
        limit = opened.transaction_bytes_max
        if limit and self._size + more_bytes > limit:
            raise LimitExceeded("limits.transaction_bytes_max", limit, "too many bytes in a transaction")

    async def ack(self, message: ReceivedMessage) -> None:
        settled, tag = self._claim(message)
        settled.acks.append(tag)
        await trio.lowlevel.checkpoint()

    async def nack(self, message: ReceivedMessage) -> None:
        settled, tag = self._claim(message)
        settled.nacks.append(tag)
        await trio.lowlevel.checkpoint()

    def _claim(self, message: ReceivedMessage) -> tuple[_Settled, int]:
        self._lifeline.check_open()
        subscription = message._subscription
        if not isinstance(subscription, RemoteSubscription) or subscription.lifeline is not self._lifeline:
            raise UnknownDelivery(f"message {message.message_id} was not delivered to the client of this transaction")
        if self._lifeline.connected:
            self._check_limits(1, 0)
        attachment, tag, count = subscription.claim(message)
        self._settled_count += 1
        settled = self._settled.get(attachment)
        if settled is None:
            settled = self._settled[attachment] = _Settled(subscription)
        settled.count += count
        attachment.held += count
        return settled, tag

    # ---- the end

    async def commit(self) -> None:
        """Commit; returns when that is stored. Raises TransactionError when nothing was done, SendInDoubt when nobody knows."""
        if not self._rows and not self._settled:
            await trio.lowlevel.checkpoint()
            self._lifeline.check_open()
            return
        try:
            await self._sender.wait_room()
            self._check_attached()
            for row in self._rows:
                self._sender.check_size(row)
            self._check_limits(0, 0)  # it may be another broker than before
            settled = sum(16 + 18 * (len(each.acks) + len(each.nacks)) for each in self._settled.values())
            self._check_frame(settled)
        except BaseException:
            self.abort()
            raise
        acks = {
            attachment.number: self._ranges(each, each.acks) for attachment, each in self._settled.items() if each.acks
        }
        nacks = {
            attachment.number: self._ranges(each, each.nacks)
            for attachment, each in self._settled.items()
            if each.nacks
        }
        submission = self._lifeline.submit_transaction(self._rows, self._size, acks, nacks, self)
        try:
            await self._answered.wait()
        except BaseException:
            if self._lifeline.sends.withdraw_unwritten(submission):
                self.abort()
            raise
        if self._error is not None:
            raise self._error

    def _check_attached(self) -> None:
        if any(attachment is not each.subscription.attachment for attachment, each in self._settled.items()):
            raise TransactionError(
                "the connection was lost: what was acknowledged in this transaction is delivered again, and nothing of it was done"
            )

    @staticmethod
    def _ranges(settled: _Settled, tags: list[int]) -> Ranges:
        if settled.subscription.cumulative:
            return [(max(tags), max(tags))]
        return ranges_of(tags)

    def abort(self) -> None:
        """Forget the sends, and give back what was acknowledged."""
        for attachment, each in self._settled.items():
            if attachment is each.subscription.attachment:
                tags = each.acks + each.nacks
                self._lifeline.settle(
                    attachment.number, [max(tags)] if each.subscription.cumulative else tags, False, None
                )
        self._release()

    def _release(self) -> None:
        for attachment, each in self._settled.items():
            each.subscription.release(attachment, each.count)
        self._settled.clear()

    def take_confirmation(self, count: int, stored: bool) -> None:
        """Client: it is committed."""
        self._release()
        self._answered.set()

    def take_refusal(self, count: int, error: BrokerError) -> None:
        """Client: nothing of it was done; or, with SendInDoubt, nobody knows."""
        self._error = error
        self.abort()
        self._answered.set()
