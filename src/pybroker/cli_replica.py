"""Replica sets on the command line: the flags of ``serve``, and ``pybroker replica``. Owns options and output only.

Each flag is one field of `ReplicaSetConfig`. The commands ask the replica that runs on a data directory of this machine over
its control socket; what they do is in `pybroker.cluster`, what may be lost by it is said here.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
from rich.table import Table
from rich.text import Text

from pybroker.cli_output import make_console
from pybroker.config import ReplicaSetConfig
from pybroker.control import UNKNOWN_COMMAND, ask
from pybroker.errors import BrokerError, ConfigurationError

SYNC_MODES = get_args(get_type_hints(ReplicaSetConfig)["sync"])
STATUS = "replica-status"
STATUS_KEYS = (
    "set",
    "name",
    "role",
    "epoch",
    "leader",
    "clients",
    "zookeeper",
    "blocked",
    "position",
    "sync",
    "members",
)
MEMBER_KEYS = ("name", "role", "counted", "position", "lag", "state", "address")
LEADER, CANDIDATE = "leader", "candidate"

# Flag of `serve`, the field that it is, and how click reads it.
FLAGS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (
        "--zookeeper",
        "zookeeper",
        {"metavar": "HOSTS", "help": "HOST:PORT[,HOST:PORT...][/CHROOT]: join a replica set."},
    ),
    ("--set", "name", {"metavar": "NAME", "help": "Name of the replica set, the same at all its members."}),
    ("--replicas", "replicas", {"type": int, "metavar": "N", "help": "How many copies the set has, odd."}),
    ("--replication", "bind", {"metavar": "HOST:PORT", "help": "Where to listen for the other replicas."}),
    ("--advertise", "advertise", {"metavar": "HOST:PORT", "help": "Where they reach this one, if not there."}),
    ("--sync", "sync", {"type": click.Choice(SYNC_MODES), "help": "What a confirmed send is worth."}),
    ("--session-timeout", "session_timeout", {"type": float, "metavar": "SECONDS", "help": "Of ZooKeeper's session."}),
    ("--weight", "weight", {"type": int, "metavar": "N", "help": "Of equally good candidates the heavier one leads."}),
    ("--secret-file", "secret", {"metavar": "FILE", "help": "File with the secret that all members share."}),
    ("--client-url", "clients", {"multiple": True, "metavar": "URL", "help": "Where clients reach it; repeatable."}),
)
NAME_OF_FLAG = {field: flag for flag, field, _ in FLAGS}


def replica_set_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Add the flags; the command gets those that were given as one mapping of fields, `replica_set`."""

    @functools.wraps(command)
    def with_fields(*arguments: Any, **options: Any) -> None:
        given = {field: options.pop(f"replica_set_{field}") for _, field, _ in FLAGS}
        fields = {field: value for field, value in given.items() if value is not None and value != ()}
        if "secret" in fields:
            fields["secret"] = _read_secret(Path(fields["secret"]))
        command(*arguments, replica_set=fields, **options)

    decorated: Callable[..., None] = with_fields
    for flag, field, how in reversed(FLAGS):
        decorated = click.option(flag, f"replica_set_{field}", **how)(decorated)
    return decorated


def check_flags(fields: Mapping[str, Any]) -> None:
    """Refuse flags that make no set by themselves: told by their names, before the fields are."""
    if not fields:
        return
    missing = [f"{NAME_OF_FLAG[field]} (replica_set.{field})" for field in ("zookeeper", "name") if field not in fields]
    if missing:
        given = NAME_OF_FLAG[next(iter(fields))]
        raise ConfigurationError(f"{given} is for a member of a replica set, which needs {' and '.join(missing)} too")


def _read_secret(file: Path) -> str:
    try:
        secret = file.read_text().strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigurationError(f"--secret-file {file} can't be read: {reason}") from None
    if not secret:
        raise ConfigurationError(f"--secret-file {file} is empty")
    return secret


# --- pybroker replica --------------------------------------------------------------------------------------------


@click.group()
def replica() -> None:
    """Look after the replica that runs on a data directory of this machine."""


_data = click.option(
    "--data", "data_dir", required=True, type=click.Path(path_type=Path), help="The replica's data directory."
)


@replica.command("status")
@_data
@click.option("--json", "as_json", is_flag=True, help="The whole answer as JSON.")
def replica_status(data_dir: Path, as_json: bool) -> None:
    """Show what a replica is, and what it sees of its set."""
    answer = _ask_status(data_dir)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    console = make_console()
    clients = ", ".join(answer["clients"])
    lines = {
        "set": answer["set"],
        "name": answer["name"],
        "role": answer["role"],
        "epoch": answer["epoch"],
        "position": _position(answer["position"]),
        "leader": (answer["leader"] or "none known") + (f" (clients at {clients})" if clients else ""),
        "sync": answer["sync"],
        "zookeeper": answer["zookeeper"],
    }
    for key, value in lines.items():
        console.print(Text(f"{key}: {value}"))
    if answer["blocked"]:
        console.print(Text(f"blocked: {answer['blocked']}", style="red"))
    table = Table(*MEMBER_KEYS)
    for member in answer["members"]:
        row = (
            member["name"],
            member["role"],
            "yes" if member["counted"] else "no",
            _position(member["position"]),
            "-" if member["lag"] is None else f"{member['lag']:,}",
            member["state"],
            member["address"],
        )
        table.add_row(*map(Text, row))
    console.print(table)


@replica.command()
@_data
def handover(data_dir: Path) -> None:
    """Let another replica lead: of the others, the one that has the most. Nothing is lost, clients connect again."""
    before = _ask_status(data_dir)
    own, name = before["name"], before["set"]
    if before["role"] != LEADER:
        leader = before["leader"]
        who = f"replica {leader} does: ask there" if leader and leader != own else "no leader is known"
        raise BrokerError(f"replica {own} does not lead set {name}, {who}")
    after = _ask(data_dir, "replica-handover")
    leader = after["leader"]
    if leader is None or leader == own:
        raise BrokerError(f"no other replica of set {name} has taken over: {_seen(after)}")
    print(f"replica {own} has handed set {name} over to {leader} (epoch {after['epoch']})")


@replica.command()
@_data
@click.argument("old")
@click.argument("new")
def replace(data_dir: Path, old: str, new: str) -> None:
    """Let replica NEW take the place of OLD, whose copy is gone for good. Ask the replica that leads.

    OLD does not count any more, from now on; NEW counts as soon as it holds everything.
    """
    after = _ask(data_dir, "replica-replace", old=old, new=new)
    print(f"replica {new} takes the place of {old} in set {after['set']}: it counts once it holds everything")


@replica.command("force-start")
@_data
@click.option("--yes", is_flag=True, help="Don't ask.")
def force_start(data_dir: Path, yes: bool) -> None:
    """Start a set whose ZooKeeper data is gone with the replicas that are there. What only the absent ones have is lost."""
    before = _ask_status(data_dir)
    own, name = before["name"], before["set"]
    if before["leader"]:
        raise BrokerError(f"set {name} has a leader, {before['leader']}: there is nothing to force")
    for line in _what_force_means(before):
        print(line)
    if not yes:
        click.confirm(f"Start set {name} with what is there?", abort=True)
    after = _ask(data_dir, "replica-force-start")
    print(f"replica {after['leader'] or own} leads set {name} (epoch {after['epoch']})")


def _what_force_means(status: Mapping[str, Any]) -> list[str]:
    standing = [member["name"] for member in status["members"] if member["role"] == CANDIDATE]
    absent = [member["name"] for member in status["members"] if member["role"] != CANDIDATE]
    lines = [f"set {status['set']} has no leader" + (f": {status['blocked']}" if status["blocked"] else "")]
    if standing:
        lines.append(f"standing for election: {', '.join(standing)}")
    if absent:
        lines.append(f"absent: {', '.join(absent)}")
    lines.append(
        "A forced start goes on with the best copy of those that stand. What only the absent replicas have is lost for good: "
        "messages that were confirmed may be gone, and some that were acknowledged may come again. When the absent ones come "
        "back they are filled anew. If they can still be started, start them instead."
    )
    return lines


def _seen(status: Mapping[str, Any]) -> str:
    leader = f"{status['leader']} leads" if status["leader"] else "no leader is known"
    return f"{leader} (epoch {status['epoch']}){': ' if status['blocked'] else ''}{status['blocked']}"


def _position(position: list[int] | None) -> str:
    return "-" if position is None else ":".join(map(str, position))


def _ask_status(data_dir: Path) -> dict[str, Any]:
    answer: dict[str, Any] = _ask(data_dir, STATUS)
    missing = [key for key in STATUS_KEYS if key not in answer]
    missing += [key for member in answer.get("members", ()) for key in MEMBER_KEYS if key not in member]
    if missing:
        raise BrokerError(f"the replica at {data_dir} says nothing of its {missing[0]}: is it of another version?")
    return answer


def _ask(data_dir: Path, command: str, **arguments: str) -> Any:
    try:
        return ask(data_dir, command, **arguments)
    except BrokerError as error:
        if error.code == UNKNOWN_COMMAND:
            raise BrokerError(f"the broker that runs on {data_dir} is not a member of a replica set") from None
        raise
