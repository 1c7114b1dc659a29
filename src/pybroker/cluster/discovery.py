"""Discovery URLs: ``multicast://ADDRESS:PORT?group=G&interface=IP``. Owns reading them; opens no socket. Pure.

Used by brokers (``network.discovery``) and by clients (``discovery:(...)``), so it knows no configuration. IPv4 only: its multicast
works on every interface, 127.0.0.1 included, without a scope that has to be named.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from pybroker.errors import ConfigurationError

ADDRESS = "239.255.2.3"  # ActiveMQ's, of the range for use within one organisation (RFC 2365)
PORT = 6_155
GROUP = "default"
NAME_LENGTH_MAX = 255  # of groups, brokers and nodes
OPTIONS = ("group", "interface")

EXPECTED = "it must look like multicast://ADDRESS:PORT?group=G&interface=IP (or multicast://default)"

_URL = re.compile(r"(?P<scheme>[A-Za-z0-9+.-]+)://(?P<host>[^/?#:]*)(:(?P<port>[0-9]{1,5}))?/?(\?(?P<query>[^#]*))?")


class Discovery(NamedTuple):
    """Where announcements go and come from.

    address, port  the multicast address
    group      brokers of another group are not seen; None: the URL names none
    interface  IPv4 address of the interface to be used; None: the one that the system's routes choose
    """

    address: str = ADDRESS
    port: int = PORT
    group: str | None = None
    interface: str | None = None

    @property
    def url(self) -> str:
        """The URL that reads back as this."""
        options = [(name, value) for name, value in zip(OPTIONS, self[2:], strict=True) if value is not None]
        query = "&".join(f"{name}={quote(str(value), safe='')}" for name, value in options)
        return f"multicast://{self.address}:{self.port}" + (f"?{query}" if query else "")

    @property
    def beyond_loopback(self) -> bool:
        """True unless the interface is a loopback one."""
        return self.interface is None or not ipaddress.IPv4Address(self.interface).is_loopback


def parse_discovery(url: str) -> Discovery:
    """Read a discovery URL. Raises `ConfigurationError` that says what is wrong with it and what is expected.

    >>> parse_discovery("multicast://239.255.2.3:6155?group=city&interface=127.0.0.1").group
    'city'
    """
    match = _URL.fullmatch(url) if url.isprintable() else None
    if match is None:
        raise _refused(url, EXPECTED)
    if match["scheme"] != "multicast":
        raise _refused(url, f"scheme {match['scheme']!r} is not known, only multicast is: {EXPECTED}")
    address = ADDRESS if match["host"] == "default" else match["host"]
    found = _ipv4(address)
    if found is None or not found.is_multicast:
        raise _refused(url, f"{address!r} is not an IPv4 multicast address (224.0.0.0 to 239.255.255.255)")
    port = PORT if match["port"] is None else int(match["port"])
    if not 1 <= port <= 65_535:
        raise _refused(url, f"port {port} is not one of 1 to 65535")
    options = _options(url, match["query"] or "")
    group, interface = options.get("group"), options.get("interface")
    if group is not None and not is_name(group):
        raise _refused(url, f"group: expected 1 to {NAME_LENGTH_MAX} printable characters")
    if interface is not None:
        _check_interface(url, interface)
    return Discovery(address, port, group, interface)


def is_name(text: str) -> bool:
    """Whether a text may be the name of a group, a broker or a node."""
    return bool(text) and len(text) <= NAME_LENGTH_MAX and text.isprintable()


def _check_interface(url: str, interface: str) -> None:
    found = _ipv4(interface)
    if found is None or found.is_multicast:
        what = "expected the IPv4 address of one of this machine's interfaces, as in interface=127.0.0.1"
        raise _refused(url, f"interface: {what}, got {interface[:80]!r}")
    if found.is_unspecified:
        raise _refused(url, "interface: 0.0.0.0 is no interface: leave it out, and the system's routes choose one")


def _options(url: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, _, value = item.partition("=")
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            meant = f" (did you mean {close[0]}?)" if close else ""
            raise _refused(url, f"option {name!r} is not known, only {' and '.join(OPTIONS)} are{meant}")
        if name in options:
            raise _refused(url, f"option {name!r} is given twice")
        if not value:
            raise _refused(url, f"option {name!r} has no value")
        options[name] = unquote(value)
        if "\ufffd" in options[name]:
            raise _refused(url, f"option {name!r} has bytes in it that are not UTF-8")
    return options


def _ipv4(text: str) -> ipaddress.IPv4Address | None:
    try:
        return ipaddress.IPv4Address(text)
    except ValueError:
        return None


def _refused(url: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"discovery {url[:200]!r}: {what}")
