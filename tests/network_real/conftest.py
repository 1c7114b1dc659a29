"""Hosts of a network with multicast for each module, ZooKeeper on one of them; and the figures, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.ensemble.namespaces import Namespaces, namespaces
from tests.network_real import figures
from tests.network_real.sets import HOSTS
from tests.network_real.trial import Trial, trial
from tests.support.zookeeper import Ensemble, ensemble, require_zookeeper

Begin = Callable[..., AbstractContextManager[Trial]]


class Ground(NamedTuple):
    """Hosts for three sets, one ensemble of three ZooKeeper servers, and the programs outside."""

    network: Namespaces
    zookeeper: Ensemble


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """A test that cuts ways heals them, and starts the servers that it ends."""
    require_zookeeper()
    with namespaces(*HOSTS, "zookeeper", "out") as network:
        host, prefix = network.host("zookeeper"), network.prefix("zookeeper")
        with ensemble(3, hosts=[host] * 3, prefixes=[prefix] * 3) as found:
            yield Ground(network, found)


@pytest.fixture
def begin(ground: Ground) -> Begin:
    """`trial` on this ground."""

    def begin(directory: Path, **options: Any) -> AbstractContextManager[Trial]:
        return trial(directory, ground.network, ground.zookeeper.addresses, **options)

    return begin


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures.LINES:
        terminalreporter.section("networks of brokers")
        for line in figures.LINES:
            terminalreporter.write_line(line)
