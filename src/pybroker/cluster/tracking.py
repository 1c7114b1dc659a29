"""What a leader knows of the copies that follow it: who counts, what each holds durably, and until when it may lead.

DESIGN.md section 5, rules 5, 7 and 10 (the leader's part of `election_model.py`). Pure: times come in as arguments, in seconds
of one monotonic clock. Everything that a follower says comes in under its *attachment*, a number that is new for each
connection: so that a late word of a connection that was replaced can't count.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from pybroker.cluster.registry import Position
from pybroker.errors import ProtocolError

BEATS_MAX = 1_024  # heartbeats whose send times are remembered; older ones prove nothing


class Copy(NamedTuple):
    """One copy of the store: the replica's name, and which of its lives' stores this is."""

    name: str
    incarnation: str


@dataclass(slots=True)
class _Known:
    """The newest copy that attached under a name."""

    copy: Copy
    attachment: int | None
    durable: int  # it holds all batches up to this number
    sent: int  # it was sent all batches up to this number
    beat_sent: int
    beat_first: int  # heartbeats below this one were not sent on this attachment
    answered_at: float  # send time of the newest heartbeat that it answered
    threshold: int  # a learner counts only when it holds this much


class Tracking:
    """The leader's book. `counted` maps names to the copies on the roster, `last` is the number of the leader's last batch."""

    def __init__(self, epoch: int, quorum: int, own: str, counted: Iterable[Copy], last: int) -> None:
        self.epoch = epoch
        self.own = own
        self.last = last
        self._others = quorum - 1  # how many counted followers make a quorum with the leader
        self._counted = {copy.name: copy.incarnation for copy in counted if copy.name != own}
        self._known: dict[str, _Known] = {}
        self._attachments = 0
        self._beats: dict[int, float] = {}
        self._beat = 0
        self._lease_from: float | None = None  # what the lease is counted from, until that may change

    # ---- who is there

    def attach(self, copy: Copy, durable: int) -> int:
        """A copy connected, and is known to hold all batches up to number `durable`. Returns its attachment.

        It replaces the name's earlier attachment. Another copy of that name stops counting at this moment; a copy that does not
        count is a learner: it must first hold what the leader has now.
        """
        if copy.name == self.own:
            raise ProtocolError(f"a follower has the leader's own name {copy.name!r}")
        if self._counted.get(copy.name, copy.incarnation) != copy.incarnation:
            del self._counted[copy.name]
        self._lease_from = None
        before = self._known.get(copy.name)
        same = before is not None and before.copy == copy
        self._attachments += 1
        self._known[copy.name] = _Known(
            copy=copy,
            attachment=self._attachments,
            durable=durable,
            sent=durable,
            beat_sent=0,
            beat_first=self._beat + 1,
            answered_at=before.answered_at if before is not None and same else -math.inf,
            threshold=self.last,
        )
        return self._attachments

    def detach(self, attachment: int) -> None:
        """That connection is over. What its copy holds, and the lease that it gave, stay true."""
        known = self._find(attachment)
        if known is not None:
            known.attachment = None

    def is_current(self, attachment: int) -> bool:
        return self._find(attachment) is not None

    def attached(self) -> dict[str, Copy]:
        return {name: known.copy for name, known in self._known.items() if known.attachment is not None}

    def is_counted(self, copy: Copy) -> bool:
        return self._counted.get(copy.name) == copy.incarnation

    def counted(self) -> list[Copy]:
        """The followers' copies whose answers count."""
        return [Copy(name, incarnation) for name, incarnation in self._counted.items()]

    def durable(self, name: str) -> int:
        """Up to which batch the name's newest copy is known to hold everything."""
        known = self._known.get(name)
        return 0 if known is None else known.durable

    def stop_counting(self, name: str) -> None:
        """Before the name is taken off the roster."""
        self._counted.pop(name, None)
        self._lease_from = None

    def ready_learners(self) -> list[Copy]:
        """Attached copies that don't count yet and hold all that the leader had when they came: to be put on the roster."""
        return [
            known.copy
            for known in self._known.values()
            if known.attachment is not None and not self.is_counted(known.copy) and known.durable >= known.threshold
        ]

    def registered(self, copy: Copy) -> bool:
        """The roster has that copy now. Counts it, and says so, unless yet another copy of the name has come meanwhile."""
        known = self._known.get(copy.name)
        if known is None or known.copy != copy or known.durable < known.threshold:
            return False
        self._counted[copy.name] = copy.incarnation
        self._lease_from = None
        return True

    # ---- batches

    def append(self, lsn: int) -> None:
        """The leader has a new last batch."""
        if lsn != self.last + 1:
            raise ValueError(f"batch {lsn} does not follow {self.last}")
        self.last = lsn

    def sent(self, attachment: int, lsn: int) -> None:
        """Batches up to `lsn` are about to be sent there (or a whole store that holds them)."""
        known = self._find(attachment)
        if known is not None:
            known.sent = max(known.sent, lsn)

    def answer(self, attachment: int, epoch: int, position: Position) -> None:
        """A follower says what it holds durably. Raises ProtocolError when that can't be, or is not this connection's to say."""
        known = self._checked(attachment, epoch, position)
        known.durable = max(known.durable, position.lsn)

    def reach(self) -> int:
        """The number of the last batch that a quorum holds durably, this leader being the last of them to write it."""
        if self._others == 0:
            return self.last
        held = sorted((known.durable for known in self._known.values() if self.is_counted(known.copy)), reverse=True)
        return held[self._others - 1] if len(held) >= self._others else 0

    # ---- lease

    def beat(self, now: float) -> int:
        """Begin the next heartbeat, before it is sent to anybody; its number."""
        self._beat += 1
        self._beats[self._beat] = now
        if len(self._beats) > BEATS_MAX:
            del self._beats[next(iter(self._beats))]
        return self._beat

    def beat_sent(self, attachment: int, number: int) -> None:
        """A heartbeat is about to be sent there."""
        known = self._find(attachment)
        if known is not None:
            known.beat_sent = max(known.beat_sent, number)
            known.beat_first = min(known.beat_first, number)

    def answer_beat(self, attachment: int, epoch: int, number: int, position: Position) -> None:
        """A follower answers a heartbeat: it follows this epoch. Raises ProtocolError as `answer` does."""
        known = self._checked(attachment, epoch, None)
        if not known.beat_first <= number <= known.beat_sent:
            raise ProtocolError(f"{known.copy.name} answers heartbeat {number}, which it was not sent")
        if position.epoch > self.epoch:
            raise ProtocolError(f"{known.copy.name} has {position}, of a later epoch than {self.epoch}")
        sent_at = self._beats.get(number)
        if sent_at is not None:
            known.answered_at = max(known.answered_at, sent_at)
            self._lease_from = None

    def lease_until(self, lease: float) -> float:
        """Until when Q-1 counted followers can't have helped another leader, as far as this one can know.

        -inf before they first answered, inf when the leader is a quorum by itself.
        """
        if self._lease_from is None:
            self._lease_from = self._count_lease_from()
        return self._lease_from + lease

    def _count_lease_from(self) -> float:
        if self._others == 0:
            return math.inf
        times = sorted(
            (known.answered_at for known in self._known.values() if self.is_counted(known.copy)), reverse=True
        )
        return times[self._others - 1] if len(times) >= self._others else -math.inf

    # ----

    def _find(self, attachment: int) -> _Known | None:
        return next((known for known in self._known.values() if known.attachment == attachment), None)

    def _checked(self, attachment: int, epoch: int, position: Position | None) -> _Known:
        known = self._find(attachment)
        if known is None:
            raise ProtocolError("a word of a connection that was replaced")
        if epoch != self.epoch:
            raise ProtocolError(f"{known.copy.name} answers in epoch {epoch}, this is {self.epoch}")
        if position is not None and (position.lsn > known.sent or position.epoch > self.epoch):
            raise ProtocolError(f"{known.copy.name} claims {position}, and was sent batches up to {known.sent}")
        return known
