"""The control socket: ``DATA/control.sock``, for commands on this machine. Owns its protocol: one JSON line each way.

Only the owner of the data directory may use it (mode 0600).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from pybroker.errors import BrokerError

log = logging.getLogger("pybroker.control")

SOCKET = "control.sock"
REQUEST_BYTES_MAX = 65_536
REQUEST_TIMEOUT = 10.0  # seconds for a request to come and its answer to go
PATH_BYTES_MAX = 107  # of a socket's address, a limit of the system


class ControlServer:
    """Answers ``{"command": "status"}`` with the broker's statistics."""

    def __init__(self, directory: Path, statistics: Callable[[], Any]) -> None:
        self._path = Path(directory) / SOCKET
        self._statistics = statistics

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. The data directory is this broker's (the store is locked), and so is a socket in it."""
        if len(os.fsencode(self._path)) > PATH_BYTES_MAX:
            log.warning("no control socket: its path %s is longer than %d bytes", self._path, PATH_BYTES_MAX)
            task_status.started()
            return
        self._path.unlink(missing_ok=True)
        with trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM) as sock:
            mask = os.umask(0o177)
            try:
                await sock.bind(str(self._path))
            finally:
                os.umask(mask)
            sock.listen(16)
            task_status.started()
            try:
                async with trio.open_nursery() as nursery:
                    await trio.serve_listeners(self._serve, [trio.SocketListener(sock)], handler_nursery=nursery)
            finally:
                self._path.unlink(missing_ok=True)

    async def _serve(self, stream: trio.SocketStream) -> None:
        with trio.move_on_after(REQUEST_TIMEOUT), contextlib.suppress(trio.BrokenResourceError):
            data = b""
            while b"\n" not in data and len(data) < REQUEST_BYTES_MAX:
                more = await stream.receive_some(4096)
                if not more:
                    break
                data += more
            await stream.send_all(json.dumps(self._answer(data)).encode() + b"\n")
        await trio.aclose_forcefully(stream)

    def _answer(self, data: bytes) -> dict[str, Any]:
        try:
            request = json.loads(data)
            if request["command"] == "status":
                return {"status": dataclasses.asdict(self._statistics())}
            return {"error": f"command {request['command']!r} is not known"}
        except BrokerError as error:
            return {"error": str(error)}
        except (ValueError, KeyError, TypeError):
            return {"error": "a request is one line of JSON with a command"}


def ask(directory: Path, command: str) -> Any:
    """Ask the broker that runs on a data directory. Blocking. Raises BrokerError when there is none, or it refuses."""
    path = Path(directory) / SOCKET
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(REQUEST_TIMEOUT)
            sock.connect(str(path))
            sock.sendall(json.dumps({"command": command}).encode() + b"\n")
            with sock.makefile("rb") as file:
                answer = json.loads(file.readline() or b'{"error": "the broker closed the connection"}')
    except OSError as error:
        raise BrokerError(
            f"no broker answers at {path}: {error.strerror or error}; is one running with this data_dir?"
        ) from error
    if "error" in answer:
        raise BrokerError(answer["error"])
    return answer[command]
