"""Every error that a user of pybroker can meet. Owns names and texts only; knows nothing else of the package.

Each message says what was wrong and how to mend it. ``BrokerError.code`` is a short, stable word that travels
over the wire (the ``message`` header of a STOMP ERROR frame starts with the text, ``code`` carries this word).
"""

from __future__ import annotations

SHOWN_LENGTH_MAX = 80  # characters of a value in an error's text


class BrokerError(Exception):
    """The base of all errors that pybroker raises on purpose."""

    code = "broker-error"


class ConfigurationError(BrokerError):
    """A configuration value is wrong. The text holds its path and what was expected."""

    code = "configuration"


class ProtocolError(BrokerError):
    """A peer broke the rules of its protocol (a *remote* error in h11's sense)."""

    code = "protocol"


class LimitExceeded(ProtocolError):
    """A named limit was passed. ``limit`` is the configuration field, ``value`` its present value."""

    code = "limit"

    def __init__(self, limit: str, value: float, what: str) -> None:
        super().__init__(f"{what}: limit {limit} is {value}")
        self.limit = limit
        self.value = value


class InvalidDestination(BrokerError):
    """A destination's name is not one that the broker accepts."""

    code = "destination"


class InvalidMessage(BrokerError):
    """A message, or one of its headers, is not one that the broker can keep and deliver unchanged."""

    code = "message"


class AuthenticationFailed(BrokerError):
    """Wrong user or password, or none where one is needed. The text never says which."""

    code = "authentication"


class SubscriptionError(BrokerError):
    """A subscription can't be made or is not known (identifier in use, durable name taken, unknown id)."""

    code = "subscription"


class InvalidSelector(BrokerError):
    """A selector can't be understood. The text says where the fault is and what was expected there.

    `position` counts characters from 0, `line` and `column` from 1; `expected`: what could stand there.
    """

    code = "selector"

    def __init__(
        self, text: str, *, position: int = 0, line: int = 1, column: int = 1, expected: tuple[str, ...] = ()
    ) -> None:
        super().__init__(text)
        self.position = position
        self.line = line
        self.column = column
        self.expected = expected


class UnknownDelivery(BrokerError):
    """An acknowledgement names a delivery that is not outstanding on this connection."""

    code = "unknown-delivery"


class TransactionError(BrokerError):
    """A transaction is unknown, exists already, or was aborted."""

    code = "transaction"


class BrokerFull(BrokerError):
    """The broker has no room for the message: it was refused and is not stored."""

    code = "full"
    full_policy = ""  # what a send meets where a destination has a policy of its own, "" = ``limits.full_policy``


class SlowConsumer(BrokerError):
    """A topic subscriber fell behind its backlog limit and was closed."""

    code = "slow-consumer"


class BrokerClosed(BrokerError):
    """The broker is stopped or stopping; what was asked for did not happen."""

    code = "closed"


class NotLeader(BrokerClosed):
    """This broker is a replica that does not lead: nothing is taken or delivered here now.

    `leader` is the name of the replica that leads, "" while none is known; `urls` are the addresses for its clients.
    """

    code = "not-leader"

    def __init__(self, text: str, leader: str = "", urls: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.leader = leader
        self.urls = urls


class BrokerUnavailable(BrokerError):
    """No broker could be reached within the time that was set for it; what was asked for was not sent."""

    code = "unavailable"


class SendInDoubt(BrokerError):
    """It is not known whether a send, an acknowledgement or a transaction was stored.

    The journal failed while it was under way; or the connection was lost, and the broker that answers now does not know
    (or not any more) what this producer sent.
    """

    code = "in-doubt"


class RequestTimeout(BrokerError):
    """No reply came in time; the request may have been carried out."""

    code = "request-timeout"


class StoreError(BrokerError):
    """The base of errors of the store."""

    code = "store"


class StoreLocked(StoreError):
    """Another process, or another broker of this one, has the directory open."""

    code = "store-locked"


class StoreFormatError(StoreError):
    """The directory holds something that this version can't read, or that is not a pybroker store."""

    code = "store-format"


class StoreDamaged(StoreError):
    """LevelDB refuses to open the directory, or to go on with it, because a file is damaged."""

    code = "store-damaged"


class CorruptRecord(StoreError):
    """One key's value fails its checksum or does not parse. It is counted and never delivered."""

    code = "corrupt-record"

    def __init__(self, key: bytes, reason: str) -> None:
        super().__init__(f"record {key.hex()}: {reason}")
        self.key = key
        self.reason = reason


def shown(value: object) -> str:
    """A value as an error's text shows it: of a long one the beginning."""
    text = repr(value)
    return text if len(text) <= SHOWN_LENGTH_MAX else text[: SHOWN_LENGTH_MAX - 3] + "..."
