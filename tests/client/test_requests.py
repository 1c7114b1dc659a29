"""Temporary destinations and requests, as clients see them: one suite in process, over the native protocol, and over STOMP.

Over STOMP a client names its own ``/temp-queue/NAME``, and others find the name that they can use in ``reply-to``.
"""

# ruff: noqa: SIM117 (blocks that nest are what is tested)
from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from pybroker.client import Client
from pybroker.errors import BrokerClosed, InvalidMessage, LimitExceeded, RequestTimeout, SendInDoubt, SubscriptionError
from tests.client.conftest import World
from tests.client.support import nothing_comes, wires

Q = "/queue/services"
A = "pybroker://a:1"


async def serve(client: Client, count: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Answer so many requests with what they say, in capitals."""
    async with client.subscribe(Q) as requests:
        task_status.started()
        for _ in range(count):
            request = await requests.receive()
            await client.reply(request, request.body.upper(), {"status": "ok"})
            await request.ack()


# ---- temporary destinations


async def test_a_temporary_queue_is_where_others_reply(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as asker, world.client() as other:
        async with asker.temporary_queue() as name:
            async with asker.subscribe(name) as replies, other.subscribe(Q) as requests:
                await asker.send(Q, b"?", {"reply-to": name})
                request = await requests.receive()
                address = request.header("reply-to") or ""
                assert address.startswith("/remote-temp-queue/")
                confirmation = await other.send(address, b"!", durable=True)
                if world.kind != "stomp":  # whose receipts do not say
                    assert not confirmation.durable
                reply = await replies.receive()
                assert reply.body == b"!"
                assert reply.destination == name  # its owner's name for it
                await reply.ack()


async def test_nobody_else_consumes_it(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as asker, world.client() as requests_of:
        async with requests_of.subscribe(Q) as requests, asker.temporary_queue() as name:
            await asker.send(Q, b"?", {"reply-to": name})
            address = (await requests.receive()).header("reply-to") or ""

            async def steal() -> None:
                async with world.client() as thief, thief.subscribe(address):
                    raise AssertionError("it was let in")

            with pytest.raises(SubscriptionError, match="only its owner"):
                await steal()


async def test_a_temporary_topic_gives_to_each_subscription(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as asker, world.client() as other:
        async with asker.temporary_topic() as name, other.subscribe(Q) as requests:
            async with asker.subscribe(name, ack="auto") as one, asker.subscribe(name, ack="auto") as two:
                await asker.send(Q, b"?", {"reply-to": name})
                address = (await requests.receive()).header("reply-to") or ""
                assert address.startswith("/remote-temp-topic/")
                await other.send(address, b"!")
                assert [(await each.receive()).body for each in (one, two)] == [b"!", b"!"]


async def test_it_is_gone_with_its_client(autojump_clock: MockClock, world: World) -> None:
    broker = await world.broker()
    async with world.client() as other, other.subscribe(Q) as requests:
        async with world.client() as asker, asker.temporary_queue() as name:
            await asker.send(Q, b"?", {"reply-to": name})
            request = await requests.receive()
            await other.reply(request, b"nobody reads this in time")
            assert broker.statistics().temporary_destinations == 1
        await trio.sleep(1)
        await other.reply(request, b"too late")  # confirmed: the replier can't help it
        await request.ack()
        statistics = broker.statistics()
    assert (statistics.unclaimed, statistics.temporary_destinations) == (2, 0)
    assert sum(each.depth for each in statistics.destinations) == 0


async def test_so_many_and_no_more(autojump_clock: MockClock, world: World) -> None:
    await world.start(limits={"temporary_destinations_max": 1})

    async def two() -> None:
        async with world.client() as client, client.temporary_queue() as one, client.temporary_queue() as another:
            async with client.subscribe(one), client.subscribe(another):
                raise AssertionError("there are two")

    with pytest.raises(LimitExceeded, match="temporary_destinations_max"):
        await two()


async def test_leaving_the_block_ends_its_subscriptions(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("STOMP has no frame for it: they go with the connection")
    broker = await world.broker()
    async with world.client() as client:
        async with client.temporary_queue() as name:
            replies = await client.subscribe(name).__aenter__()
        with pytest.raises(SubscriptionError):
            await replies.receive()
        await client.send(name, b"nobody")
        assert broker.statistics().unclaimed == 1
        async with client.temporary_queue() as another:
            assert another != name


# ---- requests


async def test_a_request_and_its_reply(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as asker, world.client() as other, trio.open_nursery() as nursery:
        await nursery.start(serve, other, 2)
        reply = await asker.request(Q, b"ecg 12", {"patient": "7"}, timeout=5)
        assert (reply.body, reply.header("status")) == (b"ECG 12", "ok")
        assert (await asker.request(Q, b"again", timeout=5)).body == b"AGAIN"


async def test_many_at_once_each_get_their_own(autojump_clock: MockClock, world: World) -> None:
    found: dict[int, bytes] = {}

    async def ask(client: Client, number: int) -> None:
        found[number] = (await client.request(Q, b"n%d" % number, timeout=50)).body

    async with world.client() as asker, world.client() as other:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, other, 100)
            for number in range(100):
                nursery.start_soon(ask, asker, number)
    assert found == {number: b"N%d" % number for number in range(100)}


async def test_no_reply_in_time(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as asker, world.client() as other:
        began = trio.current_time()
        with pytest.raises(RequestTimeout, match="within 3 s"):
            await asker.request(Q, b"slow", timeout=3)
        assert trio.current_time() - began == pytest.approx(3, abs=0.1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, other, 2)  # the first one's reply comes too late
            assert (await asker.request(Q, b"next", timeout=5)).body == b"NEXT"
        assert asker.late_replies == 1


async def test_whoever_reads_for_all_may_be_cancelled(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as asker, world.client() as other:
        found: list[bytes] = []

        async def ask(body: bytes, timeout: float) -> None:
            with trio.move_on_after(timeout):
                found.append((await asker.request(Q, body, timeout=60)).body)

        async with trio.open_nursery() as nursery:
            for body, timeout in ((b"reader", 1), (b"second", 2), (b"third", 60), (b"fourth", 60)):
                nursery.start_soon(ask, body, timeout)
                await wait_all_tasks_blocked(0.01)
            await trio.sleep(3)
            nursery.start_soon(serve, other, 4)
        assert sorted(found) == [b"FOURTH", b"THIRD"]
        assert asker.late_replies in (1, 2)  # the last may not have been read


async def test_what_is_no_request_and_no_reply(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as client:
        with pytest.raises(InvalidMessage, match="reply-to"):
            await client.request(Q, b"", {"correlation-id": "mine"}, timeout=1)
        await client.send(Q, b"no request")
        async with client.subscribe(Q) as messages:
            message = await messages.receive()
            with pytest.raises(InvalidMessage, match="no reply-to"):
                await client.reply(message, b"")
            await message.ack()


async def test_a_second_reply_is_late(autojump_clock: MockClock, world: World) -> None:
    async with world.client() as asker, world.client() as other:

        async def twice() -> None:
            async with other.subscribe(Q) as requests:
                request = await requests.receive()
                await other.reply(request, b"1")
                await other.reply(request, b"2")
                await request.ack()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(twice)
            assert (await asker.request(Q, b"", timeout=5)).body == b"1"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, other, 1)
            assert (await asker.request(Q, b"x", timeout=5)).body == b"X"
        assert asker.late_replies == 1


async def test_a_client_that_ends_leaves_nobody_waiting(autojump_clock: MockClock, world: World) -> None:
    if world.kind == "stomp":
        pytest.skip("the suite's STOMP client has no life of its own")

    async def ask(client: Client) -> None:
        with pytest.raises(BrokerClosed):
            await client.request(Q, b"", timeout=1_000)

    async with trio.open_nursery() as nursery:
        async with world.client() as client:
            nursery.start_soon(ask, client)
            nursery.start_soon(ask, client)
            await wait_all_tasks_blocked(0.01)


# ---- over lost connections


async def test_a_lost_connection_fails_what_waits_and_the_next_request_goes_on(autojump_clock: MockClock) -> None:
    world_kinds = []
    async with trio.open_nursery() as nursery:
        world = World("native", nursery)
        broker = await world.start()
        async with wires() as net:
            net.serve_broker(A, broker)
            async with net.client(A) as asker, broker.connect() as other, other.subscribe(Q) as requests:

                async def ask() -> None:
                    with pytest.raises(SendInDoubt, match="may have been carried out"):
                        await asker.request(Q, b"first", timeout=1_000)
                    world_kinds.append("told")

                async with trio.open_nursery() as asking:
                    for _ in range(3):
                        asking.start_soon(ask)
                    first = [await requests.receive() for _ in range(3)]
                    net.cut(A)
                assert world_kinds == ["told"] * 3
                async with trio.open_nursery() as serving:
                    serving.start_soon(serve_one, other, requests)
                    assert (await asker.request(Q, b"next", timeout=5)).body == b"NEXT"
                for request in first:  # their queue is there again, and nobody waits
                    await other.reply(request, b"late")
                    await request.ack()
                async with trio.open_nursery() as serving:
                    serving.start_soon(serve_one, other, requests)
                    await asker.request(Q, b"last", timeout=5)
                assert asker.late_replies == 3
                assert broker.statistics().temporary_destinations == 1
        await world.stop()
        nursery.cancel_scope.cancel()


async def serve_one(client: Client, requests: object) -> None:
    request = await requests.receive()  # type: ignore[attr-defined]
    await client.reply(request, request.body.upper())
    await request.ack()


async def test_a_temporary_queue_is_made_again_under_its_name(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        world = World("native", nursery)
        broker = await world.start()
        async with wires() as net:
            net.serve_broker(A, broker)
            async with net.client(A) as asker, broker.connect() as other, asker.temporary_queue() as name:
                async with asker.subscribe(name, ack="auto") as replies:
                    net.cut(A)
                    await trio.sleep(5)
                    await other.send(name, b"after")
                    assert (await replies.receive()).body == b"after"
                    assert await nothing_comes(replies)
        await world.stop()
        nursery.cancel_scope.cancel()


async def test_where_the_queue_for_replies_was_lost_the_next_request_makes_another(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        world = World("native", nursery)
        broker = await world.start(limits={"temporary_destinations_max": 1})
        async with wires() as net:
            net.serve_broker(A, broker)
            async with net.client(A) as asker, broker.connect() as other, other.subscribe(Q) as requests:

                async def ask(body: bytes) -> bytes:
                    async with trio.open_nursery() as serving:
                        serving.start_soon(serve_one, other, requests)
                        return (await asker.request(Q, body, timeout=5)).body

                async def lose() -> None:
                    engine = broker._running()
                    core = engine.begin_turn()
                    (consumer,) = core.by_destination[asker._requests._name].consumers
                    core.closing.append((consumer, SubscriptionError("the broker ended it")))
                    engine.end_turn()
                    await trio.sleep(1)

                assert await ask(b"first") == b"FIRST"
                await lose()  # while nobody reads
                assert await ask(b"second") == b"SECOND"
                assert len(asker._lifeline.temporaries._there) == 1

                async def in_doubt() -> None:
                    with pytest.raises(SendInDoubt, match="may have been carried out"):
                        await asker.request(Q, b"third", timeout=1_000)

                async with trio.open_nursery() as asking:
                    asking.start_soon(in_doubt)
                    asking.start_soon(in_doubt)
                    for _ in range(2):
                        await (await requests.receive()).ack()
                    await lose()
                assert await ask(b"fourth") == b"FOURTH"
                assert broker.statistics().temporary_destinations == 1
        await world.stop()
        nursery.cancel_scope.cancel()
