"""What topics keep for late subscribers: the last messages, by policy (JMS: retroactive consumers). A part of `Core`.

Kept in memory only, by this life of the core: a restart, or another leader, begins with nothing. Bounded for each topic by its
policy, and in all by `limits.recovery_bytes_max` and `recovery_topics_max`: past these, what the longest silent topic has goes
first. A message counts with what its objects take, too.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from pybroker.core.entry import ENTRY_BYTES
from pybroker.core.kinds import BACKLOG
from pybroker.destination import Destination, matches
from pybroker.message import Message
from pybroker.policies import DestinationPolicy

if TYPE_CHECKING:
    from pybroker.core.broker import Core
    from pybroker.core.queue import Queue

TOPIC_PREFIX = "/topic/"


class _Kept:
    """What one topic has kept, by its policy: each message with its number, and their bytes."""

    __slots__ = ("messages", "parts", "policy", "size")

    def __init__(self, text: str, policy: DestinationPolicy) -> None:
        self.parts = tuple(text[len(TOPIC_PREFIX) :].split("."))
        self.policy = policy
        self.messages: deque[tuple[int, Message]] = deque()
        self.size = 0


class Recovery:
    """`size`: bytes of what is kept."""

    def __init__(self, core: Core) -> None:
        self.size = 0
        self._core = core
        self._always = True in core.policies.all_of("recovery_always")  # for some topics
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
        kept = self._topics.pop(message.destination, None) or _Kept(message.destination, policy)
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
        """Give a new subscription what its topics have kept, in the order in which it was published.

        One that is not durable gets the newest ones, no more than may wait for it.
        """
        if not self._topics or not (retroactive or self._always):
            return
        found: list[tuple[int, Message]] = []
        for kept in self._matching(queue.name):
            if retroactive or kept.policy.recovery_always:
                oldest = self._oldest(kept.policy)
                found += [each for each in kept.messages if each[1].timestamp >= oldest]
        count_max = queue.policy.pending_messages_max if queue.kind == BACKLOG else len(found)
        now = self._core.now
        chosen: list[Message] = []
        for _, message in sorted(found, key=lambda each: -each[0]):
            if len(chosen) == count_max:
                break
            if (not message.expires or message.expires > now) and (
                queue.selector is None or queue.selector.matches(message)
            ):
                chosen.append(message)
        for message in reversed(chosen):
            queue.accept(message)

    def _matching(self, pattern: str) -> list[_Kept]:
        parts = tuple(pattern.split("."))
        if not any(part in ("*", ">") for part in parts):
            kept = self._topics.get(TOPIC_PREFIX + pattern)
            return [] if kept is None else [kept]
        return [kept for kept in self._topics.values() if matches(parts, kept.parts)]

    def _oldest(self, policy: DestinationPolicy) -> float:
        """What was published before that, in milliseconds since the Unix epoch, is too old."""
        return self._core.now - policy.recovery_seconds * 1_000 if policy.recovery_seconds else 0
