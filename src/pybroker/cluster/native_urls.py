"""Addresses of the native protocol: ``pybroker://HOST:PORT`` and ``pybroker+ssl://HOST:PORT``, as one that is to be dialled.

Owns reading them and what is wrong with one; opens no socket, resolves no name. Pure. Where a broker *listens* is another kind
of URL, with options (`pybroker.listeners`). Used by announcements, by the network's settings, by links.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from pybroker.errors import ConfigurationError

PLAIN = "pybroker"
TLS = "pybroker+ssl"
SCHEMES = (PLAIN, TLS)
URL_LENGTH_MAX = 255
ADDRESSES_MAX = 16  # of one broker or set

EXPECTED = "expected pybroker://HOST:PORT or pybroker+ssl://HOST:PORT (an IPv6 address stands in brackets)"

_URL = re.compile(r"(?P<scheme>[A-Za-z0-9+.-]+)://(\[(?P<six>[^\[\]]*)\]|(?P<host>[^\[\]:@/?#]*)):(?P<port>[0-9]{1,5})")
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"  # a longer or an empty one can't even be looked up
_HOST_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")


class NativeAddress(NamedTuple):
    """Where a broker is reached. An IPv6 address is without brackets here."""

    tls: bool
    host: str
    port: int

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{TLS if self.tls else PLAIN}://{host}:{self.port}"

    @property
    def beyond_loopback(self) -> bool:
        """True unless the host is ``localhost`` or a literal loopback address: a name may resolve to anything."""
        return not is_loopback(self.host)


def parse_native_url(url: str) -> NativeAddress:
    """Read one URL. Raises `ConfigurationError` that says what was expected.

    >>> parse_native_url("pybroker+ssl://[::1]:61620")
    NativeAddress(tls=True, host='::1', port=61620)
    """
    match = _URL.fullmatch(url) if len(url) <= URL_LENGTH_MAX and url.isascii() else None
    if match is None or match["scheme"] not in SCHEMES:
        raise _refused(url, EXPECTED)
    port = int(match["port"])
    if not 1 <= port <= 65_535:
        raise _refused(url, f"port {port} is not one of 1 to 65535")
    host = match["host"] if match["six"] is None else match["six"]
    if match["six"] is not None and (":" not in host or _literal(host) is None):
        raise _refused(url, f"[{host}] is not an IPv6 address")
    if match["six"] is None and not _HOST_NAME.fullmatch(host):
        raise _refused(url, f"{host!r} is not a host name or an address: {EXPECTED}")
    if is_every_interface(host):
        raise _refused(url, f"{host} stands for every interface when listening, and is no address to reach a broker at")
    return NativeAddress(match["scheme"] == TLS, host, port)


def parse_peer(entry: str) -> tuple[NativeAddress, ...]:
    """Read one of ``network.peers``: the addresses of one broker, or of the members of one set, divided by commas.

    An address without a scheme has that of the one before it. Raises `ConfigurationError`.

    >>> [address.port for address in parse_peer("pybroker://a:1,b:2")]
    [1, 2]
    """
    found: list[NativeAddress] = []
    for part in entry.split(","):
        text = part if "://" in part or not found else f"{TLS if found[-1].tls else PLAIN}://{part}"
        address = parse_native_url(text)
        if address in found:
            raise _refused(entry, f"{address.url} is given twice")
        found.append(address)
    if len(found) > ADDRESSES_MAX:
        raise _refused(entry, f"expected at most {ADDRESSES_MAX} addresses of one broker or set, got {len(found)}")
    return tuple(found)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine for certain: ``localhost`` or a literal loopback address."""
    if host.lower() == "localhost":
        return True
    address = _literal(host)
    return address is not None and address.is_loopback


def is_every_interface(host: str) -> bool:
    """Whether a host is an address that only listening knows: ``0.0.0.0``, ``::``."""
    address = _literal(host)
    return address is not None and address.is_unspecified


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is; None for a name. An IPv4 address in IPv6 clothes is the former."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _refused(url: str, what: str) -> ConfigurationError:
    shown = url if len(url) <= 100 else url[:97] + "..."
    if "@" in url:  # what stands before it may be a password
        return ConfigurationError(f"an address takes no user or password: {EXPECTED}")
    return ConfigurationError(f"address {shown!r}: {what}")
