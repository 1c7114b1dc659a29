"""Replay seeds, with what happened printed: ``python -m tests.sim SEED [SEED ...]``; ``--from N --count M`` runs many, in short.

With ``--network`` they are seeds of networks of sets.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

import trio

from tests.sim import faults, net_faults
from tests.sim.checkers import Violation

SLOW = 2.0  # seconds of processor time for one run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("seeds", nargs="*")
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--digest", action="store_true", help="print only the digest of each seed's trace")
    parser.add_argument("--network", action="store_true", help="networks of sets instead of one set")
    arguments = parser.parse_args()
    simulate = net_faults.simulate if arguments.network else faults.simulate
    if arguments.digest:
        for seed in arguments.seeds:
            print(simulate(seed).digest)
        return 0
    say = print if arguments.seeds else None
    total: Counter[str] = Counter()
    failed = 0
    began = time.process_time()
    seeds = arguments.seeds or [str(number) for number in range(arguments.first, arguments.first + arguments.count)]
    for seed in seeds:
        started = time.process_time()
        try:
            result = simulate(seed, say)
        except Violation as violation:
            failed += 1
            print(f"seed {seed}: {violation}")
            if violation.__cause__ is not None:
                traceback.print_exception(violation.__cause__)
        except trio.TrioInternalError as error:
            failed += 1
            print(f"seed {seed}: {error.__cause__!r}")
        else:
            total.update(result.counts)
        if time.process_time() - started > SLOW:
            print(f"seed {seed} took {time.process_time() - started:.1f} s")
    print(f"{len(seeds)} runs, {failed} failed, {time.process_time() - began:.1f} s of processor time")
    for what, count in sorted(total.items()):
        print(f"  {count:8} {what}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
