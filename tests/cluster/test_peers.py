"""The table of peers: who replaces whom, expiry, and those who watch it. On virtual time."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from pybroker.cluster.announcements import GONE, HERE, Announcement, Reason
from pybroker.cluster.peers import Peer, PeerTable, Snapshot

URLS = ("pybroker://a:1",)
OTHER_URLS = ("pybroker://b:2",)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def announcement(
    name: str = "ward",
    node: str = "one",
    epoch: int = 5,
    boot: int = 1,
    kind: str = HERE,
    urls: tuple[str, ...] = URLS,
) -> Announcement:
    return Announcement(name, node, epoch, urls, bytes([boot]) * 16, 0, kind)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> PeerTable:
    return PeerTable(5.0, 3, clock=clock)


def shown(table: PeerTable) -> dict[str, tuple[str, int, tuple[str, ...]]]:
    return {name: (peer.node, peer.epoch, peer.urls) for name, peer in table.snapshot().peers.items()}


# ---- who replaces whom


def test_one_who_is_here_and_gone(table: PeerTable, clock: Clock):
    assert table.snapshot() == Snapshot(0, {})
    assert table.apply(announcement()) is None
    assert table.snapshot() == Snapshot(1, {"ward": Peer("ward", "one", 5, URLS, 100.0, b"\1" * 16)})
    clock.now += 1
    assert table.apply(announcement()) is None
    assert table.snapshot() == Snapshot(1, {"ward": Peer("ward", "one", 5, URLS, 101.0, b"\1" * 16)})
    assert table.apply(announcement(kind=GONE, urls=())) is None
    assert table.snapshot() == Snapshot(2, {})
    assert not table.dropped


def test_a_snapshot_is_no_window(table: PeerTable):
    before = table.snapshot()
    table.apply(announcement())
    assert before == Snapshot(0, {})
    with pytest.raises(TypeError):
        table.snapshot().peers["x"] = table.snapshot().peers["ward"]  # type: ignore[index]


def test_a_change_of_urls_and_a_restart_replace(table: PeerTable):
    table.apply(announcement())
    assert table.apply(announcement(urls=OTHER_URLS)) is None
    assert shown(table) == {"ward": ("one", 5, OTHER_URLS)}
    assert table.apply(announcement(boot=2)) is None
    assert table.snapshot().peers["ward"].boot == b"\2" * 16
    assert table.snapshot().version == 3


def test_a_set_s_newer_leader_replaces_and_is_not_replaced(table: PeerTable):
    table.apply(announcement(epoch=5))
    assert table.apply(announcement(node="two", epoch=6, urls=OTHER_URLS)) is None
    assert table.apply(announcement(epoch=5)) is Reason.EPOCH
    assert table.apply(announcement(epoch=5, kind=GONE)) is Reason.EPOCH
    assert shown(table) == {"ward": ("two", 6, OTHER_URLS)}
    assert table.dropped == {Reason.EPOCH: 2}


def test_a_newer_leader_that_is_gone_leaves_no_room_for_the_one_before(table: PeerTable, clock: Clock):
    table.apply(announcement(epoch=5))
    assert table.apply(announcement(node="two", epoch=6, kind=GONE)) is None
    assert shown(table) == {}
    assert table.apply(announcement(epoch=5)) is Reason.EPOCH
    assert shown(table) == {}
    clock.now += 5
    assert table.apply(announcement(epoch=5)) is None  # the set was made anew, perhaps
    assert shown(table) == {"ward": ("one", 5, URLS)}


def test_gone_counts_only_from_the_same_boot_or_a_newer_epoch(table: PeerTable):
    table.apply(announcement(boot=2))
    assert table.apply(announcement(boot=1, kind=GONE)) is None  # an earlier life's, heard late
    assert shown(table) == {"ward": ("one", 5, URLS)}
    assert table.apply(announcement(node="two", kind=GONE)) is Reason.NAME
    assert shown(table) == {"ward": ("one", 5, URLS)}
    assert table.apply(announcement(boot=2, kind=GONE)) is None
    assert shown(table) == {}


def test_gone_of_a_stranger_is_nothing(table: PeerTable):
    assert table.apply(announcement(kind=GONE)) is None
    assert table.snapshot() == Snapshot(0, {})
    assert table.apply(announcement()) is None
    assert shown(table) == {"ward": ("one", 5, URLS)}


def test_two_brokers_of_one_name_do_not_take_turns(table: PeerTable, clock: Clock):
    table.apply(announcement())
    for _ in range(3):
        clock.now += 1
        assert table.apply(announcement(node="two", urls=OTHER_URLS)) is Reason.NAME
        assert table.apply(announcement()) is None
    assert shown(table) == {"ward": ("one", 5, URLS)}
    assert table.snapshot().version == 1
    clock.now += 5
    assert table.apply(announcement(node="two", urls=OTHER_URLS)) is None
    assert shown(table) == {"ward": ("two", 5, OTHER_URLS)}


def test_our_own_name_is_no_peer(clock: Clock):
    table = PeerTable(own_name="ward", own_epoch=5, clock=clock)
    assert table.apply(announcement(epoch=4)) is Reason.OWN
    assert table.apply(announcement(epoch=6)) is Reason.OWN
    assert table.apply(announcement(epoch=5)) is Reason.NAME
    assert shown(table) == {}


def test_the_table_is_bounded_and_those_in_it_stay(table: PeerTable, clock: Clock):
    for name in "abc":
        assert table.apply(announcement(name)) is None
    assert table.apply(announcement("d")) is Reason.FULL
    assert table.apply(announcement("a", epoch=6)) is None
    assert table.apply(announcement("b", kind=GONE)) is None
    assert table.apply(announcement("d")) is None
    assert set(shown(table)) == {"a", "c", "d"}
    clock.now += 5
    for count in range(100):
        assert table.apply(announcement(f"stranger-{count}", kind=GONE)) is None
    assert len(table._left) == 3


# ---- expiry


def test_who_is_unheard_of_for_the_timeout_is_gone(table: PeerTable, clock: Clock):
    table.apply(announcement("a"))
    clock.now += 3
    table.apply(announcement("b"))
    clock.now += 1.999
    assert set(shown(table)) == {"a", "b"}
    clock.now += 0.001
    assert set(shown(table)) == {"b"}
    clock.now += 100
    assert shown(table) == {}


async def test_those_who_watch_see_each_change(autojump_clock: trio.testing.MockClock):
    table = PeerTable(5.0)
    seen: list[tuple[float, list[str]]] = []

    async def watch() -> None:
        snapshot = table.snapshot()
        while True:
            snapshot = await table.wait_change(snapshot.version)
            seen.append((trio.current_time() - began, sorted(snapshot.peers)))

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(table.run_expiry)
        nursery.start_soon(watch)
        await trio.sleep(1)
        table.apply(announcement("a"))
        await trio.sleep(1)
        table.apply(announcement("a"))  # no change
        table.apply(announcement("b"))
        await trio.sleep(1)
        table.apply(announcement("c"))
        table.apply(announcement("c", kind=GONE))  # between two looks: nobody has to see it
        await trio.sleep(2)
        table.apply(announcement("b"))
        await trio.sleep(20)
        table.apply(announcement("d"))
        await trio.sleep(20)
        nursery.cancel_scope.cancel()
    assert seen == [
        (1.0, ["a"]),
        (2.0, ["a", "b"]),
        (3.0, ["a", "b"]),
        (7.0, ["b"]),
        (10.0, []),
        (25.0, ["d"]),
        (30.0, []),
    ]


async def test_a_change_that_was_missed_is_seen_at_once(autojump_clock: trio.testing.MockClock):
    table = PeerTable()
    version = table.snapshot().version
    table.apply(announcement())
    with trio.fail_after(0):
        assert set((await table.wait_change(version)).peers) == {"ward"}


async def test_a_watcher_that_is_cancelled_leaves_nothing(autojump_clock: trio.testing.MockClock):
    table = PeerTable()
    with trio.move_on_after(1) as scope:
        await table.wait_change(table.snapshot().version)
    assert scope.cancelled_caught
    table.apply(announcement())
    assert set((await table.wait_change(0)).peers) == {"ward"}


# ---- against a model


steps = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 4.0, 5.0]),
        st.builds(
            announcement,
            st.sampled_from("ab"),
            st.sampled_from(["one", "two"]),
            st.integers(1, 3),
            st.integers(1, 2),
            st.sampled_from([HERE, HERE, HERE, GONE]),
            st.sampled_from([URLS, OTHER_URLS]),
        ),
    ),
    max_size=30,
)


@given(steps)
def test_against_the_whole_history(heard: list[tuple[float, Announcement]]):
    """The table is what a slow reading of all that was heard within the timeout says."""
    clock = Clock()
    table = PeerTable(5.0, clock=clock)
    history: list[tuple[float, Announcement]] = []
    for wait, said in heard:
        clock.now += wait
        taken = table.apply(said) is None
        if taken:
            history.append((clock.now, said))
        recent = [(at, one) for at, one in history if at + 5.0 > clock.now]
        expected: dict[str, tuple[str, int, tuple[str, ...]]] = {}
        for name in "ab":
            of_name = [one for _, one in recent if one.name == name]
            top = max((one.epoch for one in of_name), default=0)
            here: Announcement | None = None
            for one in of_name:
                if one.epoch != top:
                    continue
                if one.kind == HERE:
                    here = one
                elif here is not None and (here.node, here.boot) == (one.node, one.boot):
                    here = None
            if here is not None:
                expected[name] = here.node, here.epoch, here.urls
        assert shown(table) == expected
