"""The rules of a replica set's election, as pure functions: what was read of ZooKeeper in, versioned writes out.

DESIGN.md section 5, rules 2, 3, 8 and 10. No rule trusts that a view is fresh: every write names the versions that were read,
so that an old view can only lead to a refusal. A published position is final: who stands for election takes nothing from any
leader until its slot is empty again, and emptying it checks that the leader's epoch is still the present one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_fields

from pybroker.cluster.coordinator import CheckNode, CreateNode, DeleteNode, SetNode, Write
from pybroker.cluster.registry import (
    LeaderRecord,
    Position,
    Slot,
    View,
    encode_config,
    encode_epoch,
    encode_leader,
    encode_roster,
    encode_slot,
)
from pybroker.errors import ConfigurationError

FORCED_STEP = 1 << 32  # a forced start raises the epoch by this: no absent store can know such an epoch


@dataclass(frozen=True, slots=True)
class Me:
    """What a replica knows of itself. `position` is its last *durable* one."""

    name: str
    incarnation: str
    starts: int
    weight: int
    position: Position


@dataclass(frozen=True, slots=True)
class Proposal:
    """A transaction that makes this replica the leader of `epoch`.

    group   the frozen copies that it stands on
    roster  the copies that count from then on
    """

    epoch: int
    group: tuple[str, ...]
    roster: Mapping[str, str]
    writes: tuple[Write, ...]


@dataclass(frozen=True, slots=True)
class Blocked:
    """Why no election is possible whoever stands, though it may look so: shown to the operator.

    `better`: a start by force is possible, but by that replica, which has more.
    """

    reason: str
    better: str = ""


def quorum(replicas: int) -> int:
    return replicas // 2 + 1


def slot_path(name: str) -> str:
    return f"slots/{name}"


# ---- taking part at all


def missing_nodes(view: View, me: Me, replicas: int) -> list[Write]:
    """The nodes that are not there yet, to be made in one transaction; empty when all are."""
    writes: list[Write] = []
    if view.replicas is None:
        writes.append(CreateNode("config", encode_config(replicas)))
    if view.epoch_version is None:
        writes.append(CreateNode("epoch", encode_epoch(0)))
    if view.roster_version is None:
        writes.append(CreateNode("roster", encode_roster({})))
    if me.name not in view.slots:
        writes.append(CreateNode(slot_path(me.name), encode_slot(Slot(None, me.incarnation, me.weight, 0))))
    return writes


def check_admission(view: View, me: Me, replicas: int) -> None:
    """Raise ConfigurationError when this replica must not start: another number of replicas, or no place for its name."""
    if view.replicas is not None and view.replicas != replicas:
        raise ConfigurationError(
            f"replica_set.replicas is {replicas}, but the set was made with {view.replicas}: all members must say the same"
        )
    if me.position.epoch > view.epoch:
        return  # ZooKeeper's data was lost or rewound: what it says of names is old, too
    if me.name not in view.roster and len(view.roster) >= replicas:
        names = ", ".join(sorted(view.roster))
        raise ConfigurationError(
            f"replica {me.name!r} has no place in the set: its {replicas} replicas are {names}; "
            f"`pybroker replica replace OLD {me.name}` gives it the place of one of them"
        )


def is_restored(view: View, me: Me, first: bool) -> bool:
    """Whether this copy comes from an earlier life than one that the set has seen: it must take a new incarnation.

    `first`: this life has not written its slot yet. Then nobody else can have written this life's number there either.
    """
    found = view.slots.get(me.name)
    if found is None or found[0].incarnation != me.incarnation:
        return False
    return found[0].starts >= me.starts if first else found[0].starts > me.starts


def is_virgin(view: View) -> bool:
    """Whether the set has never had a leader: then every copy counts."""
    return view.epoch == 0 and not view.roster


def counts(view: View, name: str, incarnation: str) -> bool:
    """Whether a copy is on the roster. In a set that never had a leader all are."""
    return is_virgin(view) or view.roster.get(name) == incarnation


def visible_leader(view: View, me: Me) -> LeaderRecord | None:
    """The leader of the present epoch, unless it is this replica itself."""
    leader = view.leader
    return leader if leader is not None and leader.epoch == view.epoch and leader.name != me.name else None


# ---- slots


def publish(view: View, me: Me) -> list[Write]:
    """Become a candidate with the final position `me.position` (the caller has cut its replication link before)."""
    _, version = view.slots[me.name]
    return [SetNode(slot_path(me.name), encode_slot(Slot(me.position, me.incarnation, me.weight, me.starts)), version)]


def give_up(view: View, me: Me) -> list[Write]:
    """Empty my slot to follow the leader of `view.epoch`. Written also when it is empty: what it says is of an earlier life."""
    _, version = view.slots[me.name]
    assert view.epoch_version is not None
    return [
        SetNode(slot_path(me.name), encode_slot(Slot(None, me.incarnation, me.weight, me.starts)), version),
        CheckNode("epoch", view.epoch_version),
    ]


def stands(view: View, me: Me) -> bool:
    """Whether my slot says, in this view, that I stand with my present position.

    What an earlier life of this copy has published does not do: an election keeps the slot's start counter, which must be
    this life's, or a copy restored from before it could not be told.
    """
    found = view.slots.get(me.name)
    if found is None:
        return False
    slot = found[0]
    return (slot.incarnation, slot.starts, slot.candidate) == (me.incarnation, me.starts, me.position)


# ---- the election


def candidates(view: View) -> list[tuple[str, Slot, int]]:
    """Those who stand and count, best first: by position, then weight, then name."""
    found = [
        (name, slot, version)
        for name, (slot, version) in view.slots.items()
        if slot.candidate is not None and counts(view, name, slot.incarnation)
    ]
    found.sort(key=lambda one: one[0])
    found.sort(key=lambda one: (one[1].candidate, one[1].weight), reverse=True)
    return found


def rank(view: View, me: Me) -> int:
    """How many candidates are better than this one: it proposes after them."""
    return next((at for at, (name, _, _) in enumerate(candidates(view)) if name == me.name), len(view.slots))


def behind_stores(view: View, me: Me) -> int:
    """The highest epoch that any copy in sight has, if ZooKeeper's own is below it (its data was lost or rewound); else 0."""
    epochs = [slot.candidate.epoch for slot, _ in view.slots.values() if slot.candidate is not None]
    highest = max([me.position.epoch, *epochs])
    return highest if highest > view.epoch else 0


def propose(
    view: View, me: Me, replicas: int, record: LeaderRecord, *, forced: bool = False
) -> Proposal | Blocked | None:
    """The transaction of rule 3, if a quorum of counted candidates, of which I am the best, can be seen.

    `record` is how the leader will be shown; its epoch is filled in here. `forced`: an operator says that the copies in
    sight are the best that are left. None: not now, wait for a change.
    """
    if not stands(view, me):
        return None
    assert view.epoch_version is not None
    assert view.roster_version is not None
    lost = behind_stores(view, me)
    if lost or forced:
        return _propose_anew(view, me, replicas, record, lost, forced)
    ranked = candidates(view)
    at = next((at for at, (name, _, _) in enumerate(ranked) if name == me.name), None)
    if at is None:
        return None
    group = ranked[at : at + quorum(replicas)]
    if len(group) < quorum(replicas):
        return None
    writes: list[Write] = [_emptied(name, slot, version) for name, slot, version in group]
    roster = dict(view.roster)
    if is_virgin(view):
        loaded = [name for name, slot, _ in ranked if slot.candidate is not None and slot.candidate > (0, 0)]
        if len(loaded) > 1:
            return Blocked(
                f"replicas {', '.join(sorted(loaded))} all bring messages of a time outside of any set, and only one's can be "
                "gone on with: stop the others, move their data directories away, and start them with empty ones"
            )
        roster = {name: slot.incarnation for name, slot, _ in group}
        writes.append(SetNode("roster", encode_roster(roster), view.roster_version))
    else:
        writes.append(CheckNode("roster", view.roster_version))
    return _proposal(view, view.epoch + 1, group, roster, writes, record)


def _propose_anew(
    view: View, me: Me, replicas: int, record: LeaderRecord, lost: int, forced: bool
) -> Proposal | Blocked | None:
    """Start a set whose ZooKeeper data is gone or rewound: with all its copies, or by force with those that are there.

    By force, who stands but does not run is not there: an operator who forces a start says that it will not come back.

    Only the best quorum counts then, as at the first start of a set; the others are learners. A copy that was wiped while nobody
    knew what counts is there as well: if it counted, it and another one could elect a leader without what only the best has.
    """
    standing = [
        (name, slot, version)
        for name, (slot, version) in view.slots.items()
        if slot.candidate is not None and (not forced or name == me.name or name in view.alive)
    ]
    standing.sort(key=lambda one: one[0])
    standing.sort(key=lambda one: (one[1].candidate, one[1].weight), reverse=True)
    if not forced and len(standing) < replicas:
        return Blocked(
            f"ZooKeeper's data is older than the stores (epoch {view.epoch} there, {lost} in a store): the set starts by "
            f"itself only when all {replicas} replicas are there ({len(standing)} are); `pybroker replica force-start` "
            "starts it with what is there, and what only the absent ones have is lost"
        )
    if not standing or standing[0][0] != me.name:
        best = standing[0][0] if standing else ""
        if not forced or not best:
            return None
        return Blocked(f"the start can't be forced here: replica {best} has more, or goes first: force it there", best)
    assert view.roster_version is not None
    writes: list[Write] = [_emptied(name, slot, version) for name, slot, version in standing]
    roster = {name: slot.incarnation for name, slot, _ in standing[: quorum(replicas)]}
    writes.append(SetNode("roster", encode_roster(roster), view.roster_version))
    epoch = max(view.epoch, lost) + (FORCED_STEP if forced else 1)
    return _proposal(view, epoch, standing, roster, writes, record)


def _emptied(name: str, slot: Slot, version: int) -> Write:
    return SetNode(slot_path(name), encode_slot(Slot(None, slot.incarnation, slot.weight, slot.starts)), version)


def _proposal(
    view: View,
    epoch: int,
    group: list[tuple[str, Slot, int]],
    roster: Mapping[str, str],
    writes: list[Write],
    record: LeaderRecord,
) -> Proposal:
    assert view.epoch_version is not None
    writes.append(SetNode("epoch", encode_epoch(epoch), view.epoch_version))
    if view.leader_version is not None:
        writes.append(DeleteNode("leader", view.leader_version))
    writes.append(CreateNode("leader", encode_leader(with_epoch(record, epoch)), ephemeral=True))
    return Proposal(epoch, tuple(name for name, _, _ in group), roster, tuple(writes))


def with_epoch(record: LeaderRecord, epoch: int) -> LeaderRecord:
    return LeaderRecord(epoch, record.name, record.attempt, record.replication, record.clients)


# ---- leading


def is_shown(view: View, record: LeaderRecord, session: int) -> bool:
    """Whether the leader's node is this record's, of this session."""
    return view.leader == record and view.leader_owner == session


def show_again(view: View, record: LeaderRecord) -> list[Write]:
    """Rule 8: show the leader again (after its session expired, or with other addresses), if its epoch is the present one."""
    assert view.epoch_version is not None
    writes: list[Write] = [CheckNode("epoch", view.epoch_version)]
    if view.leader_version is not None:
        writes.append(DeleteNode("leader", view.leader_version))
    writes.append(CreateNode("leader", encode_leader(record), ephemeral=True))
    return writes


def resign(view: View, record: LeaderRecord) -> list[Write]:
    """Rule 12: take the leader's node away, if it is this record's."""
    if view.leader is None or view.leader.attempt != record.attempt or view.leader_version is None:
        return []
    return [DeleteNode("leader", view.leader_version)]


def register(view: View, epoch: int, replicas: int, name: str, incarnation: str) -> list[Write] | None:
    """Rule 10: put a copy on the roster. None when this is not the present epoch any more, or there is no place for it."""
    if view.epoch != epoch or view.epoch_version is None or view.roster_version is None:
        return None
    if name not in view.roster and len(view.roster) >= replicas:
        return None
    roster = {**view.roster, name: incarnation}
    return [
        CheckNode("epoch", view.epoch_version),
        SetNode("roster", encode_roster(roster), view.roster_version),
    ]


def replace(view: View, replicas: int, old: str, new: str) -> list[Write]:
    """An operator gives the place of `old` to the name `new`, whose copy is then a learner. ConfigurationError if it can't be.

    The place is kept for `new` from now on: the roster has the name, and no copy that counts.
    """
    if view.roster_version is None or view.epoch_version is None or old not in view.roster:
        raise ConfigurationError(
            f"replica {old!r} is not on the roster, which has {', '.join(sorted(view.roster)) or 'nobody'}"
        )
    if new in view.roster:
        raise ConfigurationError(f"replica {new!r} is on the roster already")
    roster = replaced(view, old, new).roster
    if sum(map(bool, roster.values())) < quorum(replicas):
        raise ConfigurationError(f"taking {old!r} away leaves fewer than {quorum(replicas)} copies that count")
    return [
        CheckNode("epoch", view.epoch_version),
        SetNode("roster", encode_roster(roster), view.roster_version),
    ]


def replaced(view: View, old: str, new: str) -> View:
    """What a view becomes when `replace` of it was done, as far as the roster goes."""
    assert view.roster_version is not None
    kept = {name: incarnation for name, incarnation in view.roster.items() if name != old}
    return replace_fields(view, roster={**kept, new: ""}, roster_version=view.roster_version + 1)


def may_stand(view: View, me: Me, replicas: int) -> bool:
    """Whether standing for election makes sense: the copy counts, or the set's memory in ZooKeeper is lost."""
    return counts(view, me.name, me.incarnation) or behind_stores(view, me) > 0


def has_written(view: View, me: Me) -> bool:
    """Whether my slot was written in this life, by me or by an election since."""
    found = view.slots.get(me.name)
    return found is not None and (found[0].incarnation, found[0].starts) == (me.incarnation, me.starts)


def has_given_up(view: View, me: Me, version: int) -> bool:
    """Whether my slot, which had that version, shows `give_up` of this life.

    No leave to follow: the nodes of a view are not of one moment, and an election may have emptied the slot instead.
    """
    found = view.slots.get(me.name)
    return found is not None and found == (Slot(None, me.incarnation, me.weight, me.starts), version + 1)


def touch(view: View, me: Me) -> list[Write]:
    """Write my slot as it is: whatever names its old version can never be done any more."""
    slot, version = view.slots[me.name]
    return [SetNode(slot_path(me.name), encode_slot(slot), version)]
