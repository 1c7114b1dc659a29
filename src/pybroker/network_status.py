"""What a broker has to say of its network at one moment, as frozen values. Owns their shape; `Broker.network_status` asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pybroker.core.links import Links, Peer
from pybroker.core.queue import Queue

LINKED = "linked"
KEPT = "not linked"  # known from before, and nobody looks for it
DIALLING = "dialling"


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """Another broker, or set, as this one sees it. Counters since this broker opened its store.

    name      "" for an address that was given, and where nobody has answered yet
    state     ``linked``, ``dialling`` or ``not linked``
    address   where it is dialled, or is linked
    seconds   for which it has been linked; None while it is not
    trouble   what is wrong, "" if nothing
    demand_in, demand_out  demands that it has told, and that it was told
    waiting   messages on their way to it; of these `in_doubt` may be there already, and wait for this peer and no other
    forwarded messages that it has accepted; `rejected` by it for good
    received  messages from it; `repeats` are those that were here already
    """

    name: str
    state: str
    address: str
    seconds: float | None
    trouble: str
    demand_in: int
    demand_out: int
    waiting: int
    in_doubt: int
    forwarded: int
    rejected: int
    received: int
    repeats: int


@dataclass(frozen=True, slots=True)
class NetworkStatus:
    """The network as one broker sees it.

    name, group   of this broker; "" where it is in no network (any more)
    at_hop_limit  messages that have passed so many brokers that they stay here, until somebody consumes them here
    dropped       copies of topic messages for brokers that nobody reaches any more
    """

    name: str
    group: str
    peers: tuple[PeerStatus, ...]
    at_hop_limit: int
    dropped: int


def network_status(links: Links, name: str, group: str, seen: Mapping[str, Mapping[str, Any]]) -> NetworkStatus:
    """Put together what the core knows of its peers, and what the run time has seen of them (`BrokerNetwork.status`)."""
    peers = [_peer_status(links, peer, seen.get(peer.name, {})) for peer in links.peers.values()]
    for key, view in seen.items():
        if key not in links.peers:
            peers.append(_peer_status(links, Peer("" if key == view["address"] else key), view))
    return NetworkStatus(
        name,
        group,
        tuple(sorted(peers, key=lambda peer: (peer.name, peer.address))),
        sum(len(queue.stranded) for queue in links.core.queues.values()),
        links.dropped,
    )


def _peer_status(links: Links, peer: Peer, view: Mapping[str, Any]) -> PeerStatus:
    return PeerStatus(
        peer.name,
        view.get("state", KEPT),
        view.get("address", ""),
        view.get("seconds"),
        view.get("trouble", ""),
        len(links.demand.heard(peer.name)),
        links.demand.told(peer.name),
        peer.waiting,
        sum(map(_in_doubt, peer.queues)),
        peer.forwarded,
        peer.rejected,
        peer.received,
        peer.repeats,
    )


def _in_doubt(queue: Queue) -> int:
    """Messages of a link's queue that may have been sent: what is out, and what lies below the mark of what ever was out.

    What has not been read back from the store is counted by its sequences, so that the number may be too high then.
    """
    mark = queue.dispatched[0]
    found = len(queue.outstanding) + sum(entry.order < mark for entry in queue.window)
    if queue.tail is not None and queue.tail < mark:
        found += min(mark - queue.tail, queue.depth - found)
    return found
