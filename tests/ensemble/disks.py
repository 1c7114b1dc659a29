"""A disk of its own, small enough to be filled: a tmpfs. Owns its mounting and filling. Needs root."""

from __future__ import annotations

import errno
import functools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE_MB = 96
BLOCK = 4096  # bytes
COMMAND_TIMEOUT = 10.0
FILLER = "filler"


@functools.cache
def missing() -> str:
    """What keeps a file system from being mounted here; empty when nothing does."""
    with tempfile.TemporaryDirectory(prefix="pybroker-disk-") as directory:
        try:
            with _mounted(Path(directory)):
                return ""
        except FileNotFoundError:
            return "there is no mount command"
        except OSError as error:
            return f"a tmpfs can't be mounted here (it needs root): {error}"


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system at `path` for the length of the block. Skips the test, loudly, where none can be mounted."""
    if missing():
        pytest.skip(f"NO FULL DISK: {missing()}")
    path.mkdir()
    with _mounted(path):
        yield path


@contextmanager
def _mounted(path: Path) -> Iterator[None]:
    _run("mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "pybroker-test", str(path))
    try:
        yield
    finally:
        _run("umount", "--lazy", str(path))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT)
    if done.returncode:
        raise OSError(done.stderr.strip())


def fill(path: Path) -> None:
    """Leave not a block free, whatever others take meanwhile."""
    size = SIZE_MB << 20
    with (path / FILLER).open("ab") as file:
        while size >= BLOCK:
            try:
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), size)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2


def empty(path: Path) -> None:
    """Take the filling away."""
    (path / FILLER).unlink(missing_ok=True)
