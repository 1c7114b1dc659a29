"""A message as its receiver sees it: what is read of it, whether it was delivered or only looked at."""

from __future__ import annotations

from pybroker.message import Message


class MessageView:
    """The content of a message. `deliveries`: how many of it had ended without an acknowledgement."""

    __slots__ = ("_deliveries", "_message")

    def __init__(self, message: Message, deliveries: int) -> None:
        self._message = message
        self._deliveries = deliveries

    @property
    def body(self) -> bytes:
        return self._message.body

    @property
    def headers(self) -> list[tuple[str, str]]:
        """The sender's headers in order, repeats included."""
        return self._message.headers

    def header(self, name: str) -> str | None:
        """The first header of that name, or None."""
        return self._message.header(name)

    @property
    def destination(self) -> str:
        return self._message.destination

    @property
    def message_id(self) -> str:
        """The same on every redelivery."""
        return self._message.message_id.decode()

    @property
    def priority(self) -> int:
        return self._message.priority

    @property
    def durable(self) -> bool:
        return self._message.durable

    @property
    def expires(self) -> int:
        """Milliseconds since the Unix epoch, 0 = never."""
        return self._message.expires

    @property
    def timestamp(self) -> int:
        """When the broker accepted it, milliseconds since the Unix epoch."""
        return self._message.timestamp

    @property
    def deliveries(self) -> int:
        """Deliveries of it before this one that ended without an acknowledgement."""
        return self._deliveries

    @property
    def redelivered(self) -> bool:
        return self._deliveries > 0
