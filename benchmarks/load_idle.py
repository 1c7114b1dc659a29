"""Idle connections: opens them, says so in one line, holds them until its stdin ends.

Run as ``python -m benchmarks.load_idle --url URL --connections N [--subscribe]``.
"""

from __future__ import annotations

import argparse
import socket
import sys

from benchmarks.processes import raise_file_limit
from benchmarks.wire import Connection, LoadError, Scanner, connect_frame, subscribe_frame

TOGETHER = 50  # connections whose hand-shakes are under way at once
FILES_SPARE = 100


def hold(url: str, connections: int, subscribe: bool) -> list[socket.socket]:
    """Open so many connections and finish their hand-shakes; with `subscribe` each to a queue of its own."""
    address = Connection(url).socket.getpeername()
    held: list[socket.socket] = []
    while len(held) < connections:
        group = []
        for number in range(len(held), min(connections, len(held) + TOGETHER)):
            sock = socket.create_connection(address, timeout=30)
            frames = connect_frame()
            if subscribe:
                frames += subscribe_frame(f"/queue/idle.{number}", "client-individual", "subscribed")
            sock.sendall(frames)
            group.append(sock)
        for sock in group:
            scanner = Scanner()
            while scanner.frame_count < 1 + subscribe:
                data = sock.recv(4096)
                frames_read = scanner.feed(data)
                if not data or any(b"ERROR" in frame for frame in frames_read):
                    raise LoadError(f"connection {len(held)} was refused: {frames_read!r}")
        held.extend(group)
    return held


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load_idle")
    parser.add_argument("--url", required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--subscribe", action="store_true")
    options = parser.parse_args()
    if raise_file_limit(options.connections + FILES_SPARE) < options.connections + FILES_SPARE:
        raise LoadError(f"RLIMIT_NOFILE does not allow {options.connections} connections")
    held = hold(options.url, options.connections, options.subscribe)
    print(f"holding {len(held)}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
