"""Sends and transactions of one native connection: into the core, once, in order; those for which there is no room wait.

While they wait the connection goes on reading, so that acknowledgements get through. What waits is bounded by what the client
was told that it may have unconfirmed. Owns no socket. NATIVE.md, "Sending, once".
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import trio

from pybroker.config import BrokerConfig
from pybroker.core.broker import Core
from pybroker.core.consumer import Consumer
from pybroker.engine import Engine
from pybroker.errors import BrokerError, BrokerFull, LimitExceeded, TransactionError
from pybroker.message import Message
from pybroker.native_outbox import Result
from pybroker.protocols.native_frames import Commit, Ranges, Send, encode_refused

if TYPE_CHECKING:
    from pybroker.native_server import NativeConnection

TURN_BYTES_MAX = 1024 * 1024  # bytes of messages that one turn takes (one message, or one transaction, always may)


class Sent(NamedTuple):
    """A token: sends that are as safe as asked when it comes back."""

    results: list[Result]
    sends: int  # messages and transactions
    size: int  # their bytes


class Sending:
    """The sends of one connection. `find_consumer` gives the consumer of a subscription, None when there is none."""

    def __init__(
        self,
        connection: NativeConnection,
        engine: Engine,
        config: BrokerConfig,
        find_consumer: Callable[[int], Consumer | None],
    ) -> None:
        self._connection = connection
        self._engine = engine
        self._limits = config.limits
        self._messages_max = config.native.send_messages_max
        self._bytes_max = config.native.send_bytes_max
        self._body_max = config.stomp.body_bytes_max
        self._block_max = config.stomp.header_block_bytes_max
        self._find_consumer = find_consumer
        self._waiting: deque[tuple[Send | Commit, float]] = deque()  # and since when (trio's time)
        self._work = trio.Event()
        self._empty = trio.Event()
        self._producer_id = ""
        self._prefix = b""  # of the ids of this producer's messages
        self.unconfirmed = 0  # messages and transactions
        self.unconfirmed_bytes = 0

    def use_producer(self, producer_id: str) -> None:
        """The sends to come are those of this producer ("" = of none)."""
        self._producer_id = producer_id
        self._prefix = f"{producer_id}-".encode() if producer_id else b""

    # ---- from the connection, within a turn

    def take(self, core: Core, frame: Send | Commit) -> None:
        """Do what a frame asks for, or let it wait. Raises LimitExceeded when more is unconfirmed than the client was told."""
        if self.unconfirmed_bytes > self._bytes_max:
            what = f"{self.unconfirmed_bytes} bytes of sends are unconfirmed"
            raise LimitExceeded("native.send_bytes_max", self._bytes_max, what)
        self.unconfirmed += len(frame.messages) if isinstance(frame, Send) else 1
        self.unconfirmed_bytes += sum([message.size for message in frame.messages])
        if self.unconfirmed > self._messages_max:
            what = f"{self.unconfirmed} sends are unconfirmed"
            raise LimitExceeded("native.send_messages_max", self._messages_max, what)
        rest: Send | Commit | None = frame
        if not self._waiting and not self._engine.batch_full:
            rest, _ = self._do(core, frame)
        if rest is not None:
            self._waiting.append((rest, trio.current_time()))
            self._work.set()

    def confirmed(self, token: Sent) -> None:
        """These are committed: the client may send as many more."""
        self.unconfirmed -= token.sends
        self.unconfirmed_bytes -= token.size

    def drop(self) -> None:
        """What waits is given up: nobody was told anything about it."""
        self._waiting.clear()
        self._empty.set()

    async def wait_empty(self) -> None:
        """Wait until nothing waits any more."""
        while self._waiting:
            self._empty = trio.Event()
            await self._empty.wait()

    # ---- what waits

    async def run(self) -> None:
        """Work off what waits, in order, until cancelled (or the engine has ended)."""
        engine = self._engine
        while True:
            if not self._waiting:
                self._empty.set()
                self._work = trio.Event()
                await self._work.wait()
                continue
            await trio.lowlevel.checkpoint()
            if engine.batch_full:  # before the turn: however many connections wait, one at a time fills the batch
                await engine.journal.wait_room(self._limits.batch_bytes_max)
            if engine.error is not None:
                return
            if self._waiting:
                await self._work_off()

    async def _work_off(self) -> None:
        """Do a turn's worth of what waits at the front, and wait for room if that is what it needs."""
        engine = self._engine
        frame, since = self._waiting[0]
        core = engine.begin_turn()
        try:
            rest, obstacle = self._do(core, frame)
        finally:
            engine.end_turn()
        if rest is None:
            self._waiting.popleft()
            return
        self._waiting[0] = (rest, since)
        if obstacle is None:
            return
        error = await self._wait_room(obstacle, since)
        if error is not None and self._waiting:  # or it was given up meanwhile
            self._waiting.popleft()
            if isinstance(rest, Send):
                self._refuse(rest.first, error, rest.messages[0].size)
                if len(rest.messages) > 1:
                    self._waiting.appendleft((Send(rest.first + 1, rest.messages[1:]), since))
            else:
                self._refuse(rest.sequence, error, sum([message.size for message in rest.messages]))

    async def _wait_room(self, message: Message, since: float) -> BrokerFull | None:
        """Wait until there is room for the message; why there is none when it has waited for long enough."""
        engine = self._engine
        try:
            with trio.move_on_at(since + self._limits.full_timeout):
                await engine.wait_room(message)
                return None
            error = engine.core.full(message)
            if error is not None:
                error = BrokerFull(f"{error} (waited {self._limits.full_timeout:g} s, limits.full_timeout)")
            return error
        except BrokerFull as full:
            return full
        except BrokerError:
            return None  # the engine's end; the connection is told

    # ---- into the core

    def _do(self, core: Core, frame: Send | Commit) -> tuple[Send | Commit | None, Message | None]:
        """What is left of the frame, and the message for which there is no room (None: the turn has enough)."""
        if isinstance(frame, Send):
            count, obstacle = self._send(core, frame)
            if count == len(frame.messages):
                return None, None
            return Send(frame.first + count, frame.messages[count:]), obstacle
        obstacle = self._commit(core, frame)
        return (None, None) if obstacle is None else (frame, obstacle)

    def _send(self, core: Core, frame: Send) -> tuple[int, Message | None]:
        """Send messages one by one, without an await. How many are done with, and for which there is no room."""
        messages = frame.messages
        prefix = self._prefix
        producer = core.producers.open(self._producer_id, frame.first) if prefix else None
        sizes = [message.size for message in messages]
        crowded = core.crowded
        known = producer is not None and frame.first <= producer.highest
        plain = not (crowded or known or max(sizes) > self._block_max or sum(sizes) > TURN_BYTES_MAX)
        results: list[Result] = []
        sequence = run = frame.first  # `run`: where the range begins that is not in the results yet
        run_stored = True
        size = refused = 0
        obstacle: Message | None = None
        send = core.send

        def end_run() -> None:
            if sequence > run:
                results.append((run, sequence - 1, run_stored))
                if producer is not None:
                    producer.stored(run, sequence - 1, run_stored)

        work_max = self._limits.turn_messages_max
        for message in messages:
            if core.work > work_max:
                break
            try:
                if not plain:
                    if size > TURN_BYTES_MAX:
                        break
                    if known and not core.producers.is_new(self._producer_id, sequence):
                        end_run()
                        results.append((sequence, sequence, message.durable))
                        size += message.size
                        sequence += 1
                        run = sequence
                        continue
                    self._check_size(message)
                    if crowded and core.full(message) is not None:
                        obstacle = message
                        break
                if prefix:
                    message.message_id = b"%b%x" % (prefix, sequence)
                stored = send(message)
            except BrokerError as error:
                end_run()
                refused += 1
                self._refuse(sequence, error, message.size)
                run = sequence + 1
            else:
                size += message.size
                if stored is not run_stored:
                    end_run()
                    run = sequence
                    run_stored = stored
            sequence += 1
        end_run()
        count = sequence - frame.first
        if results:
            core.confirm((self._connection, Sent(results, count - refused, size)))
        return count, obstacle

    def _commit(self, core: Core, frame: Commit) -> Message | None:
        """A whole transaction, or nothing of it; the message for which there is no room."""
        sequence = frame.sequence
        messages = frame.messages
        size = sum([message.size for message in messages])
        stored = True
        try:
            producer = core.producers.open(self._producer_id, sequence) if self._prefix else None
            if producer is None or core.producers.is_new(self._producer_id, sequence):
                for number, message in enumerate(messages):
                    self._check_size(message)
                    if producer is not None:
                        message.message_id = b"%b%x-%x" % (self._prefix, sequence, number)
                entries = core.outstanding(self._settlements(frame.acks), self._settlements(frame.nacks))
                if core.crowded:
                    for message in messages:
                        if core.full(message) is not None:
                            return message
                stored = core.transact(messages, *entries)
                if producer is not None:
                    producer.stored(sequence, sequence)
        except BrokerError as error:
            self._refuse(sequence, error, size)
            return None
        core.confirm((self._connection, Sent([(sequence, sequence, stored)], 1, size)))
        return None

    def _settlements(self, settlements: Mapping[int, Ranges]) -> list[tuple[Consumer, Ranges]]:
        found = []
        for subscription, ranges in settlements.items():
            consumer = self._find_consumer(subscription)
            if consumer is None:
                raise TransactionError(
                    f"the transaction was refused: there is no subscription {subscription} on this connection, "
                    "and what was delivered on an earlier one is delivered again"
                )
            found.append((consumer, ranges))
        return found

    def _check_size(self, message: Message) -> None:
        """Raises LimitExceeded. (What bounds a message also bounds the frame that it is delivered in.)"""
        if len(message.body) > self._body_max:
            raise LimitExceeded("stomp.body_bytes_max", self._body_max, f"the body has {len(message.body)} bytes")
        if len(message.header_block) > self._block_max:
            what = f"the headers have {len(message.header_block)} bytes"
            raise LimitExceeded("stomp.header_block_bytes_max", self._block_max, what)

    def _refuse(self, sequence: int, error: BrokerError, size: int) -> None:
        self.unconfirmed -= 1
        self.unconfirmed_bytes -= size
        self._connection.say(encode_refused(sequence, error.code, str(error)))
