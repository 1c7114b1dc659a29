"""What the fields of the network mean together, and with the broker's own. Owns these checks; opens no file, no socket.

DESIGN.md section 6. `pybroker.settings` has checked the types before. A fault is one line with its path; a secret is never
repeated in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pybroker.cluster.announcements import DATAGRAM_BYTES_MAX, TOO_LONG, longest
from pybroker.cluster.discovery import GROUP, NAME_LENGTH_MAX, Discovery, is_name
from pybroker.cluster.naming import network_discovery, network_group
from pybroker.cluster.native_urls import (
    ADDRESSES_MAX,
    PLAIN,
    NativeAddress,
    is_every_interface,
    parse_native_url,
    parse_peer,
)
from pybroker.config import BrokerConfig, NetworkConfig
from pybroker.destination import parse_destination
from pybroker.errors import BrokerError, ConfigurationError
from pybroker.listeners import ALLOWANCES, ListenerConfig, parse_listener
from pybroker.replica_settings import TLS_FIELDS

LONGEST_PORT = 65_535  # stands for one that is not known yet
PEER_TIMEOUT_INTERVALS_MIN = 2.0  # below it one lost datagram ends a peer

# A field, the other one that bounds it from below, and how often that one must fit.
TIMES = (
    ("heartbeat_timeout", "heartbeat_interval", 2, "at least twice"),
    ("retry_interval_max", "retry_interval", 1, "at least"),
)


def network_faults(config: BrokerConfig) -> Iterator[str]:
    """What is wrong with `config.network`, and with the other fields because of it: one line per fault."""
    chosen = config.network
    if chosen is None:
        return
    yield from _name_faults(config, chosen)
    discovery = None
    try:
        discovery = network_discovery(chosen)
    except ConfigurationError as error:
        yield f"network.discovery: {error}"
    if discovery is not None and discovery.group not in (None, chosen.group) and chosen.group != GROUP:
        yield (
            f"network.group: expected the group of network.discovery ({discovery.group!r}) or none, got {chosen.group[:80]!r}: "
            "the two say the same, so give one of them"
        )
    peers: list[NativeAddress] = []
    for index, entry in enumerate(chosen.peers):
        try:
            peers += parse_peer(entry)
        except ConfigurationError as error:
            yield f"network.peers[{index}]: {error}"
    yield from _tls_faults(chosen, peers)
    for index, word in enumerate(chosen.allow):
        if word not in ALLOWANCES:
            known = ", ".join(repr(known) for known in ALLOWANCES)
            yield f"network.allow[{index}]: expected one of {known}, got {word[:80]!r}"
    yield from _exposure_faults(chosen, discovery, peers)
    yield from _reach_faults(config, chosen, discovery)
    for field in ("include", "exclude"):
        for index, pattern in enumerate(getattr(chosen, field)):
            try:
                parse_destination(pattern)
            except BrokerError as error:
                yield f"network.{field}[{index}]: {error}"
    yield from _time_faults(chosen)


def _name_faults(config: BrokerConfig, chosen: NetworkConfig) -> Iterator[str]:
    expected = f"expected 1 to {NAME_LENGTH_MAX} printable characters"
    if chosen.name and not is_name(chosen.name):
        yield f"network.name: {expected}, got {chosen.name[:80]!r}"
    if not is_name(chosen.group):
        yield f"network.group: {expected}, got {chosen.group[:80]!r}"
    if config.network_name == BrokerConfig().name:
        yield (
            f"network.name: expected a name that no other broker of the network has, and {BrokerConfig().name!r} is the name "
            "of every broker that was given none: give this field, or the broker's name"
        )


def _tls_faults(chosen: NetworkConfig, peers: list[NativeAddress]) -> Iterator[str]:
    files = {name: getattr(chosen, name) for name in TLS_FIELDS}
    missing = [name for name, file in files.items() if file is None]
    if missing and len(missing) < len(TLS_FIELDS):
        yield f"network.{missing[0]}: expected a path: certificate, key and peer_ca are given together or not at all"
    elif missing and any(peer.tls for peer in peers):
        url = next(peer.url for peer in peers if peer.tls)
        yield f"network.{missing[0]}: expected a path: certificate, key and peer_ca are needed to dial {url}"
    for name, file in files.items():
        if isinstance(file, Path) and "\0" in str(file):
            yield f"network.{name}: expected a path without a null character, got {str(file)[:80]!r}"


def _exposure_faults(chosen: NetworkConfig, discovery: Discovery | None, peers: list[NativeAddress]) -> Iterator[str]:
    """As `check_exposure` for listeners. What discovery finds may be dialled without TLS where no certificate is given."""
    outside = [peer for peer in peers if peer.beyond_loopback]
    announced = discovery is not None and discovery.beyond_loopback
    remedies = {}
    plain = [peer for peer in outside if not peer.tls]
    if plain or (announced and chosen.certificate is None):
        remedies["plaintext"] = "use pybroker+ssl:// for peers" if plain else "give certificate, key and peer_ca"
    if (outside or announced) and not chosen.secret:
        remedies["anonymous"] = "give a secret"
    missing = [word for word in remedies if word not in chosen.allow]
    if not missing:
        return
    whole = ", ".join(f'"{word}"' for word in ALLOWANCES if word in missing or word in chosen.allow)
    if announced and discovery is not None:
        path, what = "network.discovery", f"{discovery.url} goes beyond loopback"
    else:
        path, what = "network.peers", f"{(plain or outside)[0].url} is beyond loopback"
    mend = ", ".join(remedies[word] for word in missing)
    on_one_machine = ", or add interface=127.0.0.1 for brokers on this machine only" if announced else ""
    yield (
        f"{path}: {what}, and links are {' and '.join(missing)}: {mend}, or ask for it by name with "
        f"network.allow = [{whole}]{on_one_machine}"
    )


def _reach_faults(config: BrokerConfig, chosen: NetworkConfig, discovery: Discovery | None) -> Iterator[str]:
    """Others must reach this broker: over a native listener, at addresses that an announcement has room for."""
    listeners = list(_native_listeners(config))
    if not listeners:
        yield (
            "listen: expected a listener of the native protocol (pybroker://HOST:PORT or pybroker+ssl://) where network is "
            "given: the links of other brokers come in there"
        )
    wrong = False
    for index, url in enumerate(chosen.advertise):
        try:
            parse_native_url(url)
        except ConfigurationError as error:
            wrong = True
            yield f"network.advertise[{index}]: {error}"
    every = [one for one in listeners if is_every_interface(one.host)]
    if every and not chosen.advertise:
        wrong = True
        yield (
            "network.advertise: expected the URLs under which others reach this broker, where it listens on every interface "
            f"({every[0].address_url(every[0].port)})"
        )
    urls = chosen.advertise or tuple(one.address_url(one.port or LONGEST_PORT) for one in listeners)
    if discovery is not None and urls and not wrong:
        yield from _announcement_faults(config, chosen, discovery, urls)


def _announcement_faults(
    config: BrokerConfig, chosen: NetworkConfig, discovery: Discovery, urls: tuple[str, ...]
) -> Iterator[str]:
    path = "network.advertise" if chosen.advertise else "listen"
    if len(urls) > ADDRESSES_MAX:
        yield f"{path}: expected at most {ADDRESSES_MAX} addresses of the native protocol to announce, got {len(urls)}"
        return
    if discovery.beyond_loopback and not any(parse_native_url(url).beyond_loopback for url in urls):
        yield (
            f"{path}: expected an address that other machines reach where network.discovery goes to them, got only loopback "
            "ones: listen elsewhere too, or add interface=127.0.0.1 to network.discovery"
        )
    names = (config.network_name, config.name, network_group(chosen))
    if all(map(is_name, names)):
        name, node, group = names
        size = longest(name, node, urls, group)
        if size > DATAGRAM_BYTES_MAX:
            yield f"network: {TOO_LONG.format(size)}"


def _native_listeners(config: BrokerConfig) -> Iterator[ListenerConfig]:
    for url in config.listen:
        try:
            listener = parse_listener(url)
        except ConfigurationError:
            continue  # told by the checks of `listen`
        if listener.protocol == PLAIN:
            yield listener


def _time_faults(chosen: NetworkConfig) -> Iterator[str]:
    for field, other, times, words in TIMES:
        value, least = getattr(chosen, field), getattr(chosen, other)
        if value < times * least:
            yield f"network.{field}: expected {words} network.{other} ({least}), got {value}"
    if chosen.peer_timeout_intervals < PEER_TIMEOUT_INTERVALS_MIN:
        yield (
            f"network.peer_timeout_intervals: expected at least {PEER_TIMEOUT_INTERVALS_MIN:g}, or one lost datagram ends a "
            f"peer, got {chosen.peer_timeout_intervals:g}"
        )
