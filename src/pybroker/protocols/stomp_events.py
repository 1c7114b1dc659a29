"""What a STOMP server session tells its owner. Owns the events' shapes only; decides nothing.

Values are decoded text, except those that are only handed back or looked up: ``receipt`` is the header's value as
this session's version escapes it (give it to `StompSession.receipt` as it is); ``ack_id`` and ``message_id`` are
the unescaped UTF-8 octets, to compare with what `StompSession.message_frame` was given. A header that was not sent
is None.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

from pybroker.consumer_options import PLAIN, ConsumerOptions
from pybroker.errors import BrokerError
from pybroker.message import Message
from pybroker.protocols.stomp_headers import Headers

AckMode = Literal["auto", "client", "client-individual"]


class Numbered(NamedTuple):
    """What a producer says of a SEND or a COMMIT so that it is stored once: its id, a sequence, "I may have sent it before"."""

    producer: str
    sequence: int
    repeat: bool = False


class Event:
    """The base of all events. Compared by value, shown without secrets."""

    __slots__ = ()
    _hidden: ClassVar = frozenset({"passcode", "headers", "heart_beat"})

    def _values(self) -> dict[str, object]:
        return {name: getattr(self, name) for kind in type(self).__mro__ for name in getattr(kind, "__slots__", ())}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and type(other) is type(self) and self._values() == other._values()

    def __repr__(self) -> str:
        shown = (f"{name}={value!r}" for name, value in self._values().items() if name not in self._hidden)
        return f"{type(self).__name__}({', '.join(shown)})"


class Connect(Event):
    """CONNECT or STOMP. Answer with `StompSession.accept` or `error`; nothing more is read before."""

    __slots__ = ("client_id", "headers", "heart_beat", "host", "login", "passcode", "version")

    def __init__(
        self,
        version: str,
        login: str | None,
        passcode: str | None,
        host: str | None,
        client_id: str | None,
        heart_beat: tuple[int, int],
        headers: Headers,
    ) -> None:
        self.version = version
        self.login = login
        self.passcode = passcode
        self.host = host
        self.client_id = client_id
        self.heart_beat = heart_beat
        self.headers = headers


class Send(Event):
    """SEND: ``message`` has no id and no timestamp yet, and its destination's name is not checked."""

    __slots__ = ("message", "numbered", "receipt", "transaction")

    def __init__(
        self, message: Message, transaction: str | None, receipt: bytes | None, numbered: Numbered | None = None
    ) -> None:
        self.message = message
        self.transaction = transaction
        self.receipt = receipt
        self.numbered = numbered


class Subscribe(Event):
    """SUBSCRIBE. ``id`` is None only in 1.0; ``prefetch`` is None when not said, or asked for without limit.

    With ``durable_name`` it is a durable subscription, and ``client_id`` says whose; by RabbitMQ's convention there
    need not be a client id. ``browser``: what is in the queue is only to be shown.
    """

    __slots__ = (
        *("ack", "browser", "client_id", "destination", "durable_name", "headers"),
        *("id", "options", "prefetch", "receipt"),
    )

    def __init__(
        self,
        id: str | None,
        destination: str,
        ack: AckMode,
        prefetch: int | None,
        durable_name: str | None,
        client_id: str | None,
        receipt: bytes | None,
        headers: Headers,
        options: ConsumerOptions = PLAIN,
        browser: bool = False,
    ) -> None:
        self.id = id
        self.destination = destination
        self.ack = ack
        self.browser = browser
        self.options = options
        self.prefetch = prefetch
        self.durable_name = durable_name
        self.client_id = client_id
        self.receipt = receipt
        self.headers = headers


class Unsubscribe(Event):
    """UNSUBSCRIBE. ``destination`` names the subscription when ``id`` is None (1.0).

    ``durable_name`` asks for the durable subscription itself to be removed.
    """

    __slots__ = ("client_id", "destination", "durable_name", "id", "receipt")

    def __init__(
        self,
        id: str | None,
        destination: str | None,
        durable_name: str | None,
        client_id: str | None,
        receipt: bytes | None,
    ) -> None:
        self.id = id
        self.destination = destination
        self.durable_name = durable_name
        self.client_id = client_id
        self.receipt = receipt


class Ack(Event):
    """ACK: by ``ack_id`` in 1.2, by ``message_id`` and ``subscription`` in 1.1, by ``message_id`` in 1.0."""

    __slots__ = ("ack_id", "message_id", "receipt", "subscription", "transaction")

    def __init__(
        self,
        ack_id: bytes | None,
        message_id: bytes | None,
        subscription: str | None,
        transaction: str | None,
        receipt: bytes | None,
    ) -> None:
        self.ack_id = ack_id
        self.message_id = message_id
        self.subscription = subscription
        self.transaction = transaction
        self.receipt = receipt


class Nack(Ack):
    """NACK, from 1.1; the same headers as ACK."""

    __slots__ = ()


class _Transaction(Event):
    __slots__ = ("receipt", "transaction")

    def __init__(self, transaction: str, receipt: bytes | None) -> None:
        self.transaction = transaction
        self.receipt = receipt


class Begin(_Transaction):
    """BEGIN."""

    __slots__ = ()


class Commit(_Transaction):
    """COMMIT."""

    __slots__ = ("numbered",)

    def __init__(self, transaction: str, receipt: bytes | None, numbered: Numbered | None = None) -> None:
        super().__init__(transaction, receipt)
        self.numbered = numbered


class Abort(_Transaction):
    """ABORT."""

    __slots__ = ()


class Disconnect(Event):
    """DISCONNECT: the last event; what follows on the wire is not read."""

    __slots__ = ("receipt",)

    def __init__(self, receipt: bytes | None) -> None:
        self.receipt = receipt


class Failed(Event):
    """The peer broke the protocol: the last event. The ERROR frame is in the output already."""

    __slots__ = ("error",)

    def __init__(self, error: BrokerError) -> None:
        self.error = error
