"""The demonstration's tables: what was promised and what came; and for a set, who led when and what its copies hold."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo_account import Account
from demo_replicas import NAMES
from demo_set import SetRun

TOGETHER_SECONDS = 0.02  # changes that follow each other so soon share a row
PASSING = ("none", "candidate", "joining")  # roles on the way to another one


def show_account(account: Account, console: Console) -> None:
    rows = account.rows()
    table = Table(title="What was promised, and what came")
    table.add_column("messages")
    for name, _ in rows:
        table.add_column(name.removeprefix("/queue/"), justify="right")
    for measure in rows[0][1]:
        table.add_row(measure.replace("_", " "), *(str(row[measure]) for _, row in rows))
    console.print(table)


def show_set(run: SetRun, console: Console) -> None:
    """As far as the run has come."""
    show_time_line(run.replicas.time_line, run.stage.started, console)
    if run.failovers:
        table = Table(title="The changes of leader, and the gap in the producer's confirmed sends")
        for heading in ("the leader was", "before", "after", "epoch"):
            table.add_column(heading, no_wrap=True)
        for heading in ("gap", "sent again"):
            table.add_column(heading, no_wrap=True, justify="right")
        for one in run.failovers:
            seen = (f"{one.gap.milliseconds:.0f} ms", str(one.gap.sent_again)) if one.gap else ("-", "-")
            table.add_row(one.event, one.before, one.after, f"{one.epoch_before} -> {one.epoch_after}", *seen)
        console.print(table)
    if run.status:
        console.print("At the end, pybroker replica status (position: epoch, batch) says:", highlight=False)
        console.print(Text(run.status))


def show_time_line(changes: list[tuple[float, str, str]], started: float, console: Console) -> None:
    """A row for each moment, a column for each replica. Roles on the way to another one are left out."""
    table = Table(title="Who was what, from when on")
    table.add_column("seconds", justify="right")
    for name in NAMES:
        table.add_column(name)
    rows: list[tuple[float, dict[str, str]]] = []
    for when, name, what in sorted(changes):
        if what.split(",")[0] in PASSING:
            continue
        if not rows or when - rows[-1][0] > TOGETHER_SECONDS or name in rows[-1][1]:
            rows.append((when, {}))
        rows[-1][1][name] = what
    for when, cells in rows:
        table.add_row(f"{when - started:.2f}", *(cells.get(name, "") for name in NAMES))
    console.print(table)
