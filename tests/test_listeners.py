"""`pybroker.listeners`: reading listener URLs, the rule of exposure, and TLS as a peer meets it."""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from pybroker.errors import ConfigurationError
from pybroker.listeners import ListenerConfig, check_exposure, make_ssl_context, parse_listener

TLS = "cert=c.pem&key=k.pem"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("stomp://127.0.0.1:61613", ListenerConfig(scheme="stomp", host="127.0.0.1", port=61613)),
        ("pybroker://127.0.0.1:61620", ListenerConfig(scheme="pybroker", host="127.0.0.1", port=61620)),
        (
            "pybroker+ssl://h:1?cert=c.pem&key=k.pem",
            ListenerConfig(scheme="pybroker+ssl", host="h", port=1, certificate=Path("c.pem"), key=Path("k.pem")),
        ),
        ("stomp://localhost:0/", ListenerConfig(scheme="stomp", host="localhost", port=0)),
        ("stomp://[::1]:0", ListenerConfig(scheme="stomp", host="::1", port=0)),
        (
            "stomp://0.0.0.0:1?allow=anonymous,plaintext",
            ListenerConfig(scheme="stomp", host="0.0.0.0", port=1, allow=frozenset({"plaintext", "anonymous"})),
        ),
        (
            "stomp+ssl://broker.example:61614?key=/k%26y.pem&cert=c+d.pem&client_ca=ca.pem&allow=anonymous",
            ListenerConfig(
                scheme="stomp+ssl",
                host="broker.example",
                port=61614,
                certificate=Path("c+d.pem"),
                key=Path("/k&y.pem"),
                client_ca=Path("ca.pem"),
                allow=frozenset({"anonymous"}),
            ),
        ),
    ],
)
def test_a_listener_url_is_read(url: str, expected: ListenerConfig):
    assert parse_listener(url) == expected
    assert parse_listener(expected.url) == expected


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "it must look like stomp://HOST:PORT"),
        ("127.0.0.1:61613", "it must look like"),
        ("stomp://127.0.0.1:61613\n", "it must look like"),
        ("stomp://127.0.0.1:1#x", "it must look like"),
        ("tcp://127.0.0.1:1", r"scheme 'tcp' is not known, only stomp, stomp\+ssl, pybroker and pybroker\+ssl are"),
        ("stomp+tls://127.0.0.1:1", r"did you mean stomp\+ssl\?"),
        ("stomp://127.0.0.1:1/queue", "it has a path '/queue'"),
        ("stomp://127.0.0.1", "it needs HOST:PORT"),
        ("stomp://127.0.0.1:x", "it needs HOST:PORT"),
        ("stomp://::1:61613", "it needs HOST:PORT"),
        ("stomp://127.0.0.1:65536", "port 65536 is not one of 0 to 65535"),
        ("stomp://:61613", "it names no host"),
        ("stomp://[127.0.0.1]:1", r"\[127.0.0.1\] is not an IPv6 address"),
        ("stomp://a b:1", "'a b' is not a host name"),
        ("stomp://127.0.0.1:1?alow=plaintext", r"option 'alow' is not known, only allow \(did you mean allow\?\)"),
        ("stomp://127.0.0.1:1?allow=plain", r"allow='plain' is not known.*did you mean plaintext"),
        ("stomp://127.0.0.1:1?allow=", "option 'allow' has no value"),
        ("stomp://127.0.0.1:1?allow=plaintext&allow=plaintext", "option 'allow' is given twice"),
        ("stomp://127.0.0.1:1?cert=c.pem", r"option 'cert' belongs to stomp\+ssl://"),
        ("stomp+ssl://127.0.0.1:1", "cert is missing"),
        ("pybroker+ssl://127.0.0.1:1", r"pybroker\+ssl needs .*cert is missing"),
        ("pybroker://127.0.0.1:1?cert=c.pem", r"option 'cert' belongs to pybroker\+ssl://, not to pybroker://"),
        ("pybrokr://127.0.0.1:1", r"did you mean pybroker\?"),
        ("stomp+ssl://127.0.0.1:1?cert=c.pem", "key is missing"),
        (f"stomp+ssl://127.0.0.1:1?{TLS}&clientca=x", "did you mean client_ca"),
        ("stomp+ssl://127.0.0.1:1?cert=c%00.pem&key=k.pem", "bytes in it that can't be printed"),
    ],
)
def test_a_wrong_listener_url_is_refused_with_what_is_known(url: str, words: str):
    with pytest.raises(ConfigurationError, match=words):
        parse_listener(url)


def test_a_password_in_a_url_is_refused_and_not_repeated():
    with pytest.raises(ConfigurationError) as caught:
        parse_listener("stomp://anna:hunter2@127.0.0.1:1")
    assert "hunter2" not in str(caught.value)


def test_files_are_relative_to_the_directory_that_is_given():
    listener = parse_listener("stomp+ssl://localhost:1?cert=c.pem&key=/etc/k.pem", directory=Path("/srv/broker"))
    assert (listener.certificate, listener.key) == (Path("/srv/broker/c.pem"), Path("/etc/k.pem"))


def test_the_url_for_clients_has_the_bound_port_and_no_options():
    assert parse_listener(f"stomp+ssl://[::1]:0?{TLS}").address_url(40123) == "stomp+ssl://[::1]:40123"


@given(
    st.text()
    | st.from_regex(r"(stomp|pybroker)(\+ssl)?://[^/]*:[0-9]*(/.*)?(\?[a-z_]+=.*(&[a-z_]+=.*)?)?", fullmatch=True)
)
def test_any_text_is_read_or_refused(url: str):
    try:
        listener = parse_listener(url)
    except ConfigurationError:
        return
    assert parse_listener(listener.url) == listener


@given(
    st.builds(
        ListenerConfig,
        scheme=st.sampled_from(["stomp+ssl", "pybroker+ssl"]),
        host=st.ip_addresses().map(str),
        port=st.integers(0, 65_535),
        certificate=st.text("ab&?=%#+é/. ", min_size=1).map(Path),
        key=st.just(Path("k.pem")),
        allow=st.frozensets(st.sampled_from(["plaintext", "anonymous"])),
    )
)
def test_each_listener_reads_back_from_its_url(listener: ListenerConfig):
    assert parse_listener(listener.url) == listener


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "[::1]", "localhost", "LocalHost", "[::ffff:127.0.0.1]"])
def test_on_loopback_everything_is_allowed(host: str):
    check_exposure(parse_listener(f"stomp://{host}:0"), anonymous=True)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "[::]", "10.0.0.1", "broker.example", "localhost.example", "127.1", "[fe80::1]"]
)
@pytest.mark.parametrize(
    ("tail", "anonymous", "needed"),
    [
        ("", True, "allow=plaintext,anonymous"),
        ("", False, "allow=plaintext"),
        ("?allow=plaintext", True, "allow=plaintext,anonymous"),
        ("?allow=anonymous", False, "allow=plaintext,anonymous"),
        ("?allow=plaintext", False, None),
        ("?allow=plaintext,anonymous", True, None),
        (f"?{TLS}", True, "allow=anonymous"),
        (f"?{TLS}", False, None),
        (f"?{TLS}&client_ca=ca.pem", True, None),
        (f"?{TLS}&allow=anonymous", True, None),
    ],
)
@pytest.mark.parametrize("protocol", ["stomp", "pybroker"])
def test_beyond_loopback_it_has_to_be_asked_for_by_name(
    protocol: str, host: str, tail: str, anonymous: bool, needed: str | None
):
    listener = parse_listener(f"{protocol}{'+ssl' if TLS in tail else ''}://{host}:0{tail}")
    if needed is None:
        check_exposure(listener, anonymous)
        return
    with pytest.raises(ConfigurationError, match=f"ask for it by name with {needed} in its URL"):
        check_exposure(listener, anonymous)


# --- TLS ---------------------------------------------------------------------------------------------------------


class Certificates:
    """An authority, a certificate for localhost, and the files they lie in."""

    def __init__(self, directory: Path) -> None:
        self.authority = trustme.CA()
        server = self.authority.issue_cert("localhost")
        self.cert, self.key, self.ca = directory / "c.pem", directory / "k.pem", directory / "ca.pem"
        for index, blob in enumerate(server.cert_chain_pems):
            blob.write_to_path(self.cert, append=index > 0)
        server.private_key_pem.write_to_path(self.key)
        self.authority.cert_pem.write_to_path(self.ca)

    def listener(self, **files: Path) -> ListenerConfig:
        options = {"cert": self.cert, "key": self.key, **files}
        return parse_listener("stomp+ssl://localhost:0?" + "&".join(f"{n}={f}" for n, f in options.items()))

    def client(self, *, with_certificate: bool = False) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.authority.configure_trust(context)
        if with_certificate:
            self.authority.issue_cert("client@example.org").configure_cert(context)
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def shake_hands(server_context: ssl.SSLContext, client_context: ssl.SSLContext) -> str | None:
    """Let two TLS ends talk through memory until both have read a byte; return the protocol version."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    client = client_context.wrap_bio(to_client, to_server, server_hostname="localhost")

    def exchange(end: ssl.SSLObject) -> None:
        end.do_handshake()  # goes on where it stopped; done already, it does nothing
        end.write(b"x")
        end.read(1)

    pending = [client, server]
    for _ in range(20):
        for end in list(pending):
            with contextlib.suppress(ssl.SSLWantReadError):
                exchange(end)
                pending.remove(end)
        if not pending:
            return client.version()
    raise AssertionError("the hand-shake does not come to an end")


def test_a_plaintext_listener_has_no_tls_context():
    assert make_ssl_context(parse_listener("stomp://127.0.0.1:0")) is None


def test_tls_with_a_server_certificate(certificates: Certificates):
    context = make_ssl_context(certificates.listener())
    assert context is not None
    assert context.verify_mode is ssl.CERT_NONE
    assert shake_hands(context, certificates.client()) == "TLSv1.3"


def test_tls_older_than_1_2_is_refused(certificates: Certificates):
    context = make_ssl_context(certificates.listener())
    assert context is not None
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    client = certificates.client()
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert shake_hands(context, client) == "TLSv1.2"
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError):
        shake_hands(context, client)


def test_client_ca_lets_only_clients_with_its_certificate_in(certificates: Certificates):
    context = make_ssl_context(certificates.listener(client_ca=certificates.ca))
    assert context is not None
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert shake_hands(context, certificates.client(with_certificate=True)) == "TLSv1.3"
    with pytest.raises(ssl.SSLError):
        shake_hands(context, certificates.client())
    stranger = certificates.client()
    trustme.CA().issue_cert("client@example.org").configure_cert(stranger)
    with pytest.raises(ssl.SSLError):
        shake_hands(context, stranger)


def test_files_that_do_not_serve_are_refused_by_name(certificates: Certificates, tmp_path: Path):
    rubbish = tmp_path / "rubbish.pem"
    rubbish.write_text("no certificate\n")
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(other)
    none = tmp_path / "none.pem"
    for files, words in (
        ({"cert": none}, "cert file .*none.pem can't be read: No such file"),
        ({"key": tmp_path}, "key file .* can't be read: Is a directory"),
        ({"client_ca": none}, "client_ca file .*none.pem can't be read"),
        ({"cert": rubbish}, "cert .*rubbish.pem and key .* are not a certificate chain and its key"),
        ({"key": other}, "other.pem are not a certificate chain and its key"),
        ({"client_ca": rubbish}, "client_ca .*rubbish.pem holds no certificate"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            make_ssl_context(certificates.listener(**files))


def test_an_encrypted_key_is_refused_instead_of_asking_on_the_terminal(certificates: Certificates, tmp_path: Path):
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(certificates.key.read_bytes(), None)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"pass phrase"),
        )
    )
    with pytest.raises(ConfigurationError, match=r"encrypted\.pem is encrypted"):
        make_ssl_context(certificates.listener(key=encrypted))
