"""How connections end and what waits for the disk: nothing is lost, repeated without need, or told too early."""

from __future__ import annotations

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from pybroker.broker import Broker
from pybroker.journal import LocalCommitter
from tests.support.serving import embedded
from tests.support.wire import Peer, connect_frame, dialled, frame

QUIET = 0.02  # seconds in which nothing moves: then nothing is on its way any more


def depth(broker: Broker, name: str) -> int:
    return sum(row.depth for row in broker.statistics().destinations if row.kind == "queue" and row.name == name)


# ---- ending


async def test_disconnect_confirms_all_before_it_and_ignores_all_behind():
    async with embedded() as (broker, port), dialled(port) as peer:
        sends = [frame("SEND", "destination:/queue/a", f"receipt:{number}") for number in range(20)]
        late = frame("SEND", "destination:/queue/late", "receipt:late")
        await peer.send(b"".join(sends) + frame("DISCONNECT", "receipt:bye") + late * 5)
        found = await peer.end()
        assert [each.get("receipt-id") for each in found] == [*map(str, range(20)), "bye"]
        assert (depth(broker, "a"), depth(broker, "late")) == (20, 0)


async def test_a_peer_that_only_stops_writing_is_still_answered():
    """As ``printf ... | nc`` does: the end of what it says is not the end of what it hears."""
    async with embedded() as (broker, port), dialled(port, None) as peer:
        await peer.send(connect_frame() + frame("SEND", "destination:/queue/a", "receipt:r"))
        assert isinstance(peer.stream, trio.SocketStream)
        await peer.stream.send_eof()
        assert [each.command for each in await peer.end()] == ["CONNECTED", "RECEIPT"]
        assert depth(broker, "a") == 1


@pytest.mark.parametrize("length", [1, 4, 20, 40, 60, 90])
async def test_a_connection_cut_within_a_frame_stores_nothing_of_it(length: int):
    whole = frame("SEND", "destination:/queue/a", body=b"whole")
    torn = frame("SEND", "destination:/queue/a", "content-length:50", body=b"t" * 50)
    assert length < len(torn)
    async with embedded() as (broker, port), dialled(port) as peer:
        await peer.send(whole + torn[:length])
        await peer.cut()
        await wait_all_tasks_blocked(QUIET)
        assert broker.statistics().connections == 0
        async with dialled(port) as other:
            await other.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a"))
            assert (await other.expect("MESSAGE")).body == b"whole"
            await other.do("SEND", "destination:/queue/b")
            assert depth(broker, "a") == 0


async def take(peer: Peer, count: int, *headers: str) -> list[str]:
    await peer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a", *headers))
    return [each.body.decode() for each in await peer.frames(count)]


@pytest.mark.parametrize("ack", ["client", "client-individual"])
async def test_what_a_cut_connection_held_returns_to_its_place_and_is_marked(ack: str):
    async with embedded() as (broker, port), dialled(port) as sender:
        for number in range(6):
            await sender.do("SEND", "destination:/queue/a", body=b"%d" % number)
        async with dialled(port) as one:
            assert await take(one, 4, f"ack:{ack}", "activemq.prefetchSize:4") == ["0", "1", "2", "3"]
            await one.cut()
        async with dialled(port) as other:
            await other.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a", f"ack:{ack}"))
            found = [await other.frame() for _ in range(6)]
            assert sorted(each.body for each in found) == [b"%d" % number for number in range(6)]
            marked = {each.body.decode(): each["redelivered"] for each in found}
            assert marked == {"0": "true", "1": "true", "2": "true", "3": "true", "4": "false", "5": "false"}
            assert [each.get("delivery-count") for each in found if each.body == b"0"] == ["2"]
        assert depth(broker, "a") == 6


async def test_auto_acknowledges_only_what_the_kernel_took():
    """A message that is larger than all socket buffers can't have been taken from a peer that never reads."""
    body = bytes(30_000_000)
    async with embedded() as (broker, port), dialled(port) as sender:
        async with dialled(port) as stalled:
            await stalled.do("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:auto")
            await sender.do("SEND", "destination:/queue/a", f"content-length:{len(body)}", body=body)
            await sender.do("SEND", "destination:/queue/b")
            await wait_all_tasks_blocked(QUIET)
            (row,) = (row for row in broker.statistics().destinations if row.name == "a")
            assert (row.depth, row.outstanding, row.acknowledged) == (1, 1, 0)
            await stalled.cut()
        async with dialled(port) as other:
            await other.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a"))
            message = await other.expect("MESSAGE")
            assert len(message.body) == len(body)
            assert message["redelivered"] == "true"


@pytest.mark.parametrize("how", ["goodbye", "error"])
async def test_who_has_the_last_word_of_a_connection_may_take_up_its_subscription(how: str):
    durable = ("id:1", "destination:/topic/a", "ack:client", "activemq.subscriptionName:s", "client-id:c")
    async with embedded() as (_, port), dialled(port) as sender:
        async with dialled(port) as one:
            await one.do("SUBSCRIBE", *durable)
        for _ in range(10):
            async with dialled(port) as one, dialled(port) as other:
                await one.do("SUBSCRIBE", *durable)
                await sender.do("SEND", "destination:/topic/a")
                await one.expect("MESSAGE")
                if how == "goodbye":
                    await one.do("DISCONNECT")
                else:
                    await one.send(frame("BEGIN"))
                    await one.expect("ERROR")
                await other.send(frame("SUBSCRIBE", *durable, "receipt:r"))  # while `one` has not hung up yet
                found = sorted(await other.frames(2), key=lambda each: each.command)
                assert [each.command for each in found] == ["MESSAGE", "RECEIPT"]
                assert found[0]["redelivered"] == "true"
                await other.do("ACK", f"id:{found[0]['ack']}")
                await other.do("DISCONNECT")


async def test_what_was_given_automatically_is_not_given_to_another_after_unsubscribe(monkeypatch: pytest.MonkeyPatch):
    """The peer may have a message, and answer, before the broker knows that the kernel took it."""
    original = trio.SocketStream.send_all
    known = trio.Event()

    async def send_all(stream: trio.SocketStream, data: bytes) -> None:
        await original(stream, data)
        if data.startswith(b"MESSAGE"):
            await known.wait()

    monkeypatch.setattr(trio.SocketStream, "send_all", send_all)
    async with embedded() as (broker, port), dialled(port) as sender, dialled(port) as one:
        await one.do("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:auto")
        await sender.do("SEND", "destination:/queue/a")
        await one.expect("MESSAGE")
        await one.send(frame("UNSUBSCRIBE", "id:1", "receipt:u"))
        await wait_all_tasks_blocked(QUIET)
        await sender.do("SEND", "destination:/queue/a", body=b"kept")  # it gets nothing more
        assert depth(broker, "a") == 2
        known.set()
        await one.receipt("u")
        assert depth(broker, "a") == 1


# ---- what waits for the disk


class Gate:
    """Holds the journal's commits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = trio.Event()
        self.waiting = 0
        original = LocalCommitter.commit

        async def commit(committer: LocalCommitter, batch: object) -> None:
            self.waiting += 1
            await self.opened.wait()
            await original(committer, batch)  # type: ignore[arg-type]

        monkeypatch.setattr(LocalCommitter, "commit", commit)


async def test_nothing_durable_is_confirmed_or_shown_before_its_commit(monkeypatch: pytest.MonkeyPatch):
    async with embedded() as (_, port), dialled(port) as sender, dialled(port) as consumer:
        await consumer.do("SUBSCRIBE", "id:1", "destination:/queue/a")
        gate = Gate(monkeypatch)
        await sender.send(frame("SEND", "destination:/queue/a", "receipt:s", body=b"x"))
        await wait_all_tasks_blocked(QUIET)
        assert gate.waiting == 1
        for peer in (sender, consumer):
            with trio.move_on_after(QUIET) as scope:
                await peer.frame()
            assert scope.cancelled_caught
        gate.opened.set()
        await sender.receipt("s")
        assert (await consumer.expect("MESSAGE")).body == b"x"


async def test_an_error_waits_for_the_commit_of_what_was_asked_before_it(monkeypatch: pytest.MonkeyPatch):
    async with embedded() as (_, port), dialled(port) as sender:
        gate = Gate(monkeypatch)
        await sender.send(frame("SEND", "destination:/queue/a", "receipt:s") + frame("SEND", "receipt:r"))
        with trio.move_on_after(QUIET) as scope:
            await sender.frame()
        assert scope.cancelled_caught
        gate.opened.set()
        await sender.receipt("s")
        assert (await sender.error())["receipt-id"] == "r"


async def test_an_acknowledgement_is_confirmed_after_its_commit(monkeypatch: pytest.MonkeyPatch):
    async with embedded() as (_, port), dialled(port) as peer:
        await peer.do("SEND", "destination:/queue/a")
        await peer.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:client"))
        message = await peer.expect("MESSAGE")
        gate = Gate(monkeypatch)
        await peer.send(frame("ACK", f"id:{message['ack']}", "receipt:r"))
        with trio.move_on_after(QUIET) as scope:
            await peer.frame()
        assert scope.cancelled_caught
        gate.opened.set()
        await peer.receipt("r")
