"""Pages of queues when the broker's store fails, and places that no broker has given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from trio.testing import MockClock

from pybroker.broker import Broker
from pybroker.client import make_message
from pybroker.dead_letter_work import dead_letter_command
from pybroker.errors import BrokerError, SendInDoubt, StoreError
from pybroker.queue_work import browse_command, move_command
from tests.engine.support import Disk, broker_on

Q = "/queue/q"


async def look(broker: Broker) -> object:
    return await anext(broker.browse(Q))


async def look_at_dead_letters(broker: Broker) -> object:
    return await anext(broker.dead_letters.list(queue=Q))


@pytest.mark.parametrize(
    ("ask", "in_doubt"),
    [
        (lambda broker: broker.move(Q, "/queue/r"), True),
        (lambda broker: broker.copy(Q, "/queue/r"), True),
        (lambda broker: broker.purge(Q), True),
        (lambda broker: broker.dead_letters.drop(queue=Q), True),
        (lambda broker: broker.dead_letters.retry(queue=Q), True),
        (look, False),
        (look_at_dead_letters, False),
    ],
)
async def test_what_may_have_been_done_is_in_doubt_and_a_look_is_not(
    autojump_clock: MockClock, ask: Callable[[Broker], Awaitable[Any]], in_doubt: bool
) -> None:
    async with broker_on(Disk()) as broker:
        async with broker.connect() as client:
            await client.send(Q, b"1")

            async def fail(batch: object) -> None:
                raise StoreError("the disk is gone")

            engine = broker._running()
            engine.journal._committer.commit = fail  # type: ignore[method-assign]
            engine.begin_turn().send(make_message("/queue/z", b"1", None, True, 4, 0))  # in the same batch
            with pytest.raises(BrokerError) as raised:
                await ask(broker)
        assert isinstance(raised.value, SendInDoubt) == in_doubt, raised.value


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("number", [-1, 2**63, 2**64, 2**70, 1.0, True, "1"])
async def test_a_place_that_no_answer_gave_is_refused(autojump_clock: MockClock, at: int, number: object) -> None:
    async with broker_on(Disk()) as broker, broker.connect() as client:
        await client.send(Q, b"1")
        engine = broker._running()
        place: list[object] = [engine.core.by_destination[Q].queue_id, 0, 5]
        place[at] = number
        with pytest.raises(BrokerError, match="three numbers"):
            await browse_command(engine, {"destination": Q, "cursor": place})
        with pytest.raises(BrokerError, match="three numbers"):
            await move_command(engine, {"action": "purge", "source": Q, "cursor": place})
        with pytest.raises(BrokerError, match="three numbers"):
            await dead_letter_command(engine, {"action": "list", "place": place})
        assert engine.error is None
        await client.send(Q, b"2")
