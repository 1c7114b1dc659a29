"""What `verify` and `salvage` say. Owns the values of a report and the finding of a store's directory; checks nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pybroker.errors import StoreError
from pybroker.store.layout import current_name

PROBLEMS_MAX = 1_000  # problems that a report lists; all of them are counted
PROGRESS_KEYS = 10_000  # keys between two calls of a progress callback

Progress = Callable[[int], None]  # called with the number of keys read so far


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: the key it was met at, a stable word for its kind, and a text."""

    key: bytes
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.key.hex()}: {self.kind}: {self.text}"


@dataclass(frozen=True, slots=True)
class QueueSummary:
    """One queue: what its descriptor says (``count``, ``size``) and what was found in its range."""

    queue_id: int
    kind: str
    name: str
    client_id: str
    subscription: str
    count: int
    size: int
    found_count: int
    found_size: int


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `verify` or `salvage`.

    path           the LevelDB directory that was read
    store_id       of the store that was read; "" when it can't be known
    starts, position  as in `Store`
    queues         one row per queue; after `salvage` as in the new store
    keys, bytes    what was read: number of keys, bytes of keys and values
    bodies         shared bodies
    schedules      messages that are to be sent later
    problems       the first PROBLEMS_MAX problems; after `salvage`: what was not copied, or only in part
    problem_count  all of them
    notes          what else the reader should know
    new_path       where `salvage` put the new store's data directory
    """

    path: Path
    store_id: str
    starts: int
    position: tuple[int, int]
    queues: tuple[QueueSummary, ...]
    keys: int
    bytes: int
    bodies: int
    problems: tuple[Problem, ...]
    problem_count: int
    notes: tuple[str, ...] = ()
    schedules: int = 0
    new_path: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.problem_count == 0


@dataclass(slots=True)
class Problems:
    """Collects problems up to PROBLEMS_MAX, and counts all."""

    listed: list[Problem] = field(default_factory=list)
    count: int = 0

    def add(self, key: bytes, kind: str, text: str) -> None:
        self.count += 1
        if len(self.listed) < PROBLEMS_MAX:
            self.listed.append(Problem(key, kind, text))


def find_store(path: str | os.PathLike[str]) -> Path:
    """The LevelDB directory of a broker's data directory, or `path` itself; raise `StoreError` if there is none.

    In a replica's data directory it is that of the current copy.
    """
    directory = Path(path)
    if directory.is_dir() and "CURRENT" in os.listdir(
        directory
    ):  # a database; where names have no case, not our pointer
        return directory
    inner = directory / current_name(directory)
    if inner.is_dir():
        return inner
    if directory.is_dir() and any(directory.iterdir()):
        return directory
    raise StoreError(f"there is no store in {directory}")
