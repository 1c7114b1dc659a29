"""What the figures were measured on: processor, versions, the file system and the latency of its fsync."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.processes import CLOCK_TICKS, ROOT

LIBRARIES = ("pybroker", "trio", "plyvel", "plyvel-next", "msgpack", "pydantic")
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")
SYNC_SAMPLES = 300


def file_system(directory: Path) -> str:
    """Type of the file system that holds `directory`, from /proc/mounts."""
    path = directory.resolve()
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        point, name = line.split()[1:3]
        if len(point) >= len(best) and (path == Path(point) or Path(point) in path.parents):
            best, kind = point, name
    return kind


def default_directory() -> Path:
    """The system's temporary directory when it lies on a disk, else the current one."""
    temporary = Path(tempfile.gettempdir())
    return temporary if file_system(temporary) not in MEMORY_FILE_SYSTEMS else Path.cwd()


def sync_latency(directory: Path) -> dict[str, float]:
    """Milliseconds that fdatasync takes after an append of 4 KiB: p50, p99, largest."""
    samples = []
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        for _ in range(SYNC_SAMPLES):
            file.write(b"x" * 4096)
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            samples.append((time.perf_counter() - started) * 1000)
    samples.sort()
    return {"p50_ms": samples[SYNC_SAMPLES // 2], "p99_ms": samples[SYNC_SAMPLES * 99 // 100], "max_ms": samples[-1]}


class OthersMeter:
    """How many cores other work on this machine uses over a stretch of time: all busy time less this suite's own.

    Time of child processes counts as the suite's once they have ended and were waited for.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._busy = self._read()

    def _read(self) -> float:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(fields) - fields[3] - fields[4]) / CLOCK_TICKS  # all but idle and iowait
        own = os.times()
        return busy - own.user - own.system - own.children_user - own.children_system

    def cores(self) -> float:
        """Cores used by others since this object was made."""
        return max(0.0, (self._read() - self._busy) / (time.monotonic() - self._started))


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _revision() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def interpreter_ns() -> float:
    """How fast this Python runs Python: nanoseconds of CPU for a step of an empty loop, the best of five.

    A broker in Python is as fast as its interpreter, whatever LevelDB and the kernel do: figures of two machines, or of two
    builds of Python, can be compared only beside it.
    """
    steps = 1_000_000
    times = []
    for _ in range(5):
        began = time.process_time()
        for _ in range(steps):
            pass
        times.append(time.process_time() - began)
    return min(times) / steps * 1e9


def describe(directory: Path) -> dict[str, Any]:
    """Everything about the machine that belongs beside a figure."""
    memory_pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_pages,
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "interpreter_ns": interpreter_ns(),
        "libraries": _versions(),
        "revision": _revision(),
        "file_system": file_system(directory),
        "sync": sync_latency(directory),
    }
