"""Whole connections of nonsense against a whole broker: it says so or goes on, keeps nothing of them, and serves others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile import native_pieces, stomp_pieces
from tests.hostile.arena import arena, on_virtual_time

Attack = tuple[list[bytes], bool, bool]


def attacks(connections: st.SearchStrategy[list[bytes]], native: bool) -> None:
    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(connections, st.booleans(), st.booleans()), min_size=1, max_size=3))
    def many(tries: list[Attack]) -> None:
        async def story() -> None:
            async with arena() as it:
                for pieces, reads, polite in tries:
                    await it.attack(pieces, native=native, reads=reads, polite=polite)
                await it.check()

        on_virtual_time(story)

    many()


@pytest.mark.parametrize("native", [False, True], ids=["stomp", "native"])
def test_any_connection(native: bool) -> None:
    attacks(native_pieces.connections if native else stomp_pieces.connections, native)
