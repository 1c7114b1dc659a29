"""The ways to bugs that random stories do not find: what befalls a set, step by step. Owns these stories.

Each ends as every story does, all well again, and nothing is wrong in it where the code is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import trio

from pybroker.cluster.coordinator import SetNode
from pybroker.cluster.memory import Fate
from pybroker.cluster.registry import Position
from pybroker.store import format as fmt
from tests.sim.clients import QUEUES, visit
from tests.sim.disk import MASK, SimBackend
from tests.sim.member import Life, Member
from tests.sim.schedule import PROCESS
from tests.sim.simulation import Simulation

TINY = 0.0002  # seconds: less than anything takes


def confirm_position(position: Position) -> None:
    """The process of this task says that a position of its store is on a quorum."""
    life = PROCESS.get()
    assert isinstance(life, Life)
    backend = life.copies.backend
    assert isinstance(backend, SimBackend)
    life.sim.trace(f"{life.name} confirms {tuple(position)}")
    life.sim.positions.confirmed(life.name, (position.epoch, position.lsn), backend.fingerprint & MASK, backend.history)


# ---- steps


async def begin(sim: Simulation) -> int:
    """a leads, all follow and are at one position, which is returned. (a must not be lighter than b.)"""
    sim["a"].start()
    sim["b"].start()
    await until(lambda: sim["a"].leads or sim["b"].leads)
    assert sim["a"].leads
    sim["c"].start()
    await send(sim, sim["a"], 1)
    await until(sim.is_whole)
    await trio.sleep(0.1)  # until the leader knows that all are on the roster, too
    return position(sim["a"])[1]


async def until(condition: Any) -> None:
    with trio.fail_after(30.0):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(TINY)


async def send(sim: Simulation, member: Member, number: int) -> None:
    """One message to one member, as long as that member lives; whatever comes of it."""

    async def work(life: Life, client: Any) -> None:
        name, body = f"w0-{number}", f"w0-{number}|".encode()
        sim.account.attempt(name, QUEUES[0], body)
        sent = await client.send(QUEUES[0], body)
        sim.account.confirm(name, sent.message_id, sent.durable, trio.current_time())
        sim.trace(f"{name} is confirmed")

    assert member.life is not None
    await visit(sim, member.life, work)


def send_soon(sim: Simulation, name: str, number: int) -> None:
    sim.nursery.start_soon(send, sim, sim[name], number)


def position(member: Member) -> tuple[int, int]:
    """What is on the member's disk."""
    copies = member.disk.copies
    backend = copies.backend if copies is not None else member.disk.backend
    assert isinstance(backend, SimBackend)
    return backend.position


def isolate(sim: Simulation, name: str) -> None:
    """From the others, and from ZooKeeper; it does not notice yet."""
    for other in sim.members:
        if other != name:
            sim.network.cut_both(name, other)
    life = sim[name].life
    if life is not None:
        sim.zookeeper.cut(life.coordinator, noticed=False)


def rejoin(sim: Simulation, name: str) -> None:
    """After `isolate`; what was under way meanwhile is lost with its connections."""
    for other in sim.members:
        sim.network.reset(name, other)
    sim.network.heal(*[pair for pair in sim.network.cuts if name in pair])
    for life in sim.lives:
        if life.member.name == name:
            sim.zookeeper.heal(life.coordinator)


# ---- ways


async def longest(sim: Simulation) -> None:
    """c has a batch of epoch 1 that nobody confirmed; a and b confirm one of epoch 2 in its place; then b and c elect. (c is heavy.)"""
    first = await begin(sim)
    sim.network.cut("a", "b")
    sim.network.cut("c", "a")
    send_soon(sim, "a", 2)
    await until(lambda: position(sim["c"])[1] > first)
    isolate(sim, "c")
    sim["a"].kill()
    sim.network.reset("a", "b")  # or else the batch would still arrive
    sim.network.heal(("a", "b"))
    sim["a"].start()
    await until(lambda: sim["a"].leads or sim["b"].leads)
    leader = sim.leaders()[0]
    leader.kill()
    rejoin(sim, "c")
    await until(lambda: bool(sim.leaders()))
    await sim.finish()


async def oldcommit(sim: Simulation) -> None:
    """Raft's figure 8: a batch of epoch 1 is on b and, in epoch 3, on c; one of epoch 2 in its place is on a, which then leads.

    (c is heavier than a.)
    """
    first = await begin(sim)
    sim.network.cut("a", "c")
    sim.network.cut("b", "a")
    send_soon(sim, "a", 2)
    await until(lambda: position(sim["b"])[1] > first)
    isolate(sim, "b")
    sim["a"].kill()
    sim.network.reset("a", "c")  # or else the batch would still arrive
    sim.network.heal(("a", "c"))
    sim["a"].start()
    await until(lambda: position(sim["a"]) == (2, first + 1))
    sim["c"].kill()
    sim["a"].kill()
    assert position(sim["c"]) == (1, first)
    sim["c"].disk.seconds = 0.005
    sim["c"].start()
    sim["b"].kill()  # without its ring it does not send its own batch together with that one
    rejoin(sim, "b")
    sim["b"].start()
    await until(lambda: position(sim["c"]) == (1, first + 1))
    sim["c"].disk.seconds = 10.0
    await trio.sleep(0.1)  # b hears of it; the next batch is not on c's disk
    sim["b"].kill()
    sim["c"].kill()
    assert position(sim["c"]) == (1, first + 1)
    sim["c"].disk.seconds = 0.001
    sim["c"].start()
    sim["a"].start()
    await until(lambda: bool(sim.leaders()))
    await sim.finish()


async def nofence(sim: Simulation) -> None:
    """b is elected by c, which then reaches a at b's address; a leads no more, and does not know it."""
    first = await begin(sim)
    isolate(sim, "a")
    sim.network.detours["c", "b"] = "a"
    for other in "bc":
        sim.network.reset("a", other)
    await until(lambda: sim.view.epoch == 2)
    sim.network.heal(("a", "c"), ("c", "a"))
    send_soon(sim, "a", 2)
    await trio.sleep(1.0)
    sim.network.detours.clear()
    sim.network.reset("a", "c")
    await until(lambda: position(sim["b"])[1] > first)
    await sim.finish()


async def stale(sim: Simulation) -> None:
    """c starts again; of ZooKeeper it sees the leader a as it was before b's election, and its own slot as it is after it."""
    await begin(sim)
    elected = trio.Event()

    def fate(name: str, writes: Sequence[Any]) -> Fate | None:
        if name == "b" and any(isinstance(write, SetNode) and write.path == "epoch" for write in writes):
            elected.set()
            return Fate(1.0, 0.001)
        return None

    sim.zookeeper.fate = fate
    isolate(sim, "a")
    for other in "bc":
        sim.network.reset("a", other)
    await elected.wait()
    sim["c"].kill()
    sim.network.heal(("a", "c"), ("c", "a"))
    paths = sorted(sim.zookeeper.nodes)
    between = (paths.index("leader") + paths.index("slots/c")) / 2
    sim.zookeeper.spread = lambda: 0.98 / between
    sim["c"].start()
    await trio.sleep(0.3)
    send_soon(sim, "a", 2)
    await until(lambda: sim.view.epoch == 2)
    await trio.sleep(0.6)
    sim.zookeeper.spread = lambda: 0.0
    await trio.sleep(0.2)
    await sim.finish()


async def aba(sim: Simulation) -> None:
    """c's wish to stand reaches ZooKeeper long after c has given it up, and follows a again; then b counts on it."""
    await begin(sim)
    held = trio.Event()

    def fate(name: str, writes: Sequence[Any]) -> Fate | None:
        if name == "c" and not held.is_set() and any(write.path == "slots/c" for write in writes):
            held.set()
            return Fate(2.0, None)
        return None

    isolate(sim, "b")
    sim.network.cut_both("a", "c")
    sim.network.reset("a", "c")
    sim.zookeeper.fate = fate
    await held.wait()
    arrives = trio.current_time() + 2.0
    sim.network.heal(("a", "c"), ("c", "a"))
    await until(lambda: sim["c"].role == "follower")
    send_soon(sim, "a", 2)
    await trio.sleep_until(arrives + 0.1)
    life = sim["b"].life
    assert life is not None
    sim.zookeeper.heal(life.coordinator)
    sim.network.heal(("b", "c"), ("c", "b"))
    await trio.sleep(1.5)
    await sim.finish()


async def early(sim: Simulation) -> None:
    """b answers what its slow disk does not have yet; then a and b crash, and b goes on with c."""
    await begin(sim)
    isolate(sim, "c")
    sim["b"].disk.seconds = 1.0
    send_soon(sim, "a", 2)
    await trio.sleep(0.1)
    sim["a"].kill()
    sim["b"].kill()
    sim["b"].disk.seconds = 0.001
    rejoin(sim, "c")
    sim["b"].start()
    await until(lambda: bool(sim.leaders()))
    await sim.finish()


async def replaced(sim: Simulation) -> None:
    """b loses its disk, and is on its slow way to hold everything again when a and b crash; c was away, and is back."""
    await begin(sim)
    isolate(sim, "c")
    await send(sim, sim["a"], 2)
    sim["b"].kill()
    sim["b"].disk.wipe()
    sim["b"].disk.seconds = 0.1
    sim["b"].start()
    await until(lambda: sim["b"].role == "follower")
    await trio.sleep(0.1)
    sim["a"].kill()
    sim["b"].kill()
    sim["b"].disk.seconds = 0.001
    sim["b"].start()
    rejoin(sim, "c")
    await trio.sleep(1.0)
    await sim.finish()


async def restored(sim: Simulation) -> None:
    """b is started twice with a copy of its disk of an earlier life: the first time without ZooKeeper. Then a is away, and c behind."""
    await begin(sim)
    backup = sim["b"].disk.back_up()
    assert backup is not None
    sim["b"].kill()
    sim["b"].start()
    await until(sim.is_whole)
    isolate(sim, "c")
    await send(sim, sim["a"], 2)
    sim["b"].kill()
    sim["b"].disk.restore(backup)
    sim.zookeeper.down()
    sim["b"].start()
    await trio.sleep(0.1)
    sim["b"].kill()
    sim["a"].kill()
    sim["b"].start()
    rejoin(sim, "c")
    sim.zookeeper.up()
    await trio.sleep(1.0)
    await sim.finish()


async def bent_descriptor(sim: Simulation) -> None:
    """The leader's record of a queue goes bad; c was away, has an earlier one, and is brought up by difference. (No ring.)"""
    await begin(sim)
    sim["c"].kill()
    for number in (2, 3, 4):
        await send(sim, sim["a"], number)
    flip(sim["a"], fmt.queue_key(1), 100)
    sim["c"].start()
    await trio.sleep(2.0)
    await sim.finish()


async def bent_meta(sim: Simulation) -> None:
    """The first bit of what says that c's copy is a store goes bad: it starts as a new copy."""
    await begin(sim)
    sim["c"].kill()
    flip(sim["c"], fmt.META_KEY, 0)
    sim["c"].start()
    await trio.sleep(2.0)
    await sim.finish()


def flip(member: Member, key: bytes, bit: int) -> None:
    copies = member.disk.copies
    backend = copies.backend if copies is not None else member.disk.backend
    assert isinstance(backend, SimBackend)
    backend.flip(key, bit)
    member.sim.trace(f"a bit of record {key.hex()} of {member.name} is flipped")
    member.sim.count("bits flipped on a disk")


async def stopped_while_elected(sim: Simulation) -> None:
    """A member is asked to stop after its election, and before it serves: it ends, and another one serves."""
    sim.start_all()
    await until(lambda: bool(sim.positions.leaders))
    name = next(iter(sim.positions.leaders.values()))[0]
    life = next(life for life in sim.lives if life.name == name)
    life.start_soon(sim.nursery, life.stop)
    with trio.move_on_after(15.0) as late:
        await life.ended.wait()
    if late.cancelled_caught:
        sim.findings.add(f"{name} does not stop")
    await sim.finish()
