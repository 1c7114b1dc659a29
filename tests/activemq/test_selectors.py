"""A scenario for those who know ActiveMQ: selectors on a topic of results, with a durable subscriber that was away.

A laboratory publishes results on ``/topic/results``. Ward 3 takes its own urgent ones while it is there. The registry has a
durable subscription for reports, as ``createDurableSubscriber(topic, name, selector, false)`` makes it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import pybroker

TOPIC = "/topic/results"
REPORTS = "JMSType = 'report' AND (ward BETWEEN 1 AND 5 OR ward IS NULL)"


async def publish(client: pybroker.Client, body: bytes, **headers: str) -> None:
    priority = int(headers.pop("priority", "4"))
    await client.send(TOPIC, body, headers, priority=priority)


async def test_selectors(tmp_path: Path) -> None:
    async with pybroker.open_broker(data_dir=tmp_path) as broker:
        async with broker.connect("registry") as one, one.subscribe(TOPIC, durable_name="reports", selector=REPORTS):
            pass  # it is there from now on, also while its client is away

        async with (
            broker.connect() as laboratory,
            broker.connect() as ward,
            ward.subscribe(
                TOPIC, selector="ward = 3 AND JMSPriority >= 7 AND \"content-type\" LIKE 'text/%'"
            ) as urgent,
        ):
            plain = {"content-type": "text/plain"}
            await publish(laboratory, b"report for 3", type="report", ward="3", priority="9", **plain)
            await publish(laboratory, b"ecg for 3", type="ecg", ward="3", priority="9", **{"content-type": "image/png"})
            await publish(laboratory, b"report for 3, in no hurry", type="report", ward="3", **plain)
            await publish(laboratory, b"report for 9", type="report", ward="9", priority="9", **plain)
            await publish(laboratory, b"report for all", type="report", **plain)
            await publish(laboratory, b"report for nobody knows", type="report", ward="the third one", **plain)
            await publish(laboratory, b"last for 3", type="ecg", ward="3", priority="7", **plain)
            assert [(await urgent.receive()).body for _ in range(2)] == [b"report for 3", b"last for 3"]

        # In ActiveMQ another selector deletes the subscription with all that it has collected.
        async with broker.connect("registry") as registry:
            with pytest.raises(pybroker.SubscriptionError, match="unsubscribe it first"):
                async with registry.subscribe(TOPIC, durable_name="reports", selector="JMSType = 'report'"):
                    pass
            with pytest.raises(pybroker.InvalidSelector) as refused:
                async with registry.subscribe(TOPIC, durable_name="other", selector="JMSType = report'"):
                    pass
            assert (refused.value.line, refused.value.column) == (1, 17)

    async with (
        pybroker.open_broker(data_dir=tmp_path) as broker,
        broker.connect("registry") as registry,
        registry.subscribe(TOPIC, durable_name="reports", selector=REPORTS) as reports,
    ):
        collected = [(await reports.receive()).body for _ in range(3)]
        # higher priority first; "the third one" is no number, so BETWEEN is unknown, which is not true
        assert collected == [b"report for 3", b"report for 3, in no hurry", b"report for all"]
