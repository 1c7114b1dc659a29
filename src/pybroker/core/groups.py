"""Message groups: which consumer has which group of a queue (header ``JMSXGroupID``). Owns the table; gives out nothing.

A group has an owner from its first message on until the owner leaves, or a message with a negative ``JMSXGroupSeq`` closes it.
When the broker remembers `limits.groups_max` names, further groups are bound together, by a hash of their names: a bucket is a
coarser group.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING
from zlib import crc32

from pybroker.message import mentions

if TYPE_CHECKING:
    from pybroker.core.broker import Core
    from pybroker.core.consumer import Consumer
    from pybroker.message import Message

GROUP_HEADER = b"JMSXGroupID:"
SEQUENCE_HEADER = b"JMSXGroupSeq:"
BUCKETS = 1_024  # of the groups of one queue whose names are not remembered
NAME_MAX = 64  # bytes of a name that is remembered as it is; of a longer one its digest

GroupKey = bytes | int  # a name (or its digest), or the number of a bucket


def _value(block: bytes, header: bytes) -> bytes:
    """The value of the first header of that name in a header block, as it is written there; empty when there is none."""
    if block.startswith(header):
        start = len(header)
    else:
        start = block.find(b"\n" + header)
        if start < 0:
            return b""
        start += 1 + len(header)
    return block[start : block.index(b"\n", start)]


def may_be_grouped(message: Message) -> bool:
    """Whether a message names the header of a group; False: it is in none. Costs little where there are no headers."""
    block = message.header_block
    return bool(block) and mentions(block, GROUP_HEADER)


def group_of(message: Message) -> bytes:
    """The name of a message's group, empty when it is in none."""
    if not may_be_grouped(message):
        return b""
    name = _value(message.header_block, GROUP_HEADER)
    return name if len(name) <= NAME_MAX else b"\0" + blake2b(name, digest_size=32).digest()


def closes(message: Message) -> bool:
    """Whether its group ends with a message."""
    return _value(message.header_block, SEQUENCE_HEADER).strip().startswith(b"-")


class Groups:
    """The groups of one queue that have an owner."""

    __slots__ = ("_core", "_owners", "_owns")

    def __init__(self, core: Core) -> None:
        self._core = core
        self._owners: dict[GroupKey, Consumer] = {}
        self._owns: dict[Consumer, set[GroupKey]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def owner(self, name: bytes) -> Consumer | None:
        """Who has a group; None when it is free."""
        if not self._owners:
            return None
        return self._owners.get(name) or self._owners.get(_bucket(name))

    def count(self, consumer: Consumer) -> int:
        """How many groups a consumer has."""
        return len(self._owns.get(consumer, ()))

    def bind(self, name: bytes, consumer: Consumer) -> None:
        """Give a free group to a consumer."""
        key: GroupKey = name
        if self._core.group_names < self._core.limits.groups_max:
            self._core.group_names += 1
        else:
            key = _bucket(name)
        self._owners[key] = consumer
        self._owns.setdefault(consumer, set()).add(key)

    def close(self, name: bytes) -> bool:
        """Free a group; False when it is one of a bucket, which stays for the others."""
        owner = self._owners.pop(name, None)
        if owner is None:
            return False
        self._owns[owner].discard(name)
        self._core.group_names -= 1
        return True

    def release(self, consumer: Consumer) -> bool:
        """Free all groups of a consumer; whether it had any."""
        keys = self._owns.pop(consumer, set())
        for key in keys:
            del self._owners[key]
            self._core.group_names -= key.__class__ is bytes
        return bool(keys)


def _bucket(name: bytes) -> int:
    return crc32(name) % BUCKETS
