"""A side copy that begins with nothing, for a current copy that can't be read: the identity stays, the old one stands."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from pybroker.store import format as fmt
from pybroker.store.copies import Copies, DiskCopies, MemoryCopies

KEY = fmt.message_key(1, 1)


@pytest.fixture(params=["memory", "disk"])
def copies(request: pytest.FixtureRequest, tmp_path: Path) -> Copies:
    numbers = count()

    def incarnation() -> str:
        return f"copy{next(numbers)}"

    if request.param == "memory":
        return MemoryCopies("set", "a", incarnation)
    return DiskCopies(tmp_path, "set", "a", incarnation)


def test_an_empty_side_has_the_same_identity_and_becomes_the_current_copy(copies: Copies):
    store = copies.open()
    store.apply([(KEY, fmt.encode_number(KEY, 1))], (1, 1), True)
    store_id, starts, incarnation = store.store_id, store.starts, copies.identity.incarnation
    side = copies.begin_side(store, True)
    assert side.backend.get(KEY) is None
    assert (side.store_id, side.position) == (store_id, (0, 0))
    assert side.starts > starts
    side.apply([(KEY, fmt.encode_number(KEY, 2)), side.history_change(2, 1)], (2, 1), True)
    copies.swap(side)
    store = copies.open()
    assert fmt.decode_number(KEY, store.backend.get(KEY) or b"") == 2
    assert store.position == (2, 1)
    assert (store.store_id, copies.identity.incarnation) == (store_id, incarnation)
    copies.close()


def test_an_empty_side_that_is_given_up_leaves_the_current_copy(copies: Copies):
    store = copies.open()
    store.apply([(KEY, fmt.encode_number(KEY, 1))], (1, 1), True)
    incarnation = copies.identity.incarnation
    copies.begin_side(store, True)
    store = copies.abandon_side()
    assert store.position == (1, 1)
    assert fmt.decode_number(KEY, store.backend.get(KEY) or b"") == 1
    assert copies.identity.incarnation == incarnation
    copies.close()
