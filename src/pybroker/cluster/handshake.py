"""How two replicas prove to each other that they know the set's secret. Owns what the proofs are about; no stream.

DESIGN.md section 5. Challenge (leader's nonce), Hello (follower's nonce and proof), Welcome (leader's proof). A proof is an
HMAC-SHA256 with the shared secret over everything that both sides said, and the role of who proves: so that neither a replay
nor the other side's own proof is one. There is no default secret: without one nothing is proved, and both must agree on that.
Pure.
"""

from __future__ import annotations

import hmac
from typing import NamedTuple

from pybroker.cluster.registry import Position

_LABEL = b"pybroker replication 1"


class Conversation(NamedTuple):
    """What both sides know of a connection before anything is proved."""

    set_name: str
    leader: str
    follower: str
    incarnation: str
    epoch: int
    leader_nonce: bytes
    follower_nonce: bytes


def follower_proof(secret: bytes | None, conversation: Conversation, position: Position) -> bytes:
    """The follower's proof, also of the position that it says it has; empty without a secret."""
    return _proof(secret, b"follower", conversation, [*position])


def leader_proof(secret: bytes | None, conversation: Conversation, position: Position, how: str) -> bytes:
    """The leader's proof, also of what it answers; empty without a secret."""
    return _proof(secret, b"leader", conversation, [*position, how])


def proof_fault(secret: bytes | None, proof: bytes, expected: bytes) -> str | None:
    """What is wrong with a peer's proof, to be told to both; None when it is right."""
    if secret is None:
        return "the peer has a secret and this replica has none: replica_set.secret must be the same" if proof else None
    if not proof:
        return "this replica has a secret and the peer has none: replica_set.secret must be the same"
    return (
        None
        if hmac.compare_digest(proof, expected)
        else "the peer has another secret: replica_set.secret must be the same"
    )


def _proof(secret: bytes | None, role: bytes, conversation: Conversation, more: list[int | str]) -> bytes:
    if secret is None:
        return b""
    parts = [_LABEL, role]
    for value in (*conversation, *more):
        parts.append(value if isinstance(value, bytes) else str(value).encode())
    said = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(secret, said, "sha256")
