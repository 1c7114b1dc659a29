"""For who knows ActiveMQ: delayed and scheduled messages.

A hospital reminds its wards. The headers are ActiveMQ's; what is scheduled can be looked at and cancelled. See "Delayed and
scheduled delivery" in docs/activemq.md.
"""

from __future__ import annotations

import trio
from trio.testing import MockClock

from tests.client.test_schedules import Clock
from tests.engine.support import Disk, broker_on

REMINDERS = "/queue/ward-3.reminders"


async def test_reminders_of_a_ward(autojump_clock: MockClock) -> None:
    disk = Disk()
    clock = Clock()
    async with broker_on(disk) as broker, broker.connect() as office:
        clock.rule(broker)
        # In ten minutes, and then three times more, a minute between: as ScheduledMessage.AMQ_SCHEDULED_* in ActiveMQ.
        headers = {"AMQ_SCHEDULED_DELAY": "600000", "AMQ_SCHEDULED_PERIOD": "60000", "AMQ_SCHEDULED_REPEAT": "3"}
        await office.send(REMINDERS, b"change the drip", {"patient": "7", **headers})
        # Every five minutes, five messages a second apart.
        often = {"AMQ_SCHEDULED_CRON": "*/5 * * * *", "AMQ_SCHEDULED_DELAY": "1000"}
        often |= {"AMQ_SCHEDULED_PERIOD": "1000", "AMQ_SCHEDULED_REPEAT": "4"}
        await office.send(REMINDERS, b"round", often)
        planned = await broker.schedules()
        assert {each.destination for each in planned} == {REMINDERS}

    # The broker is away for a while. ActiveMQ would send what was missed once, and go on from then; so it is here, in its rhythm.
    await trio.sleep(15 * 60)
    async with broker_on(disk) as broker, broker.connect() as ward, ward.subscribe(REMINDERS) as reminders:
        clock.rule(broker)
        drips = 0
        while drips < 4:
            message = await reminders.receive()
            drips += message.body == b"change the drip"
            assert message.header("scheduledJobId") is not None
            assert message.header("AMQ_SCHEDULED_DELAY") is None
            await reminders.ack([message])

        # No message says "stop": it is cancelled by its id, here or with `pybroker schedule cancel ID`.
        for each in await broker.schedules():
            await broker.cancel_schedule(each.schedule_id)
        with trio.move_on_after(600):
            raise AssertionError(await reminders.receive())
        assert broker.statistics().scheduled == 0
