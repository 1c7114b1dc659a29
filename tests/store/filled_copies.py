"""Copies with something in them, for the tests of copies."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

from pybroker.operations import PUT_MESSAGE, PUT_QUEUE, QueueRecord
from pybroker.store import Store
from pybroker.store.backend import Entry
from pybroker.store.chunks import FIRST, STOP, read
from pybroker.store.copies import DiskCopies
from pybroker.store.files import Files
from tests.store.samples import message, place

MESSAGES = 40


def names() -> Callable[[], str]:
    numbers = count(1)
    return lambda: f"copy {next(numbers)}"


def on_disk(path: Path, files: Files | None = None, name: str = "a") -> DiskCopies:
    return DiskCopies(path / "data", "set", name, names(), files)


def fill(store: Store, text: bytes, lsn: int, sync: bool = True) -> None:
    sent = [message(text + b"%d" % number) for number in range(MESSAGES)]
    size = sum(each.size for each in sent)
    operations: list[tuple[object, ...]] = [(PUT_MESSAGE, 1, place(number), each) for number, each in enumerate(sent)]
    operations.append((PUT_QUEUE, QueueRecord(1, "queue", "q", next_sequence=MESSAGES, count=MESSAGES, size=size)))
    store.apply([*store.encode(operations), store.history_change(lsn, lsn)], (lsn, lsn), sync)


def content(store: Store) -> list[Entry]:
    return read(store.backend, FIRST, STOP)
