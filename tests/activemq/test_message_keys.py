"""For a reader who knows ActiveMQ: a feeder that crashed sends the day's reports again, and nobody gets one twice.

There a STOMP client has no such thing (``JMSXDeliveryCount`` counts deliveries; duplicate detection knows only failover clients).
"""

from __future__ import annotations

from tests.engine.support import Disk, broker_on


async def test_reports_that_are_sent_again_are_stored_once() -> None:
    disk = Disk()
    for _ in range(2):
        async with broker_on(disk) as broker, broker.connect() as client:
            for number in range(3):
                await client.send("/queue/reports", b"%d" % number, {"message-key": f"2026-11-24/{number}"})
    async with broker_on(disk) as broker, broker.connect() as client, client.subscribe("/queue/reports") as messages:
        assert [(await messages.receive()).body for _ in range(3)] == [b"0", b"1", b"2"]
        (statistics,) = [each for each in broker.statistics().destinations if each.name == "reports"]
        assert statistics.depth == 3
