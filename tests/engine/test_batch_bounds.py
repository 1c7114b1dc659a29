"""However many producers wait for it, a batch has a largest size: a replica set must be able to send each one in a frame."""

from __future__ import annotations

import pytest
import trio

from pybroker.errors import LimitExceeded
from pybroker.journal import Journal
from tests.engine.support import Disk, broker_on

MEBIBYTE = 1024 * 1024
LIMITS = {"batch_bytes_max": 2 * MEBIBYTE}
BODY = bytes(MEBIBYTE)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each batch that was closed."""
    sizes: list[int] = []
    commit = Journal._commit

    async def measured(self: Journal) -> None:
        sizes.append(self.open_bytes)
        await commit(self)

    monkeypatch.setattr(Journal, "_commit", measured)
    return sizes


async def test_many_waiting_clients_do_not_fill_one_batch_together(
    batches: list[int], autojump_clock: trio.abc.Clock
) -> None:
    disk = Disk()
    async with broker_on(disk, limits=LIMITS) as broker, trio.open_nursery() as nursery:
        disk.shut()

        async def send() -> None:
            async with broker.connect() as client:
                await client.send("/queue/q", BODY)

        async def send_many() -> None:
            async with broker.connect() as client, client.publisher() as publisher:
                await publisher.send_many([("/queue/q", BODY)] * 8)

        async def commit() -> None:
            async with broker.connect() as client, client.transaction() as transaction:
                for _ in range(2):
                    await transaction.send("/queue/q", BODY)

        for _ in range(12):
            for task in (send, send_many, commit):
                nursery.start_soon(task)
        await trio.sleep(1)
        disk.gate.set()
    assert sum(batches) > 12 * 11 * MEBIBYTE
    assert max(batches) < 2 * MEBIBYTE + 2.1 * MEBIBYTE + MEBIBYTE


async def test_a_body_in_process_has_the_limit_of_one_over_the_wire(autojump_clock: trio.abc.Clock) -> None:
    async with broker_on(Disk(), stomp={"body_bytes_max": 1000}) as broker, broker.connect() as client:
        await client.send("/queue/q", bytes(1000))
        with pytest.raises(LimitExceeded, match=r"1001 bytes: limit stomp\.body_bytes_max is 1000"):
            await client.send("/queue/q", bytes(1001))
