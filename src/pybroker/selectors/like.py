"""LIKE: patterns of ``%`` and ``_`` against text, in time bounded by the text's length. No backtracking, whatever the pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Run = Sequence[str | None]  # characters; None: any one


def like_matcher(runs: Sequence[Run]) -> Callable[[str], bool]:
    """Whether a whole text is the runs in their order, with anything between one and the next.

    The first run must begin the text and the last one end it. Each of the others is taken where it comes first: a later place
    leaves less room for those behind it.
    """
    if len(runs) == 1:
        return _whole(runs[0])
    first, *middle, last = runs
    begins = _whole(first)
    ends = _whole(last)
    first_length, last_length = len(first), len(last)
    length_min = first_length + last_length
    finders = [_finder(run) for run in middle]

    def matches(text: str) -> bool:
        if len(text) < length_min or not begins(text[:first_length]):
            return False
        end = len(text) - last_length
        if not ends(text[end:]):
            return False
        at = first_length
        for find in finders:
            at = find(text, at, end)
            if at < 0:
                return False
        return True

    return matches


def _whole(run: Run) -> Callable[[str], bool]:
    """Whether a text is the run."""
    if None not in run:
        return "".join(character or "" for character in run).__eq__
    pattern = "".join("." if character is None else re.escape(character) for character in run)
    fullmatch = re.compile(pattern, re.DOTALL).fullmatch
    return lambda text: fullmatch(text) is not None


def _finder(run: Run) -> Callable[[str, int, int], int]:
    """Finds a run in text[at:end] where it comes first: the place behind it, or -1."""
    length = len(run)
    if None not in run:
        literal = "".join(character or "" for character in run)

        def find_literal(text: str, at: int, end: int) -> int:
            found = text.find(literal, at, end)
            return found + length if found >= 0 else -1

        return find_literal

    # Shift-And: bit i of `state` says that the first i + 1 characters of the run end here. One step for each character.
    anywhere = sum(1 << place for place, character in enumerate(run) if character is None)
    places: dict[str, int] = {}
    for place, character in enumerate(run):
        if character is not None:
            places[character] = places.get(character, anywhere) | 1 << place
    goal = 1 << (length - 1)

    def find(text: str, at: int, end: int) -> int:
        state = 0
        for place in range(at, end):
            state = (state << 1 | 1) & places.get(text[place], anywhere)
            if state & goal:
                return place + 1
        return -1

    return find
