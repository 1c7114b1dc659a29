"""Leaders and followers of whom a test writes every frame. Owns their side of the hand-shake."""

from __future__ import annotations

import trio

from pybroker.cluster import frames as f
from pybroker.cluster.frame_stream import FrameStream
from pybroker.cluster.handshake import Conversation, follower_proof, leader_proof
from pybroker.cluster.registry import Position
from tests.cluster.replicas import Set

P = Position
WELCOMED = Position(3, 100)
EMPTY = Position(0, 0)


class Puppet:
    """A leader or follower whose every frame the test writes."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.frames = FrameStream(stream)
        self.frames.reader.bytes_max = f.FRAME_BYTES_MAX

    async def next(self, kind: type) -> object:
        """The next frame of that kind; others are passed over."""
        while True:
            frame = await self.frames.receive_one(30.0)
            if isinstance(frame, kind):
                return frame

    async def send(self, *frames: f.Frame) -> None:
        await self.frames.send(b"".join(map(f.encode, frames)))


async def puppet_leader(nodes: Set, name: str, epoch: int, how: str, position: Position = WELCOMED) -> Puppet:
    """Follow a puppet; returns it after its Welcome."""
    ready = trio.Event()
    made: list[Puppet] = []

    async def serve(stream: trio.abc.Stream) -> None:
        puppet = Puppet(stream)
        await puppet.send(f.Challenge(b"n" * 16, "x", epoch))
        hello = await puppet.next(f.Hello)
        talk = Conversation("set", "x", hello.name, hello.incarnation, hello.epoch, b"n" * 16, hello.nonce)
        proof = leader_proof(b"between us", talk, position, how)
        await puppet.send(f.Welcome(epoch, position, proof, how))
        made.append(puppet)
        ready.set()

    nodes.network.handlers["x"] = serve

    async def follow() -> None:
        await nodes[name].follow_once(nodes.network, "x", epoch)

    nodes.nursery.start_soon(follow)
    await ready.wait()
    return made[0]


async def said(nodes: Set, leader: str, **changed) -> f.Frame:
    """What a leader says to a Hello of b's that is changed."""
    secret = changed.pop("secret", b"between us")
    puppet = Puppet(await nodes.network.dial(leader))
    challenge = await puppet.next(f.Challenge)
    hello = f.Hello(1, "set", "b", nodes["b"].incarnation, P(0, 0), 2, b"m" * 16, b"")._replace(**changed)
    talk = Conversation(
        hello.set_name, challenge.name, hello.name, hello.incarnation, hello.epoch, challenge.nonce, hello.nonce
    )
    if "proof" not in changed:
        hello = hello._replace(proof=follower_proof(secret, talk, hello.position))
    await puppet.send(hello)
    return await puppet.frames.receive_one(10.0)


async def puppet_follower(
    nodes: Set, leader: str, name: str, *, incarnation: str = "", position: Position = EMPTY
) -> tuple[Puppet, f.Welcome]:
    puppet = Puppet(await nodes.network.dial(leader))
    challenge = await puppet.next(f.Challenge)
    incarnation = incarnation or nodes[name].incarnation
    talk = Conversation("set", leader, name, incarnation, challenge.epoch, challenge.nonce, b"m" * 16)
    proof = follower_proof(b"between us", talk, position)
    await puppet.send(f.Hello(1, "set", name, incarnation, position, challenge.epoch, b"m" * 16, proof))
    welcome = await puppet.next(f.Welcome)
    assert isinstance(welcome, f.Welcome)
    return puppet, welcome
