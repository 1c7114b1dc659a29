"""pybroker: a durable message broker that runs inside a Python program.

`open_broker` runs one; `Broker.connect` gives a client in the same process, `connect` the same one over the network; other
programs use STOMP.
"""

from pybroker.broker import Broker, open_broker
from pybroker.client import Client, ClientTransaction, Confirmation, Publisher
from pybroker.config import (
    BrokerConfig,
    DeliveryPolicy,
    Limits,
    NativeLimits,
    NetworkConfig,
    PolicyEntry,
    ReplicaSetConfig,
    StompLimits,
)
from pybroker.connect_options import ConnectOptions
from pybroker.connecting import connect
from pybroker.dead_letter_work import DeadLetter, DeadLetterFilter, DeadLettersDone
from pybroker.errors import (
    AuthenticationFailed,
    BrokerClosed,
    BrokerError,
    BrokerFull,
    BrokerUnavailable,
    ConfigurationError,
    CorruptRecord,
    InvalidDestination,
    InvalidMessage,
    InvalidSelector,
    LimitExceeded,
    NotLeader,
    ProtocolError,
    RequestTimeout,
    SendInDoubt,
    SlowConsumer,
    StoreDamaged,
    StoreError,
    StoreFormatError,
    StoreLocked,
    SubscriptionError,
    TransactionError,
    UnknownDelivery,
)
from pybroker.network_status import NetworkStatus, PeerStatus
from pybroker.policies import DestinationPolicy
from pybroker.remote_client import RemoteClient
from pybroker.remote_events import ClientStatistics, ConnectionEvent
from pybroker.scheduling import ScheduledMessage
from pybroker.settings import load_config
from pybroker.statistics import BrokerStatistics, DestinationStatistics
from pybroker.subscription import ReceivedMessage, Subscription
from pybroker.users import hash_password

__all__ = [
    "AuthenticationFailed",
    "Broker",
    "BrokerClosed",
    "BrokerConfig",
    "BrokerError",
    "BrokerFull",
    "BrokerStatistics",
    "BrokerUnavailable",
    "Client",
    "ClientStatistics",
    "ClientTransaction",
    "ConfigurationError",
    "Confirmation",
    "ConnectOptions",
    "ConnectionEvent",
    "CorruptRecord",
    "DeadLetter",
    "DeadLetterFilter",
    "DeadLettersDone",
    "DeliveryPolicy",
    "DestinationPolicy",
    "DestinationStatistics",
    "InvalidDestination",
    "InvalidMessage",
    "InvalidSelector",
    "LimitExceeded",
    "Limits",
    "NativeLimits",
    "NetworkConfig",
    "NetworkStatus",
    "NotLeader",
    "PeerStatus",
    "PolicyEntry",
    "ProtocolError",
    "Publisher",
    "ReceivedMessage",
    "RemoteClient",
    "ReplicaSetConfig",
    "RequestTimeout",
    "ScheduledMessage",
    "SendInDoubt",
    "SlowConsumer",
    "StompLimits",
    "StoreDamaged",
    "StoreError",
    "StoreFormatError",
    "StoreLocked",
    "Subscription",
    "SubscriptionError",
    "TransactionError",
    "UnknownDelivery",
    "connect",
    "hash_password",
    "load_config",
    "open_broker",
]
