"""What the set's nodes in ZooKeeper say, as values. Owns their encoding (JSON, so that an operator can read them).

DESIGN.md section 5, the table of nodes. Pure. The rules on them are in `pybroker.cluster.election`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from pybroker.cluster.coordinator import Node
from pybroker.errors import ConfigurationError

FORMAT = 1
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of sets and replicas: they become parts of paths


class Position(NamedTuple):
    """How far a store is: the epoch of its last batch, and its number. Compared in that order."""

    epoch: int
    lsn: int


@dataclass(frozen=True, slots=True)
class Slot:
    """A replica's slot. `candidate` is its final position while it stands for election, else None.

    `incarnation` names the copy, `starts` counts its starts: a store behind that was restored from an earlier life.
    """

    candidate: Position | None
    incarnation: str
    weight: int = 0
    starts: int = 0


@dataclass(frozen=True, slots=True)
class LeaderRecord:
    """The leader: `attempt` is new in each election; `replication` and `clients` are addresses."""

    epoch: int
    name: str
    attempt: str
    replication: str
    clients: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class View:
    """All nodes of a set as they were read. A version is None where the node is not there.

    slots   name to (slot, version)
    roster  name to incarnation: the copies that count; "" where a place is kept for a name that has no such copy yet
    alive   name to what a running replica says of itself (for status only)
    """

    replicas: int | None = None
    epoch: int = 0
    epoch_version: int | None = None
    roster: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    roster_version: int | None = None
    slots: Mapping[str, tuple[Slot, int]] = field(default_factory=lambda: MappingProxyType({}))
    leader: LeaderRecord | None = None
    leader_version: int | None = None
    leader_owner: int = 0
    alive: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({}))


def check_name(name: str, what: str) -> str:
    """A name that can be a part of a path; ConfigurationError otherwise."""
    if not NAME.fullmatch(name):
        raise ConfigurationError(
            f"{what} {name!r} must be 1 to 64 letters, digits, '_', '.' or '-', the first a letter or digit"
        )
    return name


def encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def encode_config(replicas: int) -> bytes:
    return encode({"format": FORMAT, "replicas": replicas})


def encode_epoch(epoch: int) -> bytes:
    return encode({"epoch": epoch})


def encode_roster(roster: Mapping[str, str]) -> bytes:
    return encode(dict(roster))


def encode_slot(slot: Slot) -> bytes:
    return encode(
        {
            "candidate": list(slot.candidate) if slot.candidate is not None else None,
            "incarnation": slot.incarnation,
            "weight": slot.weight,
            "starts": slot.starts,
        }
    )


def encode_leader(record: LeaderRecord) -> bytes:
    return encode(
        {
            "epoch": record.epoch,
            "name": record.name,
            "attempt": record.attempt,
            "replication": record.replication,
            "clients": list(record.clients),
        }
    )


def parse_view(nodes: Mapping[str, Node]) -> View:
    """Read the nodes. Raises ConfigurationError when one is not what this version writes."""
    try:
        return _parse_view(nodes)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"a node of the set in ZooKeeper can't be read ({error!r}): is it pybroker's?"
        ) from error


def _parse_view(nodes: Mapping[str, Node]) -> View:
    config, epoch, roster, leader = (nodes.get(path) for path in ("config", "epoch", "roster", "leader"))
    replicas = None
    if config is not None:
        found = json.loads(config.data)
        if found["format"] != FORMAT:
            raise ConfigurationError(f"the set in ZooKeeper has format {found['format']}, this version knows {FORMAT}")
        replicas = int(found["replicas"])
    slots = {}
    alive = {}
    for path, node in nodes.items():
        kind, _, name = path.partition("/")
        if kind == "slots" and name:
            slots[name] = (_parse_slot(node.data), node.version)
        elif kind == "alive" and name:
            alive[name] = json.loads(node.data)
    return View(
        replicas=replicas,
        epoch=int(json.loads(epoch.data)["epoch"]) if epoch is not None else 0,
        epoch_version=epoch.version if epoch is not None else None,
        roster=json.loads(roster.data) if roster is not None else {},
        roster_version=roster.version if roster is not None else None,
        slots=slots,
        leader=_parse_leader(leader.data) if leader is not None else None,
        leader_version=leader.version if leader is not None else None,
        leader_owner=leader.owner if leader is not None else 0,
        alive=alive,
    )


def _parse_slot(data: bytes) -> Slot:
    found = json.loads(data)
    candidate = found["candidate"]
    position = None if candidate is None else Position(int(candidate[0]), int(candidate[1]))
    return Slot(position, found["incarnation"], int(found["weight"]), int(found["starts"]))


def _parse_leader(data: bytes) -> LeaderRecord:
    found = json.loads(data)
    return LeaderRecord(
        int(found["epoch"]), found["name"], found["attempt"], found["replication"], tuple(found["clients"])
    )
