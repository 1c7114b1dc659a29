"""Announcers and listeners on a network in memory, on virtual time: loss, delay, cuts, a network that is down, replays."""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from pybroker.cluster.announcements import GONE, Announcement, Reason, decode, encode
from pybroker.cluster.announcer import GONE_REPEATS, Announcer, listen_for_peers
from pybroker.cluster.datagrams import Copies, Datagrams, Segment
from pybroker.cluster.discovery import Discovery
from pybroker.cluster.peers import PeerTable, Snapshot
from pybroker.errors import ConfigurationError

DISCOVERY = Discovery()


class Network:
    """A segment, with what runs at it."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.segment = Segment()
        self.tables: dict[str, PeerTable] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self.announcers: dict[str, Announcer] = {}
        self.heard: list[tuple[float, bytes]] = []
        self._nursery = nursery

    async def listen(self, host: str, discovery: Discovery = DISCOVERY, **options: Any) -> PeerTable:
        table = self.tables[host] = PeerTable()
        await self._nursery.start(
            lambda task_status: listen_for_peers(
                discovery, table, open_datagrams=self.segment.open_at(host), task_status=task_status, **options
            )
        )
        return table

    async def announce(
        self,
        name: str,
        port: int = 1,
        discovery: Discovery = DISCOVERY,
        *,
        node: str = "",
        epoch: int = 0,
        **options: Any,
    ) -> Announcer:
        announcer = Announcer(
            discovery,
            name=name,
            node=node or name,
            epoch=epoch,
            urls=[f"pybroker://{name}:{port}"],
            open_datagrams=self.segment.open_at(node or name),
            **options,
        )
        self.announcers[node or name] = announcer
        scope = self.scopes[node or name] = trio.CancelScope()

        async def run(task_status: trio.TaskStatus[None]) -> None:
            with scope:
                await announcer.run(task_status=task_status)

        await self._nursery.start(run)
        return announcer

    async def record(self) -> None:
        """All that is sent, from now on, with its time."""
        place = self.segment.open_at("recorder")(DISCOVERY, listen=True)

        async def run() -> None:
            while True:
                data = await place.receive()
                self.heard.append((trio.current_time(), data))

        self._nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()


@asynccontextmanager
async def network() -> AsyncIterator[Network]:
    async with trio.open_nursery() as nursery:
        yield Network(nursery)
        nursery.cancel_scope.cancel()


def urls_of(snapshot: Snapshot) -> dict[str, tuple[str, ...]]:
    return {name: peer.urls for name, peer in snapshot.peers.items()}


async def until(table: PeerTable, condition: Callable[[Snapshot], bool]) -> float:
    """Wait for it, at most some seconds; how long that was."""
    began = trio.current_time()
    with trio.fail_after(30):
        snapshot = table.snapshot()
        while not condition(snapshot):
            snapshot = await table.wait_change(snapshot.version)
    return trio.current_time() - began


async def test_at_start_every_interval_and_gone(autojump_clock: trio.testing.MockClock):
    async with network() as net:
        await net.record()
        began = trio.current_time()
        await net.announce("a")
        await trio.sleep(1.75)
        net.scopes["a"].cancel()
        await trio.testing.wait_all_tasks_blocked()
        said = [(at - began, decode(data, "default", None)) for at, data in net.heard]
        assert [at for at, _ in said] == [0.0, 0.5, 1.0, 1.5] + [1.75] * GONE_REPEATS
        assert [one.counter for _, one in said] == list(range(1, 5 + GONE_REPEATS))
        assert [one.kind for _, one in said] == ["here"] * 4 + ["gone"] * GONE_REPEATS
        assert len({one.boot for _, one in said}) == 1


async def test_others_see_it_at_once_and_its_going(autojump_clock: trio.testing.MockClock):
    async with network() as net:
        table = await net.listen("b")
        await net.announce("a")
        assert await until(table, lambda snapshot: "a" in snapshot.peers) == 0
        await trio.sleep(60)
        assert urls_of(table.snapshot()) == {"a": ("pybroker://a:1",)}
        net.scopes["a"].cancel()
        assert await until(table, lambda snapshot: not snapshot.peers) == 0


async def test_a_change_is_said_at_once(autojump_clock: trio.testing.MockClock):
    async with network() as net:
        table = await net.listen("b")
        announcer = await net.announce("a", epoch=1)
        await until(table, lambda snapshot: "a" in snapshot.peers)
        await trio.sleep(0.1)
        announcer.changed(urls=["pybroker://a:2"])
        announcer.changed(epoch=2)
        sent = net.segment.sent
        assert await until(table, lambda snapshot: snapshot.peers["a"].epoch == 2) == 0
        assert urls_of(table.snapshot()) == {"a": ("pybroker://a:2",)}
        assert net.segment.sent == sent + 1
        with pytest.raises(ConfigurationError):
            announcer.changed(urls=["stomp://a:1"])
        await trio.sleep(1)
        assert urls_of(table.snapshot()) == {"a": ("pybroker://a:2",)}


async def test_who_is_killed_expires(autojump_clock: trio.testing.MockClock):
    async with network() as net:
        table = await net.listen("b")
        await net.announce("a")
        await until(table, lambda snapshot: "a" in snapshot.peers)
        await trio.sleep(0.6)
        net.segment.cut(["a"], ["b"])
        assert await until(table, lambda snapshot: not snapshot.peers) == pytest.approx(4.9)
        net.segment.heal()
        assert await until(table, lambda snapshot: bool(snapshot.peers)) <= 0.5


async def test_a_listener_that_comes_later_knows_all_within_an_interval(autojump_clock: trio.testing.MockClock):
    async with network() as net:
        for name in "abcdef":
            await net.announce(name)
            await trio.sleep(0.07)
        table = await net.listen("z")
        assert await until(table, lambda snapshot: len(snapshot.peers) == 6) <= 0.5


async def test_two_groups_on_one_address_do_not_see_each_other(autojump_clock: trio.testing.MockClock):
    async with network() as net:
        one, two = await net.listen("x", group="one"), await net.listen("y", Discovery(group="two"))
        await net.announce("a", group="one")
        await net.announce("b", discovery=Discovery(group="two"))
        await until(one, lambda snapshot: bool(snapshot.peers))
        await until(two, lambda snapshot: bool(snapshot.peers))
        await trio.sleep(3)
        assert (set(one.snapshot().peers), set(two.snapshot().peers)) == ({"a"}, {"b"})
        assert one.dropped[Reason.GROUP] > 3
        assert two.dropped[Reason.GROUP] > 3


async def test_secrets_are_the_same_or_nobody_is_heard(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
):
    async with network() as net:
        for host, secret in (("x", ""), ("y", "hunter2"), ("z", "hunter3")):
            await net.listen(host, secret=secret)
        await net.announce("plain")
        await net.announce("signed", secret="hunter2")
        await trio.sleep(3)
        assert {host: set(table.snapshot().peers) for host, table in net.tables.items()} == {
            "x": {"plain"},
            "y": {"signed"},
            "z": set(),
        }
        assert set(net.tables["x"].dropped) == {Reason.SIGNED}
        assert set(net.tables["y"].dropped) == {Reason.UNSIGNED}
        assert set(net.tables["z"].dropped) == {Reason.UNSIGNED, Reason.FORGED}
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 4  # once for each kind at each listener
    assert all("secret" in line and "hunter" not in line for line in told)


async def test_a_broker_does_not_hear_itself(autojump_clock: trio.testing.MockClock):
    async with network() as net:
        boot = b"o" * 16
        table = await net.listen("a", own_boots={boot})
        await net.announce("a", epoch=1, boot=boot)
        await trio.sleep(6)
        assert table.snapshot().peers == {}
        assert table.dropped[Reason.OWN] > 3


async def test_a_set_s_new_leader_takes_the_place_of_the_old_one_which_still_speaks(
    autojump_clock: trio.testing.MockClock,
):
    async with network() as net:
        table = await net.listen("z")
        await net.announce("ward", node="one", epoch=1)
        await until(table, lambda snapshot: bool(snapshot.peers))
        await net.announce("ward", node="two", epoch=2)
        assert await until(table, lambda snapshot: snapshot.peers["ward"].node == "two") == 0
        version = table.snapshot().version
        await trio.sleep(3)
        net.scopes["one"].cancel()  # it says that it is gone, and means itself
        await trio.sleep(3)
        assert table.snapshot().version == version
        assert table.snapshot().peers["ward"].node == "two"


@pytest.mark.parametrize("seed", range(10))
async def test_on_a_bad_network_the_table_is_right_soon_after(autojump_clock: trio.testing.MockClock, seed: int):
    """Half of all datagrams lost, the others late, twice, and out of order."""
    choice = random.Random(seed)

    def fate(sender: str, receiver: str, data: bytes) -> Copies:
        return Copies(tuple(choice.uniform(0, 2) for _ in range(choice.choice([0, 0, 1, 2]))))

    async with network() as net:
        table = await net.listen("z")
        net.segment.fate = fate
        for round_ in range(5):
            for name in "abc":
                if name in net.scopes and choice.random() < 0.5:
                    net.scopes.pop(name).cancel()
                elif name not in net.scopes:
                    await net.announce(name, 1 + round_)
            await trio.sleep(choice.uniform(0, 3))
        await trio.sleep(2)  # what is still under way
        net.segment.fate = lambda sender, receiver, data: Copies()
        await trio.sleep(5.1)
        expected = {name: net.announcers[name]._said.urls for name in net.scopes}
        assert urls_of(table.snapshot()) == expected


# ---- who records and replays


async def test_a_replayed_gone_takes_nobody_away(autojump_clock: trio.testing.MockClock):
    async with network() as net:
        await net.record()
        await net.announce("a", secret="hunter2")
        await trio.sleep(0.1)
        net.scopes["a"].cancel()
        await trio.testing.wait_all_tasks_blocked()
        recorded = [data for _, data in net.heard]
        assert GONE in {decode(data, "default", b"hunter2").kind for data in recorded}
        table = await net.listen("z", secret="hunter2")  # it was away, and never heard them
        await net.announce("a", 2, secret="hunter2")
        await until(table, lambda snapshot: bool(snapshot.peers))
        version = table.snapshot().version
        for data in recorded[1:] * 3:
            net.segment.inject(data, DISCOVERY)
        await trio.sleep(0.1)
        assert table.snapshot().version == version
        assert table.dropped[Reason.REPLAYED] == 2 * GONE_REPEATS


async def test_a_whole_replayed_life_hides_a_live_peer_for_less_than_an_interval_and_once(
    autojump_clock: trio.testing.MockClock,
):
    async with network() as net:
        await net.record()
        await net.announce("a", secret="hunter2")
        await trio.sleep(0.1)
        net.scopes["a"].cancel()
        await trio.testing.wait_all_tasks_blocked()
        recorded = [data for _, data in net.heard]
        table = await net.listen("z", secret="hunter2")
        await net.announce("a", 2, secret="hunter2")
        await until(table, lambda snapshot: bool(snapshot.peers))
        for data in recorded:
            net.segment.inject(data, DISCOVERY)
        await until(table, lambda snapshot: not snapshot.peers)
        assert await until(table, lambda snapshot: bool(snapshot.peers)) <= 0.5
        assert urls_of(table.snapshot()) == {"a": ("pybroker://a:2",)}
        version = table.snapshot().version
        for data in recorded:
            net.segment.inject(data, DISCOVERY)
        await trio.sleep(3)
        assert table.snapshot().version == version


async def test_garbage_is_counted_and_heard_no_more(autojump_clock: trio.testing.MockClock):
    choice = random.Random(0)
    async with network() as net:
        table = await net.listen("z")
        await net.announce("a")
        for size in range(200):
            net.segment.inject(choice.randbytes(size * 10), DISCOVERY)
            await trio.testing.wait_all_tasks_blocked()
        assert set(table.snapshot().peers) == {"a"}
        assert table.dropped[Reason.OVERSIZED] == 59
        assert sum(table.dropped.values()) == 200


# ---- the network is down


async def test_a_network_that_is_down_is_told_once_and_tried_again(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    async with network() as net:
        net.segment.take_down("a")
        net.segment.take_down("z")
        table = await net.listen("z")
        await net.announce("a")
        await trio.sleep(60)
        assert len(caplog.records) == 2
        net.segment.bring_up("a")
        net.segment.bring_up("z")
        assert await until(table, lambda snapshot: bool(snapshot.peers)) <= 1.0
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2 + ["INFO"] * 2
        await trio.sleep(6)
        net.segment.take_down("z")
        await until(table, lambda snapshot: not snapshot.peers)
        net.segment.bring_up("z")
        assert await until(table, lambda snapshot: bool(snapshot.peers)) <= 1.0
        net.segment.take_down("a")
        await until(table, lambda snapshot: not snapshot.peers)
        net.segment.bring_up("a")
        assert await until(table, lambda snapshot: bool(snapshot.peers)) <= 0.5
        assert len(caplog.records) == 8


async def test_sockets_that_hear_nothing_more_are_opened_anew(autojump_clock: trio.testing.MockClock):
    """A membership that was lost with its interface is told by nobody."""
    async with network() as net:
        opened: list[Datagrams] = []

        def open_deaf_once(discovery: Discovery, *, listen: bool) -> Datagrams:
            place = net.segment.open_at("z")(discovery, listen=listen)
            if not opened:
                net.segment.remove(place)  # type: ignore[arg-type]
            opened.append(place)
            return place

        table = PeerTable()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: listen_for_peers(DISCOVERY, table, open_datagrams=open_deaf_once))
            await net.announce("a")
            assert await until(table, lambda snapshot: bool(snapshot.peers)) <= 5.5
            await trio.sleep(60)
            assert len(opened) == 2
            nursery.cancel_scope.cancel()


async def test_leaving_is_bounded_while_nothing_can_be_sent(autojump_clock: trio.testing.MockClock):
    class Stuck:
        sent = 0
        closed = False

        async def send(self, data: bytes) -> None:
            self.sent += 1
            if self.sent > 1:
                await trio.sleep_forever()

        async def receive(self) -> bytes:
            raise AssertionError

        def close(self) -> None:
            self.closed = True

    stuck = Stuck()
    announcer = Announcer(
        DISCOVERY,
        name="a",
        node="a",
        epoch=0,
        urls=["pybroker://a:1"],
        open_datagrams=lambda discovery, *, listen: stuck,
    )
    began = trio.current_time()
    with trio.move_on_after(0.1):
        await announcer.run()
    assert trio.current_time() - began == pytest.approx(1.1)
    assert stuck.closed


async def test_cancelled_before_the_first_word_it_says_nothing(autojump_clock: trio.testing.MockClock):
    segment = Segment()
    announcer = Announcer(
        DISCOVERY, name="a", node="a", epoch=0, urls=["pybroker://a:1"], open_datagrams=segment.open_at("a")
    )
    with trio.CancelScope() as scope:
        scope.cancel()
        await announcer.run()
    assert segment.sent in (0, GONE_REPEATS)  # "gone" of who never was there harms nobody


def test_what_can_not_be_announced_is_refused_at_once():
    fields: dict[str, Any] = {"name": "a", "node": "a", "epoch": 0, "urls": ["pybroker://a:1"]}
    for wrong in (
        {"name": ""},
        {"urls": []},
        {"urls": ["pybroker://" + ".".join(["h" * 60, *["h" * 59] * 3]) + f":{port}" for port in range(1, 9)]},
    ):
        with pytest.raises(ConfigurationError):
            Announcer(DISCOVERY, **{**fields, **wrong})


def test_an_announcement_that_fits_only_in_its_youth_is_refused():
    urls = ["pybroker://" + ".".join(["h" * 60, *["h" * 59] * 3]) + f":{port}" for port in range(1, 6)]
    short = next(
        size
        for size in range(200, 0, -1)
        if _fits(Announcement("n" * size, "n", 0, tuple(urls), b"b" * 16, 0)) and size
    )
    with pytest.raises(ConfigurationError, match="1400 fit"):
        Announcer(DISCOVERY, name="n" * short, node="n", epoch=0, urls=urls)


def _fits(announcement: Announcement) -> bool:
    try:
        encode(announcement, "default", None)
    except ConfigurationError:
        return False
    return True
