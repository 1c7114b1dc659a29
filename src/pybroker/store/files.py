"""File operations that are durable when they return. Owns the order of writing, syncing and renaming; knows no format.

Follows DESIGN.md section 5, rule 9: what a crash leaves is the old whole file or the new whole file. Everything blocks. Each
operation of the system is one method of `Files`, so that a test can end the program before any of them.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from pybroker.store.directory import DIRECTORY_MODE

FILE_MODE = 0o600
TEMPORARY = ".new"  # what a file that is being replaced is called until it is whole
# Where links are not possible; any other failure of a link is one of the disk's.
_NO_LINKS = frozenset({errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


class Files:
    """The system's operations on files. All raise OSError."""

    def write(self, path: Path, data: bytes) -> None:
        """Make or overwrite a file; not synced."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        """fsync of a file's content, or of a directory's names."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, path: Path, target: Path) -> None:
        os.replace(path, target)

    def make_directory(self, path: Path) -> None:
        path.mkdir(mode=DIRECTORY_MODE)

    def link(self, path: Path, target: Path) -> None:
        os.link(path, target, follow_symlinks=False)

    def copy(self, path: Path, target: Path) -> None:
        shutil.copyfile(path, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        path.unlink()

    def remove_directory(self, path: Path) -> None:
        path.rmdir()

    # ---- made of these

    def replace(self, path: Path, data: bytes) -> None:
        """Replace a file's content, whole or not at all, whatever happens."""
        temporary = path.with_name(path.name + TEMPORARY)
        self.write(temporary, data)
        self.sync(temporary)
        self.rename(temporary, path)
        self.sync(path.parent)

    def link_or_copy(self, path: Path, target: Path) -> None:
        """For a file that never changes: it costs nothing where the file system knows links."""
        try:
            self.link(path, target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self.copy(path, target)
