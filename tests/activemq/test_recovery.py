"""For who knows ActiveMQ: retroactive consumers and subscription recovery policies.

Monitors publish vital signs to topics. A screen that is switched on later shows the last value of each bed at once, as with
`lastImageSubscriptionRecoveryPolicy`. See "Late subscribers of topics" in docs/activemq.md.
"""

from __future__ import annotations

from tests.support.serving import embedded
from tests.support.wire import dialled, frame


async def test_a_screen_shows_the_last_value_of_each_bed() -> None:
    policy = [{"match": "/topic/vitals.*", "recovery_messages": 1}]
    async with embedded(policy=policy) as (broker, port), dialled(port) as screen, broker.connect() as client:
        for bed, pulse in (("1", b"80"), ("2", b"64"), ("1", b"82")):
            await client.send(f"/topic/vitals.{bed}", pulse, durable=False)

        # ActiveMQ's STOMP header.
        subscribe = ("SUBSCRIBE", "destination:/topic/vitals.*", "id:0", "activemq.retroactive:true", "receipt:on")
        await screen.send(frame(*subscribe))
        shown = []
        while len(shown) < 2:
            if (message := await screen.frame()).command == "MESSAGE":
                shown.append((message["destination"], message.body))
        assert shown == [("/topic/vitals.2", b"64"), ("/topic/vitals.1", b"82")]

        # A pybroker client, as a durable subscription: what it was given first is stored for it, too.
        async with (
            broker.connect("ward") as ward,
            ward.subscribe("/topic/vitals.1", durable_name="chart", retroactive=True) as chart,
        ):
            await client.send("/topic/vitals.1", b"90")
            assert [(await chart.receive()).body for _ in range(2)] == [b"82", b"90"]

        # Who does not ask gets what is new only.
        async with client.subscribe("/topic/vitals.1") as plain:
            await client.send("/topic/vitals.1", b"91")
            assert (await plain.receive()).body == b"91"
