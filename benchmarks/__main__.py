"""The command line of the suite: ``python -m benchmarks [CASE ...] [--json FILE] [--quick] [--list]``.

Runs the cases one after another, prints one table, keeps everything as JSON. Exit status: 0 when every case ran and
every target was met, 1 when a target was missed, 2 when a case could not be measured.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from benchmarks import (
    choosing,
    deep,
    embedded,
    failover,
    hostile,
    idle,
    latency,
    machine,
    native,
    network,
    replication,
    report,
    schedules,
    selectors,
    throughput,
)
from benchmarks.processes import KINDS, raise_file_limit
from benchmarks.report import Row
from benchmarks.settings import NotMeasurable, Settings

Case = Callable[[Settings], Iterator[Row]]
CASES: dict[str, Case] = {
    "stomp": throughput.run,
    "inprocess": embedded.run,
    "deep": deep.run,
    "latency": latency.run,
    "idle": idle.run,
    "failover": failover.run,
    "replication": replication.run,
    "native": native.run,
    "network": network.run,
    "schedules": schedules.run,
    "selectors": selectors.run,
    "choosing": choosing.run,
    "hostile": hostile.run,
}
ROUNDS = 3
ROUND_SECONDS = 4.0
FILES_WANTED = 8_192  # file descriptors: the idle connections of one server and something to spare
DISTURBED_CORES = 0.15  # cores used by other work from which on figures are called disturbed
TABLE_WIDTH_MIN = 190  # when the output is no terminal


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the broker on this machine.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"any of {', '.join(CASES)}; all without one")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all figures in this file")
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it works, not how fast it is")
    parser.add_argument("--directory", type=Path, help="where temporary stores are made; must be on a disk")
    parser.add_argument("--rounds", type=int, default=0, help=f"turns of server and trial ({ROUNDS})")
    parser.add_argument("--seconds", type=float, default=0.0, help=f"seconds one round sends ({ROUND_SECONDS:g})")
    parser.add_argument("--distinct", action="store_true", help="stomp: headers of its own for each message")
    parser.add_argument("--server", choices=KINDS, default="broker", help="what is measured; `trial` tests the suite")
    options = parser.parse_args()
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    options.directory = options.directory or machine.default_directory()
    if not options.directory.is_dir():
        parser.error(f"{options.directory} is not a directory")
    if machine.file_system(options.directory) in machine.MEMORY_FILE_SYSTEMS:
        parser.error(f"{options.directory} is not on a disk: name one with --directory")
    return options


def main() -> int:
    """Run, print, keep."""
    options = parse()
    if options.list:
        for name, case in CASES.items():
            print(f"{name:12}{(sys.modules[case.__module__].__doc__ or '').partition(chr(10))[0]}")
        return 0
    # A terminated suite must stop its servers too: SIGTERM becomes an exception that unwinds them.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raise_file_limit(FILES_WANTED)
    progress = Console(stderr=True, highlight=False)
    settings = Settings(
        server=KINDS[options.server],
        directory=options.directory,
        quick=options.quick,
        rounds=options.rounds or (1 if options.quick else ROUNDS),
        seconds=options.seconds or (0.5 if options.quick else ROUND_SECONDS),
        distinct=options.distinct,
        say=lambda text: progress.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {text}"),
    )
    about = machine.describe(options.directory)
    rows: list[Row] = []
    failures: dict[str, str] = {}
    others: dict[str, float] = {}
    for name in options.cases or CASES:
        meter = machine.OthersMeter()
        try:
            rows.extend(CASES[name](settings))
        except NotMeasurable as error:
            failures[name] = str(error)
            progress.print(f"{name} is skipped: {error}", style="yellow", markup=False)
        except Exception as error:  # one case that fails must not cost the figures of the others
            failures[name] = f"{type(error).__name__}: {error}"
            progress.print(f"{name} failed: {failures[name]}", style="red", markup=False)
        others[name] = meter.cores()
    about["cores_used_by_others"] = others
    console = Console()
    report.show(rows, about, console if console.is_terminal else Console(width=max(console.width, TABLE_WIDTH_MIN)))
    disturbed = [f"{name} {cores:.2f}" for name, cores in others.items() if cores > DISTURBED_CORES]
    if disturbed:
        console.print(
            f"Other work on this machine used so many cores meanwhile: {', '.join(disturbed)}. Measure again."
        )
    if options.quick:
        console.print("These are the small sizes of --quick: they judge nothing.")
    if options.json:
        report.write_json(options.json, rows, about, sys.argv, failures)
    if failures:
        return 2
    return 0 if options.quick or all(row.met is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
