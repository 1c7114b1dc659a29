"""UDP multicast, and the only module with it. Owns the sockets of one place; knows nothing of what is in a datagram.

Two sockets on one interface: one is bound to the multicast address and hears what comes there, one sends. Several programs of
one host listen at one address, and loop lets them hear each other. Time to live is 1: announcements stay on their segment.

On Linux that takes `SO_REUSEADDR`, and must not have `SO_REUSEPORT`: where one socket of those at the address has joined on the
interface that a datagram came by, Linux 6.18 hands it to any one of them (seen; `tests/cluster/test_multicast.py`). Other systems
want both. And Linux hands a bound socket what *any* program of the host has joined, also on other interfaces, unless
`IP_MULTICAST_ALL` is off.
"""

from __future__ import annotations

import contextlib
import socket
import sys

import trio

from pybroker.cluster.announcements import DATAGRAM_BYTES_MAX
from pybroker.cluster.discovery import Discovery

LINUX = sys.platform == "linux"
IP_MULTICAST_ALL = 49  # linux/in.h; the socket module has no name for it
HOPS = 1
RECEIVE_BUFFER_BYTES = 256 * 1024  # some hundred announcements: more than a network's brokers say while a turn lasts


class Multicast:
    """A place on an interface (`pybroker.cluster.datagrams.Datagrams`; the class is an `Open`). Needs a running trio."""

    def __init__(self, discovery: Discovery, *, listen: bool) -> None:
        """Open the sockets; only the sending one without `listen`. Raises OSError: no such interface, no way there, no right to."""
        self._target = (discovery.address, discovery.port)
        with contextlib.ExitStack() as opened:
            self._receiver = _receiver(discovery, opened) if listen else None
            self._sender = _sender(discovery, opened)
            opened.pop_all()

    async def send(self, data: bytes) -> None:
        await self._sender.sendto(data, self._target)

    async def receive(self) -> bytes:
        """The next datagram; of a longer one than an announcement may be, its beginning, which still is too long."""
        assert self._receiver is not None
        data, _ = await self._receiver.recvfrom(DATAGRAM_BYTES_MAX + 1)
        return data

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        self._sender.close()


def _receiver(discovery: Discovery, opened: contextlib.ExitStack) -> trio.socket.SocketType:
    receiver = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if not LINUX and hasattr(socket, "SO_REUSEPORT"):
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    receiver.bind((discovery.address, discovery.port))
    if LINUX:
        receiver.setsockopt(socket.IPPROTO_IP, IP_MULTICAST_ALL, 0)
    membership = socket.inet_aton(discovery.address) + socket.inet_aton(discovery.interface or "0.0.0.0")
    receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    return trio.socket.from_stdlib_socket(receiver)


def _sender(discovery: Discovery, opened: contextlib.ExitStack) -> trio.socket.SocketType:
    sender = opened.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, HOPS)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
    if discovery.interface is not None:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(discovery.interface))
        sender.bind((discovery.interface, 0))
    return trio.socket.from_stdlib_socket(sender)
