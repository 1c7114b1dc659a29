"""``pybroker dlq``: the dead letters of a running broker, and the way back. Owns options and output only.

The broker that runs on a data directory of this machine is asked over its control socket, page by page.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pybroker.cli_output import make_console
from pybroker.control import ask
from pybroker.errors import BrokerError

COMMAND = "dead-letters"
FILTERS: tuple[tuple[str, str, dict[str, Any]], ...] = (  # flag, field of the filter, and how click reads it
    ("--queue", "queue", {"metavar": "DEST", "help": "In this queue; without it: in all queues that policies name."}),
    ("--origin", "origin", {"metavar": "PATTERN", "help": "Sent there: /queue/NAME, /topic/NAME, or a pattern."}),
    ("--reason", "reason", {"metavar": "WORD", "help": "deliveries or expired."}),
    ("--id", "message_id", {"metavar": "ID", "help": "The message's id."}),
    ("--header", "headers", {"multiple": True, "metavar": "NAME=VALUE", "help": "Has this header; repeatable."}),
    (
        "--older-than",
        "older_than",
        {"type": click.FloatRange(min=0), "metavar": "SECONDS", "help": "Dead for so long."},
    ),
    (
        "--newer-than",
        "newer_than",
        {"type": click.FloatRange(min=0), "metavar": "SECONDS", "help": "Not dead for longer."},
    ),
    ("--selector", "selector", {"metavar": "TEXT", "help": "A selector is true for it."}),
)


@click.group()
def dlq() -> None:
    """Look after the dead letters of a running broker."""


def _with_filters(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def with_filter(*arguments: Any, **options: Any) -> None:
        given = {field: options.pop(f"filter_{field}") for _, field, _ in FILTERS}
        wanted = {field: value for field, value in given.items() if value not in (None, ())}
        if "headers" in wanted:
            wanted["headers"] = [_header(text) for text in wanted["headers"]]
        command(*arguments, wanted=wanted, **options)

    decorated: Callable[..., None] = with_filter
    for flag, field, how in reversed(FILTERS):
        decorated = click.option(flag, f"filter_{field}", **how)(decorated)
    decorated = click.option("--json", "as_json", is_flag=True, help="As JSON.")(decorated)
    decorated = click.option("--limit", default=0, type=click.IntRange(min=0), help="So many at most; 0 = all.")(
        decorated
    )
    return click.option(
        "--data", "data_dir", required=True, type=click.Path(path_type=Path), help="The broker's data directory."
    )(decorated)


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise click.BadParameter("--header must look like NAME=VALUE")
    return name, value


@dlq.command("list")
@_with_filters
def list_command(data_dir: Path, limit: int, as_json: bool, wanted: dict[str, Any]) -> None:
    """Show dead letters: where they were, why they left, when. (With --json a line for each, with its headers.)"""
    table = Table("id", "queue", "origin", "reason", "deliveries", "when", "bytes")
    unread = 0
    for answer in _answers(data_dir, "list", wanted, limit):
        unread += answer["done"]["unread"]
        for row in answer["letters"]:
            if as_json:
                print(json.dumps(row))
                continue
            origin = row["origin"] + (f" ({row['subscription']})" if row["subscription"] else "")
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["time"] / 1_000)) if row["time"] else "?"
            numbers = (str(row["deliveries"]), when, f"{row['size']:,}")
            table.add_row(*map(Text, (row["message_id"], row["queue"], origin, row["reason"], *numbers)))
    if not as_json:
        make_console().print(table)
    if unread:
        sys.exit(f"pybroker: {unread} dead letters could not be read: see pybroker store verify")


@dlq.command()
@_with_filters
def retry(data_dir: Path, limit: int, as_json: bool, wanted: dict[str, Any]) -> None:
    """Send dead letters back to where they came from."""
    _settle(data_dir, "retry", limit, as_json, wanted)


@dlq.command()
@click.option("--all", "everything", is_flag=True, help="Needed where no filter says which.")
@_with_filters
def drop(data_dir: Path, limit: int, as_json: bool, wanted: dict[str, Any], everything: bool) -> None:
    """Delete dead letters for good."""
    if not wanted and not everything:
        raise click.UsageError("say which dead letters to drop, or --all")
    _settle(data_dir, "drop", limit, as_json, wanted)


def _settle(data_dir: Path, action: str, limit: int, as_json: bool, wanted: dict[str, Any]) -> None:
    done = {"count": 0, "stayed": 0, "outstanding": 0, "unread": 0}
    refused = ""
    for answer in _answers(data_dir, action, wanted, limit):
        done = {name: count + answer["done"][name] for name, count in done.items()}
        refused = answer["refused"]
    if as_json:
        print(json.dumps(done))
    else:
        print(f"{done['count']:,} dead letters " + ("sent back" if action == "retry" else "dropped"))
        for name, why in (
            ("stayed", "stayed: where they came from is not there any more, or not known"),
            ("outstanding", "are with consumers or in transactions, and were left alone"),
            ("unread", "could not be read, and were left alone: see pybroker store verify"),
        ):
            if done[name]:
                print(f"{done[name]:,} {why}")
    if refused:
        raise BrokerError(refused)


def _answers(data_dir: Path, action: str, wanted: dict[str, Any], limit: int) -> Iterator[dict[str, Any]]:
    place, count = None, 0
    while True:
        left = limit - count if limit else 0
        answer: dict[str, Any] = ask(data_dir, COMMAND, action=action, filter=wanted, limit=left, place=place)
        yield answer
        count += len(answer["letters"]) + answer["done"]["count"]
        place = answer["place"]
        if place is None or (limit and count >= limit):
            return
