"""For those who know ActiveMQ: what is not there says so, or does nothing."""

from __future__ import annotations

import pytest

import pybroker
from pybroker.errors import InvalidSelector


@pytest.mark.parametrize(
    "selector",
    ["XPATH '//patient'", "XQUERY '//patient'", "REGEX('a.*', ward)", "JMSRedelivered", "JMSXDeliveryCount > 1"],
)
async def test_selectors_that_are_refused(selector: str) -> None:
    async with pybroker.open_broker() as broker, broker.connect() as client:
        with pytest.raises(InvalidSelector) as caught:
            async with client.subscribe("/queue/a", selector=selector):
                raise AssertionError(selector)
        assert caught.value.line == 1
        await client.send("/queue/a", b"")
        (queue,) = broker.statistics().destinations
        assert queue.consumers == 0


async def test_a_group_says_not_that_it_is_new_to_its_consumer() -> None:
    async with pybroker.open_broker() as broker, broker.connect() as client, client.subscribe("/queue/a") as messages:
        await client.send("/queue/a", b"", {"JMSXGroupID": "anna"})
        message = await messages.receive()
        assert message.header("JMSXGroupID") == "anna"
        assert message.header("JMSXGroupFirstForConsumer") is None


async def test_schedules_are_not_managed_by_messages() -> None:
    async with pybroker.open_broker() as broker, broker.connect() as client:
        await client.send("/queue/a", b"", {"AMQ_SCHEDULED_DELAY": "3600000"})
        await client.send("/topic/ActiveMQ.Scheduler.Management", b"", {"AMQ_SCHEDULER_ACTION": "REMOVEALL"})
        assert broker.statistics().scheduled == 1
