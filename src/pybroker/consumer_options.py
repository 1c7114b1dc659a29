"""What a subscription asks for beside its destination, acknowledgement mode and prefetch. Owns the value and its checks."""

from __future__ import annotations

from dataclasses import dataclass

from pybroker.errors import SubscriptionError

CONSUMER_PRIORITY_MIN = -128
CONSUMER_PRIORITY_MAX = 127


@dataclass(frozen=True, slots=True)
class ConsumerOptions:
    """How a consumer differs from one that takes whatever comes. Raises SubscriptionError for what is out of range.

    selector   only messages that it is true for; "" = all
    exclusive  of the exclusive consumers of a queue one gets everything
    priority   consumers with a higher one are served first, while they have credit
    retroactive  a new subscription of a topic gets first what the topic has kept, as its policy says
    """

    selector: str = ""
    exclusive: bool = False
    priority: int = 0
    retroactive: bool = False

    def __post_init__(self) -> None:
        if not CONSUMER_PRIORITY_MIN <= self.priority <= CONSUMER_PRIORITY_MAX:
            raise SubscriptionError(
                f"a consumer's priority must be {CONSUMER_PRIORITY_MIN} to {CONSUMER_PRIORITY_MAX}, not {self.priority}"
            )


PLAIN = ConsumerOptions()
