"""Giving mapped table files back to the system. Owns one question (how much is mapped) and one advice; Linux only.

LevelDB keeps at least 64 tables open and maps each into memory: whoever reads through a deep queue ends up with 64 MB
of file pages in the process's resident memory. They are clean and cost nobody anything until memory is short, but
they count: for a limit of a container, and for DESIGN.md's promise that depth doesn't show in resident memory.
``MADV_PAGEOUT`` never changes what memory holds (unlike ``MADV_DONTNEED``), so it does no harm to a range that a
compaction unmaps at the same moment. Where it is not known nothing happens.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

MADV_PAGEOUT = 21  # Linux 5.4 and later
GROWTH_BYTES_MAX = 12 * 1024 * 1024  # mapped file bytes that may become resident before they are given back
_STATM = "/proc/self/statm"
_MAPS = "/proc/self/maps"


class ResidentTrim:
    """Watches the process's resident file pages, and gives those of one directory back when they have grown."""

    def __init__(self, directory: Path) -> None:
        self._prefix = os.path.join(os.path.realpath(directory), "").encode()
        self._madvise = _find_madvise()
        self._page = os.sysconf("SC_PAGE_SIZE") if self._madvise else 4096
        self._low = self._file_bytes()
        self.trims = 0

    def check(self) -> None:
        """Trim if it is time: about 20 µs when it is not, some milliseconds when it is. Blocking."""
        if self._madvise is None:
            return
        present = self._file_bytes()
        self._low = min(self._low, present)
        if present - self._low > GROWTH_BYTES_MAX:
            self._trim()
            self._low = self._file_bytes()  # what is not ours stays, and must not bring us here each time
            self.trims += 1

    def _file_bytes(self) -> int:
        with suppress(OSError, ValueError, IndexError), open(_STATM, "rb") as file:
            return int(file.read().split()[2]) * self._page
        return 0

    def _trim(self) -> None:
        assert self._madvise is not None
        with suppress(OSError, ValueError), open(_MAPS, "rb") as file:
            for line in file:
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith(self._prefix):
                    first, _, last = fields[0].partition(b"-")
                    start = int(first, 16)
                    self._madvise(start, int(last, 16) - start, MADV_PAGEOUT)


def _find_madvise() -> ctypes._NamedFuncPointer | None:
    if not sys.platform.startswith("linux") or not os.path.exists(_MAPS):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
