"""Hosts of a network with multicast for each module, ZooKeeper on one of them; and the figures, at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.ensemble.namespaces import namespaces
from tests.network_real import figures
from tests.network_real.sets import HOSTS
from tests.network_real.trial import Trial, trial
from tests.support.zookeeper import ensemble, require_zookeeper

Begin = Callable[..., AbstractContextManager[Trial]]


@pytest.fixture(scope="module")
def begin() -> Iterator[Callable[..., AbstractContextManager[Trial]]]:
    """`trial` on hosts for three sets, one ensemble of three ZooKeeper servers, and the programs outside."""
    require_zookeeper()
    with namespaces(*HOSTS, "zookeeper", "out") as network:
        host, prefix = network.host("zookeeper"), network.prefix("zookeeper")
        with ensemble(3, hosts=[host] * 3, prefixes=[prefix] * 3) as found:

            def begin(directory: Path, **options: Any) -> AbstractContextManager[Trial]:
                return trial(directory, network, found.addresses, **options)

            yield begin


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures.LINES:
        terminalreporter.section("networks of brokers")
        for line in figures.LINES:
            terminalreporter.write_line(line)
