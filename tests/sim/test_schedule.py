"""The simulated world's own rules: a paused process stands still, a cut way keeps what is under way, a dark machine says nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio

from tests.sim.network import SimNetwork
from tests.sim.schedule import Process, run


def never(text: str) -> None:
    raise AssertionError(text)


def test_a_paused_process_goes_on_with_what_came_first() -> None:
    seen: list[tuple[float, str]] = []

    async def main() -> None:
        process, event = Process("p"), trio.Event()

        async def wait() -> None:
            with trio.move_on_after(5.0) as silence:
                await event.wait()
                seen.append((trio.current_time(), "event"))
            if silence.cancelled_caught:
                seen.append((trio.current_time(), "silence"))

        async with trio.open_nursery() as nursery:
            process.start_soon(nursery, wait)
            await trio.sleep(1.0)
            process.pause()
            await trio.sleep(1.0)
            event.set()
            await trio.sleep(8.0)
            assert seen == []
            process.resume()

    run("1", main, never)
    assert seen == [(10.0, "event")]


def test_tasks_that_run_on_and_on_are_ended_and_told_of() -> None:
    told: list[str] = []

    async def main() -> None:
        with trio.CancelScope() as scope:

            def runs_away(text: str) -> None:
                told.append(text)
                scope.cancel()

            found.append(runs_away)
            while True:
                await trio.lowlevel.checkpoint()

    found: list[Any] = []
    run("1", main, lambda text: found[0](text))
    assert len(told) == 1


async def connect(network: SimNetwork, nursery: trio.Nursery) -> tuple[Any, Any]:
    accepted: list[Any] = []
    ready = trio.Event()

    async def handle(stream: trio.abc.Stream) -> None:
        accepted.append(stream)
        ready.set()

    async def serve(task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        await network.serve("b", handle, task_status)

    process = Process("b")
    process.start_soon(nursery, serve)
    await trio.sleep(0.01)
    wire = await network.dial("a", "b")
    await ready.wait()
    return wire, accepted[0]


@pytest.mark.parametrize("reset", [False, True])
def test_what_is_cut_is_late_or_lost_with_the_connection(reset: bool) -> None:
    async def main() -> None:
        network = SimNetwork(random.Random(1), lambda what: None)
        async with trio.open_nursery() as nursery:
            mine, other = await connect(network, nursery)
            network.cut("a", "b")
            await mine.send_all(b"late")
            await other.send_all(b"the other way")
            assert await mine.receive_some() != b""
            await trio.sleep(5.0)
            if reset:
                network.reset("a", "b")
                with pytest.raises(trio.BrokenResourceError):
                    await other.receive_some()
            else:
                network.heal(("a", "b"))
                data = b""
                while len(data) < 4:
                    data += await other.receive_some()
                assert data == b"late"
            nursery.cancel_scope.cancel()

    run("1", main, never)


@pytest.mark.parametrize("silently", [False, True])
def test_a_killed_process_is_heard_of_unless_its_machine_is_gone(silently: bool) -> None:
    async def main() -> None:
        network = SimNetwork(random.Random(1), lambda what: None)
        async with trio.open_nursery() as nursery:
            mine, _ = await connect(network, nursery)
            network.remove("b", silently)
            with trio.move_on_after(10.0) as silence:
                assert await mine.receive_some() == b""
            assert silence.cancelled_caught is silently
            with trio.move_on_after(10.0) as silence, pytest.raises(ConnectionRefusedError):
                await network.dial("a", "b")
            nursery.cancel_scope.cancel()

    run("1", main, never)
