"""Looking at what is scheduled, and cancelling it, while the broker runs. Owns the values that are shown."""

from __future__ import annotations

import re
from dataclasses import dataclass

import trio

from pybroker.committing import end_turn_committed, wait_or_ended
from pybroker.core.schedules import ScheduleList, ScheduleLookup
from pybroker.engine import Engine
from pybroker.errors import BrokerClosed, BrokerError, SendInDoubt
from pybroker.operations import Schedule

LIST_MAX = 1_000  # schedules of one list where nothing else is asked for
_ID = re.compile("[0-9]{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ScheduledMessage:
    """A message that is to be sent. Times in milliseconds, `due_ms` and `scheduled_ms` since the Unix epoch.

    schedule_id  to cancel it by; the messages that are sent have it as the header ``scheduledJobId``
    due_ms       when it is sent next
    left         how often it is sent again after that, -1 = without end; with `cron`, after each of its times
    period_ms    between two of these
    cron         sent (or begun to be sent) at each time of this expression; "" = none
    delay_ms     from such a time to the first sending
    message_id   of the message that was scheduled; each that is sent gets one of its own
    size         bytes of headers and body
    """

    schedule_id: str
    due_ms: int
    destination: str
    message_id: str
    durable: bool
    priority: int
    size: int
    left: int
    period_ms: int
    cron: str
    delay_ms: int
    scheduled_ms: int


async def schedules(engine: Engine, limit: int, after: tuple[int, int] | None) -> tuple[ScheduledMessage, ...]:
    """The next `limit` schedules in order of time, those behind `after` (due, number), as they are committed."""
    if limit < 1:
        raise BrokerError(f"a list of schedules has at least one, not {limit}")
    found: list[ScheduledMessage] = []
    start: tuple[int, int] | None = (0, 0) if after is None else (after[0], after[1] + 1)
    while start is not None and len(found) < limit:
        page = _Page()
        engine.begin_turn().held.append(ScheduleList(start, limit - len(found), page.take))
        engine.end_turn()
        if not await wait_or_ended(engine, page.come):
            raise BrokerClosed("the broker's store failed, or it stopped")
        found += page.rows
        start = page.next_key
    return tuple(found)


def _shown(schedule: Schedule) -> ScheduledMessage:
    message = schedule.message
    return ScheduledMessage(
        schedule_id=str(schedule.number),
        due_ms=schedule.due,
        destination=message.destination,
        message_id=message.message_id.decode("utf-8", "replace"),
        durable=message.durable,
        priority=message.priority,
        size=message.size,
        left=schedule.left,
        period_ms=schedule.period,
        cron=schedule.cron,
        delay_ms=schedule.delay,
        scheduled_ms=message.timestamp,
    )


class _Page:
    """Has what is shown of the schedules, and not their messages."""

    def __init__(self) -> None:
        self.come = trio.Event()
        self.rows: list[ScheduledMessage] = []
        self.next_key: tuple[int, int] | None = None

    def take(self, rows: list[Schedule], next_key: tuple[int, int] | None) -> None:
        self.rows = [_shown(each) for each in rows]
        self.next_key = next_key
        self.come.set()


class _Answer:
    def __init__(self) -> None:
        self.come = trio.Event()
        self.cancelled = False

    def take(self, cancelled: bool) -> None:
        self.cancelled = cancelled
        self.come.set()


async def cancel_schedule(engine: Engine, schedule_id: str) -> None:
    """Take a schedule away; returns when that is committed. Raises BrokerError when there is none of that id."""
    doubt = f"it is not known whether schedule {schedule_id} was cancelled: the broker's store failed, or it stopped"
    cancelled = False
    if _ID.fullmatch(schedule_id):
        number = int(schedule_id)
        core = engine.begin_turn()
        cancelled = core.schedules.cancel(number)
        if not cancelled:
            answer = _Answer()
            core.schedules.look_up(ScheduleLookup(number, answer.take))
            engine.end_turn()
            if not await wait_or_ended(engine, answer.come):
                raise SendInDoubt(doubt)
            cancelled = answer.cancelled
            engine.begin_turn()
        if not await end_turn_committed(engine):
            raise SendInDoubt(doubt)
    if not cancelled:
        raise BrokerError(
            f"there is no schedule {schedule_id!r}: it was sent for the last time, cancelled, or never made"
        )
