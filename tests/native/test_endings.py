"""How native connections begin and end: letting in, silence, stopping, failing, other leaders, members, links."""

from __future__ import annotations

import logging
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

from pybroker.broker import Broker, open_broker
from pybroker.errors import NotLeader
from pybroker.server import STOPPING
from pybroker.users import hash_password
from tests.engine.support import Disk, broker_on, check, check_empty, drain, engine_of, wait_serving
from tests.native.peer import (
    ACK,
    BEAT,
    BYE,
    CONFIRM,
    ERROR,
    HELLO,
    MEMBERS,
    SEND,
    SUBSCRIBE,
    WELCOME,
    Peer,
    connected,
    dialled,
    pack,
    rows,
)

A = "/queue/a"


def check_empty_but(broker: Broker, destination: str) -> None:
    """Nothing is left but one message in a queue."""
    check(broker)
    depths = {name: queue.depth for name, queue in engine_of(broker).core.by_destination.items() if queue.depth}
    assert depths == {destination: 1}


# ---- letting in


async def test_welcome_says_what_a_client_must_know(autojump_clock: trio.abc.Clock) -> None:
    native = {"send_messages_max": 77, "send_bytes_max": 777, "heartbeat_interval": 2.0}
    async with open_broker(name="north", native=native) as broker, connected(broker, unheard_of=[1]) as peer:
        welcome = peer.welcome
        assert welcome.pop("software").startswith("pybroker/")
        assert len(welcome.pop("session")) > 8
        assert welcome == {
            "broker": "north",
            "heartbeat": 2.0,
            "body_bytes_max": 64 * 1024 * 1024,
            "frame_bytes_max": 72 * 1024 * 1024,
            "send_messages_max": 77,
            "send_bytes_max": 777,
            "transaction_messages_max": 10_000,
            "transaction_bytes_max": 64 * 1024 * 1024,
            "producer_known": False,
            "members": {},
        }


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        ([HELLO, "stomp", [1], {}], "must say 'pybroker'"),
        ([HELLO, "pybroker", [2, 3], {}], "speaks version 1 of the protocol, and the client offers 2, 3"),
        ([HELLO, "pybroker", [], {}], "the client offers none"),
        ([HELLO, "pybroker", [1], {"producer": "short"}], "16 to 64 letters"),
        ([HELLO, "pybroker", [1], {"producer": "x" * 15 + ":"}], "16 to 64 letters"),
        ([HELLO, "pybroker", [1], {"producer_new": 1}], "true or false"),
        ([HELLO, "pybroker", [1], {"heartbeat": -1}], "heartbeat must be"),
        ([HELLO, "pybroker", [1], {"heartbeat": float("nan")}], "heartbeat must be"),
        ([HELLO, "pybroker", [1], {"client_id": 5}], "client_id must be text"),
        ([SEND, 1, []], "must be HELLO"),
        ([WELCOME, 1, {}], "must be HELLO"),
        ([30, "pybroker link", [1], {}], "is in no network"),
    ],
)
async def test_a_bad_first_frame_is_refused(autojump_clock: trio.abc.Clock, frame: Any, words: str) -> None:
    async with open_broker() as broker, connected(broker, hello=False) as peer:
        await peer.send(frame)
        assert words in (await peer.error("protocol"))[2]


async def test_frames_behind_hello_wait_for_its_answer(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker, hello=False) as peer:
        await peer.send([HELLO, "pybroker", [1], {}], [SEND, 1, rows(3)], [BYE])
        frames = await peer.end()
        assert [frame[0] for frame in frames] == [WELCOME, BYE]
        assert peer.confirmed.keys() == {1, 2, 3}


async def test_who_says_nothing_is_not_waited_for(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker(native={"connect_timeout": 4.0}) as broker, connected(broker, hello=False) as peer:
        began = trio.current_time()
        await peer.stream.send_all(b"\0\0")
        assert "limit native.connect_timeout is 4 seconds" in (await peer.error("protocol"))[2]
        assert 4.0 <= trio.current_time() - began < 5.0


async def test_logins_are_checked() -> None:
    users = {"anna": hash_password("secret")}
    async with open_broker(users=users, anonymous=False) as broker:
        async with connected(broker, login="anna", passcode="secret"):
            pass
        for options in ({"login": "anna", "passcode": "wrong"}, {"login": "bert", "passcode": "secret"}, {}):
            async with connected(broker, hello=False) as peer:
                await peer.send([HELLO, "pybroker", [1], options])
                await peer.error("authentication")


async def test_a_real_socket_and_the_connection_limit() -> None:
    async with open_broker(listen=["pybroker://127.0.0.1:0"], limits={"connections_max": 1}) as broker:
        (url,) = broker.listeners
        assert url.startswith("pybroker://127.0.0.1:")
        port = int(url.rpartition(":")[2])
        async with dialled(port) as peer:
            await peer.send([SEND, 1, rows(1_000)], [SUBSCRIBE, 7, 1, A, "auto", 0, ""])
            got = await peer.deliveries(1, 1_000)
            await peer.send([ACK, 8, 1, [got[0].tag, got[-1].tag]])
            await peer.done(7)
            await peer.done(8)
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                assert "limits.connections_max" in (await Peer(stream).error("limit"))[2]
            await peer.send([BYE])
            assert await peer.end() == [[BYE]]
        check_empty(broker)


async def test_a_socket_that_is_reset_gives_back_what_it_held() -> None:
    async with open_broker(listen=["pybroker://127.0.0.1:0"]) as broker:
        port = int(broker.listeners[0].rpartition(":")[2])
        async with dialled(port) as peer:
            await peer.send([SEND, 1, rows(100)])
            await peer.subscribe(1)
            await peer.deliveries(1, 100)
            peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # type: ignore[attr-defined]
        async with dialled(port) as peer:
            await peer.subscribe(1)
            assert [one.deliveries for one in await peer.deliveries(1, 100)] == [1] * 100


async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    listen = [f"pybroker+ssl://localhost:0?cert={tmp_path / 'cert.pem'}&key={tmp_path / 'key.pem'}"]
    async with open_broker(listen=listen) as broker:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        port = int(broker.listeners[0].rpartition(":")[2])
        stream = await trio.open_ssl_over_tcp_stream("localhost", port, ssl_context=context, https_compatible=True)
        async with stream:
            peer = Peer(stream)
            await peer.hello()
            await peer.send([SEND, 1, rows(10)])
            await peer.confirms(*range(1, 11))
            await peer.send([BYE])
            assert await peer.end() == [[BYE]]


# ---- silence


async def test_heart_beats_go_out_only_when_nothing_else_does(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker(native={"heartbeat_interval": 2.0}) as broker, connected(broker) as peer:
        await peer.listen(20.5)
        assert 10 <= peer.beats <= 14
        peer.beats = 0
        for number in range(1, 21):
            await peer.send([SEND, number, rows(1)])
            await peer.confirms(number)
            await trio.sleep(1.0)
        assert peer.beats == 0


async def test_a_silent_client_is_ended_and_one_that_beats_is_not(autojump_clock: trio.abc.Clock) -> None:
    async with (
        open_broker(native={"heartbeat_timeout": 6.0}) as broker,
        connected(broker, heartbeat=1.0) as silent,
        connected(broker, heartbeat=4) as slow,
    ):
        await silent.subscribe(1)
        await slow.send([SEND, 1, rows(1)])
        await silent.delivery(1)
        began = trio.current_time()

        async def beat() -> None:
            while True:
                await trio.sleep(4.0)
                await slow.send([BEAT])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(beat)
            await silent.error("protocol")
            assert 6.0 <= trio.current_time() - began < 9.0, "three of its intervals, but not less than the limit"
            await trio.sleep(40.0)
            nursery.cancel_scope.cancel()
        await slow.subscribe(1)
        assert (await slow.delivery(1)).deliveries == 1
        began = trio.current_time()
        await slow.listen(20.0)
        await slow.error("protocol")
        assert 12.0 <= trio.current_time() - began < 15.0, "three of its own intervals"


async def test_a_client_that_sends_no_heart_beats_may_be_silent(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await trio.sleep(1_000)
        await peer.send([SEND, 1, rows(1)])
        await peer.confirms(1)


async def test_a_client_whose_heart_beats_wait_unread_is_not_taken_for_silent(
    autojump_clock: trio.abc.Clock,
) -> None:
    """It reads nothing, so that nothing more is read of it: it can't be told whether it is silent."""
    native, limits = {"heartbeat_timeout": 3.0}, {"outbox_bytes_max": 100}
    async with (
        open_broker(native=native, limits=limits) as broker,
        connected(broker) as sender,
        connected(broker, lockstep=True, heartbeat=1.0) as peer,
    ):
        await peer.subscribe(1)
        await sender.send([SEND, 1, rows(50)])
        await sender.confirms(50)
        await peer.send([BEAT], [SEND, 1, rows(1, "/queue/b")])
        await trio.sleep(60.0)
        await peer.deliveries(1, 50)
        await peer.confirms(1)


# ---- ends


async def test_after_bye_nothing_is_read_and_nothing_new_is_given(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, connected(broker) as peer:
        await peer.subscribe(1)
        disk.shut()
        await peer.send(
            [SEND, 1, rows(5, "/queue/b")], [SEND, 6, rows(5)], [BYE], [SEND, 100, rows(1)], [99, "nonsense"]
        )
        await peer.silent()
        disk.gate.set()
        assert await peer.end() == [[BYE]]
        assert peer.confirmed.keys() == set(range(1, 11))
        found = await drain(broker, A)
        assert len(found[A]) == 5
        check(broker)


async def test_nothing_new_is_given_while_bye_waits(autojump_clock: trio.abc.Clock) -> None:
    async with (
        open_broker(limits={"queue_messages_max": 2}) as broker,
        connected(broker) as peer,
        connected(broker) as other,
    ):
        await peer.subscribe(1, "/queue/c")
        await peer.send([SEND, 1, rows(3)], [BYE])
        await peer.confirms(1, 2)
        await other.send([SEND, 1, rows(2, "/queue/c")])
        await other.confirms(1, 2)
        await peer.silent()
        await drain(broker, A)
        assert await peer.end() == [[BYE]]
        assert 3 in peer.confirmed
        assert not peer.received(1)


async def test_what_waits_is_given_up_when_the_connection_ends(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk, limits={"queue_messages_max": 2}) as broker:
        async with connected(broker) as peer, connected(broker) as other:
            await peer.send([SEND, 1, rows(4)])
            await peer.confirms(1, 2)
            await other.subscribe(1)
            got = await other.deliveries(1, 2)
            disk.shut()
            await other.send([SEND, 1, rows(1, "/queue/b")])
            await peer.send([WELCOME, 1, {}])  # the ERROR stands behind the batch, and room comes before that
            await trio.testing.wait_all_tasks_blocked()
            await other.send([ACK, 0, 1, [got[0].tag, got[1].tag]])
            await trio.testing.wait_all_tasks_blocked()
            disk.gate.set()
            await peer.error("protocol")
        check_empty_but(broker, "/queue/b")


async def test_the_last_word_comes_also_when_the_time_of_what_waited_is_over(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    limits = {"queue_messages_max": 2, "full_timeout": 1.0}
    async with broker_on(disk, limits=limits) as broker, connected(broker) as peer:
        await peer.send([SEND, 1, rows(2)])
        await peer.confirms(1, 2)
        disk.shut()
        await peer.send([SEND, 3, rows(1, "/queue/b")], [SEND, 4, rows(2)])
        await trio.sleep(0.5)
        await peer.send([WELCOME, 1, {}])
        await trio.sleep(5.0)
        disk.gate.set()
        await peer.error("protocol")
        assert (peer.confirmed.keys(), peer.refused) == ({1, 2, 3}, {})


async def test_at_the_end_of_the_stream_what_a_client_holds_returns_before_the_disk_is_done(
    autojump_clock: trio.abc.Clock,
) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, connected(broker) as peer:
        await peer.send([SEND, 1, rows(2)])
        await peer.subscribe(1)
        await peer.deliveries(1, 2)
        disk.shut()
        await peer.send([SEND, 3, rows(1, "/queue/b")])
        await peer.stream.send_eof()  # type: ignore[attr-defined]
        await trio.testing.wait_all_tasks_blocked()
        queue = engine_of(broker).core.by_destination[A]
        assert (len(queue.consumers), len(queue.outstanding)) == (0, 0)
        disk.gate.set()
        assert await peer.end() == []
        assert 3 in peer.confirmed, "what it asked for before is still answered"


async def test_a_durable_subscription_is_free_when_bye_comes(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker:
        for _ in range(5):
            async with connected(broker, client_id="me") as peer:
                await peer.subscribe(1, "/topic/t", durable="mine")
                await peer.send([BYE])
                assert await peer.end() == [[BYE]]
                async with connected(broker, client_id="me") as other:
                    await other.subscribe(1, "/topic/t", durable="mine")


async def test_an_error_of_the_client_ends_the_connection_without_an_answer(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as peer:
        await peer.send([SEND, 1, rows(2)], [ERROR, "protocol", "what the broker said is nonsense", {}])
        assert await peer.end() == []
        assert peer.confirmed.keys() == {1, 2}


async def test_a_violation_comes_behind_what_was_asked_for_before(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, connected(broker) as peer:
        disk.shut()
        await peer.send([SEND, 1, rows(5)], [CONFIRM, []], [SEND, 6, rows(5)])
        await peer.silent()
        disk.gate.set()
        assert "a client sends no frames of type 20" in (await peer.error("protocol"))[2]
        assert peer.confirmed.keys() == set(range(1, 6))


async def test_a_graceful_stop_confirms_what_was_sent(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with (
        trio.open_nursery() as nursery,
        broker_on(disk) as broker,
        connected(broker) as peer,
        connected(broker, hello=False) as early,
    ):
        await peer.subscribe(1)
        disk.shut()
        await peer.send([SEND, 1, rows(5)])
        await peer.silent()
        nursery.start_soon(broker._stop)
        await trio.sleep(0.1)
        disk.gate.set()
        await early.error("closed")
        error = await peer.error("closed")
        assert "the broker is stopping" in error[2]
        assert peer.confirmed.keys() == set(range(1, 6))
    async with broker_on(Disk(disk.backend.synced)) as broker:
        assert len((await drain(broker, A))[A]) == 5


async def test_a_stop_does_not_wait_for_sends_without_room(autojump_clock: trio.abc.Clock) -> None:
    async with (
        trio.open_nursery() as nursery,
        open_broker(limits={"queue_messages_max": 2}) as broker,
        connected(broker) as peer,
    ):
        await peer.send([SEND, 1, rows(5)])
        await peer.confirms(1, 2)
        began = trio.current_time()
        nursery.start_soon(broker._stop)
        await peer.error("closed")
        assert trio.current_time() - began < 1.0
        assert peer.confirmed.keys() == {1, 2}
        assert peer.refused == {}


async def test_a_failing_disk_confirms_nothing_and_the_broker_comes_back(autojump_clock: trio.abc.Clock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker:
        async with connected(broker) as peer, connected(broker) as waiting:
            await peer.send([SEND, 1, rows(3)])
            await peer.confirms(1, 2, 3)
            disk.fill(True)
            await peer.send([SEND, 4, rows(3)])
            await peer.error("closed")
            assert peer.confirmed.keys() == {1, 2, 3}
            await waiting.error("closed")
        disk.fill(False)
        await wait_serving(broker)
        async with connected(broker) as peer:
            await peer.subscribe(1)
            await peer.deliveries(1, 3)


async def test_who_can_not_serve_says_so_at_once(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker:
        error = NotLeader("nobody leads")

        def refuse() -> Any:
            raise error

        broker._server._find_engine = refuse
        async with connected(broker, hello=False) as peer:
            assert (await peer.error("not-leader"))[3] == {"leader": "", "urls": []}


async def test_a_fault_of_ours_ends_one_connection_only(
    autojump_clock: trio.abc.Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_broker() as broker, connected(broker) as other:
        async with connected(broker) as peer:
            await peer.send([SEND, 1, rows(2)])
            await peer.subscribe(1)
            await peer.deliveries(1, 2)
            core = engine_of(broker).core

            def broken(*_: Any) -> None:
                raise ZeroDivisionError

            core.remove_subscription = broken  # type: ignore[assignment]
            with caplog.at_level(logging.CRITICAL, "pybroker.native"):
                await peer.send([17, 7, "name"])
                assert await peer.end() == []
        await other.subscribe(1)
        assert [one.deliveries for one in await other.deliveries(1, 2)] == [1, 1]


# ---- members and links


async def test_members_are_told_at_the_start_and_when_they_change(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker, connected(broker) as early, connected(broker, hello=False) as before:
        members = {"north": ("pybroker://n:1", "pybroker://n:2"), "south": ()}
        broker._server.set_members(members)
        plain = {"north": ["pybroker://n:1", "pybroker://n:2"], "south": []}
        assert await early.frame() == [MEMBERS, plain]
        async with connected(broker) as late:
            assert late.welcome["members"] == plain
            await late.silent()
            broker._server.set_members(dict(members))
            await late.silent()
            broker._server.set_members({})
            assert await late.frame() == [MEMBERS, {}]
        await before.hello()
        assert before.welcome["members"] == {}
        await before.silent()


async def test_a_link_is_handed_on_with_all_that_was_read(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker:
        hello = pack([30, "pybroker link", [1], {"name": "south"}])
        read = bytearray()
        ended = trio.Event()

        async def accept(stream: trio.abc.Stream, data: bytes) -> None:
            nonlocal read
            read += data
            while len(read) < len(hello) + 4:
                read += await stream.receive_some(10)
            await stream.send_all(b"up")
            await ended.wait()

        broker._server.accept_link = accept
        ours, theirs = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(broker._server.serve_stream, theirs, True)
            for at in range(len(hello)):
                await ours.send_all(hello[at : at + 1])
                await trio.testing.wait_all_tasks_blocked()
            await ours.send_all(b"more")
            assert await ours.receive_some(10) == b"up"
            assert bytes(read) == hello + b"more"
            assert broker._server.connections == 1
            await trio.sleep(100)  # no deadline of ours holds
            ended.set()
            assert await ours.receive_some(10) == b""


async def test_a_link_is_left_to_who_serves_it_when_connections_are_closed(autojump_clock: trio.abc.Clock) -> None:
    async with open_broker() as broker:
        ended = trio.Event()

        async def accept(stream: trio.abc.Stream, data: bytes) -> None:
            await ended.wait()
            await stream.send_all(pack([BYE]))

        broker._server.accept_link = accept
        async with connected(broker, hello=False) as peer, connected(broker) as client:
            await peer.send([30, "pybroker link", [1], {}])
            await trio.testing.wait_all_tasks_blocked()
            broker._server.close_connections(STOPPING)
            await client.error("closed")
            await peer.silent()
            ended.set()
            assert await peer.end() == [[BYE]]
