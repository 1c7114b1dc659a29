"""`pybroker.control`: each request has an answer, whatever comes in and whatever a handler does."""

from __future__ import annotations

import json
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pybroker import control
from pybroker.control import SOCKET, ControlServer, ask
from pybroker.errors import BrokerError, NotLeader
from tests.cli.fake_control import answering


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: the address of a control socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pb-") as name:
        yield Path(name)


async def echo(request: Mapping[str, Any]) -> Any:
    await trio.lowlevel.checkpoint()
    return dict(request)


async def refuse(_: Mapping[str, Any]) -> Any:
    raise NotLeader("replica a leads", "a")


async def fail(_: Mapping[str, Any]) -> Any:
    raise RuntimeError("a bug")


async def no_json(_: Mapping[str, Any]) -> Any:
    return object()


HANDLERS = {"echo": echo, "refuse": refuse, "fail": fail, "object": no_json}


@asynccontextmanager
async def connected(directory: Path, handlers: Mapping[str, control.Handler]) -> AsyncIterator[trio.SocketStream]:
    async with trio.open_nursery() as nursery:
        await nursery.start(ControlServer(directory, handlers).run)
        yield await trio.open_unix_socket(str(directory / SOCKET))
        nursery.cancel_scope.cancel()


async def answer_of(stream: trio.SocketStream) -> dict[str, Any]:
    data = b"".join([part async for part in stream])
    assert data.count(b"\n") == 1
    answer = json.loads(data)
    assert isinstance(answer, dict)
    return answer


# ---- the asking side


def test_arguments_and_result(directory: Path):
    with answering(directory, HANDLERS):
        assert ask(directory, "echo") == {"command": "echo"}
        assert ask(directory, "echo", old="ä", new=[1]) == {"command": "echo", "old": "ä", "new": [1]}
        assert oct((directory / SOCKET).stat().st_mode & 0o777) == "0o600"
    assert not (directory / SOCKET).exists()


@pytest.mark.parametrize(
    ("command", "text", "code"),
    [
        ("refuse", "replica a leads", "not-leader"),
        ("fail", "fail failed; the broker's log says why", "internal"),
        ("object", "object failed; the broker's log says why", "internal"),
        ("other", "command 'other' is not known", "unknown-command"),
    ],
)
def test_what_is_refused_is_raised_with_its_code(directory: Path, command: str, text: str, code: str):
    with answering(directory, HANDLERS):
        with pytest.raises(BrokerError) as caught:
            ask(directory, command)
        assert (str(caught.value), caught.value.code) == (text, code)
        assert BrokerError.code == "broker-error"
        assert ask(directory, "echo") == {"command": "echo"}  # it goes on


def test_nobody_answers(directory: Path):
    with pytest.raises(BrokerError, match=r"no broker answers at .*is one running"):
        ask(directory, "echo")
    with pytest.raises(BrokerError, match="no broker answers at"):
        ask(directory / ("x" * 120), "echo")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"", "the broker closed the connection"),
        (b"nonsense\n", "not understood"),
        (b"[1]\n", "not understood"),
        (b'{"status": {}}\n', "not understood"),
        (b'{"error": "x"}\n', "not understood"),
    ],
)
def test_an_answer_that_is_none(directory: Path, line: bytes, words: str):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / SOCKET))
        listening.listen(1)

        def answer() -> None:
            connection, _ = listening.accept()
            connection.recv(1024)
            connection.sendall(line)
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(BrokerError, match=words):
            ask(directory, "echo")
        thread.join(5)


# ---- the answering side


@pytest.mark.parametrize(
    "request_",
    [
        b"\n",
        b"nonsense\n",
        b"\xff\xfe\n",
        b"[]\n",
        b"5\n",
        b"{}\n",
        b'{"command": ["echo"]}\n',
        b'{"command": {}}\n',
        b"[" * 60_000 + b"\n",
        b"x" * control.REQUEST_BYTES_MAX,
    ],
)
async def test_what_is_no_request(directory: Path, request_: bytes):
    async with connected(directory, HANDLERS) as stream:
        await stream.send_all(request_)
        assert await answer_of(stream) == {"error": "a request is one line of JSON with a command", "code": "request"}


@pytest.mark.parametrize(
    ("command", "seconds"), [("echo", 10.0), ("replica-handover", 30.0), ("replica-replace", 30.0)]
)
async def test_a_command_that_takes_too_long(
    directory: Path, command: str, seconds: float, autojump_clock: trio.testing.MockClock
):
    async def hang(_: Mapping[str, Any]) -> Any:
        await trio.sleep_forever()

    async with connected(directory, {command: hang}) as stream:
        await stream.send_all(json.dumps({"command": command}).encode() + b"\n")
        answer = await answer_of(stream)
        assert answer == {
            "error": f"{command} was not done within {seconds:g} s; it may still happen",
            "code": "not-done",
        }
        assert trio.current_time() == pytest.approx(seconds)
        assert control.seconds_for(command) == seconds  # the asker waits longer than that


async def test_one_who_says_nothing_is_cut_off(directory: Path, autojump_clock: trio.testing.MockClock):
    async with connected(directory, HANDLERS) as stream:
        await stream.send_all(b'{"command": "ec')
        assert await stream.receive_some(10) == b""
        assert trio.current_time() == pytest.approx(control.REQUEST_TIMEOUT)


async def test_one_who_leaves_does_no_harm(directory: Path):
    async with connected(directory, HANDLERS) as stream:
        await stream.send_all(b'{"command": "echo"}\n')
        await stream.aclose()
        other = await trio.open_unix_socket(str(directory / SOCKET))
        await other.send_all(b'{"command": "echo"}\n')
        assert await answer_of(other) == {"result": {"command": "echo"}}


async def test_a_slow_command_holds_up_nobody(directory: Path):
    going_on, entered = trio.Event(), trio.Event()

    async def wait(_: Mapping[str, Any]) -> Any:
        entered.set()
        await going_on.wait()
        return "done"

    async with connected(directory, {"echo": echo, "wait": wait}) as slow:
        await slow.send_all(b'{"command": "wait"}\n')
        await entered.wait()
        other = await trio.open_unix_socket(str(directory / SOCKET))
        await other.send_all(b'{"command": "echo"}\n')
        assert await answer_of(other) == {"result": {"command": "echo"}}
        going_on.set()
        assert await answer_of(slow) == {"result": "done"}


async def test_a_path_that_is_too_long_for_a_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    async with trio.open_nursery() as nursery:
        await nursery.start(ControlServer(long, HANDLERS).run)
    assert "no control socket" in caplog.text
