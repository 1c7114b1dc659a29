"""The copies on disk: a crash and an error at every file operation, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from pybroker.errors import ConfigurationError, StoreDamaged, StoreError, StoreFormatError, StoreLocked
from pybroker.store import LevelDBBackend, Store
from pybroker.store.check import verify
from pybroker.store.copies import DiskCopies, remove_copies
from pybroker.store.files import Files
from pybroker.store.layout import current_name, read_identity
from tests.store.filled_copies import MESSAGES, fill, on_disk

# ---- on the disk: crashes


class Crash(BaseException):
    """The process ends here."""


class FailingFiles(Files):
    """Ends, or fails, at its `at`-th operation; `half` does half of it first, or all where there is no half.

    With `power` a crash is one of the machine: a rename that was not followed by a sync of its directory is undone.
    """

    def __init__(self, at: int, error: type[BaseException] = Crash, half: bool = False, power: bool = False) -> None:
        self.at = at
        self.error = error
        self.half = half
        self.power = power
        self.done: list[tuple[str, Path]] = []
        self.renamed: dict[Path, bytes | None] = {}  # and not synced yet: what was there before

    def _step(self, name: str, path: Path) -> bool:
        """Whether to do half of it; raises when it is the one to fail."""
        self.done.append((name, path))
        if len(self.done) < self.at or (len(self.done) > self.at and self.error is not Crash):
            return False
        if self.half and len(self.done) == self.at:
            return True
        self.end()
        return False

    def end(self) -> None:
        if self.power:
            for path, data in self.renamed.items():
                if data is None:
                    path.unlink()
                else:
                    path.write_bytes(data)
            self.renamed = {}
        raise self.error("injected")

    def write(self, path: Path, data: bytes) -> None:
        half = self._step("write", path)
        super().write(path, data[: len(data) // 2] if half else data)
        if half:
            self.end()

    def copy(self, path: Path, target: Path) -> None:
        half = self._step("copy", target)
        super().copy(path, target)
        if half:
            os.truncate(target, target.stat().st_size // 2)
            self.end()

    def sync(self, path: Path) -> None:
        half = self._step("sync", path)
        super().sync(path)
        self.renamed = {name: data for name, data in self.renamed.items() if name.parent != path}
        if half:
            self.end()

    def rename(self, path: Path, target: Path) -> None:
        half = self._step("rename", target)
        self.renamed.setdefault(target, target.read_bytes() if target.exists() else None)
        super().rename(path, target)
        if half:
            self.end()

    def make_directory(self, path: Path) -> None:
        half = self._step("make_directory", path)
        super().make_directory(path)
        if half:
            self.end()

    def link(self, path: Path, target: Path) -> None:
        half = self._step("link", target)
        super().link(path, target)
        if half:
            self.end()

    def unlink(self, path: Path) -> None:
        half = self._step("unlink", path)
        super().unlink(path)
        if half:
            self.end()

    def remove_directory(self, path: Path) -> None:
        half = self._step("remove_directory", path)
        super().remove_directory(path)
        if half:
            self.end()


NEVER = 1 << 30


def life(copies: DiskCopies, reached: list[str]) -> None:
    """From an open over a side copy that is given up to one that is swapped in."""
    store = copies.open()
    side = copies.begin_side(store)
    fill(side, b"given up ", 8)
    store = copies.abandon_side(side)
    side = copies.begin_side(store)
    fill(side, b"new ", 2, sync=False)
    reached.append("swap")
    copies.swap(side)
    reached.append("swapped")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that is possible: hundreds of lives with a dozen fsyncs each."""
    memory = "/dev/shm"
    path = Path(tempfile.mkdtemp(prefix="pybroker-", dir=memory if os.access(memory, os.W_OK) else None))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def seed(tmp_path: Path) -> Path:
    """A data directory whose copy has tables and a log, and what its store must hold before and after a `life`."""
    copies = on_disk(tmp_path / "seed")
    store = copies.open()
    fill(store, b"old ", 1)
    store = copies.swap(copies.begin_side(store))  # so that the pointer file is there, and tables
    store.close()
    copies.close()
    return tmp_path / "seed"


def whole(path: Path) -> dict[bytes, int]:
    """Texts of the messages in the current copy (how many each), as the next start finds them."""
    copies = on_disk(path)
    try:
        store = copies.open()
        assert copies.identity.incarnation == "copy 1"
        entries = store.read_page(1, 0, 1_000, 1 << 30).entries
        texts = [entry.message.body.rstrip(b"0123456789") for entry in entries]
        assert store.position == {b"old ": (1, 1), b"new ": (2, 2), b"next ": (9, 9)}[texts[0]]
    finally:
        copies.close()
    left = sorted(each.name for each in (path / "data").iterdir())
    assert left == sorted(["current", current_name(path / "data"), "identity", "lock"]), "nothing is left over"
    assert verify(path / "data").ok
    return {text: texts.count(text) for text in set(texts)}


@pytest.mark.parametrize("kind", ["crash", "half", "power", "half power"])
def test_a_crash_at_any_file_operation_leaves_a_whole_copy(seed: Path, tmp_path: Path, kind: str) -> None:
    met = set()
    for at in count(1):
        path = tmp_path / f"{at}"
        shutil.copytree(seed, path)
        files = FailingFiles(at, Crash, "half" in kind, "power" in kind)
        copies = on_disk(path, files)
        reached: list[str] = []
        with suppress(Crash):
            life(copies, reached)
        copies.close()
        met.add(files.done[-1][0])
        found = whole(path)
        shutil.rmtree(path)
        if "swapped" in reached:
            assert found == {b"new ": MESSAGES}
            break
        assert found in ({b"old ": MESSAGES}, {b"new ": MESSAGES}), files.done[-1]
        assert reached or found == {b"old ": MESSAGES}, files.done[-1]
    assert at > 40
    assert met == {"write", "sync", "rename", "make_directory", "link", "copy", "unlink", "remove_directory"}


def test_an_error_at_any_file_operation_can_be_gone_on_from(seed: Path, tmp_path: Path) -> None:
    for at in count(1):
        path = tmp_path / f"{at}"
        shutil.copytree(seed, path)
        files = FailingFiles(at, OSError)
        copies = on_disk(path, files)
        reached: list[str] = []
        with suppress(StoreError):
            life(copies, reached)
        store = copies.abandon_side()
        text = store.read_page(1, 0, 1, 1 << 30).entries[0].message.body
        assert text in (b"old 0", b"new 0") if reached else text == b"old 0", files.done[-1]
        fill(store, b"next ", 9)
        copies.close()
        assert whole(path) == {b"next ": MESSAGES}
        shutil.rmtree(path)
        if len(files.done) < at:
            break
    assert at > 40


def test_the_order_of_a_swap(seed: Path) -> None:
    """What the pointer names is synced before it, and the old copy is there until the pointer is."""
    files = FailingFiles(NEVER)
    copies = on_disk(seed, files)
    side = copies.begin_side(copies.open())
    fill(side, b"new ", 2)
    files.done = []
    copies.swap(side)
    copies.close()
    data = seed / "data"
    name = current_name(data)
    pointer = files.done.index(("rename", data / "current"))
    before, after = files.done[:pointer], files.done[pointer + 1 :]
    synced = {path.name for kind, path in before if kind == "sync" and path.parent == data / name}
    assert {"CURRENT"} < synced
    assert any(each.endswith(".ldb") for each in synced)
    assert any(each.startswith("MANIFEST") for each in synced)
    assert ("sync", data / name) in before
    assert ("sync", data) in before, "the name of the side copy's directory"
    assert before[-1] == ("sync", data / "current.new")
    assert after[0] == ("sync", data)
    assert {kind for kind, _ in before} == {"sync", "write"}
    assert all(path.parent.name != name for kind, path in after if kind == "unlink")


def test_tables_of_a_side_copy_cost_no_space(seed: Path) -> None:
    files = FailingFiles(NEVER)
    copies = on_disk(seed, files)
    copies.begin_side(copies.open())
    current = seed / "data" / current_name(seed / "data")
    linked = {path.name for kind, path in files.done if kind == "link"}
    assert linked == {path.name for path in current.glob("*.ldb")} != set()
    for path in current.iterdir():
        if path.suffix != ".ldb":
            assert path.stat().st_nlink == 1, "only tables never change"
    copies.close()


def test_where_links_are_not_possible_tables_are_copied(seed: Path) -> None:
    class NoLinks(Files):
        def link(self, path: Path, target: Path) -> None:
            raise PermissionError(1, "no links here")

    copies = on_disk(seed, NoLinks())
    copies.swap(copies.begin_side(copies.open()))
    copies.close()
    assert whole(seed) == {b"old ": MESSAGES}


# ---- on the disk: identity and pointer


def test_the_identity_is_a_file_that_can_be_read(tmp_path: Path) -> None:
    copies = on_disk(tmp_path)
    store = copies.open()
    copies.count_start()
    found = json.loads((tmp_path / "data" / "identity").read_text())
    assert found == {
        "format": 1,
        "set": "set",
        "name": "a",
        "incarnation": "copy 1",
        "starts": 1,
        "store_id": store.store_id,
        "opened": 1,
    }
    assert read_identity(tmp_path / "data") == copies.identity
    copies.close()


def test_another_replicas_directory_is_refused(seed: Path) -> None:
    with pytest.raises(ConfigurationError, match="belongs to replica 'a' of set 'set'"):
        on_disk(seed, name="b").open()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "set": "set"}', '{"format": 2}'])
def test_an_identity_that_can_not_be_read_is_refused(seed: Path, text: str) -> None:
    (seed / "data" / "identity").write_text(text)
    with pytest.raises(StoreError, match=r"remove it|later version"):
        on_disk(seed).open()


@pytest.mark.parametrize("field", ["starts", "opened", "incarnation"])
def test_wrong_fields_of_an_identity_are_refused(seed: Path, field: str) -> None:
    path = seed / "data" / "identity"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: None}))
    with pytest.raises(StoreDamaged, match=field):
        on_disk(seed).open()


@pytest.mark.parametrize(
    "pointer",
    ["../elsewhere", "/tmp", "", ".", "copy-", "copy-0", "copy-01", "copy-1/../x", "store\nstore", "identity"],
)
def test_a_pointer_to_anything_but_a_copy_is_refused(seed: Path, pointer: str) -> None:
    (seed / "data" / "current").write_text(pointer)
    before = sorted((seed / "data").rglob("*"))
    with pytest.raises(StoreFormatError, match="no copy of the store"):
        on_disk(seed).open()
    assert {*before} <= {*(seed / "data").rglob("*")}


def test_links_are_not_followed(seed: Path) -> None:
    data = seed / "data"
    current = data / current_name(data)
    current.rename(seed / "elsewhere")
    current.symlink_to(seed / "elsewhere")
    with pytest.raises(StoreFormatError, match="not a directory"):
        on_disk(seed).open()
    assert (seed / "elsewhere" / "CURRENT").exists()


def test_a_pointer_to_a_copy_that_is_not_there_makes_no_empty_one(seed: Path) -> None:
    (seed / "data" / "current").write_text("copy-7\n")
    with pytest.raises(StoreDamaged, match="missing"):
        on_disk(seed).open()
    assert not (seed / "data" / "copy-7").exists()


def test_a_wiped_copy_is_a_new_one(tmp_path: Path) -> None:
    copies = on_disk(tmp_path)
    copies.open()
    copies.close()
    shutil.rmtree(tmp_path / "data" / "store")
    copies.open()
    assert copies.identity.incarnation == "copy 2"
    copies.close()


def test_another_store_in_its_place_is_a_new_copy(tmp_path: Path) -> None:
    copies = on_disk(tmp_path)
    copies.open()
    copies.close()
    shutil.rmtree(tmp_path / "data" / "store")
    Store.open(LevelDBBackend(tmp_path / "data" / "store")).close()
    copies.open()
    assert copies.identity.incarnation == "copy 2"
    copies.close()
    copies.open()
    assert copies.identity.incarnation == "copy 2"
    copies.close()


def test_an_older_state_of_the_store_is_a_new_copy(tmp_path: Path) -> None:
    """Restored from a backup, beside the identity of today."""
    copies = on_disk(tmp_path)
    copies.open()
    copies.close()
    shutil.copytree(tmp_path / "data" / "store", tmp_path / "backup")
    copies.open()
    copies.close()
    shutil.rmtree(tmp_path / "data" / "store")
    (tmp_path / "backup").rename(tmp_path / "data" / "store")
    copies.open()
    assert copies.identity.incarnation == "copy 2"
    copies.close()


def test_a_crash_in_the_first_open_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "data" / "store").mkdir(parents=True)
    (tmp_path / "data" / "store" / "LOCK").touch()  # as LevelDB leaves it before it has made a database
    (tmp_path / "data" / "store" / "MANIFEST-000001").touch()
    copies = on_disk(tmp_path)
    assert copies.open().position == (0, 0)
    copies.close()


def test_a_directory_has_one_user_also_while_a_side_copy_is_open(tmp_path: Path) -> None:
    copies = on_disk(tmp_path)
    copies.begin_side(copies.open())
    with pytest.raises(StoreLocked):
        on_disk(tmp_path).open()
    with pytest.raises(StoreLocked):
        remove_copies(tmp_path / "data")
    copies.close()
    other = on_disk(tmp_path)
    other.open()
    other.close()


def test_what_an_old_copy_has_left_is_removed(seed: Path) -> None:
    data = seed / "data"
    (data / "store").mkdir()
    (data / "store" / "CURRENT").touch()
    (data / "notes.txt").write_text("mine")
    remove_copies(data)
    assert [path.name for path in data.iterdir()] == ["notes.txt"]
    remove_copies(data)
    remove_copies(data / "nowhere")


def test_files_of_others_in_a_copy_are_not_removed(seed: Path) -> None:
    (seed / "data" / "copy-9").mkdir()
    (seed / "data" / "copy-9" / "notes.txt").write_text("mine")
    copies = on_disk(seed)
    with pytest.raises(StoreFormatError, match=r"notes\.txt"):
        copies.open()
    copies.close()
    with pytest.raises(StoreFormatError, match=r"notes\.txt"):
        remove_copies(seed / "data")
    assert (seed / "data" / "copy-9" / "notes.txt").exists()


def test_a_current_copy_that_will_not_open_can_be_replaced(seed: Path) -> None:
    current = seed / "data" / current_name(seed / "data")
    (current / "CURRENT").write_text("MANIFEST-999999\n")
    copies = on_disk(seed)
    with pytest.raises(StoreError):
        copies.open()
    store = copies.start_anew()
    assert store.position == (0, 0)
    copies.close()
    assert sorted(path.name for path in (seed / "data").iterdir()) == ["identity", "lock", "store"]


@pytest.mark.parametrize("kind", ["crash", "power"])
def test_a_crash_while_starting_anew_never_leaves_an_old_copy_that_counts(
    seed: Path, tmp_path: Path, kind: str
) -> None:
    before = read_identity(seed / "data")
    assert before is not None
    for at in count(1):
        path = tmp_path / f"{at}"
        shutil.copytree(seed, path)
        copies = DiskCopies(path / "data", "set", "a", lambda: "another", FailingFiles(at, power=kind == "power"))
        try:
            copies.start_anew()
        except Crash:
            finished = False
        else:
            finished = True
        copies.close()
        copies = DiskCopies(path / "data", "set", "a", lambda: "another")
        store = copies.open()
        assert store.position in ((0, 0), (1, 1))
        assert store.position == (1, 1) or copies.identity.incarnation == "another"
        copies.close()
        if finished:
            assert store.position == (0, 0)
            break
