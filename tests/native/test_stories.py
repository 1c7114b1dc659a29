"""Random stories over the native protocol: connections that break at any moment, repeats, a broker that is full now and then.

Each sent message is stored once, whatever became of its connections; one whose acknowledgement was confirmed does not come again;
and nothing that was not sent comes.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import trio

from pybroker.broker import Broker
from tests.engine.support import Disk, broker_on, check, check_empty, drain
from tests.native.peer import ACK, BYE, COMMIT, CREDIT, NACK, SEND, UNSUBSCRIBE, Peer, row

QUEUES = ("/queue/a", "/queue/b")
PRODUCERS = 3
SENDS = 40  # SEND and COMMIT frames of each producer


class Story:
    def __init__(self, broker: Broker, seed: int) -> None:
        self.broker = broker
        self.random = random.Random(seed)
        self.sent: set[bytes] = set()
        self.acknowledged: set[bytes] = set()  # and that was confirmed
        self.settling: set[bytes] = set()  # acknowledged, and the answer may have been lost
        self.producing = PRODUCERS

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(PRODUCERS):
                nursery.start_soon(self.produce, number)
            for _ in range(2):
                nursery.start_soon(self.consume)

    # ---- one connection

    async def connection(self, use: Any, **hello: Any) -> bool:
        """Use a connection until `use` is done, or until it is cut; whether it was done."""
        ours, theirs = trio.testing.memory_stream_pair()
        done = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.broker._server.serve_stream, theirs, True)
            peer = Peer(ours)
            with trio.move_on_after(self.random.choice((0.002, 0.01, 0.05, 0.2, 30.0))):
                await peer.hello(**hello)
                await use(peer)
                done = True
            await ours.aclose()
        return done

    # ---- producers

    async def produce(self, number: int) -> None:
        """Send frames under one producer, and repeat what was not confirmed on the next connection, until all is."""
        generator = random.Random(f"{number} {self.random.random()}")
        frames: dict[int, Any] = {}
        sequence = 1
        for _ in range(SENDS):
            count = generator.choice((1, 1, 3, 20))
            bodies = [b"%d-%d-%d" % (number, sequence, at) for at in range(count)]
            messages = [row(body, generator.choice(QUEUES)) for body in bodies]
            self.sent |= set(bodies)
            if generator.random() < 0.3:
                frames[sequence] = [COMMIT, sequence, messages, [], []]
                sequence += 1
            else:
                frames[sequence] = [SEND, sequence, messages]
                sequence += count
        left = dict(frames)
        confirmed: set[int] = set()
        new = True

        def sequences(first: int) -> range:
            frame = frames[first]
            return range(first, first + (1 if frame[0] == COMMIT else len(frame[2])))

        async def use(peer: Peer) -> None:
            nonlocal new
            assert peer.welcome["producer_known"] is not new or new
            new = False
            try:
                for frame in list(left.values()):
                    await peer.send(frame)
                    if generator.random() < 0.2:
                        await peer.confirms(frame[1])
                await peer.confirms(*[each for first in left for each in sequences(first)])
            finally:
                confirmed.update(peer.confirmed)
                assert not peer.refused
                for first in list(left):
                    if confirmed.issuperset(sequences(first)):
                        del left[first]

        identity = f"producer-of-story-{number}"
        while not await self.connection(use, producer=identity, producer_new=new):
            pass
        assert not left
        self.producing -= 1

    # ---- consumers

    async def consume(self) -> None:
        """Take, acknowledge, give back, until nothing has come for a while."""
        quiet = False

        async def use(peer: Peer) -> None:
            nonlocal quiet
            modes = {number: self.random.choice(("individual", "cumulative")) for number in (1, 2)}
            for number, mode in modes.items():
                await peer.subscribe(number, QUEUES[number - 1], mode, prefetch=10)
            while True:
                number = self.random.randrange(1, len(QUEUES) + 1)
                with trio.move_on_after(0.05):
                    first = await peer.delivery(number)
                    got = [first, *peer._waiting[number]]
                    peer._waiting[number] = []
                    if self.random.random() < 0.1:
                        await peer.do(NACK, 7, number, [got[-1].tag, got[-1].tag])
                        got = got[:-1] if modes[number] == "individual" else []
                    if got:
                        await self.acknowledge(peer, number, got)
                    if self.random.random() < 0.1:
                        await peer.send([CREDIT, number, self.random.randrange(1, 30)])
                    continue
                if self.producing == 0:
                    quiet = True
                    await peer.send([BYE])
                    await peer.end()
                    return
                if self.random.random() < 0.1:
                    await peer.do(UNSUBSCRIBE, 7, number)
                    peer._waiting[number] = []
                    await peer.subscribe(number, QUEUES[number - 1], modes[number], prefetch=10)

        while not quiet:
            await self.connection(use)

    async def acknowledge(self, peer: Peer, number: int, got: list[Any]) -> None:
        bodies = {one.body for one in got}
        assert not bodies & self.acknowledged, "it was acknowledged, and comes again"
        self.settling |= bodies
        with trio.CancelScope(shield=True):  # to know what came of it
            ranges = [got[0].tag, got[0].tag]
            for one in got[1:]:
                if one.tag == ranges[-1] + 1:
                    ranges[-1] = one.tag
                else:
                    ranges += [one.tag, one.tag]
            await peer.do(ACK, 7, number, ranges)
        self.acknowledged |= bodies


@pytest.mark.parametrize("seed", range(12))
async def test_everything_is_stored_once_and_consumed_once(autojump_clock: trio.abc.Clock, seed: int) -> None:
    limits = {"queue_messages_max": (0, 15)[seed % 2], "window_messages_max": (2_048, 4)[seed // 2 % 2]}
    disk = Disk()
    chance = random.Random(seed)

    def slow(number: int) -> None:
        if chance.random() < 0.1:
            disk.shut()

    disk.after = slow

    async def open_gates() -> None:
        while True:
            await trio.sleep(0.01)
            disk.gate.set()

    delivery = {"deliveries_max": 1_000}
    async with broker_on(disk, limits={**limits, "full_timeout": 1_000.0}, delivery=delivery) as broker:
        story = Story(broker, seed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(open_gates)
            await story.run()
            check(broker)
            found = await drain(broker, *QUEUES)
            nursery.cancel_scope.cancel()
        left = Counter(message.body for place in QUEUES for message in found[place])
        assert not [body for body, count in left.items() if count > 1], "stored twice"
        assert not left.keys() & story.acknowledged, "acknowledged, and still there"
        assert left.keys() | story.settling == story.sent, "lost, or never sent"
        disk.gate.set()
        check_empty(broker)
