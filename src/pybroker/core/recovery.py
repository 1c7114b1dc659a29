"""What topics keep for late subscribers: the last messages, by policy (JMS: retroactive consumers). A part of `Core`.

Kept in memory only, by this life of the core: a restart, or another leader, begins with nothing. Bounded for each topic by its
policy, and in all by `limits.recovery_bytes_max` and `recovery_topics_max`: past these, what the longest silent topic has goes
first. A message counts with what its objects take, too.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from pybroker.core.entry import ENTRY_BYTES
from pybroker.destination import Destination, matches, parse_destination
from pybroker.message import Message
from pybroker.policies import DestinationPolicy

if TYPE_CHECKING:
    from pybroker.core.broker import Core
    from pybroker.core.queue import Queue

TOPIC_PREFIX = "/topic/"


class _Kept:
    """What one topic has kept: each message with its number, and their bytes."""

    __slots__ = ("messages", "size")

    def __init__(self) -> None:
        self.messages: deque[tuple[int, Message]] = deque()
        self.size = 0


class Recovery:
    """`size`: bytes of what is kept."""

    def __init__(self, core: Core) -> None:
        self.size = 0
        self._core = core
        self._topics: dict[str, _Kept] = {}  # the one that was published to last stands last
        self._number = 0  # of the last message, over all topics

    def __len__(self) -> int:
        return sum(len(kept.messages) for kept in self._topics.values())

    def policy_of(self, topic: Destination) -> DestinationPolicy | None:
        """The policy of a topic that keeps something, else None."""
        policy = self._core.policies.of(topic)
        return policy if policy.recovery_messages or policy.recovery_seconds else None

    def keep(self, message: Message, policy: DestinationPolicy) -> None:
        """A message was published to a topic with that policy."""
        kept = self._topics.pop(message.destination, None) or _Kept()
        self._topics[message.destination] = kept
        messages = kept.messages
        self._number += 1
        messages.append((self._number, message))
        size = message.size + ENTRY_BYTES
        kept.size += size
        self.size += size
        oldest = self._oldest(policy)
        while (
            (policy.recovery_messages and len(messages) > policy.recovery_messages)
            or (kept.size > policy.recovery_bytes and len(messages) > 1)
            or messages[0][1].timestamp < oldest
        ):
            gone = messages.popleft()[1].size + ENTRY_BYTES
            kept.size -= gone
            self.size -= gone
            if not messages:
                break
        limits = self._core.limits
        while self.size > limits.recovery_bytes_max or len(self._topics) > limits.recovery_topics_max:
            self.size -= self._topics.pop(next(iter(self._topics))).size

    def recover(self, queue: Queue, retroactive: bool) -> None:
        """Give a new subscription what its topics have kept, in the order in which it was published."""
        found: list[tuple[int, Message]] = []
        for text in self._matching(queue.name):
            policy = self._core.policies.of(parse_destination(text))
            if retroactive or policy.recovery_always:
                oldest = self._oldest(policy)
                found += [each for each in self._topics[text].messages if each[1].timestamp >= oldest]
        now = self._core.now
        for _, message in sorted(found, key=lambda each: each[0]):
            if (not message.expires or message.expires > now) and (
                queue.selector is None or queue.selector.matches(message)
            ):
                queue.accept(message)

    def _matching(self, pattern: str) -> list[str]:
        parts = tuple(pattern.split("."))
        if not any(part in ("*", ">") for part in parts):
            return [TOPIC_PREFIX + pattern] if TOPIC_PREFIX + pattern in self._topics else []
        return [text for text in self._topics if matches(parts, tuple(text[len(TOPIC_PREFIX) :].split(".")))]

    def _oldest(self, policy: DestinationPolicy) -> float:
        """What was published before that, in milliseconds since the Unix epoch, is too old."""
        return self._core.now - policy.recovery_seconds * 1_000 if policy.recovery_seconds else 0
