"""Three real ZooKeeper servers for each module, on loopback or on a host of a network of their own; and the figures, at the end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.ensemble import figures
from tests.ensemble.namespaces import Namespaces, namespaces
from tests.support.zookeeper import Ensemble, ensemble, require_zookeeper


@pytest.fixture(scope="module")
def zookeeper() -> Iterator[Ensemble]:
    """On loopback. A test that ends servers starts them again."""
    with ensemble(3) as found:
        yield found


class Hosts(NamedTuple):
    """The hosts ``a``, ``b`` and ``c`` for brokers, ``zookeeper`` for the whole ensemble, and ``out`` for the programs outside."""

    network: Namespaces
    zookeeper: Ensemble

    @property
    def options(self) -> dict[str, object]:
        """For `Trial`: who runs where."""
        network = self.network
        return {
            "hosts": [(network.host(name), network.prefix(name)) for name in "abc"],
            "prefix": network.prefix("out"),
        }


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """In namespaces. A test that cuts ways heals them."""
    require_zookeeper()
    with namespaces("a", "b", "c", "zookeeper", "out") as network:
        host, prefix = network.host("zookeeper"), network.prefix("zookeeper")
        with ensemble(3, hosts=[host] * 3, prefixes=[prefix] * 3) as found:
            yield Hosts(network, found)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures.LINES:
        terminalreporter.section("replica sets")
        for line in figures.LINES:
            terminalreporter.write_line(line)
