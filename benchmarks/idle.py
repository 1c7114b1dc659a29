"""Case `idle`: what a connection that does nothing costs the server in resident memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.processes import ROOT, Kind, ServerFailed, memory, serving
from benchmarks.report import Row
from benchmarks.settings import Settings

CONNECTIONS = 5_000
TARGET_KB = 60.0
SETTLE = 1.0  # seconds until memory is read


def kilobytes_each(settings: Settings, kind: Kind, subscribe: bool) -> dict[str, float]:
    """Growth of VmRSS and RssAnon by connection, in KB of 1,024 bytes."""
    count = CONNECTIONS // 10 if settings.quick else CONNECTIONS
    with settings.store() as data, serving(kind, data) as server:
        time.sleep(SETTLE)
        before = memory(server.pid)
        command = [sys.executable, "-m", "benchmarks.load_idle", "--url", server.url, "--connections", str(count)]
        if subscribe:
            command.append("--subscribe")
        log = Path(data).with_name("idle.log")
        with log.open("wb") as errors:
            holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=ROOT)
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            if holder.stdout.readline() != b"holding %d\n" % count:
                raise ServerFailed(f"the idle connections were not opened\n{log.read_text()[-3000:]}")
            time.sleep(SETTLE)
            after = memory(server.pid)
        finally:
            holder.stdin.close()
            holder.stdout.close()
            holder.kill()
            holder.wait()
    each = {
        "connections": float(count),
        "resident": (after.resident - before.resident) / 1024 / count,
        "anonymous": (after.anonymous - before.anonymous) / 1024 / count,
    }
    settings.say(f"{kind.name}: {each['resident']:.1f} KB for each of {count} connections")
    return each


def run(settings: Settings) -> Iterator[Row]:
    """Connected only, which has the target; then with a subscription each."""
    for subscribe, name in ((False, "connected"), (True, "connected and subscribed to a queue of its own")):
        each = kilobytes_each(settings, settings.server, subscribe)
        yield Row(
            case="idle",
            name=f"memory of an idle connection, {name}",
            figure=each["resident"],
            unit="KB",
            beside="of it anonymous",
            beside_figure=each["anonymous"],
            target="" if subscribe else f"< {TARGET_KB:g} at {CONNECTIONS:,}",
            met=None if subscribe else each["resident"] < TARGET_KB,
            details=each,
        )
