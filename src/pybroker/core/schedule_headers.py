"""The headers that schedule a message, as ActiveMQ has them: reading, checking, and taking them away. Pure.

Numbers that can't be meant are refused, and so is a header that looks like one of these and is none: a message must not be sent
at once because somebody mistyped when it was to be sent.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from pybroker.errors import InvalidMessage
from pybroker.message import unescape

PREFIX = b"AMQ_SCHEDULED_"  # of all these headers, and of none else
DELAY = "AMQ_SCHEDULED_DELAY"  # milliseconds
PERIOD = "AMQ_SCHEDULED_PERIOD"  # milliseconds
REPEAT = "AMQ_SCHEDULED_REPEAT"  # how often it is sent again, -1 = without end
CRON = "AMQ_SCHEDULED_CRON"
HEADERS = (DELAY, PERIOD, REPEAT, CRON)
JOB_ID = "scheduledJobId"  # what a message has in their place when it is sent

TIME_MAX = 100 * 366 * 86_400_000  # milliseconds: a hundred years
REPEAT_MAX = 2**31 - 1
WITHOUT_END = -1
_NUMBER = re.compile(r"-?[0-9]{1,15}", re.ASCII)
_SHOWN = 40


class Terms(NamedTuple):
    """What the headers say; times in milliseconds, 0 for what they do not say."""

    delay: int
    period: int
    repeat: int
    cron: str


def take_terms(header_block: bytes) -> tuple[Terms | None, bytes]:
    """What a header block says of a schedule (None: nothing), and the block without it. Raises InvalidMessage."""
    values: dict[str, str] = {}
    kept: list[bytes] = []
    for line in header_block.split(b"\n"):
        if not line.startswith(PREFIX):
            kept.append(line)
            continue
        name, _, value = line.decode().partition(":")
        if name not in HEADERS:
            raise InvalidMessage(f"{name[:_SHOWN]} is no header of a schedule: there are {', '.join(HEADERS)}")
        values.setdefault(name, unescape(value))  # of repeated headers the first one counts
    return (_terms(values) if values else None), b"\n".join(kept)


def _terms(values: dict[str, str]) -> Terms:
    terms = Terms(
        _number(values, DELAY, 0, TIME_MAX),
        _number(values, PERIOD, 0, TIME_MAX),
        _number(values, REPEAT, WITHOUT_END, REPEAT_MAX),
        values.get(CRON, ""),
    )
    if terms.repeat and not terms.period:
        raise InvalidMessage(f"{REPEAT} needs {PERIOD}: the milliseconds between two sendings, at least 1")
    if CRON in values:
        if not terms.cron.strip():
            raise InvalidMessage(f"{CRON} is empty: it needs a cron expression, for example '0 * * * *'")
        if terms.repeat == WITHOUT_END:
            raise InvalidMessage(f"{REPEAT} {WITHOUT_END} with {CRON} would begin another endless schedule each time")
        if terms.period and not terms.repeat:
            raise InvalidMessage(f"{PERIOD} with {CRON} needs {REPEAT}: how often it is sent again after each time")
    elif not (DELAY in values or PERIOD in values):
        raise InvalidMessage(f"{REPEAT} needs {PERIOD}")
    return terms


def _number(values: dict[str, str], name: str, low: int, high: int) -> int:
    text = values.get(name, "0")
    if not _NUMBER.fullmatch(text) or not low <= int(text) <= high:
        raise InvalidMessage(f"{name} must be a whole number from {low} to {high}, not {text[:_SHOWN]!r}")
    return int(text)
