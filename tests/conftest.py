"""Options of the whole suite, and how it is divided between processes."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Real processes, signals, ensembles, network namespaces and fixed multicast addresses: one after the other, in one worker.
REAL = ("benchmarks", "cli", "crash", "ensemble", "network_real")
REAL_FILES = ("cluster/test_multicast.py", "cluster/test_zookeeper_coordinator.py", "cluster/test_coordinator.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="long runs of the crash tests (hours)")


@pytest.hookimpl(tryfirst=True)  # before xdist writes the groups into the tests' names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if group := _group(item.path):
            item.add_marker(pytest.mark.xdist_group(group))
    # The worker with the real ones is busy to the end; so it begins with them.
    items.sort(key=lambda item: _group(item.path) != "real")


@cache
def _group(path: Path) -> str:
    """Tests of one group share a worker: all real ones, and those of one file that shares what it has set up. "" = anywhere."""
    place = path.relative_to(HERE)
    if place.parts[0] in REAL or place.as_posix() in REAL_FILES or place.name.startswith("test_demo"):
        return "real"
    return place.as_posix() if 'scope="module"' in path.read_text(encoding="utf-8") else ""
