"""The network of brokers on the command line: the flags of ``serve``, and ``pybroker network``. Owns options and output only.

Each flag is one field of `NetworkConfig`. The commands ask the broker that runs on a data directory of this machine over its
control socket.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pybroker.cli_output import make_console
from pybroker.control import UNKNOWN_COMMAND, ask
from pybroker.errors import BrokerError
from pybroker.network_status import LINKED, NetworkStatus, PeerStatus

STATUS = "network-status"
REMOVE = "network-remove"
COLUMNS = (
    *("peer", "state", "address", "for", "demand in", "demand out", "waiting", "in doubt"),
    *("forwarded", "rejected", "received", "repeats"),
)
NUMBERS = COLUMNS[4:]

# Flag of `serve`, the field that it is, and how click reads it.
FLAGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "--discovery",
        "discovery",
        {"metavar": "URL", "help": "multicast://ADDR:PORT?group=G&interface=IP: find other brokers, and be found."},
    ),
    (
        "--peer",
        "peers",
        {"multiple": True, "metavar": "URL", "help": "pybroker[+ssl]://HOST:PORT[,...] to link with; repeatable."},
    ),
    ("--network-name", "name", {"metavar": "NAME", "help": "In the network; if not given, the set's or the broker's."}),
    ("--network-group", "group", {"metavar": "NAME", "help": "Brokers link only with those of their own group."}),
)


def network_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags; the command gets those that were given as one mapping of fields, `network`."""

    @functools.wraps(command)
    def with_fields(*arguments: Any, **options: Any) -> None:
        given = {field: options.pop(f"network_{field}") for _, field, _ in FLAGS}
        fields = {field: value for field, value in given.items() if value is not None and value != ()}
        command(*arguments, network=fields, **options)

    decorated: Callable[..., None] = with_fields
    for flag, field, how in reversed(FLAGS):
        decorated = click.option(flag, f"network_{field}", **how)(decorated)
    return decorated


# --- pybroker network --------------------------------------------------------------------------------------------


@click.group()
def network() -> None:
    """Look after the network of the broker that runs on a data directory of this machine."""


_data = click.option(
    "--data", "data_dir", required=True, type=click.Path(path_type=Path), help="The broker's data directory."
)


@network.command("status")
@_data
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
def network_status(data_dir: Path, as_json: bool) -> None:
    """Show the brokers that this one is linked with, or knows, and what is on its way to them."""
    answer = _ask(data_dir, STATUS)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    status = _read(data_dir, answer)
    console = make_console()
    if status.name:
        console.print(f"broker {status.name}, group {status.group}", markup=False, highlight=False)
    else:
        console.print("this broker is in no network", markup=False)
    table = Table(*COLUMNS[:4])
    for name in NUMBERS:
        table.add_column(name, justify="right")
    for peer in status.peers:
        state = Text(peer.state, style="green" if peer.state == LINKED else "yellow")
        counts = (peer.demand_in, peer.demand_out, peer.waiting, peer.in_doubt)
        counters = (peer.forwarded, peer.rejected, peer.received, peer.repeats)
        numbers = (f"{number:,}" for number in (*counts, *counters))
        table.add_row(Text(peer.name or "?"), state, Text(peer.address), _duration(peer.seconds), *numbers)
    if status.peers:
        console.print(table)
    for peer in status.peers:
        if peer.trouble:
            console.print(Text(f"{peer.name or peer.address}: {peer.trouble}", style="yellow"))
    if status.at_hop_limit:
        console.print(
            f"{status.at_hop_limit:,} messages are at their hop limit (network.hops_max) and stay until they are consumed here"
        )
    if status.dropped:
        console.print(f"{status.dropped:,} copies of topic messages were dropped: nobody reaches who they were for")


@network.command()
@click.argument("peer")
@_data
def remove(peer: str, data_dir: Path) -> None:
    """Forget the broker PEER, which will not come back. What was on its way to it returns to its queues.

    These messages are marked as redelivered: PEER may have had them, and if it comes back they may be there twice.
    """
    count = _ask(data_dir, REMOVE, peer=peer)
    print(f"peer {peer} is forgotten; messages that were on their way to it and return to their queues: {count:,}")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _read(data_dir: Path, answer: Any) -> NetworkStatus:
    """The status that a broker has told. Raises BrokerError where it tells something else."""
    try:
        peers = tuple(
            PeerStatus(**{field.name: peer[field.name] for field in fields(PeerStatus)}) for peer in answer["peers"]
        )
        own = {field.name: answer[field.name] for field in fields(NetworkStatus) if field.name != "peers"}
        return NetworkStatus(**own, peers=peers)
    except (KeyError, TypeError) as error:
        raise BrokerError(f"the broker at {data_dir} says nothing of {error}: is it of another version?") from None


def _ask(data_dir: Path, command: str, **arguments: str) -> Any:
    try:
        return ask(data_dir, command, **arguments)
    except BrokerError as error:
        if error.code == UNKNOWN_COMMAND:
            raise BrokerError(f"the broker that runs on {data_dir} is of a version that knows no network") from None
        raise
