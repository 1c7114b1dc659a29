"""Masters of real sets fail while messages are forwarded: killed, stopped, cut; and so do the ways between sets.

What is shown each time is in `trial.py`: of everything confirmed nothing is lost, nothing is stored twice, nothing is delivered
that was not sent; and the links come back by themselves. DESIGN.md sections 6 and 7.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.network_real.conftest import Begin
from tests.network_real.figures import note
from tests.network_real.sets import Sets
from tests.network_real.trial import Trial

pytestmark = pytest.mark.slow

PAST_HEARTBEATS = 2.5  # seconds: longer than a lease, and than a silent link lives


def flows_again(running: Trial) -> None:
    """Messages are confirmed in both sets, and go both ways between them."""
    running.sets.wait_joined()
    running.wait_confirming()
    running.wait_received("south", "north")
    running.wait_received("north", "south")


def host_of(sets: Sets, site: str) -> str:
    """The name of the host of a set's master."""
    return f"{site}-{sets.master(site).name}"


def test_masters_are_killed(tmp_path: Path, begin: Begin):
    """Of one set, of both at once, and a whole set."""
    with begin(tmp_path) as running:
        for sites in (["south"], ["north", "south"]):
            masters = {site: running.sets.master(site) for site in sites}
            running.wait_confirming()
            began = time.monotonic()
            for master in masters.values():
                master.kill()
            for site, master in masters.items():
                running.sets.failed_over(site, master)
            running.wait_received("south", "north")
            running.wait_received("north", "south")
            what = " and ".join(sites)
            note(f"kill -9 of the master of {what}: forwarding goes on within {time.monotonic() - began:.1f} s")
            for master in masters.values():
                master.start()
        running.sets.wait_joined()
        for member in running.sets["south"].members:
            member.kill()
        running.wait_confirming("p-pulse", "p-found")
        for member in running.sets["south"].members:
            member.start()
        flows_again(running)
        running.settle()


def test_masters_are_stopped_and_cut(tmp_path: Path, begin: Begin):
    """A master that sleeps past its lease and wakes up, one that reaches nobody, one that reaches all but its followers."""
    with begin(tmp_path) as running:
        sets, network = running.sets, running.network
        for site in ("north", "south"):
            sleeper = sets.master(site)
            sleeper.pause()
            sets.failed_over(site, sleeper)
            running.hold(PAST_HEARTBEATS)
            running.wait_confirming()
            sleeper.resume()
            flows_again(running)
        for site in ("north", "south"):
            alone = sets.master(site)
            network.unplug(host_of(sets, site))
            sets.failed_over(site, alone)
            running.wait_confirming()
            network.heal()
            flows_again(running)
        for site in ("north", "south"):
            deposed = sets.master(site)
            host = host_of(sets, site)
            network.cut([host], [other for other in sets.hosts(site) if other != host])
            sets.failed_over(site, deposed)
            running.wait_confirming()
            network.heal()
            flows_again(running)
        running.settle()


def test_the_way_between_two_sets_is_cut(tmp_path: Path, begin: Begin):
    """Both ways, and one way only, in silence; both sets serve on, and what is in doubt waits for the way to come back."""
    with begin(tmp_path) as running:
        sets, network = running.sets, running.network
        north, south = sets.hosts("north"), sets.hosts("south")
        for ways in ([(north, south), (south, north)], [(north, south)]):
            roles = {site: sets.master(site).roles for site in ("north", "south")}
            for senders, receivers in ways:
                for sender in senders:
                    network.cut_one_way(sender, receivers)
            sets.wait("the link is over", lambda: not sets.is_joined())
            running.hold(PAST_HEARTBEATS)
            running.wait_confirming()
            network.heal()
            flows_again(running)
            assert roles == {site: sets.master(site).roles for site in roles}, "the sets had no reason to change"
        running.settle()


def test_a_third_set_joins_while_masters_are_killed(tmp_path: Path, begin: Begin):
    """Its members start while the other sets change their masters; then its own master is killed, and then all of it."""
    with begin(tmp_path, ordered=False) as running:
        masters = {site: running.sets.master(site) for site in ("north", "south")}
        for master in masters.values():
            master.kill()
        running.sets.launch("east")
        for site, master in masters.items():
            running.sets.failed_over(site, master)
            master.start()
        running.add_programs("east")
        master = running.sets.master("east")
        running.wait_received("north", "east")
        master.kill()
        running.sets.failed_over("east", master)
        running.wait_received("north", "east")
        master.start()
        running.sets.wait_joined()
        for member in running.sets["east"].members:
            member.kill()
        running.wait_confirming()
        for member in running.sets["east"].members:
            member.start()
        flows_again(running)
        running.wait_received("north", "east")
        running.settle()
