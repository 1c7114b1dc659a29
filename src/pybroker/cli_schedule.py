"""``pybroker schedule``: what is to be sent later, and cancelling it. Owns options and output only."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pybroker.cli_output import make_console
from pybroker.control import ask
from pybroker.errors import BrokerError
from pybroker.scheduling import LIST_MAX, ScheduledMessage

LIST = "schedule-list"
CANCEL = "schedule-cancel"
SHOWN_PAGE = 100  # asked for at a time: an answer is one line
NO_YEAR = "beyond the year 9999"

data_option = click.option(
    "--data", "data_dir", required=True, type=click.Path(path_type=Path), help="The broker's data directory."
)


@click.group()
def schedule() -> None:
    """Look at messages that are sent later, and cancel them."""


@schedule.command("list")
@data_option
@click.option(
    "--limit", type=click.IntRange(min=1), default=LIST_MAX, show_default=True, help="Show no more than this."
)
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
def list_command(data_dir: Path, limit: int, as_json: bool) -> None:
    """Show what is scheduled, in order of time (UTC)."""
    found: list[dict[str, Any]] = []
    while len(found) < limit:
        after = [found[-1]["due_ms"], int(found[-1]["schedule_id"])] if found else None
        rows = ask(data_dir, LIST, limit=min(SHOWN_PAGE, limit - len(found)), after=after)
        found += rows
        if len(rows) < SHOWN_PAGE:
            break
    if as_json:
        print(json.dumps(found, indent=2))
        return
    table = Table("id", "due", "destination", "again", "period", "cron", "durable", "bytes")
    for row in map(_message, found):
        again = "without end" if row.left < 0 else str(row.left)
        period = f"{row.period_ms} ms" if row.period_ms else ""
        cells = (row.schedule_id, _time(row.due_ms), row.destination, again, period, row.cron)
        table.add_row(*map(Text, (*cells, "yes" if row.durable else "no", str(row.size))))
    make_console().print(table)


def _message(row: dict[str, Any]) -> ScheduledMessage:
    try:
        return ScheduledMessage(**{field.name: row[field.name] for field in fields(ScheduledMessage)})
    except (KeyError, TypeError):
        raise BrokerError("the broker's answer is not understood: is it of another version? --json shows it") from None


def _time(milliseconds: int) -> str:
    try:
        return datetime.fromtimestamp(milliseconds / 1_000, UTC).isoformat(" ", "milliseconds").removesuffix("+00:00")
    except (OverflowError, ValueError):
        return NO_YEAR


@schedule.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@data_option
def cancel(ids: tuple[str, ...], data_dir: Path) -> None:
    """Cancel schedules: their messages are not sent (again). The exit status is 1 when there is none of an ID."""
    refused = False
    for schedule_id in ids:
        try:
            ask(data_dir, CANCEL, id=schedule_id)
        except BrokerError as error:
            refused = True
            print(f"pybroker: {error}", file=sys.stderr)
        else:
            print(f"cancelled {schedule_id}")
    if refused:
        sys.exit(1)
