"""``pybroker dlq`` and `Broker.dead_letters`: filters, pages, the way back, on a running broker."""

from __future__ import annotations

import json
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from pybroker import Broker, open_broker
from pybroker.errors import BrokerError, InvalidDestination, InvalidSelector
from tests.support.serving import call_pybroker

POLICY = [
    {"match": "/queue/>", "deliveries_max": 1},
    {"match": "/queue/own.>", "dead_letter_queue": "/queue/DLQ.{name}"},
]
FAILED = [("/queue/a", "1", "3"), ("/queue/own.b", "2", "3"), ("/queue/a", "3", "4"), ("/queue/own.c", "4", "4")]


@asynccontextmanager
async def broker_with_letters(**limits: Any) -> AsyncIterator[tuple[Broker, Path]]:
    with tempfile.TemporaryDirectory(prefix="pb-") as name:
        data = Path(name) / "data"
        async with open_broker(data_dir=data, policy=POLICY, limits=limits) as broker:
            async with broker.connect() as client:
                for to, body, ward in FAILED:
                    await client.send(to, body.encode(), {"ward": ward})
                    async with client.subscribe(to) as messages:
                        await (await messages.receive()).nack()
            yield broker, data


async def listed(broker: Broker, **wanted: Any) -> list[str]:
    return [letter.origin + " " + dict(letter.headers)["ward"] async for letter in broker.dead_letters.list(**wanted)]


async def run(data: Path, *arguments: str, status: int = 0) -> str:
    done = await trio.to_thread.run_sync(lambda: call_pybroker("dlq", *arguments, "--data", data))
    assert done.returncode == status, done.stderr.decode()
    return (done.stderr if status else done.stdout).decode()


ALL = ["/queue/a 3", "/queue/a 4", "/queue/own.b 3", "/queue/own.c 4"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ({}, ALL),
        ({"origin": "/queue/a"}, ALL[:2]),
        ({"origin": "/queue/own.>"}, ALL[2:]),
        ({"origin": "/topic/>"}, []),
        ({"queue": "/queue/DLQ.own.c"}, ALL[3:]),
        ({"queue": "/queue/none"}, []),
        ({"reason": "deliveries"}, ALL),
        ({"reason": "expired"}, []),
        ({"headers": (("ward", "4"),)}, [ALL[1], ALL[3]]),
        ({"headers": (("ward", "4"), ("x", "y"))}, []),
        ({"older_than": 3_600.0}, []),
        ({"newer_than": 3_600.0}, ALL),
        ({"selector": "ward > 3"}, [ALL[1], ALL[3]]),
        ({"message_id": "none"}, []),
        ({"limit": 3}, ALL[:3]),
    ],
)
async def test_filters(wanted: dict[str, Any], found: list[str]) -> None:
    async with broker_with_letters(browse_messages_max=1) as (broker, _):
        assert sorted(await listed(broker, **wanted)) == found


async def test_retry_sends_back_what_is_meant_once_and_drop_deletes_it() -> None:
    async with broker_with_letters(browse_messages_max=1) as (broker, _):
        done = await broker.dead_letters.retry(selector="ward = '3'")
        assert (done.count, done.stayed, done.outstanding, done.unread) == (2, 0, 0, 0)
        assert sorted(await listed(broker)) == [ALL[1], ALL[3]]
        assert (await broker.dead_letters.drop(limit=1)).count == 1
        assert len(await listed(broker)) == 1
        depths = {row.name: row.depth for row in broker.statistics().destinations}
        assert (depths["a"], depths["own.b"]) == (1, 1)


async def test_what_fails_again_at_once_is_sent_back_once_only() -> None:
    async with (
        broker_with_letters(browse_messages_max=1) as (broker, _),
        broker.connect() as client,
        trio.open_nursery() as nursery,
        client.subscribe("/queue/a") as messages,
    ):

        async def reject() -> None:
            while True:
                await (await messages.receive()).nack()

        nursery.start_soon(reject)
        assert (await broker.dead_letters.retry(origin="/queue/a")).count == 2
        nursery.cancel_scope.cancel()


async def test_wrong_filters_are_told() -> None:
    async with broker_with_letters() as (broker, data):
        for wanted, error in (({"origin": "a"}, InvalidDestination), ({"selector": "="}, InvalidSelector)):
            with pytest.raises(error):
                await broker.dead_letters.retry(**wanted)
        with pytest.raises(InvalidDestination, match="name one, as /queue/NAME"):
            await broker.dead_letters.drop(queue="/queue/a.*")
        assert "must start with /queue/" in await run(data, "list", "--origin", "a", status=1)
        assert "--all" in await run(data, "drop", status=2)
        assert "NAME=VALUE" in await run(data, "list", "--header", "x", status=2)


async def test_the_commands() -> None:
    async with broker_with_letters(browse_messages_max=1) as (_, data):
        rows = [json.loads(line) for line in (await run(data, "list", "--json")).splitlines()]
        assert sorted(row["origin"] for row in rows) == ["/queue/a", "/queue/a", "/queue/own.b", "/queue/own.c"]
        assert {(row["reason"], row["deliveries"], row["size"]) for row in rows} == {("deliveries", 1, 1)}
        table = await run(data, "list", "--header", "ward=3", "--newer-than", "3600")
        assert [name in table for name in ("/queue/a", "own.b", "own.c")] == [True, True, False]
        assert await run(data, "retry", "--id", rows[0]["message_id"]) == "1 dead letters sent back\n"
        assert await run(data, "retry", "--selector", "ward = '4'", "--limit", "1") == "1 dead letters sent back\n"
        assert await run(data, "drop", "--all") == "2 dead letters dropped\n"
        assert await run(data, "list", "--json") == ""


async def test_a_request_that_is_not_understood_is_refused() -> None:
    from pybroker.control import ask

    async with broker_with_letters() as (_, data):
        for request in (
            {"action": "burn"},
            {"action": "drop", "limit": -1},
            {"action": "drop", "filter": {"x": 1}},
            {"action": "drop", "filter": []},
            {"action": "drop", "filter": {"headers": "x"}},
            {"action": "drop", "place": [1, 2]},
            {"action": "drop", "place": [1, 2, "3"]},
        ):
            with pytest.raises(BrokerError):
                await trio.to_thread.run_sync(lambda what: ask(data, "dead-letters", **what), request)
