"""The command line: thin over the library. Owns options and output; every flag is one configuration field."""

from __future__ import annotations

import gc
import json
import logging
import signal
import sys
from pathlib import Path
from typing import Any

import click
import trio
from rich.table import Table

from pybroker.broker import Broker, open_broker, single
from pybroker.cli_dead_letters import dlq
from pybroker.cli_messages import DEFAULT_URL, receive, send
from pybroker.cli_network import network, network_flags
from pybroker.cli_output import make_console
from pybroker.cli_policy import policy
from pybroker.cli_queue import browse, queue
from pybroker.cli_replica import LEADER, check_flags, replica, replica_set_flags
from pybroker.cli_schedule import schedule
from pybroker.config import BrokerConfig
from pybroker.control import ask
from pybroker.errors import BrokerError
from pybroker.settings import load_config, make_config
from pybroker.store.check import verify
from pybroker.store.report import Report
from pybroker.store.salvage import salvage
from pybroker.users import hash_password

LOG_LEVEL = click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], case_sensitive=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pybroker")
def cli() -> None:
    """A durable message broker."""


cli.add_command(replica)
cli.add_command(network)
cli.add_command(policy)
cli.add_command(dlq)
cli.add_command(schedule)
cli.add_command(send)
cli.add_command(receive)
cli.add_command(browse)
cli.add_command(queue)


@cli.command()
@click.argument("config", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--name", help="Name of the broker, shown in status.")
@click.option(
    "--data", "data_dir", type=click.Path(path_type=Path), help="Directory of the store; without it: in memory."
)
@click.option(
    "--listen",
    multiple=True,
    metavar="URL",
    help="stomp://HOST:PORT, or pybroker://HOST:PORT (the native protocol); with TLS stomp+ssl://HOST:PORT?cert=F&key=F.",
)
@click.option("--user", "users", multiple=True, metavar="NAME:PASSWORD", help="A user who may connect; repeatable.")
@click.option("--anonymous/--no-anonymous", default=None, help="Whether a login is not needed.")
@replica_set_flags
@network_flags
@click.option("--log-level", type=LOG_LEVEL, default="INFO", show_default=True, help="Of the log on stderr.")
def serve(
    config: Path | None,
    name: str | None,
    data_dir: Path | None,
    listen: tuple[str, ...],
    users: tuple[str, ...],
    anonymous: bool | None,
    log_level: str,
    replica_set: dict[str, Any],
    network: dict[str, Any],
) -> None:
    """Run a broker until SIGTERM. CONFIG is a TOML file of the same fields; flags go before it.

    With --zookeeper and --set (or a table replica_set in CONFIG) it is a member of a replica set, and opens its
    listeners while it leads. With --discovery or --peer (or a table network in CONFIG) it is linked with other brokers,
    and needs a --listen pybroker://HOST:PORT for their links.
    """
    logging.basicConfig(level=log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    overrides: dict[str, Any] = {"name": name, "data_dir": data_dir, "anonymous": anonymous, "listen": listen or None}
    overrides["users"] = dict(map(_user, users)) or None
    overrides["replica_set"] = replica_set or None
    overrides["network"] = network or None
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if config is None:
        check_flags(replica_set)
        chosen = make_config(None, **overrides)
    else:  # together: what a field of the file means may depend on a flag
        chosen = load_config(config, **overrides)
    if not chosen.listen:
        chosen = make_config(chosen, listen=[DEFAULT_URL])
    # A broker makes few cycles and many long-lived objects: collecting as often as by default costs 7 % (measured).
    gc.set_threshold(50_000, 20, 50)
    trio.run(_serve, chosen)


def _user(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not colon or not name:
        raise click.BadParameter("--user must look like NAME:PASSWORD")
    return name, hash_password(password)


async def _serve(config: BrokerConfig) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with open_broker(config) as broker:
            if config.replica_set is None:
                _print_listeners(broker)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_print_roles, broker)
                async for number in signals:
                    logging.getLogger("pybroker").info("%s: stopping", signal.Signals(number).name)
                    break
                nursery.cancel_scope.cancel()


async def _print_roles(broker: Broker) -> None:
    async for role, epoch in broker.roles():
        print(f"role {role} epoch {epoch}", flush=True)
        if role == LEADER:  # who is called so has opened its listeners
            _print_listeners(broker)


def _print_listeners(broker: Broker) -> None:
    for url in broker.listeners:
        print(f"listening {url}", flush=True)


@cli.command()
@click.option("--data", "data_dir", required=True, type=click.Path(path_type=Path), help="The broker's data directory.")
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
def status(data_dir: Path, as_json: bool) -> None:
    """Show what the broker that runs on a data directory has."""
    answer = ask(data_dir, "status")
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    console = make_console()
    for key in (
        "name",
        "role",
        "epoch",
        "lsn",
        "connections",
        "memory_bytes",
        "stored_bytes",
        "spooled_bytes",
        "scheduled",
        "scheduled_corrupt",
    ):
        console.print(f"{key}: {answer[key]}", highlight=False)
    for url in answer["listeners"]:
        console.print(f"listener: {url}", highlight=False)
    if answer["full"]:
        console.print(f"[red]full: {answer['full']}")
    columns = ("kind", "name", "depth", "outstanding", "consumers", "enqueued", "acknowledged", "redelivered")
    table = Table(*columns, "dead-lettered", "expired", "corrupt")
    for row in sorted(answer["destinations"], key=lambda row: (row["kind"], row["name"])):
        name = f"{row['name']} ({row['subscription']})" if row["subscription"] else row["name"]
        shown = [row["kind"], name] + [str(row[key]) for key in columns[2:]]
        table.add_row(*shown, str(row["dead_lettered"]), str(row["expired"]), str(row["corrupt"]))
    console.print(table)


@cli.command("hash-password")
@click.option("--password", prompt=True, hide_input=True, confirmation_prompt=True)
def hash_password_command(password: str) -> None:
    """Make the hash of a password for the configuration's users."""
    print(hash_password(password))


@cli.group()
def store() -> None:
    """Look after a store that no broker has open."""


@store.command("verify")
@click.argument("directory", type=click.Path(path_type=Path))
def store_verify(directory: Path) -> None:
    """Check every key and value of the store in DIRECTORY. The exit status is 1 when something is wrong."""
    _show_report(verify(directory, _progress("checked")))


@store.command("salvage")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("new_directory", type=click.Path(path_type=Path))
def store_salvage(directory: Path, new_directory: Path) -> None:
    """Copy what is whole in DIRECTORY to NEW_DIRECTORY. The exit status is 1 when something was left behind."""
    _show_report(salvage(directory, new_directory, _progress("read")))


def _progress(verb: str) -> Any:
    if not sys.stderr.isatty():
        return None
    return lambda keys: print(f"\r{keys:,} keys {verb}", end="", file=sys.stderr, flush=True)


def _show_report(report: Report) -> None:
    console = make_console()
    if sys.stderr.isatty():
        print(file=sys.stderr)
    console.print(f"store {report.store_id or '(unknown)'} at {report.path}", highlight=False)
    console.print(
        f"started {report.starts} times, position {report.position}, {report.keys:,} keys, {report.bytes:,} bytes",
        highlight=False,
    )
    table = Table("kind", "name", "messages", "bytes", "found", "found bytes")
    for row in report.queues:
        name = f"{row.name} ({row.client_id}/{row.subscription})" if row.subscription else row.name
        table.add_row(row.kind, name, *(f"{n:,}" for n in (row.count, row.size, row.found_count, row.found_size)))
    console.print(table)
    if report.schedules:
        console.print(f"scheduled messages: {report.schedules:,}", highlight=False)
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red", highlight=False)
    if report.problem_count > len(report.problems):
        console.print(f"... and {report.problem_count - len(report.problems):,} more", style="red")
    for note in report.notes:
        console.print(f"note: {note}", highlight=False)
    if report.new_path is not None:
        console.print(f"new data directory: {report.new_path}", highlight=False)
    console.print("nothing is wrong" if report.ok else f"{report.problem_count:,} problems", highlight=False)
    if not report.ok:
        sys.exit(1)


def main() -> None:
    """The entry point: an error of ours is one line on stderr and exit status 1."""
    try:
        cli(prog_name="pybroker")
    except* BrokerError as group:
        sys.exit(f"pybroker: {single(group)}")
