"""The control socket: ``DATA/control.sock``, for commands on this machine. Owns its protocol: one JSON line each way.

A request is ``{"command": NAME, ...its arguments}``, the answer ``{"result": ...}`` or ``{"error": TEXT, "code": WORD}``. What
the commands do belongs to their handlers. Only the owner of the data directory may use the socket (mode 0600).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from pybroker.errors import BrokerError

log = logging.getLogger("pybroker.control")

Handler = Callable[[Mapping[str, Any]], Awaitable[Any]]  # the request in, what JSON can say out

SOCKET = "control.sock"
REQUEST_BYTES_MAX = 65_536
REQUEST_TIMEOUT = 10.0  # seconds for a request to come, and for a command's answer to be there
SLOW_COMMANDS: Mapping[str, float] = {  # those that wait for other replicas
    "replica-handover": 30.0,
    "replica-replace": 30.0,
    "replica-force-start": 30.0,
}
ANSWER_TIMEOUT = 2.0  # seconds for an answer to go, beside the time for the command
PATH_BYTES_MAX = 107  # of a socket's address, a limit of the system
UNKNOWN_COMMAND = "unknown-command"  # codes of answers, beside those of `pybroker.errors`
NOT_DONE = "not-done"
INTERNAL = "internal"
BAD_REQUEST = "request"


class ControlServer:
    """Answers requests by `handlers`: command name to a function of the whole request. A BrokerError is told to the asker."""

    def __init__(self, directory: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = Path(directory) / SOCKET
        self._handlers = handlers

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
        with contextlib.suppress(trio.BrokenResourceError):
            data = b""
            with trio.move_on_after(REQUEST_TIMEOUT) as scope:
                while b"\n" not in data and len(data) < REQUEST_BYTES_MAX:
                    more = await stream.receive_some(4096)
                    if not more:
                        break
                    data += more
            if not scope.cancelled_caught:
                answer = await self._answer(data)
                with trio.move_on_after(ANSWER_TIMEOUT):
                    await stream.send_all(answer)
        await trio.aclose_forcefully(stream)

    async def _answer(self, data: bytes) -> bytes:
        """The line for a request; whatever a handler does, there is one."""
        try:
            request = json.loads(data)
            command = request["command"]
            handler = self._handlers.get(command)
        except (ValueError, KeyError, TypeError, RecursionError):
            return _refusal("a request is one line of JSON with a command", BAD_REQUEST)
        if handler is None:
            return _refusal(f"command {command!r} is not known", UNKNOWN_COMMAND)
        seconds = seconds_for(command)
        try:
            with trio.move_on_after(seconds):
                return _line({"result": await handler(request)})
            return _refusal(f"{command} was not done within {seconds:g} s; it may still happen", NOT_DONE)
        except BrokerError as error:
            return _refusal(str(error), error.code)
        except Exception:
            log.exception("the command %s failed", command)
            return _refusal(f"{command} failed; the broker's log says why", INTERNAL)


def _line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer).encode() + b"\n"


def _refusal(text: str, code: str) -> bytes:
    return _line({"error": text, "code": code})


def seconds_for(command: str) -> float:
    """How long a command may take."""
    return SLOW_COMMANDS.get(command, REQUEST_TIMEOUT)


def ask(directory: Path, command: str, **arguments: Any) -> Any:
    """Ask the broker that runs on a data directory. Blocking. Raises BrokerError when there is none, or it refuses.

    The error's `code` is the one of the answer.
    """
    path = Path(directory) / SOCKET
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(seconds_for(command) + ANSWER_TIMEOUT)
            sock.connect(str(path))
            sock.sendall(json.dumps({"command": command, **arguments}).encode() + b"\n")
            with sock.makefile("rb") as file:
                line = file.readline()
    except OSError as error:
        raise BrokerError(
            f"no broker answers at {path}: {error.strerror or error}; is one running with this data_dir?"
        ) from error
    if not line:
        raise BrokerError(f"the broker closed the connection to {path}: it may be stopping")
    try:
        answer = json.loads(line)
        if "error" not in answer:
            return answer["result"]
        refused = BrokerError(answer["error"])
        refused.code = answer["code"]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokerError(f"what answers at {path} is not understood: is it a broker of another version?") from error
    raise refused
