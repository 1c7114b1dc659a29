"""Which links there are: who dials, which of two stays, who is refused, and that a link which dies is dialled again."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import pytest
import trio

from pybroker.errors import NotLeader
from pybroker.link_connection import BROKEN, SILENT
from tests.network.brokers import DISCOVERY, World, two, url, world

Q = "/queue/q"


def the_state(world: World, place: str, peer: str) -> str:
    state: str = world.nodes[place].status()[peer]["state"]
    return state


async def test_a_dialled_peer_is_linked_at_both_ends(autojump_clock: trio.abc.Clock) -> None:
    async with two() as (network, a, b):
        assert a.status()["b"]["state"] == b.status()["a"]["state"] == "linked"
        assert a.status()["b"]["address"] == url("b")
        assert b.status()["a"]["address"] == "it has dialled"
        assert network.dials == {("a", "b"): 1}
        assert a.members == b.members == {"a": (url("a"),), "b": (url("b"),)}
        await trio.sleep(600)
        assert network.dials == {("a", "b"): 1}


async def test_a_peer_that_is_not_there_is_dialled_with_growing_pauses(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        a, b = network.add("a", ["b"]), network.add("b")
        await a.start()
        await trio.sleep(60)
        times = network.dial_times
        pauses = [after - before for before, after in itertools.pairwise(times)]
        most = [min(0.2 * 2**number, 5.0) for number in range(len(pauses))]
        assert all(bound / 2 <= pause <= bound + 0.001 for pause, bound in zip(pauses, most, strict=True)), pauses
        assert len({round(pause, 3) for pause in pauses[6:]}) > 3  # they are not all the same
        assert the_state(network, "a", url("b")) == "dialling"
        assert a.status()[url("b")]["trouble"] == f"{url('b')}: b is not there"
        await b.start()
        await network.wait_linked(("a", "b"), seconds=5.1)


async def test_the_pause_is_short_again_after_a_link(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        a, b = network.add("a", ["b"]), network.add("b")
        await a.start()
        await trio.sleep(60)
        await b.start()
        await network.wait_linked(("a", "b"))
        network.cut_all("b")
        began = trio.current_time()
        await network.wait(lambda: len(network.wires) == 2)
        assert trio.current_time() - began < 0.25
        await network.wait_linked(("a", "b"))


@pytest.mark.parametrize("fault", ["cut", "hold"])
async def test_a_link_that_dies_at_any_byte_of_its_hand_shake_is_dialled_again(
    autojump_clock: trio.abc.Clock, fault: str
) -> None:
    """ActiveMQ's bridge died silently in its hand-shake, and stayed dead until it was restarted by hand."""
    async with two() as (network, a, b):
        await b.send("/queue/other", "x")
        whole = network.wires[0].passed
    assert 500 < whole < 2_000
    for limit in range(1, whole + 20, 7):
        async with world() as network:
            network.plan = lambda number, source, target, limit=limit: (limit, fault) if number == 1 else None
            a, b = network.add("a", ["b"]), network.add("b")
            await b.start()
            await a.start()
            await network.wait(lambda: len(network.wires) == 2, 11.0)  # the limit of a hand-shake, or a silence
            await network.wait_linked(("a", "b"))
            async with b.consuming(Q, []) as found:
                await a.send(Q, "1")
                await network.wait(lambda: found == ["1"])
            network.check()


async def test_a_peer_that_goes_silent_is_noticed_at_both_ends(autojump_clock: trio.abc.Clock) -> None:
    async with two() as (network, a, b):
        network.wires[0].hold()
        began = trio.current_time()
        await network.wait(lambda: not a.linked() and not b.linked())
        assert 2.4 < trio.current_time() - began < 3.6
        await network.wait_linked(("a", "b"))
        assert len(network.wires) == 2


@pytest.mark.parametrize("knows", ["a", "b"])
async def test_an_end_that_alone_knows_that_the_link_broke_gets_another(
    autojump_clock: trio.abc.Clock, knows: str
) -> None:
    """Whoever dials again is right: the other end's link is dead, though it does not know it yet."""
    async with two() as (network, a, b):
        first = b.network._links["a"]
        network.wires[0].break_for(knows)
        await network.wait(lambda: len(network.wires) == 2)
        await network.wait_linked(("a", "b"))
        await network.wait(lambda: b.network._links.get("a") not in (None, first), 1.0)
        if knows == "a":
            assert first.code == "replaced"
        async with a.consuming(Q, []) as found:
            await b.send(Q, "1", "2")
            await network.wait(lambda: found == ["1", "2"])


async def test_of_two_that_dial_each_other_the_lower_names_link_stays(autojump_clock: trio.abc.Clock) -> None:
    for order in ("ab", "ba"):
        async with world() as network:
            network.add("a", ["b"])
            network.add("b", ["a"])
            for name in order:
                await network.nodes[name].start()
            await network.wait_linked(("a", "b"))
            await trio.sleep(20)
            open_now = [wire for wire in network.wires if not wire.pipes[0].ended and not wire.pipes[1].ended]
            assert len(open_now) == 1
            await network.wait_linked(("a", "b"))
            before = len(network.wires)
            await trio.sleep(600)
            assert len(network.wires) == before  # and there is peace


async def test_both_dialling_at_the_very_same_moment_end_with_one_link(autojump_clock: trio.abc.Clock) -> None:
    for number in range(20):
        async with world() as network:
            a, b = network.add("a", ["b"], place=f"x{number}"), network.add("b", [f"x{number}"])
            async with trio.open_nursery() as starting:
                starting.start_soon(a.start)
                starting.start_soon(b.start)
            await network.wait(lambda: a.linked() == {"b"} and b.linked() == {"a"})  # noqa: B023
            await trio.sleep(10)
            assert a.network._links["b"].dialled
            assert not b.network._links["a"].dialled
            async with a.consuming(Q, []) as found:
                await b.send(Q, "1")
                await network.wait(lambda: found == ["1"])


async def test_a_peer_that_was_restarted_replaces_the_link_with_its_earlier_life(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with world() as network:
        a, b = network.add("a"), network.add("b", ["a"])
        await a.start()
        await b.start()
        await network.wait_linked(("a", "b"))
        old = a.network._links["b"]
        b.scope.cancel()
        await b.ended.wait()
        network.wires[0].let_go()
        for pipe in network.wires[0].pipes:
            pipe.ended = False
            pipe.held = True  # "a" does not hear of it
        await b.start()
        await network.wait(lambda: a.network._links.get("b") not in (None, old), 1.0)
        assert old.code in ("replaced", BROKEN)
        await network.wait_linked(("a", "b"))


async def test_an_earlier_leader_does_not_replace_a_later_one(autojump_clock: trio.abc.Clock) -> None:
    """Two replicas of the set "s", both of which think that they lead: the later one's link stays."""
    async with world() as network:
        a = network.add("a")
        later = network.add("s", ["a"], place="s2")
        earlier = network.add("s", ["a"], place="s1")
        later.epoch, earlier.epoch = 7, 6
        await a.start()
        await earlier.start()
        await network.wait(lambda: a.linked() == {"s"})
        await later.start()
        await network.wait(lambda: a.network._links["s"].peer.epoch == 7)
        await trio.sleep(20)
        assert a.network._links["s"].peer.epoch == 7
        assert "linked with a later leader" in earlier.status()["a"]["trouble"]
        assert later.linked() == {"a"}


async def test_a_set_is_dialled_where_it_leads_now(autojump_clock: trio.abc.Clock) -> None:
    """A static peer with all addresses of the set: the first one that answers has the link, and so after each hand-over."""
    async with world() as network:
        a = network.add("a", ())
        object.__setattr__(a.config.network, "peers", (f"{url('s1')},{url('s2')},{url('s3')}",))
        for number in (1, 2, 3):
            network.add("s", place=f"s{number}").epoch = number
        await a.start()
        for place in ("s2", "s1", "s3"):
            node = network.nodes[place]
            await node.start()
            await network.wait_linked(("a", place), seconds=6.0)
            assert a.network._links["s"].address == url(place)
            await node.stop()


async def test_a_replica_that_does_not_lead_says_where_to_go(autojump_clock: trio.abc.Clock) -> None:
    """Only one address of the set was given, and its leader is elsewhere."""
    async with world() as network:
        a = network.add("a", ["s1"])
        s1, s2 = network.add("s", place="s1"), network.add("s", place="s2")
        for node in (s1, s2, a):
            await node.start()
        await network.wait_linked(("a", "s1"))
        s1.engine.fail(NotLeader("s2 leads", "s2", ("stomp://s2:61613", url("s2"))))
        await network.wait_linked(("a", "s2"), seconds=1.0)
        assert a.network._links["s"].address == url("s2")


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"secret": "one"}, {"secret": "two"}, "different secrets"),
        ({"secret": "one"}, {"secret": ""}, "one broker has a secret and the other has none"),
        ({"secret": ""}, {"secret": "two"}, "one broker has a secret and the other has none"),
        ({"group": "x"}, {"group": "y"}, "network.group must be the same"),
    ],
)
async def test_who_does_not_belong_here_is_refused_and_told_why(
    autojump_clock: trio.abc.Clock, caplog: pytest.LogCaptureFixture, ours: Any, theirs: Any, said: str
) -> None:
    caplog.set_level(logging.INFO, "pybroker.network")
    async with world() as network:
        a, b = network.add("a", ["b"], **ours), network.add("b", **theirs)
        await b.start()
        await a.start()
        await a.send(Q, "mine")
        await trio.sleep(60)
        assert not a.linked()
        assert not b.linked()
        assert said in a.status()[url("b")]["trouble"]
        assert b.status() == {}
        assert 8 < network.dials["a", "b"] < 25
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1  # once, though it is tried again and again
    assert said in told[0].getMessage()


async def test_two_brokers_of_one_name_are_told_so(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        a, _ = network.add("a", ["other"]), network.add("a", place="other")
        await network.nodes["other"].start()
        await a.start()
        await trio.sleep(10)
        assert "two brokers of the network are called 'a'" in a.status()[url("other")]["trouble"]
        assert not a.linked()


async def test_a_broker_that_dials_itself_leaves_it_at_that(autojump_clock: trio.abc.Clock) -> None:
    """One list of peers for all brokers is the simplest configuration; each finds itself on it."""
    async with world() as network:
        a, b = network.add("a", ["a", "b"]), network.add("b", ["a", "b"])
        await a.start()
        await b.start()
        await network.wait_linked(("a", "b"))
        await trio.sleep(60)
        assert network.dials["a", "a"] == network.dials["b", "b"] == 1
        assert a.linked() == {"b"}
        assert set(a.status()) == {"b"}


async def test_a_broker_with_too_many_peers_refuses_more(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        hub = network.add("hub", peers_max=2)
        await hub.start()
        for name in "abc":
            await network.add(name, ["hub"]).start()
            await trio.sleep(1)
        assert hub.linked() == {"a", "b"}
        assert "network.peers_max is 2" in network.nodes["c"].status()["hub"]["trouble"]


async def test_a_broker_that_lets_nobody_in_lets_no_link_in_without_a_secret(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        a = network.add("a", ["b"], secret="")
        b = network.add("b", secret="", broker={"anonymous": False})
        await b.start()
        await a.start()
        await trio.sleep(5)
        assert "set network.secret" in a.status()[url("b")]["trouble"]
        assert not b.linked()


async def test_an_error_in_this_program_does_not_keep_a_link_away_for_ever(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        a, b = network.add("a", ["b"]), network.add("b")

        def plan(number: int, source: str, target: str) -> None:
            if number == 1:
                raise RuntimeError("a bug")

        network.plan = plan
        await b.start()
        await a.start()
        await network.wait_linked(("a", "b"), seconds=6.0)


# ---- peers that are heard


async def test_peers_that_are_heard_are_dialled_by_the_lower_name(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        for name in "cab":
            await network.add(name, discovery=DISCOVERY).start()
        await network.wait_linked(("a", "b"), ("b", "c"), ("a", "c"), seconds=2.0)
        assert set(network.dials) == {("a", "b"), ("a", "c"), ("b", "c")}
        assert network.nodes["c"].members == {name: (url(name),) for name in "abc"}
        await network.nodes["b"].stop()
        await network.wait(lambda: set(network.nodes["c"].members) == {"a", "c"}, 1.0)
        await network.wait(lambda: "b" not in network.nodes["a"].status(), 10.0)
        await network.nodes["b"].start()
        await network.wait_linked(("a", "b"), ("b", "c"), seconds=2.0)


async def test_the_higher_name_dials_where_the_lower_one_can_not(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        network.refused.add(("a", "b"))
        for name in "ab":
            await network.add(name, discovery=DISCOVERY).start()
        await trio.sleep(8)
        assert not network.dials["b", "a"]
        await network.wait_linked(("a", "b"), seconds=3.0)
        assert network.nodes["b"].network._links["a"].dialled


async def test_a_peer_whose_announcement_changes_is_dialled_at_once(autojump_clock: trio.abc.Clock) -> None:
    """Another replica leads: it is linked while the link with the earlier leader is silent, and not yet given up."""
    async with world() as network:
        a = network.add("a", discovery=DISCOVERY)
        first, second = (network.add("s", place=place, discovery=DISCOVERY) for place in ("s1", "s2"))
        first.epoch, second.epoch = 1, 2
        await a.start()
        await first.start()
        await network.wait_linked(("a", "s1"))
        network.wires[0].hold()
        network.segment.cut(["s1"], ["a", "s2"])
        await second.start()
        await network.wait(lambda: "a" in second.linked(), 0.1)
        assert a.network._links["s"].address == url("s2")


async def test_a_peer_that_is_unheard_of_keeps_its_link(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        for name in "ab":
            await network.add(name, discovery=DISCOVERY).start()
        await network.wait_linked(("a", "b"))
        network.segment.cut("ab", "ab")
        await trio.sleep(60)
        assert network.nodes["a"].linked() == {"b"}
        assert network.nodes["a"].members.keys() == {"a", "b"}
        assert len(network.wires) == 1


# ---- ends


async def test_a_stop_ends_links_in_good_order(autojump_clock: trio.abc.Clock) -> None:
    for who in "ab":
        async with two() as (network, a, b):
            link = (b if who == "a" else a).network._links[who]
            await a.send(Q, "kept")
            began = trio.current_time()
            await network.nodes[who].stop()
            assert trio.current_time() - began < 0.5
            await network.wait(lambda: not (b if who == "a" else a).linked(), 0.5)  # noqa: B023
            assert link.code == "bye"
            await network.nodes[who].start()
            await network.wait_linked(("a", "b"), seconds=1.0)


async def test_a_dialler_that_does_not_introduce_itself_is_given_up(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = network.add("b")
        await b.start()
        end = await network.dial("nobody", url("b"))
        await trio.sleep(9.9)
        (connection,) = b.network._connections
        assert connection.code == ""
        with trio.fail_after(1):
            assert await end.receive_some() == b""
        assert connection.code == SILENT
        await network.wait(lambda: not b.network._connections, 3.0)
