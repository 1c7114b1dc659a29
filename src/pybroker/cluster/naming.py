"""In which group a broker is in its network, and where it announces itself, where fields leave that to others. Pure.

`NetworkConfig` says which fields these are; that they fit each other is checked by `pybroker.network_settings`.
"""

from __future__ import annotations

from pybroker.cluster.discovery import GROUP, Discovery, parse_discovery
from pybroker.config import NetworkConfig


def network_group(network: NetworkConfig) -> str:
    """The group: ``network.group``, or that of the discovery URL where the field has its default.

    Raises `ConfigurationError` as `parse_discovery`.
    """
    discovery = network_discovery(network)
    if network.group != GROUP or discovery is None or discovery.group is None:
        return network.group
    return discovery.group


def network_discovery(network: NetworkConfig) -> Discovery | None:
    """Where to announce and to listen; None: nowhere. Raises `ConfigurationError` as `parse_discovery`."""
    return parse_discovery(network.discovery) if network.discovery else None
