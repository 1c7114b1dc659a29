"""The demonstration with one broker: it is killed while it works, and started again on the same store."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

from demo_programs import DemoFailed, Program
from demo_stage import Stage

START_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 20.0


def start_broker(directory: Path, port: int) -> tuple[Program, int]:
    """Start ``pybroker serve``; return it with the port that it listens on."""
    command = ("-m", "pybroker", "serve", "--name", "demo", "--data", str(directory / "data"))
    broker = Program("broker", *command, "--listen", f"stomp://127.0.0.1:{port}", log=directory / "broker.log")
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline and broker.process.poll() is None:
        for _, line in broker.new_lines():
            if line.startswith("listening "):
                return broker, int(line.rpartition(":")[2])
        time.sleep(0.01)
    broker.kill()
    raise DemoFailed(f"the broker did not start{broker.told()}")


def run_single(stage: Stage, directory: Path) -> None:
    """Kill the broker when two fifths of the messages are confirmed. Raises DemoFailed when the run can't go on."""
    with ExitStack() as stack:
        broker, port = start_broker(directory, 0)
        stack.callback(lambda: broker.kill())  # whichever of the two is running then
        stage.watchers.append(lambda: broker.check_running())
        stage.say(f"broker on port {port}, store in {directory / 'data'}")
        stage.start_clients(stack, [port])
        stage.follow(until=lambda: stage.account.confirmed_now >= stage.count * 2 // 5)
        broker.kill()
        stage.say(f"broker killed with SIGKILL after {stage.account.confirmed_now} confirmations")
        killed = time.monotonic()
        broker, again = start_broker(directory, port)
        if again != port:
            raise DemoFailed(f"the broker came back on port {again}, not {port}")
        stage.say(f"broker started again on the same store, {time.monotonic() - killed:.2f} s after its death")
        stage.follow(until=lambda: stage.gaps or stage.account.producer_done)
        for gap in stage.gaps:
            stage.say(
                f"producer: no send was confirmed for {gap.milliseconds:.0f} ms, {gap.sent_again} were sent again"
            )
        stage.receive_rest(stack)
        broker.terminate()
        broker.wait(STOP_SECONDS_MAX)
