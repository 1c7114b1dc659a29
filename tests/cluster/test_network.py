"""Replication links over real loopback sockets with TLS: who is let in, who is not, and that a bad peer holds up nobody."""

from __future__ import annotations

import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trustme

from pybroker.cluster.network import HANDSHAKES_MAX, TcpNetwork, make_network, split_address
from pybroker.cluster.tls import make_contexts
from pybroker.config import ReplicaSetConfig
from pybroker.errors import ConfigurationError
from tests.cluster.members import CONFIG

TRUSTED = trustme.CA()
OTHER = trustme.CA()


def files(
    directory: Path, authority: trustme.CA, host: str = "127.0.0.1", trusts: trustme.CA = TRUSTED
) -> ReplicaSetConfig:
    """A replica's configuration, its certificate for that host."""
    directory.mkdir(exist_ok=True)
    certificate = authority.issue_cert(host)
    certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
    for number, pem in enumerate(certificate.cert_chain_pems):
        pem.write_to_path(str(directory / "certificate.pem"), append=number > 0)
    trusts.cert_pem.write_to_path(str(directory / "ca.pem"))
    return replace(
        CONFIG, certificate=directory / "certificate.pem", key=directory / "key.pem", peer_ca=directory / "ca.pem"
    )


@asynccontextmanager
async def echo(network: TcpNetwork) -> AsyncIterator[str]:
    """A server that says everything back; its address."""

    async def handle(stream: trio.abc.Stream) -> None:
        try:
            while data := await stream.receive_some(1000):
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass
        finally:
            await trio.aclose_forcefully(stream)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            yield await nursery.start(network.serve, "127.0.0.1:0", handle)
            nursery.cancel_scope.cancel()


async def said_back(network: TcpNetwork, address: str) -> bool:
    """Whether a peer is let in: with TLS 1.3 the one who dials hears of a refusal only when it reads."""
    try:
        stream = await network.dial(address)
    except OSError:
        return False
    try:
        await stream.send_all(b"hello")
        return await stream.receive_some(1000) == b"hello"
    except trio.BrokenResourceError:
        return False
    finally:
        await trio.aclose_forcefully(stream)


async def test_replicas_with_certificates_of_the_set_s_authority_talk(tmp_path: Path) -> None:
    server = make_network(files(tmp_path / "a", TRUSTED))
    async with echo(server) as address:
        peer = make_network(files(tmp_path / "b", TRUSTED, "10.1.2.3"))
        assert await said_back(peer, address)
        stream = await peer.dial(address)
        assert isinstance(stream, trio.SSLStream)
        assert stream.version() in ("TLSv1.2", "TLSv1.3")
        await trio.aclose_forcefully(stream)
    assert server.refused == 0


async def test_plaintext_links_need_no_files(tmp_path: Path) -> None:
    network = make_network(CONFIG)
    async with echo(network) as address:
        assert await said_back(network, address)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("peer", ["without a certificate", "of another authority", "plaintext", "too old"])
async def test_who_is_not_of_the_set_is_refused_counted_and_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, peer: str
) -> None:
    server = make_network(files(tmp_path / "a", TRUSTED))
    client, _ = make_contexts(files(tmp_path / "b", OTHER if peer == "of another authority" else TRUSTED)) or (None, 0)
    assert client is not None
    if peer == "without a certificate":
        client = ssl.create_default_context(cafile=str(tmp_path / "b" / "ca.pem"))
    elif peer == "too old":
        client.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        client.maximum_version = ssl.TLSVersion.TLSv1_1
    stranger = TcpNetwork(None if peer == "plaintext" else client)
    async with echo(server) as address:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert not await said_back(stranger, address)
            while server.refused < 3:  # noqa: ASYNC110
                await trio.sleep(0.01)
        told = [record for record in caplog.records if "incoming replication connection" in record.getMessage()]
        assert len(told) == 1
        assert await said_back(make_network(files(tmp_path / "c", TRUSTED)), address)


@pytest.mark.parametrize("leader", ["of another authority", "of another host", "plaintext"])
async def test_a_leader_that_is_not_who_was_dialled_is_not_spoken_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, leader: str
) -> None:
    wrong = files(
        tmp_path / "a",
        OTHER if leader == "of another authority" else TRUSTED,
        "10.9.9.9" if "host" in leader else "127.0.0.1",
    )
    server = TcpNetwork() if leader == "plaintext" else make_network(wrong)
    peer = make_network(files(tmp_path / "b", TRUSTED))
    async with echo(server) as address:
        if leader == "plaintext":  # says nothing that TLS knows, and echoes what it gets
            with trio.fail_after(5):
                with pytest.raises(ConnectionError, match="TLS hand-shake"):
                    await peer.dial(address)
            return
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                with pytest.raises(ConnectionError, match="TLS hand-shake with 127"):
                    await peer.dial(address)
    told = [record for record in caplog.records if record.getMessage().startswith("TLS hand-shake with")]
    assert len(told) == 1


async def test_the_name_that_is_dialled_is_checked_not_only_the_address(tmp_path: Path) -> None:
    server = make_network(files(tmp_path / "a", TRUSTED, "localhost"))
    peer = make_network(files(tmp_path / "b", TRUSTED))
    async with echo(server) as address:
        port = split_address(address)[1]
        assert await said_back(peer, f"localhost:{port}")
        assert not await said_back(peer, f"127.0.0.1:{port}")


async def test_a_peer_that_never_begins_its_hand_shake_holds_up_nobody(tmp_path: Path) -> None:
    contexts = make_contexts(files(tmp_path / "a", TRUSTED))
    assert contexts is not None
    server = TcpNetwork(*contexts, handshake=0.3)
    peer = make_network(files(tmp_path / "b", TRUSTED))
    async with echo(server) as address:
        host, port = split_address(address)
        hanging = [await trio.open_tcp_stream(host, port) for _ in range(5)]
        assert await said_back(peer, address)
        for stream in hanging:
            with trio.fail_after(5):
                assert await stream.receive_some(10) == b""  # closed when its time was over
        assert server.refused == 5
        assert await said_back(peer, address)


async def test_only_so_many_hand_shakes_are_under_way_at_a_time(tmp_path: Path) -> None:
    contexts = make_contexts(files(tmp_path / "a", TRUSTED))
    assert contexts is not None
    server = TcpNetwork(*contexts, handshake=1.0)
    peer = make_network(files(tmp_path / "b", TRUSTED))
    async with echo(server) as address:
        host, port = split_address(address)
        hanging = [await trio.open_tcp_stream(host, port) for _ in range(HANDSHAKES_MAX + 3)]
        while server.refused < 3:  # noqa: ASYNC110
            await trio.sleep(0.01)
        while server.refused < HANDSHAKES_MAX + 3:  # noqa: ASYNC110
            await trio.sleep(0.01)
        assert await said_back(peer, address)
        for stream in hanging:
            await trio.aclose_forcefully(stream)


def test_files_that_can_not_be_used_are_named(tmp_path: Path) -> None:
    good = files(tmp_path / "a", TRUSTED)
    other = files(tmp_path / "b", TRUSTED)
    assert good.key is not None
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("not a certificate")
    for changes, words in (
        ({"certificate": tmp_path / "none.pem"}, ["replica_set.certificate", "none.pem", "No such file"]),
        ({"key": tmp_path / "none.pem"}, ["replica_set.key", "none.pem"]),
        ({"peer_ca": tmp_path}, ["replica_set.peer_ca", str(tmp_path)]),
        ({"certificate": garbage}, ["replica_set.certificate", "garbage.pem"]),
        ({"key": other.key}, ["replica_set.key", str(other.key), "private key"]),
        ({"peer_ca": garbage}, ["replica_set.peer_ca", "garbage.pem"]),
        ({"key": None}, ["together"]),
    ):
        with pytest.raises(ConfigurationError) as caught:
            make_network(replace(good, **changes))  # type: ignore[arg-type]
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as pem

    good = files(tmp_path / "a", TRUSTED)
    assert good.key is not None
    key = pem.load_pem_private_key(good.key.read_bytes(), None)
    locked = pem.BestAvailableEncryption(b"secret")
    good.key.write_bytes(key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, locked))
    with pytest.raises(ConfigurationError, match="without a password"):
        make_network(good)
