"""Hand-shakes, and words that do not fit, between a leader or follower and one of whom the test writes every frame."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio

from pybroker.cluster import frames as f
from pybroker.cluster.registry import Position
from pybroker.store import chunks
from tests.cluster.puppets import Puppet, puppet_follower, puppet_leader, said
from tests.cluster.replicas import caught_up, content, fill, put, replica_set, until

P = Position


def batch(epoch: int, position: tuple[int, int], previous: tuple[int, int], *changes) -> f.BatchFrame:
    return f.BatchFrame(epoch, P(*position), P(*previous), f.encode_changes(changes or [put(1)]))


@pytest.mark.parametrize(
    "bad",
    [
        batch(4, (3, 6), (2, 5)),
        batch(2, (2, 6), (2, 5)),
        f.Heartbeat(4, 1, 0),
        f.Heartbeat(2, 1, 0),
        batch(3, (3, 7), (2, 5)),
        batch(3, (3, 6), (2, 4)),
        batch(3, (3, 6), (1, 5)),
        batch(3, (3, 5), (2, 4)),
        batch(3, (4, 6), (2, 5)),
        batch(3, (1, 6), (2, 5)),
        batch(3, (3, 6), (2, 5), (b"\x11", b"meta")),
        batch(3, (3, 6), (2, 5), (b"\xff", b"end mark")),
        batch(3, (3, 6), (2, 5), (b"\x13", b"not an IDS record")),
        f.BatchFrame(3, P(3, 6), P(2, 5), b"noise"),
        f.SnapshotBegin(3, P(3, 9)),
        f.Digests(3, P(3, 9), ((b"\0", b"\xff", b"d" * 16, 0),)),
        f.Chunk(3, b"\0", b"\xff", f.encode_entries([])),
        f.SnapshotEnd(3, P(3, 9)),
        f.Want(3, ()),
        f.Answer(3, P(3, 9)),
        f.Challenge(b"n" * 16, "x", 3),
        f.Welcome(3, P(3, 9), b"", f.BATCHES),
    ],
)
async def test_a_frame_that_does_not_fit_is_refused_and_never_applied(autojump_clock, bad):
    async with replica_set() as nodes:
        node = nodes["b"]
        fill(nodes, "b", 4)
        fill(nodes, "b", 1, epoch=2, start=5)
        before = content(node.store)
        puppet = await puppet_leader(nodes, "b", 3, f.BATCHES)
        await puppet.send(bad)
        refusal = await puppet.next(f.Refusal)
        assert refusal.epoch == 3
        await until(lambda: node.last is not None)
        assert node.last.reason == "protocol"
        assert content(node.store) == before
        assert node.position == (2, 5)


@pytest.mark.parametrize(
    "bad",
    [
        [f.SnapshotEnd(3, P(3, 9))],
        [f.Digests(3, P(3, 9), ((b"\0", b"\xff", b"d" * 16, 0),))],
        ["begin", f.Digests(3, P(3, 9), ())],
        ["begin", f.Digests(3, P(3, 9), ((b"\1", b"\xff", b"d" * 16, 0),))],
        ["begin", f.Digests(3, P(3, 9), ((b"\0", b"\2", b"d" * 16, 0), (b"\3", b"\xff", b"d" * 16, 0)))],
        ["begin", f.Digests(3, P(3, 9), ((b"\0", b"\xff\1", b"d" * 16, 0),))],
        ["begin", "digests", "digests"],
        ["begin", "digests", f.Chunk(3, b"\0", b"\x20", f.encode_entries([]))],
        ["begin", "digests", f.Chunk(3, b"\0", b"\xff", f.encode_entries([(b"\x11", b"meta")]))],
        ["begin", "digests", f.Chunk(3, b"\0", b"\xff", f.encode_entries([(b"\x55", b"unknown")]))],
        ["begin", "digests", f.Chunk(3, b"\0", b"\xff", b"noise")],
        ["begin", "digests", f.SnapshotEnd(3, P(3, 9))],
        ["begin", "digests", batch(3, (3, 10), (3, 9))],
        ["begin", batch(3, (3, 10), (3, 9))],
        ["begin", f.SnapshotEnd(3, P(3, 9))],
        ["begin", f.Chunk(4, b"\0", b"\xff", f.encode_entries([]))],
        ["begin", f.Want(3, ())],
    ],
)
async def test_a_walk_that_does_not_fit_is_refused_and_the_old_copy_stays(autojump_clock, bad):
    async with replica_set() as nodes:
        node = nodes["b"]
        fill(nodes, "b", 5)
        before = content(node.store)
        puppet = await puppet_leader(nodes, "b", 3, f.DIFFERENCE)
        words = {
            "begin": f.SnapshotBegin(3, P(3, 9)),
            "digests": f.Digests(3, P(3, 9), ((b"\0", b"\xff", b"d" * 16, 0),)),
        }
        await puppet.send(*[words.get(word, word) if isinstance(word, str) else word for word in bad])
        await puppet.next(f.Refusal)
        await until(lambda: node.last is not None)
        assert node.last.reason == "protocol"
        assert content(node.store) == before
        assert node.position == (1, 5)
        assert node.copies.side is None


async def test_a_walk_that_leaves_another_position_than_it_says_is_not_swapped_in(autojump_clock):
    async with replica_set() as nodes:
        node = nodes["b"]
        fill(nodes, "b", 5)
        before = content(node.store)
        puppet = await puppet_leader(nodes, "b", 3, f.DIFFERENCE)
        entries = sorted(before.items())
        await puppet.send(
            f.SnapshotBegin(3, P(3, 9)),
            f.Digests(3, P(3, 9), ((b"\0", b"\xff", b"d" * 16, 0),)),
            f.Chunk(3, b"\0", b"\xff", f.encode_entries(entries)),
            f.SnapshotEnd(3, P(3, 9)),
        )
        await until(lambda: node.last is not None)
        assert node.last.reason == "protocol"
        assert node.copies.side is None
        assert content(node.store) == before


async def test_a_walk_that_ends_too_early_is_not_swapped_in(autojump_clock):
    async with replica_set() as nodes:
        node = nodes["b"]
        fill(nodes, "b", 5)
        with node.store.backend.snapshot() as reader:
            [digest], _ = chunks.digests(reader, chunks.FIRST, 1 << 20, 10, stop=b"\x20")
        puppet = await puppet_leader(nodes, "b", 3, f.DIFFERENCE)
        await puppet.send(
            f.SnapshotBegin(3, P(1, 5)), f.Digests(3, P(1, 5), (tuple(digest),)), f.SnapshotEnd(3, P(1, 5))
        )
        await until(lambda: node.last is not None)
        assert node.last.reason == "protocol"
        assert node.current.swaps == 0


async def test_a_divergent_position_does_not_count(autojump_clock):
    async with replica_set() as nodes:
        fill(nodes, "a", 10)
        led = nodes.lead("a", 3)
        _, welcome = await puppet_follower(nodes, "a", "b", position=P(2, 10))
        assert welcome.how == f.DIFFERENCE
        assert led.leader.statistics().reach == 0
        _, welcome = await puppet_follower(nodes, "a", "b", position=P(1, 9))
        assert welcome.how == f.BATCHES
        assert led.leader.statistics().reach == 9


# ---- hand-shake


@pytest.mark.parametrize(
    ("changed", "code", "word"),
    [
        ({"protocol": 2}, "protocol-version", "speaks 1"),
        ({"set_name": "other"}, "other-set", "set set"),
        ({"secret": b"wrong"}, "secret", "another secret"),
        ({"secret": None}, "secret", "the peer has none"),
        ({"proof": b"p" * 32}, "secret", "another secret"),
        ({"epoch": 1}, "other-epoch", "epoch is 2"),
        ({"name": "a"}, "own-name", "own name"),
        ({"name": "d"}, "no-place", "a, b, c"),
    ],
)
async def test_refusals_say_why(autojump_clock, changed, code, word):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        refusal = await said(nodes, "a", **changed)
        assert isinstance(refusal, f.Refusal)
        assert refusal.code == code
        assert word in refusal.text
        assert led.lost is None
        assert led.leader.statistics().refused == 1
        assert led.leader.statistics().followers == ()


async def test_one_without_a_secret_is_told_by_one_that_has_none_either(autojump_clock):
    async with replica_set(secret="") as nodes:
        nodes.lead("a", 2)
        refusal = await said(nodes, "a")
        assert isinstance(refusal, f.Refusal)
        assert "this replica has none" in refusal.text
        assert isinstance(await said(nodes, "a", secret=None), f.Welcome)


async def test_a_leader_with_another_secret_is_not_followed(autojump_clock):
    async with replica_set() as nodes:
        node = nodes["b"]
        node.config = replace(node.config, secret="something else")
        await puppet_leader(nodes, "b", 3, f.BATCHES)
        await until(lambda: node.last is not None)
        assert "another secret" in str(node.last)
        node.config = replace(node.config, secret="")
        node.last = None
        await puppet_leader(nodes, "b", 3, f.BATCHES)
        await until(lambda: node.last is not None)
        assert "this replica has none" in str(node.last)


async def test_a_higher_epoch_ends_the_leadership_but_only_from_one_that_knows_the_secret(autojump_clock):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        await said(nodes, "a", epoch=9, secret=b"wrong")
        await trio.sleep(0.1)
        assert led.lost is None
        refusal = await said(nodes, "a", epoch=9)
        assert isinstance(refusal, f.Refusal)
        await until(lambda: led.lost is not None)
        assert led.lost.epoch == 9
        assert not led.leader.lease_valid


async def test_a_follower_s_refusal_with_a_higher_epoch_ends_the_leadership(autojump_clock):
    async with replica_set() as nodes:
        led = nodes.lead("a", 2)
        puppet, _ = await puppet_follower(nodes, "a", "b")
        await puppet.send(f.Refusal("other-epoch", "this replica follows 5", 5))
        await until(lambda: led.lost is not None)
        assert led.lost.epoch == 5


async def test_a_connection_that_says_nothing_is_ended(autojump_clock):
    async with replica_set() as nodes:
        nodes.lead("a", 2)
        puppet = Puppet(await nodes.network.dial("a"))
        await puppet.next(f.Challenge)
        with trio.fail_after(6), pytest.raises(Exception, match="closed"):
            await puppet.next(f.Welcome)


# ---- answers


@pytest.mark.parametrize(
    "answer",
    [
        f.Answer(1, P(2, 11)),
        f.Answer(3, P(2, 11)),
        f.Answer(2, P(2, 12)),
        f.Answer(2, P(3, 11)),
        f.HeartbeatAnswer(2, 99, P(2, 11)),
    ],
)
async def test_an_answer_that_can_not_be_is_refused_and_not_counted(autojump_clock, answer):
    async with replica_set() as nodes:
        fill(nodes, "ab", 10)
        led = nodes.lead("a", 2)
        puppet, welcome = await puppet_follower(nodes, "a", "b", position=P(1, 10))
        assert welcome.how == f.BATCHES
        nodes.nursery.start_soon(led.begin_quietly)
        await puppet.next(f.BatchFrame)
        await puppet.send(answer)
        await puppet.next(f.Refusal)
        await trio.sleep(0.1)
        assert led.leader.statistics().reach == 10
        assert led.node.position == (1, 10)


async def test_the_late_answer_of_a_replaced_copy_does_not_count(autojump_clock):
    async with replica_set() as nodes:
        fill(nodes, "ab", 10)
        led = nodes.lead("a", 2)
        old, _ = await puppet_follower(nodes, "a", "b", position=P(1, 10))
        nodes.nursery.start_soon(led.begin_quietly)
        await old.next(f.BatchFrame)
        old.stream.out.delay = lambda: 0.5  # type: ignore[attr-defined]
        await old.send(f.Answer(2, P(2, 11)))
        new, welcome = await puppet_follower(nodes, "a", "b", incarnation="another")
        assert welcome.how == f.DIFFERENCE
        await trio.sleep(2)
        assert led.leader.statistics().reach == 0
        assert led.node.position == (1, 10)
        assert not led.leader.lease_valid
        assert led.registered == []
        del new


async def test_a_learner_counts_only_when_it_is_durable_and_registered(autojump_clock):
    async with replica_set() as nodes:
        fill(nodes, "ab", 200)
        nodes["a"].ring.clear()
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        old = nodes["c"].incarnation
        nodes["c"].wipe()
        nodes.may_register = False
        nodes.follow("c", "a", 2)
        await caught_up(nodes, led, "b", "c")
        await nodes.stop("b")
        done = trio.Event()

        async def commit() -> None:
            await led.commit([put(1, "with c only")])
            done.set()

        nodes.nursery.start_soon(commit)
        await trio.sleep(0.5)
        assert not done.is_set()  # c has it, and does not count
        assert nodes["c"].current.position == (2, 202)
        assert nodes.roster["c"] == old
        nodes.may_register = True
        await done.wait()
        assert nodes.roster["c"] == nodes["c"].incarnation != old
        assert led.registered == [("c", nodes["c"].incarnation)]
        assert led.lost is None


async def test_a_learner_is_not_registered_before_it_holds_what_the_leader_had(autojump_clock):
    async with replica_set() as nodes:
        fill(nodes, "ab", 50)
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        puppet, welcome = await puppet_follower(nodes, "a", "c", incarnation="another", position=P(1, 40))
        assert welcome.how == f.BATCHES
        frame = None
        while frame is None or frame.position != (2, 51):
            frame = await puppet.next(f.BatchFrame)
            assert led.registered == []
            await puppet.send(f.Answer(2, frame.position))
        await until(lambda: bool(led.registered))


async def test_a_new_name_takes_an_open_place_and_no_other(autojump_clock):
    async with replica_set() as nodes:
        nodes.roster.pop("c")
        led = nodes.lead("a", 2)
        nodes.follow("b", "a", 2)
        await led.begin()
        nodes.follow("c", "a", 2)
        await until(lambda: bool(led.registered))
        assert isinstance(await said(nodes, "a", name="d"), f.Refusal)
        led.leader.set_roster({name: copy for name, copy in nodes.roster.items() if name != "c"})
        await until(lambda: [one.name for one in led.leader.statistics().followers] != ["b", "c"])
        assert isinstance(await said(nodes, "a", name="d"), f.Welcome)
