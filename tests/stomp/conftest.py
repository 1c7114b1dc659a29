"""A broker process that the tests of one module share, each test with queues of its own."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import ServedBroker, served

_numbers = itertools.count(1)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: the address of a control socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pb-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def broker() -> Iterator[ServedBroker]:
    with tempfile.TemporaryDirectory(prefix="pb-") as name, served(Path(name) / "data") as one:
        yield one


@pytest.fixture
def name() -> str:
    """A name that no other test uses."""
    return f"n{next(_numbers)}"
