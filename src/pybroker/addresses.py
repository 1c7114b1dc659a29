"""What `pybroker.connect` is told: URLs to the brokers that they name. Owns their reading; opens nothing.

::

    pybroker://HOST:PORT                                           one broker, or one replica
    pybroker://HOST:PORT,pybroker://HOST:PORT                      several
    failover:(pybroker://HOST:PORT,pybroker+ssl://HOST:PORT)?option=value&option=value
    discovery:(multicast://ADDRESS:PORT?group=G&interface=IP)?option=value

Options are those of `ConnectOptions`. One URL alone may have options, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import unquote

from pybroker.cluster.discovery import Discovery, parse_discovery
from pybroker.cluster.native_urls import NativeAddress, parse_native_url
from pybroker.connect_options import ConnectOptions, with_options
from pybroker.errors import ConfigurationError

FAILOVER = "failover:"
DISCOVERY = "discovery:"
URL_LENGTH_MAX = 8_192
ADDRESSES_MAX = 256

EXPECTED = (
    "expected pybroker://HOST:PORT, pybroker+ssl://HOST:PORT, several of these divided by commas, failover:(URL,URL), "
    "or discovery:(multicast://ADDRESS:PORT?group=G)"
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a client connects to.

    brokers    addresses that were given, in order; none with discovery
    discovery  where brokers announce themselves; None = nowhere
    learns     brokers that the network tells of may be used too
    options    with those of the URL
    """

    brokers: tuple[NativeAddress, ...]
    discovery: Discovery | None
    learns: bool
    options: ConnectOptions


def parse_target(url: str, options: ConnectOptions | None = None) -> Target:
    """Read what `connect` is given. Raises ConfigurationError, which says what is wrong and what was expected."""
    base = options if options is not None else ConnectOptions()
    if not isinstance(url, str):
        raise ConfigurationError(f"an address must be text, not {type(url).__name__}: {EXPECTED}")
    if len(url) > URL_LENGTH_MAX:
        raise ConfigurationError(f"an address has {len(url)} characters, and at most {URL_LENGTH_MAX} are read")
    for prefix in (FAILOVER, DISCOVERY):
        if url.startswith(prefix):
            inner, query = _parts(url, prefix)
            chosen = _with_query(url, base, query)
            if prefix == DISCOVERY:
                return Target((), parse_discovery(inner), chosen.learn, chosen)
            return Target(_brokers(url, inner.split(",")), None, chosen.learn, chosen)
    listed = url.split(",")
    if len(listed) > 1:
        if "?" in url:
            raise refused(url, "options for several brokers are written as failover:(URL,URL)?option=value")
        return Target(_brokers(url, listed), None, False, base)
    address, mark, query = url.partition("?")
    return Target(_brokers(url, [address]), None, False, _with_query(url, base, query if mark else ""))


def parse_learned(urls: Iterable[str], tls_only: bool) -> list[NativeAddress]:
    """The addresses among what a broker tells that a client may use: no plaintext where it was given TLS only."""
    found = []
    for url in urls:
        try:
            address = parse_native_url(url)
        except ConfigurationError:
            continue  # another protocol's, or none at all: nothing to be done about it here
        if address.tls or not tls_only:
            found.append(address)
    return found


def refused(url: str, what: str) -> ConfigurationError:
    shown = "(with a user or a password)" if "@" in url else repr(url if len(url) <= 200 else url[:197] + "...")
    return ConfigurationError(f"address {shown}: {what}")


def _parts(url: str, prefix: str) -> tuple[str, str]:
    """What stands in the brackets, and the query behind them."""
    rest = url[len(prefix) :]
    if rest.startswith("//"):  # as ActiveMQ lets one write it
        rest = rest[2:]
    if not rest.startswith("("):
        raise refused(url, f"{prefix} is followed by brackets: {EXPECTED}")
    inner, bracket, query = rest[1:].rpartition(")")
    if not bracket:
        raise refused(url, f"the bracket behind {prefix} is not closed: {EXPECTED}")
    if query and not query.startswith("?"):
        raise refused(url, f"behind the brackets comes ?option=value, not {query[:40]!r}")
    return inner, query[1:]


def _brokers(url: str, listed: list[str]) -> tuple[NativeAddress, ...]:
    found: list[NativeAddress] = []
    for each in listed:
        text = each.strip()
        if not text:
            raise refused(url, f"an address in the list is empty: {EXPECTED}")
        if "://" not in text:
            raise refused(url, f"{text[:80]!r} has no scheme: {EXPECTED}")
        scheme = text.partition("://")[0]
        if scheme in ("stomp", "stomp+ssl"):
            raise refused(url, f"{scheme} is not spoken by this client, but by STOMP's: {EXPECTED}")
        if "?" in text:
            raise refused(url, "options go behind the brackets: failover:(URL,URL)?option=value")
        address = parse_native_url(text)
        if address in found:
            raise refused(url, f"{address.url} is given twice")
        found.append(address)
    if len(found) > ADDRESSES_MAX:
        raise refused(url, f"at most {ADDRESSES_MAX} brokers are given by name, not {len(found)}: use discovery:")
    return tuple(found)


def _with_query(url: str, base: ConnectOptions, query: str) -> ConnectOptions:
    given: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise refused(url, f"an option is written name=value, not {item[:80]!r}")
        if name in given:
            raise refused(url, f"option {name!r} is given twice")
        given[name] = unquote(value)
    try:
        return with_options(base, given)
    except ConfigurationError as error:
        raise refused(url, str(error)) from None
