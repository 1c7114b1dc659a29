"""What the frames of a STOMP client ask for, apart from SEND: headers in, an event out or a clear error.

Owns which headers each frame needs in each version, and ActiveMQ's and RabbitMQ's conventions for subscriptions.
It must never keep state. Follows "Client Frames" of STOMP 1.0, 1.1 and 1.2 (https://stomp.github.io).

* A durable subscription, as ActiveMQ has it: ``client-id`` in CONNECT or SUBSCRIBE, and ``activemq.subscriptionName``
  (or ``durable-subscription-name``) in SUBSCRIBE. As RabbitMQ has it: ``durable:true``, ``auto-delete:false`` and the
  subscription's ``id`` as its name, for topics only.
* ``activemq.prefetchSize`` from 1; ``prefetch-count`` from 1, or 0 for no limit.
* ``selector``, ``activemq.exclusive``, ``activemq.priority`` and ``activemq.retroactive``: see `ConsumerOptions`.
* ``browser:true``, as ActiveMQ has it: the messages of a queue are shown, and stay.
* ``producer-id`` and ``producer-sequence`` in COMMIT: see `stomp_numbered`.
"""

from __future__ import annotations

import re
from typing import cast

from pybroker.consumer_options import PLAIN, ConsumerOptions
from pybroker.errors import ProtocolError
from pybroker.protocols.stomp_events import (
    Abort,
    Ack,
    AckMode,
    Begin,
    Commit,
    Disconnect,
    Event,
    Nack,
    Subscribe,
    Unsubscribe,
)
from pybroker.protocols.stomp_headers import Headers, shown
from pybroker.protocols.stomp_numbered import NUMBERED, parse_numbered

ACK_MODES = ("auto", "client", "client-individual")
_HEARTBEAT_DIGITS_MAX = 10
_PREFETCH_DIGITS_MAX = 10
_PRIORITY = re.compile(r"-?[0-9]{1,3}", re.ASCII)
_TRANSACTION_EVENTS: dict[bytes, type[Begin | Commit | Abort]] = {b"BEGIN": Begin, b"COMMIT": Commit, b"ABORT": Abort}
_ACK_EVENTS = {b"ACK": Ack, b"NACK": Nack}


def parse_request(
    command: bytes, headers: Headers, version: str, client_id: str | None, receipt: bytes | None
) -> Event:
    """Make the event of a frame; ``client_id`` is the one given in CONNECT. Raise `ProtocolError`."""
    if version == "1.0":
        headers = [(name, value.strip(" ")) for name, value in headers]
    if command in _ACK_EVENTS:
        return _acknowledgement(command, headers, version, receipt)
    if command in _TRANSACTION_EVENTS:
        transaction = _required(command.decode(), headers, "transaction", "transaction:tx1")
        if command == b"COMMIT":
            return Commit(transaction, receipt, parse_numbered("COMMIT", *(first(headers, name) for name in NUMBERED)))
        return _TRANSACTION_EVENTS[command](transaction, receipt)
    if command == b"SUBSCRIBE":
        return _subscribe(headers, version, client_id, receipt)
    if command == b"UNSUBSCRIBE":
        return _unsubscribe(headers, version, client_id, receipt)
    if command == b"DISCONNECT":
        return Disconnect(receipt)
    raise ProtocolError("the session is connected already: CONNECT comes once, at the start")


def first(headers: Headers, name: str) -> str | None:
    """The first header of that name: of repeated headers the first one counts."""
    for key, value in headers:
        if key == name:
            return value
    return None


def parse_heart_beat(value: str | None) -> tuple[int, int]:
    """The numbers of a heart-beat header, milliseconds; (0, 0) without one. Raise `ProtocolError`."""
    if value is None:
        return 0, 0
    parts = value.split(",")
    numbers = [part for part in parts if part.isascii() and part.isdigit() and len(part) <= _HEARTBEAT_DIGITS_MAX]
    if len(parts) != 2 or len(numbers) != 2:
        raise ProtocolError(
            f"heart-beat must be two numbers of milliseconds, for example heart-beat:10000,10000, not {shown(value)}"
        )
    return int(numbers[0]), int(numbers[1])


def _required(command: str, headers: Headers, name: str, example: str) -> str:
    value = first(headers, name)
    if not value:
        raise ProtocolError(f"{command} needs the header {name}, for example {example}")
    return value


def _subscribe(headers: Headers, version: str, client_id: str | None, receipt: bytes | None) -> Subscribe:
    destination = _required("SUBSCRIBE", headers, "destination", "destination:/queue/NAME")
    identifier = first(headers, "id") or None
    if version != "1.0":
        identifier = _required("SUBSCRIBE", headers, "id", "id:0")
    ack = first(headers, "ack") or "auto"
    if ack not in ACK_MODES:
        raise ProtocolError(f"SUBSCRIBE header ack must be {', '.join(ACK_MODES)}, not {shown(ack)}")
    client_id = first(headers, "client-id") or client_id
    durable_name = _durable_name(headers)
    if durable_name and client_id is None:
        raise ProtocolError("a durable subscription needs the header client-id in CONNECT or SUBSCRIBE")
    if durable_name is None and destination.startswith("/topic/") and _asks_durable(headers):
        durable_name = identifier
        if identifier is None:
            raise ProtocolError("a durable subscription needs the header id, which is its name")
    return Subscribe(
        identifier,
        destination,
        cast(AckMode, ack),
        _prefetch(headers),
        durable_name,
        client_id,
        receipt,
        headers,
        _options(headers),
        first(headers, "browser") == "true",
    )


def _options(headers: Headers) -> ConsumerOptions:
    selector = first(headers, "selector") or ""
    exclusive = first(headers, "activemq.exclusive") == "true"
    priority = first(headers, "activemq.priority") or "0"
    if not _PRIORITY.fullmatch(priority):
        raise ProtocolError(f"SUBSCRIBE header activemq.priority must be a whole number, not {shown(priority)}")
    retroactive = first(headers, "activemq.retroactive") == "true"
    if not (selector or exclusive or retroactive or int(priority)):
        return PLAIN
    return ConsumerOptions(selector, exclusive, int(priority), retroactive)


def _durable_name(headers: Headers) -> str | None:
    return first(headers, "activemq.subscriptionName") or first(headers, "durable-subscription-name") or None


def _asks_durable(headers: Headers) -> bool:
    return first(headers, "durable") == "true" and first(headers, "auto-delete") == "false"


def _prefetch(headers: Headers) -> int | None:
    for name, unlimited in (("activemq.prefetchSize", None), ("prefetch-count", "0")):
        value = first(headers, name)
        if value is None:
            continue
        if value == unlimited:
            return None
        if not (value.isascii() and value.isdigit() and len(value) <= _PREFETCH_DIGITS_MAX and int(value) >= 1):
            raise ProtocolError(f"SUBSCRIBE header {name} must be a whole number from 1, not {shown(value)}")
        return int(value)
    return None


def _unsubscribe(headers: Headers, version: str, client_id: str | None, receipt: bytes | None) -> Unsubscribe:
    identifier = first(headers, "id") or None
    destination = first(headers, "destination") or None
    durable_name = _durable_name(headers)
    if durable_name is None and _asks_durable(headers):
        durable_name = identifier
    if identifier is None and durable_name is None and (destination is None or version != "1.0"):
        what = "id or destination" if version == "1.0" else "id"
        raise ProtocolError(f"UNSUBSCRIBE needs the header {what} of its SUBSCRIBE, for example id:0")
    return Unsubscribe(identifier, destination, durable_name, first(headers, "client-id") or client_id, receipt)


def _acknowledgement(command: bytes, headers: Headers, version: str, receipt: bytes | None) -> Ack:
    name = command.decode()
    ack_id = None
    message_id = first(headers, "message-id")
    subscription = first(headers, "subscription") or None
    if version == "1.2":
        ack_id = _required(name, headers, "id", "id:ID with the value of the MESSAGE's ack header").encode()
    else:
        message_id = _required(name, headers, "message-id", "message-id:ID as in the MESSAGE")
        if version == "1.1":
            subscription = _required(name, headers, "subscription", "subscription:0 as in the MESSAGE")
    transaction = first(headers, "transaction")
    if transaction == "":
        raise ProtocolError(f"{name} has an empty transaction header: name a transaction, or leave it out")
    encoded = None if message_id is None else message_id.encode()
    return _ACK_EVENTS[command](ack_id, encoded, subscription, transaction, receipt)
