"""The demonstration that ``make demo`` runs: brokers are killed while they work, and nothing is lost.

Where ZooKeeper can run: three replicas (``pybroker serve``) and an ensemble of three ZooKeeper servers of their own; under load
the leader is killed with SIGKILL, later the next one is asked to stop. Else, or with ``--single``: one broker, killed in the
middle and started again on its store. A producer and a consumer (each a process of its own that talks STOMP through
stomp.py) go on through it. At the end the dead-letter queue is emptied, and what arrived is compared with what must have
arrived, which is computed here. Exit status 0 only if every promise held.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from demo_account import Account
from demo_programs import HERE, DemoFailed
from demo_set import SetRun, run_set
from demo_single import run_single
from demo_stage import Stage
from demo_tables import show_account, show_set
from hl7_messages import make_messages

if TYPE_CHECKING:
    from tests.support.zookeeper import Ensemble

SERVERS = 3


def what_is_missing() -> str:
    """What keeps ZooKeeper from running here; empty when nothing does."""
    sys.path.append(str(HERE.parent))
    try:
        from tests.support.zookeeper import missing
    except ImportError as error:
        return f"the Python module {error.name} is not here (pip install --editable '.[test]')"
    return missing()


def launch_zookeeper(stack: ExitStack) -> Ensemble:
    """Start the servers, without waiting for them."""
    from tests.support.zookeeper import Ensemble

    ensemble = Ensemble(SERVERS)
    stack.callback(ensemble.close)
    for server in ensemble.servers:
        ensemble.launch(server)
    return ensemble


def prepare_set(stage: Stage, ensemble: Ensemble, directory: Path) -> SetRun:
    from tests.support.zookeeper import free_ports

    ensemble.wait_ready()
    stage.say(f"{SERVERS} ZooKeeper servers are ready at {ensemble.addresses}")
    return run_set(stage, directory, ensemble.addresses, free_ports(3))


def carried_out(run: Callable[[], object]) -> list[str]:
    """Run it; what it could not do."""
    try:
        run()
    except DemoFailed as error:
        return [str(error)]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--single", action="store_true", help="one broker, also where ZooKeeper can run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2_000, help="messages")
    parser.add_argument("--deadline", type=float, default=180.0, help="seconds for everything")
    # not the system's place for temporary files: that is often kept in memory, and survives nothing
    parser.add_argument("--directory", type=Path, default=HERE.parent / "build", help="where the stores are made")
    arguments = parser.parse_args()
    console = Console()
    started = time.monotonic()
    missing = "" if arguments.single else what_is_missing()
    if missing:
        console.print(f"[yellow]no replica set can be shown:[/yellow] {missing}", highlight=False, soft_wrap=True)
        console.print("so here is the demonstration with one broker", highlight=False)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-", dir=arguments.directory)))
        ensemble = None if missing or arguments.single else launch_zookeeper(stack)
        account = Account(list(make_messages(arguments.seed, arguments.count)))
        stage = Stage(account, arguments.seed, arguments.deadline, console, started)
        if ensemble is None:
            faults = carried_out(lambda: run_single(stage, directory))
        else:
            run = prepare_set(stage, ensemble, directory)
            faults = carried_out(run.run) + run.faults()
            show_set(run, console)
    show_account(account, console)
    faults += account.faults()
    for fault in faults:
        console.print("[red]broken:[/red]", end=" ")
        console.print(fault, highlight=False, markup=False, soft_wrap=True)
    if not faults:
        console.print("[green]every promise held[/green]: nothing lost, nothing corrupted, nothing unexpected")
    console.print(f"{time.monotonic() - started:.1f} seconds", highlight=False)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
