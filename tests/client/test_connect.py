"""`pybroker.connect` over real sockets: TLS, logins, discovery, a broker that is killed and comes back; and the command line."""

# ruff: noqa: SIM117 (blocks that nest are what is tested)
from __future__ import annotations

import json
import socket
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trustme

import pybroker
from pybroker import ConnectOptions
from pybroker.cluster.announcer import Announcer
from pybroker.cluster.discovery import parse_discovery
from pybroker.errors import AuthenticationFailed, BrokerUnavailable, ConfigurationError
from tests.support.serving import ServedBroker, call_pybroker

ANY = "pybroker://127.0.0.1:0"
Q = "/queue/q"


class Certificates:
    def __init__(self, directory: Path) -> None:
        authority, other = trustme.CA(), trustme.CA()
        self.ca, self.other_ca = directory / "ca.pem", directory / "other-ca.pem"
        authority.cert_pem.write_to_path(self.ca)
        other.cert_pem.write_to_path(self.other_ca)
        self.server, self.client = directory / "server.pem", directory / "client.pem"
        authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(self.server)
        authority.issue_cert("client").private_key_and_cert_chain_pem.write_to_path(self.client)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


async def works(client: pybroker.Client) -> bool:
    await client.send(Q, b"x")
    async with client.subscribe(Q) as messages:
        message = await messages.receive()
        await message.ack()
        return message.body == b"x"


async def test_both_kinds_of_client_are_clients() -> None:
    async with pybroker.open_broker(listen=[ANY]) as broker:
        async with broker.connect() as local, pybroker.connect(broker.listeners[0]) as remote:
            assert isinstance(local, pybroker.Client)
            assert isinstance(remote, pybroker.Client)
            assert await works(local)
            assert await works(remote)


async def test_tls(certificates: Certificates) -> None:
    listener = f"pybroker+ssl://127.0.0.1:0?cert={certificates.server}&key={certificates.server}"
    both = f"{listener}&client_ca={certificates.ca}"
    async with pybroker.open_broker(listen=[listener, both]) as broker:
        plain, mutual = broker.listeners
        async with pybroker.connect(plain, ca=certificates.ca) as client:
            assert await works(client)
        context = ssl.create_default_context(cafile=certificates.ca)
        async with pybroker.connect(plain, tls=context) as client:
            assert await works(client)
        shown = {"certificate": certificates.client, "key": certificates.client}
        async with pybroker.connect(mutual, ca=certificates.ca, **shown) as client:
            assert await works(client)
        for options in ({}, {"ca": certificates.other_ca}):
            with pytest.raises(ConfigurationError, match=r"not trusted.*give `ca`"):
                async with pybroker.connect(plain, **options):  # type: ignore[arg-type]
                    pass
        with pytest.raises(BrokerUnavailable):
            async with pybroker.connect(mutual, ca=certificates.ca, options=ConnectOptions(deadline=0.5)):
                pass
        plaintext = plain.replace("+ssl", "")
        with pytest.raises(BrokerUnavailable):
            async with pybroker.connect(plaintext, options=ConnectOptions(deadline=0.5)):
                pass


async def test_wrong_files_for_tls(certificates: Certificates, tmp_path: Path) -> None:
    missing, junk = tmp_path / "missing.pem", tmp_path / "junk.pem"
    junk.write_text("junk")
    wrong: list[dict[str, object]] = [
        {"ca": missing},
        {"ca": junk},
        {"certificate": certificates.client},
        {"certificate": junk, "key": junk},
        {"tls": ssl.create_default_context(), "ca": certificates.ca},
    ]
    for options in wrong:
        with pytest.raises(ConfigurationError):
            async with pybroker.connect("pybroker+ssl://127.0.0.1:1", **options):  # type: ignore[arg-type]
                pass
    with pytest.raises(ConfigurationError, match="login"):
        async with pybroker.connect("pybroker://127.0.0.1:1", user="\ud800"):
            pass


async def test_logins() -> None:
    users = {"anna": pybroker.hash_password("secret")}
    async with pybroker.open_broker(listen=[ANY], users=users, anonymous=False) as broker:
        url = broker.listeners[0]
        async with pybroker.connect(url, user="anna", passcode="secret") as client:
            assert await works(client)
        for login in ({"user": "anna", "passcode": "wrong"}, {}):
            with pytest.raises(AuthenticationFailed):
                async with pybroker.connect(url, **login):  # type: ignore[arg-type]
                    pass


def free_udp_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@pytest.mark.parametrize("secret", ["", "word"])
async def test_brokers_are_discovered(secret: str) -> None:
    url = f"multicast://239.255.2.3:{free_udp_port()}?group=test&interface=127.0.0.1"
    options = ConnectOptions(deadline=20, discovery_secret=secret)
    discovery = parse_discovery(url)

    async def announce(broker: pybroker.Broker, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        name = broker.config.name
        one = Announcer(discovery, name=name, node="n", epoch=0, urls=broker.listeners, secret=secret, interval=0.05)
        with scope:
            await one.run(task_status=task_status)

    scopes = [trio.CancelScope(), trio.CancelScope()]
    async with (
        pybroker.open_broker(name="one", listen=[ANY]) as one,
        pybroker.open_broker(name="two", listen=[ANY]) as two,
    ):
        async with trio.open_nursery() as nursery:
            await nursery.start(announce, one, scopes[0])
            async with pybroker.connect(f"discovery:({url})", options=options) as client:
                assert await works(client)
                assert client.statistics().broker == "one"
                events = client.events()
                scopes[0].cancel()
                await nursery.start(announce, two, scopes[1])
                one._server.close_listeners()
                one._server.close_connections(pybroker.BrokerClosed("going"))
                with trio.fail_after(20):
                    while (await events.__anext__()).broker != "two":
                        pass
                assert await works(client)
            scopes[1].cancel()


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pb-") as name:
        yield Path(name)


async def test_a_broker_that_is_killed_and_comes_back(directory: Path) -> None:
    """A thousand sends while it is killed three times: all confirmed, and each is there once."""
    broker = ServedBroker(directory / "data", listen=[ANY])
    broker.start()
    try:
        url = broker.url
        broker.listen = (url,)
        body = b"x" * 100
        async with pybroker.connect(url, options=ConnectOptions(deadline=60)) as client:
            async with client.publisher(max_in_flight=50) as publisher:
                for number in range(1_000):
                    await publisher.send(Q, body, {"id": str(number)})
                    if number in (200, 500, 800):
                        await trio.to_thread.run_sync(broker.kill)
                        await trio.to_thread.run_sync(broker.start)
            assert publisher.confirmed == 1_000
            found: list[str] = []
            async with client.subscribe(Q) as messages:
                while len(found) < 1_000:
                    batch = await messages.receive_batch(100)
                    found += [message.header("id") or "" for message in batch]
                    await messages.ack(batch)
            assert found == [str(number) for number in range(1_000)]
            assert client.statistics().connections == 4
    finally:
        broker.close()


def test_the_command_line_speaks_the_native_protocol(directory: Path) -> None:
    with_url = ServedBroker(directory / "data", listen=[ANY])
    with_url.start()
    try:
        for url in (with_url.url, f"failover:({with_url.url},pybroker://127.0.0.1:1)?spread=first"):
            done = call_pybroker("send", Q, "grüße", "--header", "a:b:c", "--count", "2", "--url", url)
            assert (done.returncode, done.stderr) == (0, b"")
            done = call_pybroker("receive", Q, "--show-headers", "--url", url)
            shown = json.loads(done.stdout)
            assert shown["body"] == "grüße"
            assert ["a", "b:c"] in shown["headers"]
            assert ["destination", Q] in shown["headers"]
            assert call_pybroker("receive", Q, "--url", url).stdout.decode() == "grüße\n"
            done = call_pybroker("receive", Q, "--timeout", "0.1", "--url", url)
            assert (done.returncode, done.stderr) == (1, b"no message within 0.1 s\n")
        done = call_pybroker("send", Q, "x", "--url", "pybroker://127.0.0.1:1?deadline=0.2")
        assert done.returncode == 1
        assert done.stderr.startswith(b"pybroker: no broker could be reached within 0.2 s")
        assert len(done.stderr.splitlines()) == 1
    finally:
        with_url.close()
