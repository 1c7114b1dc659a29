"""The journal: group commit. Owns the open batch and what is held back until it is committed; knows no rule of the broker.

While one batch is being written the next one fills. What a turn emitted enters the open batch whole, so that a batch
never splits a transaction. `Committer` is the seam where a batch is made durable: `LocalCommitter` writes it to this
process's store; a replicated one sends it to the followers first. DESIGN.md section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from pybroker.operations import Operation
from pybroker.store.backend import Change
from pybroker.store.committer import Batch, Committer
from pybroker.store.store import Store


class LocalCommitter:
    """Writes batches to one store. `sync` waits for the disk."""

    def __init__(self, store: Store, sync: bool) -> None:
        self._store = store
        self._sync = sync
        self._writer = trio.CapacityLimiter(1)

    async def commit(self, batch: Batch) -> None:
        store = self._store
        prepared = store.prepare(batch.changes, batch.position)  # on the event loop: cheap calls into C
        if store.backend.blocking:
            await trio.to_thread.run_sync(store.write, prepared, self._sync, limiter=self._writer)
        else:
            store.write(prepared, self._sync)


class Journal:
    """Collects operations and effects, commits them in batches, and releases each batch's effects in order.

    `seal` is asked for last operations when a batch is closed; `release` is given the effects of a committed batch, and
    must not raise.
    """

    def __init__(
        self,
        store: Store,
        committer: Committer,
        seal: Callable[[], list[Operation]],
        release: Callable[[list[Any]], None],
        write_spool: Callable[[list[Operation]], None],
    ) -> None:
        self._store = store
        self._committer = committer
        self._seal = seal
        self._release = release
        self._write_spool = write_spool
        self._spool_writer = trio.CapacityLimiter(1)
        self._changes: list[Change] = []
        self._spool: list[Operation] = []
        self._effects: list[Any] = []
        self._unsealed = False  # `seal` has something for the open batch
        self._writing: list[Any] | None = None  # the effects of the batch that is being written
        self._work = trio.Event()
        self._room = trio.Event()
        self.closing = False  # `run` is to return: nothing is to be added that somebody does not wait for
        self._ended = False
        self.open_bytes = 0  # bytes of the open batch's changes
        self.batches = 0
        self.changes_written = 0
        self.position = store.position

    @property
    def _open(self) -> bool:
        return bool(self._changes or self._spool or self._unsealed)

    def add(self, operations: list[Operation], effects: list[Any], spool: list[Operation], unsealed: bool) -> None:
        """Put one turn's operations into the open batch; its effects follow everything that was added before them.

        `unsealed`: the turn changed something that `seal` will say, and the effects must not be seen before that is
        committed (a turn that only dispatches moves its queues' marks).
        """
        if operations:
            changes = self._store.encode(operations)
            self.open_bytes += sum([len(value) for _, value in changes if value is not None])
            self._changes += changes
        if spool:
            self._spool += spool
        self._unsealed = self._unsealed or unsealed
        if self._open:
            self._effects += effects
            self._work.set()
        elif self._writing is not None:
            self._writing += effects
        elif effects:
            self._release(effects)

    async def wait_room(self, bytes_max: int) -> None:
        """Wait until the open batch is smaller than `bytes_max`, or nothing will ever be written any more."""
        while self.open_bytes >= bytes_max and not self._ended:
            await self._room.wait()

    async def run(self) -> None:
        """Commit batches until `close` was called and nothing is left. Raises what the store or the committer raises."""
        while True:
            if not self._open:
                if self.closing:
                    return
                self._work = trio.Event()
                await self._work.wait()
                continue
            await self._commit()

    async def _commit(self) -> None:
        changes, self._changes = self._changes, []
        spool, self._spool = self._spool, []
        self._writing, self._effects = self._effects, []
        self.open_bytes = 0
        self._unsealed = False
        changes += self._store.encode(self._seal())
        if spool:
            if self._store.backend.blocking:
                await trio.to_thread.run_sync(self._write_spool, spool, limiter=self._spool_writer)
            else:
                self._write_spool(spool)
        if changes:
            epoch, lsn = self.position
            batch = Batch(changes, (epoch, lsn + 1))
            await self._committer.commit(batch)
            self.position = batch.position
            self.batches += 1
            self.changes_written += len(changes)
        effects, self._writing = self._writing, None
        self._room.set()
        self._room = trio.Event()
        self._release(effects)

    def end(self) -> None:
        """`run` has ended, for whatever reason: nobody must wait for room that will not come."""
        self._ended = True
        self._room.set()

    def close(self) -> None:
        """Let `run` return when everything added so far is committed."""
        self.closing = True
        self._work.set()
