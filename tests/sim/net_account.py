"""What must be true of messages in a network of sets. Written apart from the code: knows no class of pybroker, only what was seen.

DESIGN.md sections 6 and 7, of durable messages in queues: what was confirmed is consumed; what is acknowledged is never delivered
again, by whatever broker; who is given a message of one queue for the second time is told so, which a copy stored twice can't be
(a dead letter begins anew); what was refused or not sent is never seen; no byte is changed; no message goes round in circles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.sim.checkers import Findings, Place

Later = Callable[[str, int], float | None]  # a set, an epoch: when a later leader of it was elected


@dataclass
class Copy:
    """What one receiver gets of a message: a durable subscriber, or ("") whoever consumes the queue."""

    deliveries: list[tuple[float, Place, bool]] = field(default_factory=list)  # when, where, marked as redelivered
    ack_tried: str = ""  # by whom
    tried_alone: bool = False  # not in a transaction
    acked_at: float | None = None
    ack_confirmed: bool = False  # and somebody was told so
    acked_at_set: str = ""

    def told(self) -> str:
        """What happened to it, in short."""
        history = ", ".join(f"{place[0]} {at:.3f}{' again' if marked else ''}" for at, place, marked in self.deliveries)
        return f"deliveries [{history}], acknowledged by {self.ack_tried or 'nobody'}"


@dataclass
class Sent:
    """One message, by the name in its body. `receivers`: who has to get it."""

    name: str
    body: bytes
    receivers: tuple[str, ...]
    copies: dict[str, Copy] = field(default_factory=dict)
    confirmed_at: float | None = None
    denied: bool = False  # the client was told that it was not sent, or not taken
    forwards: int = 0  # that a peer took
    takes: str = ""  # the message that is acknowledged in the transaction in which this one is sent ...
    seen_before: int = 0  # ... and how often that one had been delivered by then
    ids: set[str] = field(default_factory=set)

    def copy(self, receiver: str = "") -> Copy:
        return self.copies.setdefault(receiver, Copy())


class NetAccount:
    """What clients of a network sent, were told, received and acknowledged, and what went over links.

    lease     how long a deposed leader may still show something
    hops_max  how many brokers a message may pass
    removed   sets that were taken out of the network by an operator: what was on its way to them may be there twice, marked
    subscribers  durable ones: their names
    """

    def __init__(self, findings: Findings, later: Later, lease: float, hops_max: int) -> None:
        self.findings = findings
        self.later = later
        self.lease = lease
        self.hops_max = hops_max
        self.sent: dict[str, Sent] = {}
        self.removed: set[str] = set()
        self.subscribers: list[str] = []
        self.confirmed = 0
        self.acked = 0
        self.redelivered = 0
        self.forwarded = 0

    # ---- clients

    def attempt(self, name: str, body: bytes, receivers: tuple[str, ...] = ("",)) -> None:
        self.sent[name] = Sent(name, body, receivers)

    def confirm(self, name: str, now: float) -> None:
        self.sent[name].confirmed_at = now
        self.confirmed += 1

    def deny(self, name: str) -> None:
        """It was not sent, or refused: nobody may ever see it."""
        self.sent[name].denied = True

    def try_ack(self, body: bytes, who: str) -> None:
        copy = self._copy(body, who)
        copy.ack_tried, copy.tried_alone = who, True

    def confirm_ack(self, body: bytes, who: str, set_name: str, now: float) -> None:
        copy = self._copy(body, who)
        if copy.ack_confirmed:
            self.findings.add(
                f"{name_of(body)!r} was acknowledged twice: at {copy.acked_at:.3f} in set {copy.acked_at_set}, "
                f"and at {now:.3f} in set {set_name}"
            )
        copy.acked_at, copy.acked_at_set, copy.ack_confirmed = now, set_name, True
        self.acked += 1

    def try_move(self, body: bytes, name: str) -> None:
        """A message is to be acknowledged, and `name` to be sent, in one transaction."""
        taken, moved = self.sent[name_of(body)], self.sent[name]
        taken.copy().ack_tried = f"{name}'s transaction"
        moved.takes, moved.seen_before = taken.name, len(taken.copy().deliveries)

    def _copy(self, body: bytes, receiver: str) -> Copy:
        return self.sent[name_of(body)].copy(receiver if receiver in self.subscribers else "")

    # ---- brokers

    def deliver(self, place: Place, message_id: str, body: bytes, redelivered: bool, now: float) -> None:
        """A broker has handed a message to a client."""
        process, epoch, queue = place
        set_name = process[0]
        message = self.sent.get(name_of(body))
        if message is None or body != message.body:
            self.findings.add(f"{process} delivered {body[:40]!r}, which nobody sent")
            return
        if message.denied:
            self.findings.add(
                f"{process} delivered {message.name!r}, of which its sender was told that it was not taken"
            )
        message.ids.add(message_id)
        if len(message.ids) > 1:
            self.findings.add(f"{message.name!r} has several ids: {sorted(message.ids)}")
        deposed = self.later(set_name, epoch)
        if deposed is not None and now > deposed + self.lease:
            self.findings.add(
                f"{process} showed something in epoch {epoch} at {now:.3f}; a later one began at {deposed:.3f}"
            )
        copy = self._copy(body, queue)
        if copy.acked_at is not None and deposed is None and copy.acked_at_set not in self.removed:
            self.findings.add(
                f"{process} delivered {message.name!r} from {queue} at {now:.3f}; "
                f"its acknowledgement in set {copy.acked_at_set} was confirmed at {copy.acked_at:.3f}: {copy.told()}"
            )
        if copy.deliveries:
            self.redelivered += 1
            if not redelivered and any(before[2] == queue for _, before, _ in copy.deliveries):
                self.findings.add(
                    f"{process} delivered {message.name!r} from {queue} at {now:.3f} as if it were the first time: {copy.told()}"
                )
        copy.deliveries.append((now, place, redelivered))
        if message.takes:  # it is there, so that the other one is acknowledged
            taken = self.sent[message.takes].copy()
            if taken.acked_at is None:
                taken.acked_at, taken.acked_at_set = now, set_name

    def forward(self, taker: str, passed: tuple[str, ...], body: bytes, new: bool) -> None:
        """A broker has taken what a peer forwarded (`new`: and stored it)."""
        self.forwarded += new
        if len(passed) > self.hops_max:
            self.findings.add(f"{taker} took {body[:12]!r} after {len(passed)} brokers: {passed}")
        if taker == passed[-1]:
            self.findings.add(f"{taker} took {body[:12]!r} from itself")
        message = self.sent.get(name_of(body))
        if message is None or message.body != body:
            self.findings.add(f"{taker} was given {body[:40]!r} by {passed[-1]}, which nobody sent")
            return
        message.forwards += new
        if message.forwards > self.hops_max * max(1, len(message.receivers)) and not self.removed:
            self.findings.add(f"{message.name!r} was forwarded {message.forwards} times")

    # ---- the end

    def waiting(self) -> list[str]:
        """Confirmed, and not accounted for: those for whom they are have not even tried to acknowledge them."""
        return [
            f"{message.name!r} for {receiver or 'anybody'}, confirmed at {message.confirmed_at:.3f}: "
            f"{message.copy(receiver).told()}, forwarded {message.forwards} times"
            for message in self.sent.values()
            if message.confirmed_at is not None
            for receiver in message.receivers
            if not message.copy(receiver).ack_tried
        ]

    def settle(self) -> None:
        """All is well again, and everything that is left has been consumed."""
        for text in self.waiting():
            self.findings.add(f"lost: {text}")
        for moved in self.sent.values():
            if moved.takes and not moved.copy().deliveries:
                taken = self.sent[moved.takes]
                if len(taken.copy().deliveries) == moved.seen_before and not self._moved_otherwise(moved):
                    self.findings.add(
                        f"{taken.name!r} was acknowledged, and {moved.name!r} was not sent with it: {taken.copy().told()}"
                    )

    def _moved_otherwise(self, moved: Sent) -> bool:
        """Whether another transaction, or an acknowledgement of its own, has taken the message."""
        taken = self.sent[moved.takes]
        others = [other for other in self.sent.values() if other.takes == taken.name and other is not moved]
        return any(other.copy().deliveries for other in others) or taken.copy().tried_alone


def name_of(body: bytes) -> str:
    return body.split(b"|", 1)[0].decode("ascii", "replace")
