"""TLS between brokers: both sides show a certificate, and both check the other's. Owns the contexts, of replication and of links.

DESIGN.md sections 5 and 6. TLS 1.2 or newer. The one who dials checks the host that it dials against the peer's certificate; the
one who accepts checks that the peer's was signed by `peer_ca`: who it is, the hand-shake of the connection says and proves.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from pybroker.config import NetworkConfig, ReplicaSetConfig
from pybroker.errors import ConfigurationError


def make_contexts(config: ReplicaSetConfig) -> tuple[ssl.SSLContext, ssl.SSLContext] | None:
    """For the side that dials and the side that accepts; None when the set's links are plaintext. Reads the files.

    Raises ConfigurationError, which names the field and the file.
    """
    files = (config.certificate, config.key, config.peer_ca)
    certificate, key, peer_ca = files
    if certificate is None or key is None or peer_ca is None:
        if any(files):
            raise ConfigurationError("replica_set.certificate, key and peer_ca are given together or not at all")
        return None
    return (
        _context("replica_set", ssl.PROTOCOL_TLS_CLIENT, certificate, key, peer_ca),
        _context("replica_set", ssl.PROTOCOL_TLS_SERVER, certificate, key, peer_ca),
    )


def make_link_context(config: NetworkConfig) -> ssl.SSLContext | None:
    """For dialling other brokers of the network; None when no certificate is given. Reads the files.

    Raises ConfigurationError, which names the field and the file.
    """
    certificate, key, peer_ca = config.certificate, config.key, config.peer_ca
    if certificate is None or key is None or peer_ca is None:
        return None
    return _context("network", ssl.PROTOCOL_TLS_CLIENT, certificate, key, peer_ca)


def _context(section: str, protocol: int, certificate: Path, key: Path, peer_ca: Path) -> ssl.SSLContext:
    for field, path in (("certificate", certificate), ("key", key), ("peer_ca", peer_ca)):
        _check_readable(f"{section}.{field}", path)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    context.check_hostname = protocol == ssl.PROTOCOL_TLS_CLIENT
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        raise ConfigurationError(
            f"{section}.certificate {certificate} and {section}.key {key}: expected a PEM certificate and its "
            f"private key, without a password: {_reason(error)}"
        ) from error
    try:
        context.load_verify_locations(peer_ca)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(
            f"{section}.peer_ca {peer_ca}: expected the PEM certificates of who signs the other brokers' ones: {_reason(error)}"
        ) from error
    return context


def _check_readable(field: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigurationError(f"{field} {path}: {error.strerror}") from error


def _no_password() -> str:
    """Instead of asking at the terminal."""
    raise ValueError("the key has a password")


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, ssl.SSLError) and error.reason else str(error)
