"""For who knows ActiveMQ: request and reply over temporary queues.

A department asks a laboratory for a report. The laboratory's program uses STOMP as it did with ActiveMQ; the department's is a
pybroker client, and another one of the department still speaks STOMP. See "Temporary destinations, request and reply" in
docs/activemq.md.
"""

from __future__ import annotations

import pytest
import trio

from pybroker.errors import RequestTimeout
from tests.support.serving import embedded
from tests.support.wire import Peer, dialled, frame

LAB = "/queue/laboratory.reports"


async def laboratory(lab: Peer, count: int) -> list[dict[str, str]]:
    """Answer requests where they ask for it, as a program written for ActiveMQ does."""
    seen = []
    for _ in range(count):
        request = await lab.expect("MESSAGE")
        seen.append(request)
        await lab.send(
            frame(
                "SEND",
                f"destination:{request['reply-to']}",
                f"correlation-id:{request['correlation-id']}",
                "persistent:true",
                f"receipt:done-{request['correlation-id']}",
                body=b"potassium 4.1",
            )
        )
        await lab.expect("RECEIPT")
    return seen


async def test_request_and_reply() -> None:
    async with embedded() as (broker, port), dialled(port) as lab, dialled(port) as ward:
        await lab.send(frame("SUBSCRIBE", f"destination:{LAB}", "id:0", "receipt:r"))
        await lab.expect("RECEIPT")

        # A STOMP client names a temporary queue of its own; the laboratory sees a name that it can reply to.
        await ward.send(frame("SUBSCRIBE", "destination:/temp-queue/answers", "id:7", "ack:auto"))
        await ward.send(
            frame("SEND", f"destination:{LAB}", "reply-to:/temp-queue/answers", "correlation-id:42", body=b"patient 7")
        )
        (request,) = await laboratory(lab, 1)
        assert request["reply-to"].startswith("/remote-temp-queue/")
        reply = await ward.expect("MESSAGE")
        assert (reply["destination"], reply["correlation-id"]) == ("/temp-queue/answers", "42")

        # A pybroker client: one call. Many may wait at the same time, each gets its own reply.
        async with broker.connect() as department, trio.open_nursery() as nursery:
            nursery.start_soon(laboratory, lab, 1)
            report = await department.request(LAB, b"patient 8", timeout=10)
            assert report.body == b"potassium 4.1"

        # Nobody replies in time: an error, not a task that hangs.
        async with broker.connect() as department:
            with pytest.raises(RequestTimeout, match="may have been carried out"):
                await department.request(LAB, b"patient 9", timeout=0.05)

        # The asker is gone. ActiveMQ would end the laboratory's connection with an error; here the reply is confirmed and counted.
        await laboratory(lab, 1)
        assert broker.statistics().unclaimed == 1
