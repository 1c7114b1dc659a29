"""For who knows ActiveMQ: looking into a queue, and what an operator does with what is there.

A night's reports wait in a queue. A program written for ActiveMQ browses it over STOMP; the operator moves those of one ward to
a queue of their own, copies the rest for a test, and purges what is left. See "Browsing, purging, moving" in docs/activemq.md.
"""

from __future__ import annotations

from tests.support.serving import embedded
from tests.support.wire import dialled, frame

REPORTS = "/queue/reports"


async def test_browse_move_copy_and_purge() -> None:
    async with embedded() as (broker, port), dialled(port) as stomp, broker.connect() as client:
        for number in range(6):
            await client.send(REPORTS, b"report %d" % number, {"ward": "icu" if number < 2 else "er"}, priority=4)

        # ActiveMQ's STOMP browser: everything, then a MESSAGE with `browser:end`.
        await stomp.send(frame("SUBSCRIBE", f"destination:{REPORTS}", "id:b", "browser:true", "selector:ward = 'er'"))
        seen = []
        while (message := await stomp.expect("MESSAGE")).get("browser") != "end":
            seen.append(message.body)
        assert seen == [b"report %d" % number for number in range(2, 6)]
        await stomp.do("UNSUBSCRIBE", "id:b")

        # A consumer holds one; it sees nothing of what follows, and its message is left alone.
        async with client.subscribe(REPORTS, prefetch=1) as messages:
            held = await messages.receive()

            # JMX moveMatchingMessagesTo, copyMatchingMessagesTo, purge.
            moved = await broker.move(REPORTS, "/queue/icu", selector="ward = 'icu'")
            assert (moved.count, moved.outstanding) == (1, 1)
            assert (await broker.copy(REPORTS, "/queue/test")).count == 4
            assert (await broker.purge(REPORTS)).count == 4
            assert [(one.body, one.outstanding) async for one in client.browse(REPORTS)] == [(b"report 0", True)]
            await held.ack()

        assert [one.body async for one in client.browse("/queue/icu")] == [b"report 1"]
        rows = {row.name: row for row in broker.statistics().destinations}
        assert (rows["reports"].depth, rows["reports"].acknowledged, rows["reports"].removed) == (0, 1, 5)
        assert rows["test"].ready == 4
