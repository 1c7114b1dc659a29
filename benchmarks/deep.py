"""Case `deep`: a queue of a million durable messages. Memory, start, and the speed of draining it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from benchmarks.processes import Memory, Server, memory, run_child, serving
from benchmarks.report import Rounds, Row
from benchmarks.settings import Settings
from benchmarks.wire import Connection, subscribe_frame

SHORT_MESSAGES = 10_000
DEEP_MESSAGES = 1_000_000
MEMORY_MAX_MB = 32.0
START_MAX = 2.0  # seconds from process start to the first message
DRAIN_SHARE = 0.5  # of a short queue's speed
SHORT_ROUNDS = 5
SETTLE = 1.5  # seconds until memory is read
MEGABYTE = 1024 * 1024


def fill(server: Server, messages: int, first: int = 0) -> None:
    """Send so many durable messages, each confirmed, when the queue holds `first` already."""
    run_child(
        "benchmarks.load", ["fill", "--url", server.url, "--persistent", "--messages", messages, "--first", first]
    )


def drain(server: Server, messages: int) -> dict[str, Any]:
    """Receive them all, with auto ack."""
    return run_child("benchmarks.load", ["drain", "--url", server.url, "--pid", server.pid, "--messages", messages])


def settled_memory(server: Server) -> Memory:
    """Memory a moment later."""
    time.sleep(SETTLE)
    return memory(server.pid)


def first_message(server: Server) -> float:
    """When a consumer that connects now has its first message. It acknowledges nothing, so that all stay."""
    connection = Connection(server.url)
    connection.request(subscribe_frame("/queue/benchmark", "client-individual", "subscribed"), b"RECEIPT")
    connection.wait_for(b"MESSAGE")
    arrived = time.monotonic()
    connection.close()
    return arrived


def run(settings: Settings) -> Iterator[Row]:
    """Short queue and deep queue on the same broker, then a restart, then the drain."""
    deep_messages = DEEP_MESSAGES // 20 if settings.quick else DEEP_MESSAGES
    with settings.store() as data:
        with serving(settings.server, data) as server:
            short_drains = Rounds()
            for _ in range(SHORT_ROUNDS):
                fill(server, SHORT_MESSAGES)
                short_drains.results.append(drain(server, SHORT_MESSAGES))
            fill(server, SHORT_MESSAGES)
            short = settled_memory(server)
            settings.say(f"at {SHORT_MESSAGES:,}: {short.resident / MEGABYTE:.1f} MB resident")
            fill(server, deep_messages - SHORT_MESSAGES, SHORT_MESSAGES)
            deep = settled_memory(server)
            settings.say(f"at {deep_messages:,}: {deep.resident / MEGABYTE:.1f} MB resident")
        grown = (deep.resident - short.resident) / MEGABYTE
        yield Row(
            case="deep",
            name=f"memory at {deep_messages:,} above that at {SHORT_MESSAGES:,}",
            figure=grown,
            unit="MB",
            beside="of it anonymous",
            beside_figure=(deep.anonymous - short.anonymous) / MEGABYTE,
            target=f"<= {MEMORY_MAX_MB:g}",
            met=grown <= MEMORY_MAX_MB,
            details={"short": short, "deep": deep},
        )
        with serving(settings.server, data) as server:
            first_at = first_message(server) - server.started_at
            listening = server.listening_at - server.started_at
            settings.say(f"listening after {listening:.2f} s, first message after {first_at:.2f} s")
            drained = drain(server, deep_messages)
            peak = memory(server.pid).peak / MEGABYTE
        yield Row(
            case="deep",
            name="process start to first message delivered",
            figure=first_at,
            unit="s",
            beside="start to listening",
            beside_figure=listening,
            target=f"<= {START_MAX:g}",
            met=first_at <= START_MAX,
        )
        yield Row(
            case="deep",
            name=f"drain of {deep_messages:,}, auto ack",
            figure=drained["rate"],
            unit="msg/s",
            beside=f"drain of {SHORT_MESSAGES:,}",
            beside_figure=short_drains.median("rate"),
            target=f">= {DRAIN_SHARE:.0%} of a short queue",
            met=drained["rate"] >= DRAIN_SHARE * short_drains.median("rate"),
            cpu_us=drained["server_cpu"] / drained["messages"] * 1e6,
            details={"deep": drained, "short": short_drains.results, "peak_mb_while_draining": peak},
        )
