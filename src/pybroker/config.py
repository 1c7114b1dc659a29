"""The configuration's shape: frozen, typed, each field with its unit and default. No input is read or checked here.

Bytes are bytes, times are seconds unless the name ends in ``_ms``. `pybroker.settings` turns TOML and keyword
overrides into these classes and refuses what does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class StompLimits:
    """What one STOMP connection may ask for. A peer that passes one gets an ERROR that names it."""

    command_bytes_max: int = 64  # length of a frame's command line
    header_count_max: int = 1_000  # headers in one frame
    header_bytes_max: int = 16_384  # one header line
    header_block_bytes_max: int = 65_536  # all header lines of one frame
    body_bytes_max: int = 64 * 1024 * 1024  # one body
    connect_timeout: float = 10.0  # seconds from accepting a connection to its CONNECT frame (TLS hand-shake included)
    heartbeat_min_ms: int = 1_000  # the broker sends and asks for heart-beats no more often than this
    heartbeat_tolerance: float = 2.0  # a peer may be silent for this many of its own intervals
    write_timeout: float = 30.0  # seconds for which a peer may take no bytes while the broker closes its connection


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLimits:
    """What one connection of the native protocol may ask for. (Of bodies: `StompLimits.body_bytes_max` holds for all.)"""

    frame_bytes_max: int = 72 * 1024 * 1024  # one frame; a transaction, or a body with its headers, must fit into one
    handshake_bytes_max: int = 65_536  # one frame before the peer was let in
    connect_timeout: float = 10.0  # seconds from accepting a connection to its first frame (TLS hand-shake included)
    heartbeat_interval: float = 5.0  # seconds: a side that has sent nothing for so long says that it is there
    heartbeat_timeout: float = 15.0  # seconds of silence after which a connection counts as broken
    send_messages_max: int = 10_000  # sends of one connection that may wait for their confirmation
    send_bytes_max: int = 16 * 1024 * 1024  # bytes of these (one message always may)
    write_timeout: float = 30.0  # seconds for which a peer may take no bytes while the broker closes its connection


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What connections, transactions, consumers and the broker as a whole may use."""

    connections_max: int = 10_000  # connections to all listeners together
    subscriptions_max: int = 1_000  # subscriptions of one connection
    transactions_max: int = 100  # open transactions of one connection
    transaction_messages_max: int = 10_000  # sends and acknowledgements in one transaction
    transaction_bytes_max: int = 64 * 1024 * 1024  # bytes of the messages sent in one transaction
    prefetch_default: int = 1_000  # messages a consumer may hold unacknowledged when it does not say
    prefetch_auto_default: int = 4_000  # the same with automatic acknowledgement, where it bounds what is on its way
    prefetch_max: int = 32_767  # the most that a consumer may ask for
    prefetch_bytes_max: int = 16 * 1024 * 1024  # bytes a consumer may hold unacknowledged (one message always may)
    outbox_bytes_max: int = 1024 * 1024  # bytes waiting for one connection's socket before its consumers pause
    window_messages_max: int = 8_192  # messages at a queue's head that are kept in memory
    window_bytes_max: int = 8 * 1024 * 1024  # bytes of these
    memory_bytes_max: int = 512 * 1024 * 1024  # bytes of all messages in memory; past it producers wait
    batch_bytes_max: int = 8 * 1024 * 1024  # bytes that wait for the journal before producers wait
    store_bytes_max: int = 0  # bytes of all stored messages; 0 = until the disk is full
    disk_free_bytes_min: int = 64 * 1024 * 1024  # with less room than this on the store's disk producers wait
    queue_messages_max: int = 0  # messages in one queue; 0 = no limit
    selector_bytes_max: int = 2_048  # one selector
    wildcard_queues_max: int = (
        100_000  # queues that the consumers of several queues of one connection may have, together
    )
    destinations_max: int = 100_000  # queues and durable subscriptions together
    schedules_max: int = 10_000_000  # messages that are to be sent later
    schedule_period_min: float = 0.0  # seconds between two sendings of one of these; a shorter period is refused
    message_keys_max: int = 100_000  # keys of sends that are remembered; the oldest go first
    composite_destinations_max: int = 64  # destinations that one send or subscription may name, divided by commas
    backlog_messages_max: int = 100_000  # messages that wait for one non-durable topic subscriber
    advisories_per_second: int = (
        100  # advisories on one topic; those beyond are counted, and the next one says how many
    )
    temporary_destinations_max: int = 1_000  # temporary queues and topics of one connection
    groups_max: int = 100_000  # names of message groups that are remembered with their consumers; others share buckets
    full_policy: Literal["block", "refuse"] = "block"  # what a send into a full broker meets
    full_timeout: float = 30.0  # seconds a blocked send waits for room before it is refused
    turn_messages_max: int = (
        512  # frames (native: messages) of one connection handled before others get their turn; copies count
    )
    recovery_bytes_max: int = (
        64 * 1024 * 1024
    )  # bytes that all topics together keep for late subscribers, with 512 for each message
    recovery_topics_max: int = 100_000  # topics that keep something
    browse_messages_max: int = 256  # messages of one page of a browser, and of one step of a purge, move or copy
    browse_bytes_max: int = 1024 * 1024  # bytes of these (one message always may)
    browse_pages_max: int = 8  # pages that one connection may wait for at a time
    producers_max: int = (
        20_000  # producers whose stored sequences are remembered; the one unused for longest goes first
    )
    producer_ranges_max: int = 64  # gaps in the stored sequences of one producer; more, and its oldest become doubtful
    producer_retention: float = 604_800.0  # seconds for which the stored sequences of an unused producer are remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryPolicy:
    """How often a message is tried, and where it goes after that."""

    deliveries_max: int = 6  # deliveries before a message goes to the dead-letter queue
    dead_letter_queue: str = "/queue/ActiveMQ.DLQ"  # ActiveMQ's name for it
    durable_default: bool = True  # whether a STOMP SEND without a `persistent` header is durable
    cron_timezone: str = "UTC"  # the time zone of cron expressions, for example "Europe/Berlin"
    clock_check_interval: float = 1.0  # seconds after which a changed wall clock is noticed, at the latest
    expiry_interval: float = 1.0  # seconds between two sweeps for messages that have expired, and for idle queues
    idle_looks_max: int = 1_000  # queues of which one sweep looks whether they are idle


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """One entry ``[[policy]]``, checked: a pattern (``/queue/a.>``) and the values of `pybroker.policies` that it sets."""

    match: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """Where messages go beside their own destination. Names and defaults are ActiveMQ's.

    virtual_topics     pattern of the topics (without ``/topic/``) whose messages are also collected by queues; "" = none
    virtual_consumers  what stands in front of the topic's name in the name of such a queue; ``*`` is the name of the consumer
    mirrored_queues    patterns (``/queue/a.>``) of queues; what is sent to one is also published on a topic
    mirror_prefix, mirror_suffix  the name of that topic, without ``/topic/``: the queue's name between these two
    """

    virtual_topics: str = "VirtualTopic.>"
    virtual_consumers: str = "Consumer.*."
    mirrored_queues: tuple[str, ...] = ()
    mirror_prefix: str = "VirtualTopic.Mirror."
    mirror_suffix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompositeEntry:
    """A destination whose messages are forwarded to others, in one batch.

    name          ``/queue/NAME``, ``/topic/NAME``, or a pattern
    forward_to    destinations, each one name
    forward_only  whether what is forwarded is not kept in the destination itself
    filter        selector of the messages that are forwarded; the others stay in the destination; "" = all are forwarded
    """

    name: str
    forward_to: tuple[str, ...]
    forward_only: bool = True
    filter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSetConfig:
    """Membership in a replica set. The replica's own name is `BrokerConfig.name`, unique in the set.

    name        of the set; all members say the same
    zookeeper   ``HOST:PORT[,HOST:PORT...][/CHROOT]``
    replicas    N, odd: how many copies there are; N // 2 + 1 of them must be there
    bind        HOST:PORT for the other replicas; port 0 takes a free one
    advertise   HOST:PORT under which they reach it; "" = what was bound
    clients     listener URLs under which clients reach it, shown to the others; () = what was bound
    sync        ``quorum_disk``, ``quorum_mem``, ``local_disk``, ``local_mem``: what a confirmed send is worth (see the docs)
    weight      of two equally good candidates the heavier one leads
    secret      shared by the members: both ends of each replication link prove that they know it; "" = no proof
    zookeeper_auth  USER:PASSWORD for digest ACLs on all nodes that are made; "" = open to all
    certificate, key, peer_ca  PEM files for TLS with client certificates on the replication links; None = plaintext
    allow       what may be done without beyond loopback: "plaintext" (no TLS), "anonymous" (no secret)
    """

    name: str
    zookeeper: str
    replicas: int = 3
    bind: str = "127.0.0.1:0"
    advertise: str = ""
    clients: tuple[str, ...] = ()
    sync: Literal["quorum_disk", "quorum_mem", "local_disk", "local_mem"] = "quorum_disk"
    weight: int = 0
    secret: str = field(default="", repr=False)
    zookeeper_auth: str = field(default="", repr=False)
    certificate: Path | None = None
    key: Path | None = None
    peer_ca: Path | None = None
    allow: tuple[str, ...] = ()
    session_timeout: float = 10.0  # seconds of ZooKeeper's session; no failover waits for it
    heartbeat_interval: float = 0.2  # seconds between two heart-beats on a replication link
    heartbeat_timeout: float = 1.0  # seconds of silence after which a link counts as broken
    lease: float = 2.0  # seconds for which a leader goes on without answers of a quorum
    election_step: float = 0.05  # seconds that the second best candidate waits for the best one, and so on
    retry_interval: float = 0.2  # seconds between two tries to reach the leader
    handover_timeout: float = 2.0  # seconds for which a resigning leader waits for its best follower to catch up
    ring_bytes_max: int = 64 * 1024 * 1024  # recent batches kept for followers that come back
    scrub_interval: float = 86_400.0  # seconds between two walks over the store in search of bad values; 0 = never
    scrub_bytes_per_second: int = 4 * 1024 * 1024  # how fast such a walk reads


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """Membership in a network of brokers, each of which serves (DESIGN.md section 6). Links use the native listeners.

    name        of this broker in the network, the same for all members of a replica set; "" = the set's name, or the broker's
    group       brokers link only with those of their own group
    discovery   ``multicast://ADDRESS:PORT?group=G&interface=IP``; "" = none. G, where given, is the group
    peers       addresses to link with, each ``pybroker[+ssl]://HOST:PORT`` or several of one set, divided by commas
    advertise   native URLs under which others reach this broker; () = what was bound
    secret      shared by the group: announcements are signed, and both ends of each link prove that they know it; "" = no proof
    certificate, key, peer_ca  PEM files that this broker's links show and check where they dial ``pybroker+ssl``
    allow       what may be done without beyond loopback: "plaintext" (no TLS), "anonymous" (no secret)
    include, exclude  patterns of destinations (``/queue/a.>``) that cross links; () = all; exclude goes before include
    """

    name: str = ""
    group: str = "default"
    discovery: str = ""
    peers: tuple[str, ...] = ()
    advertise: tuple[str, ...] = ()
    secret: str = field(default="", repr=False)
    certificate: Path | None = None
    key: Path | None = None
    peer_ca: Path | None = None
    allow: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    announce_interval: float = 0.5  # seconds between two announcements
    peer_timeout_intervals: float = 10.0  # a peer unheard of for so many intervals is gone
    peers_max: int = 1_000  # peers in the table
    hops_max: int = 16  # brokers that a message may pass; then it stays where it is
    link_messages_max: int = 10_000  # messages that are on their way to one peer, unconfirmed
    link_bytes_max: int = 8 * 1024 * 1024  # bytes of these (one message always may)
    demand_backlog_max: int = 1_000  # ready messages of a queue from which on this broker asks for no more of others
    heartbeat_interval: float = 0.5  # seconds: a side of a link that has sent nothing for so long says that it is there
    heartbeat_timeout: float = 3.0  # seconds of silence after which a link counts as broken
    retry_interval: float = 0.2  # seconds between two tries to reach a peer, doubling
    retry_interval_max: float = 5.0  # up to this


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """One broker.

    name        shown in status and in errors
    data_dir    directory of the LevelDB store; None keeps everything in memory, and the broker says so
    listen      listener URLs: ``stomp://HOST:PORT``, ``pybroker://HOST:PORT`` (the native protocol), and
                ``stomp+ssl://HOST:PORT?cert=FILE&key=FILE[&client_ca=FILE]``, ``pybroker+ssl://``; port 0 takes a free one.
                Beyond loopback ``?allow=plaintext,anonymous`` must be said by name.
    users       user name to password hash (made by ``pybroker hash-password``)
    anonymous   whether a CONNECT without login is let in
    sync        whether a commit waits for the disk (fsync); False is for tests and data that may be lost
    stop_timeout  seconds for which a graceful stop may last before connections are cut
    reopen_delay, reopen_delay_max  seconds before a failed store is opened again, doubling up to the second
    replica_set  membership in a replica set (needs ``data_dir``, a ``name`` of its own, and lets only the leader open
                the listeners); None = a broker on its own
    network     membership in a network of brokers; None = a broker that others can't find
    policy      what holds for destinations that match a pattern (see `pybroker.policies`); in TOML tables ``[[policy]]``
    routing     virtual topics and mirrored queues
    composite   destinations whose messages are forwarded to others; in TOML tables ``[[composite]]``
    """

    name: str = "pybroker"
    data_dir: Path | None = None
    listen: tuple[str, ...] = ()
    users: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    anonymous: bool = True
    sync: bool = True
    stop_timeout: float = 10.0
    reopen_delay: float = 0.1
    reopen_delay_max: float = 10.0
    stomp: StompLimits = StompLimits()
    native: NativeLimits = NativeLimits()
    limits: Limits = Limits()
    delivery: DeliveryPolicy = DeliveryPolicy()
    replica_set: ReplicaSetConfig | None = None
    network: NetworkConfig | None = None
    policy: tuple[PolicyEntry, ...] = ()
    routing: RoutingConfig = RoutingConfig()
    composite: tuple[CompositeEntry, ...] = ()

    @property
    def network_name(self) -> str:
        """The name under which other brokers know this one: all members of a replica set have one together."""
        if self.network is not None and self.network.name:
            return self.network.name
        return self.replica_set.name if self.replica_set is not None else self.name
