"""The rules of the election, all together on random walks: whole, and with one of them broken (DESIGN.md, section 5).

Stale views, views that are not of one moment, late writes, late answers, crashes, wiped disks, deposed leaders that do not know it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from pybroker.cluster import election
from pybroker.cluster.coordinator import CheckNode, Node, SetNode, Write
from pybroker.cluster.election import Me, Proposal
from pybroker.cluster.registry import (
    LeaderRecord,
    Position,
    View,
    encode_roster,
    parse_view,
)
from tests.cluster.test_election import Nodes

NAMES = "abc"
QUORUM = 2  # the walks' own: a plant may break the election's


class Violation(Exception):
    pass


class Copy:
    """A replica. Roles: N none, C candidate, J joining, A attached, L leader, D down. The log holds its entries' epochs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.role = "N"
        self.epoch = self.durable = self.life = 0
        self.starts = 1
        self.boss = ""
        self.log: tuple[int, ...] = ()
        self.seen: dict[str, Node] = {}
        self.view: View | None = None
        self.counted: set[tuple[str, str]] = set()
        self.match: dict[tuple[str, str], int] = {}

    @property
    def incarnation(self) -> str:
        return f"{self.name}{self.life}"

    @property
    def me(self) -> Me:
        log = self.log[: self.durable]
        return Me(self.name, self.incarnation, self.starts, 0, Position(log[-1] if log else 0, len(log)))

    def leave(self, role: str) -> None:
        self.role, self.epoch, self.boss, self.log = role, 0, "", self.log[: self.durable]
        self.counted, self.match = set(), {}


class Walk:
    """One history of a set, a random step after the other; the rules are the real ones, `plant` breaks one."""

    def __init__(self, rng: random.Random, plant: str) -> None:
        self.rng = rng
        self.plant = plant
        self.zk = Nodes(aba=plant == "aba")
        self.copies = {name: Copy(name) for name in NAMES}
        self.late: list[list[Write]] = []
        self.acks: set[tuple[str, str, int, int]] = set()
        self.done: tuple[int, ...] = ()
        self.elections = self.confirmations = 0
        for one in self.copies.values():
            assert self.zk.transact(election.missing_nodes(self.zk.view, one.me, 3))
        if rng.random() < 0.7:
            roster = {one.name: one.incarnation for one in self.copies.values()}
            assert self.zk.transact([SetNode("roster", encode_roster(roster), 0)])

    def run(self, steps: int) -> None:
        follow_up = {self.publish: self.arrive, self.join: self.attach, self.attach: self.take, self.take: self.answer}
        follow_up |= {self.answer: self.hear_all, self.hear: self.keep, self.keep: self.confirm}
        rare = self.rng.choice((0.05, 0.15, 0.5))
        actions: list[Callable[[Copy], None]] = [
            self.read,
            self.publish,
            self.join,
            self.attach,
            self.elect,
            self.write,
        ]
        actions += [self.take, self.answer, self.hear, self.keep, self.confirm, self.arrive, self.register, self.show]
        failures: list[Callable[[Copy], None]] = [self.fail, self.back, self.let_go, self.expire, self.notice]
        weights = [self.rng.choice((0.4, 1, 1, 2.5)) for _ in actions] + [rare, 1, rare, rare, 1]
        everything = actions + failures
        roles = {
            self.publish: "NC",
            self.join: "NC",
            self.attach: "J",
            self.elect: "C",
            self.write: "L",
            self.take: "A",
        }
        roles |= {self.answer: "A", self.hear: "L", self.keep: "L", self.confirm: "L", self.register: "L"}
        roles |= {self.show: "L", self.back: "D", self.notice: "JAL", self.let_go: "JAL"}
        fresh, quick = self.rng.choice((0.3, 0.6, 0.9)), self.rng.choice((0.05, 0.5, 0.9))
        for action in self.rng.choices(everything, weights, k=steps):
            fitting = [one for one in self.copies.values() if one.role in roles.get(action, "NCJALD")]
            if not fitting:
                continue
            one = self.rng.choice(fitting)
            if action in (self.publish, self.join, self.elect) and self.rng.random() < fresh:
                self.read(one)
            action(one)
            if action in follow_up and self.rng.random() < quick:
                follow_up[action](one)

    # -- failures

    def fail(self, one: Copy) -> None:
        if one.role != "D":
            one.leave("D")

    def back(self, one: Copy) -> None:
        if one.role != "D":
            return
        one.role, one.view, one.seen = "N", None, {}
        one.starts += 1
        roster = self.zk.view.roster
        others = [other for other in self.copies.values() if roster.get(other.name) == other.incarnation]
        if len({other.name for other in others} - {one.name}) == QUORUM and self.rng.random() < 0.2:
            one.log, one.durable, one.life = (), 0, one.life + 1

    def let_go(self, one: Copy) -> None:
        if one.role in "JAL":
            one.leave("N")

    def notice(self, one: Copy) -> None:
        """A link to one that leads no more breaks; a deposed leader may go on for a while."""
        boss = self.copies.get(one.boss)
        if one.role in "JA" and boss is not None and (boss.role, boss.epoch) != ("L", one.epoch):
            one.leave("N")
        if one.role == "L" and self.rng.random() < 0.2 and self.zk.view.epoch > one.epoch:
            one.leave("N")

    def expire(self, one: Copy) -> None:
        self.zk.nodes = {path: node for path, node in self.zk.nodes.items() if path != "leader"}

    # -- ZooKeeper

    def read(self, one: Copy) -> None:
        """All nodes, or only some: those of one view need not be of one moment."""
        part = self.rng.random() if one.view is not None else 1.0
        if part < 0.2:
            slots = {path: node for path, node in self.zk.nodes.items() if path.startswith("slots/")}
            one.seen = one.seen | slots
        elif part < 0.4:
            others = {path: node for path, node in self.zk.nodes.items() if not path.startswith("slots/")}
            one.seen = {path: node for path, node in one.seen.items() if path.startswith("slots/")} | others
        else:
            one.seen, one.view = self.zk.nodes, self.zk.view
            return
        one.view = parse_view(one.seen)

    def arrive(self, one: Copy) -> None:
        if self.late:
            self.zk.transact(self.late.pop(self.rng.randrange(len(self.late))))

    def publish(self, one: Copy) -> None:
        again = one.role == "C" and one.view is not None and not election.stands(one.view, one.me)
        if (one.role == "N" or again) and one.view is not None and election.may_stand(one.view, one.me, 3):
            one.role = "C"
            self.late.append(election.publish(one.view, one.me))

    def join(self, one: Copy) -> None:
        if one.role not in "NC" or one.view is None:
            return
        leader = election.visible_leader(one.view, one.me)
        if leader is None:
            return
        writes = election.give_up(one.view, one.me)
        if self.plant == "stale":
            writes = [write for write in writes if not isinstance(write, CheckNode)]
        if (self.plant == "moving" and one.role == "C") or self.zk.transact(writes):
            one.role, one.epoch, one.boss = "J", leader.epoch, leader.name

    def elect(self, one: Copy) -> None:
        if one.role != "C" or one.view is None or one.view.epoch >= 6:
            return
        record = LeaderRecord(0, one.name, f"{self.rng.random()}", one.name)
        found = election.propose(one.view, one.me, 3, record)
        if not isinstance(found, Proposal) or not self.zk.transact(found.writes):
            return
        self.elections += 1
        if one.log[: len(self.done)] != self.done:
            raise Violation(f"{one.name} leads with {one.log}, without the confirmed {self.done}")
        one.role, one.epoch, one.boss, one.log = "L", found.epoch, one.name, (*one.log, found.epoch)
        one.counted = {pair for pair in found.roster.items() if pair[0] != one.name}
        one.match = {}

    def register(self, one: Copy) -> None:
        if one.role != "L":
            return
        for other in self.copies.values():
            pair = (other.name, other.incarnation)
            if other.boss != one.name or other.role != "A" or other.epoch != one.epoch or pair in one.counted:
                continue
            writes = election.register(self.zk.view, one.epoch, 3, *pair)
            if one.match.get(pair, -1) >= one.durable and writes is not None and self.zk.transact(writes):
                one.counted.add(pair)

    def show(self, one: Copy) -> None:
        if one.role == "L" and one.view is not None:
            self.zk.transact(election.show_again(one.view, LeaderRecord(one.epoch, one.name, "again", one.name)))

    # -- replication

    def attach(self, one: Copy) -> None:
        if one.role != "J":
            return
        boss = self.copies[one.boss]
        if boss.role != "L" or boss.epoch != one.epoch:
            return
        boss.counted = {pair for pair in boss.counted if pair[0] != one.name or pair[1] == one.incarnation}
        kept = one.log[: one.durable]
        one.log = kept if boss.log[: len(kept)] == kept else boss.log[: boss.durable]
        one.role, one.durable = "A", len(one.log)
        self.acks.add((one.name, one.incarnation, one.epoch, one.durable))

    def write(self, one: Copy) -> None:
        if one.role == "L" and len(one.log) < 8:
            one.log = (*one.log, one.epoch)

    def take(self, one: Copy) -> None:
        boss = self.copies.get(one.boss)
        if one.role != "A" or boss is None or (boss.role, boss.epoch) != ("L", one.epoch):
            return
        if len(one.log) < len(boss.log) and boss.log[: len(one.log)] == one.log:
            one.log = (*one.log, boss.log[len(one.log)])

    def answer(self, one: Copy) -> None:
        if one.role == "A" and one.durable < len(one.log):
            one.durable = len(one.log)
            self.acks.add((one.name, one.incarnation, one.epoch, one.durable))

    def hear(self, one: Copy) -> None:
        if one.role == "L":
            for name, incarnation, epoch, length in sorted(self.acks):
                pair = (name, incarnation)
                if epoch == one.epoch and one.match.get(pair, -1) < length and self.rng.random() < 0.7:
                    one.match[pair] = length

    def hear_all(self, one: Copy) -> None:
        boss = self.copies.get(one.boss)
        if boss is not None:
            self.hear(boss)
            self.keep(boss)
            self.confirm(boss)

    def _reach(self, one: Copy) -> int:
        held = sorted((one.match.get(pair, 0) for pair in one.counted), reverse=True)
        return min(held[QUORUM - 2] if held else 0, len(one.log))

    def keep(self, one: Copy) -> None:
        if one.role == "L":
            one.durable = max(one.durable, self._reach(one))

    def confirm(self, one: Copy) -> None:
        if one.role != "L":
            return
        reach = min(self._reach(one), one.durable)
        if reach <= len(self.done) or one.log[reach - 1] != one.epoch:
            return
        self.confirmations += 1
        confirmed = one.log[:reach]
        if confirmed[: len(self.done)] != self.done:
            raise Violation(f"{one.name} confirms {confirmed} after {self.done}")
        for other in self.copies.values():
            if other.role == "L" and other.epoch > confirmed[-1] and other.log[:reach] != confirmed:
                raise Violation(f"{one.name} confirms {confirmed} while {other.name} leads with {other.log}")
        self.done = confirmed


def explore(plant: str, walks: int, seed: int = 1) -> tuple[int, int, int]:
    """Walks, elections and confirmations; raises Violation."""
    elections = confirmations = 0
    for number in range(walks):
        walk = Walk(random.Random(f"{seed} {number}"), plant)
        walk.run(500)
        elections += walk.elections
        confirmations += walk.confirmations
    return walks, elections, confirmations


def test_what_was_confirmed_stays_and_whoever_is_elected_holds_it() -> None:
    walks, elections, confirmations = explore("", 400)
    assert elections > walks
    assert confirmations > walks / 2


@pytest.mark.parametrize("plant", ["moving", "aba", "minority", "wiped"])
def test_a_broken_rule_is_found(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if plant == "minority":
        monkeypatch.setattr(election, "quorum", lambda replicas: 1)
    elif plant == "wiped":
        monkeypatch.setattr(election, "counts", lambda view, name, incarnation: True)
    with pytest.raises(Violation):
        explore(plant, 5000)


# Too deep for short random walks: the way there, in whole words
FIRST = "a publish|a arrive|b publish|b arrive|a read|a elect"
WAYS = {
    "longest": f"""{FIRST}|c read|c join|c attach|c take|c answer|a hear|a keep|a confirm|a write|a write|a write
c take|c take|c take|c answer|a let_go|c let_go|b read|b publish|b arrive|a read|a publish|a arrive|a read|a elect
b read|b join|b attach|b take|b take|b answer|a hear|a keep|a confirm|a let_go|b let_go
c read|c publish|c arrive|a read|a publish|a arrive|c read|c elect""",
    "stale": f"""{FIRST}|b read|b join|b attach|b take|b answer|a hear|a keep|a confirm|b let_go|b read|b publish|b arrive
c read|c publish|c arrive|c read|b read|b elect|c read_slots|c join|c attach|c take|a write|c take|c answer
a hear|a keep|a confirm""",
}


def go(walk: Walk, way: str) -> None:
    view = walk.zk.view
    walk.zk.transact([SetNode("roster", encode_roster(ROSTER_AT_FIRST), view.roster_version or 0)])
    for one in walk.copies.values():
        one.seen, one.view = walk.zk.nodes, walk.zk.view
    for word in way.replace("\n", "|").split("|"):
        name, action = word.split()
        one = walk.copies[name]
        if action == "read":
            one.seen, one.view = walk.zk.nodes, walk.zk.view
        elif action == "read_slots":  # what is read of the other nodes is older
            one.seen = one.seen | {path: node for path, node in walk.zk.nodes.items() if path.startswith("slots/")}
            one.view = parse_view(one.seen)
        else:
            for _ in range(20 if action == "hear" else 1):  # each hears only some of what was said
                getattr(walk, action)(one)


ROSTER_AT_FIRST = {"a": "a0", "b": "b0", "c": "c0"}


@pytest.mark.parametrize("plant", WAYS)
def test_a_broken_rule_is_found_on_its_way(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = election.candidates
    walk = Walk(random.Random(1), "")
    go(walk, WAYS[plant])
    assert walk.confirmations == {"longest": 2, "stale": 1}[plant]
    if plant == "longest":
        monkeypatch.setattr(
            election,
            "candidates",
            lambda view: sorted(whole(view), key=lambda one: (one[1].candidate or (0, 0))[::-1], reverse=True),
        )
    with pytest.raises(Violation):
        go(Walk(random.Random(1), plant), WAYS[plant])
