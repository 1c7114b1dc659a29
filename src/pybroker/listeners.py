"""Listener URLs: reading them, their TLS context, and the rule of what may be open beyond loopback.

Owns ``stomp://HOST:PORT`` and ``stomp+ssl://HOST:PORT?cert=FILE&key=FILE[&client_ca=FILE]``, ``pybroker://`` and
``pybroker+ssl://`` (the native protocol) likewise, each with ``[?|&]allow=plaintext,anonymous``. Opens no socket, resolves
no name. Patient data crosses these wires (DESIGN section 7): a listener beyond loopback that is plaintext or anonymous
has to be asked for by name.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from pybroker.errors import ConfigurationError

SCHEMES = ("stomp", "stomp+ssl", "pybroker", "pybroker+ssl")
TLS = "+ssl"  # behind the name of a protocol
TLS_OPTIONS = ("cert", "key", "client_ca")
ALLOWANCES = ("plaintext", "anonymous")

_URL = re.compile(r"(?P<scheme>[A-Za-z0-9+.-]+)://(?P<authority>[^/?#]*)(?P<path>/[^?#]*)?(\?(?P<query>[^#]*))?")
_AUTHORITY = re.compile(r"(\[(?P<six>[^\[\]]*)\]|(?P<host>[^\[\]:@]*)):(?P<port>[0-9]{1,5})")
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenerConfig:
    """One listener, as its URL says it.

    scheme       ``"stomp"``, ``"stomp+ssl"``, ``"pybroker"`` or ``"pybroker+ssl"``
    host, port   where to bind; an IPv6 address is without brackets here; port 0 takes a free one
    certificate, key  PEM files of the server; None without TLS
    client_ca    PEM file of the authorities that clients' certificates must come from; None asks for no certificate
    allow        what was asked for by name: any of ``"plaintext"``, ``"anonymous"``
    """

    scheme: str
    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None
    allow: frozenset[str] = frozenset()

    @property
    def tls(self) -> bool:
        return self.scheme.endswith(TLS)

    @property
    def protocol(self) -> str:
        """``"stomp"`` or ``"pybroker"``."""
        return self.scheme.removesuffix(TLS)

    @property
    def beyond_loopback(self) -> bool:
        """True unless the host is ``localhost`` or a literal loopback address: a name may resolve to anything."""
        if self.host.lower() == "localhost":
            return False
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return True
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return not (mapped or address).is_loopback

    @property
    def url(self) -> str:
        """The URL that reads back as this listener."""
        files = (self.certificate, self.key, self.client_ca)
        query = [f"{name}={quote(str(file), safe='/')}" for name, file in zip(TLS_OPTIONS, files, strict=True) if file]
        if self.allow:
            query.append("allow=" + ",".join(word for word in ALLOWANCES if word in self.allow))
        return self.address_url(self.port) + ("?" + "&".join(query) if query else "")

    def address_url(self, port: int) -> str:
        """The URL that clients use, without options; ``port`` is the one that was bound."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{port}"


def parse_listener(url: str, *, directory: Path | None = None) -> ListenerConfig:
    """Read a listener URL; relative files in it are meant relative to ``directory`` (None: left as they are).

    Raises `ConfigurationError` that says what is wrong with the URL and what is known.

    >>> parse_listener("stomp://[::1]:0").host
    '::1'
    """
    match = _URL.fullmatch(url) if url.isprintable() else None
    if match is None:
        raise _refused(
            url, "it must look like stomp://HOST:PORT or stomp+ssl://HOST:PORT?cert=FILE&key=FILE (or pybroker)"
        )
    scheme = match["scheme"]
    if scheme not in SCHEMES:
        raise _refused(url, f"scheme {scheme!r} is not known, only {_listed(SCHEMES)} are" + _nearest(scheme, SCHEMES))
    if match["path"] not in (None, "/"):
        raise _refused(url, f"it has a path {match['path']!r}, and a listener takes none")
    host, port = _authority(url, match["authority"])
    options = _options(url, match["query"] or "", scheme)
    for name in ("cert", "key"):
        if scheme.endswith(TLS) and name not in options:
            raise _refused(url, f"{scheme} needs ?cert=FILE&key=FILE (PEM files), and {name} is missing")
    files = {name: _file(options[name], directory) for name in TLS_OPTIONS if name in options}
    return ListenerConfig(
        scheme=scheme,
        host=host,
        port=port,
        certificate=files.get("cert"),
        key=files.get("key"),
        client_ca=files.get("client_ca"),
        allow=_allowances(url, options["allow"]) if "allow" in options else frozenset(),
    )


def check_exposure(listener: ListenerConfig, anonymous: bool) -> None:
    """Refuse a listener that is open to more than was asked for by name.

    ``anonymous`` is the broker's: whether a CONNECT without login is let in. A listener that asks for client
    certificates (``client_ca``) counts as not anonymous. On loopback everything is allowed.

    Raises `ConfigurationError` that says which ``allow=`` to add.
    """
    if not listener.beyond_loopback:
        return
    needed = []
    if not listener.tls:
        needed.append("plaintext")
    if anonymous and listener.client_ca is None:
        needed.append("anonymous")
    missing = [word for word in needed if word not in listener.allow]
    if not missing:
        return
    remedies = {"plaintext": f"use {listener.protocol}{TLS}://", "anonymous": "set anonymous = false and give users"}
    whole = "allow=" + ",".join(word for word in ALLOWANCES if word in missing or word in listener.allow)
    raise ConfigurationError(
        f"listener {listener.url} can be reached from beyond loopback and is {' and '.join(missing)}: "
        f"{', '.join(remedies[word] for word in missing)}, or ask for it by name with {whole} in its URL"
    )


def make_ssl_context(listener: ListenerConfig) -> ssl.SSLContext | None:
    """The server side's TLS context (TLS 1.2 or newer), or None for a plaintext listener. Reads the PEM files.

    Raises `ConfigurationError` that names the file which is missing, not PEM, encrypted, or not the other's partner.
    """
    if not listener.tls:
        return None
    assert listener.certificate is not None
    assert listener.key is not None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # a client could make the broker repeat the costly half of a hand-shake
    for name, file in (("cert", listener.certificate), ("key", listener.key), ("client_ca", listener.client_ca)):
        _check_readable(listener, name, file)

    def no_password() -> str:  # without it OpenSSL asks on the terminal, and a service hangs at start
        raise _refused(listener.url, f"key file {listener.key} is encrypted, and pybroker takes no pass phrase")

    try:
        context.load_cert_chain(listener.certificate, listener.key, password=no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        files = f"cert {listener.certificate} and key {listener.key}"
        raise _refused(listener.url, f"{files} are not a certificate chain and its key: {error}") from None
    if listener.client_ca is not None:
        try:
            context.load_verify_locations(cafile=listener.client_ca)
        except (OSError, ValueError) as error:
            what = f"client_ca {listener.client_ca} holds no certificate that can be read: {error}"
            raise _refused(listener.url, what) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(listener: ListenerConfig, name: str, file: Path | None) -> None:
    if file is None:
        return
    try:
        with file.open("rb"):
            pass
    except OSError as error:
        raise _refused(listener.url, f"{name} file {file} can't be read: {error.strerror}") from None


def _authority(url: str, authority: str) -> tuple[str, int]:
    if "@" in authority:
        raise ConfigurationError("a listener URL takes no user or password: users belong into the field users")
    match = _AUTHORITY.fullmatch(authority)
    if match is None:
        what = "it needs HOST:PORT (port 0 takes a free one; an IPv6 address stands in brackets)"
        raise _refused(url, what)
    port = int(match["port"])
    if port > 65_535:
        raise _refused(url, f"port {port} is not one of 0 to 65535")
    if match["six"] is not None:
        try:
            ipaddress.IPv6Address(match["six"])
        except ValueError:
            raise _refused(url, f"[{match['six']}] is not an IPv6 address") from None
        return match["six"], port
    host = match["host"]
    if not host:
        raise _refused(url, "it names no host: 127.0.0.1 is this machine only, 0.0.0.0 or [::] every interface")
    if not _HOST_NAME.fullmatch(host):
        raise _refused(url, f"{host!r} is not a host name or an address")
    return host, port


def _options(url: str, query: str, scheme: str) -> dict[str, str]:
    known = (*TLS_OPTIONS, "allow") if scheme.endswith(TLS) else ("allow",)
    options: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        if name in TLS_OPTIONS and name not in known:
            raise _refused(url, f"option {name!r} belongs to {scheme}{TLS}://, not to {scheme}://")
        if name not in known:
            raise _refused(url, f"option {name!r} is not known, only {_listed(known)}" + _nearest(name, known))
        if name in options:
            raise _refused(url, f"option {name!r} is given twice")
        if not value:
            raise _refused(url, f"option {name!r} has no value")
        options[name] = unquote(value)
        if not options[name].isprintable() or "\ufffd" in options[name]:
            raise _refused(url, f"option {name!r} has bytes in it that can't be printed")
    return options


def _allowances(url: str, value: str) -> frozenset[str]:
    words = value.split(",")
    for word in words:
        if word not in ALLOWANCES:
            raise _refused(url, f"allow={word!r} is not known, only {_listed(ALLOWANCES)}" + _nearest(word, ALLOWANCES))
    return frozenset(words)


def _file(value: str, directory: Path | None) -> Path:
    return Path(value) if directory is None else directory / value


def _listed(words: tuple[str, ...]) -> str:
    return " and ".join((", ".join(words[:-1]), words[-1])) if len(words) > 1 else words[0]


def _nearest(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _refused(url: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"listener {url[:200]!r}: {what}")
