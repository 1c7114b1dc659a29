"""What the fields of a replica set mean together, and with the broker's own. Owns these checks; opens no file, no socket.

DESIGN.md section 5. `pybroker.settings` has checked the types before. A fault is one line with its path; a secret is never
repeated in one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pybroker.cluster.frames import FRAME_BYTES_MAX
from pybroker.cluster.registry import NAME
from pybroker.cluster.replica import check_replica_set
from pybroker.config import BrokerConfig, ReplicaSetConfig
from pybroker.errors import ConfigurationError
from pybroker.listeners import ALLOWANCES, SCHEMES, ListenerConfig, parse_listener

TLS_FIELDS = ("certificate", "key", "peer_ca")
EVERY_INTERFACE = ("0.0.0.0", "::")
ZOOKEEPER_PORT = 2_181  # where a server of the ensemble names none
BATCH_OVERHEAD_BYTES = 16 * 1024 * 1024  # of a batch: its keys, and the descriptors of the queues that it touches
BATCH_BYTES_MAX = FRAME_BYTES_MAX - BATCH_OVERHEAD_BYTES
NAMED = "1 to 64 letters, digits, '_', '.' or '-', the first a letter or digit"


def replica_set_faults(config: BrokerConfig) -> Iterator[str]:
    """What is wrong with `config.replica_set`, and with the other fields because of it: one line per fault."""
    chosen = config.replica_set
    if chosen is None:
        return
    yield from _name_faults(config, chosen)
    if config.data_dir is None:
        yield "data_dir: expected a directory where replica_set is given: a copy in memory is another one at each start"
    try:
        check_replica_set(chosen)
    except ConfigurationError as error:
        yield from str(error).splitlines()
    yield from _zookeeper_faults(chosen)
    yield from _address_faults(chosen)
    for index, url in enumerate(chosen.clients):
        scheme, separator, address = url.partition("://")
        host = _parse_address(address) if separator and scheme in SCHEMES else None
        if host is None or not host.port:
            expected = " or ".join(f"{known}://HOST:PORT" for known in SCHEMES)
            yield f"replica_set.clients[{index}]: expected {expected} as clients reach it, got {url[:80]!r}"
    files = {name: getattr(chosen, name) for name in TLS_FIELDS}
    missing = [name for name, file in files.items() if file is None]
    if missing and len(missing) < len(TLS_FIELDS):
        yield f"replica_set.{missing[0]}: expected a path: certificate, key and peer_ca are given together or not at all"
    for name, file in files.items():
        if isinstance(file, Path) and "\0" in str(file):
            yield f"replica_set.{name}: expected a path without a null character, got {str(file)[:80]!r}"
    for index, word in enumerate(chosen.allow):
        if word not in ALLOWANCES:
            known = ", ".join(repr(known) for known in ALLOWANCES)
            yield f"replica_set.allow[{index}]: expected one of {known}, got {word[:80]!r}"
    yield from _batch_faults(config)


def _name_faults(config: BrokerConfig, chosen: ReplicaSetConfig) -> Iterator[str]:
    for path, name in (("name", config.name), ("replica_set.name", chosen.name)):
        if not NAME.fullmatch(name):
            where = " where replica_set is given" if path == "name" else ""
            yield f"{path}: expected {NAMED}{where}, got {name[:80]!r}"
    if config.name == BrokerConfig().name and chosen.replicas > 1:
        yield (
            f"name: expected this replica's own name, which no other one in the set has, and {config.name!r} is the "
            "name of every broker that was given none"
        )


def _zookeeper_faults(chosen: ReplicaSetConfig) -> Iterator[str]:
    hosts, slash, chroot = chosen.zookeeper.partition("/")
    got = "got text with '@'" if "@" in chosen.zookeeper else f"got {chosen.zookeeper[:80]!r}"  # it may hold a password
    servers = [_parse_address(host) or _parse_address(f"{host}:{ZOOKEEPER_PORT}") for host in hosts.split(",")]
    parts = chroot.rstrip("/").split("/") if slash and chroot.rstrip("/") else []
    if not all(server is not None and server.port for server in servers):
        yield f"replica_set.zookeeper: expected HOST:PORT[,HOST:PORT...][/CHROOT], {got}"
    elif any(part in ("", ".", "..") or not part.isprintable() for part in parts):
        yield f"replica_set.zookeeper: expected a path as CHROOT, {got}"
    user, colon, password = chosen.zookeeper_auth.partition(":")
    if chosen.zookeeper_auth and not (user and colon and password):
        yield "replica_set.zookeeper_auth: expected USER:PASSWORD, neither of them empty"


def _address_faults(chosen: ReplicaSetConfig) -> Iterator[str]:
    bind = _parse_address(chosen.bind)
    advertise = _parse_address(chosen.advertise) if chosen.advertise else None
    if bind is None:
        what = "HOST:PORT (port 0 takes a free one; an IPv6 address stands in brackets)"
        yield f"replica_set.bind: expected {what}, got {chosen.bind[:80]!r}"
    if chosen.advertise and (advertise is None or not advertise.port or advertise.host in EVERY_INTERFACE):
        what = "HOST:PORT under which the other replicas reach this one (an IPv6 address stands in brackets)"
        yield f"replica_set.advertise: expected {what}, got {chosen.advertise[:80]!r}"
    if bind is not None and not chosen.advertise and bind.host in EVERY_INTERFACE:
        yield f"replica_set.advertise: expected HOST:PORT where replica_set.bind is every interface ({chosen.bind})"
    if bind is not None and not bind.port and advertise is not None and advertise.port:
        yield (
            f"replica_set.bind: expected a port where replica_set.advertise has one ({chosen.advertise}), "
            "or nobody is there: port 0 takes another one at each start"
        )
    for path, address in (("bind", bind), ("advertise", advertise)):
        if address is not None and address.beyond_loopback:
            yield from _exposure_faults(f"replica_set.{path}", getattr(chosen, path), chosen)
            return


def _exposure_faults(path: str, address: str, chosen: ReplicaSetConfig) -> Iterator[str]:
    """As `check_exposure` for listeners. The secret is asked for with TLS too: an authority may sign more than one set."""
    remedies = {}
    if all(getattr(chosen, name) is None for name in TLS_FIELDS):
        remedies["plaintext"] = "give certificate, key and peer_ca"
    if not chosen.secret:
        remedies["anonymous"] = "give a secret"
    missing = [word for word in remedies if word not in chosen.allow]
    if missing:
        whole = ", ".join(f'"{word}"' for word in ALLOWANCES if word in missing or word in chosen.allow)
        yield (
            f"{path}: {address} can be reached from beyond loopback and is {' and '.join(missing)}: "
            f"{', '.join(remedies[word] for word in missing)}, or ask for it by name with replica_set.allow = [{whole}]"
        )


def _batch_faults(config: BrokerConfig) -> Iterator[str]:
    sizes = {
        "limits.transaction_bytes_max": config.limits.transaction_bytes_max,
        "limits.batch_bytes_max": config.limits.batch_bytes_max,
        "stomp.body_bytes_max": config.stomp.body_bytes_max,
    }
    total = sum(sizes.values())
    if total > BATCH_BYTES_MAX:
        told = " + ".join(f"{path} ({size})" for path, size in sizes.items())
        yield (
            f"{max(sizes, key=lambda path: sizes[path])}: expected less where replica_set is given, as a batch travels "
            f"to the other replicas in one frame: {told} may be {BATCH_BYTES_MAX} together, and is {total}"
        )


def _parse_address(text: str) -> ListenerConfig | None:
    """``HOST:PORT`` by the rules for listeners; None when it is not that."""
    if set("/?#") & set(text):
        return None
    try:
        return parse_listener(f"{SCHEMES[0]}://{text}")
    except ConfigurationError:
        return None
