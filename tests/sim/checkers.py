"""What must be true of a replica set, whatever befell it. Written apart from the code: knows no class of pybroker, only what was seen.

DESIGN.md section 7. Every violation is a sentence; the first one ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

Position = tuple[int, int]  # (epoch, number of the batch)
Place = tuple[str, int, str]  # the process that delivered, its epoch, the queue


class Violation(Exception):
    """Something that must never happen."""


class Findings:
    """What was found wrong, in order. `found` is called with the first."""

    def __init__(self, found: Callable[[], None]) -> None:
        self.texts: list[str] = []
        self._found = found

    def add(self, text: str) -> None:
        self.texts.append(text)
        if len(self.texts) == 1:
            self._found()


@dataclass(frozen=True)
class Committed:
    """What was confirmed at one batch number, by whom."""

    position: Position
    fingerprint: int | None
    member: str


class Positions:
    """No two leaders confirm one position; what was confirmed stays; equal positions mean equal stores; epochs belong to one leader.

    `committing`: whether a commit means that a quorum has it (not in the modes that don't wait for the others).
    """

    def __init__(self, findings: Findings, committing: bool = True) -> None:
        self.findings = findings
        self.committing = committing
        self.leaders: dict[int, tuple[str, float]] = {}  # epoch to who was elected, and when
        self.states: dict[Position, tuple[int, str]] = {}  # fingerprint of every store that was there, and whose it was
        self.committed: dict[int, Committed] = {}
        self.last = 0  # the highest number that was committed
        self.commits = 0

    def elected(self, epoch: int, member: str, now: float, forgotten: bool = False) -> None:
        """`forgotten`: ZooKeeper's data were lost since the epoch may have been given. Then the stores say which is next: one of
        which no batch is on any disk may be given again.
        """
        if epoch in self.leaders:
            before, at = self.leaders[epoch]
            if not forgotten or any(position[0] == epoch for position in self.states):
                self.findings.add(f"epoch {epoch} was given to {before} at {at:.3f}, and to {member} at {now:.3f}")
        self.leaders[epoch] = (member, now)

    def stored(self, member: str, position: Position, fingerprint: int) -> None:
        """A member's store is at a position."""
        if position[1] == 0:
            return
        known = self.states.setdefault(position, (fingerprint, member))
        if known[0] != fingerprint:
            self.findings.add(f"the stores of {known[1]} and {member} differ, and both are at {position}")

    def confirmed(self, member: str, position: Position, fingerprint: int, history: Iterable[Position]) -> None:
        """A leader's commit has returned. `history` of its store: (epoch, number of its first batch), rising."""
        self.commits += 1
        if not self.committing:
            return
        number = position[1]
        before = self.committed.get(number)
        if before is not None:
            if before.position != position or before.fingerprint not in (None, fingerprint):
                self.findings.add(f"{before.member} confirmed {before.position}, and {member} confirmed {position}")
            return
        if number <= self.last:
            return  # before the first that was seen
        # What this leader's store went through must hold what was confirmed before; what lies between is confirmed with it.
        spans = sorted(history, key=lambda record: record[1])
        last = self.committed.get(self.last)
        if last is not None and _epoch_at(spans, self.last) != last.position[0]:
            self.findings.add(
                f"{member} confirmed {position}; its batch {self.last} is of epoch {_epoch_at(spans, self.last)}, "
                f"and {last.member} had confirmed {last.position}"
            )
        for other in range(self.last + 1, number):
            between = (_epoch_at(spans, other), other)
            known = self.states.get(between)
            self.committed[other] = Committed(between, known[0] if known is not None else None, member)
        self.committed[number] = Committed(position, fingerprint, member)
        self.last = number

    def later_than(self, epoch: int) -> float | None:
        """When the next leader after that of an epoch was elected."""
        began = self.leaders[epoch][1] if epoch in self.leaders else 0.0
        times = [at for other, (_, at) in self.leaders.items() if other > epoch and at > began]
        return min(times, default=None)


def _epoch_at(history: list[Position], number: int) -> int:
    """Of the batch with that number, in a store with that history: (epoch, number of its first batch), rising."""
    return max((first, epoch) for epoch, first in [(0, 0), *history] if first <= number)[1]


@dataclass
class Sent:
    """One message of a client's, by the name in its body."""

    name: str
    queue: str
    durable: bool
    expires: bool
    digest: int
    attempts: int = 0
    confirmed_at: float | None = None
    ids: set[str] = field(default_factory=set)  # the brokers' names for its copies
    delivered: int = 0


@dataclass
class Copy:
    """One copy of a message, by the brokers' name for it."""

    name: str
    delivered: list[tuple[float, Place]] = field(default_factory=list)
    ack_tried: bool = False
    ack_tried_alone: bool = False  # outside of a transaction
    acked: tuple[float, int] | None = None  # confirmed: when, by which epoch


@dataclass
class Move:
    """A transaction that acknowledges one copy and sends another message."""

    taken: str  # the copy's id
    sent: str  # the message's name
    confirmed: bool = False


class Account:
    """What clients sent, were told, received and acknowledged: promises P1, P2 and P4, and that transactions are whole.

    `durable`: confirmed means kept, whatever happens (not in the weaker modes). `lease`: how long a deposed leader may still show.
    """

    def __init__(self, findings: Findings, positions: Positions, lease: float, durable: bool = True) -> None:
        self.findings = findings
        self.positions = positions
        self.lease = lease
        self.durable = durable
        self.sent: dict[str, Sent] = {}
        self.copies: dict[str, Copy] = {}
        self.moves: list[Move] = []
        self.confirmed = 0
        self.acked = 0
        self.redelivered = 0

    # ---- sending

    def attempt(self, name: str, queue: str, body: bytes, durable: bool = True, expires: bool = False) -> None:
        message = self.sent.setdefault(name, Sent(name, queue, durable, expires, hash(body)))
        message.attempts += 1

    def confirm(self, name: str, message_id: str, durable: bool, now: float) -> None:
        message = self.sent[name]
        if durable and message.confirmed_at is None:
            message.confirmed_at = now
        self.confirmed += 1
        if message_id:
            self._know(message_id, name)

    def _know(self, message_id: str, name: str) -> Copy:
        copy = self.copies.setdefault(message_id, Copy(name))
        if copy.name != name:
            self.findings.add(f"message id {message_id} is of {copy.name!r} and of {name!r}")
        self.sent[name].ids.add(message_id)
        return copy

    # ---- receiving

    def deliver(self, place: Place, message_id: str, body: bytes, redelivered: bool, now: float) -> None:
        """A broker has handed a message to a client."""
        member, epoch, _ = place
        name = body.split(b"|", 1)[0].decode("ascii", "replace")
        message = self.sent.get(name)
        if message is None or hash(body) != message.digest:
            self.findings.add(f"{member} delivered {body[:40]!r}, which nobody sent")
            return
        copy = self._know(message_id, name)
        if len(message.ids) > message.attempts:
            self.findings.add(f"{name!r} was sent {message.attempts} times, and there are {len(message.ids)} of it")
        if self.durable and copy.acked is not None and epoch >= copy.acked[1]:
            self.findings.add(
                f"{member} delivered {name!r} in epoch {epoch} at {now:.3f}; "
                f"its acknowledgement was confirmed at {copy.acked[0]:.3f} in epoch {copy.acked[1]}"
            )
        if copy.delivered:
            self.redelivered += 1
            if copy.delivered[-1][1] == place and not redelivered:
                self.findings.add(f"{member} delivered {name!r} twice in epoch {epoch}, and did not mark it")
        self.shown(member, epoch, now)
        copy.delivered.append((now, place))
        message.delivered += 1

    def shown(self, member: str, epoch: int, now: float) -> None:
        """A leader let something be seen: that may not be long after another one was elected."""
        deposed = self.positions.later_than(epoch)
        if deposed is not None and now > deposed + self.lease:
            self.findings.add(
                f"{member} showed something in epoch {epoch} at {now:.3f}; a later one began at {deposed:.3f}"
            )

    def try_ack(self, message_id: str) -> None:
        self.copies[message_id].ack_tried = self.copies[message_id].ack_tried_alone = True

    def confirm_ack(self, message_id: str, epoch: int, now: float) -> None:
        self.copies[message_id].acked = (now, epoch)
        self.acked += 1

    def try_move(self, message_id: str, name: str) -> Move:
        self.copies[message_id].ack_tried = True
        self.moves.append(Move(message_id, name))
        return self.moves[-1]

    def confirm_move(self, move: Move, epoch: int, now: float) -> None:
        move.confirmed = True
        self.confirm_ack(move.taken, epoch, now)
        self.confirm(move.sent, "", True, now)

    # ---- the end

    def settle(self, left: dict[str, int], stored: Iterable[str]) -> None:
        """All is well again, and every queue has been emptied: `left` counts what came then, by message id.

        `stored`: names of messages that are still in some store, though they can't be delivered at the moment.
        """
        present = {self.copies[message_id].name for message_id in left if message_id in self.copies} | set(stored)
        if self.durable:
            for message in self.sent.values():
                if message.confirmed_at is not None and not message.expires and message.durable:
                    self._account_for(message, present)
        for move in self.moves if self.durable else []:
            found = self.sent[move.sent].delivered > 0
            back = move.taken in left
            taken = self.copies[move.taken]
            source = self.sent[taken.name]
            if found and back:
                self.findings.add(f"{move.sent!r} was sent, and {source.name!r} was not acknowledged with it")
            if (
                not found
                and not back
                and not present & {move.sent, taken.name}
                and not (taken.ack_tried_alone or source.expires)
                and source.durable
            ):
                others = [other for other in self.moves if other.taken == move.taken and other is not move]
                if not any(self.sent[other.sent].delivered for other in others):
                    self.findings.add(f"{source.name!r} was acknowledged, and {move.sent!r} was not sent with it")

    def _account_for(self, message: Sent, present: set[str]) -> None:
        tried = any(self.copies[message_id].ack_tried for message_id in message.ids)
        if message.name not in present and not tried:
            history = [one for message_id in sorted(message.ids) for one in self.copies[message_id].delivered]
            self.findings.add(
                f"{message.name!r}, confirmed at {message.confirmed_at:.3f}, is lost (deliveries: {history})"
            )
