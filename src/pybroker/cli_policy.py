"""``pybroker policy``: what holds for a destination, and why. Owns options and output only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pybroker.cli_output import make_console
from pybroker.control import ask
from pybroker.destination import parse_destination
from pybroker.errors import BrokerError
from pybroker.policies import Explained, Policies
from pybroker.settings import load_config


@click.group()
def policy() -> None:
    """Look at the policies of destinations."""


@policy.command()
@click.argument("destination")
@click.option(
    "--data", "data_dir", type=click.Path(path_type=Path), help="Ask the broker that runs on this data directory."
)
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path), help="Read this TOML file; no broker need run."
)
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
def show(destination: str, data_dir: Path | None, config: Path | None, as_json: bool) -> None:
    """Show what holds for DESTINATION (/queue/NAME or /topic/NAME): each value, and which entry sets it."""
    if (data_dir is None) == (config is None):
        raise click.UsageError("one of --data DIRECTORY and --config FILE is needed")
    if config is not None:
        checked = load_config(config)
        policies = Policies(checked.policy, checked.limits, checked.delivery)
        rows = [each._asdict() for each in policies.explain(parse_destination(destination))]
    else:
        assert data_dir is not None
        rows = ask(data_dir, "policy-show", destination=destination)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("value", "is", "unit", "from", "meaning")
    for each in _explained(rows):
        shown = json.dumps(each.value)
        table.add_row(*map(Text, (each.name, shown, each.unit, each.source, each.doc)))
    make_console().print(table)


def _explained(rows: list[dict[str, Any]]) -> list[Explained]:
    try:
        return [Explained(**row) for row in rows]
    except TypeError:
        raise BrokerError("the broker's answer is not understood: is it of another version? --json shows it") from None
