"""Bad values of a leader's or follower's store, and whole ones from the other end of a link: on virtual time."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from pybroker.cluster import frames as f
from pybroker.cluster.registry import Position
from pybroker.cluster.repair import VALUES_BYTES, read_values
from pybroker.cluster.scrub import FIRST_WALK, read_slice
from pybroker.errors import ProtocolError, StoreDamaged
from pybroker.operations import PUT_PEER, PUT_PRODUCER, PeerRecord, ProducerRecord
from pybroker.store import format as fmt
from pybroker.store.memory import MemoryBackend
from pybroker.store.store import Store
from tests.cluster.puppets import puppet_follower, puppet_leader
from tests.cluster.replicas import Led, Node, Set, caught_up, content, fill, put, replica_set, until

P = Position
WALK = 5.0  # seconds between two walks


def key_of(number: int) -> bytes:
    return fmt.message_key(1, number)


def spoil(node: Node, key: bytes) -> bytes:
    """Flip a bit of a value on a node's disk; the bad value."""
    node.copies.backend.flip(key, 13)  # type: ignore[attr-defined]
    value = node.copies.backend.get(key)
    assert value is not None
    return value


async def three(nodes: Set, count: int = 20) -> Led:
    """A leader and two followers that hold the same."""
    fill(nodes, "abc", count)
    led = nodes.lead("a", 2)
    for name in "bc":
        nodes.follow(name, "a", 2)
    await led.begin()
    await caught_up(nodes, led, "b", "c")
    return led


def scrubbed(nodes: Set, name: str):
    return nodes[name].current.statistics().scrub


# ---- frames


def test_frames_survive():
    samples: list[f.Frame] = [
        f.Fetch(3, 7, (b"k", b"l")),
        f.Values(3, 7, P(3, 99), ((b"k", b"v"), (b"l", None))),
        f.Values(3, 7, P(3, 99), ()),
    ]
    assert f.FrameReader(1 << 20).feed(b"".join(map(f.encode, samples))) == samples


@pytest.mark.parametrize(
    "bad",
    [
        f.Fetch(3, 7, (b"k",) * (f.FETCH_KEYS_MAX + 1)),
        f.Fetch(3, 7, ("k",)),  # type: ignore[arg-type]
        f.Fetch(3, -1, ()),
        f.Fetch(3, 7, (b"k" * (f.KEY_BYTES_MAX + 1),)),
        f.Values(3, 7, P(3, 9), ((b"k", b"v"),) * (f.FETCH_KEYS_MAX + 1)),
        f.Values(3, 7, P(3, 9), ((b"k", 5),)),  # type: ignore[arg-type]
        f.Values(3, 7, P(3, 9), ((b"k",),)),  # type: ignore[arg-type]
        f.Values(3, 7, P(3, 9), (b"k",)),  # type: ignore[arg-type]
    ],
)
def test_frames_of_another_shape_are_refused(bad):
    with pytest.raises(ProtocolError):
        f.FrameReader(1 << 20).feed(f.encode(bad))


# ---- what is read for a peer


def test_a_peer_is_told_whole_values_and_missing_keys_but_no_bad_value():
    store = Store.open(MemoryBackend())
    store.apply([put(1), put(2)], (1, 1), True)
    bad = (key_of(2), b"\x01 not whole")
    store.backend.write(store.backend.new_batch([bad]), True)
    position, pairs = read_values(store, [key_of(1), key_of(2), key_of(3)])
    assert position == (1, 1)
    assert pairs == [put(1), (key_of(3), None)]


def test_an_answer_is_bounded_but_has_at_least_one_value():
    store = Store.open(MemoryBackend())
    big = [(key_of(number), fmt.seal(key_of(number), b"\x01" * VALUES_BYTES)) for number in range(3)]
    store.apply(big, (1, 1), True)
    assert read_values(store, [key for key, _ in big])[1] == big[:1]


def test_a_slice_finds_every_kind_of_bad_value_and_ends_at_its_limits():
    store = Store.open(MemoryBackend())
    store.apply([put(number) for number in range(50)], (1, 1), True)
    assert read_slice(store, b"\0") == (
        1,
        [],
        sum(len(k) + len(v) for k, v in store.backend.iterate(b"\0", b"\xff")),
        None,
    )
    keys = [key for key, _ in store.backend.iterate(b"\0", b"\xff")]
    store.backend.write(store.backend.new_batch([(key, b"\x01bad") for key in keys]), True)
    assert [key for key, _ in read_slice(store, b"\0").bad] == keys
    piece = read_slice(store, b"\0", keys_max=10)
    assert (len(piece.bad), piece.next) == (10, keys[10])
    assert len(read_slice(store, b"\0", bad_max=3).bad) == 3
    assert read_slice(store, keys[-1]).next is None


# ---- Store.mend


@pytest.mark.parametrize(
    ("meanwhile", "known_at", "mended"),
    [
        ([], 1, True),
        ([put(9)], 1, True),
        ([put(9)], 2, True),
        ([put(1, "later")], 1, False),
        ([(key_of(1), None)], 1, False),
        ([], 2, False),  # what comes until there may touch it
    ],
)
def test_a_value_is_mended_only_if_the_bad_one_is_still_there_and_the_peer_was_not_ahead(meanwhile, known_at, mended):
    backend = MemoryBackend()
    store = Store.open(backend)
    store.apply([put(1)], (1, 1), True)
    bad = b"\x01bad"
    backend.write([(key_of(1), bad)], True)
    if meanwhile:
        store.apply(meanwhile, (1, 2), True)
    before = dict(backend.iterate(b"\0", b"\xff"))
    assert store.mend(key_of(1), bad, put(1)[1] or b"", known_at) is mended
    assert dict(backend.iterate(b"\0", b"\xff")) == (before | dict([put(1)]) if mended else before)


# ---- the leader asks


async def test_a_leader_is_given_what_a_follower_has_whole(autojump_clock):
    async with replica_set() as nodes:
        led = await three(nodes)
        whole = content(led.node.store)
        for key in (key_of(3), key_of(4)):
            spoil(nodes["a"], key)
        spoil(nodes["c"], key_of(3))
        spoil(nodes["b"], key_of(4))
        got = await led.leader.fetch([key_of(3), key_of(4), key_of(5), key_of(99)])
        assert got == {key_of(number): whole[key_of(number)] for number in (3, 4, 5)}
        assert led.lost is None


async def test_what_all_copies_have_bad_is_not_given(autojump_clock):
    async with replica_set() as nodes:
        led = await three(nodes)
        for name in "abc":
            spoil(nodes[name], key_of(3))
        assert await led.leader.fetch([key_of(3)]) == {}


async def test_more_values_than_one_answer_takes_come_in_several(autojump_clock):
    async with replica_set() as nodes:
        led = await three(nodes)
        keys = [key_of(number) for number in range(100, 105)]
        big = {key: fmt.seal(key, b"\x01" * VALUES_BYTES) for key in keys}
        await led.commit(list(big.items()))
        for key in keys:
            spoil(nodes["a"], key)
        assert await led.leader.fetch(keys) == big


async def test_a_follower_that_is_behind_is_not_asked(autojump_clock):
    async with replica_set(sync="local_disk") as nodes:
        led = await three(nodes)
        nodes["b"].gate = nodes["c"].gate = trio.Event()
        await led.commit([put(3, "newer")])
        spoil(nodes["a"], key_of(3))
        asked = trio.current_time()
        assert await led.leader.fetch([key_of(3)]) == {}  # they have an older one
        assert trio.current_time() - asked <= nodes.config.heartbeat_timeout + 0.1
        nodes["b"].gate.set()
        assert await led.leader.fetch([key_of(3)]) == dict([put(3, "newer")])


async def test_a_follower_that_does_not_answer_holds_up_nobody_for_long(autojump_clock):
    async with replica_set() as nodes:
        fill(nodes, "ab", 10)
        led = nodes.lead("a", 2)
        puppet, _ = await puppet_follower(nodes, "a", "b", position=P(1, 10))
        spoil(nodes["a"], key_of(3))
        asked = trio.current_time()
        assert await led.leader.fetch([key_of(3)]) == {}
        assert trio.current_time() - asked <= nodes.config.heartbeat_timeout + 0.1
        # Its late answer does no harm, and the next question has one of its own.
        fetch = await puppet.next(f.Fetch)
        await puppet.send(f.Values(2, fetch.number, P(1, 10), ()))
        nodes.nursery.start_soon(led.leader.fetch, [key_of(3)])
        assert (await puppet.next(f.Fetch)).number == fetch.number + 1


async def test_a_peer_s_bad_value_is_not_taken(autojump_clock):
    async with replica_set() as nodes:
        fill(nodes, "ab", 10)
        led = nodes.lead("a", 2)
        puppet, _ = await puppet_follower(nodes, "a", "b", position=P(1, 10))
        bad = spoil(nodes["a"], key_of(3))
        got: list[dict[bytes, bytes]] = []

        async def fetch() -> None:
            got.append(await led.leader.fetch([key_of(3)]))

        nodes.nursery.start_soon(fetch)
        asked = await puppet.next(f.Fetch)
        assert asked.keys == (key_of(3),)
        await puppet.send(f.Values(2, asked.number, P(1, 10), ((key_of(3), bad),)))
        await until(lambda: bool(got))
        assert got == [{}]


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked: f.Values(2, asked.number + 1, P(1, 10), ()),
        lambda asked: f.Values(3, asked.number, P(1, 10), ()),
        lambda asked: f.Values(2, asked.number, P(1, 10), ((key_of(4), put(4)[1]),)),
        lambda asked: f.Values(2, asked.number, P(1, 10), ((key_of(3), None),) * 2),
        lambda asked: f.Fetch(2, 1, (fmt.META_KEY,)),
        lambda asked: f.Fetch(2, 1, (fmt.POSITION_KEY,)),
        lambda asked: f.Fetch(2, 1, (b"\x55unknown",)),
        lambda asked: f.Fetch(3, 1, ()),
        lambda asked: [f.Fetch(2, 1, (key_of(1),)), f.Fetch(2, 2, (key_of(1),))],
    ],
)
async def test_hostile_words_cut_the_link(autojump_clock, answer):
    async with replica_set() as nodes:
        fill(nodes, "ab", 10)
        led = nodes.lead("a", 2)
        puppet, _ = await puppet_follower(nodes, "a", "b", position=P(1, 10))
        nodes.nursery.start_soon(led.leader.fetch, [key_of(3)])
        spoil(nodes["a"], key_of(3))
        words = answer(await puppet.next(f.Fetch))
        await puppet.send(*(words if isinstance(words, list) else [words]))
        refusal = await puppet.next(f.Refusal)
        assert refusal.code == "protocol"
        await until(lambda: not led.leader.statistics().followers)
        assert led.lost is None


async def test_an_answer_that_nobody_asked_for_cuts_the_link(autojump_clock):
    async with replica_set() as nodes:
        node = nodes["b"]
        fill(nodes, "b", 5)
        puppet = await puppet_leader(nodes, "b", 3, f.BATCHES)
        await puppet.send(f.Values(3, 0, P(1, 5), ()))
        await puppet.next(f.Refusal)
        await until(lambda: node.last is not None)
        assert node.last.reason == "protocol"


# ---- walks


@pytest.mark.parametrize("name", ["a", "b"])
async def test_bad_values_of_every_kind_are_repaired_by_a_walk(autojump_clock, name):
    async with replica_set(scrub_interval=WALK) as nodes:
        led = await three(nodes)
        row = fmt.expiry_key(5_000, 1, 3)
        count = fmt.deliveries_key(1, 3)
        await led.commit([(row, fmt.encode_number(row, 9)), (count, fmt.encode_number(count, 2))])
        records = [(PUT_PRODUCER, ProducerRecord("p", (1, 5))), (PUT_PEER, PeerRecord("north"))]
        await led.commit(led.node.store.encode(records))
        await caught_up(nodes, led, "b", "c")
        whole = content(led.node.store)
        bad = [key_of(3), row, count, fmt.IDS_KEY, fmt.POSITION_KEY, fmt.META_KEY, fmt.history_key(1)]
        bad += [fmt.producer_key("p"), fmt.peer_key("north")]
        meta = nodes[name].copies.backend.get(fmt.META_KEY)
        for key in bad:
            nodes[name].copies.backend.flip(key, 150 if key == fmt.META_KEY else 13)  # type: ignore[attr-defined]
        await trio.sleep(2 * WALK)
        for node in nodes.nodes.values():
            assert content(node.store) == whole
        assert nodes[name].copies.backend.get(fmt.META_KEY) == meta
        scrub = led.leader.statistics().scrub if name == "a" else scrubbed(nodes, name)
        assert (scrub.found, scrub.repaired, scrub.left) == (len(bad), len(bad), 0)
        assert scrub.walks >= 1
        assert led.lost is None
        assert nodes[name].ended == []
        nodes[name].restart()  # what was repaired is on the disk
        assert content(nodes[name].store) == whole


async def test_what_all_copies_have_bad_is_counted_and_stays(autojump_clock):
    async with replica_set(scrub_interval=WALK) as nodes:
        led = await three(nodes)
        bad = [spoil(nodes[name], key_of(3)) for name in "abc"]
        await trio.sleep(4 * WALK)
        for node, value in zip(nodes.nodes.values(), bad, strict=True):
            assert node.copies.backend.get(key_of(3)) == value
        assert led.leader.statistics().scrub.left == 1
        for name in "bc":
            scrub = scrubbed(nodes, name)
            assert (scrub.found, scrub.repaired, scrub.left) == (1, 0, 1)
        nodes["a"].copies.backend.set(*put(3, "old 1"))  # type: ignore[attr-defined]
        await trio.sleep(3 * WALK)
        assert scrubbed(nodes, "b").left == scrubbed(nodes, "c").left == led.leader.statistics().scrub.left == 0
        assert {node.copies.backend.get(key_of(3)) for node in nodes.nodes.values()} == {put(3, "old 1")[1]}


async def test_a_value_that_a_later_batch_changed_is_not_overwritten_by_an_older_one(autojump_clock):
    async with replica_set(scrub_interval=WALK) as nodes:
        node = nodes["b"]
        fill(nodes, "b", 5)
        puppet = await puppet_leader(nodes, "b", 2, f.BATCHES, P(1, 5))
        spoil(node, key_of(3))
        nodes.nursery.start_soon(partial(beat, puppet))
        asked = await puppet.next(f.Fetch)
        newer = put(3, "newer")
        changes = [Store.history_change(2, 6), newer]
        await puppet.send(f.BatchFrame(2, P(2, 6), P(1, 5), f.encode_changes(changes)))
        await puppet.next(f.Answer)
        await puppet.send(f.Values(2, asked.number, P(1, 5), (put(3, "old 1"),)))
        await trio.sleep(2 * WALK)
        assert node.store.backend.get(key_of(3)) == newer[1]
        assert node.current.statistics().scrub.repaired == 0


async def test_a_value_from_ahead_waits_until_this_store_is_there(autojump_clock):
    async with replica_set(scrub_interval=WALK) as nodes:
        node = nodes["b"]
        fill(nodes, "b", 5)
        puppet = await puppet_leader(nodes, "b", 2, f.BATCHES, P(1, 5))
        bad = spoil(node, key_of(3))
        nodes.nursery.start_soon(partial(beat, puppet))
        asked = await puppet.next(f.Fetch)
        await puppet.send(f.Values(2, asked.number, P(2, 6), (put(3, "of batch 6"),)))
        await trio.sleep(1)
        assert node.store.backend.get(key_of(3)) == bad
        await puppet.send(f.BatchFrame(2, P(2, 6), P(1, 5), f.encode_changes([Store.history_change(2, 6), put(7)])))
        await trio.sleep(1)
        assert node.store.backend.get(key_of(3)) == put(3, "of batch 6")[1]


async def test_a_value_from_before_the_bad_one_was_found_is_asked_for_again(autojump_clock):
    async with replica_set(scrub_interval=WALK) as nodes:
        node = nodes["b"]
        fill(nodes, "b", 5)
        puppet = await puppet_leader(nodes, "b", 2, f.BATCHES, P(1, 5))
        bad = spoil(node, key_of(3))
        nodes.nursery.start_soon(partial(beat, puppet))
        asked = await puppet.next(f.Fetch)
        await puppet.send(f.Values(2, asked.number, P(1, 4), (put(3, "older"),)))
        with trio.fail_after(WALK):
            asked = await puppet.next(f.Fetch)
        assert node.store.backend.get(key_of(3)) == bad
        await puppet.send(f.Values(2, asked.number, P(1, 5), (put(3, "right"),)))
        await trio.sleep(1)
        assert node.store.backend.get(key_of(3)) == put(3, "right")[1]


async def beat(puppet) -> None:
    """Keep a follower's link alive."""
    number = 0
    while True:
        number += 1
        await puppet.send(f.Heartbeat(2, number, 0))
        await trio.sleep(0.2)


async def test_walks_go_on_where_they_were_and_keep_their_pace(autojump_clock):
    async with replica_set(scrub_interval=1_000.0, scrub_bytes_per_second=100_000) as nodes:
        led = await three(nodes)
        big = [(key_of(number), fmt.seal(key_of(number), b"\x01" * 300_000)) for number in range(100, 110)]
        for change in big:
            await led.commit([change])
        await trio.sleep(FIRST_WALK)
        began = trio.current_time()
        await until(lambda: scrubbed(nodes, "b").walks == 1, 100)
        assert 20 < trio.current_time() - began < 40
        assert scrubbed(nodes, "b").checked_bytes > 3_000_000


async def test_no_walk_without_an_interval(autojump_clock):
    async with replica_set(scrub_interval=0) as nodes:
        led = await three(nodes)
        spoil(nodes["b"], key_of(3))
        await trio.sleep(3 * FIRST_WALK)
        assert scrubbed(nodes, "b").checked_bytes == led.leader.statistics().scrub.checked_bytes == 0


# ---- what no value can mend


async def test_a_key_that_no_other_copy_has_makes_a_follower_compare_its_store(autojump_clock):
    async with replica_set(scrub_interval=WALK) as nodes:
        led = await three(nodes)
        backend = nodes["b"].copies.backend
        value = backend.get(key_of(3))
        backend.set(key_of(3), None)  # a bit of a key has flipped
        backend.set(key_of(3 + 64), value)
        await until(lambda: nodes["b"].current.swaps == 1)
        await caught_up(nodes, led, "b", "c")
        assert led.registered == []  # the same copy as before: nobody stopped counting on it


async def test_a_key_of_no_known_kind_makes_a_follower_compare_its_store(autojump_clock):
    async with replica_set(scrub_interval=WALK) as nodes:
        led = await three(nodes)
        nodes["b"].copies.backend.set(b"\x60stray", b"value")
        await until(lambda: nodes["b"].current.swaps == 1)
        await caught_up(nodes, led, "b", "c")


def damage(node: Node) -> None:
    """LevelDB can't read a block any more: any iteration over it ends with an error."""
    backend = node.copies.backend
    real = backend.snapshot

    class Damaged:
        def __init__(self) -> None:
            self.inner = real()

        def __enter__(self):
            self.reader = self.inner.__enter__()
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def get(self, key):
            return self.reader.get(key)

        def iterate(self, start, stop):
            for key, value in self.reader.iterate(start, stop):
                if key >= key_of(5):
                    raise StoreDamaged("a block")
                yield key, value

    backend.snapshot = Damaged  # type: ignore[method-assign]


async def test_a_follower_whose_store_can_not_be_read_is_filled_anew_and_the_old_copy_stands_until_then(autojump_clock):
    async with replica_set(scrub_interval=WALK) as nodes:
        led = await three(nodes)
        node = nodes["b"]
        old = node.copies.backend
        incarnation, identity = node.incarnation, node.store.store_id
        damage(node)
        moved: list[bool] = []
        real = node.copies.swap

        def swap(side: Store) -> Store:
            moved.append(node.copies.backend is old)
            return real(side)

        node.copies.swap = swap  # type: ignore[method-assign]
        await until(lambda: bool(moved))
        await caught_up(nodes, led, "b", "c")
        assert moved == [True]
        assert node.copies.backend is not old
        assert (node.incarnation, node.current.store.store_id) == (incarnation, identity)
        assert led.registered == []


async def test_a_follower_with_a_bad_block_is_filled_anew_and_nothing_is_written_to_it(autojump_clock):
    """LevelDB refuses writes when it comes to rewrite the block's table, whatever was done about the values in it."""
    async with replica_set(scrub_interval=WALK) as nodes:
        led = await three(nodes)
        node = nodes["b"]
        spoil(node, key_of(3))
        old = node.copies.backend
        old.unverified_reads = 1
        written: list[object] = []
        old.write = lambda batch, sync: written.append(batch)  # type: ignore[method-assign]
        await until(lambda: node.copies.backend is not old)
        await caught_up(nodes, led, "b", "c")
        assert not written


async def test_a_learner_copies_a_side_that_can_not_be_read_from_nothing_the_next_time(autojump_clock):
    """Catching up by difference reads the whole copy: damage must not end it again and again."""
    async with replica_set() as nodes:
        fill(nodes, "abc", 20)
        fill(nodes, "b", 3, epoch=9, start=21)
        led = nodes.lead("a", 10)
        nodes.follow("c", "a", 10)
        await led.begin()
        node = nodes["b"]
        make, made = node.copies.begin_side, []

        def begin_side(store: Store, empty: bool = False) -> Store:
            made.append(empty)
            side = make(store, empty)
            if not empty:
                backend = node.copies.side
                node.copies.backend, keep = backend, node.copies.backend
                damage(node)
                node.copies.backend = keep
            return side

        node.copies.begin_side = begin_side  # type: ignore[method-assign]
        nodes.follow("b", "a", 10)
        await caught_up(nodes, led, "b", "c")
        assert made == [False, True]
