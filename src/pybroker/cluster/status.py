"""What one replica can say of the whole set, for operators. Owns the form of it; pure.

The leader knows best who follows it and how far each is, and tells its followers with each heartbeat: so every replica can show it,
also while ZooKeeper is away. Where there is no leader the slots say who stands for election. Names are on the list that are on the
roster, or attached, or running.
"""

from __future__ import annotations

from typing import Any

from pybroker.cluster.election import Me, is_virgin
from pybroker.cluster.frames import CATCHING_UP, FOLLOWING, LEADING, Member
from pybroker.cluster.registry import LeaderRecord, Position, View

KINDS = {LEADING: "leader", FOLLOWING: "follower", CATCHING_UP: "joining"}  # state to role

STANDING = "standing"  # for election
ABSENT = "absent"
RUNNING = "running"  # and neither standing nor attached to a leader that is known here
RESERVED = "reserved"  # a place on the roster for a copy that has not come yet


def members(
    view: View,
    name: str,
    role: str,
    me: Me | None,
    address: str,
    leader: LeaderRecord | None,
    table: tuple[Member, ...],
) -> list[dict[str, Any]]:
    """A row for each member, by name.

    view          what ZooKeeper said last; it may be old
    name ... address  of the replica that is asked; `me` is None while its store can't be opened
    leader        whom it follows, or itself; else None
    table         the leader's own, if there is one
    """
    known = {row.name: row for row in table}
    names = {name, *view.roster, *view.alive, *known} | (set(view.slots) if is_virgin(view) else set())
    last = next((row.position for row in table if row.state == LEADING), None)
    rows = []
    for one in sorted(names):
        row = known.get(one)
        slot = view.slots[one][0] if one in view.slots else None
        incarnation = row.incarnation if row else slot.incarnation if slot else view.roster.get(one, "")
        position = row.position if row else slot.candidate if slot else None
        alive = view.alive.get(one)
        if row is not None:
            kind, state = KINDS[row.state], row.state
        elif leader is None and slot is not None and slot.candidate is not None:
            kind, state = "candidate", STANDING
        elif view.roster.get(one) == "" and alive is None:
            kind, state = "none", RESERVED
        else:
            kind, state = "none", ABSENT if alive is None else RUNNING
        if one == name:
            kind = role
            state = state if state not in (ABSENT, RESERVED) else RUNNING
            if me is not None:
                incarnation, position = me.incarnation, me.position
        rows.append(
            {
                "name": one,
                "role": kind,
                "counted": row.counted if row else bool(incarnation) and view.roster.get(one) == incarnation,
                "position": list(position) if position is not None else None,
                "lag": _lag(last, position),
                "state": state,
                "address": address if one == name else str((alive or {}).get("address", "")),
                "incarnation": incarnation,
            }
        )
    return rows


def _lag(last: Position | None, position: Position | None) -> int | None:
    """In batches."""
    return None if last is None or position is None else max(0, last.lsn - position.lsn)
