"""What a leader knows of itself and of those who follow it, as values. Owns their shape only."""

from __future__ import annotations

from dataclasses import dataclass

from pybroker.cluster.registry import Position
from pybroker.cluster.scrub import ScrubStatistics


@dataclass(frozen=True, slots=True)
class FollowerStatistics:
    """One follower. `lag` is in batches; `unsent_bytes` of batches wait here for it."""

    name: str
    incarnation: str
    state: str
    counted: bool
    position: Position
    lag: int
    unsent_bytes: int
    chunks_compared: int
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class LeaderStatistics:
    """`position` is that of the last batch, `durable` that of the leader's own store, `reach` the last batch on a quorum."""

    epoch: int
    position: Position
    durable: Position
    reach: int
    lease_valid: bool
    lease_left: float
    ring_batches: int
    ring_bytes: int
    refused: int
    cut: int
    scrub: ScrubStatistics
    followers: tuple[FollowerStatistics, ...]
