"""Catching up, for case `replication`: a replica that missed a million messages, and one whose copy differs in a thousand.

How long it takes is seen from outside: from the leader's log line for the new link to the moment at which the leader knows that
the follower's own store holds everything that had been sent before. What went over the link is counted by the kernel, both ways.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from benchmarks.failover import longest_gap, producing
from benchmarks.processes import ServerFailed, run_child
from benchmarks.replicas import Member, Members, number_of, replica_set
from benchmarks.report import Row
from benchmarks.settings import NotMeasurable, Settings
from pybroker.errors import BrokerError

BEHIND_MESSAGES = 1_000_000
BEHIND_RATE = 50_000  # messages per second
QUEUES = 1_000  # of the store that is compared: one message in each will differ
DIFFERENCE_MESSAGES = 1_000_000
MOVED_SHARE = 0.05  # of the messages' bodies
DISK_SHARE = 0.25  # of what the directories took when the queue was full
BODY_BYTES = 256
QUICK_DIVISOR = 20
SERVE_INTERVAL = 0.002  # seconds between two sends to the leader while a follower catches up
CATCH_UP_DEADLINE = 300.0
DISK_DEADLINE = 30.0  # seconds for LevelDB to give back what nobody needs any more
MEGABYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """How one follower caught up.

    attached, done  when it was taken on, and when its store was seen to hold all
    started         when its process was started
    links           how often it was taken on; more than once when a link broke on the way
    ways            ``batches`` or ``difference``, for each of them
    wire_bytes      over its link, both ways, until then; -1 where that can't be known
    """

    started: float
    attached: float
    done: float
    links: int
    ways: tuple[str, ...]
    wire_bytes: int

    @property
    def seconds(self) -> float:
        return self.done - self.attached


def attachments(log: Sequence[tuple[float, str]], name: str) -> list[tuple[float, str]]:
    """When a leader took the replica of that name on, and by which way, by the leader's log."""
    pattern = re.compile(rf"replica {re.escape(name)} \(copy .*\) attached at .*, (\w+)$")
    return [(at, found[1]) for at, text in log if (found := pattern.search(text))]


def socket_bytes(listing: str, pid: int) -> int:
    """Bytes sent and received over the sockets of a process, from what ``ss --tcp --info --processes`` says."""
    total = 0
    for block in re.split(r"\n(?=\S)", listing):
        if re.search(rf"\bpid={pid}\b", block):
            total += sum(map(int, re.findall(r"\bbytes_(?:sent|received):(\d+)", block)))
    return total


def wire_bytes(member: Member, leader: Member) -> int:
    """Bytes on the connections that a member has to the leader's replication port, both ways."""
    command = ["ss", "--tcp", "--info", "--processes", "--no-header", "--numeric"]
    try:
        done = subprocess.run(
            [*command, "dport", "=", f":{leader.replication_port}"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotMeasurable(f"bytes of a connection can't be read by `ss` (Debian package iproute2): {error}") from None
    return socket_bytes(done.stdout, member.pid)


def catch_up(members: Members, leader: Member, member: Member) -> CaughtUp:
    """Start a member, and wait until its store holds what the leader's holds now. Raises ServerFailed if it never does."""
    wanted = number_of(leader.status())
    mark = leader.log_size()
    started = time.monotonic()
    member.start()

    def found() -> float:
        with suppress(BrokerError):
            rows = [row for row in leader.status()["members"] if row["name"] == member.name]
            if rows and rows[0]["state"] == "following" and number_of(rows[0]) >= wanted:
                return time.monotonic()
        return 0.0

    done: float = members.wait(f"{member.name} holds batch {wanted}", found, CATCH_UP_DEADLINE)
    moved = wire_bytes(member, leader)
    links = attachments(leader.log_lines(mark), member.name)
    if not links:
        raise ServerFailed(f"{leader.name} logged no link of {member.name}\n{leader.last_words()}")
    return CaughtUp(started, links[0][0], done, len(links), tuple(way for _, way in links), moved)


def run_behind(settings: Settings, hosts: str) -> Iterator[Row]:
    """A follower that was away while a queue was filled; then the disks, while the queue is full and when it is empty."""
    messages = BEHIND_MESSAGES // QUICK_DIVISOR if settings.quick else BEHIND_MESSAGES
    with replica_set(settings, hosts) as members:
        leader = members.wait_whole()
        away = members.followers()[0]
        away.stop()
        settings.say(f"{leader.name} leads; filling a queue with {messages:,} while {away.name} is away")
        filled = fill(leader, messages)
        with producing([leader.url], members.directory / "times", interval=SERVE_INTERVAL) as load:
            load.wait_steady()
            result = catch_up(members, leader, away)
            receipts = [at for at in load.receipts(result.attached) if at <= result.done]
        settings.say(
            f"{away.name} caught up in {result.seconds:.1f} s by {', '.join(result.ways)}; meanwhile "
            f"{len(receipts):,} sends were confirmed, the longest gap {longest_gap(receipts) * 1000:.0f} ms"
        )
        yield from behind_rows(messages, filled["rate"], result, receipts)
        members.wait_level()
        full = {member.name: member.disk_bytes() for member in members}
        run_child("benchmarks.load", ["drain", "--url", leader.url, "--pid", leader.pid, "--messages", messages])
        members.wait_level()
        yield disk_row(messages, full, settle_disks(members, full))


def fill(leader: Member, messages: int) -> dict[str, Any]:
    """Durable messages into one queue, each confirmed."""
    return run_child("benchmarks.load", ["fill", "--url", leader.url, "--persistent", "--messages", messages])


def behind_rows(messages: int, fill_rate: float, result: CaughtUp, receipts: Sequence[float]) -> Iterator[Row]:
    """The rate of catching up, and what the producer noticed of it."""
    rate = messages / result.seconds
    yield Row(
        case="replication",
        name=f"a follower {messages:,} messages behind catches up",
        figure=rate,
        unit="msg/s",
        beside="the filling of them",
        beside_figure=fill_rate,
        target=f">= {BEHIND_RATE:,}, while the leader serves",
        met=rate >= BEHIND_RATE and bool(receipts),
        details={"caught_up": result, "seconds": result.seconds},
    )
    yield Row(
        case="replication",
        name="    sends confirmed meanwhile",
        figure=len(receipts) / result.seconds,
        unit="msg/s",
        beside="offered",
        beside_figure=1 / SERVE_INTERVAL,
    )
    yield Row(
        case="replication",
        name="    longest gap between two of them",
        figure=longest_gap([result.attached, *receipts, result.done]) * 1000,
        unit="ms",
    )


def settle_disks(members: Members, full: dict[str, int]) -> dict[str, int]:
    """What the directories take once they are small enough, or after a while."""
    ends = time.monotonic() + DISK_DEADLINE
    while True:
        now = {member.name: member.disk_bytes() for member in members}
        if all(now[name] < DISK_SHARE * full[name] for name in full) or time.monotonic() > ends:
            return now
        time.sleep(0.5)


def disk_row(messages: int, full: dict[str, int], drained: dict[str, int]) -> Row:
    """The worst of the directories."""
    shares = {name: drained[name] / full[name] * 100 for name in full}
    return Row(
        case="replication",
        name=f"disk after {messages:,} were consumed, worst of {len(full)}",
        figure=max(shares.values()),
        unit="% of before",
        low=min(shares.values()),
        high=max(shares.values()),
        target=f"< {DISK_SHARE:.0%}",
        met=max(shares.values()) < DISK_SHARE * 100,
        details={"full_bytes": full, "drained_bytes": drained},
    )


def run_difference(settings: Settings, hosts: str) -> Iterator[Row]:
    """A follower that lacks one message in each of many queues; nobody's ring has them, so stores are compared."""
    queues = QUEUES // QUICK_DIVISOR if settings.quick else QUEUES
    each = DIFFERENCE_MESSAGES // QUEUES
    with replica_set(settings, hosts) as members:
        leader = members.wait_whole()
        settings.say(f"filling {queues:,} queues with {each:,} messages each")
        spread(leader, queues, each)
        members.wait_level()
        away = members.followers()[0]
        away.stop()
        spread(leader, queues, 1)
        others = [member for member in members if member is not away]
        members.wait_level(others)
        for member in others:
            member.stop()  # with both, the recent batches that they have in memory are gone
        for member in others:
            member.start()
        leader = members.wait_whole()
        result = catch_up(members, leader, away)
        if set(result.ways) != {"difference"}:
            raise ServerFailed(f"{away.name} was brought up by {', '.join(result.ways)}: nothing was compared")
        yield difference_row(queues, queues * each, result)


def spread(leader: Member, queues: int, each: int) -> None:
    """Durable messages into many queues, each confirmed."""
    run_child("benchmarks.load_spread", ["--url", leader.url, "--queues", queues, "--each", each])


def difference_row(different: int, messages: int, result: CaughtUp) -> Row:
    """What went over the link: digests, ranges that were wanted, chunks, heartbeats, all of it, as a share of the bodies alone."""
    share = result.wire_bytes / (messages * BODY_BYTES) * 100
    return Row(
        case="replication",
        name=f"moved for {different:,} of {messages:,} messages that differ",
        figure=share,
        unit="% of the bodies",
        target=f"< {MOVED_SHARE:.0%}",
        met=result.wire_bytes > 0 and share < MOVED_SHARE * 100,
        details={"caught_up": result, "seconds": result.seconds},
    )
