"""The times of a cron expression: five fields (minute, hour, day of month, month, day of week), computed by cronsim.

Pure: the time and the time zone come in. Where clocks are put forward or back, times are those of Debian's cron.
"""

from __future__ import annotations

from bisect import bisect_left
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from functools import lru_cache

from cronsim import CronSim, CronSimError

from pybroker.errors import InvalidMessage

CRON_LENGTH_MAX = 255
FIELDS = 5
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class _Search(CronSim):
    """CronSim's search, month by month instead of day by day: of months that begin on the same day of the week all are alike.

    An expression that is seldom or never true (``* * */30 2 1#5``) would else take four times as long: 5 ms of a turn.
    """

    def __init__(self, expression: str, after: datetime) -> None:
        super().__init__(expression, after)
        self._days: dict[tuple[int, int], list[int]] = {}  # that match in a month of that first weekday and length

    def advance_month(self) -> None:
        year, month = self.dt.year, self.dt.month
        if month not in self.months:
            later = [each for each in self.months if each > month]
            found = date(year, min(later), 1) if later else date(year + 1, min(self.months), 1)
            self.dt = datetime.combine(found, time(), tzinfo=self.dt.tzinfo)

    def advance_day(self) -> bool:
        today = self.dt.date()
        if self.match_day(today):
            return False
        first = today.replace(day=1)
        following = (first + timedelta(days=32)).replace(day=1)
        kind = (first.weekday(), (following - first).days)
        days = self._days.get(kind)
        if days is None:
            days = [day for day in range(1, kind[1] + 1) if self.match_day(today.replace(day=day))]
            self._days[kind] = days
        at = bisect_left(days, today.day)
        found = today.replace(day=days[at]) if at < len(days) else following
        self.dt = datetime.combine(found, time(), tzinfo=self.dt.tzinfo)
        return True


@lru_cache(maxsize=256)
def next_time(expression: str, after: int, zone: tzinfo) -> int | None:
    """The first time of the expression behind `after`, both in milliseconds since the Unix epoch; None when there is none.

    Raises InvalidMessage for what is no cron expression.
    """
    if len(expression) > CRON_LENGTH_MAX or len(expression.split()) != FIELDS:
        raise InvalidMessage(
            f"a cron expression has {FIELDS} fields (minute, hour, day of month, month, day of week) and at most "
            f"{CRON_LENGTH_MAX} characters, not {expression[:40]!r}"
        )
    try:
        moment = (_EPOCH + after * _MILLISECOND).astimezone(zone)
        found = next(_Search(expression, moment))
        return (found.astimezone(UTC) - _EPOCH) // _MILLISECOND
    except (CronSimError, AssertionError) as error:
        raise InvalidMessage(f"the cron expression {expression!r} is wrong: {error or 'a field is wrong'}") from None
    except (StopIteration, OverflowError, ValueError):  # never again, or beyond the last year of the calendar
        return None
