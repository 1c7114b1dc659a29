"""Bodies that several durable subscriptions share: a topic message with a hundred of them is stored once.

Owns the count of references. While any entry of a body is in memory the count here is the true one; for the others the
store's is. A page that was read while a count changed must not bring the old one back: so a body that nobody holds any
more is forgotten only when no read is under way.
"""

from __future__ import annotations

from pybroker.operations import DELETE_BODY, SET_REFERENCES, Operation


class SharedBody:
    """One stored body. `references`: entries that refer to it, in memory or not; `loaded`: those in memory."""

    __slots__ = ("body_id", "loaded", "references")

    def __init__(self, body_id: int, references: int) -> None:
        self.body_id = body_id
        self.references = references
        self.loaded = 0


class SharedBodies:
    """All bodies of which entries are in memory, or were when a read began."""

    def __init__(self) -> None:
        self._bodies: dict[int, SharedBody] = {}
        self._unloaded: set[int] = set()
        self._reads = 0

    def __len__(self) -> int:
        return len(self._bodies)

    def get(self, body_id: object) -> SharedBody | None:
        """What memory knows of a body; None when the store's count is the true one."""
        return self._bodies.get(body_id)  # type: ignore[call-overload,no-any-return]

    def create(self, body_id: int, references: int) -> SharedBody:
        body = self._bodies[body_id] = SharedBody(body_id, references)
        return body

    def loaded_from_store(self, body_id: int, references: int) -> SharedBody:
        """The body of an entry that was read; what memory knows goes before what was read."""
        body = self._bodies.get(body_id)
        return self.create(body_id, references) if body is None else body

    def hold(self, body: SharedBody) -> None:
        body.loaded += 1
        self._unloaded.discard(body.body_id)

    def let_go(self, body: SharedBody) -> None:
        """An entry left memory; the store still has it."""
        body.loaded -= 1
        if body.loaded == 0:
            if self._reads:
                self._unloaded.add(body.body_id)
            else:
                del self._bodies[body.body_id]

    def release(self, body: SharedBody) -> Operation:
        """One reference is gone for good (the caller lets go of the entry itself): the operation that says so."""
        body.references -= 1
        if body.references > 0:
            return (SET_REFERENCES, body.body_id, body.references)
        return (DELETE_BODY, body.body_id)

    def read_began(self) -> None:
        self._reads += 1

    def read_ended(self) -> None:
        self._reads -= 1
        if self._reads == 0:
            for body_id in self._unloaded:
                del self._bodies[body_id]
            self._unloaded.clear()
