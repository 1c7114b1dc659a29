"""For a reader who knows ActiveMQ: consumers of ``PRICE.>`` and of ``FOO,BAR``, on queues.

There, ``session.createConsumer(session.createQueue("LAB.*.RESULTS"))`` and ``createQueue("WARD.A,WARD.B")``.
"""

from __future__ import annotations

from tests.engine.support import Disk, broker_on


async def test_one_consumer_for_the_results_of_all_wards() -> None:
    disk = Disk()
    async with broker_on(disk) as broker, broker.connect() as client:
        await client.send("/queue/LAB.WARD-1.RESULTS", b"sodium")
        await client.send("/queue/LAB.WARD-1.ORDERS", b"not for it")
    async with (
        broker_on(disk) as broker,
        broker.connect() as client,
        client.subscribe("/queue/LAB.*.RESULTS") as results,
        client.subscribe("/queue/PORTER.NORTH,PORTER.SOUTH") as porters,
    ):
        first = await results.receive()
        await client.send("/queue/LAB.WARD-2.RESULTS", b"potassium")  # a queue that was not there before
        second = await results.receive()
        assert [(each.destination, each.body) for each in (first, second)] == [
            ("/queue/LAB.WARD-1.RESULTS", b"sodium"),
            ("/queue/LAB.WARD-2.RESULTS", b"potassium"),
        ]
        await results.ack([first, second])
        await client.send("/queue/PORTER.SOUTH", b"bed 4")
        assert (await porters.receive()).body == b"bed 4"
