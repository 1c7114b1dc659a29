"""pybroker: a durable message broker that runs inside a Python program.

`open_broker` runs one; `Broker.connect` gives a client in the same process; other programs use STOMP.
"""

from pybroker.broker import Broker, open_broker
from pybroker.client import Client, Confirmation, Publisher
from pybroker.config import BrokerConfig, DeliveryPolicy, Limits, ReplicaSetConfig, StompLimits
from pybroker.errors import (
    AuthenticationFailed,
    BrokerClosed,
    BrokerError,
    BrokerFull,
    ConfigurationError,
    CorruptRecord,
    InvalidDestination,
    InvalidMessage,
    LimitExceeded,
    NotLeader,
    ProtocolError,
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
    "Client",
    "ConfigurationError",
    "Confirmation",
    "CorruptRecord",
    "DeliveryPolicy",
    "DestinationStatistics",
    "InvalidDestination",
    "InvalidMessage",
    "LimitExceeded",
    "Limits",
    "NotLeader",
    "ProtocolError",
    "Publisher",
    "ReceivedMessage",
    "ReplicaSetConfig",
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
    "hash_password",
    "load_config",
    "open_broker",
]
