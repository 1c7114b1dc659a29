"""``pybroker browse`` and ``pybroker queue``: what is in the queues of a running broker, and what an operator does with it.

Owns options and output; the broker is asked over its control socket, page by page.
"""

from __future__ import annotations

import json
import sys
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pybroker.cli_output import make_console
from pybroker.control import ask
from pybroker.destination import QUEUE, parse_destination
from pybroker.errors import BrokerError, InvalidDestination

DATA = click.option(
    "--data", "data_dir", required=True, type=click.Path(path_type=Path), help="The broker's data directory."
)
SELECTOR = click.option("--selector", default="", metavar="TEXT", help="Only messages that it is true for.")
LIMIT = click.option("--limit", default=0, type=click.IntRange(min=0), help="So many messages at most; 0 = all.")
JSON = click.option("--json", "as_json", is_flag=True, help="As JSON.")
COUNTERS = ("enqueued", "acknowledged", "redelivered", "dead_lettered", "expired", "forwarded", "removed", "corrupt")


@click.command()
@click.argument("destination")
@DATA
@SELECTOR
@LIMIT
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each message, its body as base64.")
@click.option("--headers-only", is_flag=True, help="Without the bodies.")
def browse(destination: str, data_dir: Path, selector: str, limit: int, as_json: bool, headers_only: bool) -> None:
    """Show the messages of the queue DESTINATION (/queue/NAME), and leave them there."""
    cursor, shown, unread = None, 0, 0
    while True:
        answer = ask(
            data_dir,
            "queue-browse",
            destination=destination,
            selector=selector,
            limit=limit - shown if limit else 0,
            cursor=cursor,
            headers_only=headers_only,
        )
        for row in answer["messages"]:
            print(json.dumps(row) if as_json else _shown(row))
        shown += len(answer["messages"])
        unread += answer["unread"]
        cursor = answer["cursor"]
        if cursor is None or (limit and shown >= limit):
            break
    sys.stdout.flush()
    if unread:
        sys.exit(f"pybroker: {unread} messages could not be read: see pybroker store verify")


def _shown(row: dict[str, Any]) -> str:
    kind = "durable" if row["durable"] else "transient"
    out = ", outstanding" if row["outstanding"] else ""
    lines = [
        f"{row['message_id']}  {_when(row['timestamp'])}  priority {row['priority']}  {row['size']} bytes  {kind}{out}"
    ]
    lines += [_printable(f"  {name}: {value}") for name, value in row["headers"]]
    if "body" in row:
        body = b64decode(row["body"]).decode("utf-8", "backslashreplace")
        lines.append("  " + "\n".join(map(_printable, body.split("\n"))))
    return "\n".join(lines)


def _printable(line: str) -> str:
    """A line in which what a terminal would obey is escaped."""
    return "".join(
        each if each.isprintable() or each == "\t" else each.encode("unicode_escape").decode() for each in line
    )


def _when(timestamp_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(timestamp_ms / 1000))


@click.group()
def queue() -> None:
    """Look after the queues of a running broker."""


@queue.command("list")
@DATA
@JSON
def list_queues(data_dir: Path, as_json: bool) -> None:
    """Show what all queues have."""
    rows = [row for row in ask(data_dir, "status")["destinations"] if row["kind"] == QUEUE]
    rows.sort(key=lambda row: str(row["name"]))
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = ("ready", "outstanding", "consumers", "bytes")
    table = Table("queue", *columns, "oldest", *(name.replace("_", "-") for name in COUNTERS))
    for row in rows:
        numbers = [f"{row[name]:,}" for name in columns]
        table.add_row(Text(row["name"]), *numbers, _age(row["oldest_ms"]), *(f"{row[name]:,}" for name in COUNTERS))
    make_console().print(table)


@queue.command()
@click.argument("destination")
@DATA
@JSON
def show(destination: str, data_dir: Path, as_json: bool) -> None:
    """Show what the queue DESTINATION (/queue/NAME) has; the exit status is 1 when it is not there."""
    target = parse_destination(destination)
    if target.kind != QUEUE:
        raise InvalidDestination(f"{destination} is no queue: name one, as /queue/NAME")
    found = [row for row in ask(data_dir, "status")["destinations"] if (row["kind"], row["name"]) == target]
    if not found:
        raise BrokerError(f"there is no {destination}")
    (row,) = found
    if not row["oldest_ms"] and row["depth"]:  # nothing of it is in memory
        first = ask(data_dir, "queue-browse", destination=destination, limit=1, headers_only=True)["messages"]
        row["oldest_ms"] = first[0]["timestamp"] if first else 0
    if as_json:
        print(json.dumps(row, indent=2))
        return
    console = make_console()
    for key, value in row.items():
        if key == "oldest_ms":
            console.print(f"oldest: {_age(value)}", highlight=False)
        elif value != "":
            console.print(Text(f"{key.replace('_', '-')}: {value:,}" if isinstance(value, int) else f"{key}: {value}"))


def _age(timestamp_ms: int) -> str:
    if not timestamp_ms:
        return "-"
    seconds = max(time.time() - timestamp_ms / 1000, 0.0)
    return f"{seconds:,.0f} s"


@queue.command()
@click.argument("destination")
@DATA
@SELECTOR
@LIMIT
@JSON
def purge(destination: str, data_dir: Path, selector: str, limit: int, as_json: bool) -> None:
    """Delete the messages of the queue DESTINATION that nobody has at this time."""
    _move(data_dir, "purge", destination, "", selector, limit, as_json)


@queue.command()
@click.argument("source")
@click.argument("target")
@DATA
@SELECTOR
@LIMIT
@JSON
def move(source: str, target: str, data_dir: Path, selector: str, limit: int, as_json: bool) -> None:
    """Move the messages of the queue SOURCE that nobody has at this time to the queue TARGET."""
    _move(data_dir, "move", source, target, selector, limit, as_json)


@queue.command()
@click.argument("source")
@click.argument("target")
@DATA
@SELECTOR
@LIMIT
@JSON
def copy(source: str, target: str, data_dir: Path, selector: str, limit: int, as_json: bool) -> None:
    """Copy the messages of the queue SOURCE that nobody has at this time to the queue TARGET."""
    _move(data_dir, "copy", source, target, selector, limit, as_json)


def _move(data_dir: Path, action: str, source: str, target: str, selector: str, limit: int, as_json: bool) -> None:
    done = {"count": 0, "outstanding": 0, "unread": 0}
    cursor = None
    while True:
        answer = ask(
            data_dir,
            "queue-move",
            action=action,
            source=source,
            target=target,
            selector=selector,
            limit=limit - done["count"] if limit else 0,
            cursor=cursor,
        )
        done = {name: number + answer[name] for name, number in done.items()}
        cursor = answer["cursor"]
        if cursor is None:
            break
        if sys.stderr.isatty():
            print(f"\r{done['count']:,} messages", end="", file=sys.stderr, flush=True)
    if as_json:
        print(json.dumps({**done, "refused": answer["refused"]}))
    else:
        words = {"purge": "purged", "move": "moved", "copy": "copied"}
        print(f"{done['count']:,} messages {words[action]}")
        if done["outstanding"]:
            print(f"{done['outstanding']:,} are with consumers or in transactions: they were left alone")
        if done["unread"]:
            print(f"{done['unread']:,} could not be read, and were left alone: see pybroker store verify")
    if answer["refused"]:
        sys.exit(f"pybroker: {answer['refused']}")
