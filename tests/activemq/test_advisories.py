"""For who knows ActiveMQ: watching a broker by its advisories.

A monitoring program subscribes to ActiveMQ's advisory topics over STOMP, as it did before. See "Advisories" in docs/activemq.md.
"""

from __future__ import annotations

import trio

from tests.support.serving import embedded
from tests.support.wire import dialled, frame


async def test_a_monitor_sees_that_nobody_reads_the_referrals() -> None:
    async with embedded(delivery={"deliveries_max": 1}) as (broker, port), dialled(port) as monitor:
        await monitor.send(frame("SUBSCRIBE", "destination:/topic/ActiveMQ.Advisory.>", "id:0", "receipt:r"))
        await monitor.expect("RECEIPT")

        async with broker.connect("practice-7") as practice:
            # A client has come: ActiveMQ's names, its type header, what is told is in headers.
            advisory = await monitor.expect("MESSAGE")
            assert advisory["destination"] == "/topic/ActiveMQ.Advisory.Connection"
            assert (advisory["type"], advisory["clientId"], advisory["event"]) == ("Advisory", "practice-7", "start")

            # It sends a referral that nobody reads at this time.
            await practice.send("/queue/referrals", b"...")
            assert (await monitor.expect("MESSAGE"))["destination"].endswith(".Producer.Queue.referrals")
            advisory = await monitor.expect("MESSAGE")
            assert advisory["destination"] == "/topic/ActiveMQ.Advisory.NoConsumer.Queue.referrals"
            assert advisory["originalDestination"] == "/queue/referrals"

            # A consumer comes, can't make sense of it, and it becomes a dead letter.
            async with practice.subscribe("/queue/referrals") as referrals:
                advisory = await monitor.expect("MESSAGE")
                assert advisory["destination"] == "/topic/ActiveMQ.Advisory.Consumer.Queue.referrals"
                assert advisory["consumerCount"] == "1"
                await (await referrals.receive()).nack()
                advisory = await monitor.expect("MESSAGE")
                assert advisory["destination"] == "/topic/ActiveMQ.Advisory.MessageDLQd.Queue.referrals"
                assert advisory["reason"] == "deliveries"
                await monitor.expect("MESSAGE")  # nobody consumes the dead letters
            assert (await monitor.expect("MESSAGE"))["consumerCount"] == "0"

        # A wildcard in front does not bring the advisories along, as it does in ActiveMQ.
        async with broker.connect() as other, other.subscribe("/topic/>") as everything:
            await other.send("/queue/referrals", b"...")
            with trio.move_on_after(0.05) as quiet:
                await everything.receive()
            assert quiet.cancelled_caught
