"""Producers over the native protocol (P7): what is repeated after a lost connection, a crash or a failover is stored once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import trio

from pybroker.broker import open_broker
from tests.cluster.replicas import until
from tests.engine.sets import brokers
from tests.engine.support import Disk, broker_on, check, check_empty, close_without_thread, drain, engine_of
from tests.native.peer import ACK, BYE, COMMIT, PRODUCER, SEND, SUBSCRIBE, connected, row, rows

A, B = "/queue/a", "/queue/b"


async def test_messages_have_the_ids_of_their_producer(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker, producer=PRODUCER, producer_new=True) as peer:
        await peer.send([SEND, 1, rows(1)], [SEND, 255, rows(2)], [COMMIT, 300, rows(2), [], []])
        await peer.confirms(1, 255, 256, 300)
        await peer.subscribe(1)
        ids = [one.message_id.decode() for one in await peer.deliveries(1, 5)]
        assert ids == [f"{PRODUCER}-{end}" for end in ("1", "ff", "100", "12c-0", "12c-1")]


async def test_a_repeat_is_confirmed_and_not_stored_again(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker:
        async with connected(broker, producer=PRODUCER, producer_new=True) as peer:
            assert peer.welcome["producer_known"] is False
            await peer.send([SEND, 1, rows(5)], [SEND, 6, [row(b"", "nowhere")]], [SEND, 7, rows(1, flags=4)])
            await peer.confirms(1, 2, 3, 4, 5, 7)
        async with connected(broker, producer=PRODUCER) as peer:
            assert peer.welcome["producer_known"] is True
            await peer.send([SEND, 3, [*rows(3), row(b"6"), row(b"7", flags=4), row(b"8")]])
            await peer.confirms(*range(3, 9))
            await peer.send([SEND, 1, rows(2)])
            await peer.confirms(1, 2)
            assert engine_of(broker).core.duplicates == 6
            check(broker)
        found = await drain(broker, A)
        assert [message.body for message in found[A]] == [*(b"%d" % n for n in range(5)), b"0", b"6", b"8"]


async def test_other_producers_and_none_are_apart(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker:
        for options in ({"producer": PRODUCER}, {"producer": PRODUCER + "x"}, {}, {}):
            async with connected(broker, producer_new=bool(options), **options) as peer:
                await peer.send([SEND, 1, rows(2)])
                await peer.confirms(1, 2)
        assert len((await drain(broker, A))[A]) == 8


async def test_a_new_producer_is_let_in_when_its_record_is_committed(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker:
        disk.shut()
        with trio.move_on_after(0.1) as waiting:
            async with connected(broker, producer=PRODUCER, producer_new=True):
                raise AssertionError("let in too soon")
        assert waiting.cancelled_caught
        disk.gate.set()
        async with connected(broker, producer=PRODUCER, producer_new=True):
            pass
    async with broker_on(Disk(disk.backend.synced)) as broker, connected(broker, producer=PRODUCER) as peer:
        assert peer.welcome["producer_known"] is True


async def test_a_producer_that_is_not_known_is_told_so_until_it_sends_again(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker:
        for _ in range(2):  # the first answer may have been lost
            async with connected(broker, producer=PRODUCER) as peer:
                assert peer.welcome["producer_known"] is False
        async with connected(broker, producer=PRODUCER) as peer:
            await peer.send([SEND, 100, rows(1)])
            await peer.confirms(100)
        async with connected(broker, producer=PRODUCER) as peer:
            assert peer.welcome["producer_known"] is True


async def test_a_sequence_of_which_nobody_knows_any_more_is_in_doubt(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker(limits={"producer_ranges_max": 2}) as broker:
        async with connected(broker, producer=PRODUCER, producer_new=True) as peer:
            for sequence in range(1, 20, 2):
                await peer.send([SEND, sequence, rows(1)])
            await peer.confirms(*range(1, 20, 2))
        async with connected(broker, producer=PRODUCER) as peer:
            await peer.send([SEND, 2, rows(1)], [SEND, 18, rows(1)], [SEND, 19, rows(1)], [COMMIT, 4, rows(1), [], []])
            await peer.confirms(18, 19)
            for sequence in (2, 4):
                code, text = await peer.refusal(sequence)
                assert code == "in-doubt"
                assert "not known any more" in text
        assert len((await drain(broker, A))[A]) == 11


async def test_a_repeat_overtakes_what_waits_on_a_dying_connection(autojump_clock: trio.abc.Clock) -> None:
    async with (
        open_broker(limits={"queue_messages_max": 2}) as broker,
        connected(broker, producer=PRODUCER, producer_new=True) as first,
        connected(broker, producer=PRODUCER) as second,
        connected(broker) as consumer,
    ):
        await first.send([SEND, 1, rows(4)])
        await first.confirms(1, 2)
        await second.send([SEND, 1, rows(4)])
        await second.confirms(1, 2)
        await second.silent()
        await consumer.subscribe(1)
        bodies = []
        for _ in range(4):
            got = await consumer.delivery(1)
            bodies.append(got.body)
            await consumer.send([ACK, 0, 1, [got.tag, got.tag]])
        await first.confirms(3, 4)
        await second.confirms(3, 4)
        await consumer.silent()
        assert bodies == [b"0", b"1", b"2", b"3"]
        check_empty(broker)


async def test_a_transaction_is_repeated_as_a_whole_or_refused(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker:
        async with connected(broker, producer=PRODUCER, producer_new=True) as peer:
            await peer.send([SEND, 1, rows(3)])
            await peer.subscribe(1)
            tags = [one.tag for one in await peer.deliveries(1, 3)]
            await peer.send([COMMIT, 4, rows(2, B), [[1, [tags[0], tags[0]]]], []])
            await peer.confirms(4)
        async with connected(broker, producer=PRODUCER) as peer:
            await peer.subscribe(1)
            await peer.deliveries(1, 2)
            stored = [COMMIT, 4, rows(2, B), [[1, [tags[0], tags[0]]]], []]
            lost = [COMMIT, 5, rows(2, B), [[1, [tags[1], tags[1]]]], []]
            await peer.send(stored, lost, [COMMIT, 6, rows(2, B), [], []])
            await peer.confirms(4, 6)
            assert (await peer.refusal(5))[0] == "transaction"
        async with connected(broker, producer=PRODUCER) as peer:
            await peer.send([COMMIT, 5, rows(1, B), [], []])  # a sequence that was refused is as new as before
            await peer.confirms(5)
        found = await drain(broker, A, B)
        assert len(found[A]) == 2
        assert len(found[B]) == 5


async def test_a_repeat_after_a_crash_at_any_batch_boundary_is_stored_once(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    states: list[tuple[dict[bytes, bytes], frozenset[int]]] = []
    confirmed: dict[int, bool] = {}

    def keep(number: int) -> None:
        states.append((dict(disk.backend.synced), frozenset(confirmed)))

    disk.before = disk.after = keep
    batches = [(first, [row(b"%d" % n) for n in range(first, first + 7)]) for first in range(1, 70, 7)]
    async with broker_on(disk) as broker, connected(broker, producer=PRODUCER, producer_new=True) as peer:
        confirmed = peer.confirmed
        for first, messages in batches:
            await peer.send([SEND, first, messages[:3]], [COMMIT, first + 3, messages[3:6], [], []])
            await peer.send([SEND, first + 6, messages[6:]])
            if first % 2:
                await peer.confirms(first)
        await peer.confirms(70)
    assert len(states) > 6
    for state, told in states:
        async with broker_on(Disk(state)) as broker:
            async with connected(broker, producer=PRODUCER) as peer:
                if not peer.welcome["producer_known"]:
                    assert not told
                for first, messages in batches:  # all of it once more, as from a client that was told nothing
                    await peer.send([SEND, first, messages[:3]], [COMMIT, first + 3, messages[3:6], [], []])
                    await peer.send([SEND, first + 6, messages[6:]])
                await peer.confirms(70)
                assert peer.refused == {}
            counts = Counter(int(message.body) for message in (await drain(broker, A))[A])
            assert counts == dict.fromkeys(range(1, 71), 1)
            check_empty(broker)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pybroker.broker.close_store", close_without_thread)


async def test_a_repeat_to_the_next_leader_is_stored_once(autojump_clock: trio.abc.Clock, no_threads: None) -> None:
    async with brokers() as group:
        leader = await group.settled()
        async with connected(leader.broker, producer=PRODUCER, producer_new=True) as peer:
            await peer.send([SEND, 1, rows(20)])
            await peer.confirms(*range(1, 21))
            await peer.send([SEND, 21, rows(10)])  # nobody hears what becomes of these
            await leader.kill()
            await until(lambda: any(one is not leader for one in group.leading()), 2.0)
        (new,) = (one for one in group.leading() if one is not leader)
        async with connected(new.broker, producer=PRODUCER) as peer:
            assert peer.welcome["producer_known"] is True
            await peer.send([SEND, 11, [*rows(20)[10:], *rows(10)]])
            await peer.confirms(*range(11, 31))
            await peer.subscribe(1)
            got = await peer.deliveries(1, 30)
            assert Counter(one.message_id for one in got).most_common(1)[0][1] == 1
            await peer.silent()


async def test_a_hand_over_confirms_what_it_took_and_says_where_to_go(
    autojump_clock: trio.abc.Clock, no_threads: None
) -> None:
    async with brokers() as group:
        leader = await group.settled()
        async with connected(leader.broker, producer=PRODUCER, producer_new=True) as peer:
            await peer.subscribe(1, "/queue/other")
            await peer.send([SEND, 1, rows(20)])
            await trio.testing.wait_all_tasks_blocked()
            await leader.broker.hand_over()
            await peer.error("not-leader")
            assert peer.confirmed.keys() == set(range(1, 21))
        new = await group.leader()
        follower = next(one for one in group.all.values() if one is not new)
        async with connected(follower.broker, hello=False) as lost:
            error = await lost.error("not-leader")
            assert error[3]["leader"] == new.name
        async with connected(new.broker, producer=PRODUCER) as peer:
            await peer.send([SEND, 1, rows(20)], [SUBSCRIBE, 7, 1, A, "individual", 0, ""], [BYE])
            await peer.end()
            assert peer.confirmed.keys() == set(range(1, 21))
            assert engine_of(new.broker).core.by_destination[A].depth == 20


async def test_a_leader_that_is_deposed_says_so_and_confirms_nothing_more(
    autojump_clock: trio.abc.Clock, no_threads: None
) -> None:
    async with brokers() as group:
        leader = await group.settled()
        async with connected(leader.broker, producer=PRODUCER, producer_new=True) as peer:
            await peer.send([SEND, 1, rows(1)])
            await peer.confirms(1)
            for one in group.all.values():
                if one is not leader:
                    await one.kill()
            await peer.send([SEND, 2, rows(1)])
            await peer.error("not-leader")
            assert peer.confirmed.keys() == {1}


async def test_a_producer_survives_a_restart_on_a_real_disk(tmp_path: Path) -> None:
    for known in (False, True):
        async with (
            open_broker(data_dir=tmp_path) as broker,
            connected(broker, producer=PRODUCER, producer_new=not known) as peer,
        ):
            assert peer.welcome["producer_known"] is known
            await peer.send([SEND, 1, rows(50)])
            await peer.confirms(*range(1, 51))
            assert engine_of(broker).core.by_destination[A].depth == 50
