"""The times of cron expressions: the library's, found in few steps, and in a time zone with its changes of the clock."""

from __future__ import annotations

from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim, CronSimError
from hypothesis import given
from hypothesis import strategies as st

from pybroker.core.cron import _Search, next_time
from pybroker.errors import InvalidMessage

ZONES = (UTC, ZoneInfo("Europe/Berlin"), ZoneInfo("America/Sao_Paulo"))


@given(st.text("0123456789*/,-LW# ", max_size=30), st.integers(0, 10**15))
def test_no_expression_raises_anything_else(expression: str, after: int):
    try:
        found = next_time(expression, after, UTC)
    except InvalidMessage:
        return
    assert found is None or found > after


MINUTES, HOURS = ("*", "30", "*/17", "59"), ("*", "2", "0", "*/5", "23")
DAYS = ("*", "*/2", "*/28", "*/30", "1", "29", "30", "31", "L", "LW", "L,5", "28-31", "*/7,L")
MONTHS = ("*", "2", "2,4", "1-3", "*/5", "12", "6,11")
WEEKDAYS = ("*", "1", "1-5", "0", "7", "1#5", "5#2,1L", "*/2", "MON", "3#5", "0#5,7#1", "5L")


@given(
    st.tuples(*map(st.sampled_from, (MINUTES, HOURS, DAYS, MONTHS, WEEKDAYS))).map(" ".join),
    st.datetimes(datetime(1970, 1, 2), datetime(9900, 1, 1), timezones=st.sampled_from(ZONES)),
)
def test_the_search_by_months_finds_what_the_library_finds(expression: str, after: datetime):
    found = []
    for search in (CronSim, _Search):
        try:
            found.append(next(search(expression, after)))
        except (CronSimError, StopIteration, OverflowError, ValueError) as error:
            found.append(type(error))
    assert found[0] == found[1] or {StopIteration, OverflowError, ValueError}.issuperset(found)


@pytest.mark.parametrize("expression", ["* * */30 2 1#5", "* * */28 2 1#5", "*/59 */23 */30 2 1#5,2#5"])
def test_a_search_looks_at_few_days(expression: str, monkeypatch: pytest.MonkeyPatch):
    """A turn may bring hundreds of such expressions."""
    looked = 0
    match = CronSim.match_day

    def watched(search: CronSim, day: date) -> bool:
        nonlocal looked
        looked += 1
        return match(search, day)

    monkeypatch.setattr(CronSim, "match_day", watched)
    next_time.__wrapped__(expression, 1_764_000_000_000, UTC)
    assert looked <= 14 * 31 + 2 * 51


def test_cron_times_in_a_time_zone_with_its_changes_of_the_clock():
    berlin = ZoneInfo("Europe/Berlin")

    def at(text: str) -> int:
        return int(datetime.fromisoformat(text).timestamp() * 1_000)

    assert next_time("30 8 * * 1-5", at("2026-01-02T12:00+01:00"), berlin) == at("2026-01-05T08:30+01:00")
    # 02:30 does not exist on that night: it is done at the first moment that does.
    assert next_time("30 2 * * *", at("2026-03-28T12:00+01:00"), berlin) == at("2026-03-29T03:00+02:00")
    assert next_time("* * * * *", at("2026-03-29T01:59+01:00"), berlin) == at("2026-03-29T03:00+02:00")
    assert next_time("0 0 1 1 *", 10**17, UTC) is None, "beyond the calendar"
