"""What every case is told: where to put its data, what to measure, how much of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import Kind


class NotMeasurable(Exception):
    """This machine lacks something that a case needs. The text says what, and what to install."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run of the suite.

    server     the program that is measured
    directory  where temporary stores are made, on a disk
    quick      small sizes: shows that the suite works, not how fast anything is
    rounds     how often server and trial take turns
    seconds    how long one round sends
    distinct   each message of a cycle has headers of its own
    say        shows progress
    """

    server: Kind
    directory: Path
    quick: bool
    rounds: int
    seconds: float
    distinct: bool
    say: Callable[[str], None]

    @contextmanager
    def store(self) -> Iterator[Path]:
        """A path for one server's data in a new directory, which goes away afterwards.

        What earlier runs left to be written goes to disk first, so that it does not slow the next one's fsyncs.
        """
        os.sync()
        parent = Path(tempfile.mkdtemp(prefix="benchmark-", dir=self.directory))
        try:
            yield parent / "data"
        finally:
            shutil.rmtree(parent, ignore_errors=True)
