"""Replicas for tests: a network, disks and a role each, on virtual time, all under the test's control. Owns no rule of the set."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import trio

from pybroker.cluster.follower import Follower, FollowingEnded
from pybroker.cluster.frames import encode_changes
from pybroker.cluster.leader import Leader, LeadershipLost
from pybroker.cluster.registry import Position
from pybroker.cluster.ring import Ring, RingBatch
from pybroker.config import ReplicaSetConfig
from pybroker.errors import StoreError
from pybroker.store import format as fmt
from pybroker.store.backend import Change
from pybroker.store.chunks import FIRST, STOP
from pybroker.store.committer import Batch
from pybroker.store.copies import MemoryCopies
from pybroker.store.store import Store
from tests.store.forgetful import ForgetfulBackend

CONFIG = ReplicaSetConfig(name="set", zookeeper="none", secret="between us")


class Crash(Exception):
    """The process ended here."""


class _Way:
    """One direction of a stream: bytes arrive in order, each after a delay. `cut`: they are swallowed."""

    def __init__(self, delay: Callable[[], float], room: int) -> None:
        self.delay = delay
        self.room = room
        self.cut = False
        self.ended = False
        self.broken = False
        self.chunks: deque[tuple[float, bytes]] = deque()
        self.bytes = 0
        self.changed = trio.Event()

    def change(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        while True:
            if self.broken or self.ended:
                raise trio.BrokenResourceError
            if self.cut:
                return
            if self.bytes < self.room:
                break
            await self.changed.wait()
        at = trio.current_time() + self.delay()
        if self.chunks:
            at = max(at, self.chunks[-1][0])
        self.chunks.append((at, data))
        self.bytes += len(data)
        self.change()

    async def receive(self) -> bytes:
        while True:
            if self.broken:
                raise trio.BrokenResourceError
            if self.chunks and not self.cut:
                at, data = self.chunks[0]
                if at <= trio.current_time():
                    self.chunks.popleft()
                    self.bytes -= len(data)
                    self.change()
                    return data
                changed = self.changed
                with trio.move_on_at(at):
                    await changed.wait()
            elif self.ended and not self.cut:
                return b""
            else:
                await self.changed.wait()


class Wire(trio.abc.Stream):
    """One end of a stream of `Network`."""

    def __init__(self, out: _Way, into: _Way) -> None:
        self.out = out
        self.into = into

    async def send_all(self, data: bytes) -> None:
        await self.out.send(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        return await self.into.receive()

    async def aclose(self) -> None:
        self.out.ended = True
        self.out.change()
        self.into.broken = True
        self.into.change()
        await trio.lowlevel.checkpoint()


class Network:
    """Addresses are names. `delay` gives the seconds for each piece of bytes; `room` is what one direction holds."""

    def __init__(self, seed: int = 0, delay: float = 0.002, room: int = 1 << 20) -> None:
        self.rng = random.Random(seed)
        self.delay = delay
        self.room = room
        self.handlers: dict[str, Callable[[trio.abc.Stream], Any]] = {}
        self.wires: list[tuple[Wire, Wire]] = []  # (of the one who dialled, of the one who accepted)
        self.nursery: trio.Nursery | None = None

    async def dial(self, address: str) -> Wire:
        await trio.sleep(self._delay())
        handler = self.handlers.get(address)
        if handler is None or self.nursery is None:
            raise ConnectionRefusedError(address)
        there, back = (_Way(self._delay, self.room) for _ in range(2))
        mine, other = Wire(there, back), Wire(back, there)
        self.wires.append((mine, other))
        self.nursery.start_soon(handler, other)
        return mine

    async def serve(self, address: str, handler: Any, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        self.handlers[address] = handler
        task_status.started(address)
        await trio.sleep_forever()

    def _delay(self) -> float:
        return self.rng.uniform(0.2, 1.8) * self.delay

    def reset(self) -> None:
        """Every connection breaks, and both sides see it."""
        for wires in self.wires:
            for wire in wires:
                wire.out.broken = True
                wire.out.change()
        self.wires.clear()


class Node:
    """One replica: its copies, its ring, and the disk's behaviour. `disk` seconds go by before each blocking call."""

    def __init__(self, name: str, seed: int = 0, config: ReplicaSetConfig = CONFIG) -> None:
        self.name = name
        self.config = config
        self.rng = random.Random(f"{name} {seed}")
        self.copies = MemoryCopies(config.name, name, self._incarnation, ForgetfulBackend)
        self.disk = 0.001
        self.calls = 0
        self.crash_at = 0  # number of the blocking call in which the process ends, before or after it is done
        self.crash_after = False
        self.dead = False  # since the crash: nothing reaches the disk any more
        self.gate: trio.Event | None = None  # blocking calls wait for it
        self.ring = Ring(config.ring_bytes_max)
        self.store: Store = self.copies.open()
        self.ended: list[str] = []
        self.last: FollowingEnded | None = None
        self.current: Any = None

    def _incarnation(self) -> str:
        return f"{self.rng.getrandbits(32):08x}"

    @property
    def incarnation(self) -> str:
        return self.copies.identity.incarnation

    @property
    def position(self) -> Position:
        return Position(*self.store.position)

    async def run_blocking(self, call: Callable[[], Any]) -> Any:
        self.calls += 1
        number = self.calls
        if self.gate is not None:
            await self.gate.wait()
        await trio.sleep(self.rng.uniform(0.5, 1.5) * self.disk)
        if self.dead or (number == self.crash_at and not self.crash_after):
            self.dead = True
            raise Crash
        result = call()
        if number == self.crash_at:
            self.dead = True
            raise Crash
        return result

    def restart(self, keep: int = 0) -> None:
        """The process ended and starts again, with what the disk has."""
        backend = self.copies.backend
        assert isinstance(backend, ForgetfulBackend)
        self.copies._store = None
        self.copies.side = None
        self.copies.backend = backend.crash(keep)
        self.store = self.copies.open()
        self.ring = Ring(self.config.ring_bytes_max)
        self.crash_at = 0
        self.dead = False
        self.current = None

    def wipe(self) -> None:
        self.store = self.copies.start_anew()
        self.ring = Ring(self.config.ring_bytes_max)

    def write(self, changes: list[Change], position: tuple[int, int]) -> None:
        """Put something into the store and the ring as if it had been followed."""
        self.ring.align(self.position)
        self.ring.append(RingBatch(Position(*position), self.position, encode_changes(changes)), position[1])
        self.store.apply(changes, position, True)

    def follower(self) -> Follower:
        return Follower(
            self.config, self.name, self.copies, self.store, self.ring, run_blocking=self.run_blocking, rng=self.rng
        )

    async def follow_once(self, network: Network, address: str, epoch: int) -> FollowingEnded:
        """One connection to its end."""
        follower = self.follower()
        self.current = follower
        try:
            greeting = await Follower.greet(network, address)
            await follower.follow(greeting, epoch, lambda: None)
        except FollowingEnded as ended:
            self.ended.append(str(ended))
            self.last = ended
            return ended
        finally:
            if follower.store is not None:
                self.store = follower.store
        raise AssertionError("follow returned")

    async def keep_following(self, network: Network, address: str, epoch: int) -> None:
        """Follow again and again; a crash ends it."""
        while True:
            try:
                await self.follow_once(network, address, epoch)
            except OSError:
                pass
            except (Crash, StoreError, ExceptionGroup) as error:
                if not self.dead and not isinstance(error, StoreError):
                    raise
                self.ended.append(repr(error))
                return
            await trio.sleep(0.05)


class Led:
    """A leader that runs, and how it ended."""

    def __init__(self, node: Node, leader: Leader) -> None:
        self.node = node
        self.leader = leader
        self.lost: LeadershipLost | None = None
        self.registered: list[tuple[str, str]] = []

    async def run(self) -> None:
        try:
            await self.leader.run()
        except LeadershipLost as lost:
            self.lost = lost

    async def commit(self, changes: list[Change]) -> None:
        last = self.leader.position
        await self.leader.commit(Batch(changes, (self.leader.epoch, last.lsn + 1)))

    async def begin_quietly(self) -> None:
        """The epoch's first batch, which the leadership may not live to see."""
        with suppress(LeadershipLost):
            await self.begin()

    async def begin(self) -> None:
        """The epoch's first batch."""
        lsn = self.leader.position.lsn + 1
        await self.commit([Store.history_change(self.leader.epoch, lsn)])


class Set:
    """Some replicas on one network; `roster` is what ZooKeeper says."""

    def __init__(self, nursery: trio.Nursery, names: str = "abc", seed: int = 0, **options: Any) -> None:
        self.config = replace(CONFIG, **options)
        self.network = Network(seed)
        self.network.nursery = nursery
        self.nursery = nursery
        self.nodes = {name: Node(name, seed, self.config) for name in names}
        self.roster = {name: node.incarnation for name, node in self.nodes.items()}
        self.may_register = True
        self.scopes: dict[str, trio.CancelScope] = {}

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def lead(self, name: str, epoch: int, **options: Any) -> Led:
        node = self.nodes[name]

        async def register(follower: str, incarnation: str) -> bool:
            await trio.sleep(0.005)
            if self.may_register:
                self.roster[follower] = incarnation
                led.registered.append((follower, incarnation))
            return self.may_register

        leader = Leader(
            node.config,
            name,
            epoch,
            node.store,
            node.ring,
            counted=self.roster,
            register=register,
            run_blocking=node.run_blocking,
            rng=node.rng,
            **options,
        )
        led = Led(node, leader)
        self.network.handlers[name] = leader.serve
        self.nursery.start_soon(led.run)
        return led

    def follow(self, name: str, leader: str, epoch: int) -> None:
        self.scopes[name] = trio.CancelScope()

        async def run() -> None:
            with self.scopes[name]:
                await self.nodes[name].keep_following(self.network, leader, epoch)

        self.nursery.start_soon(run)

    async def stop(self, name: str) -> None:
        self.scopes[name].cancel()
        await trio.sleep(0.05)


@asynccontextmanager
async def replica_set(names: str = "abc", seed: int = 0, **options: Any) -> AsyncIterator[Set]:
    async with trio.open_nursery() as nursery:
        yield Set(nursery, names, seed, **options)
        nursery.cancel_scope.cancel()


def put(number: int, text: str = "", queue: int = 1) -> Change:
    key = fmt.message_key(queue, number)
    return key, fmt.seal(key, f"{number} {text}".encode())


def delete(number: int, queue: int = 1) -> Change:
    return fmt.message_key(queue, number), None


def content(store: Store) -> dict[bytes, bytes]:
    """Everything in a store but META."""
    return {key: value for key, value in store.backend.iterate(FIRST, STOP) if key != fmt.META_KEY}


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait, in virtual time, until a condition holds; AssertionError if it doesn't within `seconds`."""
    with trio.move_on_after(seconds):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.01)
        return
    raise AssertionError("it did not come to that")


def current(nodes: Set, name: str) -> Store:
    store = nodes[name].current.store
    assert store is not None
    return store


async def caught_up(nodes: Set, led: Led, *names: str) -> None:
    """Wait until they hold what the leader's store holds, then look at every key."""

    def there() -> bool:
        stores = [nodes[name].current.store for name in names if nodes[name].current]
        return len(stores) == len(names) and all(
            store is not None and store.position == led.node.store.position == led.leader.position for store in stores
        )

    await until(there)
    expected = content(led.node.store)
    for name in names:
        assert content(current(nodes, name)) == expected, name
        assert current(nodes, name).history == led.node.store.history


def fill(nodes: Set, names: str, count: int, epoch: int = 1, start: int = 1, text: str = "old") -> None:
    """Give replicas the same past, as if they had been there: `count` batches of `epoch` from lsn `start`."""
    for name in names:
        node = nodes[name]
        for lsn in range(start, start + count):
            changes = [put(lsn, f"{text} {epoch}")]
            if lsn == start:
                changes.append(Store.history_change(epoch, lsn))
            node.write(changes, (epoch, lsn))
