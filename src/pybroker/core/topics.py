"""The subscription tree: which subscriptions a topic's message goes to. Owns patterns only; knows no message.

A tree by the parts of the patterns: the cost of a look-up grows with what matches, not with how many subscriptions there are.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class _Node(Generic[T]):
    __slots__ = ("children", "here", "rest")

    def __init__(self) -> None:
        self.children: dict[str, _Node[T]] = {}
        self.here: dict[T, None] = {}  # patterns that end in this node, in order of subscription
        self.rest: dict[T, None] = {}  # patterns that end in ">" below this node


class SubscriptionTree(Generic[T]):
    """Maps patterns to subscribers (any hashable), and names to the subscribers whose pattern matches."""

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, pattern: tuple[str, ...], subscriber: T) -> None:
        node = self._root
        for part in pattern:
            if part == ">":
                break
            node = node.children.setdefault(part, _Node())
        where = node.rest if pattern[-1] == ">" else node.here
        self._count += subscriber not in where
        where[subscriber] = None

    def remove(self, pattern: tuple[str, ...], subscriber: T) -> None:
        """Undo `add`; KeyError when it isn't there. Branches that are empty go away."""
        path = [self._root]
        for part in pattern:
            if part == ">":
                break
            path.append(path[-1].children[part])
        where = path[-1].rest if pattern[-1] == ">" else path[-1].here
        del where[subscriber]
        self._count -= 1
        for depth in range(len(path) - 1, 0, -1):
            node = path[depth]
            if node.children or node.here or node.rest:
                break
            del path[depth - 1].children[pattern[depth - 1]]

    def match(self, parts: tuple[str, ...]) -> list[T]:
        """The subscribers whose pattern matches the name, each once for each of its patterns."""
        found: list[T] = []
        nodes = [self._root]
        for part in parts:
            following = []
            for node in nodes:
                found.extend(node.rest)
                for key in (part, "*") if part != "*" else ("*",):
                    child = node.children.get(key)
                    if child is not None:
                        following.append(child)
            nodes = following
            if not nodes:
                return found
        for node in nodes:
            found.extend(node.here)
            found.extend(node.rest)
        return found
