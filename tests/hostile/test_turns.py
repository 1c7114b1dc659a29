"""What asks for much in few bytes takes many turns, between which others have theirs."""

import pytest

from tests.hostile.arena import Arena, arena, on_virtual_time
from tests.hostile.stomp_pieces import CONNECTS
from tests.native import peer as wire
from tests.support.wire import frame

TURN_MAX = 50
COMPOSITE = ",".join(f"/topic/{number}" for number in range(20))
FANNED_OUT = "/topic/many"
HELLO = wire.pack([wire.HELLO, "pybroker", [1], {}])
LISTENERS = 20

STOMP = {
    "composites": CONNECTS[0] + frame("SEND", f"destination:{COMPOSITE}") * 30,
    "subscriptions": CONNECTS[0]
    + b"".join(frame("SUBSCRIBE", f"id:{n}", f"destination:/topic/{n}") for n in range(30)),
    "schedules": CONNECTS[0] + frame("SEND", "destination:/queue/a", "AMQ_SCHEDULED_DELAY:9999999") * 30,
    "many listeners": CONNECTS[0] + frame("SEND", f"destination:{FANNED_OUT}", "persistent:false") * 30,
}
NATIVE = {
    "composites": HELLO + wire.pack([wire.SEND, 1, wire.rows(30, COMPOSITE)]),
    "subscriptions": HELLO + wire.pack(*([wire.SUBSCRIBE, n, n, f"/topic/{n}", "auto", 0, ""] for n in range(1, 31))),
    "schedules": HELLO + wire.pack([wire.SEND, 1, wire.rows(30, block=b"AMQ_SCHEDULED_DELAY:9999999\n")]),
    "refused requests": HELLO + wire.pack(*([wire.SUBSCRIBE, n, 1, "/topic/1", "auto", 0, ""] for n in range(1, 201))),
    "many listeners": HELLO + wire.pack([wire.SEND, 1, wire.rows(30, FANNED_OUT, flags=4)]),
}


@pytest.mark.parametrize(
    ("what", "native"),
    [(what, native) for native, attacks in ((False, STOMP), (True, NATIVE)) for what in attacks],
    ids=lambda value: value if isinstance(value, str) else "native" if value else "stomp",
)
def test_a_turn_has_an_end(what: str, native: bool):
    async def action() -> None:
        async with arena(limits={"turn_messages_max": TURN_MAX}) as it:
            engine = it.broker._running()
            work: list[int] = []
            end_turn = engine.end_turn

            def counted() -> None:
                work.append(engine.core.work)
                engine.core.work = 0
                end_turn()

            async def run(it: Arena) -> None:
                engine.end_turn = counted  # type: ignore[method-assign]
                await it.attack([(NATIVE if native else STOMP)[what]], native=native)
                engine.end_turn = end_turn  # type: ignore[method-assign]

            if what == "many listeners":
                many = b"".join(frame("SUBSCRIBE", f"id:{n}", f"destination:{FANNED_OUT}") for n in range(LISTENERS))
                async with it.stream() as stream:
                    await stream.send_all(CONNECTS[0] + many)
                    await run(it)
            else:
                await run(it)
            await it.check()
            assert sum(work) >= 30 * 16, "all of it was done"
            assert max(work) <= TURN_MAX + 2 * 20, "a turn ends with what fills it"

    on_virtual_time(action)


def test_a_broker_that_fills_between_two_turns_takes_no_more_from_one_read():
    async def action() -> None:
        limits = {"turn_messages_max": TURN_MAX, "store_bytes_max": 2_000, "full_policy": "refuse"}
        async with arena(limits=limits) as it:
            queues = ",".join(f"/queue/{number}" for number in range(20))
            sends = frame("SEND", f"destination:{queues}", "persistent:true", body=b"x" * 50) * 30
            await it.attack([CONNECTS[0] + sends])
            assert 2_000 < it.core.stored_bytes < 5_000

    on_virtual_time(action)
