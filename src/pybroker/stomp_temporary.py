"""A STOMP connection's own names of temporary destinations, as ActiveMQ has them. Owns the way from them to the broker's names.

``/temp-queue/NAME`` and ``/temp-topic/NAME`` mean another destination on each connection: the first use makes it. In the
``reply-to`` of what the connection sends they become the names that others can send to (``/remote-temp-queue/ID``).
"""

from __future__ import annotations

import secrets

from pybroker.core.broker import Core
from pybroker.core.consumer import Connection
from pybroker.destination import local_kind
from pybroker.message import REPLY_TO, Message, encode_headers


class LocalNames:
    """Those of one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._secret = ""
        self._names: dict[str, str] = {}

    def resolve(self, core: Core, text: str) -> str:
        """The broker's name for a destination; any other than the connection's own is its own. Raises BrokerError."""
        known = self._names.get(text)
        if known is not None:
            return known
        kind = local_kind(text)
        if kind is None:
            return text
        self._secret = self._secret or secrets.token_hex(16)
        name = core.temporaries.create(self._connection, kind, f"{self._secret} {text}")
        self._names[text] = name
        return name

    def translate(self, core: Core, message: Message) -> None:
        """Let a message that the connection sends name what others know. Raises BrokerError."""
        message.destination = self.resolve(core, str(message.destination))
        headers = message.headers
        if any(name == REPLY_TO for name, _ in headers):
            pairs = [
                (name, self.resolve(core, value.strip(" ")) if name == REPLY_TO else value) for name, value in headers
            ]
            block = encode_headers(pairs)
            message.size += len(block) - len(message.header_block)
            message.header_block = block
