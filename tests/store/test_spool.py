"""The spool: empty at each open; nothing is removed but what was marked as a spool."""

from __future__ import annotations

from pathlib import Path

import pytest

from pybroker.errors import StoreFormatError, StoreLocked
from pybroker.operations import PUT_MESSAGE
from pybroker.store import LevelDBBackend, Store, discard, open_spool
from pybroker.store.spool import MARKER
from tests.store.samples import Writer, message


def test_a_spool_is_empty_at_each_open(tmp_path: Path) -> None:
    for _ in range(3):
        store = open_spool(tmp_path / "data" / "spool")
        assert store.starts == 1
        assert store.read_page(1, 0, 10, 1_000).entries == []
        Writer(store)((PUT_MESSAGE, 1, 1, message()), sync=False)
        assert len(store.read_page(1, 0, 10, 1_000).entries) == 1
        store.close()
    discard(tmp_path / "data" / "spool")
    discard(tmp_path / "data" / "spool")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_damaged_spool_is_discarded_too(tmp_path: Path) -> None:
    open_spool(tmp_path / "spool").close()
    for path in (tmp_path / "spool").glob("MANIFEST*"):
        path.write_bytes(b"\0")
    (tmp_path / "spool" / "CURRENT").unlink()
    open_spool(tmp_path / "spool").close()


def test_a_spool_in_use_is_left_alone(tmp_path: Path) -> None:
    store = open_spool(tmp_path / "spool")
    with pytest.raises(StoreLocked):
        discard(tmp_path / "spool")
    Writer(store)((PUT_MESSAGE, 1, 1, message()), sync=False)
    assert len(store.read_page(1, 0, 10, 1_000).entries) == 1
    store.close()


def test_what_is_not_a_spool_is_left_alone(tmp_path: Path) -> None:
    Store.open(LevelDBBackend(tmp_path / "store")).close()
    with pytest.raises(StoreFormatError, match="not a spool"):
        discard(tmp_path / "store")
    Store.open(LevelDBBackend(tmp_path / "store", create=False)).close()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / MARKER).touch()
    (tmp_path / "letters" / "letter.txt").write_text("mine")
    with pytest.raises(StoreFormatError, match=r"letter\.txt"):
        discard(tmp_path / "letters")
    (tmp_path / "link").symlink_to(tmp_path / "letters")
    with pytest.raises(StoreFormatError, match="not a directory"):
        discard(tmp_path / "link")
    with pytest.raises(StoreFormatError, match="not a directory"):
        discard(tmp_path / "letters" / "letter.txt")
    assert (tmp_path / "letters" / "letter.txt").read_text() == "mine"
