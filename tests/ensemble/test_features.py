"""Schedules and message keys through a real failover: the leader is killed while it sends what is due and stores keys."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ensemble.replicas import ReplicaProcess, ReplicaSet
from tests.ensemble.wire import Connection
from tests.support.zookeeper import Ensemble

pytestmark = pytest.mark.slow

QUEUE = ("destination", "/queue/q")
KEYS = 200


@pytest.fixture
def members(tmp_path: Path, zookeeper: Ensemble) -> Iterator[ReplicaSet]:
    found = ReplicaSet(tmp_path, zookeeper.addresses, tmp_path.name)
    try:
        yield found
    finally:
        found.close()


def scheduled(connection: Connection, body: str, **values: int) -> None:
    headers = [(f"AMQ_SCHEDULED_{name.upper()}", str(value)) for name, value in values.items()]
    connection.send("SEND", QUEUE, *headers, ("receipt", body), body=body.encode())
    connection.receipt(body)


def keyed(connection: Connection, number: int) -> None:
    connection.send(
        "SEND", QUEUE, ("message-key", f"referral {number}"), ("receipt", f"k{number}"), body=b"key %d" % number
    )
    connection.receipt(f"k{number}")


def drained(leader: ReplicaProcess, count: int, silence: float) -> Counter[str]:
    """What is there, acknowledged: at least so many, and then until nothing comes for some seconds."""
    connection = Connection(leader.address)
    connection.send("SUBSCRIBE", QUEUE, ("id", "1"), ("ack", "auto"))
    bodies: Counter[str] = Counter()
    until = time.monotonic() + 10.0
    while bodies.total() < count and time.monotonic() < until:
        bodies.update(frame.body.decode() for frame in connection.wait(0.5) if frame.command == "MESSAGE")
    while more := connection.wait(silence):
        bodies.update(frame.body.decode() for frame in more)
    connection.close()
    return bodies


def test_schedules_and_keys_through_kill_9(members: ReplicaSet) -> None:
    leader = members.start()
    epoch = leader.role[1]
    connection = Connection(leader.address)
    for number in range(50):
        scheduled(connection, f"delay {number}", delay=1_000 + 20 * number)
    scheduled(connection, "series", delay=500, period=300, repeat=6)
    scheduled(connection, "later", delay=5_000)
    began = time.monotonic()
    confirmed = 0
    for number in range(KEYS // 2):
        keyed(connection, number)
        confirmed += 1
    for number in range(KEYS // 2, KEYS):  # on their way when it dies
        connection.send("SEND", QUEUE, ("message-key", f"referral {number}"), body=b"key %d" % number)
    while time.monotonic() < began + 1.0:
        connection.wait(0.1)
    leader.kill()
    connection.close()
    new = members.wait_leader(epoch)
    connection = Connection(new.address)
    for number in range(KEYS):
        keyed(connection, number)
    assert new.status()["duplicates"] >= confirmed
    connection.close()
    expected = {f"delay {number}": 1 for number in range(50)} | {f"key {number}": 1 for number in range(KEYS)}
    assert drained(new, 258, 1.0) == expected | {"series": 7, "later": 1}
    assert new.status()["scheduled"] == 0
