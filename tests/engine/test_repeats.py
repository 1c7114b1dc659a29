"""What producers repeat after a crash at every batch boundary is stored exactly once (DESIGN.md section 7, P7).

One run of a scenario keeps, before and after each batch, what a crash at that moment would leave on the disk and what had been
confirmed by then. In each of these states the producer repeats all that it had sent by then, over STOMP.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field

import trio

from pybroker.broker import Broker
from tests.engine.support import Disk, broker_on, check, drain, stomp_peer
from tests.support.wire import Peer, frame

Q, R = "/queue/q", "/queue/r"
REPEAT = "producer-repeat:true"
SENDS = 24
TRANSACTIONS = ((100, (101, 102)), (103, (104,)), (105, (106, 107)))  # a commit's number, and those of its sends


def numbered(sequence: int) -> tuple[str, str]:
    return "producer-id:ward-3-1b9f", f"producer-sequence:{sequence}"


def send(sequence: int, *headers: str, to: str = Q) -> bytes:
    return frame("SEND", f"destination:{to}", *numbered(sequence), *headers, f"id:{sequence}", body=b"%d" % sequence)


def without_number(id: int) -> bytes:
    """A send that only the number of its transaction's commit saves from being stored twice."""
    return frame("SEND", f"destination:{R}", "transaction:t", f"id:{id}")


@dataclass
class Told:
    tried: list[int] = field(default_factory=list)
    confirmed: set[int] = field(default_factory=set)
    committing: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    committed: set[int] = field(default_factory=set)


async def scenario(broker: Broker, told: Told) -> None:
    async with stomp_peer(broker) as peer:
        for first in range(0, SENDS, 6):  # several in one read, and batches that overlap reads
            numbers = [number for number in range(first, first + 6) if number % 7 != 3]  # some that are never used
            told.tried += numbers
            await peer.send(b"".join(send(number, f"receipt:{number}") for number in numbers[:3]))
            await trio.lowlevel.checkpoint()
            await peer.send(b"".join(send(number, f"receipt:{number}") for number in numbers[3:]))
            for number in numbers:
                await peer.receipt(str(number))
                told.confirmed.add(number)
        for commit, numbers in TRANSACTIONS:
            await peer.send(frame("BEGIN", "transaction:t"))
            for number in numbers:
                await peer.send(send(number, "transaction:t", to=R))
            await peer.send(without_number(commit))
            told.committing.append((commit, numbers))
            await peer.do("COMMIT", "transaction:t", *numbered(commit))
            told.committed.add(commit)


async def repeat(peer: Peer, told: Told) -> None:
    """As a client does on its next connection. What it is told stands for what is stored: nothing here is in doubt."""
    for number in told.tried:
        await peer.send(send(number, REPEAT, f"receipt:{number}"))
        await peer.receipt(str(number))
    for commit, numbers in told.committing:
        await peer.send(frame("BEGIN", "transaction:t"))
        for number in numbers:
            await peer.send(send(number, REPEAT, "transaction:t", to=R))
        await peer.send(without_number(commit))
        await peer.do("COMMIT", "transaction:t", *numbered(commit), REPEAT)


async def test_a_repeat_after_a_crash_at_every_batch_boundary(autojump_clock: trio.testing.MockClock) -> None:
    told = Told()
    disk = Disk()
    moments: list[tuple[str, dict[bytes, bytes], Told]] = []

    def keep(when: str, number: int) -> None:
        moments.append((f"{when} batch {number}", dict(disk.backend.synced), copy.deepcopy(told)))

    disk.before = lambda number: keep("before", number)
    disk.after = lambda number: keep("after", number)
    async with broker_on(disk) as broker:
        await scenario(broker, told)
    assert len(moments) > 20
    forgotten = partly = 0
    for moment, state, then in moments:
        try:
            async with broker_on(Disk(state)) as broker:
                known = any(record.ranges for record in broker._engine.store.producers)  # type: ignore[union-attr]
                if not known:
                    # the answer would be "in doubt", once and for all: and indeed nothing is confirmed
                    assert not then.confirmed
                    assert not broker.statistics().destinations
                    async with stomp_peer(broker) as peer:
                        await peer.send(send(0, REPEAT))
                        assert (await peer.error())["code"] == "in-doubt"
                    forgotten += 1
                    continue
                for repeats in range(2):
                    async with stomp_peer(broker) as peer:
                        await repeat(peer, then)
                    partly += not repeats and 0 < broker.statistics().duplicates < len(then.tried) + len(
                        then.committing
                    )
                check(broker)
                found = await drain(broker, Q, R)
            there = Counter(int(message.id) for messages in found.values() for message in messages)
            wanted = Counter(
                [*then.tried, *(number for commit, numbers in then.committing for number in (*numbers, commit))]
            )
            assert there == wanted
            assert [int(message.id) for message in found[Q]] == then.tried, "in order"
        except AssertionError as error:
            raise AssertionError(f"{moment}: {error}") from error
    assert forgotten >= 1
    assert partly >= 1, "no crash came between what was stored and what was not"


async def test_a_repeat_while_the_first_is_being_written_waits_for_it(autojump_clock: trio.testing.MockClock) -> None:
    """The confirmation of a repeat must not come before the batch that stores the first one."""
    disk = Disk()
    async with broker_on(disk) as broker, stomp_peer(broker) as one, stomp_peer(broker) as two:
        await one.do("SEND", f"destination:{Q}", *numbered(0))
        disk.shut()
        await one.send(send(1, "receipt:1"))
        await trio.testing.wait_all_tasks_blocked()
        await two.send(send(1, REPEAT, "receipt:1"))
        with trio.move_on_after(5) as waiting:
            await two.frame()
        assert waiting.cancelled_caught, "confirmed, and not on the disk"
        disk.gate.set()
        await one.receipt("1")
        await two.receipt("1")
        assert broker.statistics().duplicates == 1
