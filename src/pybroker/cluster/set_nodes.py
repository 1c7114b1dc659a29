"""The set's nodes in ZooKeeper, as one replica reads and writes them. Owns what was read last, and how what is unknown is settled.

DESIGN.md section 5, the table of nodes, and rule 2: every write names versions, and none is repeated blindly. What is written is
decided by the rules in `election`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from pybroker.cluster import election
from pybroker.cluster.coordinator import Coordinator, CoordinatorLost, CreateNode, Outcome, Write
from pybroker.cluster.election import Me
from pybroker.cluster.registry import View, encode, parse_view


class SetNodes:
    """`view` is what was read last, `seen` the count of changes before that: for status, and for what can't wait. It may be old."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.view = View()
        self.seen = -1

    @property
    def connected(self) -> bool:
        return self.coordinator.connected

    async def look(self) -> tuple[View, int]:
        """What ZooKeeper says, and the count of changes to wait for something newer with. Raises CoordinatorLost."""
        seen = self.coordinator.changes
        view = parse_view(await self.coordinator.read())
        self.view, self.seen = view, seen
        return view, seen

    async def look_when_connected(self) -> View:
        while True:
            try:
                return (await self.look())[0]
            except CoordinatorLost:
                await self.wait_connected()

    async def wait_connected(self) -> None:
        while not self.coordinator.connected:
            await self.coordinator.wait_change(self.coordinator.changes)

    async def wait_change_or(self, event: trio.Event, seen: int) -> None:
        """Wait for something new in ZooKeeper, or for an event."""
        async with trio.open_nursery() as nursery:

            async def wait_event() -> None:
                await event.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait_event)
            await self.coordinator.wait_change(seen)
            nursery.cancel_scope.cancel()

    async def settle(
        self,
        writes: Sequence[Write],
        me: Callable[[], Me],
        happened: Callable[[View], bool],
        written: Callable[[], None],
    ) -> Outcome:
        """Do a transaction that names my slot's version; an unknown outcome is settled by reading back.

        DONE: it was answered so. UNKNOWN: it was not answered, and reading shows that it has happened. REFUSED: it has
        not, and can't any more: my slot was written once more, so that it is void if it arrives later. `written` is called
        when reading back shows that this life has written its slot, also when an election has emptied it since.
        """
        outcome = await self.coordinator.transact(writes)
        if outcome is not Outcome.UNKNOWN:
            return outcome
        while True:
            view = await self.look_when_connected()
            if election.has_written(view, me()):
                written()
            if happened(view):
                return Outcome.UNKNOWN
            if me().name not in view.slots:
                return Outcome.REFUSED
            try:
                if await self.coordinator.transact(election.touch(view, me())) is Outcome.DONE:
                    return Outcome.REFUSED
            except CoordinatorLost:
                pass

    async def replace(self, replicas: int, old: str, new: str, before: Callable[[View], None]) -> View:
        """Give the place of `old` to `new`; the view that it was made on, or in which it is seen.

        `before` is called with each view before anything is written. Raises what it raises, ConfigurationError, and
        CoordinatorLost, when nothing was asked for. What was asked for and not answered is settled: it waits for ZooKeeper.
        """
        view, _ = await self.look()
        in_doubt = False
        while True:
            before(view)
            outcome = await self.coordinator.transact(election.replace(view, replicas, old, new))
            if outcome is Outcome.DONE:
                return view
            in_doubt = in_doubt or outcome is Outcome.UNKNOWN
            view = await self.look_when_connected()
            if in_doubt and old not in view.roster and new in view.roster:
                return view

    async def run_alive(self, name: str, address: str, pause: float) -> None:
        """Keep ``alive/NAME``: for status only, no rule depends on it. `pause` seconds between two tries."""
        coordinator = self.coordinator
        path = f"alive/{name}"
        seen = -1
        session = 0
        while True:
            if coordinator.connected and coordinator.session != session:
                try:
                    write = CreateNode(path, encode({"address": address}), ephemeral=True)
                    if await coordinator.transact([write]) is not Outcome.DONE:
                        # It may have been written; or that of my last session is still there.
                        nodes = await coordinator.read()
                        if path not in nodes or nodes[path].owner != coordinator.session:
                            await trio.sleep(pause)
                            continue
                    session = coordinator.session
                except CoordinatorLost:
                    pass
            seen = await coordinator.wait_change(seen)
