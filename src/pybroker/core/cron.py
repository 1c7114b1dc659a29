"""The times of a cron expression: five fields (minute, hour, day of month, month, day of week), computed by cronsim.

Pure: the time and the time zone come in. Where clocks are put forward or back, times are those of Debian's cron.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache

from cronsim import CronSim, CronSimError

from pybroker.errors import InvalidMessage

CRON_LENGTH_MAX = 255
FIELDS = 5
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


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
        found = next(CronSim(expression, moment))
        return (found.astimezone(UTC) - _EPOCH) // _MILLISECOND
    except (CronSimError, AssertionError) as error:
        raise InvalidMessage(f"the cron expression {expression!r} is wrong: {error or 'a field is wrong'}") from None
    except (StopIteration, OverflowError, ValueError):  # never again, or beyond the last year of the calendar
        return None
