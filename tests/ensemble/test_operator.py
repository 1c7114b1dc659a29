"""What an operator does with a real set, by the command line: hand over, replace a host, start what ZooKeeper has forgotten.

The replicas speak TLS with certificates to each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from kazoo.client import KazooClient

from tests.ensemble.replicas import ReplicaProcess, ReplicaSet
from tests.ensemble.wire import Connection
from tests.support.serving import run_pybroker
from tests.support.zookeeper import Ensemble

pytestmark = pytest.mark.slow

QUEUE = ("destination", "/queue/q")
AUTH = ("digest", "pybroker:of a test")


@pytest.fixture
def members(tmp_path: Path, zookeeper: Ensemble) -> Iterator[ReplicaSet]:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "own.pem"))
    files = 'certificate = "own.pem"\nkey = "own.pem"\npeer_ca = "ca.pem"'
    found = ReplicaSet(tmp_path, zookeeper.addresses, tmp_path.name, more=files)
    try:
        yield found
    finally:
        found.close()


def send(leader: ReplicaProcess, numbers: range) -> None:
    connection = Connection(leader.address)
    for number in numbers:
        connection.send("SEND", QUEUE, ("receipt", str(number)), body=b"%d" % number)
        connection.receipt(str(number))
    connection.close()


def received(leader: ReplicaProcess, count: int) -> list[int]:
    connection = Connection(leader.address)
    connection.send("SUBSCRIBE", QUEUE, ("id", "1"), ("ack", "client-individual"))
    bodies: list[int] = []
    while len(bodies) < count:
        bodies += [int(frame.body) for frame in connection.wait(5.0) if frame.command == "MESSAGE"]
    connection.close()
    return sorted(bodies)


def replica(member: ReplicaProcess, *arguments: str) -> str:
    """A command, which succeeds; what it printed."""
    done = run_pybroker("replica", *arguments, "--data", member.data_dir)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_hand_over_and_replace(members: ReplicaSet) -> None:
    first = members.start()
    send(first, range(10))
    epoch = first.role[1]
    replica(first, "handover")
    leader = members.wait_leader(epoch)
    assert leader is not first
    members.wait_whole()
    lost = members.followers()[-1]
    lost.kill()
    refused = members.replace(lost, "d")  # nobody has made room for it yet
    refused.start()
    check_refused(refused)
    assert "pybroker replica replace OLD d" in refused.told()
    replica(leader, "replace", lost.name, "d")
    refused.start()
    assert members.wait_whole() is leader
    rows: list[dict[str, Any]] = json.loads(replica(refused, "status", "--json"))["members"]
    assert {row["name"]: row["counted"] for row in rows} == {member.name: True for member in members.members}
    send(leader, range(10, 20))
    lost.start()
    check_refused(lost)
    members.wait_equal()
    epoch = leader.role[1]
    leader.kill()
    assert received(members.wait_leader(epoch), 20) == list(range(20))


def check_refused(member: ReplicaProcess) -> None:
    """It ends by itself, and says why."""
    assert member._process is not None
    assert member._process.wait(20) == 1
    assert "has no place in the set" in member.told()


def test_a_set_that_zookeeper_has_forgotten_starts_by_force_with_what_is_there(
    members: ReplicaSet, zookeeper: Ensemble, tmp_path: Path
) -> None:
    leader = members.start()
    send(leader, range(10))
    epoch = leader.roles[-1][1]
    for member in members.members:
        member.kill()
    client = KazooClient(zookeeper.addresses, auth_data=[AUTH])
    client.start()
    client.delete(f"/pybroker/{tmp_path.name}", recursive=True)
    client.stop()
    first, second, third = members.members
    first.start()
    second.start()

    def blocked() -> bool:
        found = [(member.status("replica-status") or {}).get("blocked", "") for member in (first, second)]
        return all("pybroker replica force-start" in text for text in found)

    members.wait("both are blocked, and say what to do", blocked)
    tried = [run_pybroker("replica", "force-start", "--yes", "--data", member.data_dir) for member in (first, second)]
    assert sorted(done.returncode for done in tried) == [0, 1]  # the other one says who has more, or who leads by now
    (refused,) = (done for done in tried if done.returncode)
    assert b"force it there" in refused.stderr or b"has a leader" in refused.stderr
    new = members.wait_leader()
    assert new.roles[-1][1] > epoch + 2**31
    assert received(new, 10) == list(range(10))
    third.start()
    members.wait_whole()
