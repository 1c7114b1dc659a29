"""The places of a set as its leader keeps them: which names may attach, and which copies are put on the roster. Owns no link.

DESIGN.md section 5, rule 10. A copy that is new, or wiped, is a learner: it is registered in ZooKeeper when it holds what the
leader held when it came, and counts only after that. When an operator gives a name's place to another one, the leader stops
counting the name's copy first; until the change is made, or given up, that name is neither attached nor registered.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping

import trio

from pybroker.cluster.frames import Refusal
from pybroker.cluster.tracking import Copy, Tracking
from pybroker.config import ReplicaSetConfig
from pybroker.errors import BrokerError

log = logging.getLogger("pybroker.cluster")


class Places:
    """One leader's places.

    own       the leader's name, which stays on the roster as long as it leads
    roster    name to incarnation, as the election left it
    register  puts a copy on the roster in ZooKeeper; True only when it certainly is there
    cut       ends the link of a name, if there is one
    counting  is called when another copy counts now
    """

    def __init__(
        self,
        config: ReplicaSetConfig,
        own: str,
        roster: Mapping[str, str],
        tracking: Tracking,
        *,
        register: Callable[[str, str], Awaitable[bool]],
        cut: Callable[[str, str], None],
        counting: Callable[[], None],
    ) -> None:
        self._config = config
        self._own = own
        self._tracking = tracking
        self._register = register
        self._cut = cut
        self._counting = counting
        self._roster = dict(roster)
        self._barred: set[str] = set()  # names that an operator takes off the roster
        self._learners = trio.Event()

    def incarnation(self, name: str) -> str:
        return self._roster.get(name, "")

    def fault(self, name: str, attached: Collection[str]) -> Refusal | None:
        """Why that name may not attach beside those that are attached."""
        if name in self._barred:
            return Refusal("no-place", f"{name} is being taken off the roster")
        if name in self._roster:
            return None
        newcomers = [other for other in attached if other not in self._roster and other != name]
        if len(self._roster) + len(newcomers) < self._config.replicas:
            return None
        names = ", ".join(sorted(self._roster))
        return Refusal("no-place", f"{name} is not one of the set's {self._config.replicas} replicas: {names}")

    # ---- an operator's changes

    def bar(self, name: str) -> None:
        """Before a name is taken off the roster in ZooKeeper: its answers count no more, until `set_roster` or `allow`."""
        self._tracking.stop_counting(name)
        self._barred.add(name)
        self._cut(name, "its name is being taken off the roster")

    def allow(self, name: str) -> None:
        """The roster still has that name: its copy may attach, and counts when it is found on the roster again."""
        self._barred.discard(name)

    def is_barred(self, name: str) -> bool:
        return name in self._barred

    def set(self, roster: Mapping[str, str]) -> None:
        """The roster in ZooKeeper is another one: names that are on it may attach. Counts nobody that did not count."""
        for copy in self._tracking.counted():
            if roster.get(copy.name) != copy.incarnation:
                self._tracking.stop_counting(copy.name)
        for name in self._roster.keys() - roster.keys():
            self._cut(name, "its name was taken off the roster")
        self._roster = dict(roster)
        self._barred &= set(roster)

    # ---- learners

    def look(self) -> None:
        """Some follower said something: perhaps a learner can be registered."""
        if not self._learners.is_set() and self._tracking.ready_learners():
            self._learners.set()

    async def run(self) -> None:
        """Put learners on the roster, until cancelled."""
        while True:
            await self._learners.wait()
            self._learners = trio.Event()
            retry = False
            for copy in self._tracking.ready_learners():
                if copy.name in self._barred:
                    continue
                done = await self._try_to_register(copy)
                if done and copy.name not in self._barred:
                    self._roster[copy.name] = copy.incarnation
                    counted = self._tracking.registered(copy)
                    log.info(
                        "replica %s (copy %s) is on the roster%s", *copy, "" if counted else ", and replaced already"
                    )
                    self._counting()
                retry = retry or not done
            if retry:
                await trio.sleep(self._config.retry_interval)
                self._learners.set()

    async def _try_to_register(self, copy: Copy) -> bool:
        try:
            return await self._register(copy.name, copy.incarnation)
        except BrokerError as error:
            log.info("replica %s can't be put on the roster yet: %s", copy.name, error)
            return False
