"""The demonstration with three replicas: under load the leader is killed, later the next one is asked to stop.

Each time another replica goes on, and the one that was away comes back and catches up. Owns the order of these events, and
what is measured of each; the tables of it are in `demo_tables`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from demo_programs import DemoFailed
from demo_replicas import Position, Replica, ReplicaSet
from demo_stage import Gap, Stage

RATE = 300.0  # messages per second: enough time for all events
START_SECONDS_MAX = 20.0
CHANGE_SECONDS_MAX = 15.0  # for another one to lead, or one to catch up
STOP_SECONDS_MAX = 15.0
SETTLE_SECONDS_MAX = 5.0  # for the copies to be equal after the last message


@dataclass(frozen=True)
class Failover:
    """One change of leader. `gap` is None when the producer was not interrupted."""

    event: str
    before: str
    after: str
    epoch_before: int
    epoch_after: int
    gap: Gap | None


class SetRun:
    """One run over a set. After `run`, `failovers`, `copies` and `status` say what happened, `faults` what should not have."""

    def __init__(self, stage: Stage, replicas: ReplicaSet) -> None:
        self.stage = stage
        self.replicas = replicas
        self.failovers: list[Failover] = []
        self.copies: list[tuple[Replica, Position]] = []  # at the end
        self.status = ""  # what ``pybroker replica status`` prints at the end

    def run(self) -> None:
        """Raises DemoFailed when the run can't go on."""
        stage, replicas = self.stage, self.replicas
        with ExitStack() as stack:
            stack.callback(replicas.close)
            stage.watchers.append(replicas.take_lines)
            for replica in replicas.members:
                replicas.start(replica)
            ports = [replica.port for replica in replicas.members]
            stage.start_clients(stack, ports, RATE)
            self._wait("one of three leads and the others follow", replicas.is_whole, START_SECONDS_MAX)
            leader = self._leader()
            others = " and ".join(replica.name for replica in replicas.members if replica is not leader)
            where = ", ".join(f"{replica.name} on port {replica.port}" for replica in replicas.members)
            stage.say(f"{leader.name} leads in epoch {leader.epoch}, {others} follow ({where})")
            stage.follow(until=lambda: self._confirmed(0.25))
            self._kill_leader()
            stage.follow(until=lambda: self._confirmed(0.60))
            self._stop_leader()
            stage.receive_rest(stack)
            self._compare_copies()
            stage.say(
                f"the three copies are {'at the same position' if self.are_equal() else 'NOT at the same position'}"
            )
            self.status = self._leader().status()
            self._stop_all()

    def faults(self) -> list[str]:
        """One line for each promise that did not hold, beside those of the account."""
        faults = []
        for failover in self.failovers:
            if failover.after == failover.before:
                faults.append(f"{failover.before} was {failover.event}, and leads in epoch {failover.epoch_after}")
        if not self.are_equal():
            told = ", ".join(f"{replica.name} at {position}" for replica, position in self.copies)
            faults.append(f"the copies are not equal at the end: {told}")
        return faults

    def are_equal(self) -> bool:
        """Whether all copies that were looked at are at the same position."""
        return len({position for _, position in self.copies}) <= 1

    def _kill_leader(self) -> None:
        def kill(leader: Replica) -> None:
            self.replicas.kill(leader)
            self.stage.say(
                f"leader {leader.name} killed (kill -9) after {self.stage.account.confirmed_now} confirmations"
            )

        killed = self._change_leader("killed (kill -9)", kill)
        self.stage.follow(until=lambda: self._confirmed(0.35))
        self._start_again(killed)

    def _stop_leader(self) -> None:
        def stop(leader: Replica) -> None:
            self.replicas.terminate(leader)
            self.stage.say(
                f"leader {leader.name} asked to stop (SIGTERM) after {self.stage.account.confirmed_now} confirmations"
            )

        stopped = self._change_leader("asked to stop (SIGTERM)", stop)
        assert stopped.program is not None
        stopped.program.wait(STOP_SECONDS_MAX)
        self._start_again(stopped)

    def _change_leader(self, event: str, act: Callable[[Replica], None]) -> Replica:
        """Let the leader end, and wait for the next one. Returns the one that ended."""
        stage = self.stage
        before = self._leader()
        epoch, gaps = before.epoch, len(stage.gaps)
        act(before)
        self._wait("another replica leads", lambda: self.replicas.leader(epoch), CHANGE_SECONDS_MAX)
        self._wait(
            "sends are confirmed again",
            lambda: len(stage.gaps) > gaps or stage.account.producer_done,
            CHANGE_SECONDS_MAX,
        )
        after = self._leader()
        gap = stage.gaps[gaps] if len(stage.gaps) > gaps else None
        self.failovers.append(Failover(event, before.name, after.name, epoch, after.epoch, gap))
        seen = f"for {gap.milliseconds:.0f} ms no send was confirmed" if gap else "no send was waiting"
        stage.say(f"{after.name} leads in epoch {after.epoch}: {seen}")
        return before

    def _start_again(self, replica: Replica) -> None:
        self.replicas.start(replica)
        self.stage.say(f"{replica.name} started again on the same store")
        leader = self._leader()
        goal = leader.position()
        self._wait(f"{replica.name} follows again", lambda: self.replicas.follows(replica), CHANGE_SECONDS_MAX)
        self._wait(f"{replica.name} has caught up", lambda: replica.position() >= goal, CHANGE_SECONDS_MAX)
        self.stage.say(
            f"{replica.name} follows {leader.name}, {self.replicas.seconds_to_role(replica):.2f} s after its start, "
            f"and has all that {leader.name} had when it came back (epoch {goal[0]}, batch {goal[1]})"
        )

    def _compare_copies(self) -> None:
        until = time.monotonic() + SETTLE_SECONDS_MAX
        while True:
            self.copies = [(replica, replica.position()) for replica in self.replicas.members]
            self.replicas.take_lines()
            if self.are_equal() or time.monotonic() > until:
                return

    def _stop_all(self) -> None:
        """The followers first, so that nobody takes over; a leader alone has nobody to hand over to."""
        members = sorted(self.replicas.members, key=lambda replica: replica.is_leading)
        for replica in members:
            self.replicas.terminate(replica)
        for replica in members:
            assert replica.program is not None
            replica.program.wait(STOP_SECONDS_MAX)

    def _confirmed(self, part: float) -> bool:
        return self.stage.account.confirmed_now >= part * self.stage.count

    def _leader(self) -> Replica:
        leader = self.replicas.leader()
        if leader is None:
            raise DemoFailed("no replica leads")
        return leader

    def _wait(self, what: str, found: Callable[[], object], seconds: float) -> None:
        until = time.monotonic() + seconds
        self.stage.follow(until=lambda: found() or time.monotonic() > until)
        if not found():
            logs = "".join(f"\n  {one.name}:{one.program.told()}" for one in self.replicas.members if one.program)
            raise DemoFailed(f"not within {seconds:.0f} s: {what}{logs}")


def run_set(stage: Stage, directory: Path, zookeeper: str, ports: list[int]) -> SetRun:
    """Prepare a run over a set on these client ports."""
    return SetRun(stage, ReplicaSet(directory, zookeeper, ports))
