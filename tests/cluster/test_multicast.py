"""UDP multicast for real: on loopback, several in one host; and between hosts that are network namespaces at a bridge."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from pybroker.cluster.announcements import DATAGRAM_BYTES_MAX, Reason
from pybroker.cluster.announcer import Announcer, listen_for_peers
from pybroker.cluster.discovery import Discovery
from pybroker.cluster.multicast import Multicast
from pybroker.cluster.peers import PeerTable, Snapshot
from tests.ensemble.namespaces import Namespaces, namespaces

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 20.0  # seconds; a loaded machine takes its time


@pytest.fixture
def discovery() -> Discovery:
    """On 127.0.0.1, at a port that nobody has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return Discovery(port=probe.getsockname()[1], interface="127.0.0.1")


def announcer(discovery: Discovery, name: str, port: int = 1, *, group: str | None = None) -> Announcer:
    return Announcer(
        discovery, name=name, node=name, epoch=0, urls=[f"pybroker://127.0.0.1:{port}"], group=group, interval=0.1
    )


async def until(table: PeerTable, names: str) -> Snapshot:
    """Wait until these, and no others, are known."""
    with trio.fail_after(TIMEOUT):
        snapshot = table.snapshot()
        while set(snapshot.peers) != set(names):
            snapshot = await table.wait_change(snapshot.version)
    return snapshot


# ---- sockets


async def test_all_places_of_a_host_hear_what_one_says(discovery: Discovery):
    places = [Multicast(discovery, listen=True) for _ in range(3)]
    try:
        with trio.fail_after(TIMEOUT):
            for data in (b"one", b"", b"x" * DATAGRAM_BYTES_MAX):
                await places[1].send(data)
                assert [await place.receive() for place in places] == [data] * 3
            await places[0].send(b"y" * 2_000)
            assert [len(await place.receive()) for place in places] == [DATAGRAM_BYTES_MAX + 1] * 3
    finally:
        for place in places:
            place.close()
            place.close()


async def test_other_addresses_and_ports_are_not_heard(discovery: Discovery):
    ours = Multicast(discovery, listen=True)
    others = [
        Multicast(discovery._replace(address="239.255.2.4"), listen=True),
        Multicast(discovery._replace(port=discovery.port - 1), listen=True),
    ]
    try:
        with trio.fail_after(TIMEOUT):
            for other in others:
                await other.send(b"theirs")
                assert await other.receive() == b"theirs"
            await ours.send(b"ours")
            assert await ours.receive() == b"ours"
    finally:
        for place in (ours, *others):
            place.close()


def test_the_time_to_live_is_one(discovery: Discovery):
    async def run() -> int:
        place = Multicast(discovery, listen=True)
        try:
            return place._sender.getsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL)  # type: ignore[return-value]
        finally:
            place.close()

    assert trio.run(run) == 1


@pytest.mark.parametrize("interface", ["198.51.100.1", "255.255.255.255"])  # no machine has the first (RFC 5737)
@pytest.mark.parametrize("listen", [True, False])
async def test_an_interface_that_is_not_there_is_an_oserror_and_leaves_no_socket(interface: str, listen: bool):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        Multicast(Discovery(interface=interface), listen=listen)
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_closed_place_ends_who_waits(discovery: Discovery):
    place = Multicast(discovery, listen=True)
    ended = trio.Event()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await place.receive()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        place.close()
        with trio.fail_after(TIMEOUT):
            await ended.wait()


# ---- in one host


async def test_brokers_of_one_host_see_each_other_come_and_go(discovery: Discovery):
    tables = [PeerTable(timeout=5.0) for _ in range(2)]
    async with trio.open_nursery() as nursery:
        for table in tables:
            await nursery.start(partial(listen_for_peers, discovery, table))
        scopes = {name: trio.CancelScope() for name in "abc"}

        async def run(name: str) -> None:
            with scopes[name]:
                await announcer(discovery, name).run()

        for name in "abc":
            nursery.start_soon(run, name)
        for table in tables:
            snapshot = await until(table, "abc")
            assert snapshot.peers["a"].urls == ("pybroker://127.0.0.1:1",)
        scopes["b"].cancel()
        began = trio.current_time()
        for table in tables:
            await until(table, "ac")
        assert trio.current_time() - began < 4  # by its last word, not by expiry
        late = PeerTable()
        await nursery.start(partial(listen_for_peers, discovery, late))
        await until(late, "ac")
        nursery.cancel_scope.cancel()


async def test_two_groups_on_one_address(discovery: Discovery):
    one, two = PeerTable(), PeerTable()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(listen_for_peers, discovery, one, group="one"))
        await nursery.start(partial(listen_for_peers, discovery._replace(group="two"), two))
        nursery.start_soon(announcer(discovery, "a", group="one").run)
        nursery.start_soon(announcer(discovery._replace(group="two"), "b").run)
        await until(one, "a")
        await until(two, "b")
        with trio.fail_after(TIMEOUT):
            while not (one.dropped[Reason.GROUP] and two.dropped[Reason.GROUP]):
                version = one.snapshot().version
                with trio.move_on_after(0.01):
                    await one.wait_change(version)
        assert (set(one.snapshot().peers), set(two.snapshot().peers)) == ({"a"}, {"b"})
        nursery.cancel_scope.cancel()


async def test_a_stop_under_way_still_says_gone(discovery: Discovery):
    """Cancelled from outside, as a broker's own tasks are."""
    table = PeerTable(timeout=60.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(listen_for_peers, discovery, table))
        async with trio.open_nursery() as inner:
            await inner.start(announcer(discovery, "a").run)
            await until(table, "a")
            inner.cancel_scope.cancel()
        await until(table, "")
        nursery.cancel_scope.cancel()


# ---- between hosts


class Speaker:
    """`tests.cluster.speaker` on a host."""

    def __init__(self, network: Namespaces, host: str, options: str, *names: str, secret: str = "") -> None:
        url = f"multicast://239.255.2.3:6155{options}"
        command = [*network.prefix(host), sys.executable, "-m", "tests.cluster.speaker", url, *names]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYBROKER_SECRET": secret},
        )
        self.known: dict[str, list[str]] | None = None  # None until it listens
        self.seen: set[str] = set()  # names that it ever knew
        self._unread = b""
        self._log = b""

    def wait(self, *names: str) -> dict[str, list[str]]:
        """Read until these, and no others, are known; of nobody: until it listens."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + TIMEOUT
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while self.known is None or set(self.known) != set(names):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"it knows {self.known}, not {names}")
                data = os.read(self.process.stdout.fileno(), 65_536)
                assert data, self.process.communicate()[1]
                self._read(data)
        return self.known

    def _read(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            known = self.known = json.loads(line)
            self.seen |= set(known)

    def wait_log(self, text: str) -> None:
        """Read its log until this is in it."""
        assert self.process.stderr is not None
        deadline = time.monotonic() + TIMEOUT
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stderr, selectors.EVENT_READ)
            while text.encode() not in self._log:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(f"it does not say {text!r} but {self._log!r}")
                data = os.read(self.process.stderr.fileno(), 65_536)
                assert data, self._log
                self._log += data

    def terminate(self) -> str:
        """Ask it to stop, and read the rest; what it logged."""
        self.process.terminate()
        output, log = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode == 0, log
        self._read(output)
        return (self._log + log).decode()

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Hosts:
    """Hosts and the speakers on them, which end with the block."""

    def __init__(self, network: Namespaces, stack: contextlib.ExitStack) -> None:
        self.network = network
        self._stack = stack

    def speak(self, host: str, *names: str, options: str | None = None, secret: str = "") -> Speaker:
        chosen = f"?interface={self.network.host(host)}" if options is None else options
        speaker = Speaker(self.network, host, chosen, *names, secret=secret)
        self._stack.callback(speaker.close)
        return speaker

    def set_link(self, host: str, state: str) -> None:
        subprocess.run([*self.network.prefix(host), "ip", "link", "set", "net", state], check=True, timeout=TIMEOUT)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with namespaces("a", "b", "c") as network, contextlib.ExitStack() as stack:
        yield Hosts(network, stack)


@pytest.mark.slow
def test_brokers_of_three_hosts_see_each_other_come_and_go(hosts: Hosts):
    one, two = hosts.speak("a", "one"), hosts.speak("b", "two")
    assert one.wait("two") == {"two": ["pybroker://198.18.0.2:1"]}
    two.wait("one")
    three = hosts.speak("c", "three")
    three.wait("one", "two")
    one.wait("two", "three")
    client = hosts.speak("a")  # on a host with a broker
    client.wait("one", "two", "three")
    two.terminate()
    for other in (one, three, client):
        other.wait(*({"one", "three"} - ({"one"} if other is one else {"three"} if other is three else set())))
    three.process.kill()
    one.wait()
    client.wait("one")


def test_what_is_said_on_loopback_stays_there(hosts: Hosts):
    """Also where both interfaces are joined by programs of one host: each hears its own interface's, and all of those."""
    inside = [hosts.speak("a", name, options="?interface=127.0.0.1") for name in ("first", "second")]
    outside = hosts.speak("a", "outside")
    other = hosts.speak("b", "other")
    for speaker, heard in zip((*inside, outside, other), ("second", "first", "other", "outside"), strict=True):
        speaker.wait(heard)
    other.terminate()
    outside.wait()
    for speaker, heard in zip((*inside, outside, other), ("second", "first", "other", "outside"), strict=True):
        if speaker is not other:
            speaker.terminate()
        assert speaker.seen == {heard}


def test_a_secret_keeps_strangers_out(hosts: Hosts):
    one, two = hosts.speak("a", "one", secret="hunter2"), hosts.speak("b", "two", secret="hunter2")
    stranger = hosts.speak("c", "three", "four", secret="hunter3")
    one.wait("two")
    two.wait("one")
    stranger.wait_log("its signature is wrong")  # it may be the last to listen
    two.wait_log("its signature is wrong")
    one.terminate()
    two.wait()  # and never saw the others
    log = stranger.terminate()
    assert "hunter" not in log


def test_a_host_without_a_way_out_is_told_once_and_comes_in_later(hosts: Hosts):
    """Its link goes down and comes back, under an announcer that runs, and under one that was started meanwhile."""
    one, two = hosts.speak("a", "one"), hosts.speak("b", "two")
    one.wait("two")
    two.wait("one")
    hosts.set_link("b", "down")
    one.wait()
    late = hosts.speak("b", "late")
    lost = hosts.speak("b", options="")  # by the system's routes, and there is none for it
    for speaker in (two, late, lost):
        speaker.wait()
    hosts.set_link("b", "up")
    one.wait("two", "late")
    two.wait("one", "late")
    late.wait("one", "two")
    log = lost.terminate()
    assert (log.count("trying on"), lost.seen) == (1, set())
