"""What only real servers can show of `ZooKeeperCoordinator`: kill, pause, expiry, lost data, access lists, TLS, kazoo's traps."""

from __future__ import annotations

import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from kazoo.client import KazooClient

from pybroker.cluster.coordinator import CheckNode, CoordinatorLost, CreateNode, DeleteNode, Outcome, SetNode
from pybroker.cluster.zookeeper import ZooKeeperCoordinator, ZooKeeperTls, _Handler
from pybroker.errors import ConfigurationError
from tests.support.zookeeper import Ensemble, ensemble, free_ports, require_zookeeper

PATIENCE = 30.0  # seconds for anything that must happen
SESSION = 10.0
in_thread = trio.to_thread.run_sync


@pytest.fixture(scope="module")
def server() -> Iterator[Ensemble]:
    with ensemble(1) as servers:
        yield servers


@pytest.fixture(scope="module")
def three() -> Iterator[Ensemble]:
    with ensemble(3) as servers:
        yield servers


@pytest.fixture
async def stack():
    async with AsyncExitStack() as stack:
        yield stack


async def until(client: ZooKeeperCoordinator, condition: Callable[[], bool]) -> None:
    seen = -1
    with trio.fail_after(PATIENCE):
        while not condition():
            seen = await client.wait_change(seen)


async def opened(stack: AsyncExitStack, servers: str, name: str, **options: Any) -> ZooKeeperCoordinator:
    client = ZooKeeperCoordinator(servers, name, **{"session_timeout": SESSION, **options})
    await stack.enter_async_context(client)
    await until(client, lambda: client.connected)
    return client


async def read(client: ZooKeeperCoordinator) -> Any:
    """Read, however long it takes until that can be done."""
    with trio.fail_after(PATIENCE):
        while True:
            await until(client, lambda: client.connected)
            try:
                return await client.read()
            except CoordinatorLost:
                await trio.sleep(0.01)


# -- servers that die, hang and forget


@pytest.mark.slow
async def test_servers_killed_in_the_middle_of_transactions(three: Ensemble, stack: AsyncExitStack):
    """UNKNOWN is settled by reading: each confirmed write is there once, and no other one but an unknown one."""
    writer = await opened(stack, three.addresses, "killed")
    assert await writer.transact([CreateNode("epoch", b"0")]) is Outcome.DONE
    done = {0}
    outcomes: list[Outcome] = []
    number, is_over = 0, False

    async def write() -> None:
        nonlocal number
        while not is_over:
            node = (await read(writer))["epoch"]
            assert int(node.data) in (*done, number), "a write that was confirmed is gone, or a refused one is there"
            done.add(int(node.data))  # whatever became of it when it was written: now it is known
            number += 1
            try:
                outcome = await writer.transact([SetNode("epoch", b"%d" % number, node.version)])
            except CoordinatorLost:
                continue
            outcomes.append(outcome)
            assert outcome is not Outcome.REFUSED, "nobody else writes, and each read settled what was before"
            if outcome is Outcome.DONE:
                done.add(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        for server in three.servers:
            await trio.sleep(0.3)
            await in_thread(server.kill)
            await trio.sleep(0.3)
            three.launch(server)
            await in_thread(three.wait_ready)
        is_over = True
    node = (await read(writer))["epoch"]
    done.add(int(node.data))
    assert node.version == len(done) - 1
    assert outcomes.count(Outcome.DONE) > 50


async def test_a_transaction_under_way_when_its_server_dies_is_unknown(server: Ensemble, stack: AsyncExitStack):
    writer = await opened(stack, server.addresses, "dies")
    await writer.transact([CreateNode("epoch", b"0")])
    server.servers[0].pause()
    try:
        outcomes = []

        async def write() -> None:
            outcomes.append(await writer.transact([SetNode("epoch", b"1", 0)]))

        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                await trio.sleep(0.1)
                await in_thread(server.kill)
        assert outcomes == [Outcome.UNKNOWN]
        with pytest.raises(CoordinatorLost):
            await writer.transact([SetNode("epoch", b"2", 1)])
        assert writer._client is not None
        writer._is_connected = True  # as if the news had not come yet: kazoo would keep the request, and send it later
        for ask in (lambda: writer.transact([SetNode("epoch", b"2", 1)]), writer.read):
            with trio.fail_after(1), pytest.raises(CoordinatorLost):
                await ask()
        writer._is_connected = False
        assert not writer._client._queue
    finally:
        await in_thread(server.kill)
        await in_thread(server.start)
    assert (await read(writer))["epoch"] == (b"0", 0, 0)  # the paused server had not read it


@pytest.mark.slow
async def test_a_session_that_expires_while_its_server_is_paused(three: Ensemble, stack: AsyncExitStack):
    leader = three.leader()
    follower = next(server for server in three.servers if server is not leader)
    client = await opened(stack, follower.address, "expires", session_timeout=1.0)
    other = await opened(stack, leader.address, "expires")
    assert await client.transact([CreateNode("leader", b"me", ephemeral=True)]) is Outcome.DONE
    session = client.session
    follower.pause()
    try:
        await until(client, lambda: not client.connected)
        assert client.session == session  # it can't know
        with trio.fail_after(PATIENCE):
            seen = -1
            while "leader" in await other.read():
                seen = await other.wait_change(seen)
    finally:
        follower.resume()
    await until(client, lambda: client.connected and client.session not in (0, session))
    assert await client.transact([CreateNode("leader", b"again", ephemeral=True)]) is Outcome.DONE
    assert (await other.read())["leader"].owner == client.session


@pytest.mark.slow
async def test_a_paused_server_costs_the_connection_and_not_the_session(three: Ensemble, stack: AsyncExitStack):
    client = await opened(stack, three.addresses, "paused", session_timeout=3.0)
    assert await client.transact([CreateNode("leader", b"me", ephemeral=True)]) is Outcome.DONE
    for _ in range(2):
        session = client.session
        assert client._client is not None
        host = client._client._peer
        server = next(server for server in three.servers if (server.host, server.client_port) == host)
        server.pause()
        try:
            await until(client, lambda: not client.connected)
            assert client._client.hosts[-1] == host  # it still accepts connections, and would be waited for
            await until(client, lambda: client.connected)
            assert client._client._peer != host
            assert (await read(client))["leader"].owner == client.session == session
        finally:
            server.resume()


@pytest.mark.slow
async def test_a_silent_server_is_noticed_although_requests_go_on(server: Ensemble, stack: AsyncExitStack):
    """kazoo sends no heartbeat as long as it has requests to send, and would wait for their answers for ever."""
    client = await opened(stack, server.addresses, "silent", session_timeout=2.0)
    await client.transact([CreateNode("epoch", b"0")])
    server.servers[0].pause()
    outcomes = []

    async def write() -> None:
        outcomes.append(await client.transact([SetNode("epoch", b"1", 0)]))

    try:
        with trio.fail_after(PATIENCE):
            async with trio.open_nursery() as nursery:
                while client.connected:
                    nursery.start_soon(write)
                    await trio.sleep(0.1)
        assert set(outcomes) == {Outcome.UNKNOWN}
    finally:
        server.resume()
    assert (await read(client))["epoch"].version <= 1


@pytest.mark.slow
async def test_the_whole_ensemble_down_and_back(three: Ensemble, stack: AsyncExitStack):
    client = await opened(stack, three.addresses, "down", session_timeout=4.0)
    await client.transact([CreateNode("leader", b"me", ephemeral=True), CreateNode("epoch", b"1")])
    session = client.session
    await in_thread(three.kill)
    await until(client, lambda: not client.connected)
    with pytest.raises(CoordinatorLost):
        await client.read()
    await in_thread(three.start)
    await until(client, lambda: client.connected)
    nodes = await read(client)
    assert nodes["epoch"].data == b"1"
    assert client.session == session
    assert nodes["leader"].owner == session
    assert await client.transact([CheckNode("epoch", 0), DeleteNode("leader", 0)]) is Outcome.DONE


@pytest.mark.slow
async def test_an_ensemble_that_lost_its_data_is_joined_again(stack: AsyncExitStack):
    """Servers refuse a client that has seen newer transactions than they have, and kazoo would try for ever."""
    with ensemble(1) as servers:
        client = await opened(stack, servers.addresses, "wiped", session_timeout=2.0)
        await client.transact([CreateNode("leader", b"me", ephemeral=True), CreateNode("epoch", b"1")])
        session = client.session
        await in_thread(servers.kill)
        servers.wipe()
        await in_thread(servers.start)
        await until(client, lambda: client.connected and client.session not in (0, session))
        assert await read(client) == {}
        assert await client.transact([CreateNode("epoch", b"2")]) is Outcome.DONE
        await client.aclose()


async def test_something_else_answers_at_the_address(stack: AsyncExitStack, caplog: pytest.LogCaptureFixture):
    require_zookeeper()
    servers = Ensemble(1)
    listener = socket.create_server(("127.0.0.1", servers.servers[0].client_port))
    answered = threading.Event()

    def answer() -> None:
        web = b"HTTP/1.1 400 Bad Request\r\n\r\n"
        welcome = struct.pack("!iiiqi16sx", 37, 0, 1000, 5, 16, b"")
        for reply in (web, b"\x00\x00\x00\x02\xff\xff", b"", web, welcome + b"\x00\x00\x00\x02\xff\xff"):
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(reply)
        answered.set()

    try:
        threading.Thread(target=answer, daemon=True).start()
        client = ZooKeeperCoordinator(servers.addresses, "else", session_timeout=1.0)
        with caplog.at_level(logging.INFO):
            await stack.enter_async_context(client)
            assert await in_thread(answered.wait, PATIENCE)
            listener.close()
            await in_thread(servers.start)
            await until(client, lambda: client.connected)
        assert await client.read() == {}
        await client.aclose()
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("pybroker")]
        assert len(lines) <= 6, lines  # not one for each attempt
    finally:
        listener.close()
        servers.close()


async def test_closing_while_nothing_answers_is_quick():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for port in (listener.getsockname()[1], 1):  # one that accepts and is silent, one that refuses
            async with ZooKeeperCoordinator(f"127.0.0.1:{port}", "nobody") as client:
                await trio.sleep(0.2)
                with pytest.raises(CoordinatorLost):
                    await client.read()
                assert not client.connected
                assert client.session == 0
                started = time.monotonic()
                await client.aclose()
                assert time.monotonic() - started < 2


# -- what lies in ZooKeeper


async def test_a_chroot_is_made_when_it_is_missing(server: Ensemble, stack: AsyncExitStack):
    client = await opened(stack, server.addresses + "/some/where", "chroot")
    other = await opened(stack, server.addresses, "chroot")
    assert await client.transact([CreateNode("epoch", b"1"), CreateNode("slots/a", b"")]) is Outcome.DONE
    assert set(await client.read()) == {"epoch", "slots/a"}
    assert await other.read() == {}
    with raw(server.addresses) as zookeeper:
        assert zookeeper.get("/some/where/pybroker/chroot/epoch")[0] == b"1"


async def test_parents_that_an_operator_removed_are_made_again(server: Ensemble, stack: AsyncExitStack):
    client = await opened(stack, server.addresses + "/removed", "set")
    await client.transact([CreateNode("epoch", b"1"), CreateNode("slots/a", b"")])
    with raw(server.addresses) as zookeeper:
        zookeeper.delete("/removed", recursive=True)
    assert await client.transact([CreateNode("slots/a", b"")]) is Outcome.REFUSED
    assert await client.read() == {}
    assert await client.transact([CreateNode("slots/a", b"")]) is Outcome.DONE


async def test_all_that_is_made_belongs_to_the_secret(server: Ensemble, stack: AsyncExitStack):
    client = await opened(stack, server.addresses + "/ours", "set", secret="us:pass:word")
    await client.transact(
        [CreateNode("epoch", b"1"), CreateNode("slots/a", b""), CreateNode("leader", b"", ephemeral=True)]
    )
    found = {}
    with raw(server.addresses, auth_data=[("digest", "us:pass:word")]) as zookeeper:

        def walk(path: str) -> None:
            acls, _ = zookeeper.get_acls(path)
            found[path] = [(entry.id.scheme, entry.id.id.partition(":")[0], entry.perms) for entry in acls]
            for child in zookeeper.get_children(path):
                walk(f"{path}/{child}")

        walk("/ours")
    base = "/ours/pybroker/set"
    made = ["/ours", "/ours/pybroker", base, *(f"{base}/{path}" for path in ("slots", "alive", "slots/a", "epoch"))]
    assert set(found) == {*made, f"{base}/leader"}
    assert set(map(tuple, found.values())) == {(("digest", "us", 31),)}


@pytest.mark.parametrize("secret", ["us:wrong", "them:secret", None])
async def test_another_secret_is_refused_in_words(server: Ensemble, stack: AsyncExitStack, secret: str | None):
    owner = await opened(stack, server.addresses + "/theirs", "set", secret="us:secret")
    await owner.read()
    before = await owner.transact([CreateNode("slots/a", b"")])
    assert before in (Outcome.DONE, Outcome.REFUSED)  # an earlier case made it
    client = await opened(stack, server.addresses + "/theirs", "set", secret=secret)
    with pytest.raises(ConfigurationError, match="belongs to somebody else") as refusal:
        await client.read()
    assert "secret" not in str(refusal.value).replace("The secret", "").replace("other secrets", "")
    with pytest.raises(ConfigurationError, match="belongs to somebody else"):
        await client.transact([CreateNode("epoch", b"1")])
    assert set(await owner.read()) == {"slots/a"}


async def test_nodes_open_to_everyone_are_refused_where_there_is_a_secret(server: Ensemble, stack: AsyncExitStack):
    owner = await opened(stack, server.addresses + "/open", "set")
    await owner.read()
    client = await opened(stack, server.addresses + "/open", "set", secret="us:secret")
    with pytest.raises(ConfigurationError, match="open to everyone"):
        await client.read()


async def test_watchers_never_pile_up(server: Ensemble, stack: AsyncExitStack):
    client = await opened(stack, server.addresses, "watchers")
    await client.transact([CreateNode(path, b"") for path in ("epoch", "slots/a", "slots/b", "alive/a")])
    for _ in range(20):
        await client.read()
    kazoo = client._client
    assert kazoo is not None
    assert set(map(len, kazoo._data_watchers.values())) == {1}
    assert set(map(len, kazoo._child_watchers.values())) <= {1}
    watches = server.servers[0].ask("wchs")
    await client.transact([SetNode("epoch", b"1", 0)])
    await client.read()
    assert server.servers[0].ask("wchs") == watches


# -- settings


@pytest.mark.parametrize(
    ("servers", "options", "words"),
    [
        ("", {}, "HOST:PORT"),
        ("host:port", {}, "HOST:PORT"),
        ("a:1,:2", {}, "HOST:PORT"),
        ("a:1/x//y", {}, "chroot"),
        ("a:1/x/../y", {}, "chroot"),
        ("a:1", {"secret": "nocolon"}, "USER:PASSWORD"),
        ("a:1", {"secret": ":password"}, "USER:PASSWORD"),
        ("a:1", {"secret": "user:"}, "USER:PASSWORD"),
        ("a:1", {"session_timeout": 0.0}, "session_timeout"),
        ("a:1", {"tls": ZooKeeperTls(ca="/nonexistent")}, "TLS"),
        ("a:1", {"tls": ZooKeeperTls(certificate="/nonexistent")}, "both"),
    ],
)
def test_wrong_settings_are_refused(servers: str, options: dict[str, Any], words: str):
    with pytest.raises(ConfigurationError, match=words):
        ZooKeeperCoordinator(servers, "set", **options)


def test_a_set_s_name_is_part_of_a_path():
    for name in ("", "a/b", "..", "zoo keeper"):
        with pytest.raises(ConfigurationError, match="name of the set"):
            ZooKeeperCoordinator("a:1", name)


async def test_an_address_of_ipv6_and_a_server_that_is_not_there(server: Ensemble, stack: AsyncExitStack):
    addresses = f"[::1]:{server.servers[0].client_port},127.0.0.1:1,{server.addresses}"
    client = await opened(stack, addresses, "ipv6")
    assert await client.read() == {}


async def test_addresses_that_swallow_packets_do_not_cost_the_session(server: Ensemble, stack: AsyncExitStack):
    session_timeout = 6.0
    with ExitStack() as sockets:
        holes = []
        for _ in range(3):
            listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
            holes.append(listener.getsockname()[1])
            for _ in range(4):  # once its queue is full, the kernel drops what comes
                one = sockets.enter_context(socket.socket())
                one.setblocking(False)
                one.connect_ex(listener.getsockname())
        addresses = ",".join([*(f"127.0.0.1:{port}" for port in holes), server.addresses])
        with trio.fail_after(session_timeout):
            client = await opened(stack, addresses, "holes", session_timeout=session_timeout)
            await client.read()


async def test_what_tls_has_decrypted_already_is_seen():
    authority = trustme.CA()
    here, there = ssl.create_default_context(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.configure_trust(here)
    authority.issue_cert("localhost").configure_cert(there)
    raw_client, raw_server = socket.socketpair()
    waker, sleeper = socket.socketpair()

    def serve() -> None:
        with there.wrap_socket(raw_server, server_side=True) as stream:
            stream.sendall(b"two answers")
            stream.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with here.wrap_socket(raw_client, server_hostname="localhost") as stream, waker, sleeper:
        handler = _Handler(1.0, lambda host, port: None)
        assert stream.recv(3) == b"two"
        assert handler.select([stream, sleeper], [], [], 5.0)[0] == [stream]
        waker.send(b"x")
        assert handler.select([stream, sleeper], [], [], 5.0)[0] == [stream, sleeper]
        assert stream.recv(100) == b" answers"
        assert handler.select([stream, sleeper], [], [], 5.0)[0] == [sleeper]
        stream.sendall(b"x")
    thread.join()


@pytest.mark.slow
async def test_tls_checks_the_server_s_name(tmp_path: Path, stack: AsyncExitStack):
    ours, theirs = trustme.CA(), trustme.CA()
    leaf = ours.issue_cert("localhost")
    key = load_pem_private_key(leaf.private_key_pem.bytes(), None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())  # Java reads no other form
    (tmp_path / "server.pem").write_bytes(pem + b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    for name, authority in (("ours", ours), ("theirs", theirs)):
        authority.cert_pem.write_to_path(tmp_path / f"{name}.pem")
    (port,) = free_ports(1)
    settings = {
        "secureClientPort": port,
        "secureClientPortAddress": "127.0.0.1",
        "serverCnxnFactory": "org.apache.zookeeper.server.NettyServerCnxnFactory",
        "ssl.keyStore.location": tmp_path / "server.pem",
        "ssl.trustStore.location": tmp_path / "ours.pem",
        "ssl.clientAuth": "none",
    }
    with ensemble(1, settings=settings):
        ca = str(tmp_path / "ours.pem")
        client = await opened(stack, f"localhost:{port}", "tls", tls=ZooKeeperTls(ca=ca))
        assert await client.transact([CreateNode("epoch", b"x" * 50_000)]) is Outcome.DONE
        for _ in range(50):
            assert len((await client.read())["epoch"].data) == 50_000
        wrong_name = ZooKeeperCoordinator(f"127.0.0.1:{port}", "tls", tls=ZooKeeperTls(ca=ca))
        wrong_authority = ZooKeeperCoordinator(
            f"localhost:{port}", "tls", tls=ZooKeeperTls(ca=str(tmp_path / "theirs.pem"))
        )
        no_tls = ZooKeeperCoordinator(f"localhost:{port}", "tls")
        for stranger in (wrong_name, wrong_authority, no_tls):
            await stack.enter_async_context(stranger)
        await trio.sleep(1)
        assert [one.connected for one in (client, wrong_name, wrong_authority, no_tls)] == [True, False, False, False]
        await stack.aclose()


class raw:
    """kazoo itself, to look and to meddle; blocking."""

    def __init__(self, addresses: str, **options: Any) -> None:
        self._client = KazooClient(addresses, **options)

    def __enter__(self) -> KazooClient:
        self._client.start()
        return self._client

    def __exit__(self, *_: object) -> None:
        self._client.stop()
        self._client.close()
