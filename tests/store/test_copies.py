"""One suite for every `Copies`, and a crash at every file operation of the one on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pybroker.errors import StoreError
from pybroker.store.chunks import FIRST, STOP, replace
from pybroker.store.copies import Copies, MemoryCopies
from tests.store.filled_copies import content, fill, names, on_disk
from tests.store.forgetful import ForgetfulBackend


@pytest.fixture(params=["disk", "memory", "forgetful"])
def copies(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Copies]:
    made: Copies
    if request.param == "disk":
        made = on_disk(tmp_path)
    elif request.param == "memory":
        made = MemoryCopies("set", "a", names())
    else:
        made = MemoryCopies("set", "a", names(), ForgetfulBackend)
    yield made
    made.close()


# ---- the suite


def test_a_new_copy_has_a_name_and_an_empty_store(copies: Copies) -> None:
    store = copies.open()
    assert (copies.identity.set, copies.identity.name, copies.identity.incarnation) == ("set", "a", "copy 1")
    assert copies.identity.starts == 0
    assert store.position == (0, 0)


def test_each_open_keeps_the_content_and_a_start_counts_when_it_is_said(copies: Copies) -> None:
    """An old copy must not outgrow its slot by being started where the slot can't be seen."""
    store = copies.open()
    fill(store, b"x", 1)
    kept = content(store)
    for starts in (0, 1, 2):
        store.close()
        store = copies.open()
        assert (copies.identity.incarnation, copies.identity.starts) == ("copy 1", starts)
        assert content(store) == kept
        copies.count_start()
        assert copies.identity.starts == starts + 1


def test_a_side_copy_holds_the_same_and_leaves_the_current_one_alone(copies: Copies) -> None:
    store = copies.open()
    fill(store, b"old ", 1, sync=False)
    kept = content(store)
    side = copies.begin_side(store)
    assert side is not store
    assert content(side) == kept
    assert (side.position, side.history, side.store_id) == (store.position, store.history, store.store_id)
    with pytest.raises(StoreError):
        store.read_page(1, 0, 1, 1)
    fill(side, b"new ", 2)
    store = copies.abandon_side(side)
    assert content(store) == kept
    with pytest.raises(StoreError):
        side.read_page(1, 0, 1, 1)


def test_a_swap_makes_the_side_copy_the_current_one(copies: Copies) -> None:
    store = copies.open()
    fill(store, b"old ", 1)
    for lsn in (2, 3, 4):
        side = copies.begin_side(store)
        fill(side, b"new ", lsn, sync=False)
        kept = content(side)
        store = copies.swap(side)
        assert content(store) == kept
        assert store.position == (lsn, lsn)
    store.close()
    assert content(copies.open()) == kept
    assert (copies.identity.incarnation, copies.identity.starts) == ("copy 1", 0)


def test_a_difference_is_written_into_the_side_copy(copies: Copies) -> None:
    store = copies.open()
    fill(store, b"old ", 1)
    kept = content(store)
    side = copies.begin_side(store)
    replace(side, FIRST, STOP, [])
    side_is_empty = content(side) == []
    store = copies.abandon_side(side)
    assert side_is_empty
    assert content(store) == kept
    side = copies.begin_side(store)
    replace(side, FIRST, STOP, kept[:-10])
    assert content(copies.swap(side)) == kept[:-10]


def test_after_an_open_the_side_copy_of_before_is_gone(copies: Copies) -> None:
    store = copies.open()
    fill(store, b"old ", 1)
    kept = content(store)
    side = copies.begin_side(store)
    fill(side, b"new ", 2)
    side.close()
    assert content(copies.open()) == kept


def test_only_the_open_store_can_be_copied_or_swapped(copies: Copies) -> None:
    store = copies.open()
    with pytest.raises(StoreError):
        copies.swap(store)
    side = copies.begin_side(store)
    with pytest.raises(StoreError):
        copies.begin_side(store)
    with pytest.raises(StoreError):
        copies.begin_side(side)
    store = copies.swap(side)
    with pytest.raises(StoreError):
        copies.swap(side)
    fill(store, b"x", 1)


def test_a_renewed_copy_keeps_its_store(copies: Copies) -> None:
    store = copies.open()
    fill(store, b"x", 1)
    copies.renew()
    assert copies.identity.incarnation == "copy 2"
    fill(store, b"y", 2)
    store.close()
    assert copies.open().position == (2, 2)
    assert (copies.identity.incarnation, copies.identity.starts) == ("copy 2", 0)


def test_a_copy_that_starts_anew_is_empty(copies: Copies) -> None:
    store = copies.open()
    fill(store, b"x", 1)
    store = copies.swap(copies.begin_side(store))
    store.close()
    store = copies.start_anew()
    assert (store.position, store.records) == ((0, 0), [])
    assert (copies.identity.incarnation, copies.identity.starts) == ("copy 2", 0)
    fill(store, b"y", 1)
    store.close()
    assert copies.open().position == (1, 1)
    assert copies.identity.incarnation == "copy 2"


def test_what_a_crash_forgets_is_not_lost_by_a_swap() -> None:
    copies = MemoryCopies("set", "a", names(), ForgetfulBackend)
    side = copies.begin_side(copies.open())
    fill(side, b"new ", 1, sync=False)
    kept = content(copies.swap(side))
    assert isinstance(copies.backend, ForgetfulBackend)
    copies.backend = copies.backend.crash()
    assert content(copies.open()) == kept
