"""stomp.py as an outside client: what is refused and how, who is let in, heart-beats, and TLS."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stomp
import trustme

from tests.stomp.programs import VERSIONS, Program, program
from tests.support.serving import ServedBroker, served
from tests.support.wire import connect_frame

every_version = pytest.mark.parametrize("version", VERSIONS)


# ---- refusals


@every_version
@pytest.mark.parametrize(
    ("destination", "words"),
    [
        ("/nowhere/x", "must start with /queue/ or /topic/"),
        ("queue", "must start with /queue/ or /topic/"),
        ("/queue/", "empty name"),
        ("/topic/", "empty name"),
        ("/queue/a..b", "empty part"),
    ],
)
def test_destinations_that_are_refused(broker: ServedBroker, version: str, destination: str, words: str):
    for command in ("send", "subscribe"):
        with program(broker.port, version) as one:
            if command == "send":
                one.connection.send(destination, "x", headers={"receipt": "r"})
            else:
                one.connection.subscribe(destination, id="1", headers={"receipt": "r"})
            error = one.error()
            assert words in error.headers["message"]
            assert error.headers["receipt-id"] == "r"


@every_version
def test_names_with_slashes_are_accepted(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}/b/c")
        one.send(f"/queue/{name}/b/c", "x")
        assert one.receive().headers["destination"] == f"/queue/{name}/b/c"


@every_version
def test_a_subscription_id_in_use_is_refused(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}", id="7")
        one.connection.subscribe(f"/queue/{name}.other", id="7", headers={"receipt": "r"})
        error = one.error()
        assert "'7' is in use" in error.headers["message"]
        assert error.headers["receipt-id"] == "r"


@every_version
def test_an_id_is_free_again_after_unsubscribe(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}", id="7")
        one.unsubscribe(id="7")
        one.subscribe(f"/queue/{name}.other", id="7")
        one.send(f"/queue/{name}.other", "x")
        assert one.receive().headers["subscription"] == "7"


@every_version
def test_a_wrong_selector_is_refused_clearly(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.connection.subscribe(f"/queue/{name}", id="1", headers={"selector": "age > (", "receipt": "r"})
        assert "column" in one.error().headers["message"]


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"priority": "10"}, "priority"),
        ({"expires": "soon"}, "expires"),
        ({"persistent": "maybe"}, "persistent"),
        ({"transaction": "never-begun"}, "BEGIN it first"),
    ],
)
def test_sends_that_are_refused(broker: ServedBroker, name: str, headers: dict[str, str], words: str):
    with program(broker.port) as one:
        one.connection.send(f"/queue/{name}", "x", headers={**headers, "receipt": "r"})
        error = one.error()
        assert words in error.headers["message"]
        assert error.headers["receipt-id"] == "r"


@every_version
def test_a_durable_subscription_in_use_is_refused(broker: ServedBroker, name: str, version: str):
    durable = {"activemq.subscriptionName": "s"}
    with program(broker.port, version, client_id=name) as one:
        one.subscribe(f"/topic/{name}", **durable)
        with program(broker.port, version, client_id=name) as other:
            other.connection.subscribe(f"/topic/{name}", id="1", headers=durable)
            assert "is in use" in other.error().headers["message"]
        with program(broker.port, version) as other:
            other.connection.subscribe(f"/topic/{name}", id="1", headers=durable)
            assert "client-id" in other.error().headers["message"]


@every_version
def test_acknowledging_what_is_not_out_is_refused(broker: ServedBroker, name: str, version: str):
    with program(broker.port, version) as one:
        one.subscribe(f"/queue/{name}", ack="client-individual")
        one.send(f"/queue/{name}", "x")
        message = one.receive()
        one.ack(message)
        if version == "1.1":
            one.connection.ack(message.headers["message-id"], "1")
        else:
            one.connection.ack(message.headers["ack" if version == "1.2" else "message-id"])
        assert "outstanding" in one.error().headers["message"]


# ---- users


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedBroker]:
    directory = tmp_path_factory.mktemp("g")
    with served(directory / "d", "--user", "anna:secret", "--user", "ben:with:colon", "--no-anonymous") as one:
        yield one


@every_version
def test_a_user_with_the_right_password_is_let_in(guarded: ServedBroker, version: str):
    for login, passcode in (("anna", "secret"), ("ben", "with:colon")):
        with program(guarded.port, version, login, passcode) as one:
            one.send("/queue/a", "x")


@every_version
@pytest.mark.parametrize(
    ("login", "passcode"), [("anna", "wrong"), ("anna", None), ("carl", "secret"), (None, None), ("", "")]
)
def test_others_are_refused_and_not_told_why(
    guarded: ServedBroker, version: str, login: str | None, passcode: str | None
):
    one = Program(guarded.port, version)
    with pytest.raises(stomp.exception.ConnectFailedException):
        one.connect(login, passcode)
    error = one.error()
    assert error.headers["code"] == "authentication"
    assert not {"anna", "carl", "secret", "wrong"} & set(error.headers["message"].split())


def test_a_wrong_password_is_refused_where_anonymous_is_allowed(directory: Path):
    with served(directory / "d", "--user", "anna:secret") as broker:
        for login, passcode in ((None, None), ("anna", "secret")):
            with program(broker.port, "1.2", login, passcode) as one:
                one.send("/queue/a", "x")
        for login, passcode in (("anna", "wrong"), ("carl", "secret")):
            with pytest.raises(stomp.exception.ConnectFailedException):
                Program(broker.port).connect(login, passcode)


# ---- heart-beats


@pytest.fixture(scope="module")
def beating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedBroker]:
    directory = tmp_path_factory.mktemp("h")
    (directory / "b.toml").write_text("[stomp]\nheartbeat_min_ms = 100\n")
    with served(directory / "d", directory / "b.toml") as one:
        yield one


@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_heart_beats_go_both_ways(beating: ServedBroker, version: str):
    one = Program(beating.port, version, heartbeats=(100, 200), heart_beat_receive_scale=5)
    try:
        connected = one.connect()
        assert connected.headers["heart-beat"] == "100,100"
        started = time.monotonic()
        for _ in range(4):
            one.inbox.heartbeats.get(timeout=5)
        # Four beats no more than 200 ms apart: by now a silent client would have been dropped.
        while time.monotonic() - started < 0.5:
            one.inbox.heartbeats.get(timeout=5)
        one.send("/queue/a", "still here")
        assert one.inbox.errors.empty()
    finally:
        one.cut()


@pytest.mark.parametrize("version", ["1.1", "1.2"])
def test_a_client_that_falls_silent_is_dropped_and_its_messages_return(beating: ServedBroker, name: str, version: str):
    one = Program(beating.port, version, heartbeats=(200, 0))
    try:
        one.connect()
        one.subscribe(f"/queue/{name}", ack="client-individual")
        one.send(f"/queue/{name}", "a")
        one.receive()
        one.connection.heartbeat_terminate_event.set()  # it stops sending them
        error = one.error()
        assert "no heart-beat" in error.headers["message"]
    finally:
        one.cut()
    with program(beating.port) as other:
        other.subscribe(f"/queue/{name}")
        message = other.receive()
        assert (message.body, message.headers["redelivered"]) == (b"a", "true")


def test_without_heart_beats_silence_is_allowed(beating: ServedBroker):
    one = Program(beating.port)
    try:
        one.connect()
        with pytest.raises(queue.Empty):
            one.inbox.errors.get(timeout=0.5)  # five intervals
        one.send("/queue/a", "x")
    finally:
        one.cut()


# ---- TLS


class Certificates:
    """Of a server on loopback, of a client, and of a client that somebody else vouches for; as files."""

    def __init__(self, directory: Path) -> None:
        authority, other = trustme.CA(), trustme.CA()
        self.ca = directory / "ca.pem"
        authority.cert_pem.write_to_path(self.ca)
        self.server = self._write(authority.issue_cert("127.0.0.1", "localhost"), directory / "server.pem")
        self.client = self._write(authority.issue_cert("client"), directory / "client.pem")
        self.stranger = self._write(other.issue_cert("client"), directory / "stranger.pem")

    def _write(self, certificate: trustme.LeafCert, path: Path) -> Path:
        certificate.private_key_and_cert_chain_pem.write_to_path(path)
        return path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[ServedBroker]:
    """Its first listener asks for no certificate, its second one demands it."""
    plain = f"stomp+ssl://127.0.0.1:0?cert={certificates.server}&key={certificates.server}"
    demanding = f"{plain}&client_ca={certificates.ca}"
    with served(tmp_path_factory.mktemp("s") / "d", listen=[plain, demanding]) as one:
        yield one


def secured(port: int, version: str, certificates: Certificates, certificate: Path | None = None) -> Program:
    one = Program(port, version)
    one.connection.set_ssl(
        for_hosts=[("127.0.0.1", port)],
        ca_certs=str(certificates.ca),
        cert_file=str(certificate) if certificate else None,
        key_file=str(certificate) if certificate else None,
    )
    return one


@every_version
@pytest.mark.parametrize("demanding", [False, True])
def test_messages_over_tls(secure: ServedBroker, certificates: Certificates, name: str, version: str, demanding: bool):
    certificate = certificates.client if demanding else None
    one = secured(secure.ports[demanding], version, certificates, certificate)
    try:
        one.connect()
        body = bytes(range(256)) * 2_000
        one.subscribe(f"/queue/{name}", ack="client-individual")
        one.send(f"/queue/{name}", body)
        message = one.receive()
        assert message.body == body
        one.ack(message)
        one.connection.send("/nowhere/x", "y", headers={"receipt": "r"})
        assert one.inbox.errors.get(timeout=5).headers["receipt-id"] == "r"
    finally:
        one.cut()


def talk_tls(port: int, certificates: Certificates, certificate: Path | None) -> bytes:
    """CONNECT over TLS; return what comes back (a missing certificate shows at the first read in TLS 1.3)."""
    context = ssl.create_default_context(cafile=certificates.ca)
    if certificate is not None:
        context.load_cert_chain(certificate)
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as stream,
    ):
        stream.sendall(connect_frame())
        return stream.recv(1000)


def test_a_client_without_a_trusted_certificate_is_refused(secure: ServedBroker, certificates: Certificates):
    demanding = secure.ports[1]
    assert talk_tls(demanding, certificates, certificates.client).startswith(b"CONNECTED\n")
    for certificate in (None, certificates.stranger):
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert talk_tls(demanding, certificates, certificate) == b""
    assert talk_tls(demanding, certificates, certificates.client).startswith(b"CONNECTED\n")
    assert "Traceback" not in secure.log()


def test_plaintext_on_a_tls_port_does_no_harm(secure: ServedBroker, certificates: Certificates):
    with socket.create_connection(("127.0.0.1", secure.ports[0]), timeout=5) as plain:
        plain.sendall(connect_frame())
        try:
            answer = plain.recv(1000)
        except ConnectionResetError:
            answer = b""
        assert b"CONNECTED" not in answer
    assert talk_tls(secure.ports[0], certificates, None).startswith(b"CONNECTED\n")
    assert "Traceback" not in secure.log()
