"""The network between the simulated processes: streams with delays, stalls, resets, one-way cuts and connections nobody wants.

Owns every byte under way. As TCP, a stream keeps its order: what is cut or stalled is late, not lost, until the connection
breaks; one end may know that it broke and the other not. What never happens to bytes of a stream happens to connections: they are
accepted for a dialler who has gone, they hold what was said minutes ago, an old one's words are said again on a new one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trio

from tests.sim.schedule import PROCESS, Process

RECORDED_MAX = 20  # first pieces of a stream that can be said again


@dataclass
class Weather:
    """How bad the network is. Seconds, and chances for each piece of bytes (or each dial: `ghost`)."""

    delay: float = 0.001
    spike: float = 0.0  # chance of a piece that takes long ...
    spike_seconds: float = 0.3  # ... up to so long
    tear: float = 0.05  # a piece arrives in two
    flip: float = 0.0  # a bit of it is another one
    ghost: float = 0.0  # the dialler gives up at the moment in which it is accepted
    replay: float = 0.0  # ... and an earlier connection's words arrive on it
    misroute: float = 0.0  # the address leads to another process


def host(address: str) -> str:
    """The machine of an address ``HOST`` or ``HOST/SERVICE``."""
    return address.partition("/")[0]


class Pipe:
    """One direction of a connection. An empty piece is the end of the stream.

    choke   so many pieces get through, and then nothing any more, without a word; None: all do
    """

    def __init__(self, network: SimNetwork, source: str, target: str, room: int) -> None:
        self.network = network
        self.source = source
        self.target = target
        self.room = room
        self.stalled_until = 0.0
        self.sender_broken = False  # whoever sends gets an error
        self.receiver_broken = False
        self.pieces: deque[tuple[float, bytes]] = deque()
        self.bytes = 0
        self.recorded: list[bytes] = []
        self.choke: int | None = None
        self._changed = trio.Event()

    def change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    @property
    def held_until(self) -> float:
        """Until when nothing gets through; inf while it is cut."""
        if (self.source, self.target) in self.network.cuts or self.choke == 0:
            return float("inf")
        return self.stalled_until

    def put(self, data: bytes) -> None:
        at = self.network.arrival()
        if self.pieces:
            at = max(at, self.pieces[-1][0])
        self.pieces.append((at, data))
        self.bytes += len(data)
        self.change()

    async def send(self, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        while self.bytes >= self.room and not self.sender_broken:
            await self._changed.wait()
        if self.sender_broken:
            raise trio.BrokenResourceError
        rng, weather = self.network.rng, self.network.weather
        if len(self.recorded) < RECORDED_MAX:
            self.recorded.append(data)
        if weather.flip and rng.random() < weather.flip:
            place = rng.randrange(len(data) * 8)
            torn = bytearray(data)
            torn[place // 8] ^= 1 << place % 8
            data = bytes(torn)
            self.network.count("bits flipped on the wire")
        if len(data) > 1 and rng.random() < weather.tear:
            place = rng.randrange(1, len(data))
            self.put(data[:place])
            data = data[place:]
        if data:
            self.put(data)

    async def receive(self) -> bytes:
        while True:
            if self.receiver_broken:
                raise trio.BrokenResourceError
            now = trio.current_time()
            wake = self.held_until
            if self.pieces:
                wake = max(wake, self.pieces[0][0])
                if wake <= now:
                    data = self.pieces[0][1]
                    if data:
                        self.pieces.popleft()
                        self.bytes -= len(data)
                        if self.choke is not None:
                            self.choke -= 1
                        self.change()
                    return data
            elif wake <= now:
                wake = float("inf")
            changed = self._changed
            if wake == float("inf"):
                await changed.wait()
            else:
                with trio.move_on_at(wake):
                    await changed.wait()


class Wire(trio.abc.Stream):
    """One end of a connection."""

    def __init__(self, out: Pipe, into: Pipe) -> None:
        self.out = out
        self.into = into
        self.closed = False

    async def send_all(self, data: bytes) -> None:
        if self.closed:
            raise trio.ClosedResourceError
        await self.out.send(bytes(data))

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if self.closed:
            raise trio.ClosedResourceError
        return await self.into.receive()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """The peer reads what is under way, then the end; what it sends from now is answered by a reset."""
        if not self.closed:
            self.closed = True
            if not self.out.sender_broken:
                self.out.put(b"")
            self.into.receiver_broken = True
            self.into.change()
            if self.into.held_until <= trio.current_time():
                self.into.sender_broken = True

    def reset(self) -> None:
        """This end learns that the connection is broken."""
        self.out.sender_broken = True
        self.into.receiver_broken = True
        self.out.change()
        self.into.change()

    def vanish(self) -> None:
        """The machine of this end is gone: nothing will ever come from it."""
        self.closed = True
        self.out.sender_broken = True
        self.into.receiver_broken = True


class Connection:
    """Both ends: of the one who dialled, of the one who accepted."""

    def __init__(self, network: SimNetwork, dialler: str, address: str) -> None:
        room = network.room
        acceptor = host(address)
        self.address = address
        self.names = (dialler, acceptor)
        self.there = Pipe(network, dialler, acceptor, room)
        self.back = Pipe(network, acceptor, dialler, room)
        self.ends = (Wire(self.there, self.back), Wire(self.back, self.there))

    @property
    def over(self) -> bool:
        return self.ends[0].closed and self.ends[1].closed


class SimNetwork:
    """All connections. Addresses are the names of the processes, with a service behind a slash where a process has several."""

    def __init__(self, rng: random.Random, count: Callable[[str], None]) -> None:
        self.rng = rng
        self.weather = Weather()
        self.room = 1 << 20  # bytes that one direction holds
        self.cuts: set[tuple[str, str]] = set()  # (from, to)
        self.detours: dict[tuple[str, str], str] = {}  # (dialler, address) to who is reached instead
        self.count = count
        self.connections: list[Connection] = []
        self.chokes: dict[
            tuple[str, str], list[tuple[int | None, int | None]]
        ] = {}  # (dialler, acceptor) to what the next get
        self._servers: dict[str, tuple[Process, trio.Nursery, Any]] = {}
        self._dark: set[str] = set()  # machines without power: nobody refuses a connection
        self._changed = trio.Event()
        self._recorded: dict[str, list[bytes]] = {}  # by acceptor: what a dialler said on some connection

    def port(self, name: str) -> Port:
        return Port(self, name)

    def arrival(self) -> float:
        weather = self.weather
        delay = self.rng.uniform(0.2, 1.8) * weather.delay
        if weather.spike and self.rng.random() < weather.spike:
            delay += self.rng.uniform(0, weather.spike_seconds)
        return trio.current_time() + delay

    # ---- what processes do

    async def dial(self, dialler: str, address: str) -> Wire:
        await trio.sleep_until(self.arrival())
        address = self.detours.get((dialler, address), address)
        if self.weather.misroute and self.rng.random() < self.weather.misroute:
            address = self._astray(dialler, address)
        there = host(address)
        while (dialler, there) in self.cuts or (there, dialler) in self.cuts or there in self._dark:
            await self._changed.wait()
            await trio.sleep_until(self.arrival())
        if address not in self._servers:
            raise ConnectionRefusedError(address)
        connection = self._connect(dialler, address)
        mine = connection.ends[0]
        if self.weather.ghost and self.rng.random() < self.weather.ghost:
            self.count("ghost connections")
            if self.rng.random() < self.weather.replay:
                for data in self._recorded.get(address, []):
                    connection.there.put(data)
            if self.rng.random() < 0.5:
                mine.close()
            else:
                mine.vanish()
            raise ConnectionResetError(address)
        try:
            await trio.sleep_until(self.arrival())
        except BaseException:
            mine.close()
            raise
        return mine

    def _astray(self, dialler: str, address: str) -> str:
        """Another process with that service. Clients of a service are spared: it is their own affair whom they trust."""
        service = address.partition("/")[2]
        servers = sorted(each for each in self._servers if each.partition("/")[2] == service)
        if not servers or (service and dialler not in map(host, self._servers)):
            return address
        self.count("dials misrouted")
        return self.rng.choice(servers)

    def _connect(self, dialler: str, address: str) -> Connection:
        process, nursery, handler = self._servers[address]
        connection = Connection(self, dialler, address)
        chokes = self.chokes.get(connection.names)
        if chokes:
            connection.there.choke, connection.back.choke = chokes.pop(0)
            self.count("connections choked")
        self._prune()
        self.connections.append(connection)
        process.start_soon(nursery, handler, connection.ends[1])
        return connection

    def _prune(self) -> None:
        for connection in self.connections:
            if connection.over and connection.there.recorded:
                self._recorded[connection.address] = connection.there.recorded
        self.connections = [connection for connection in self.connections if not connection.over]

    async def serve(self, address: str, handler: Any, task_status: trio.TaskStatus[str]) -> None:
        async with trio.open_nursery() as nursery:
            with self.listening(address, nursery, handler):
                task_status.started(address)
                await trio.sleep_forever()

    @contextmanager
    def listening(self, address: str, nursery: trio.Nursery, handler: Any) -> Iterator[None]:
        """What is dialled at an address is handed to `handler` while the block runs; what that does may last longer."""
        process = PROCESS.get()
        assert process is not None
        mine = (process, nursery, handler)
        self._servers[address] = mine
        self._change()
        try:
            yield
        finally:
            if self._servers.get(address) is mine:
                del self._servers[address]

    def stop_listening(self, address: str) -> None:
        """At once: who dials from now on is refused."""
        self._servers.pop(address, None)

    def _change(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # ---- what befalls them

    def cut(self, source: str, target: str) -> None:
        """Nothing gets from one to the other; what is under way waits."""
        self.cuts.add((source, target))

    def cut_both(self, one: str, other: str) -> None:
        self.cut(one, other)
        self.cut(other, one)

    def heal(self, *pairs: tuple[str, str]) -> None:
        """These directions again, or all."""
        self.cuts -= set(pairs) if pairs else set(self.cuts)
        for connection in self.connections:
            connection.there.change()
            connection.back.change()
        self._change()

    def between(self, one: str, other: str) -> list[Connection]:
        return [connection for connection in self.connections if set(connection.names) == {one, other}]

    def reset(self, one: str, other: str, ends: str = "both") -> None:
        """Break the connections between two; `ends` that know it at once: ``both``, or the name of one."""
        for connection in self.between(one, other):
            for name, end in zip(connection.names, connection.ends, strict=True):
                if ends in ("both", name):
                    end.reset()

    def stall(self, source: str, target: str, seconds: float) -> None:
        for connection in self.between(source, target):
            for pipe in (connection.there, connection.back):
                if pipe.source == source:
                    pipe.stalled_until = trio.current_time() + seconds
                    pipe.change()

    def remove(self, name: str, silently: bool) -> None:
        """A process is gone. Its peers hear of it (the kernel closes its sockets), or nothing ever again (the machine is gone)."""
        for address in [address for address in self._servers if host(address) == name]:
            self.stop_listening(address)
        if silently:
            self._dark.add(name)
        for connection in self.connections:
            for own, end in zip(connection.names, connection.ends, strict=True):
                if own == name and not end.closed:
                    if silently:
                        end.vanish()
                    else:
                        end.close()
                        end.vanish()

    def restore(self, name: str) -> None:
        """The machine has power again: connections of its earlier life are reset by it."""
        if name in self._dark:
            self._dark.discard(name)
            for connection in self.connections:
                for own, end in zip(connection.names, reversed(connection.ends), strict=True):
                    if own == name:
                        end.reset()
        self._change()


class Port:
    """The network as one process sees it: `pybroker.cluster.network.Network`."""

    def __init__(self, network: SimNetwork, name: str) -> None:
        self._network = network
        self._name = name

    async def dial(self, address: str) -> trio.abc.Stream:
        process = PROCESS.get()
        if process is not None and process.dead:
            raise ConnectionResetError(address)
        return await self._network.dial(self._name, address)

    async def serve(self, address: str, handler: Any, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        await self._network.serve(address, handler, task_status)
