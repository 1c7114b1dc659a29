"""Bugs of a network, each put into the real code as long as a `with` block lasts: the stories must find every one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from pybroker.core import forwarding
from pybroker.core.choosing import Choosing
from pybroker.core.forwarding import _copy, give_back
from pybroker.core.links import Link, Links, Peer
from pybroker.core.producers import Producer
from tests.core import network
from tests.core.network_clients import Broken
from tests.core.network_story import Kind, Teller


@contextmanager
def forgetful() -> Iterator[None]:
    """The receiver does not record what it has stored."""
    with mock.patch.object(Producer, "stored"):
        yield


@contextmanager
def early() -> Iterator[None]:
    """ACCEPTED is said before the commit."""

    def take(self: Any, core: Any, lane: int, namespace: str, tag: int, sequence: int, message: Any) -> None:
        core.links.receive(self.link, namespace, sequence, message)
        self.say_accepted(lane, tag)

    with mock.patch.object(network.End, "take", take):
        yield


@contextmanager
def careless() -> Iterator[None]:
    """The sender thinks that what it has sent has arrived."""

    def down(self: Links, link: Link) -> None:
        for consumer in link.lanes.values():
            for entry in list(consumer.unacked.values()):
                entry.queue.settle(entry)
                entry.queue.remove(entry)
        plain(self, link)

    plain = Links.down
    with mock.patch.object(Links, "down", down):
        yield


@contextmanager
def hasty() -> Iterator[None]:
    """What was sent and not accepted goes back into its queue when the link is down, for whoever comes."""

    def down(self: Links, link: Link) -> None:
        plain(self, link)
        for queue in link.peer.queues:
            for entry in list(queue.window):
                if entry.message.destination.startswith("/queue/"):
                    give_back(self, queue, queue.window.discard(entry.order))

    plain = Links.down
    with mock.patch.object(Links, "down", down):
        yield


@contextmanager
def wandering() -> Iterator[None]:
    """A message goes to any peer that wants it, also where it has been."""

    def choose(links: Links, queue: Any, message: Any) -> Peer | None:
        for peer in list(queue.routes):
            if peer.link is not None and links.has_room(peer):
                queue.routes[peer] = queue.routes.pop(peer)
                return peer  # type: ignore[no-any-return]
            peer.blocked[queue] = None
        return None

    with mock.patch.object(forwarding, "_choose", choose):
        yield


@contextmanager
def stuck() -> Iterator[None]:
    """A message never comes back to a broker that had it: ActiveMQ's trap."""

    plain = forwarding._choose

    def choose(links: Links, queue: Any, message: Any) -> Peer | None:
        consumers = queue.consumers
        queue.consumers = consumers or {None}
        try:
            return plain(links, queue, message)
        finally:
            queue.consumers = consumers

    with mock.patch.object(forwarding, "_choose", choose):
        yield


@contextmanager
def flooding() -> Iterator[None]:
    """A topic's message goes to every peer, for all that want it."""

    def publish(links: Links, message: Any, origins: Any, targets: Any) -> None:
        names = tuple(targets)
        for peer in {origins[name] for name in names if name in origins} | set(links.peers.values()):
            if peer.link is not None and len(forwarding._passed(message)) < links.config.hops_max:
                links.lane(peer).accept(_copy(links, message, 0, names))

    with mock.patch.object(Links, "publish", publish), mock.patch.object(forwarding, "publish", publish):
        yield


@contextmanager
def unwritten() -> Iterator[None]:
    """A broker does not write down the durable demand of its peers."""
    with mock.patch.object(Links, "_save"):
        yield


@contextmanager
def reused() -> Iterator[None]:
    """Every life of a broker forwards in one namespace."""

    def make(self: Links, core: Any, name: str, config: Any, life: str) -> None:
        plain(self, core, name, config, "always")

    plain = Links.__init__
    with mock.patch.object(Links, "__init__", make):
        yield


@contextmanager
def unasked() -> Iterator[None]:
    """A queue that waits for room on a link is not told when there is some."""

    def go_on(self: Links, peer: Peer) -> None:
        if len(peer.queues) > 1:
            self._start_lanes(peer)

    with mock.patch.object(Links, "_go_on", go_on):
        yield


@contextmanager
def unmarked() -> Iterator[None]:
    """A message forgets on its way that it was delivered before."""

    def copy(links: Links, message: Any, deliveries: int, targets: Any = ()) -> Any:
        return plain(links, message, 0, targets)

    plain = forwarding._copy
    with mock.patch.object(forwarding, "_copy", copy):
        yield


@contextmanager
def overlooked() -> Iterator[None]:
    """What had to stay for a plain consumer is not looked at again when he has left, and a selective one is still there."""

    def leave(self: Choosing, consumer: Any) -> None:
        with mock.patch.object(Choosing, "rerouted"):
            plain(self, consumer)

    plain = Choosing.leave
    with mock.patch.object(Choosing, "leave", leave):
        yield


@dataclass(frozen=True)
class Plant:
    """A bug, and in how many stories of which kind it is looked for."""

    broken: Callable[[], AbstractContextManager[None]]
    kind: Kind = field(default_factory=Kind)
    seeds: int = 100

    @property
    def name(self) -> str:
        return self.broken.__name__

    def search(self) -> tuple[int, Broken | None]:
        """Plant it; how many stories it took to find it, and what was found."""
        with self.broken():
            for number in range(self.seeds):
                try:
                    Teller(f"{self.name} {number}", self.kind).run()
                except Broken as broken:
                    return number + 1, broken
        return self.seeds, None


PLANTS = [
    Plant(forgetful, Kind(faults=3.0)),
    Plant(early, Kind(faults=3.0)),
    Plant(careless),
    Plant(hasty),
    Plant(wandering, Kind(faults=0.0, hops=(400,))),
    Plant(stuck),
    Plant(flooding),
    Plant(unwritten),
    Plant(reused, Kind(faults=3.0)),
    Plant(unasked),
    Plant(unmarked),
    Plant(overlooked, Kind(faults=0.0, queues=("/queue/a",), topics=False, expiring=False, choosy=True, hops=(16,))),
]
