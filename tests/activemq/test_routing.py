"""For a reader who knows ActiveMQ: composite destinations, virtual topics and mirrored queues, by the names you know.

There, in ``<destinationInterceptors>``: ``<compositeQueue name="ORDERS"><forwardTo><filteredDestination selector="urgent = 'yes'"
queue="ON.CALL"/><topic physicalName="VirtualTopic.ORDERS"/></forwardTo></compositeQueue>``, ``<virtualTopic name="VirtualTopic.>"
prefix="Consumer.*."/>``, and ``useMirroredQueues="true"``. Clients name several destinations as ``/queue/A,/queue/B``.
"""

from __future__ import annotations

from pybroker.client import Client
from tests.engine.support import Disk, broker_on

COMPOSITE = (
    {"name": "/queue/ORDERS", "forward_to": ["/queue/ON.CALL"], "filter": "urgent = 'yes'"},
    {"name": "/queue/ORDERS", "forward_to": ["/topic/VirtualTopic.ORDERS"]},
)
ROUTING = {"mirrored_queues": ["/queue/ON.CALL"]}


async def taken(client: Client, name: str, count: int) -> list[bytes]:
    async with client.subscribe(name) as messages:
        found = []
        for _ in range(count):
            message = await messages.receive()
            found.append(message.body)
            await message.ack()
        return found


async def test_orders_go_where_they_are_needed() -> None:
    disk = Disk()
    lab, ward = "/queue/Consumer.LAB.VirtualTopic.ORDERS", "/queue/Consumer.WARD.VirtualTopic.ORDERS"
    async with (
        broker_on(disk, composite=COMPOSITE, routing=ROUTING) as broker,
        broker.connect() as client,
        client.subscribe(lab),
        client.subscribe(ward),
        client.subscribe("/topic/VirtualTopic.Mirror.ON.CALL") as seen,
    ):
        await client.send("/queue/ORDERS", b"ecg", {"urgent": "yes"})
        await client.send("/queue/ORDERS", b"blood count")
        assert (await seen.receive()).body == b"ecg"
    async with broker_on(disk, composite=COMPOSITE, routing=ROUTING) as broker, broker.connect() as client:
        await client.send(
            "/queue/A,/queue/B", b"both"
        )  # the queues collect though nobody has consumed since the restart
        await client.send("/queue/ORDERS", b"x-ray")
        for name in (lab, ward):
            assert await taken(client, name, 3) == [b"ecg", b"blood count", b"x-ray"]
        assert await taken(client, "/queue/ON.CALL", 1) == [b"ecg"]
        assert await taken(client, "/queue/A", 1) == await taken(client, "/queue/B", 1) == [b"both"]
