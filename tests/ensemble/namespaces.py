"""Hosts of a network of their own: Linux network namespaces at one bridge, between which any way can be cut, in silence.

Owns the namespaces and all in them; nothing is made in the machine's own network. Needs root and `ip` (Debian package
iproute2). A way from one host to another is cut by a wrong link address for the other: packets leave, and nobody takes them, also
on connections that are open. The way back stays, unless it is cut, too. Multicast passes such a cut; an unplugged host is
without it as well.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

NETWORK = "198.18.0"  # set aside for tests of networks (RFC 2544)
NOBODY = "02:00:00:00:ff:ff"  # a link address that no host has
COMMAND_TIMEOUT = 10.0


def _ip(*words: str, stdin: str = "") -> None:
    done = subprocess.run(
        ["ip", *words], input=stdin, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT
    )
    if done.returncode:
        raise OSError(f"ip {' '.join(words)} {stdin!r}: {done.stderr.strip()}")


@functools.cache
def missing() -> str:
    """What keeps namespaces from being made here; empty when nothing does."""
    if shutil.which("ip") is None:
        return "there is no ip command (Debian package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with contextlib.closing(Namespaces("a", "b")):
            return ""
    except OSError as error:
        return f"network namespaces can't be made here: {error}"


def require_namespaces() -> None:
    """Skip the test, loudly, where partitions can't be made."""
    if missing():
        pytest.skip(f"NO PARTITIONS: {missing()}")


class Namespaces:
    """Hosts by name. `close` it in a finally (or use `namespaces`), after what runs in them has ended."""

    def __init__(self, *names: str) -> None:
        self._head = f"pybroker-{secrets.token_hex(4)}"
        self._names = names
        self._made: list[str] = []
        self._cut: set[tuple[str, str]] = set()
        self._unplugged: set[str] = set()
        try:
            self._make()
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        hub = self._add("hub")
        _ip("-n", hub, "-batch", "-", stdin="link add bridge type bridge\nlink set bridge up\n")
        for name in self._names:
            space = self._add(name)
            port = f"to-{name}"
            lines = [f"link add {port} type veth peer name net netns {space}", f"link set {port} master bridge up"]
            _ip("-n", hub, "-batch", "-", stdin="\n".join(lines) + "\n")
            lines = ["link set lo up", f"addr add {self.host(name)}/24 dev net", "link set net up"]
            _ip("-n", space, "-batch", "-", stdin="\n".join(lines) + "\n")

    def _add(self, name: str) -> str:
        space = f"{self._head}-{name}"
        _ip("netns", "add", space)
        self._made.append(space)
        return space

    def host(self, name: str) -> str:
        """The address of a host."""
        return f"{NETWORK}.{self._names.index(name) + 1}"

    def prefix(self, name: str) -> tuple[str, ...]:
        """The words before a command that runs on a host."""
        return ("ip", "netns", "exec", f"{self._head}-{name}")

    def cut_one_way(self, sender: str, receivers: Sequence[str]) -> None:
        """Nothing that `sender` sends reaches the receivers any more."""
        lines = [f"neigh replace {self.host(name)} lladdr {NOBODY} dev net nud permanent" for name in receivers]
        _ip("-n", f"{self._head}-{sender}", "-batch", "-", stdin="\n".join(lines) + "\n")
        self._cut |= {(sender, name) for name in receivers}

    def cut(self, ones: Sequence[str], others: Sequence[str]) -> None:
        """Nothing passes between the ones and the others any more."""
        for sender, receivers in ((ones, others), (others, ones)):
            for name in sender:
                self.cut_one_way(name, receivers)

    def unplug(self, name: str) -> None:
        """Nothing reaches a host any more, and nothing that it sends others; multicast, too."""
        _ip("-n", f"{self._head}-hub", "link", "set", f"to-{name}", "nomaster")
        self._unplugged.add(name)

    def block_multicast(self) -> None:
        """Multicast reaches no host any more, until the network ends; all else does."""
        for name in self._names:
            _ip("-n", f"{self._head}-hub", "link", "set", f"to-{name}", "type", "bridge_slave", "mcast_flood", "off")

    def heal(self) -> None:
        """All ways are open again."""
        for name in sorted(self._unplugged):
            _ip("-n", f"{self._head}-hub", "link", "set", f"to-{name}", "master", "bridge")
            self._unplugged.discard(name)
        for sender, receiver in sorted(self._cut):
            _ip("-n", f"{self._head}-{sender}", "neigh", "del", self.host(receiver), "dev", "net")
            self._cut.discard((sender, receiver))

    def close(self) -> None:
        """Remove everything; links end with their namespaces."""
        for space in self._made:
            with contextlib.suppress(OSError):
                _ip("netns", "del", space)
        self._made.clear()


@contextmanager
def namespaces(*names: str) -> Iterator[Namespaces]:
    """Hosts of these names for the length of the block. Skips the test where they can't be made."""
    require_namespaces()
    with contextlib.closing(Namespaces(*names)) as found:
        yield found
