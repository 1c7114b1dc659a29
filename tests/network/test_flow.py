"""What one link takes and gives: bounds of both ends, full brokers, messages that can't be taken, peers that break the rules."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from pybroker.config import Limits, NativeLimits, NetworkConfig, StompLimits
from pybroker.errors import BrokerClosed
from pybroker.protocols import link_frames as frames
from pybroker.protocols.link_frames import Accepted, Demand, Rejected
from pybroker.protocols.native_frames import Bye, Error, encode_bye
from tests.network.brokers import Node, World, two, world
from tests.network.puppet import Puppet, puppet, row

Q = "/queue/q"


def accepted(end: Puppet) -> list[int]:
    return [tag for frame in end.of(Accepted) for first, last in frame.ranges for tag in range(first, last + 1)]


async def one(network: World, **network_options: Any) -> Node:
    node = network.add("b", **network_options)
    await node.start()
    return node


def demand(destination: str = Q) -> bytes:
    return frames.encode_demand(True, [(destination, False, "puppet", ("puppet",))], [])


# ---- receiving


async def test_what_is_taken_is_accepted_in_one_piece_once_it_is_committed(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        async with puppet(network, b) as end:
            await end.send(frames.encode_forward(1, "n", 1, [row(number) for number in range(1, 401)]))
            await network.wait(lambda: len(accepted(end)) == 400)
            assert [(frame.lane, frame.ranges) for frame in end.of(Accepted)] == [(1, [(1, 400)])]
            await b.kill()
        await b.start()
        assert await b.drain(Q) == [str(number) for number in range(1, 401)]


async def test_nothing_is_accepted_before_it_is_committed(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = trio.Event()
    async with world() as network:
        b = await one(network)
        commit = b.engine.journal._committer.commit

        async def slow(batch: Any) -> None:
            await gate.wait()
            await commit(batch)

        async with puppet(network, b) as end:
            monkeypatch.setattr(b.engine.journal._committer, "commit", slow)
            await end.send(frames.encode_forward(1, "n", 1, [row(1), row(2)]))
            await trio.sleep(5)
            assert accepted(end) == []
            gate.set()
            await network.wait(lambda: accepted(end) == [1, 2])


async def test_a_repeat_is_accepted_and_not_stored(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        async with puppet(network, b) as end:
            await end.send(frames.encode_forward(1, "n", 1, [row(1), row(2)]))
            await end.send(frames.encode_forward(1, "n", 3, [row(1), row(2), row(3)]))
            await end.send(frames.encode_forward(2, "other", 1, [row(1)]))
            await network.wait(lambda: len(accepted(end)) == 6)
        assert (b.depth("q"), b.peer("puppet").repeats) == (4, 2)


async def test_a_repeat_is_accepted_no_sooner_than_its_original_is_committed(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link breaks and comes back while the batch is being written."""
    gate = trio.Event()
    async with world() as network:
        b = await one(network)
        commit = b.engine.journal._committer.commit

        async def slow(batch: Any) -> None:
            await gate.wait()
            await commit(batch)

        async with puppet(network, b) as end:
            await end.send(frames.encode_forward(1, "n", 1, [row(1)]))
            await network.wait(lambda: accepted(end) == [1])
            monkeypatch.setattr(b.engine.journal._committer, "commit", slow)
            await end.send(frames.encode_forward(1, "n", 2, [row(2)]))
            await trio.sleep(0.1)
        async with puppet(network, b, life="another") as end:
            await end.send(frames.encode_forward(1, "n", 1, [row(2)]))
            await trio.sleep(2)
            assert accepted(end) == []
            gate.set()
            await network.wait(lambda: accepted(end) == [1])
        assert b.depth("q") == 2


async def test_what_can_not_be_taken_is_rejected_and_the_rest_goes_on(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = network.add("b", broker={"stomp": StompLimits(body_bytes_max=100)})
        await b.start()
        async with puppet(network, b) as end:
            rows = [row(1), row(2, "nonsense"), row(3, "/queue/a.>"), row(4, body=b"x" * 101), row(5)]
            await end.send(frames.encode_forward(1, "n", 1, rows))
            await network.wait(lambda: len(end.of(Rejected)) == 3 and len(accepted(end)) == 2)
            assert accepted(end) == [1, 5]
            assert [(frame.lane, frame.tag, frame.code) for frame in end.of(Rejected)] == [
                (1, 2, "destination"),
                (1, 3, "destination"),
                (1, 4, "limit"),
            ]
            assert "stomp.body_bytes_max is 100" in end.of(Rejected)[2].text
        assert b.depth("q") == 2


async def test_a_message_of_which_nobody_knows_any_more_is_left_unanswered(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network, link_messages_max=3)
        async with puppet(network, b) as end:
            b.engine.begin_turn().producers.open("link puppet n").floor = 3
            await end.send(frames.encode_forward(1, "n", 1, [row(1), row(2), row(3)]))
            await network.wait(lambda: accepted(end) == [3])
            assert "2 of its messages" in b.status()["puppet"]["trouble"]
            await trio.sleep(10)
            assert accepted(end) == [3]
            assert end.of(Rejected) == []
        assert b.depth("q") == 1


@pytest.mark.parametrize(
    ("limits", "sizes", "said"),
    [
        ({"link_messages_max": 5}, [1] * 6, "network.link_messages_max is 5"),
        ({"link_bytes_max": 1_000}, [999, 5_000, 1], "network.link_bytes_max is 1000"),
    ],
)
async def test_who_sends_more_than_was_agreed_is_told_so(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch, limits: Any, sizes: Any, said: str
) -> None:
    async with world() as network:
        b = await one(network, **limits)
        async with puppet(network, b) as end:
            assert (end.session.peer.messages_max, end.session.peer.bytes_max) == (  # type: ignore[union-attr]
                limits.get("link_messages_max", NetworkConfig().link_messages_max),
                limits.get("link_bytes_max", NetworkConfig().link_bytes_max),
            )
            rows = [row(number, body=b"x" * size) for number, size in enumerate(sizes)]
            await end.send(frames.encode_forward(1, "n", 1, rows[:-1]))
            await network.wait(lambda: len(accepted(end)) == len(rows) - 1)
            await end.send(frames.encode_forward(1, "n", 10, rows))
            await end.wait_ended()
            (error,) = end.of(Error)
            assert error.code == "limit"
            assert said in error.text


async def test_a_full_broker_takes_nothing_and_still_hears_what_is_accepted(autojump_clock: trio.abc.Clock) -> None:
    """Both ends of a link are full: each gets rid of its messages over the link, since answers get through."""
    async with world() as network:
        b = network.add("b", broker={"limits": Limits(store_bytes_max=19_999, full_policy="refuse")})
        await b.start()
        for number in range(80):
            await b.send("/queue/out", f"{number:250}")
        async with puppet(network, b) as end:
            await end.send(frames.encode_forward(1, "n", 1, [row(number, body=b"x" * 1_000) for number in range(60)]))
            await trio.sleep(5)
            assert accepted(end) == []
            await end.send(demand("/queue/out"))
            await network.wait(lambda: len(end.forwarded()) == 80)
            await end.send(frames.encode_accepted(end.of(frames.Forward)[0].lane, [(1, 80)]))
            await network.wait(lambda: bool(accepted(end)))


# ---- sending


async def test_a_peer_is_sent_no_more_than_it_takes(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        await b.send(Q, *map(str, range(20)))
        async with puppet(network, b, messages_max=7) as end:
            await end.send(demand())
            await trio.sleep(2)
            assert [body for _, _, body in end.forwarded()] == [b"%d" % number for number in range(7)]
            await end.send(frames.encode_accepted(1, [(1, 5)]))
            await network.wait(lambda: len(end.forwarded()) == 12)
            await end.send(frames.encode_accepted(1, [(6, 12)]))
            await network.wait(lambda: len(end.forwarded()) == 19)
            assert [tag for tag, _, _ in end.forwarded()] == list(range(1, 20))


async def test_what_expires_before_it_can_be_sent_leaves_a_gap(
    autojump_clock: trio.abc.Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = trio.Event()
    async with world() as network:
        b = await one(network)
        commit = b.engine.journal._committer.commit

        async def slow(batch: Any) -> None:
            await gate.wait()
            await commit(batch)

        async with puppet(network, b) as end:
            await end.send(demand())
            await network.wait(lambda: bool(b.engine.core.links.demand.heard("puppet")))
            monkeypatch.setattr(b.engine.journal._committer, "commit", slow)
            now = b.engine.clock_ms()
            async with trio.open_nursery() as sending:
                for body, expires in (
                    ("0", 0),
                    ("1", 0),
                    ("2", now + 1_000),
                    ("3", 0),
                ):  # the first one alone in a batch
                    sending.start_soon(lambda body=body, expires=expires: b.send(Q, body, expires=expires))
                    await trio.sleep(0.1)
                await trio.sleep(2)
                gate.set()
            await network.wait(lambda: len(end.forwarded()) == 3)
            assert [(tag, body) for tag, _, body in end.forwarded()] == [(1, b"0"), (2, b"1"), (4, b"3")]
            await end.send(frames.encode_accepted(1, [(1, 2), (4, 4)]))
            await network.wait(lambda: b.waiting("puppet") == 0)
            assert b.linked()


async def test_lanes_of_earlier_lives_go_first(autojump_clock: trio.abc.Clock) -> None:
    """What an earlier life forwarded has its own namespace, and is sent again under it before anything newer."""
    async with world() as network:
        b = await one(network)
        await b.send(Q, "1", "2")
        async with puppet(network, b) as end:
            await end.send(demand())
            await network.wait(lambda: len(end.forwarded()) == 2)
            first = end.of(frames.Forward)[0]
        await b.kill()
        await b.start()
        await b.send(Q, "3")
        async with puppet(network, b, life="another") as end:
            await end.send(demand())
            await network.wait(lambda: len(end.forwarded()) == 2)
            await trio.sleep(1)
            assert [frame[:3] for frame in end.of(frames.Forward)] == [(1, first.namespace, 1)]
            assert [number for _, number, _ in end.forwarded()] == [number for number, _ in first.messages]
            await end.send(frames.encode_accepted(1, [(1, 2)]))
            await network.wait(lambda: len(end.forwarded()) == 3)
            assert end.of(frames.Forward)[-1].lane == 2
            assert end.of(frames.Forward)[-1].namespace != first.namespace


async def test_frames_are_no_longer_than_the_peer_takes(autojump_clock: trio.abc.Clock) -> None:
    """A message that does not fit into any frame is a dead letter here, with the reason; those behind it go on."""
    async with world() as network:
        b = await one(network)
        sizes = [100, 3_000, 3_000, 20_000, 3_000, 100]
        for size in sizes:
            await b.send(Q, "x" * size)
        async with puppet(network, b, frame_bytes_max=10_000) as end:
            end.session._cutter.bytes_max = 10_000
            await end.send(demand())
            await network.wait(lambda: len(end.forwarded()) == 5)
            assert [len(body) for _, _, body in end.forwarded()] == [100, 3_000, 3_000, 3_000, 100]
            assert b.depth("ActiveMQ.DLQ") == 1
            assert b.peer("puppet").rejected == 1
        async with b.connect() as client, client.subscribe("/queue/ActiveMQ.DLQ") as messages:
            message = await messages.receive()
            assert any("native.frame_bytes_max is 10000" in value for _, value in message.headers)


async def test_many_messages_go_in_few_frames(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        await b.send(Q, *map(str, range(1_500)))
        async with puppet(network, b, frame_bytes_max=100_000_000) as end:
            end.session._cutter.bytes_max = 100_000_000
            await end.send(demand())
            await network.wait(lambda: len(end.forwarded()) == 1_500)
            assert len(end.of(frames.Forward)) <= 4
            assert max(len(frame.messages) for frame in end.of(frames.Forward)) <= 1_000


async def test_a_message_that_the_peer_rejects_is_a_dead_letter_with_its_reason(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        await b.send(Q, "1", "2")
        async with puppet(network, b) as end:
            await end.send(demand())
            await network.wait(lambda: len(end.forwarded()) == 2)
            await end.send(frames.encode_rejected(1, 1, "odd", "it is odd"), frames.encode_accepted(1, [(2, 2)]))
            await network.wait(lambda: b.waiting("puppet") == 0)
        async with b.connect() as client, client.subscribe("/queue/ActiveMQ.DLQ") as messages:
            message = await messages.receive()
            assert message.body == b"1"
            assert any("refused by puppet: odd: it is odd" in value for _, value in message.headers)


# ---- rules


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (frames.encode_accepted(1, [(1, 1)]), "unknown-delivery", "no lane 1"),
        (frames.encode_rejected(7, 1, "c", "t"), "unknown-delivery", "no lane 7"),
        (frames.encode_demand(True, [("nonsense", False, "puppet", ("puppet",))], []), "destination", "nonsense"),
        (frames.encode_demand(True, [("/queue/>", False, "puppet", ("puppet",))], []), "destination", "by its name"),
        (frames.encode_link_proof(b""), "protocol", "LinkProof can't come now"),
        (b"\xff\xff\xff\xff", "limit", "native.frame_bytes_max"),
        (b"\0\0\0\1\xc1", "protocol", "not msgpack"),
        (frames.encode_forward(1, "n", 1, [row(1, passed=("x",))]), "protocol", "must be its sender"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_peer_that_breaks_the_rules_is_told_which_and_has_no_link(
    autojump_clock: trio.abc.Clock, data: bytes, code: str, said: str
) -> None:
    async with world() as network:
        b = await one(network)
        async with puppet(network, b) as end:
            await end.send(data)
            await end.wait_ended()
            (error,) = end.of(Error)
            assert error.code == code
            assert said in error.text
            assert not b.linked()
            assert b.engine.error is None
        async with puppet(network, b):  # and it may come again
            pass


async def test_an_acknowledgement_of_what_was_never_sent_ends_the_link_and_loses_nothing(
    autojump_clock: trio.abc.Clock,
) -> None:
    async with world() as network:
        b = await one(network)
        await b.send(Q, "1", "2")
        async with puppet(network, b) as end:
            await end.send(demand())
            await network.wait(lambda: len(end.forwarded()) == 2)
            await end.send(frames.encode_accepted(1, [(1, 1), (3, 2**62)]))
            await end.wait_ended()
            assert end.of(Error)[0].code == "unknown-delivery"
        assert b.waiting("puppet") == 1


async def test_the_first_word_on_a_link_is_the_whole_demand(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        async with b.consuming(Q, []), puppet(network, b) as end:
            await network.wait(lambda: bool(end.heard))
            assert end.heard[0] == Demand(True, [(Q, False, "b", ("b",))], [])


async def test_beats_are_sent_while_there_is_nothing_else(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        async with puppet(network, b):
            before = network.wires[0].pipes[1].passed
            await trio.sleep(60)
            assert 100 <= (network.wires[0].pipes[1].passed - before) // 6 <= 121


async def test_a_silent_peer_has_no_link(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        async with puppet(network, b, beating=False) as end:
            began = trio.current_time()
            await end.wait_ended()
            assert 2.4 < trio.current_time() - began < 4.2
            assert not b.linked()


async def test_a_peer_with_slower_beats_is_given_its_time(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        async with puppet(network, b, beating=False, heartbeat=20.0) as end:
            began = trio.current_time()
            await end.wait_ended()
            assert 59 < trio.current_time() - began < 63


async def test_bye_ends_a_link_in_good_order(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        async with puppet(network, b) as end:
            await end.send(encode_bye())
            await end.wait_ended()
            assert b.network._links == {}
        async with puppet(network, b) as end:
            await end.send(frames.encode_forward(1, "n", 1, [row(1)]))
            await network.wait(lambda: b.depth("q") == 1)
            await b.stop()
            await end.wait_ended()
            assert [frame.__class__ for frame in end.heard] == [Demand, Accepted, Bye]


async def test_a_broker_whose_store_fails_says_so_on_its_links(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = await one(network)
        async with puppet(network, b) as end:
            b.engine.fail(BrokerClosed("the store failed"))
            await end.wait_ended()
            (error,) = end.of(Error)
            assert (error.code, error.text) == ("closed", "the store failed")


async def test_a_link_that_is_cancelled_at_any_moment_leaves_its_messages(autojump_clock: trio.abc.Clock) -> None:
    for pause in range(40):
        async with two() as (network, a, b):
            await a.send(Q, *map(str, range(30)))
            async with b.consuming(Q, []) as found:
                for _ in range(pause):
                    await trio.lowlevel.checkpoint()
                connection = (a if pause % 2 else b).network._links["b" if pause % 2 else "a"]
                connection._scope.cancel()
                await network.wait(lambda: len(found) == 30)
                await network.wait(lambda: a.waiting("b") == 0)
            assert found == [str(number) for number in range(30)]


async def test_a_frame_limit_is_told_and_kept(autojump_clock: trio.abc.Clock) -> None:
    async with world() as network:
        b = network.add("b", broker={"native": NativeLimits(frame_bytes_max=5_000)})
        await b.start()
        async with puppet(network, b) as end:
            assert end.session.peer is not None
            assert end.session.peer.frame_bytes_max == 5_000
            await end.send((5_001).to_bytes(4, "big"))
            await end.wait_ended()
            assert "native.frame_bytes_max is 5000" in end.of(Error)[0].text
