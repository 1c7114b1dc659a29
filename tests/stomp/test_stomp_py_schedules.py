"""Scheduled messages by stomp.py, across kill -9; listed and cancelled by command."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.stomp.programs import Program, program
from tests.support.serving import ServedBroker, call_pybroker, served


def plan(one: Program, body: str, delay: float, **headers: str) -> None:
    receipt = one.new_receipt()
    headers |= {"AMQ_SCHEDULED_DELAY": str(int(delay * 1_000)), "receipt": receipt}
    one.connection.send("/queue/a", body, headers=headers)
    one.confirmed(receipt)


def schedule(broker: ServedBroker, *arguments: str, status: int = 0) -> str:
    assert broker.data_dir is not None
    done = call_pybroker("schedule", *arguments, "--data", broker.data_dir)
    assert done.returncode == status, done.stderr
    return (done.stderr if status else done.stdout).decode()


def test_scheduled_messages_survive_kill_9_and_can_be_cancelled(directory: Path):
    with served(directory / "data") as broker:
        with program(broker.port) as one:
            started = time.time()
            plan(one, "second", 0.6)
            plan(one, "first", 0.3)
            plan(one, "transient", 0.5, persistent="false")
            plan(one, "never", 3_600)
            plan(one, "in a year", 365 * 86_400, AMQ_SCHEDULED_PERIOD="1000", AMQ_SCHEDULED_REPEAT="-1")
            one.transaction("begin", "open")
            plan(one, "not committed", 0.1, transaction="open")
            assert "cancelled 4" in schedule(broker, "cancel", "4")
            broker.kill()
        broker.restart()
        with program(broker.port) as other:
            other.subscribe("/queue/a")
            messages = [other.receive() for _ in range(2)]
            assert [message.body for message in messages] == [b"first", b"second"]
            assert time.time() - started > 0.6
            assert [message.headers["scheduledJobId"] for message in messages] == ["2", "1"]
            with pytest.raises(AssertionError, match="no message came"):
                other.receive(timeout=0.2)
        (row,) = json.loads(schedule(broker, "list", "--json"))
        assert (row["schedule_id"], row["left"], row["period_ms"]) == ("5", -1, 1_000)
        assert "without end" in schedule(broker, "list")
        assert "no schedule '4'" in schedule(broker, "cancel", "4", "5", status=1)
        assert json.loads(schedule(broker, "list", "--json")) == []


def test_a_wrong_schedule_is_an_error(directory: Path):
    with served(directory / "data") as broker, program(broker.port) as one:
        one.connection.send("/queue/a", "x", headers={"AMQ_SCHEDULED_CRON": "61 * * * *"})
        assert "cron expression" in one.error().body.decode()
